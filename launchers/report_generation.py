"""The protocol `generation` on a run: reports of its splits, a reader of clinical labels, and the decoder's evaluator.

Reports are read from the shards beside the embeddings, since batches hold no text. None is printed or logged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from core.evaluation.embed import ANATOMY_PARTS, PATCH_PARTS, EmbeddedSplit
from core.evaluation.generation import Generation, Labeller, ReportedSplit
from core.models.report_decoder import ReportDecoder
from launchers.evaluation_splits import Options, Progress, Splits
from launchers.past_run import PastRun
from shards.dataset import DataSet, Found, read_units
from shards.errors import BadSampleError, DataError, EmptyReportError
from shards.ingest.phantom_ct_text import LABELS as CT_PHANTOM_LABELS
from shards.ingest.phantom_ct_text import stated_diseases
from shards.reports.extract import by_rules
from shards.reports.labels import ONTOLOGIES, label_names
from shards.tokenizer import report_text
from shards.transforms.anatomy import anatomy_texts

DEFAULT_ONTOLOGY = "ct_rate18"


def generate_reports(
    run: PastRun, splits: Splits, options: Options, progress: Progress
) -> tuple[Generation, list[str], Iterator[tuple[str, float]]]:
    """(the evaluator, keys of the held-out studies, its figures, which train the decoder when they are asked for)."""
    config = Generation.Config(
        decoder=ReportDecoder.Config(max_length=options.report_length), steps=options.decoder_steps,
        beams=options.beams, replicates=options.replicates, seed=options.seed,
    )  # fmt: skip
    reported = []
    for split, limit in ((splits.train_split, options.decoder_studies), (options.split, None)):
        embedded = splits.embed(split, {*ANATOMY_PARTS, *PATCH_PARTS}, limit)
        data, sections = splits.open(split), run.config.data.sections
        reported.append(with_reports(embedded, data, sections, splits.anatomies, splits.skipped))
    train, test = reported
    generation = Generation(config)
    found = generation.run(train, test, run.tokenizer, labeller_for(splits.labels), run.device, progress)
    return generation, keys_of(test.split, splits.open(options.split)), found


def with_reports(
    split: EmbeddedSplit, data: DataSet, sections: Sequence[str], anatomies: Sequence[str], skipped: Counter[str]
) -> ReportedSplit:
    """The studies of an embedded split that have a report; the causes of the others are counted in `skipped`.

    `anatomies` in the model's order, none where it does not tell them apart. Raises DataError where no report is left.
    """
    units = split.sample_id.numpy()
    chunk = data.table.chunk_of(units)
    found: dict[int, Found] = {}
    for number in np.unique(chunk):
        found |= read_units(data, int(number), units[chunk == number].tolist(), lambda unit, views: ())
    kept: list[int] = []
    reports: list[str] = []
    states: list[np.ndarray] = []
    for row, unit in enumerate(units.tolist()):
        try:
            members = found[unit]
            if isinstance(members, BadSampleError):
                raise members
            record = members.record(data.manifest.adopted)
            reports.append(report_text(record, sections))
        except (BadSampleError, EmptyReportError) as error:
            skipped[error.cause if isinstance(error, BadSampleError) else "empty report"] += 1
            continue
        kept.append(row)
        states.append(anatomy_texts(record, anatomies).state)
    if not kept:
        raise DataError(f"{data.url}: no study with a report in sections {', '.join(sections)}; nothing to generate")
    if len(kept) < len(split):
        split = split.rows(torch.tensor(kept))
    return ReportedSplit(split=split, reports=reports, state=np.stack(states) if anatomies else None)


def keys_of(split: EmbeddedSplit, data: DataSet) -> list[str]:
    """Of each study, safe to log."""
    units = split.sample_id.numpy()
    chunks = data.table.chunk_of(units)
    return [data.key(chunk, unit)[1] for chunk, unit in zip(chunks.tolist(), units.tolist(), strict=True)]


def labeller_for(labels: Sequence[str]) -> Labeller:
    """Of the CT phantom's diseases by its own sentences where `labels` are of them, else by rules of shards.reports.

    Their ontology is the first that has all of `labels`, else CT-RATE's.
    """
    if labels and set(labels) <= set(CT_PHANTOM_LABELS):
        return Labeller(names=CT_PHANTOM_LABELS, states=stated_diseases, source="sentences of the CT phantom")
    fits = (name for name in ONTOLOGIES if labels and set(labels) <= set(label_names(name)))
    ontology = next(fits, DEFAULT_ONTOLOGY)

    def present(text: str) -> set[str]:
        return {name for name, value in by_rules(text).labels[ontology].items() if value == 1}

    return Labeller(names=label_names(ontology), states=present, source=f"rules of shards.reports, {ontology}")
