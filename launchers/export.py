"""The encoders of a run -> a folder that needs neither the run, DeepSpeed nor the data: weights, config, tokenizer.

With `--form timm` it is the image encoder alone, as `timm.create_model("local-dir:FOLDER", pretrained=True)` and
transfer.py open it. With the usual form:

from launchers.export import load_exported
encoder = load_exported("exported/clip")
images = encoder.embed_images(encoder.read_images(["a.png", "b.jpg"]))   # [2, E], unit length
texts = encoder.embed_texts(["Small left pneumothorax.", "No pleural effusion."])   # [2, E]
similarity = images @ texts.T

Of CT volumes: encoder.embed_images(**encoder.read_volumes([hu])), and of fVLM
anatomies, present = encoder.embed_anatomies(**encoder.read_volumes([hu], [labels], ids))   # [1, A, E], [1, A]

Letters: V = images or volumes, n = studies or texts, C = channels, A = anatomies, T = patches, E = shared embedding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import schema
from core.evaluation.embed import GaussianTask
from core.models.foreign import load_encoder
from core.models.gaussian import Gaussian
from core.models.timm_names import timm_config, timm_weights
from core.tasks import Task
from launchers.command import errors_in_one_line, new_folder
from launchers.past_run import PastRun, open_run
from launchers.transfer_data import vision_of
from shards import keyed
from shards.batch import Batch, ViewRecord
from shards.decode import Decoder
from shards.decode_volume import Crop, VolumeDecoder, place_crop
from shards.errors import ConfigError, DataError
from shards.image_header import read_header
from shards.store import open_store
from shards.tokenizer import Tokenizer, load_tokenizer
from shards.transforms import augment
from shards.transforms.anatomy import plain_name
from shards.volume_codec import encode_labels, encode_volume

FORMAT, VERSION = "roentgen-encoder", 2
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
TOLERANCE = 1e-6  # largest difference of an embedding's element from the run's model
CHECKED_VIEWS = 4  # two of each study
CHECKED_TEXTS = (
    "There is a small left pneumothorax.",
    "No pleural effusion. The heart is normal in size.",
    "Moderate consolidation in the right lower zone, likely pneumonia; follow-up is recommended.",
)


@dataclass(frozen=True, kw_only=True)
class ExportedConfig:
    """`config.json` of an exported folder.

    `task`: what the encoders are, as a recipe's `task` (configs.schema). `image` or `volume`, the other being None,
    says how stored values become `pixel_values`.
    """

    format: str
    version: int
    task: dict[str, Any]
    image: Decoder.Config | None
    volume: VolumeDecoder.Config | None
    text_length: int
    tokenizer_sha256: str
    weights_sha256: str
    origin: dict[str, Any] = field(default_factory=dict)  # task, step, recipe: where the weights come from


class ExportedEncoder(torch.nn.Module):
    """The encoders with their tokenizer, on one device, in fp32."""

    def __init__(self, config: ExportedConfig, task: Task, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.task, self.tokenizer = config, task, tokenizer
        self.requires_grad_(False)
        self.eval()
        self._decoder: Decoder | None = None

    @property
    def device(self) -> torch.device:
        return next(self.task.parameters()).device

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor, study_index: Tensor | None = None, **of_views: Tensor) -> Tensor:
        """Unit-length [n, E] of `pixel_values [V, C, H, W]`, or `[V, C, D, H, W]`, as `read_images` makes them.

        One row an image, or one a study where `study_index [V]` says which study each image belongs to. `of_views`: of
        fVLM, `anatomy_share` and `anatomy_intact` as `read_volumes` makes them; the row is the mean of the anatomies.
        """
        embeds: Tensor = self._of_task("embed_images")(self.batch(pixel_values, study_index, **of_views))
        return embeds

    @torch.no_grad()
    def embed_anatomies(
        self, pixel_values: Tensor, study_index: Tensor | None = None, **of_views: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of fVLM: unit-length [n, A, E], anatomies as `config.volume.anatomies`, and which were there, [n, A] bool."""
        embeds, present = self._of_task("embed_anatomies")(self.batch(pixel_values, study_index, **of_views))
        return embeds, present

    @torch.no_grad()
    def distribution_of_images(self, pixel_values: Tensor, study_index: Tensor | None = None) -> Gaussian:
        """Of D-MLM: mean and log-variance, [n, E] each."""
        found: Gaussian = self._of_task("distribution_of_images")(self.batch(pixel_values, study_index))
        return found

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit-length [n, E]; texts longer than `config.text_length` tokens lose their end."""
        rows = []
        for start in range(0, len(texts), batch_size):
            ids, mask = self.tokenizer.encode(texts[start : start + batch_size], self.config.text_length)
            rows.append(self._of_task("embed_texts")(ids.to(self.device), mask.to(self.device)))
        return torch.cat(rows) if rows else torch.zeros(0, self.config.task["embed_dim"])

    @torch.no_grad()
    def embed_classes(self, names: Sequence[str] = ()) -> Tensor:
        """Of UMCL: unit-length [C, E] of the learned prompts of `names`, or of the classes that it was taught."""
        embeds: Tensor = self._of_task("embed_classes")(names)
        return embeds

    def batch(self, pixel_values: Tensor, study_index: Tensor | None = None, **of_views: Tensor) -> Batch:
        """What the task reads of images, on its device."""
        index = torch.arange(len(pixel_values)) if study_index is None else study_index
        missing = {"anatomy_share", "anatomy_intact"}.intersection(self.task.fields) - of_views.keys()
        if missing:
            raise ConfigError(f"{' and '.join(sorted(missing))} missing; read_volumes makes them of label maps")
        studies = int(index.max()) + 1 if len(index) else 0
        of_images = {"pixel_values": pixel_values, "study_index": index, **of_views}
        batch: Batch = {name: values.to(self.device) for name, values in of_images.items()}
        return batch | {"valid": torch.ones(studies, dtype=torch.bool, device=self.device)}

    def read_images(self, paths: Sequence[str | Path]) -> Tensor:
        """`pixel_values [V, 1, H, W]` of image files, 8 or 16 bit grey, full range from black to white.

        Raises DataError naming a file that does not decode.
        """
        if self.config.image is None:
            raise ConfigError(f"{self.config.origin.get('task')} encodes volumes; use read_volumes")
        encoded = [Path(path).read_bytes() for path in paths]
        headers = [read_header(data) for data in encoded]
        bits = np.array([16 if header is not None and header.bits > 8 else 8 for header in headers])
        window = np.stack([np.zeros(len(bits)), 2.0**bits - 1.0], axis=1).astype(np.float32)
        if self._decoder is None:
            self._decoder = Decoder(replace(self.config.image, device="cpu"))
        decoded = self._decoder.submit(encoded, augment.identity(len(encoded)), window, bits).result()
        for path, cause in zip(paths, decoded.causes, strict=True):
            if cause is not None:
                raise DataError(f"{path}: {cause}")
        return decoded.pixel_values

    def read_volumes(
        self,
        volumes: Sequence[np.ndarray],
        labels: Sequence[np.ndarray] = (),
        ids: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """`pixel_values [V, C, D, H, W]`: the centres of volumes in HU `[z, y, x]`, oriented and spaced as in shards.

        With a label map uint8 `[z, y, x]` of each, and the `ids` of the model's anatomies in them, also `anatomy_share
        [V, A, T]` and `anatomy_intact [V, A]`: there, and not cut by the crop. Raises ConfigError, or DataError naming
        the volume.
        """
        config = self.config.volume
        if config is None:
            raise ConfigError(f"{self.config.origin.get('task')} encodes images; use read_images")
        if labels and len(labels) != len(volumes):
            raise ConfigError(f"{len(labels)} label maps of {len(volumes)} volumes; give one of each")
        known = {plain_name(name) for name in ids or {}}
        unknown = [name for name in config.anatomies if plain_name(name) not in known]
        if labels and unknown:
            raise ConfigError(f"ids lack {', '.join(unknown)}; give an id that no voxel has where the maps lack one")
        crops = [
            _centre(config, number, volume, labels[number : number + 1], ids or {})
            for number, volume in enumerate(volumes)
        ]
        pending = VolumeDecoder(replace(config, device="cpu")).submit(crops)
        decoded = pending.result()
        for number, cause in enumerate(decoded.causes):
            if cause is not None:
                raise DataError(f"volume {number}: {cause}")
        found = {"pixel_values": decoded.pixel_values}
        if labels:
            found |= {
                "anatomy_share": torch.from_numpy(pending.share),
                "anatomy_intact": torch.from_numpy(pending.present & pending.whole),
            }
        return found

    def _of_task(self, name: str) -> Any:
        found = getattr(self.task, name, None)
        if found is None:
            raise ConfigError(f"{self.config.origin.get('task')} has no {name}")
        return found


def _centre(
    config: VolumeDecoder.Config, number: int, volume: np.ndarray, labels: Sequence[np.ndarray], ids: Mapping[str, int]
) -> Crop:
    """The central crop, through the form in which shards hold volumes: as in training."""
    for one in labels:
        if one.shape != volume.shape:
            raise DataError(f"volume {number}: {volume.shape} voxels, its label map {one.shape}; resample one")
    try:
        parts = [memoryview(part.data) for part in encode_volume(volume)]
        maps = [[memoryview(part.data) for part in encode_labels(one)] for one in labels]
    except ValueError as error:
        raise DataError(f"volume {number}: {error}") from None
    depth, height, width = volume.shape
    view = ViewRecord(id="0", depth=depth, height=height, width=width, bits=16)
    start, _ = place_crop(config, view, range(len(parts)), None, 0)
    return Crop(view=view, parts=parts, first_part=0, maps=maps, mask_ids=ids, start=start)


def load_exported(path: str | Path, device: str | torch.device = "cpu") -> ExportedEncoder:
    """The encoders of an exported folder. Nothing in it is unpickled or run.

    Raises ConfigError naming the file when the folder is incomplete, of a newer version, or was changed.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG)
    tokenizer = load_tokenizer(folder / TOKENIZER, sha256=config.tokenizer_sha256)
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder / WEIGHTS}: missing; export the run again")
    seen = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if seen != config.weights_sha256:
        raise ConfigError(
            f"{folder / WEIGHTS}: sha256 {seen[:12]} where {config.weights_sha256[:12]} was written; export again"
        )
    try:
        task = schema.task_from_json(config.task).build(vocab_size=tokenizer.vocab_size)
        task.take_tokenizer(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}; export the run again") from None
    try:
        task.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: does not fit {CONFIG} ({str(error).splitlines()[0]})") from None
    return ExportedEncoder(config, task.to(device), tokenizer)


def export(run: PastRun, output: Path) -> float:
    """Write `run`'s encoders into `output` and read them back; returns the largest difference of an embedding.

    Raises:
        ConfigError: the task has no image and text encoder, or `output` is not empty. DataError: the folder that was
            written gives other embeddings than the run's model; nothing is left behind then.
    """
    if not hasattr(run.config.task, "to_embed"):
        raise ConfigError(
            f"task {type(run.task).__name__} has no image and text encoder to export; an encoder of images alone goes "
            "with --form timm"
        )
    with new_folder(output) as scratch:
        _write(run, scratch)
        difference = _largest_difference(run, load_exported(scratch, run.device))
        _check(difference)
    return difference


@torch.no_grad()
def export_timm(run: PastRun, output: Path) -> float:
    """Write `run`'s image encoder under timm's names into `output` and read it back as an encoder of others.

    Returns the largest difference of a feature. Raises ConfigError for an encoder that timm has no model for, of
    volumes, or an `output` that is not empty; DataError as `export`.
    """
    vision = vision_of(run.task)
    config = timm_config(vision.config, mean=run.decode.mean, std=run.decode.std)
    config["origin"] = {"task": type(run.task).__name__, "step": run.step, "recipe": run.recipe}
    with new_folder(output) as scratch:
        save_file(timm_weights(vision), scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        found = load_encoder(scratch).encoder.to(run.device)
        side = vision.config.image_size
        pixels = _noise("images", vision.config.channels, side, side).to(run.device)
        ours, theirs = vision(pixels), found(pixels)
        pairs = ((ours.tokens, theirs.tokens), (ours.pooled, theirs.pooled))
        difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
        _check(difference)
    return difference


def _check(difference: float) -> None:
    if not difference <= TOLERANCE:
        raise DataError(
            f"the exported encoders differ from the run's by {difference:.2g} in an embedding, {TOLERANCE:g} is "
            "allowed; nothing was kept"
        )


def _write(run: PastRun, folder: Path) -> None:
    task_config = run.config.task.to_embed()
    wanted = task_config.build(vocab_size=run.tokenizer.vocab_size).state_dict().keys()
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in run.task.state_dict().items() if name in wanted
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    run.tokenizer.save(folder / TOKENIZER)
    volume = run.config.data.volume
    config = ExportedConfig(
        format=FORMAT,
        version=VERSION,
        task=schema.task_to_json(task_config),
        image=run.decode if volume is None else None,
        volume=volume,
        text_length=run.text_length,
        tokenizer_sha256=run.tokenizer.sha256,
        weights_sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        origin={"task": type(run.task).__name__, "step": run.step, "recipe": run.recipe},
    )
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=1) + "\n")


@torch.no_grad()
def _largest_difference(run: PastRun, exported: ExportedEncoder) -> float:
    """Of any element of an embedding, between the run's own task and the folder that was read back."""
    views = _checked_views(exported.config)
    study_index = torch.arange(CHECKED_VIEWS) // 2
    batch = exported.batch(study_index=study_index, **views)
    ids, mask = run.tokenizer.encode(CHECKED_TEXTS, run.text_length)
    task: Any = run.task.eval()
    pairs = [
        (exported.embed_images(study_index=study_index, **views), task.embed_images(batch)),
        (exported.embed_texts(CHECKED_TEXTS), task.embed_texts(ids.to(run.device), mask.to(run.device))),
    ]
    if "anatomy_share" in views:
        ours = exported.embed_anatomies(study_index=study_index, **views)
        pairs.append((ours[0], task.embed_anatomies(batch)[0]))
    if isinstance(task, GaussianTask):
        ours_of = exported.distribution_of_images(study_index=study_index, **views)
        pairs.append((ours_of.logvar, task.distribution_of_images(batch).logvar))
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def _checked_views(config: ExportedConfig) -> dict[str, Tensor]:
    """Noise in the shape of the encoder's images; of anatomies each has the patches that another draw leaves it."""
    vision = config.task["vision"]
    volume = config.volume
    if volume is None:
        return {"pixel_values": _noise("images", vision["channels"], vision["image_size"], vision["image_size"])}
    views = {"pixel_values": _noise("images", vision["channels"], *volume.size)}
    if "anatomies" in config.task:
        share = _noise("anatomies", len(volume.anatomies), volume.patches).clamp(0.0, 1.0)
        views |= {"anatomy_share": share, "anatomy_intact": share.any(dim=2)}
    return views


def _noise(what: str, *shape: int) -> Tensor:
    draws = keyed.normal(0, f"export: {what}", np.arange(CHECKED_VIEWS), draws=int(np.prod(shape)))
    return torch.from_numpy(draws.astype(np.float32)).reshape(CHECKED_VIEWS, *shape)


def _read_config(file: Path) -> ExportedConfig:
    if not file.is_file():
        raise ConfigError(f"{file}: missing; give a folder that launchers/export.py wrote")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    if not isinstance(body, Mapping) or body.get("format") != FORMAT:
        raise ConfigError(f"{file}: not the config of an exported encoder; give a folder that export.py wrote")
    if body.get("version") != VERSION:
        raise ConfigError(
            f"{file}: version {body.get('version')}, this program reads {VERSION}; export the run again, or upgrade"
        )
    try:
        return TypeAdapter(ExportedConfig).validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{file}: {where}: {first['msg']}; export the run again") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="export.py",
        description="Write a run's encoders (images or volumes, and texts) as safetensors with config and tokenizer, "
        "and verify them.",
        epilog="exit codes: 0 done, 2 bad arguments or configuration, 3 the written folder gives other embeddings",
    )
    command.add_argument("--run-dir", required=True, metavar="DIR", help="run directory, folder or s3://")
    command.add_argument("--output", required=True, metavar="DIR", help="new folder, or s3://bucket/prefix")
    command.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or step-N")
    command.add_argument(
        "--form",
        choices=("roentgen", "timm"),
        default="roentgen",
        help="timm: the encoder of images alone, under timm's names; of any task on images (%(default)s)",
    )
    return command


@errors_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    write = export_timm if arguments.form == "timm" else export
    with open_run(arguments.run_dir, arguments.checkpoint) as run:
        if arguments.output.startswith("s3://"):
            with tempfile.TemporaryDirectory(prefix="roentgen-export-") as scratch:
                folder = Path(scratch) / "exported"
                difference = write(run, folder)
                with open_store(arguments.output) as store:
                    files = sorted(path for path in folder.rglob("*") if path.is_file())
                    # The config goes last: a folder that has one is complete.
                    for path in sorted(files, key=lambda path: path.name == CONFIG and path.parent == folder):
                        store.put(path.relative_to(folder).as_posix(), path)
        else:
            difference = write(run, Path(arguments.output))
        console.print(
            f"step {run.step} of {arguments.run_dir} -> {arguments.output}: embeddings equal to the run's"
            f" (largest difference {difference:.1g})"
        )
        call = f'load it with: from launchers.export import load_exported; load_exported("{arguments.output}")'
        if arguments.form == "timm":
            call = f'load it with: timm.create_model("local-dir:{arguments.output}", pretrained=True), or transfer.py'
        console.print(call)
    return 0


if __name__ == "__main__":
    sys.exit(main())
