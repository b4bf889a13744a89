"""Raw radiographs and CT -> shards and manifest; foreign tars -> manifest; shards -> a check of every byte.

Parses, calls `shards`, prints a table, exits: 0 done, 2 bad arguments or configuration, 3 bad data or faults found.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from launchers import command, pack_forget
from launchers.pack_sources import SOURCES
from shards import adopt, reader, tar_index, writer
from shards.dataset import open_manifest
from shards.errors import ConfigError
from shards.ingest.image_file import AREA_MAX_PIXELS, SIDE_MIN_PIXELS
from shards.manifest import Manifest
from shards.workers import in_order

EXIT_FAULTS = 3
QUIET_REPORT_S = 10.0  # without a terminal, a line of progress this often
FAULTS_SHOWN = 50

ADOPT = "adopt"  # the one that makes no samples: it indexes what lies there

DESCRIPTION = """\
Pack studies into shards: plain WebDataset tars with a manifest, split by patient, under keyed names.

  a table beside a folder of images (start from ci/data/nih_cxr/mapping.toml):
    python launchers/pack.py --source table --input DIR --mapping DIR/mapping.toml --public --output shards/nih
  public sets of bone radiographs: fracatlas, grazpedwri, mura, rsna_bone_age, oai
    python launchers/pack.py --source mura --input MURA-v1.1 --public --output shards/mura
  DICOM files of a hospital (the key names patients and studies; keep it, and keep it secret):
    (umask 077; openssl rand -hex 32 > site.key)
    python launchers/pack.py --source dicom --input DIR --key-file site.key --output s3://bucket/cxr
  CT volumes: NIfTI files that a table names (start from ci/data/mappings/ct_folder.toml), or CT-RATE's folders, with
  the masks of a segmentation model
    python launchers/pack.py --source nifti --input DIR --mapping DIR/mapping.toml --masks DIR/masks \\
        --key-file site.key --output shards/ct
    python launchers/pack.py --source ct_rate --input CT-RATE/dataset --masks MASKS --public \\
        --deidentified 'public set' --output shards/ct_rate
  DICOM series of CT slices, each a volume:
    python launchers/pack.py --source dicom_ct --input DIR --key-file site.key --output shards/ct
  a hospital's export, DICOM studies and reports as files or a table, matched by accession number or patient and day
  (start from ci/data/mappings/archive.toml); writes an audit of counts beside the manifest:
    python launchers/pack.py --source archive --input EXPORT --mapping archive.toml --key-file site.key \\
        --output shards/bone
  reports with them: raw text passes de-identification and extraction, or was prepared by prepare_reports.py
    python launchers/pack.py --source dicom --input DIR --key-file site.key --reports structured reports.csv \\
        --output shards/site
  synthetic chests with known truth, CT volumes with organ masks, and bones with French reports:
    python launchers/pack.py --source phantom --samples 3000 --difficulty easy --output shards/phantom
    python launchers/pack.py --source phantom_ct --samples 1200 --normal 0.9 --output shards/phantom_ct
    python launchers/pack.py --source phantom_bone --samples 3000 --difficulty standard --output shards/phantom_bone
  a packed set once more, with where the entities of each report look in its images, as a run of ECAMP sees it:
    python launchers/pack.py --source grids --input shards/site/manifest.json --run-dir runs/ecamp \\
        --output shards/site_grids
  WebDataset tars from elsewhere, indexed once and never rewritten:
    python launchers/pack.py --source adopt --input 'train=s3://bucket/cc/{000..127}.tar' --output shards/cc
  check a packed set, every byte:
    python launchers/pack.py --verify shards/nih/manifest.json
  forget patients of a packed set, see `pack.py forget --help`:
    python launchers/pack.py forget --patient-file ids.txt --key-file site.key --manifest shards/site/manifest.json

