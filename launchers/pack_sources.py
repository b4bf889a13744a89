"""What `pack.py --source` names, and what makes a source of its arguments.

A table: name of a source -> `PackSource`. Readers of DICOM and NIfTI, and torch, are imported on demand: they are slow
to load.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import command
from shards.dataset import read_manifest
from shards.errors import ConfigError, DataError
from shards.ingest import Source
from shards.ingest.image_file import ImageLimits
from shards.ingest.phantom import SPLITS, PhantomConfig
from shards.ingest.phantom_bone import BonePhantom
from shards.ingest.phantom_chest import ChestPhantom
from shards.ingest.phantom_ct import CtPhantom
from shards.ingest.table import TableMapping, TableSource
from shards.ingest.view_files import ImageFiles
from shards.manifest import MANIFEST, Manifest
from shards.store import open_store

if TYPE_CHECKING:
    from shards.ingest.archive import HospitalArchive
    from shards.ingest.segment import TotalSegmentator
    from shards.reports.identity.burned_in import BurnedInText
    from shards.reports.packing import Structured

Audit = Callable[[Source, Manifest, Mapping[str, int]], str]


@dataclass(frozen=True, kw_only=True)
class PackSource:
    """A row of the table: how the arguments become a source, and what of the command it changes."""

    build: Callable[[argparse.Namespace], Source]
    audit: Audit | None = None  # the text of `audit.md`, of a source that reads a clinic's text
    refuses_burned_in_text: bool = False  # takes --refuse-burned-in-text
    one_process: bool = False  # its model splits its own work


def _one_input(arguments: argparse.Namespace) -> str:
    if len(arguments.input) != 1:
        what = "manifest" if arguments.source == "grids" else "folder"
        raise ConfigError(f"--source {arguments.source} takes one --input {what}, {len(arguments.input)} given")
    return str(arguments.input[0])


@dataclass(frozen=True)
class _Clinic:
    """What every source of a folder is told: where it lies, what names it, and how its text is cleared."""

    folder: Path
    secret: bytes | None
    structured: Structured | None
    reports: Path | None  # a table of raw text beside the images


def _clinic(arguments: argparse.Namespace) -> _Clinic:
    folder, secret = Path(_one_input(arguments)), command.secret(arguments, f"--source {arguments.source} needs")
    return _Clinic(folder, secret, *_reports(arguments, secret))


def _dicom(arguments: argparse.Namespace) -> Source:
    from shards.ingest.dicom import RADIOGRAPHY, DicomRadiographs

    clinic = _clinic(arguments)
    return DicomRadiographs(
        folder=clinic.folder, secret=clinic.secret, modalities=tuple(arguments.modalities or RADIOGRAPHY),
        reports=clinic.reports, deidentified=arguments.deidentified, structured=clinic.structured,
        limits=_limits(arguments), burned_in=_burned_in(arguments), name=arguments.source,
    )  # fmt: skip


def _dicom_ct(arguments: argparse.Namespace) -> Source:
    from shards.ingest.dicom import DicomRadiographs
    from shards.ingest.dicom_ct import COMPUTED_TOMOGRAPHY, CtSeries

    clinic, volumes = _clinic(arguments), _volumes(arguments)
    return DicomRadiographs(
        folder=clinic.folder, secret=clinic.secret, modalities=COMPUTED_TOMOGRAPHY, reports=clinic.reports,
        deidentified=arguments.deidentified, structured=clinic.structured, limits=_limits(arguments),
        series=CtSeries(**volumes), name=_name(arguments, volumes),
    )  # fmt: skip


def _archive(arguments: argparse.Namespace) -> HospitalArchive:
    """An export with its reports, whose text always passes the pipeline."""
    from shards.ingest.archive import ArchiveOptions, HospitalArchive
    from shards.ingest.archive_reports import MAPPING, ArchiveMapping
    from shards.ingest.dicom import RADIOGRAPHY, DicomRadiographs
    from shards.reports.packing import Structured
    from shards.reports.pipeline import Config

    clinic = _clinic(arguments)
    if clinic.secret is None:
        raise ConfigError("--source archive --public: an export of a hospital is no public set; give --key-file")
    if clinic.reports is not None or arguments.deidentified or (clinic.structured and clinic.structured.prepared):
        raise ConfigError("--source archive: its reports are those that the mapping names; leave --reports out")
    output = arguments.output
    if "://" not in output and Path(output).resolve().is_relative_to(clinic.folder.resolve()):
        raise ConfigError(f"--output {output}: lies in --input, of which every file is read; name a folder beside it")
    images = DicomRadiographs(
        folder=clinic.folder, secret=clinic.secret, modalities=tuple(arguments.modalities or RADIOGRAPHY),
        limits=_limits(arguments), burned_in=_burned_in(arguments), name="archive",
    )  # fmt: skip
    return HospitalArchive(
        folder=clinic.folder,
        mapping=ArchiveMapping.read(Path(arguments.mapping) if arguments.mapping else clinic.folder / MAPPING),
        images=images,
        structured=Structured(clinic.secret, Config(ontology=arguments.labels)),
        secret=clinic.secret,
        options=ArchiveOptions(
            window_days=arguments.window_days, keep_without_laterality=arguments.keep_without_laterality,
            shared_folders=arguments.shared_folders,
        ),
    )  # fmt: skip


def _archive_audit(source: Source, manifest: Manifest, counts: Mapping[str, int]) -> str:
    from shards.ingest.archive_audit import audit

    return audit(source.settings, manifest, counts)


def _limits(arguments: argparse.Namespace) -> ImageLimits:
    return ImageLimits(side_min=arguments.side_min, area_max=arguments.area_max)


def _tables(arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """(the folder, how its text is cleared) of studies that tables name."""
    clinic = _clinic(arguments)
    if clinic.reports is not None:
        raise ConfigError(f"--reports {clinic.reports}: a table names its columns of text in the mapping, [report]")
    if not clinic.folder.is_dir():
        raise ConfigError(f"--input {clinic.folder}: no such folder; give the folder that holds table and files")
    text = {"secret": clinic.secret, "deidentified": arguments.deidentified, "structured": clinic.structured}
    return clinic.folder, text


def _mapping(arguments: argparse.Namespace, folder: Path) -> TableMapping:
    return TableMapping.read(Path(arguments.mapping) if arguments.mapping else folder / "mapping.toml")


def _table(arguments: argparse.Namespace) -> Source:
    folder, text = _tables(arguments)
    mapping = _mapping(arguments, folder)
    files = ImageFiles(folder=folder / mapping.images, limits=_limits(arguments), burned_in=_burned_in(arguments))
    return TableSource(input=folder, mapping=mapping, files=files, name=arguments.source, **text)


def _nifti(arguments: argparse.Namespace) -> Source:
    from shards.ingest.volume_file import VolumeFiles

    folder, text = _tables(arguments)
    mapping, volumes = _mapping(arguments, folder), _volumes(arguments)
    files = VolumeFiles(folder=folder / mapping.images, **volumes)
    return TableSource(input=folder, mapping=mapping, files=files, name=_name(arguments, volumes), **text)


def _ct_rate(arguments: argparse.Namespace) -> Source:
    from shards.ingest.ct_rate import ct_rate
    from shards.ingest.volume_file import VolumeFiles

    folder, text = _tables(arguments)
    volumes = _volumes(arguments)
    source = ct_rate(folder, VolumeFiles(folder=folder, **volumes), **text)
    return replace(source, name=_name(arguments, volumes))


def _bone_set(arguments: argparse.Namespace) -> Source:
    from shards.ingest.bone_sets import bone_set

    clinic = _clinic(arguments)
    if clinic.structured is not None or clinic.reports is not None or arguments.mapping:
        raise ConfigError(f"--source {arguments.source}: it has no reports and needs no --mapping; leave both out")
    return bone_set(arguments.source, clinic.folder, _limits(arguments), clinic.secret)


def _volumes(arguments: argparse.Namespace) -> dict[str, Any]:
    """How volumes are read, and where their masks lie: options of every source of volumes."""
    from shards.ingest.volume_file import VolumeOptions, VolumeReader

    z_mm, y_mm, x_mm = arguments.spacing
    options = VolumeOptions(
        spacing_mm=None if arguments.own_spacing else (z_mm, y_mm, x_mm),
        crop=not arguments.no_crop,
        class_map=arguments.class_map,
        unknown_ids=arguments.unknown_ids,
        other_grid=arguments.mask_grid,
    )
    masks = Path(arguments.masks) if arguments.masks else None
    return {"mask_folder": masks, "reader": VolumeReader(options=options, segmenter=_segmenter(arguments))}


def _name(arguments: argparse.Namespace, volumes: dict[str, Any]) -> str:
    """The source as the manifest names it, with the model of its masks."""
    segmenter = volumes["reader"].segmenter
    return arguments.source if segmenter is None else f"{arguments.source}, masks by {segmenter.name}"


def _segmenter(arguments: argparse.Namespace) -> TotalSegmentator | None:
    if arguments.segment is None:
        return None
    from shards.ingest.segment import TotalSegmentator

    if "://" in arguments.output:
        raise ConfigError(f"--output {arguments.output}: --segment keeps its results beside a folder; pack into one")
    if arguments.class_map != "totalseg_v2":
        raise ConfigError(f"--class-map {arguments.class_map}: --segment makes labels of totalseg_v2")
    return TotalSegmentator(cache=Path(f"{arguments.output.rstrip('/')}.masks"))


def _burned_in(arguments: argparse.Namespace) -> BurnedInText | None:
    if not arguments.refuse_burned_in_text:
        return None
    from shards.reports.identity.burned_in import BurnedInText

    return BurnedInText()


def _reports(arguments: argparse.Namespace, secret: bytes | None) -> tuple[Structured | None, Path | None]:
    """(how text passes the pipeline, the table of raw text) of --reports."""
    words = list(arguments.reports or ())
    structured = words[:1] == ["structured"]
    files = [Path(word) for word in words[structured:]]
    if len(files) > 1:
        raise ConfigError(f"--reports {' '.join(words)}: write `structured`, `structured FILE` or `FILE`")
    file = files[0] if files else None
    if not structured:
        return None, file
    from shards.reports.packing import Structured
    from shards.reports.pipeline import Config
    from shards.reports.prepared import is_prepared

    config = Config(ontology=arguments.labels)
    if file is not None and is_prepared(file):
        return Structured(secret, config, file), None
    return Structured(secret, config), file


def _grids(arguments: argparse.Namespace) -> Source:
    """Raises ConfigError, too, where the set would be written over the one that is read."""
    from launchers.attention_grids import AttentionGrids
    from launchers.past_run import open_run

    url = _one_input(arguments)
    if arguments.run_dir is None:
        raise ConfigError("--run-dir is missing: the run of ECAMP that looks at the images")
    read = read_manifest(url)
    with open_store(arguments.output, create=True) as output, suppress(DataError):  # what is broken is not what is read
        if output.exists(MANIFEST) and Manifest.from_bytes(output.get(MANIFEST)).sha256 == read.sha256:
            raise ConfigError(f"--output {arguments.output}: holds the set that is read; name another folder")
    with open_run(arguments.run_dir, arguments.checkpoint) as run:
        return AttentionGrids(run, url)


def _phantom_counts(text: str) -> tuple[int, int, int]:
    """Studies to train, validate and test on."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) == 1:  # a tenth for choosing checkpoints, a fifth for the figures
        counts += [max(1, counts[0] // 10), max(1, counts[0] // 5)]
    if len(counts) != 3 or min(counts) < 0:
        raise ConfigError(f"--samples {text}: write one count, or train,validation,test: 3000,300,600")
    return counts[0], counts[1], counts[2]


def _studies(arguments: argparse.Namespace, config: type[PhantomConfig]) -> dict[str, Any]:
    """What every phantom's configuration says of its studies."""
    counts = dict(zip(SPLITS, _phantom_counts(arguments.samples), strict=True))
    return {**counts, "difficulty": arguments.difficulty or config.difficulty, "seed": arguments.seed}


def _chest(arguments: argparse.Namespace) -> Source:
    config = ChestPhantom.Config(
        **_studies(arguments, ChestPhantom.Config),
        size=arguments.size,
        degraded=arguments.degraded,
        structured=arguments.structured,
        entities=arguments.entities,
    )
    return ChestPhantom(config)


def _ct(arguments: argparse.Namespace) -> Source:
    depth, height, width = arguments.shape
    config = CtPhantom.Config(
        **_studies(arguments, CtPhantom.Config), normal=arguments.normal, shape=(depth, height, width)
    )
    return CtPhantom(config)


def _bone(arguments: argparse.Namespace) -> Source:
    return BonePhantom(BonePhantom.Config(**_studies(arguments, BonePhantom.Config), size=arguments.size))


SOURCES: dict[str, PackSource] = {
    "table": PackSource(build=_table, refuses_burned_in_text=True),
    "dicom": PackSource(build=_dicom, refuses_burned_in_text=True),
    "archive": PackSource(build=_archive, audit=_archive_audit, refuses_burned_in_text=True),
    "dicom_ct": PackSource(build=_dicom_ct),
    "nifti": PackSource(build=_nifti),
    "ct_rate": PackSource(build=_ct_rate),
    **dict.fromkeys(("fracatlas", "grazpedwri", "mura", "rsna_bone_age", "oai"), PackSource(build=_bone_set)),
    "phantom": PackSource(build=_chest),
    "phantom_ct": PackSource(build=_ct),
    "phantom_bone": PackSource(build=_bone),
    "grids": PackSource(build=_grids, one_process=True),
}
