"""A packed set with, beside each image, a grid of where the entities of its report look: a source of pack.py.

The run is one that was trained without grids (ecamp.md calls it the warm-up); its whole images are read once, nothing
masked. All else of a study stays as it is, byte for byte: key, split, record, pixels, label maps.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.evaluation.embed import precision
from core.tasks import Task
from core.tasks.ecamp import ECAMP
from launchers.past_run import PastRun
from shards.batch import EncodedImage, Sample, ViewRecord
from shards.dataset import DataSet, open_manifest, read_units
from shards.decode import Decoder
from shards.errors import BadSampleError, ConfigError
from shards.ingest import Item, Loaded, Plan, Refusal
from shards.reader import read_samples
from shards.tokenizer import EmptyReportError
from shards.transforms import attention_grid, augment
from shards.transforms.entity_masking import ENTITY, MarkedReport, mark_report, tokenise

STUDIES_AT_ONCE = 32  # always the same ones together: a batch's other rows may change the last bit of a product
NO_ENTITY = "no attention grid: no entity in the part of the report that the run reads"


class AttentionGrids:
    """`run`'s grids for the studies of the set at `url`; `run.task` has to know where words look.

    Raises ConfigError naming what is in the way: another task, a run that looks at no patch, a set without entities, of
    volumes, or adopted.
    """

    def __init__(self, run: PastRun, url: str) -> None:
        self.task = _looking(run.task)
        self.run, self.url = run, url
        self.store, self.manifest = open_manifest(url, run.config.data.store)
        if self.manifest.adopted:
            raise ConfigError(f"{url}: adopted tars are never written anew; pack the studies with --source table")
        if not (self.manifest.fields.get("distilled") or self.manifest.fields.get("descriptors")):
            raise ConfigError(
                f"{url}: no study has an entity with its place in the report; pack with prepared reports (phantoms: "
                "pack.py --entities)"
            )
        self.side = math.isqrt(math.prod(self.task.config.vision.grid))
        mixed = run.device.type == "cuda"
        self.decoder = Decoder(replace(run.decode, device="mixed" if mixed else "cpu", threads=os.cpu_count() or 1))
        self._weights = _fingerprint(run.task)
        self._groups: dict[str, tuple[Item, ...]] = {}  # of each key: the studies that are read with it
        self._ready: dict[str, Loaded] = {}

    @property
    def name(self) -> str:
        """The set's own, with the run whose grids these are and the part of an image that they lie on."""
        of = f"{self.run.recipe} step {self.run.step}, weights {self._weights[:12]}"
        return f"{self.manifest.source}, attention grids of {of}, fit {self.run.decode.fit}"

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    @property
    def masks(self) -> dict[str, int]:
        return self.manifest.masks

    @property
    def key_fingerprint(self) -> str | None:
        return self.manifest.key_fingerprint

    @property
    def settings(self) -> Mapping[str, Any]:
        data = self.run.config.data
        return {
            "manifest": self.manifest.sha256, "weights": self._weights, "device": self.run.device.type,
            "autocast": str(self.run.autocast), "sections": data.sections, "text_length": data.text_length,
            "decode": repr(data.decode),
        }  # fmt: skip

    def plan(self) -> Plan:
        """Every study of the set under its key, patient and split; the records are read, no pixel is."""
        items, refusals = [], []
        place = {shard.name: number for number, shard in enumerate(self.manifest.shards)}
        for split in self.manifest.splits:
            data = DataSet(self.url, split, store=self.run.config.data.store)
            for chunk in range(len(data.table.units)):
                first = int(data.table.first_unit[chunk])
                units = range(first, first + int(data.table.units[chunk]))
                for unit, found in read_units(data, chunk, units, lambda unit, views: ()).items():
                    shard, sample, _ = data.locate(chunk, unit)
                    name = data.manifest.shards[shard].name
                    try:
                        if isinstance(found, BadSampleError):
                            raise found
                        record = found.record(adopted=False)
                    except BadSampleError as error:
                        refusals.append(Refusal(f"{name}/{data.key(chunk, unit)[1]}", error.cause))
                        continue
                    if any(view.depth is not None for view in record.views):
                        raise ConfigError(f"{self.url}: holds volumes; attention grids are of images")
                    payload = [place[name], sample]
                    items.append(Item(key=found.key, patient=record.patient, split=split, payload=payload))
            data.close()
        self._groups = _grouped(items)
        return Plan(items=items, refusals=refusals)

    def load(self, item: Item) -> Loaded:
        """The study with its grids; of those that are read with it the answers are kept until they are asked for."""
        if item.key not in self._ready:
            self._ready = self._read(self._groups[item.key])
        return self._ready.pop(item.key)

    def _read(self, group: Sequence[Item]) -> dict[str, Loaded]:
        of_shard: dict[int, list[Item]] = defaultdict(list)
        for item in group:
            of_shard[item.payload[0]].append(item)
        result: dict[str, Loaded] = {}
        samples: list[Sample] = []
        for number, items in of_shard.items():
            shard = self.manifest.shards[number]
            read = read_samples(self.store, self.manifest, shard, [item.payload[1] for item in items])
            for item, found in zip(items, read, strict=True):
                if isinstance(found, BadSampleError):
                    refusal = Refusal(f"{shard.name}/{item.key}", found.cause)
                    result[item.key] = Loaded(sample=None, refusals=(refusal,))
                else:
                    samples.append(found)
        return result | self._with_grids(samples)

    def _with_grids(self, samples: Sequence[Sample]) -> dict[str, Loaded]:
        marked: list[MarkedReport | None] = []
        remarks: dict[str, list[str]] = {sample.key: [] for sample in samples}
        for sample in samples:
            try:
                marked.append(mark_report(sample.record, self.run.config.data.sections))
            except EmptyReportError:
                marked.append(None)
                remarks[sample.key].append("no attention grid: empty report")
            except BadSampleError as error:
                marked.append(None)
                remarks[sample.key].append(f"no attention grid: {error.cause}")
        ids, seen, chosen = self._tokens(marked)
        for sample, report, entities in zip(samples, marked, chosen, strict=True):
            if report is not None and not entities.any():
                remarks[sample.key].append(NO_ENTITY)
        looked = [row for row, sample in enumerate(samples) if not remarks[sample.key]]
        views = [(row, view) for row in looked for view in range(len(samples[row].images))]
        grids: dict[str, dict[str, bytes]] = {sample.key: {} for sample in samples}
        if views:
            pixels, causes = self._pixels(
                [(samples[row].record.views[view], samples[row].images[view]) for row, view in views]
            )
            rows = torch.tensor([row for row, _ in views])
            maps = self._maps(pixels, ids[rows], seen[rows], chosen[rows])
            for (row, view), map_, cause in zip(views, maps, causes, strict=True):
                sample = samples[row]
                if cause is None:
                    grid = map_.view(self.side, self.side).numpy()
                    grids[sample.key][sample.record.views[view].id] = attention_grid.encode(grid)
                else:
                    remarks[sample.key].append(f"no attention grid: image: {cause}")
        return {
            sample.key: Loaded(
                sample=replace(sample, attention=grids[sample.key]),
                refusals=tuple(Refusal(sample.key, remark, kept=True) for remark in remarks[sample.key]),
            )
            for sample in samples
        }

    def _tokens(self, marked: Sequence[MarkedReport | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, which are real and which are of entities, `[n, L]` each: the report alone, as it was written."""
        config, nothing = self.run.config.data, np.zeros(len(marked), dtype=np.int64)
        tokens = tokenise(
            config.entity_masking, self.run.tokenizer, marked, 0, nothing, nothing, length=config.text_length,
            train=False,
        )  # fmt: skip
        found = (tokens.ids, tokens.seen, (tokens.kinds & ENTITY) != 0)
        ids, seen, chosen = (torch.from_numpy(one) for one in found)
        return ids, seen, chosen

    def _pixels(self, images: Sequence[tuple[ViewRecord, Any]]) -> tuple[Tensor, list[str | None]]:
        """`[V, 1, H, W]` of whole images, and of each why it is not there."""
        bits = np.array([view.bits for view, _ in images])
        windows = [view.window or (0.0, 2.0**view.bits - 1.0) for view, _ in images]
        data = [image.data if isinstance(image, EncodedImage) else b"" for _, image in images]
        whole = augment.identity(len(images))
        decoded = self.decoder.submit(data, whole, np.asarray(windows, dtype=np.float32), bits).result()
        return decoded.pixel_values, decoded.causes

    def _maps(self, pixels: Tensor, ids: Tensor, seen: Tensor, chosen: Tensor) -> Tensor:
        """`[V, N]` fp32; every view is asked as the only one of its study."""
        device = self.run.device
        batch = {
            "pixel_values": pixels, "study_index": torch.arange(len(pixels)), "input_ids": ids, "attention_mask": seen,
            "valid": torch.ones(len(pixels), dtype=torch.bool),
        }  # fmt: skip
        with precision(device, self.run.autocast):
            maps = self.task.attention_maps({name: one.to(device) for name, one in batch.items()}, chosen.to(device))
        return maps.float().cpu()


def _looking(task: Task) -> ECAMP:
    if not isinstance(task, ECAMP):
        raise ConfigError(
            f"task {type(task).__name__} has no attention maps: its reports look at no patch; give a run of ECAMP"
        )
    task.check_attention()
    return task


def _grouped(items: Sequence[Item]) -> dict[str, tuple[Item, ...]]:
    """Groups as the writer asks for them, split by split in the order of keys, wherever it starts."""
    of_split: dict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.key):
        of_split[str(item.split)].append(item)
    result: dict[str, tuple[Item, ...]] = {}
    for several in of_split.values():
        for start in range(0, len(several), STUDIES_AT_ONCE):
            group = tuple(several[start : start + STUDIES_AT_ONCE])
            result |= dict.fromkeys((item.key for item in group), group)
    return result


def _fingerprint(task: torch.nn.Module) -> str:
    """sha256 of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(task.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