A run that was interrupted is continued by the same command; the result is the same, byte for byte.
Every input ends as a sample or is counted with a reason in manifest.json and named in refused.jsonl."""

EPILOG = "exit codes: 0 done, 2 bad arguments or configuration, 3 bad data or faults found, 130/143 interrupted"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        "pack.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--verify", metavar="MANIFEST", help="check all shards of a set instead of packing")
    result.add_argument("--source", choices=(*SOURCES, ADOPT), help="what --input holds")
    result.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="PATH",
        help="folder; for grids: a manifest; for adopt: [SPLIT=]URL, repeated",
    )
    result.add_argument("--output", metavar="URL", help="folder or s3://bucket/prefix, made if missing")
    result.add_argument("--overwrite", action="store_true", help="remove the set that --output holds first")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    result.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="spread the studies over --workers actors of a Ray cluster: HOST:PORT, auto (this machine's) or local; "
        "every machine reads --input under the same path, this one writes the shards",
    )

    names = result.add_argument_group("names and text")
    names.add_argument("--key-file", metavar="FILE", help="secret, mode 0600: names become keyed hashes of it")
    names.add_argument("--public", action="store_true", help="the input is a public set: no secret is needed")
    names.add_argument(
        "--reports",
        nargs="+",
        metavar="WORD",
        help="`structured [FILE]`: text is de-identified and structured on its way, or comes from a FILE of "
        "prepare_reports.py; for dicom the text lies in a FILE, CSV or Parquet, with a column study "
        "(StudyInstanceUID) and one a section",
    )
    names.add_argument(
        "--labels", metavar="SET", default="chexpert14", help="read from reports: chexpert14 or ct_rate18 (%(default)s)"
    )
    names.add_argument(
        "--deidentified", metavar="HOW", help="instead: your statement of how the text was cleared elsewhere"
    )

    names.add_argument(
        "--refuse-burned-in-text",
        action="store_true",
        help="dicom, archive, table: leave out images in which OCR reads 35 characters or more; needs "
        "rapidocr-onnxruntime, and about a second an image",
    )

    dicom = result.add_argument_group("dicom")
    dicom.add_argument(
        "--modalities",
        nargs="+",
        metavar="TERM",
        help="DICOM modalities taken, others are refused by name (CR DX DR); MG, RF, PX, IO come by asking",
    )

    archive = result.add_argument_group("archive")
    archive.add_argument(
        "--window-days", type=int, default=0, metavar="N",
        help="between study and report, where no accession number joins them (%(default)s: the same day)",
    )  # fmt: skip
    archive.add_argument(
        "--keep-without-laterality", action="store_true", help="take images of hands, knees, ... of an unknown side"
    )
    archive.add_argument("--shared-folders", action="store_true", help="a folder may hold images of several patients")

    table = result.add_argument_group("table, archive")
    table.add_argument(
        "--mapping", metavar="TOML", help="which column is what; default: mapping.toml, or archive.toml, in --input"
    )
    table.add_argument("--side-min", type=int, default=SIDE_MIN_PIXELS, help="smallest side taken (%(default)s)")
    table.add_argument("--area-max", type=int, default=AREA_MAX_PIXELS, help="most pixels an image has (%(default)s)")

    volumes = result.add_argument_group("nifti, ct_rate, dicom_ct")
    volumes.add_argument(
        "--masks",
        metavar="DIR",
        help="label maps, or folders of structures, under the same relative paths as volumes; "
        "dicom_ct: SERIES_INSTANCE_UID.nii.gz, or SEG and RTSTRUCT objects, which may lie in --input",
    )
    volumes.add_argument(
        "--segment",
        choices=("totalsegmentator",),
        help="make the masks of volumes that have none; results are kept in OUTPUT.masks. One process, which may use "
        "a GPU; needs `pip install TotalSegmentator`, whose anonymous usage statistics its own settings switch off",
    )
    volumes.add_argument("--class-map", default="totalseg_v2", help="what the labels mean: totalseg_v1 (%(default)s)")
    volumes.add_argument(
        "--unknown-ids", choices=("refuse", "drop"), default="refuse", help="labels not in the map (%(default)s)"
    )
    volumes.add_argument(
        "--mask-grid", choices=("refuse", "resample"), default="refuse", help="masks of another grid (%(default)s)"
    )
    spacing = volumes.add_mutually_exclusive_group()
    spacing.add_argument(
        "--spacing", type=float, nargs=3, default=(3.0, 1.0, 1.0), metavar=("Z", "Y", "X"), help="mm (3 1 1)"
    )
    spacing.add_argument(
        "--own-spacing", action="store_true", help="keep each volume's spacing: no upright one changes"
    )
    volumes.add_argument("--no-crop", action="store_true", help="keep what lies far from any labelled anatomy")

    phantom = result.add_argument_group("phantom")
    phantom.add_argument("--seed", type=int, default=0, help="of the generator (%(default)s)")
    phantom.add_argument(
        "--samples", default="3000", metavar="N[,N,N]", help="studies: train, or train,validation,test (%(default)s)"
    )
    phantom.add_argument("--difficulty", help="easy or standard (phantom_ct: standard, others: easy)")
    phantom.add_argument("--size", type=int, default=128, help="pixels a side (%(default)s)")
    phantom.add_argument(
        "--degraded", type=float, default=0.0, metavar="SHARE",
        help="of the studies have a bad image, mild to useless, and a report hedged for it (%(default)s)",
    )  # fmt: skip
    phantom.add_argument(
        "--normal", type=float, default=0.9, metavar="SHARE", help="of organs without disease, phantom_ct (%(default)s)"
    )
    phantom.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=(48, 64, 64),
        metavar=("D", "H", "W"),
        help="voxels, phantom_ct (48 64 64)",
    )
    phantom.add_argument("--structured", action="store_true", help="write structured reports, too")
    phantom.add_argument(
        "--entities",
        action="store_true",
        help="write what the report's words are, as prepared reports have it; phantom",
    )

    grids = result.add_argument_group("grids")
    grids.add_argument("--run-dir", metavar="DIR", help="of a run of ECAMP that was trained without grids")
    grids.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or step-N (%(default)s)")

    shards = result.add_argument_group("shards")
    shards.add_argument("--shard-bytes", type=int, default=64 << 20, help="a shard ends here (%(default)s)")
    shards.add_argument("--shard-samples", type=int, help="or here; small sets need many shards to mix well")
    shards.add_argument("--chunk-bytes", type=int, default=tar_index.CHUNK_BYTES, help="unit of fetching (%(default)s)")
    shards.add_argument(
        "--fractions",
        default="train=0.8,validation=0.1,test=0.1",
        help="of patients, if no split is given (%(default)s)",
    )
    shards.add_argument("--headers-only", action="store_true", help="adopt without checksums: faster, unverified")
    return result


def _fractions(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise ConfigError(f"--fractions {text}: write e.g. train=0.8,validation=0.1,test=0.1") from None


class _Asked(argparse.Namespace):
    """The command line, and which of its options somebody has looked at."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(**vars(given))
        self.__dict__["_seen"] = set[str]()

    def __getattribute__(self, name: str) -> Any:
        values = super().__getattribute__("__dict__")
        if name in values:
            values["_seen"].add(name)
        return super().__getattribute__(name)

    def refuse_unread(self) -> None:
        """Raises ConfigError, naming them, where options were set that this source does not look at."""
        values, defaults = self.__dict__, vars(parser().parse_args([]))
        unread = [name for name in defaults if name not in values["_seen"] and values[name] != defaults[name]]
        if unread:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
            raise ConfigError(f"{options}: without effect on --source {self.source} as it is asked; leave it out")


