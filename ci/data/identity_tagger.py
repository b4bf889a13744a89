"""Trains the French identity tagger: weights under shards/reports/identity/lists, figures by cross-validation.

`python -m ci.data.identity_tagger` writes tagger.npz, the same bytes from the same command on the same machine. It
reads ../shared/data: the even blocks of fr_deid_templates and the layer 3 texts of E3C. Blocks are left out in folds;
a part of the other half of the E3C texts, the letters of identity_apart.txt and the odd ones of identity_reports.txt
tell what is found in text that no weight was fitted on. Needs torch.
"""

from __future__ import annotations

import random
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ci.bench.reports_deid import (
    IDENTITY_TAGS,
    Counted,
    Document,
    clean_share,
    count,
    precision,
    recall,
    templates,
    with_noise,
    with_other_names,
)  # fmt: skip
from ci.data.identity_corpus import apart_letters, made_up, reports
from ci.data.identity_pieces import UNKNOWN, Pieces, document_of, pieces_of, pieces_of_prose
from ci.data.identity_prose import prose
from shards.reports.identity.detector import Detector
from shards.reports.identity.gazetteers import Word, gazetteer, plain
from shards.reports.identity.tagger import (
    KINDS,
    NAMES_ONLY,
    ROWS_LOG2,
    WEIGHTS,
    Tagger,
    attributes,
    hashed,
    save,
    spans_of,
)  # fmt: skip
from shards.reports.identity.view import view_of

SEED = 20261122
FOLDS = 3
DOCUMENTS = 5000  # letters, and as many changed blocks
REPORTS = 2400  # changed reports of our own
SEEN_IN = 8  # documents: a word of fewer is no context word
EPOCHS, BATCH, LEARNING_RATE = 4, 4096, 0.3
LEFT_OUT = 0.15  # share of the features that one step does not see
IGNORED = -100
STEPS = 70  # of the integer weights in one logit
# Margins in logits. FOUND is chosen from what main prints: the highest of TRIED at which nothing that is told is lost.
FOUND = 3.0
JOINED = 0.0
DIGITS = 2.5
COMMON = 3.0
UNLIKE = 7.5  # blocks left out of an earlier training: names among such words reach 7.6 or more, others 7.3 at most
ORDINARY = -6.0
TRIED = (1.0, 1.5, 2.0, 3.0, 4.0)
_LABEL_OF = {
    "NOM": 1, "PRENOM": 1, "DATE": 2, "DATE_NAISSANCE": 2, "TEL": 3, "MAIL": 4, "IPP": 5, "NDA": 5, "SECU": 5,
    "ADRESSE": 6, "ZIP": 7, "VILLE": 8, "HOPITAL": 9, UNKNOWN: IGNORED,
}  # fmt: skip
Rows = tuple[np.ndarray, np.ndarray]  # [tokens, F] int32 rows of the weights, [tokens] labels


def main() -> int:
    """Print cross-validated figures, then write the weights made from everything."""
    torch.set_num_threads(1)
    blocks = templates(odd=False)
    pieces = [pieces_of(block) for block in blocks]
    ours = [pieces_of(report) for report in reports(True)]
    base = [
        *made_up(random.Random(SEED), [], DOCUMENTS),
        *changed(ours, REPORTS, SEED - 1),
        *(document_of(pieces_of_prose(text)) for text in prose(True)),
    ]
    words = vocabulary([*base, *map(document_of, pieces)])
    common, of_blocks = rows_of(base, words), _of_blocks(pieces, words)
    made = with_thresholds(train([common, *of_blocks], words), FOUND)
    save(WEIGHTS, made)
    used = int((made.weights != 0).sum())
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size} bytes, {len(words)} words, {used} weights", flush=True)
    for name, letters in (("letters apart", apart_letters()), ("reports apart", reports(False))):
        for found in TRIED:
            beside = Detector(config=Detector.Config(learned=with_thresholds(made, found).find))
            _print(f"{name}, margin {found}", [count(one, beside.find(one.text, "fr")) for one in letters])
    folds = [train([common, *of_blocks[:fold], *of_blocks[fold + 1 :]], words) for fold in range(FOLDS)]
    rules = Detector(config=Detector.Config(learned=None))
    apart = [(text, len(rules.find(text, "fr"))) for text in prose(False)[::4]]
    for found in TRIED:
        _report(found, blocks, [with_thresholds(one, found) for one in folds], apart)
    return 0


# --- training ---


def vocabulary(documents: Sequence[Document]) -> dict[str, int]:
    """Context words: outside of identifiers in SEEN_IN documents or more, and not known as names only."""
    flags = gazetteer().flags
    seen: Counter[str] = Counter()
    for document in documents:
        spans, text = spans_of(document.text), plain(document.text)
        labels = labels_of(document, spans)
        seen.update({text[start:end] for (start, end), label in zip(spans, labels, strict=True) if label == 0})
    words = sorted(
        word
        for word, count in seen.items()
        if count >= SEEN_IN
        and word.isascii()
        and word.isalpha()
        and (flags.get(word, 0) & Word.COMMON or not flags.get(word, 0) & NAMES_ONLY)
    )
    return {word: number for number, word in enumerate(words, 1)}


