"""A run directory read back, folder or s3://: config, tokenizer, weights; without DeepSpeed and without its data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import cast

import torch

from configs import schema
from configs.schema import TrainConfig
from core.checkpoint_files import BEST, LATEST, SUMS, WEIGHTS, find_weights
from core.engine import take_paths
from core.evaluation.embed import Encoders
from core.first_weights import load_checkpoint_weights
from core.tasks import Task
from shards.dataset import DataSet
from shards.decode import Decoder
from shards.errors import ConfigError
from shards.loader import as_mixture, find_tokenizer, reads_text
from shards.store import Store, open_store
from shards.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer

CONFIG = "config.json"
DECISIVE_PACKAGES = ("torch", "deepspeed", "numpy", "nvidia-dali-cuda130", "tokenizers")
TOKENIZER = "tokenizer"  # folder of the run directory, there when the run trained its own


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """A checkpoint's model, in fp32 and evaluation mode on `device`, with what fed it. `step`: steps it was trained.

    `words`: its tokenizer, None where it was trained without text.
    """

    config: TrainConfig
    task: Task
    words: Tokenizer | None
    step: int
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError where the run was trained without text."""
        if self.words is None:
            raise ConfigError(f"task {type(self.task).__name__} reads no text, so the run has no tokenizer")
        return self.words

    @property
    def encoders(self) -> Encoders:
        """The task, as evaluators use it. Raises ConfigError when it has no image and text embeddings."""
        if not all(callable(getattr(self.task, name, None)) for name in ("embed_images", "embed_texts")):
            raise ConfigError(f"task {type(self.task).__name__} embeds no images and texts; nothing to do with it here")
        return cast(Encoders, self.task)

    @property
    def recipe(self) -> str:
        return self.config.recipe

    @property
    def decode(self) -> Decoder.Config:
        return self.config.data.decode

    @property
    def text_length(self) -> int:
        return self.config.data.text_length

    @property
    def autocast(self) -> torch.dtype | None:
        """The precision of the run's products; None is fp32."""
        return None if self.config.engine.precision == "fp32" else torch.bfloat16


@contextmanager
def open_run(run_dir: str, which: str = LATEST, device: torch.device | None = None) -> Iterator[PastRun]:
    """The run's model at checkpoint `which`: latest, best, step-N or N.

    The process takes the attention and the kernel of the run's recipe from now on, as its training did.

    Raises:
        ConfigError: no run directory, no such checkpoint, or one of another recipe. DataError: it is damaged.
    """
    with ExitStack() as stack:
        store = stack.enter_context(open_store(run_dir))
        config = read_config(store)
        folder = Path(run_dir.removeprefix("file://"))
        if run_dir.startswith("s3://"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="roentgen-run-")))
            which = _fetch_checkpoint(store, which, folder)
        weights = find_weights(folder, which.removeprefix("step-"))
        words = read_tokenizer(store, config) if reads_text(schema.task_class(config.task).fields) else None
        task = config.task.build(vocab_size=None if words is None else words.vocab_size, seed=config.seed)
        if words is not None:
            task.take_tokenizer(words)
        load_checkpoint_weights(task, str(weights))
        take_paths(config.engine)
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        task.to(device).eval().requires_grad_(False)
        step = int(weights.parent.name.removeprefix("step-"))
        yield PastRun(config=config, task=task, words=words, step=step, device=device)


def read_config(store: Store) -> TrainConfig:
    """The `config.json` of a run directory. Raises ConfigError when there is none."""
    if not store.exists(CONFIG):
        raise ConfigError(f"{store.url}: no {CONFIG} in it; --run-dir wants the directory that pretrain.py wrote")
    return schema.read(store.get(CONFIG).decode(errors="replace"), f"{store.url}/{CONFIG}")


def read_tokenizer(store: Store, config: TrainConfig) -> Tokenizer:
    """The tokenizer in the run directory, else the one that the recipe or its data name."""
    names = [f"{TOKENIZER}/{name}" for name in (TOKENIZER_FILE, CONFIG_FILE)]
    if all(store.exists(name) for name in names):
        files = {name.rpartition("/")[2]: store.get(name) for name in names}
        return Tokenizer.from_files(files, f"{store.url}/{TOKENIZER}")
    sets = as_mixture(config.data, config.global_batch_size)
    # A tokenizer file of the recipe needs no data; only when none is named are the manifests asked.
    data = [] if config.data.tokenizer else [DataSet(s.manifest, s.split, store=config.data.store) for s in sets]
    return find_tokenizer(config.data, data)


def versions() -> dict[str, str]:
    """Installed versions of what pixels, tokens and arithmetic depend on."""
    return {name: metadata.version(name) for name in DECISIVE_PACKAGES if _installed(name)}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _fetch_checkpoint(store: Store, which: str, folder: Path) -> str:
    """Copy weights and checksums of one checkpoint of an s3:// run into `folder`; returns its `step-N`."""
    name = f"step-{which}" if which.isdigit() else which
    if which in (LATEST, BEST):
        if not store.exists(which):
            raise ConfigError(f"{store.url}: has no `{which}` checkpoint; has the run saved once?")
        pointer = store.get(which).decode(errors="replace")
        name = str(json.loads(pointer)["checkpoint"]) if which == BEST else pointer.strip()
    target = folder / "checkpoints" / name
    for file in (SUMS, WEIGHTS):
        if not store.exists(f"checkpoints/{name}/{file}"):
            known = sorted({path.split("/")[1] for path in store.list("checkpoints/") if path.endswith(f"/{WEIGHTS}")})
            raise ConfigError(f"{store.url}: no checkpoint {which!r}; there are {', '.join(known) or 'none'}")
        target.mkdir(parents=True, exist_ok=True)
        store.get_to_file(f"checkpoints/{name}/{file}", target / file)
    return name