def _pack(arguments: _Asked, console: Console) -> Manifest:
    kind = SOURCES[arguments.source]
    alone = bool(arguments.segment or kind.one_process)  # a model that splits its own work
    config = writer.WriterConfig(
        shard_bytes=arguments.shard_bytes,
        shard_samples=arguments.shard_samples,
        chunk_bytes=arguments.chunk_bytes,
        workers=1 if alone else arguments.workers,
        fractions=_fractions(arguments.fractions),
        overwrite=arguments.overwrite,
    )
    config.check()
    source = kind.build(arguments)
    audit = None if kind.audit is None else partial(kind.audit, source)
    run: writer.Run = in_order
    if arguments.ray:
        if alone:
            raise ConfigError(f"--ray: the model of --source {arguments.source} works in one process; leave --ray out")
        from launchers import ray_data

        run = partial(ray_data.streamed, address=arguments.ray)
    arguments.refuse_unread()
    with _progress(console) as show:
        return writer.write_shards(source, arguments.output, config, on_progress=show, audit=audit, run=run)


def _adopt(arguments: _Asked) -> Manifest:
    if not arguments.input:
        raise ConfigError("--source adopt needs --input [SPLIT=]URL, e.g. --input 'train=s3://bucket/{000..127}.tar'")
    splits: dict[str, list[str]] = {}
    for text in arguments.input:
        split, equals, pattern = text.partition("=")
        named = equals == "=" and split.replace("_", "").replace("-", "").isalnum()
        splits.setdefault(split if named else "train", []).append(pattern if named else text)
    settings = {name: getattr(arguments, name) for name in ("headers_only", "chunk_bytes", "overwrite")}
    arguments.refuse_unread()
    return adopt.adopt(splits, arguments.output, **settings)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[writer.Progress], None]]:
    """A bar on a terminal, else a line every 10 seconds."""
    if not console.is_terminal:
        last = time.monotonic()

        def line(state: writer.Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= QUIET_REPORT_S:
                last = time.monotonic()
                console.print(
                    f"{state.done} of {state.total} studies, {state.bytes_written // 1_000_000} MB, {state.shard}"
                )

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[size]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("planning", total=None, size="")

        def show(state: writer.Progress) -> None:
            size = f"{state.bytes_written / 1e6:.1f} MB"
            bar.update(task, description=state.shard, completed=state.done, total=state.total, size=size)

        yield show


def _print_summary(manifest: Manifest, output: str, seconds: float, console: Console) -> None:
    table = Table(title=f"{manifest.source} -> {escape(output)}", title_justify="left")
    for column in ("split", "samples", "images", "patients", "shards", "MB"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in manifest.splits:
        shards = manifest.of_split(split).shards
        table.add_row(
            split,
            str(sum(shard.samples for shard in shards)),
            str(sum(shard.images for shard in shards)),
            str(manifest.patients.get(split, "unknown")),
            str(len(shards)),
            f"{sum(shard.bytes for shard in shards) / 1e6:.1f}",
        )
    console.print(table)
    _print_reasons("left out", manifest.refused, console)
    _print_reasons("packed, with a remark", manifest.noted, console)
    place = output.rstrip("/")
    console.print(f"{manifest.samples} samples in {seconds:.1f} s; sha256 {manifest.sha256[:16]}", highlight=False)
    console.print(f"{escape(place)}/manifest.json", highlight=False, soft_wrap=True)


def _print_reasons(title: str, reasons: Mapping[str, int], console: Console) -> None:
    if not reasons:
        return
    table = Table(title=title, title_justify="left")
    table.add_column("inputs", justify="right")
    table.add_column("reason")
    for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
        table.add_row(str(count), escape(reason))
    console.print(table)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    store, manifest = open_manifest(arguments.verify)
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=max(1, arguments.workers)) as pool:
        found = list(pool.map(lambda shard: reader.verify(store, manifest, shard), manifest.shards))
    faults = [fault for of_shard in found for fault in of_shard]
    for fault in faults[:FAULTS_SHOWN]:
        key = "" if fault.key is None else f", sample {fault.key}"
        console.print(f"shard {fault.shard}{key}: {fault.cause}", markup=False, highlight=False, soft_wrap=True)
    if len(faults) > FAULTS_SHOWN:
        console.print(f"... and {len(faults) - FAULTS_SHOWN} more")
    bad = sum(bool(of_shard) for of_shard in found)
    unverified = sum(shard.sha256 is None for shard in manifest.shards)
    note = f", {unverified} without checksums (--headers-only)" if unverified else ""
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    seconds = time.monotonic() - started
    console.print(
        f"{len(manifest.shards)} shards, {manifest.samples} samples, {size:.1f} MB in {seconds:.1f} s: "
        f"{len(faults)} faults in {bad} shards{note}",
        highlight=False,
        soft_wrap=True,
    )
    return EXIT_FAULTS if faults else 0


def _run(arguments: _Asked, console: Console) -> int:
    if arguments.verify:
        return _verify(arguments, console)
    reading = [name for name, kind in SOURCES.items() if kind.refuses_burned_in_text]
    if arguments.refuse_burned_in_text and arguments.source not in reading:
        raise ConfigError(f"--refuse-burned-in-text: reads images of {', '.join(reading)}, not of {arguments.source}")
    for option in ("source", "output"):
        if getattr(arguments, option) is None:
            raise ConfigError(f"--{option} is missing; see --help for examples")
    started = time.monotonic()
    manifest = _adopt(arguments) if arguments.source == ADOPT else _pack(arguments, console)
    _print_summary(manifest, arguments.output, time.monotonic() - started, console)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["forget"]:
        return pack_forget.main(words[1:])
    arguments = _Asked(parser().parse_args(words))
    return command.run(lambda console: _run(arguments, console), "shards")


if __name__ == "__main__":
    sys.exit(main())
