"""How well image encoders serve downstream tasks: ours or others', frozen or fine-tuned, as labels get fewer.

Parses, reads the images once for each encoder, learns every (task, encoder, share, seed) that is not in the output
folder yet, prints tables, and writes `transfer.json` and TensorBoard scalars beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from core.evaluation.classification import Features, with_validation
from core.evaluation.comparison import Scored, by_subgroup, compare
from core.evaluation.fitting import FitConfig
from core.evaluation.images import ImageSplit, share_of_patients
from core.evaluation.segmentation import DECODERS
from core.evaluation.transfer import TASKS, Outputs, Splits, TransferConfig, learn, not_asked_of, scored
from core.metrics import Metrics
from core.models.foreign import Given
from core.world import World
from launchers.command import errors_in_one_line
from launchers.evaluation_progress import shown_progress
from launchers.evaluation_tables import interval
from launchers.transfer_data import TransferEncoder, open_encoder, random_like, read_images
from launchers.transfer_studies import STUDY_TASKS, StudyOptions, study_reports
from shards.dataset import read_manifest
from shards.errors import ConfigError

Progress = Callable[[str, int, int], None]
UNDEFINED = "not defined"
PERCENTS = (1.0, 10.0, 100.0)
EPILOG = """\
encoders:
  a run directory of pretrain.py, or weights of others: a .safetensors file, a .pt / .pth / .bin file that holds
  tensors only, or a Hugging Face folder. Names of timm, MAE, ECAMP, DINOv2, RAD-DINO, Hugging Face ViT and open_clip
  are understood; what matched is printed. NAME=PATH gives an encoder a name. The first is the reference that the
  others are compared with.

tasks:
  linear_probe            logistic regression on pooled features, the strength chosen on the validation split
  fine_tune               encoder and linear head on images moved a little, the best weights on the validation split
  segmentation            a decoder on frozen patches: Dice per image, of an empty mask 1 for an empty prediction only
  segmentation_fine_tune  the same, with the encoder
  detection               an FCOS head on frozen patches: COCO's mAP over all images (needs pycocotools)
  detection_fine_tune     the same, with the encoder
  study_probe             small heads on frozen features, the views of a study pooled, for each of --targets: logistic
                          regression of a label (AUROC, AUPRC), proportional odds of an ordinal grade (quadratic kappa,
                          accuracy, AUROC), ridge regression of a number (MAE), their strength by cross-validation
                          among those who teach. A measurement of a few whole values is a grade, any other a number
  study_fine_tune         the same targets, with the encoder; with --random: taught from scratch

Each task is taught with a share of the training patients' labels, another draw and head for each seed. Figures are
means over seeds on the test split, with 95 % intervals from a bootstrap of patients; differences from the reference
are paired, with a two-sided p. Subgroups: age band, sex, view, source.

  python launchers/transfer.py --encoder runs/clip mae=mae_vit_base.pth --random --data shards/manifest.json \\
      --task linear_probe segmentation --structures effusion --output runs/transfer

What was learned is kept in the output folder, so that a run that was cut off goes on where it was.

