"""The encoders of a run -> a folder that needs neither the run, DeepSpeed nor the data: weights, config, tokenizer.

from launchers.export import load_exported
encoder = load_exported("exported/clip")
images = encoder.embed_images(encoder.read_images(["a.png", "b.jpg"]))   # [2, E], unit length
texts = encoder.embed_texts(["Small left pneumothorax.", "No pleural effusion."])   # [2, E]
similarity = images @ texts.T
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.evaluation.embed import GaussianTask
from core.models.text import TextEncoder
from core.models.towers import TwoTowers
from core.models.vision import VisionEncoder
from launchers.past_run import PastRun, open_run
from shards import keyed
from shards.batch import Batch
from shards.decode import Decoder
from shards.errors import ConfigError, DataError, RoentgenError
from shards.image_header import read_header
from shards.store import open_store
from shards.tokenizer import Tokenizer, load_tokenizer
from shards.transforms import augment

FORMAT, VERSION = "roentgen-encoder", 1
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
TOLERANCE = 1e-6  # largest difference of an embedding's element from the run's model
CHECKED_IMAGES = 4
CHECKED_TEXTS = (
    "There is a small left pneumothorax.",
    "No pleural effusion. The heart is normal in size.",
    "Moderate consolidation in the right lower zone, likely pneumonia; follow-up is recommended.",
)


@dataclass(frozen=True, kw_only=True)
class ExportedConfig:
    """`config.json` of an exported folder. `image` says how stored pixels become `pixel_values`."""

    format: str
    version: int
    vision: VisionEncoder.Config
    text: TextEncoder.Config
    embed_dim: int
    image: Decoder.Config
    text_length: int
    tokenizer_sha256: str
    weights_sha256: str
    origin: dict[str, Any]  # task, step, recipe: where the weights come from


class ExportedEncoder(torch.nn.Module):
    """Both encoders with their tokenizer, on one device, in fp32. V = images, C = channels, E = shared embedding."""

    def __init__(self, config: ExportedConfig, towers: TwoTowers, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.towers, self.tokenizer = config, towers, tokenizer
        self.requires_grad_(False)
        self.eval()
        self._decoder: Decoder | None = None

    @property
    def device(self) -> torch.device:
        return next(self.towers.parameters()).device

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor, study_index: Tensor | None = None) -> Tensor:
        """Unit-length [n, E] of `pixel_values [V, C, H, W]`, normalised as `config.image` says.

        One row an image, or one a study where `study_index [V]` says which study each image belongs to.
        """
        index = torch.arange(len(pixel_values)) if study_index is None else study_index
        studies = int(index.max()) + 1 if len(index) else 0
        batch: Batch = {
            "pixel_values": pixel_values.to(self.device),
            "study_index": index.to(self.device),
            "valid": torch.ones(studies, dtype=torch.bool, device=self.device),
        }
        return self.towers.embed_images(batch)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit-length [n, E]; texts longer than `config.text_length` tokens lose their end."""
        rows = []
        for start in range(0, len(texts), batch_size):
            ids, mask = self.tokenizer.encode(texts[start : start + batch_size], self.config.text_length)
            rows.append(self.towers.embed_texts(ids.to(self.device), mask.to(self.device)))
        return torch.cat(rows) if rows else torch.zeros(0, self.config.embed_dim)

    def read_images(self, paths: Sequence[str | Path]) -> Tensor:
        """`pixel_values [V, 1, H, W]` of image files, 8 or 16 bit grey, full range from black to white.

        Raises DataError naming a file that does not decode.
        """
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
    towers = TwoTowers(config.vision, config.text, config.embed_dim)
    try:
        towers.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: does not fit {CONFIG} ({str(error).splitlines()[0]})") from None
    return ExportedEncoder(config, towers.to(device), tokenizer)


