"""ECAMP's side of a report as tokens: distilled sentences put in, words masked by what they are, weights moved.

(arXiv 2312.13316.) A report's spans become classes of characters, then of tokens; `build_mlm` masks and weighs whole
batches of them by keyed draws. Nothing here knows a mask token: the masks are fields of the batch.

`compat="original"` does what the released code does where it differs from its description: descriptors are masked like
any other word, every position of the text counts in the loss, padding and visible tokens too, and the attention grid
stays where it lay in the whole image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from shards import keyed
from shards.batch import StudyRecord
from shards.errors import BadSampleError, ConfigError
from shards.reports.distil import marks
from shards.reports.language import Language
from shards.reports.sentences import sentences
from shards.tokenizer import Pieces, Tokenizer, report_text

ENTITY, DESCRIPTOR, BOILERPLATE = 1, 2, 4  # bits of a character's or a token's class
DISTILLED_TOKENS_MIN = 12  # the longest sentence of `shards.reports.distil` in words of one token; pieces need more
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Chances of a word to be masked, by what it is; `uniform`: all words alike (MRM), whatever they are.

    `plain` is for the words of a report in which no entity is mentioned. `distilled`: share of the readings in which
    the distilled sentences stand in the report, at most `distilled_tokens` long; the report loses its end for them.
    `rebalance`: the weight of boilerplate goes to descriptors, all but `boilerplate_weight` of it.
    """

    masking: Literal["entity", "uniform"] = "entity"
    uniform: float = 0.5
    descriptor: float = 1.0
    entity: float = 0.75
    other: float = 0.70
    plain: float = 0.75
    distilled: float = 0.8
    distilled_tokens: int = 64
    rebalance: bool = True
    boilerplate_weight: float = 0.05
    compat: Literal["none", "original"] = "none"

    def __post_init__(self) -> None:
        for name in ("uniform", "descriptor", "entity", "other", "plain", "distilled", "boilerplate_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"entity_masking.{name}={getattr(self, name)} is outside [0, 1]")
        if not self.boilerplate_weight:
            raise ConfigError("entity_masking.boilerplate_weight=0 leaves some reports no weight at all; use 0.05")
        if self.masking == "uniform" and not self.uniform:
            raise ConfigError("entity_masking.uniform=0 masks no word; use 0.5")
        if self.distilled and self.distilled_tokens < DISTILLED_TOKENS_MIN:
            raise ConfigError(
                f"entity_masking.distilled_tokens={self.distilled_tokens} has no room for one distilled sentence; use "
                f"at least {DISTILLED_TOKENS_MIN}, or entity_masking.distilled=0 for none"
            )

    @property
    def reads_spans(self) -> bool:
        """Whether anything but the words of a report matters."""
        return self.masking == "entity" or self.rebalance or self.distilled > 0

    def check_room(self, text_length: int) -> None:
        """Raises ConfigError where distilled sentences could push out the report."""
        if self.distilled and 2 * self.distilled_tokens > text_length:
            raise ConfigError(
                f"entity_masking.distilled_tokens={self.distilled_tokens} is more than half of "
                f"data.text_length={text_length}; set it to {text_length // 2} or less, or "
                f"data.text_length={2 * self.distilled_tokens}"
            )


# ---- a report's characters ----


class MarkedText(NamedTuple):
    """`kinds` [characters of `text`] uint8, the classes above; `breaks`: where sentences begin, and the end."""

    text: str
    kinds: np.ndarray
    breaks: tuple[int, ...]


class MarkedReport(NamedTuple):
    """What one study gives to read: its report and its distilled sentences, in the order of ECAMP's list."""

    report: MarkedText
    distilled: tuple[MarkedText, ...]


def mark_report(record: StudyRecord, sections: Sequence[str]) -> MarkedReport:
    """The text of these sections with the record's spans.

    Raises EmptyReportError as `report_text`, BadSampleError where an entity lies outside of the report.
    """
    text = report_text(record, sections)
    language = _language(record.language)
    names = sorted(record.report)
    starts = np.cumsum([0, *(len(record.report[name]) + 1 for name in names)])
    source = np.zeros(max(0, int(starts[-1]) - 1), dtype=np.uint8)
    entities = [tuple(one["span"]) for one in record.entities if one.get("span") is not None]
    if not all(0 <= start < end <= len(source) for start, end in entities):
        raise BadSampleError("", "", "an entity lies outside of the report")
    entities += [span for one in record.distilled for span in one.spans]
    for bit, spans in ((ENTITY, entities), (DESCRIPTOR, record.descriptors), (BOILERPLATE, record.boilerplate)):
        for start, end in spans:
            source[start:end] |= bit
    # The text that is read has single blanks: its words stand one after the other as in the source.
    kinds = np.zeros(len(text), dtype=np.uint8)
    place = 0
    for name in sections:
        if name in record.report:
            first = int(starts[names.index(name)])
            for word in _WORD.finditer(record.report[name]):
                size = word.end() - word.start()
                kinds[place : place + size] = source[first + word.start() : first + word.end()]
                place += size + 1
    breaks = (*(start for start, _ in sentences(text, language=language)), len(text))
    distilled = tuple(_mark_sentence(one.sentence, language) for one in record.distilled)
    return MarkedReport(MarkedText(text, kinds, breaks), distilled)


def _language(name: str) -> Language:
    return name if name in ("en", "fr") else "unknown"  # type: ignore[return-value]


@cache
def _mark_sentence(sentence: str, language: Language) -> MarkedText:
    kinds = np.zeros(len(sentence), dtype=np.uint8)
    entities, boilerplate = marks(sentence, language)
    for bit, spans in ((ENTITY, entities), (BOILERPLATE, boilerplate)):
        for start, end in spans:
            kinds[start:end] |= bit
    return MarkedText(sentence, kinds, (0, len(sentence)))


# ---- tokens ----


class MarkedTokens(NamedTuple):
    """Rows as they are read, [B, L] each. `words` numbers the words of a row from 0, -1 for special tokens, padding.

    `kinds` uint8 is 0 outside of words; `seen` bool is False for padding. [B] int64: `cut`, tokens of the report that
    found no room, and `dropped`, distilled sentences that found none in their budget.
    """

    ids: np.ndarray
    words: np.ndarray
    kinds: np.ndarray
    seen: np.ndarray
    cut: np.ndarray
    dropped: np.ndarray


class _Row(NamedTuple):
    ids: np.ndarray
    words: np.ndarray
    kinds: np.ndarray


def tokenise(
    config: Config,
    tokenizer: Tokenizer,
    reports: Sequence[MarkedReport | None],
    seed: int,
    epoch: np.ndarray,
    sample_id: np.ndarray,
    *,
    length: int,
    train: bool,
) -> MarkedTokens:
    """Each report with its distilled sentences at a place between sentences that is drawn anew every epoch.

    A row holds at most `length` tokens: of the distilled sentences as many whole ones as their budget holds, then as
    much of the report as still fits. Without `train` sentences stand in no report. None is a void slot.
    """
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    room = length - len(prefix) - len(suffix)
    coins = keyed.uniform(seed, "entity/distilled", epoch, sample_id, draws=2)  # [B, 2]
    read = [one for one in reports if one is not None]
    texts = list(dict.fromkeys(text.text for one in read for text in (one.report, *one.distilled)))
    pieces = dict(zip(texts, tokenizer.pieces(texts), strict=True))
    cut, dropped = np.zeros(len(reports), dtype=np.int64), np.zeros(len(reports), dtype=np.int64)
    rows = []
    for i, one in enumerate(reports):
        if one is None:
            rows.append(_joined([]))
            continue
        body, extra = _row(one.report, pieces[one.report.text]), _joined([])
        if train and coins[i, 0] < config.distilled:
            extra, dropped[i] = _budgeted(one.distilled, pieces, min(config.distilled_tokens, room))
        kept = min(len(body.ids), room - len(extra.ids))
        cut[i] = len(body.ids) - kept
        breaks = one.report.breaks
        character = breaks[int(coins[i, 1] * len(breaks))]
        place = min(kept, int(np.searchsorted(pieces[one.report.text].start, character)))
        head, tail = (_Row(*(part[piece] for part in body)) for piece in (slice(place), slice(place, kept)))
        rows.append(_joined([head, extra, tail]))
    return _padded(rows, prefix, suffix, tokenizer.pad_id, length if config.compat == "original" else 0, cut, dropped)


def _row(text: MarkedText, pieces: Pieces) -> _Row:
    """A token has the classes of all its characters."""
    kinds = np.zeros(len(pieces.ids), dtype=np.uint8)
    for bit in (ENTITY, DESCRIPTOR, BOILERPLATE):
        count = np.concatenate([[0], np.cumsum((text.kinds & bit) != 0)])
        kinds |= np.where(count[pieces.end] > count[pieces.start], bit, 0).astype(np.uint8)
    return _Row(pieces.ids, pieces.words, kinds)


def _joined(rows: Sequence[_Row]) -> _Row:
    """Rows after each other, words numbered on; a word that a cut parts becomes two."""
    ids = [row.ids for row in rows]
    words, first = [], 0
    for row in rows:
        if len(row.words):
            words.append(row.words - row.words[0] + first)
            first = int(words[-1][-1]) + 1
    none = np.zeros(0, dtype=np.int64)
    return _Row(
        np.concatenate([none, *ids]),
        np.concatenate([none, *words]),
        np.concatenate([none.astype(np.uint8), *(row.kinds for row in rows)]),
    )


def _budgeted(texts: Iterable[MarkedText], pieces: dict[str, Pieces], budget: int) -> tuple[_Row, int]:
    """Whole sentences that fit, in their order, and how many did not."""
    rows, dropped = [], 0
    for text in texts:
        row = _row(text, pieces[text.text])
        if len(row.ids) <= budget:
            rows.append(row)
            budget -= len(row.ids)
        else:
            dropped += 1
    return _joined(rows), dropped


def _padded(
    rows: Sequence[_Row],
    prefix: Sequence[int],
    suffix: Sequence[int],
    pad_id: int,
    least: int,
    cut: np.ndarray,
    dropped: np.ndarray,
) -> MarkedTokens:
    longest = max([least, *(len(prefix) + len(row.ids) + len(suffix) for row in rows)])
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    words = np.full((len(rows), longest), -1, dtype=np.int64)
    kinds, seen = np.zeros((len(rows), longest), dtype=np.uint8), np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        start, end = len(prefix), len(prefix) + len(row.ids)
        ids[i, :start], ids[i, start:end], ids[i, end : end + len(suffix)] = prefix, row.ids, suffix
        words[i, start:end], kinds[i, start:end], seen[i, : end + len(suffix)] = row.words, row.kinds, True
    return MarkedTokens(ids, words, kinds, seen, cut, dropped)


# ---- masks and weights ----


def build_mlm(
    config: Config, seed: int, epoch: np.ndarray, sample_id: np.ndarray, words: np.ndarray, kinds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`text_mask` [B, L] bool, what is masked, and `token_weight` [B, L] float32, what each position's loss counts.

    `epoch`, `sample_id` [B]; `words`, `kinds` [B, L] of `MarkedTokens`. Whole words are masked or not, by the class of
    their first token: a continuation shares its fate. Weights of `weights`, 0 for what is not predicted: words that are
    visible, special tokens and padding (all of which the released code counts).
    """
    chance = _chances(config, words, kinds)  # [B, L], of the word that starts there
    count = int(words.max(initial=-1)) + 1
    mask = np.zeros(words.shape, dtype=bool)
    if count:
        coins = keyed.uniform(seed, "entity/mask", epoch[:, None], sample_id[:, None], np.arange(count))[..., 0]
        word = np.maximum(words, 0)
        first = np.diff(words, axis=1, prepend=-1) != 0  # where a word begins
        row, column = np.nonzero(first & (words >= 0))
        chosen = np.zeros((len(words), count), dtype=bool)
        chosen[row, words[row, column]] = coins[row, words[row, column]] < chance[row, column]
        mask = np.take_along_axis(chosen, word, axis=1) & (words >= 0)
    original = config.compat == "original"
    counted = np.ones_like(mask) if original else words >= 0
    weight = weights(config, kinds, counted) if config.rebalance else counted.astype(np.float64)
    if not original:
        weight *= mask
    return mask, weight.astype(np.float32)


def _chances(config: Config, words: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    if config.masking == "uniform":
        return np.full(words.shape, config.uniform)
    descriptor = config.other if config.compat == "original" else config.descriptor
    entity = (kinds & ENTITY) != 0
    chance = np.where(entity, config.entity, np.where((kinds & DESCRIPTOR) != 0, descriptor, config.other))
    return np.where(entity.any(axis=1, keepdims=True), chance, config.plain)


def weights(config: Config, kinds: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """float64 [B, L], 0 where not `counted`: the re-balancing factors of ECAMP, which add up to the counted positions.

    Boilerplate keeps `boilerplate_weight`; what it loses goes to the descriptors, or to all alike where there are none.
    """
    kept = config.boilerplate_weight
    boilerplate, descriptor = (((kinds & bit) != 0) & counted for bit in (BOILERPLATE, DESCRIPTOR))

    def number(which: np.ndarray) -> np.ndarray:
        return which.sum(axis=1, keepdims=True)

    n_t, n_d, n_o, n = (number(one) for one in (boilerplate, descriptor, boilerplate & descriptor, counted))
    weight = np.where(counted, np.where(boilerplate, kept, 1.0), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # in rows that take the other branch
        to_descriptors = ((1 - kept) * (n_t - n_o) + n_d) / (n_d - (1 - kept) * n_o)
        to_all = n / (n - (1 - kept) * n_t)
    moved = np.where(descriptor & (n_t > 0), to_descriptors, 1.0)
    spread = np.where((n_d == 0) & (n_t > 0), to_all, 1.0)
    return np.asarray(weight * moved * spread)
