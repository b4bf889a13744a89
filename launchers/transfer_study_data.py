"""Studies of a manifest with all their views, in memory: what study-level tasks are judged on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.evaluation.studies import StudySplit
from launchers.transfer_data import DECODED_AT_ONCE, groups_of
from shards.batch import NOT_ANNOTATED, StudyRecord
from shards.dataset import DataSet, Members, read_units
from shards.decode import Decoder
from shards.errors import BadSampleError, DataError
from shards.keyed import text_key
from shards.transforms import augment

MOST_VIEWS = 12  # of a study, the first ones: fluoroscopy has hundreds (bone_xray_french.md, 2)


def read_studies(
    manifest: str,
    split: str,
    decode: Decoder.Config,
    *,
    limit: int | None = None,
    most_views: int = MOST_VIEWS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> StudySplit:
    """The first `most_views` views of every study of a split, with labels and measurements.

    A view that cannot be decoded is left out, a study without any other view, too; both are counted in `skipped`.
    Raises DataError where no study is left.
    """
    data = DataSet(manifest, split)
    total = min(data.table.total, limit or data.table.total)
    decoder, skipped = Decoder(decode), Counter[str]()
    records: list[StudyRecord] = []
    pixels: list[Tensor] = []
    index: list[int] = []
    for first in range(0, total, DECODED_AT_ONCE):
        units = np.arange(first, min(first + DECODED_AT_ONCE, total))
        found = _members(data, units, most_views, skipped)
        shown = [(study, view) for study, (_, members) in enumerate(found) for view in range(len(members.views))]
        if shown:
            views = [found[study][0].views[view] for study, view in shown]
            windows = [view.window or (0.0, 255.0 if view.bits == 8 else 65535.0) for view in views]
            decoded, usable, causes = decoder.submit(
                [found[study][1].views[view].parts[0] for study, view in shown], augment.identity(len(shown)),
                np.asarray(windows, dtype=np.float32), np.asarray([view.bits for view in views]),
            ).result()  # fmt: skip
            skipped.update(f"image: {cause}" for cause in causes if cause is not None)
            kept = [study for (study, _), ok in zip(shown, usable.tolist(), strict=True) if ok]
            place = {study: len(records) + number for number, study in enumerate(dict.fromkeys(kept))}
            records += [found[study][0] for study in place]
            index += [place[study] for study in kept]
            pixels.append(decoded[torch.from_numpy(usable)].cpu())
        progress(f"{split}: studies", int(units[-1]) + 1, total)
    data.close()
    if not records:
        causes_of = ", ".join(f"{count} {cause}" for cause, count in skipped.items())
        raise DataError(f"{manifest}: no study of {split} to use; left out: {causes_of or 'nothing'}")
    names = tuple(data.whole.labels)
    labels = [[record.labels.get(name, NOT_ANNOTATED) for name in names] for record in records]
    measured = sorted({name for record in records for name in record.measurements or {}})
    parts = tuple(record.views[0].body_part for record in records)
    return StudySplit(
        pixel_values=torch.cat(pixels),
        study_index=torch.tensor(index),
        labels=torch.tensor(labels, dtype=torch.int8).view(len(records), len(names)),
        label_names=names,
        measurements={
            name: np.array([(record.measurements or {}).get(name, np.nan) for record in records]) for name in measured
        },
        sex=tuple(record.sex for record in records),
        patient_key=torch.tensor([text_key(record.patient) for record in records]),
        groups={**groups_of(records, data.whole.source), "body part": parts},
        keys=tuple(record.study for record in records),
        skipped=dict(skipped),
    )


def _members(
    data: DataSet, units: np.ndarray, most_views: int, skipped: Counter[str]
) -> list[tuple[StudyRecord, Members]]:
    found: dict[int, Any] = {}
    chunk = data.table.chunk_of(units)
    for number in np.unique(chunk):
        found |= read_units(
            data, int(number), units[chunk == number].tolist(), lambda unit, views: range(min(views, most_views))
        )  # fmt: skip
    usable = []
    for unit in units.tolist():
        try:
            members = found[unit]
            if isinstance(members, BadSampleError):
                raise members
            record = members.record(data.manifest.adopted)
            if not members.views:
                raise BadSampleError("", "", "no image")
            if any(view.depth is not None for view in record.views):
                raise BadSampleError("", "", "a volume")
            usable.append((record, members))
        except BadSampleError as error:
            skipped[error.cause] += 1
    return usable