exit codes: 0 done, 2 bad arguments or configuration, 3 bad data or damaged checkpoint, 4 a loss not finite
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`percents` of the training patients; `structures` of the label maps, for segmentation."""

    data: str
    tasks: tuple[str, ...] = ("linear_probe",)
    targets: tuple[str, ...] = ()  # of study tasks
    with_sex: bool = False
    percents: tuple[float, ...] = PERCENTS
    seeds: tuple[int, ...] = (0, 1, 2)
    structures: tuple[str, ...] = ()
    split: str = "test"
    limit: int | None = None
    replicates: int = 1000
    learning: TransferConfig = field(default_factory=TransferConfig)


class KeptOutputs:
    """What was learned, in files of the output folder, each under a digest of all that decides it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, settings: Mapping[str, Any], make: Callable[[], Outputs]) -> Outputs:
        """Those of these settings, made if they are not there or damaged."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{digest}.npz"
        try:
            with np.load(path, allow_pickle=False) as found:
                return dict(found)
        except (FileNotFoundError, EOFError, ValueError, BadZipFile, zlib.error):
            pass  # a damaged one is made again
        outputs = make()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **outputs)  # type: ignore[arg-type]
        partial = path.with_suffix(".partial")
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
        return outputs


def transfer(
    encoders: Sequence[TransferEncoder],
    options: Options,
    kept: KeptOutputs,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """The report: task -> percent -> comparison and subgroups. Raises ConfigError or DataError as its parts do."""
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        raise ConfigError(f"encoders are named {', '.join(names)}; give each a name of its own with NAME=PATH")
    if not options.structures and any(task.startswith("segmentation") for task in options.tasks):
        raise ConfigError("segmentation needs --structures, names of the manifest's label maps")
    results: dict[tuple[str, float], dict[str, list[Outputs]]] = {}
    splits: Splits | None = None
    whole = read_manifest(options.data)
    whole.of_split(options.split)  # refused here where there is none
    manifest = whole.sha256
    of_images = [task for task in options.tasks if task not in STUDY_TASKS]
    digests = [digest_of(encoder) for encoder in encoders]
    for encoder, weights in zip(encoders, digests, strict=True):
        if not of_images:
            break
        splits = read_splits(encoder, options, progress)
        check_boxes(splits.train, options)
        for task in of_images:
            for percent in options.percents:
                learned = []
                for place, seed in enumerate(seeds_of(task, percent, options)):
                    settings = {
                        "task": task, "percent": percent, "seed": seed, "weights": weights, "manifest": manifest,
                        "split": options.split, "limit": options.limit, "structures": options.structures,
                        "image_size": encoder.decode.image_size, "learning": asdict(options.learning),
                    }  # fmt: skip
                    what = f"{encoder.name}: {task} at {percent:g} %"
                    learned.append(kept.of(settings, _learning(task, encoder, splits, percent, seed, options)))
                    progress(what, place + 1, len(seeds_of(task, percent, options)))
                results.setdefault((task, percent), {})[encoder.name] = learned
    report: dict[str, Any] = {
        "data": options.data, "manifest_sha256": manifest, "split": options.split, "replicates": options.replicates,
        "encoders": {encoder.name: encoder.source for encoder in encoders},
        "images": {}, "skipped": {}, "tasks": {},
    }  # fmt: skip
    if splits is not None:
        report["images"] = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
        report["skipped"] = {name: dict(getattr(splits, name).skipped) for name in ("train", "validation", "test")}
    for (task, percent), learned_by in results.items():
        assert splits is not None
        scores: dict[str, Scored] = {name: scored(task, learned, splits) for name, learned in learned_by.items()}
        patients = splits.test.patient_key.numpy()
        of = compare(scores, patients, replicates=options.replicates)
        if of is None:
            raise ConfigError(f"{task}: nothing in {options.split} of {options.data} to score; it lacks labels")
        report["tasks"].setdefault(task, {})[f"{percent:g}"] = {
            "figure": TASKS[task],
            "seeds": len(next(iter(learned_by.values()))),
            "asked": f"{len(splits.test)} images",
            "not_asked": not_asked_of(task, splits),
            **of.to_json(),
            "subgroups": by_subgroup(scores, patients, splits.test.groups, replicates=options.replicates),
        }
    of_studies = tuple(task for task in options.tasks if task in STUDY_TASKS)
    if of_studies:
        found, skipped = study_reports(encoders, digests, _study_options(options, of_studies), kept.of, progress)
        report["tasks"] |= found
        report["skipped"] |= {f"{name}, studies": causes for name, causes in skipped.items()}
    return report


def _study_options(options: Options, tasks: tuple[str, ...]) -> StudyOptions:
    return StudyOptions(
        data=options.data, tasks=tasks, targets=options.targets, with_sex=options.with_sex, percents=options.percents,
        seeds=options.seeds, split=options.split, limit=options.limit, replicates=options.replicates,
        fit=options.learning.fit,
    )  # fmt: skip


def _learning(
    task: str, encoder: TransferEncoder, splits: Splits, percent: float, seed: int, options: Options
) -> Callable[[], Outputs]:
    return lambda: learn(task, encoder.vision, splits, percent / 100, seed, options.learning, autocast=encoder.autocast)


def seeds_of(task: str, percent: float, options: Options) -> tuple[int, ...]:
    """One where seeds change nothing: a regression on all labels has one answer."""
    return options.seeds[:1] if task == "linear_probe" and percent == 100 else options.seeds


def read_splits(encoder: TransferEncoder, options: Options, progress: Progress) -> Splits:
    """Images as this encoder wants them; a fifth of the training patients validates where there is no such split."""
    structures = options.structures if any(task.startswith("segmentation") for task in options.tasks) else ()

    def read(split: str) -> Any:
        return read_images(
            options.data, split, encoder.decode, structures=structures, limit=options.limit, progress=progress
        )

    there = read_manifest(options.data).splits
    held_out = read("validation") if "validation" in there and options.split != "validation" else None
    train, validation = with_validation(read("train"), held_out, seed=0)
    splits = Splits(train=train, validation=validation, test=read(options.split))
    if "linear_probe" not in options.tasks:
        return splits
    features = Features.of(encoder.vision, train, validation, splits.test, autocast=encoder.autocast)
    return replace(splits, features=features)


def check_boxes(train: ImageSplit, options: Options) -> None:
    """Raises ConfigError, before anything is learned, where a share for detection has no box to learn from."""
    if not any(task.startswith("detection") for task in options.tasks):
        return
    drawn = np.array([len(boxes) > 0 for boxes in train.boxes])
    for percent in options.percents:
        for seed in options.seeds:
            if not drawn[share_of_patients(train, percent / 100, seed).numpy()].any():
                raise ConfigError(
                    f"detection: among {percent:g} % of the patients, as seed {seed} draws them, no image has a box "
                    f"({drawn.sum()} of {len(drawn)} training images have one); leave --percents {percent:g} out"
                )


def digest_of(encoder: TransferEncoder) -> str:
    """Of the encoder's weights and of how its images are made."""
    digest = hashlib.sha256(json.dumps(asdict(replace(encoder.decode, threads=1))).encode())
    pooling = {} if encoder.pool is None else {f"pool.{k}": v for k, v in encoder.pool.state_dict().items()}
    for name, value in (encoder.vision.state_dict() | pooling).items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """TensorBoard name -> figure."""
    return {
        f"transfer/{task}/{name.replace(' ', '_')}_at_{percent}": float(figure["value"])
        for task, percents in report["tasks"].items()
        for percent, of in percents.items()
        for name, figure in of["figures"].items()
        if figure["value"] is not None
    }


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """`transfer.json` and `tb` in the output folder."""
    (folder / "transfer.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    metrics = Metrics(folder, World(), first_step=0)
    metrics.scalars(0, figures_of(report))
    metrics.close()


def tables(report: Mapping[str, Any]) -> list[Table]:
    """One table a task, a row an encoder, a column a share; differences from the reference in brackets below."""
    found = []
    for task, percents in report["tasks"].items():
        first = next(iter(percents.values()))
        title = f"{task}: {first['figure']}, {first['asked']}, mean over seeds"
        caption = "; ".join(f"{count} x {cause}" for cause, count in first["not_asked"].items())
        table = Table(title=title, caption=f"not asked: {caption}" if caption else None, caption_justify="left")
        table.add_column("encoder")
        for percent, of in percents.items():
            table.add_column(f"{percent} % of labels ({of['seeds']} seed{'s' * (of['seeds'] > 1)})", justify="right")
        for name in first["figures"]:
            table.add_row(name, *(interval(of["figures"][name], UNDEFINED) for of in percents.values()))
        for name in first["differences"]:
            cells = [of["differences"][name] for of in percents.values()]
            shown = (f"{interval(one, UNDEFINED, sign=True)} p {one['p']:.3f}" for one in cells)
            table.add_row(f"  {name} - {first['reference']}", *shown)
        found.append(table)
    return found


def subgroup_tables(report: Mapping[str, Any]) -> list[Table]:
    """One table a task, of the largest share: a row a subgroup, a column an encoder."""
    found = []
    for task, percents in report["tasks"].items():
        percent, of = list(percents.items())[-1]
        if not of["subgroups"]:
            continue
        table = Table(title=f"{task} at {percent} % of labels, by subgroup: {of['figure']}")
        for heading in ("", "", "studies", "patients", *of["figures"]):
            table.add_column(heading, justify="right" if heading else "left")
        for attribute, values in of["subgroups"].items():
            for value, one in values.items():
                figures = (one["comparison"] or {}).get("figures", {})
                shown = (interval(figures[name], UNDEFINED) if name in figures else "too few" for name in of["figures"])
                table.add_row(attribute, value, str(one["studies"]), str(one["patients"]), *shown)
        found.append(table)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="transfer.py", description="Judge image encoders by downstream tasks.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = command.add_argument
    add("--encoder", nargs="+", required=True, metavar="[NAME=]PATH", help="run directories or weights of others")
    add("--random", action="store_true", help="and an encoder of the first one's shape that was never trained")
    add("--data", required=True, metavar="MANIFEST", help="folder or s3://, with labels, label maps or boxes")
    add("--output", required=True, metavar="DIR", help="reports, scalars, and what was learned")
    add("--task", nargs="+", choices=(*TASKS, *STUDY_TASKS), default=["linear_probe"])
    add("--targets", nargs="+", default=[], metavar="NAME", help="study tasks: labels or measurements as kl_grade")
    add("--with-sex", action="store_true", help="study_probe: sex is an input of the heads, beside the features")
    add("--percents", nargs="+", type=float, default=list(PERCENTS), metavar="P", help="of patients; default: 1 10 100")
    add("--seeds", type=int, default=3, metavar="N", help="draws of the share, and heads; default: 3")
    add("--structures", nargs="+", default=[], metavar="NAME", help="segmentation: of the manifest's label maps")
    add("--decoder", choices=tuple(DECODERS), default="progressive", help="segmentation")
    add("--split", default="test")
    add("--limit", type=int, metavar="N", help="first N studies of each split only; images are held in memory")
    add("--steps", type=int, default=FitConfig.steps, metavar="N", help=f"of every head; default: {FitConfig.steps}")
    add("--batch-size", type=int, default=FitConfig.batch_size, metavar="N")
    add("--lr", type=float, default=FitConfig.lr, help=f"of heads; default: {FitConfig.lr}")
    add("--encoder-lr", type=float, default=FitConfig.encoder_lr, help=f"fine-tuning; default: {FitConfig.encoder_lr}")
    add("--image-size", type=int, metavar="PIXELS", help="default: each encoder's own")
    add("--heads", type=int, metavar="N", help="of weights of others, where the file cannot say")
    add("--pool", choices=("class", "mean"), help="of weights of others; default: class, where there is such a token")
    add("--mean", type=float, nargs=3, help="of weights of others: of R, G, B in [0, 1]; default: the dialect's")
    add("--std", type=float, nargs=3)
    add("--replicates", type=int, default=1000, metavar="N", help="of the bootstrap")
    add("--device", help="cpu or cuda; default: a GPU if there is one")
    return command


def options_of(arguments: argparse.Namespace) -> Options:
    """Raises ConfigError for a number that makes no sense."""
    for name in ("seeds", "steps", "batch_size", "replicates", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is below 1")
    if not all(0 < percent <= 100 for percent in arguments.percents):
        raise ConfigError(f"--percents {' '.join(map(str, arguments.percents))}: shares lie above 0 and up to 100")
    if arguments.with_sex and "study_probe" not in arguments.task:
        raise ConfigError(f"--with-sex: of --task study_probe alone, not of {' '.join(arguments.task)}; leave it out")
    fit = FitConfig(
        steps=arguments.steps, batch_size=arguments.batch_size, lr=arguments.lr, encoder_lr=arguments.encoder_lr
    )
    return Options(
        data=arguments.data, tasks=tuple(arguments.task), targets=tuple(arguments.targets),
        with_sex=arguments.with_sex, percents=tuple(sorted(arguments.percents)),
        seeds=tuple(range(arguments.seeds)), structures=tuple(arguments.structures), split=arguments.split,
        limit=arguments.limit, replicates=arguments.replicates,
        learning=TransferConfig(fit=fit, decoder=arguments.decoder),
    )  # fmt: skip


def encoders_of(arguments: argparse.Namespace) -> list[TransferEncoder]:
    """Those named, and a random one if wanted."""
    mean, std = (tuple(values) if values else None for values in (arguments.mean, arguments.std))
    given = Given(heads=arguments.heads, pool=arguments.pool, mean=mean, std=std)
    device = torch.device(arguments.device) if arguments.device else None
    found = []
    for text in arguments.encoder:
        name, separator, path = text.partition("=")
        found.append(
            open_encoder(
                path if separator else text, name=name if separator else None, image_size=arguments.image_size,
                given=given, device=device,
            )
        )  # fmt: skip
    return [*found, random_like(found[0], 0)] if arguments.random else found


@errors_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    console = Console(highlight=False)
    folder = Path(arguments.output)
    options = options_of(arguments)
    encoders = encoders_of(arguments)
    for encoder in encoders:
        console.print(f"{encoder.name}: {json.dumps(encoder.source)}", soft_wrap=True, markup=False)
    with shown_progress() as progress:
        report = transfer(encoders, options, KeptOutputs(folder / "learned"), progress)
    write(folder, report)
    for table in (*tables(report), *subgroup_tables(report)):
        console.print(table)
    for split, causes in report["skipped"].items():
        if causes:
            counts = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
            console.print(f"{split}: left out: {counts}", soft_wrap=True)
    console.print(f"written to {folder}: transfer.json, tb", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
