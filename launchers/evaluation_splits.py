"""What an evaluation is asked, and the splits of its data through the run's encoders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from core.evaluation.embed import (
    ANATOMY_PARTS,
    ANATOMY_TEXT_PARTS,
    PATCH_PARTS,
    EmbeddedSplit,
    Encoders,
    embed_split,
)
from core.evaluation.generation import Generation
from core.evaluation.zero_shot import Prompts
from core.models.report_decoder import ReportDecoder
from launchers.past_run import PastRun
from shards.batch import Batch
from shards.collate import ANATOMY_TEXT_FIELDS, Collator
from shards.dataset import DataSet
from shards.errors import ConfigError
from shards.label_union import table_of
from shards.loader import as_mixture, evaluation_batches, label_columns

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is evaluated. `data`: manifest, None for the run's own; `limit`: studies of each split, None for all."""

    protocols: tuple[str, ...] | None = None  # None: all that fit the task
    data: str | None = None
    split: str = "test"
    prompts: Prompts | None = None
    limit: int | None = None
    probe_studies: int = 20_000  # of the training split; the probe gains little from more
    corruption_studies: int = 256  # first ones, encoded anew for every level of every corruption
    decoder_studies: int = 4000  # of the training split, for generation; the tokens of their patches are held in memory
    decoder_steps: int = Generation.Config.steps
    report_length: int = ReportDecoder.Config.max_length  # tokens
    beams: int = Generation.Config.beams
    keep_reports: bool = False  # generated ones, in Evaluation.written
    map_studies: int = 2000  # first ones, of a map: t-SNE of many more takes minutes
    queries: tuple[str, ...] = ()  # words whose nearest views are shown
    batch_size: int = 96
    threads: int = 0  # of the decoder; 0: all cores
    replicates: int = 1000
    seed: int = 0


class Splits:
    """Splits through the run's encoders, each at most once for a set of parts.

    All are of the manifest given as data; else held-out ones are of the run's validation manifest, if it has one, and
    the training split is of its (first) training manifest.
    """

    def __init__(self, run: PastRun, options: Options, progress: Progress) -> None:
        self._run, self._options, self._progress = run, options, progress
        config = run.config.data
        self._mixture = as_mixture(config, run.config.global_batch_size)
        trained_on = self._mixture[0]
        self.url = options.data or config.validation or trained_on.manifest
        self.train_url = options.data or trained_on.manifest
        self.train_split = trained_on.split
        here: dict[str, Any] = {"threads": options.threads or os.cpu_count() or 1}
        if not torch.cuda.is_available():
            here["device"] = "cpu"
        volume = None if config.volume is None else replace(config.volume, **here)
        self._config = replace(config, decode=replace(config.decode, **here), volume=volume)
        # Those that the task tells apart, in its order.
        self.anatomies = volume.anatomies if volume is not None and "anatomy_share" in run.task.fields else ()
        self._sets: dict[str, DataSet] = {}
        self.skipped: Counter[str] = Counter()
        whole = self.open(options.split).whole
        # Patients held out of training who are not those that are tested: thresholds and strengths are chosen on them.
        self.held_out: str | None = config.validation_split
        if config.validation_split not in whole.splits or config.validation_split == options.split:
            self.held_out = None
        self.manifest, self.labels = whole, label_columns(config, [self.open(options.split)])
        # Classes that labels or prompts of training named; those that only these data know come behind them.
        self.seen = None if config.label_text is None else config.label_text.classes
        if config.label_text is not None:
            known = table_of(whole.labels, config.label_text.names).known
            self.labels += tuple(name for name in known if name not in self.labels)

    def open(self, split: str) -> DataSet:
        """Raises ConfigError or DataError naming the manifest or the splits there are."""
        if split not in self._sets:
            url = self.train_url if split == self.train_split else self.url
            self._sets[split] = DataSet(url, split, store=self._config.store)
        return self._sets[split]

    def embed(
        self,
        split: str,
        parts: set[str],
        limit: int | None = None,
        *,
        change: Callable[[Batch], Batch] | None = None,
        quiet: bool = False,
    ) -> EmbeddedSplit:
        """Studies without a usable report are left out only if `parts` has something of the text.

        `change` is made to every batch before it is encoded. `quiet`: no progress is shown.
        """
        return self._embed(self.open(split), split, parts, limit, change=change, quiet=quiet)

    def embed_training_sets(self, parts: set[str], limit: int) -> dict[str, EmbeddedSplit]:
        """Manifest -> the training split of each set of the run's mixture, the first `limit` studies of all together.

        A set that is mixed in twice is read once. Raises ConfigError where there are not two.
        """
        sets = {one.manifest: one for one in self._mixture}
        if len(sets) < 2:
            raise ConfigError(f"the run was trained on {len(sets)} set, which has no other to be told from")
        found = {}
        for number, (url, one) in enumerate(sets.items(), start=1):
            with closing(DataSet(url, one.split, store=self._config.store)) as data:
                found[url] = self._embed(data, f"set {number} of {len(sets)}", parts, limit // len(sets))
        return found

    def _embed(
        self,
        data: DataSet,
        name: str,
        parts: set[str],
        limit: int | None = None,
        *,
        change: Callable[[Batch], Batch] | None = None,
        quiet: bool = False,
    ) -> EmbeddedSplit:
        run = self._run
        limits = [value for value in (limit, self._options.limit) if value is not None]
        total = min([data.table.total, *limits])
        batches = self._batches(data, parts, total)
        done = 0

        def advance(studies: int) -> None:
            nonlocal done
            done += studies
            if not quiet:
                self._progress(f"{name}: {' '.join(sorted(parts))}", done, total)

        return embed_split(
            cast(Encoders, run.task),
            batches if change is None else map(change, batches),
            run.device,
            parts=sorted(parts),
            autocast=run.autocast,
            on_batch=advance,
        )

    def with_anatomies(self, split: str) -> Iterator[Batch]:
        """The studies of a split as pictures need them: volumes, and which voxels are whose."""
        data = self.open(split)
        total = min(data.table.total, self._options.limit or data.table.total)
        return self._batches(data, {*ANATOMY_PARTS, "anatomy_labels"}, total)

    def _batches(self, data: DataSet, parts: set[str], total: int) -> Iterator[Batch]:
        reads_masks = bool(self.anatomies) and bool(parts & {"image_embeds", *ANATOMY_PARTS})
        fields = ["anatomy_share", "anatomy_intact"] if reads_masks else []
        fields += ["anatomy_labels"] if "anatomy_labels" in parts else []
        fields += ANATOMY_TEXT_FIELDS if set(ANATOMY_TEXT_PARTS) & parts else []
        reads_text = bool(parts & {"text_embeds", "text_logvar", *ANATOMY_TEXT_PARTS})
        run, config, of_patches = self._run, self._config, bool(parts & set(PATCH_PARTS))
        if config.volume is not None and of_patches:
            # What is to be written must not say which anatomies there are to write it from.
            config = replace(config, volume=replace(config.volume, keep_cut_if_mentioned=False))
        # Tokens of patches are of one crop a volume.
        around = run.config.evaluation.around_anatomies and bool(parts & set(ANATOMY_PARTS)) and not of_patches
        collate = Collator(
            config, run.tokenizer if reads_text else None, self.labels, run.config.seed, fields,
            around_anatomies=run.config.task.vision.patch_size if around else None,
        )  # fmt: skip
        return evaluation_batches(data, collate, config, self._note, min(self._options.batch_size, total), total)

    def _note(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "skip":
            self.skipped[str(event.get("cause"))] += 1
