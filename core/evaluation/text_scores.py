"""How near generated reports are to the radiologists': BLEU-1..4, ROUGE-L, F1 of clinical labels.

Counts are kept a study, so that a bootstrap by patient costs sums only. Words are compared in lower case, without
accents and without white space: a vocabulary may know no more of a text.

Letters: n = studies, r = replicates, K = labels.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from core.evaluation.statistics import mean_of_defined

ORDERS = 4  # of BLEU's n-grams
Statistics = Callable[[np.ndarray], np.ndarray]  # whole weights of studies [n, r] -> values [M, r]


def words_of(text: str) -> list[str]:
    """Words and marks of punctuation, each its own, in lower case without accents."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(one))
    return re.findall(r"\w+|[^\w\s]", plain)


class Bleu:
    """Corpus BLEU-1 to BLEU-4, one reference a report (Papineni et al. 2002): rows of `[4, r]`, without smoothing.

    BLEU-k is the geometric mean of the shares of 1- to k-grams that the reference has, times the brevity penalty of
    the whole corpus.
    """

    def __init__(self, generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> None:
        pairs = list(zip(generated, references, strict=True))
        # [n, 2, 4]: n-grams in common and n-grams generated, by order; [n, 2]: words of both.
        self._counts = np.array([[_common(*pair, order) for order in range(1, ORDERS + 1)] for pair in pairs], float)
        self._lengths = np.array([[len(ours), len(theirs)] for ours, theirs in pairs], float)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        common, total = np.einsum("nks,nr->skr", self._counts, weights)  # [4, r] each
        ours, theirs = np.einsum("ns,nr->sr", self._lengths, weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(total > 0, common / np.maximum(total, 1), 0.0)
            penalty = np.where(ours > 0, np.exp(np.minimum(0.0, 1.0 - theirs / np.maximum(ours, 1))), 0.0)
            means = np.cumsum(np.log(shares), axis=0) / np.arange(1, ORDERS + 1)[:, None]
        found: np.ndarray = penalty * np.exp(means)
        return found


def _common(generated: Sequence[str], reference: Sequence[str], order: int) -> tuple[int, int]:
    """(n-grams that both have, each as often as both have it; n-grams generated)."""
    ours, theirs = (
        Counter(zip(*(words[start:] for start in range(order)), strict=False)) for words in (generated, reference)
    )
    return (ours & theirs).total(), ours.total()


class RougeL:
    """Mean F-measure of the longest common subsequence of words (Lin 2004), `[1, r]`; precision and recall alike."""

    def __init__(self, generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> None:
        self._measure = np.array(
            [
                2 * longest_common_subsequence(ours, theirs) / max(1, len(ours) + len(theirs))
                for ours, theirs in zip(generated, references, strict=True)
            ]
        )

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return (self._measure @ weights)[None] / weights.sum(axis=0)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, by one long addition for each word of `b` (Hyyrö 2004): bit i stands for word i of `a`."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    open_places = all_places = (1 << len(a)) - 1
    for word in b:
        match = open_places & places.get(word, 0)
        open_places = (open_places + match | open_places - match) & all_places
    return len(a) - open_places.bit_count()


class LabelF1:
    """Micro and macro F1 of labels `[n, K]` bool, in this order `[2, r]`; the macro mean is over `macro_over` [K].

    F1 = 2 TP / (2 TP + FP + FN). A label that no reference has is left out of the mean, and so is one that a replicate
    draws in neither.
    """

    def __init__(self, generated: np.ndarray, references: np.ndarray) -> None:
        self.macro_over = references.any(axis=0)
        self._common = (generated & references).astype(float)  # [n, K]
        self._either = generated.astype(float) + references

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        common, either = self._common.T @ weights, self._either.T @ weights  # [K, r]; 2 TP + FP + FN is `either`
        with np.errstate(divide="ignore", invalid="ignore"):
            micro = 2 * common.sum(axis=0) / either.sum(axis=0)
            each = np.where(either > 0, 2 * common / either, np.nan)
            return np.stack([micro, mean_of_defined(each[self.macro_over].T)])
