"""Masks are keyed draws: right shares, whole words, heavier sections first, the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.reports.structured import APPEARANCE, DEFINITION, OBSERVATION, VERDICT
from shards.transforms.masking import Config, draw_key, draw_patches, draw_text, patches_of


def rows_of(lengths: list[list[int]], sections: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """`words` and `sections` of rows whose words have these lengths, each row between two special tokens."""
    longest = max(sum(row) for row in lengths) + 2
    words = np.full((len(lengths), longest), -1)
    section_ids = np.zeros((len(lengths), longest), dtype=np.int64)
    for row, (sizes, of) in enumerate(zip(lengths, sections, strict=True)):
        words[row, 1 : 1 + sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
        section_ids[row, 1 : 1 + sum(sizes)] = np.repeat(of, sizes)
    return words, section_ids


def many_rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 30 to 60 words of one to four tokens, all sections about as long."""
    generator = np.random.default_rng(seed)
    sizes = [generator.integers(1, 5, generator.integers(30, 61)).tolist() for _ in range(count)]
    sections = [np.sort(generator.integers(DEFINITION, VERDICT + 1, len(row))).tolist() for row in sizes]
    return rows_of(sizes, sections)


def masked(words: np.ndarray, sections: np.ndarray, seed: int = 1, epoch: int = 0, **options: float) -> np.ndarray:
    ids = np.arange(len(words))
    return draw_text(Config(**options), seed, np.full(len(words), epoch), ids, words, sections)  # type: ignore[arg-type]


def test_share_and_weights_of_many_tokens() -> None:
    words, sections = many_rows(1000)
    mask = masked(words, sections)
    real = words >= 0
    assert real.sum() > 1e5
    assert not mask[~real].any()
    assert abs(mask[real].mean() - 0.30) < 0.01
    share = {section: mask[sections == section].mean() for section in (DEFINITION, APPEARANCE, OBSERVATION, VERDICT)}
    assert abs(share[OBSERVATION] - share[VERDICT]) < 0.01
    assert share[VERDICT] > share[APPEARANCE] + 0.05
    assert share[APPEARANCE] > share[DEFINITION] + 0.05


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.9])
def test_other_shares(ratio: float) -> None:
    words, sections = many_rows(300)
    mask = masked(words, sections, text_mask_ratio=ratio)
    assert abs(mask[words >= 0].mean() - ratio) < 0.01


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), max_size=30), min_size=1, max_size=6),
    st.integers(0, 2**40),
)
def test_whole_words_and_at_least_one(rows: list[list[tuple[int, int]]], seed: int) -> None:
    words, sections = rows_of([[size for size, _ in row] for row in rows], [[of for _, of in row] for row in rows])
    mask = masked(words, sections, seed=seed)
    assert not mask[words < 0].any()
    for row, content in enumerate(rows):
        for word in range(len(content)):
            assert len(set(mask[row, words[row] == word].tolist())) == 1
        assert mask[row].any() == bool(content)
        # The last word taken may reach beyond the share, by less than its own length.
        longest = max((size for size, _ in content), default=0)
        assert mask[row].sum() < 0.30 * (words[row] >= 0).sum() + longest or mask[row].sum() <= longest


@pytest.mark.parametrize(("size", "patch"), [(64, 8), (224, 16), (48, 16), (32, 32)])
def test_patch_counts_are_exact(size: int, patch: int) -> None:
    config = Config(patch_size=patch)
    patches = patches_of(config, size)
    assert patches == (size // patch) ** 2
    zero = np.zeros(50, dtype=np.int64)
    mask = draw_patches(config, 3, zero, np.arange(50), zero, patches)
    assert mask.shape == (50, patches)
    assert set(mask.sum(axis=1).tolist()) == {round(0.60 * patches)}


def test_every_patch_is_masked_about_as_often() -> None:
    zero = np.zeros(4000, dtype=np.int64)
    share = draw_patches(Config(), 3, zero, np.arange(4000), zero, 16).mean(axis=0)
    assert np.abs(share - 10 / 16).max() < 0.04


def test_draws_depend_on_their_key_alone() -> None:
    """Rows in another order, in parts, beside longer rows: the same masks; another seed, epoch or study: others."""
    words, sections = many_rows(40)
    ids, epoch = np.arange(40) * 7, np.arange(40) % 3
    whole = draw_text(Config(), 5, epoch, ids, words, sections)
    order = np.random.default_rng(0).permutation(40)
    mixed = draw_text(Config(), 5, epoch[order], ids[order], words[order], sections[order])
    assert (mixed == whole[order]).all()
    cut = slice(0, int((words[0] >= 0).sum()) + 2)  # without the padding that longer rows bring
    alone = draw_text(Config(), 5, epoch[:1], ids[:1], words[:1, cut], sections[:1, cut])
    assert (alone == whole[:1, cut]).all()
    assert not (draw_text(Config(), 6, epoch, ids, words, sections) == whole).all()
    assert not (draw_text(Config(), 5, epoch + 1, ids, words, sections) == whole).all()

    view = np.arange(40) % 2
    patches = draw_patches(Config(), 5, epoch, ids, view, 49)
    assert (draw_patches(Config(), 5, epoch[order], ids[order], view[order], 49) == patches[order]).all()
    for other in (
        (6, epoch, ids, view),
        (5, epoch + 1, ids, view),
        (5, epoch, ids + 1, view),
        (5, epoch, ids, 1 - view),
    ):
        assert not (draw_patches(Config(), *other, 49) == patches).all(axis=1).any()

    numbers = draw_key(5, epoch, ids)
    assert numbers.dtype == np.int64
    assert numbers.min() >= 0
    assert len(np.unique(numbers)) == 40
    assert (draw_key(5, epoch[order], ids[order]) == numbers[order]).all()
    assert not (draw_key(5, epoch + 1, ids) == numbers).any()


def test_masks_are_the_fixed_ones() -> None:
    """A replay on another machine or release must hide the same tokens and patches."""
    words, sections = rows_of([[1, 2, 1, 3, 1, 1]], [[1, 2, 2, 3, 4, 4]])
    zero = np.zeros(1, dtype=np.int64)
    text = draw_text(Config(text_mask_ratio=0.5), 5, zero, zero, words, sections)
    patches = draw_patches(Config(), 5, zero, zero, zero, 9)
    assert np.flatnonzero(text[0]).tolist() == [5, 6, 7, 9]
    assert np.flatnonzero(patches[0]).tolist() == [1, 2, 4, 7, 8]
    assert draw_key(5, zero, zero).tolist() == [5533621671965205095]


@pytest.mark.parametrize("options", [{"text_mask_ratio": 0.0}, {"patch_mask_ratio": 1.0}, {"patch_size": 0}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Config(**options)  # type: ignore[arg-type]


def test_patches_that_do_not_tile() -> None:
    with pytest.raises(ConfigError, match="does not divide the image size 100"):
        patches_of(Config(), 100)
