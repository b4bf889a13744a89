"""The decoder of reports: its cache, its search, and what it must not see."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from core.models.report_decoder import Anatomies, ReportDecoder
from shards.errors import ConfigError

STUDIES, ANATOMIES, PATCHES, EMBED, WIDTH_IN = 5, 3, 7, 6, 9
FIRST, END = 1, 2


def anatomies() -> Anatomies:
    """Study 0 shows nothing at all; study 1 no patch."""
    generator = torch.Generator().manual_seed(4)
    present = torch.rand(STUDIES, ANATOMIES, generator=generator) < 0.6
    abnormal = torch.rand(STUDIES, ANATOMIES, PATCHES, generator=generator) < 0.3
    present[0], abnormal[:2] = False, False
    return Anatomies(
        embeds=torch.randn(STUDIES, ANATOMIES, EMBED, generator=generator),
        present=present,
        tokens=torch.randn(STUDIES, PATCHES, WIDTH_IN, generator=generator),
        abnormal=abnormal,
    )


def decoder(words: int = 11, max_length: int = 9) -> ReportDecoder:
    """With weights large enough that no two tokens are nearly as likely."""
    config = ReportDecoder.Config(width=16, depth=2, heads=2, max_length=max_length)
    made = ReportDecoder(config, vocab_size=words, anatomies=ANATOMIES, embed_dim=EMBED, tokens_width=WIDTH_IN, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


@torch.no_grad()
def log_probabilities(model: ReportDecoder, seen: Anatomies, tokens: Tensor) -> Tensor:
    """Of each of the tokens `[S, L]` after FIRST by one full pass, `[S, L]`."""
    ids = torch.cat([torch.full((len(tokens), 1), FIRST), tokens], dim=1)
    given = model(seen, ids[:, :-1]).log_softmax(dim=-1)
    return given.gather(2, tokens[:, :, None]).squeeze(2)


@torch.no_grad()
def test_a_token_at_a_time_equals_the_whole_report_at_once() -> None:
    model, seen = decoder(), anatomies()
    ids = torch.randint(0, 11, (STUDIES, 8), generator=torch.Generator().manual_seed(1))
    whole = model(seen, ids)
    known = model.look(seen)
    past = [one[:, :0] for one in known.key_values]
    for position in range(8):
        x = model.words(ids[:, position]) + model.positions[position]
        for number, block in enumerate(model._blocks()):
            x, past[number] = block.meet_next(x, past[number], known.key_values[number], known.mask)
        torch.testing.assert_close(model._logits(x), whole[:, position], rtol=1e-4, atol=1e-5)


def test_greedy_takes_the_likeliest_token_and_stops_at_the_end() -> None:
    model, seen = decoder(), anatomies()
    tokens = model.generate(seen, first=FIRST, end=END)
    assert torch.equal(tokens, model.generate(seen, first=FIRST, end=END))
    ids = torch.cat([torch.full((STUDIES, 1), FIRST), tokens], dim=1)
    likeliest = model(seen, ids[:, :-1]).argmax(dim=-1)
    ended = (tokens == END).cumsum(dim=1) - (tokens == END).long() > 0  # after its end
    assert torch.equal(tokens[~ended], likeliest[~ended])
    assert (tokens[ended] == END).all()
    assert len(set(map(tuple, tokens.tolist()))) > 1 and tokens.shape[1] <= 8


def test_a_search_as_wide_as_all_reports_finds_the_best() -> None:
    words, limit = 4, 3
    model, seen = decoder(words, limit + 1), anatomies()
    found = model.generate(seen, first=FIRST, end=END, beams=words**limit)
    whole = product(range(words), repeat=limit)  # END is followed by END alone
    every = [one for one in whole if all(a != END or b == END for a, b in pairwise(one))]
    means = []
    for one in every:
        length = min(limit, (*one, END).index(END) + 1)
        tokens = torch.tensor([one]).expand(STUDIES, -1)
        means.append(log_probabilities(model, seen, tokens)[:, :length].mean(dim=1))
    best = torch.stack(means).argmax(dim=0).tolist()
    padded = torch.nn.functional.pad(found, (0, limit - found.shape[1]), value=END)
    assert padded.tolist() == [list(every[place]) for place in best]


@torch.no_grad()
def test_what_is_absent_or_normal_is_not_seen() -> None:
    model, seen = decoder(), anatomies()
    ids = torch.randint(0, 11, (STUDIES, 6), generator=torch.Generator().manual_seed(1))
    hidden = replace(
        seen,
        embeds=torch.where(seen.present[:, :, None], seen.embeds, 1e3),
        tokens=torch.where(seen.abnormal.any(dim=1)[:, :, None], seen.tokens, -1e3),
    )
    assert torch.equal(model(seen, ids), model(hidden, ids)) and torch.isfinite(model(seen, ids)).all()
    # Patches that no study shows are left out, and the rest may stand anywhere.
    chosen = torch.tensor([3, 0, 4])
    few = seen.rows(chosen)
    assert few.tokens.shape[1] == int(seen.abnormal[chosen].any(dim=1).sum(dim=1).max()) < PATCHES
    torch.testing.assert_close(model(few, ids[chosen]), model(seen, ids)[chosen], rtol=1e-4, atol=1e-5)
    nothing = seen.rows(torch.tensor([0, 1]))
    assert nothing.tokens.shape[1] == 0 and torch.isfinite(model(nothing, ids[:2])).all()
    # What it shows for an anatomy is seen, and which anatomy that is.
    swapped = replace(few, abnormal=few.abnormal.roll(1, dims=1))
    assert not torch.allclose(model(swapped, ids[chosen]), model(few, ids[chosen]), atol=1e-3)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_length=1 at least 2"):
        ReportDecoder.Config(max_length=1)