def labels_of(document: Document, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """The label of each token; 0 for what stays, IGNORED for what nobody tagged."""
    labels = np.zeros(len(spans), dtype=np.int64)
    ends = [end for _, end in spans]
    for tag in document.tags:
        index = bisect_right(ends, tag.start)
        while index < len(spans) and spans[index][0] < tag.end:
            if labels[index] in (0, IGNORED):
                labels[index] = _LABEL_OF[tag.label]
            index += 1
    return labels


def rows_of(documents: Sequence[Document], words: dict[str, int]) -> Rows:
    """Features and labels of all tokens."""
    features, labels = [], []
    for document in documents:
        spans = spans_of(document.text)
        if spans:
            found = hashed(attributes(document.text, plain(document.text), spans, words))
            features.append(found.T.astype(np.int32))
            labels.append(labels_of(document, spans))
    return np.concatenate(features), np.concatenate(labels)


def changed(pieces: Sequence[Pieces], number: int, seed: int) -> list[Document]:
    """`number` documents of these pieces with identifiers drawn anew: document i is of pieces i % len(pieces)."""
    return list(made_up(random.Random(seed), pieces, 2 * number))[1::2]  # every other one is a letter


def _of_blocks(pieces: Sequence[Pieces], words: dict[str, int]) -> list[Rows]:
    """Rows of the blocks, as they are and changed, by fold: block i is of fold i % FOLDS."""
    folds: list[list[Document]] = [[] for _ in range(FOLDS)]
    for documents in (changed(pieces, DOCUMENTS, SEED + 1), map(document_of, pieces)):
        for index, one in enumerate(documents):
            folds[index % len(pieces) % FOLDS].append(one)
    return [rows_of(documents, words) for documents in folds]


def train(parts: Sequence[Rows], words: dict[str, int]) -> Tagger:
    """Multinomial logistic regression by AdaGrad; weights rounded to int8. Thresholds are still 0.

    What is IGNORED is left out. Steps are large and gradients dense: a sparse step sorts its rows, which takes longer.
    """
    generator = torch.Generator().manual_seed(SEED)
    left_out = 2**ROWS_LOG2  # the row of zeros that a feature left out points at
    weights = torch.nn.EmbeddingBag(left_out + 1, 1 + len(KINDS), mode="sum", padding_idx=left_out)
    torch.nn.init.zeros_(weights.weight)
    optimiser = torch.optim.Adagrad(weights.parameters(), lr=LEARNING_RATE)
    features = torch.from_numpy(np.concatenate([rows[0][rows[1] != IGNORED] for rows in parts]))
    labels = torch.from_numpy(np.concatenate([rows[1][rows[1] != IGNORED] for rows in parts]))
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order.split(BATCH):
            seen = features[chosen]
            seen = seen.masked_fill(torch.rand(seen.shape, generator=generator) < LEFT_OUT, left_out)
            loss = torch.nn.functional.cross_entropy(weights(seen) / (1 - LEFT_OUT), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    made = weights.weight.detach().numpy()[:left_out]
    rounded = np.clip(np.round(made * STEPS), -127, 127).astype(np.int16)
    return Tagger(weights=rounded, vocabulary=words, found=0, joined=0, digits=0, common=0, unlike=0, ordinary=0)


def with_thresholds(made: Tagger, found: float) -> Tagger:
    """`made` with thresholds in its own units; what joins needs FOUND - JOINED less than what is found alone."""
    return replace(
        made,
        found=round(found * STEPS),
        joined=round((found - FOUND + JOINED) * STEPS),
        digits=round(DIGITS * STEPS),
        common=round(COMMON * STEPS),
        unlike=round(UNLIKE * STEPS),
        ordinary=round(ORDINARY * STEPS),
    )


# --- figures ---

Apart = Sequence[tuple[str, int]]  # texts with the number of the rules' spans


def _report(found: float, blocks: Sequence[Document], folds: Sequence[Tagger], apart: Apart) -> None:
    """The tagger alone and beside the rules; each block is read by the fold that has not seen it."""
    print(f"margin {found}")
    variants = {
        "blocks": list(blocks),
        "rare and foreign names": [with_other_names(block, index) for index, block in enumerate(blocks)],
        "OCR noise": [with_noise(block, index) for index, block in enumerate(blocks)],
    }
    for name, documents in variants.items():
        alone = []
        for index, document in enumerate(documents):
            view = view_of(document.text)
            folds[index % FOLDS].find(view, "fr")
            alone.append(count(document, view.identifiers))
        _print(f"alone, {name}", alone)
    both = [Detector(config=Detector.Config(learned=one.find)) for one in folds]
    rules = Detector(config=Detector.Config(learned=None))
    _print("rules", [count(one, rules.find(one.text, "fr")) for one in blocks])
    _print("both", [count(one, both[index % FOLDS].find(one.text, "fr")) for index, one in enumerate(blocks)])
    words = sum(len(text.split()) for text, _ in apart) / 1000
    after = sum(len(both[0].find(text, "fr")) for text, _ in apart) / words
    print(f"prose apart: {sum(n for _, n in apart) / words:.2f} spans per 1,000 words by rules, {after:.2f} by both")


def _print(name: str, counted: Sequence[Counted]) -> None:
    labels = sorted({label for one in counted for label in one.tagged})
    identity = [label for label in labels if label in IDENTITY_TAGS]
    others = [label for label in labels if label not in IDENTITY_TAGS]
    by_class = ", ".join(f"{label} {recall(counted, [label]):.3f}" for label in labels)
    print(
        f"{name}: identity {recall(counted, identity):.3f}, place and date {recall(counted, others):.3f}, precision"
        f" {precision(counted):.3f} ({sum(one.wrong for one in counted)} wrong), clean {clean_share(counted):.3f};"
        f" {by_class}"
    )


if __name__ == "__main__":
    sys.exit(main())