def export(run: PastRun, output: Path) -> float:
    """Write `run`'s encoders into `output` and read them back; returns the largest difference of an embedding.

    Raises:
        ConfigError: the task has no pair of encoders that give vectors, or `output` is not empty. DataError: the folder
            that was written gives other embeddings than the run's model; nothing is left behind then.
    """
    towers = getattr(run.task, "towers", None)
    if not isinstance(towers, TwoTowers):
        name = type(run.task).__name__
        if isinstance(run.task, GaussianTask):
            raise ConfigError(f"task {name}: its Gaussian encoders cannot be exported yet; CLIP's and SigLIP's can")
        raise ConfigError(f"task {name} has no image and text encoder to export")
    if not isinstance(towers.vision, VisionEncoder):
        raise ConfigError(f"task {type(run.task).__name__}: encoders of volumes cannot be exported yet; images' can")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: exists and is not an empty folder; name a new one")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror}); name another") from None
    try:
        _write(run, towers, towers.vision.config, scratch)
        difference = _largest_difference(run, load_exported(scratch, run.device))
        if not difference <= TOLERANCE:
            raise DataError(
                f"the exported encoders differ from the run's by {difference:.2g} in an embedding, {TOLERANCE:g} is "
                "allowed; nothing was kept"
            )
        scratch.chmod(0o755)
        scratch.replace(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return difference


def _write(run: PastRun, towers: TwoTowers, vision: VisionEncoder.Config, folder: Path) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in towers.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    run.tokenizer.save(folder / TOKENIZER)
    config = ExportedConfig(
        format=FORMAT,
        version=VERSION,
        vision=vision,
        text=towers.text.config,
        embed_dim=towers.text_projection.weight.shape[0],
        image=run.decode,
        text_length=run.text_length,
        tokenizer_sha256=run.tokenizer.sha256,
        weights_sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        origin={"task": type(run.task).__name__, "step": run.step, "recipe": run.recipe},
    )
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=1) + "\n")


@torch.no_grad()
def _largest_difference(run: PastRun, exported: ExportedEncoder) -> float:
    """Of any element of an embedding, between the run's own task and the folder that was read back."""
    size, channels = exported.config.vision.image_size, exported.config.vision.channels
    draws = keyed.normal(0, "export: images", np.arange(CHECKED_IMAGES), draws=channels * size * size)
    pixels = torch.from_numpy(draws.astype(np.float32)).reshape(CHECKED_IMAGES, channels, size, size)
    study_index = torch.arange(CHECKED_IMAGES) // 2  # two views a study
    batch: Batch = {
        "pixel_values": pixels.to(run.device),
        "study_index": study_index.to(run.device),
        "valid": torch.ones(CHECKED_IMAGES // 2, dtype=torch.bool, device=run.device),
    }
    ids, mask = run.tokenizer.encode(CHECKED_TEXTS, run.text_length)
    run.task.eval()
    theirs = (run.encoders.embed_images(batch), run.encoders.embed_texts(ids.to(run.device), mask.to(run.device)))
    ours = (exported.embed_images(pixels, study_index), exported.embed_texts(CHECKED_TEXTS))
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _read_config(file: Path) -> ExportedConfig:
    if not file.is_file():
        raise ConfigError(f"{file}: missing; give a folder that launchers/export.py wrote")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    if not isinstance(body, Mapping) or body.get("format") != FORMAT:
        raise ConfigError(f"{file}: not the config of an exported encoder; give a folder that export.py wrote")
    if not isinstance(body.get("version"), int) or body["version"] > VERSION:
        raise ConfigError(f"{file}: version {body.get('version')}, this program reads up to {VERSION}; upgrade it")
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
        description="Write a run's image and text encoder as safetensors with config and tokenizer, and verify it.",
        epilog="exit codes: 0 done, 2 bad arguments or configuration, 3 the written folder gives other embeddings",
    )
    command.add_argument("--run-dir", required=True, metavar="DIR", help="run directory, folder or s3://")
    command.add_argument("--output", required=True, metavar="DIR", help="new folder, or s3://bucket/prefix")
    command.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best or step-N")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        with open_run(arguments.run_dir, arguments.checkpoint) as run:
            if arguments.output.startswith("s3://"):
                with tempfile.TemporaryDirectory(prefix="roentgen-export-") as scratch:
                    folder = Path(scratch) / "exported"
                    difference = export(run, folder)
                    with open_store(arguments.output) as store:
                        files = sorted(path for path in folder.rglob("*") if path.is_file())
                        # The config goes last: a folder that has one is complete.
                        for path in sorted(files, key=lambda path: path.name == CONFIG and path.parent == folder):
                            store.put(path.relative_to(folder).as_posix(), path)
            else:
                difference = export(run, Path(arguments.output))
            console.print(
                f"step {run.step} of {arguments.run_dir} -> {arguments.output}: embeddings equal to the run's"
                f" (largest difference {difference:.1g})"
            )
            console.print(
                f'load it with: from launchers.export import load_exported; load_exported("{arguments.output}")'
            )
    except RoentgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
