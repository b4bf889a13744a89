"""Reports written from frozen embeddings of anatomies, and how good they are (fvlm.md, 6.3).

A small decoder is trained on the training split for a fixed number of steps and writes the reports of held-out studies.
Beside it stand reports that need no decoder, and the decoder given the anatomies of another study: what it writes from
the image is what it is better by. No text of a report is logged or put into a result; `Generation.written` holds it.

Letters: n = studies, A = anatomies, T = patches, K = clinical labels, M = measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from core import optim
from core.evaluation.embed import EmbeddedSplit
from core.evaluation.statistics import Estimate, resampled
from core.evaluation.text_scores import Bleu, LabelF1, RougeL, Statistics, words_of
from core.models.report_decoder import Anatomies, ReportDecoder
from core.optim import OptimConfig
from shards import keyed
from shards.errors import ConfigError

MEASURES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "label_f1_micro", "label_f1_macro")
DECODER, SHUFFLED, NEAREST, FREQUENT = "decoder", "decoder, other study", "nearest study", "most frequent"
Progress = Callable[[str, int, int], None]  # (what, done, total)


class Words(Protocol):
    """What is needed of a tokenizer. `prefix`, `suffix`: ids around every text."""

    vocab_size: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """`input_ids [n, L]`, `attention_mask [n, L]`."""

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids, without special ones."""


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """`states`: a report -> those of the labels `names` [K] that it states as present. `source`: who says so."""

    names: tuple[str, ...]
    states: Callable[[str], Set[str]]
    source: str

    def table(self, reports: Sequence[str]) -> np.ndarray:
        """`[n, K]` bool; equal reports are read once."""
        stated = {text: self.states(text) for text in set(reports)}
        return np.array([[name in stated[text] for name in self.names] for text in reports], dtype=bool)


@dataclass(frozen=True, kw_only=True)
class ReportedSplit:
    """Studies with ANATOMY_PARTS and PATCH_PARTS, their reports [n], and what these say of each anatomy.

    `state [n, A]` int8: 1 abnormal, 0 normal, anything else is left out; None where anatomies are not told apart.
    """

    split: EmbeddedSplit
    reports: Sequence[str]
    state: np.ndarray | None = None


class Generation:
    """BLEU-1..4, ROUGE-L and F1 of clinical labels of generated reports and of controls, with intervals by patient.

    Controls: `most frequent`, the training report that stands there most often (the first of equal ones); `nearest
    study`, the report of the training study whose anatomies are most similar (mean cosine over those that both show);
    `decoder, other study`: written from the anatomies of the study half a split away. `less`: decoder less a control.

    Labels of a generated report are compared with those that the same labeller reads in the reference. Which anatomies
    are abnormal is said by a logistic regression an anatomy, on its embedding, taught what training reports say;
    held-out reports are read by nothing but the measures.
    """

    protocol = "generation"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`steps` of `batch_size` reports teach the decoder; `beams` of the search, 1 is greedy."""

        decoder: ReportDecoder.Config = field(default_factory=ReportDecoder.Config)
        steps: int = 600
        batch_size: int = 32
        optim: OptimConfig = field(
            default_factory=lambda: OptimConfig(learning_rate=1e-3, weight_decay=0.1, warmup_steps=50)
        )
        beams: int = 1
        replicates: int = 1000
        level: float = 0.95
        seed: int = 0

        def __post_init__(self) -> None:
            if min(self.steps, self.batch_size, self.beams) < 1:
                raise ConfigError(
                    f"steps={self.steps}, batch_size={self.batch_size} and beams={self.beams} must be at least 1"
                )

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Generation.Config()
        self.written: list[str] = []  # of the last run, a report a held-out study
        self._report: dict[str, Any] = {}

    def run(
        self,
        train: ReportedSplit,
        test: ReportedSplit,
        words: Words,
        labeller: Labeller,
        device: torch.device,
        progress: Progress = lambda what, done, total: None,
    ) -> Iterator[tuple[str, float]]:
        """Yields (`<report>_<measure>`, value), such as `decoder_bleu_4`. Raises ConfigError for an unfit tokenizer."""
        if not words.prefix or not words.suffix:
            raise ConfigError(
                "generation needs a tokenizer that puts a token before and after every text; this one does not: "
                "give it a post-processor that does, or let the run train its own"
            )
        heads = AbnormalHeads(train)
        seen, held_out = heads.apply(train.split), heads.apply(test.split)
        decoder, losses = self._taught(seen, train, words, device, progress)
        others = torch.arange(len(held_out)).roll(len(held_out) // 2)
        texts = {
            DECODER: self._write(decoder, held_out, words, device, progress, DECODER),
            SHUFFLED: self._write(decoder, held_out.rows(others), words, device, progress, SHUFFLED),
            NEAREST: [train.reports[place] for place in nearest_studies(held_out, seen).tolist()],
            FREQUENT: [Counter(train.reports).most_common(1)[0][0]] * len(test.reports),
        }
        self.written = texts[DECODER]
        scores = self._scores(texts, test, labeller)
        self._report = {
            "protocol": self.protocol,
            "studies": {"train": len(train.reports), "test": len(test.reports)},
            "level": self.config.level,
            **scores,
            "distinct_reports": {name: len(set(found)) for name, found in texts.items()},
            "labels_from": labeller.source,
            "loss": {"first": losses[0], "last": float(np.mean(losses[-20:]))},
            "abnormal": heads.judged(test),
            "config": asdict(self.config),
        }
        for name, measures in scores["reports"].items():
            for measure, estimate in measures.items():
                if estimate["value"] is not None:
                    yield f"{name.replace(', ', '_').replace(' ', '_')}_{measure}", estimate["value"]

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON; no text of a report."""
        return self._report

    def _taught(
        self, seen: Anatomies, train: ReportedSplit, words: Words, device: torch.device, progress: Progress
    ) -> tuple[ReportDecoder, list[float]]:
        """A decoder after all steps, and the loss of each."""
        config = self.config
        ids, mask = words.encode(train.reports, config.decoder.max_length)
        decoder = ReportDecoder(
            config.decoder, vocab_size=words.vocab_size, anatomies=seen.embeds.shape[1],
            embed_dim=seen.embeds.shape[2], tokens_width=seen.tokens.shape[2], seed=config.seed,
        ).to(device)  # fmt: skip
        optimizer = optim.build(decoder, config.optim)
        rates = [group["lr"] for group in optimizer.param_groups]
        losses = []
        for step, chosen in zip(range(config.steps), self._order(train.split.sample_id.numpy()), strict=False):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * optim.schedule_factor(config.optim, step, config.steps)
            longest = int(mask[chosen].sum(dim=1).max())
            told = (ids[chosen, :longest].to(device), mask[chosen, :longest].to(device))
            loss = decoder.loss(seen.rows(chosen).to(device), *told)
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"generation: loss {losses[-1]} at step {step}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            progress("decoder: steps", step + 1, config.steps)
        return decoder.eval(), losses

    def _order(self, sample_id: np.ndarray) -> Iterator[Tensor]:
        """Places of the studies of each step, for ever; every study once an epoch, in an order of its own."""
        size = min(self.config.batch_size, len(sample_id))
        rest, epoch = np.zeros(0, dtype=np.int64), 0
        while True:
            while len(rest) < size:
                order = np.argsort(keyed.hash_u64(self.config.seed, "generation: order", epoch, sample_id))
                rest, epoch = np.concatenate([rest, order]), epoch + 1
            yield torch.from_numpy(rest[:size])
            rest = rest[size:]

    def _write(
        self, decoder: ReportDecoder, held_out: Anatomies, words: Words, device: torch.device, progress: Progress,
        name: str,
    ) -> list[str]:  # fmt: skip
        written: list[str] = []
        for chosen in torch.arange(len(held_out)).split(self.config.batch_size):
            tokens = decoder.generate(
                held_out.rows(chosen).to(device), first=words.prefix[-1], end=words.suffix[0], beams=self.config.beams
            )
            written += words.decode(tokens.tolist())
            progress(f"{name}: reports", len(written), len(held_out))
        return written

    def _scores(self, texts: Mapping[str, list[str]], test: ReportedSplit, labeller: Labeller) -> dict[str, Any]:
        """Estimates of all reports and of the decoder's lead, and how many references state each label."""
        references = [words_of(text) for text in test.reports]
        truth = labeller.table(test.reports)
        of_each: list[list[Statistics]] = []
        for found in texts.values():
            split = [words_of(text) for text in found]
            labels = LabelF1(labeller.table(found), truth)
            of_each.append([Bleu(split, references), RougeL(split, references), labels])
        estimates = self._resampled(of_each, test.split.patient_key.numpy())
        count = len(MEASURES)
        named = [
            {name: one.to_json() for name, one in zip(MEASURES, estimates[start : start + count], strict=True)}
            for start in range(0, len(estimates), count)
        ]
        return {
            "reports": dict(zip(texts, named[: len(texts)], strict=True)),
            "less": dict(zip(list(texts)[1:], named[len(texts) :], strict=True)),
            "labels": dict(zip(labeller.names, truth.sum(axis=0).tolist(), strict=True)),
        }

    def _resampled(self, of_each: Sequence[Sequence[Statistics]], patient_key: np.ndarray) -> list[Estimate]:
        """Of the measures of each kind of report in turn, then of the first kind's less each other's."""

        def statistics(weights: np.ndarray) -> np.ndarray:
            values = [np.concatenate([one(weights) for one in measures]) for measures in of_each]
            return np.concatenate([*values, *(values[0] - other for other in values[1:])])

        config = self.config
        return resampled(statistics, patient_key, seed=config.seed, replicates=config.replicates, level=config.level)


class AbnormalHeads:
    """Says of each anatomy whether it is abnormal: a logistic regression each, both classes weighing alike.

    An anatomy of which training knows one class only is never abnormal; without states all that are there are shown.
    """

    def __init__(self, train: ReportedSplit) -> None:
        self._heads: list[LogisticRegression | None] = []
        self._told_apart = train.state is not None
        if train.state is None:
            return
        embeds = train.split.need("anatomy_embeds").numpy().astype(np.float64)
        present = train.split.need("anatomy_present").numpy() > 0
        for anatomy, state in enumerate(train.state.T):
            rows = present[:, anatomy] & np.isin(state, (0, 1))
            fit = LogisticRegression(class_weight="balanced", max_iter=1000)
            both = len(set(state[rows].tolist())) == 2
            self._heads.append(fit.fit(embeds[rows, anatomy], state[rows]) if both else None)

    def flags(self, split: EmbeddedSplit) -> np.ndarray:
        """Which anatomies are taken for abnormal, `[n, A]` bool."""
        present: np.ndarray = split.need("anatomy_present").numpy() > 0
        if not self._told_apart:
            return present
        embeds = split.need("anatomy_embeds").numpy().astype(np.float64)
        found = [
            np.zeros(len(split), bool) if head is None else head.predict(embeds[:, anatomy]) == 1
            for anatomy, head in enumerate(self._heads)
        ]
        return present & np.stack(found, axis=1)

    def apply(self, split: EmbeddedSplit) -> Anatomies:
        """What a decoder is given of a split, on the CPU."""
        flags = torch.from_numpy(self.flags(split))
        return Anatomies(
            embeds=split.need("anatomy_embeds"),
            present=split.need("anatomy_present") > 0,
            tokens=split.need("patch_tokens"),
            abnormal=split.need("patch_member") & flags[:, :, None],
        )

    def judged(self, test: ReportedSplit) -> dict[str, float] | None:
        """Share of abnormal and of normal anatomies of the held-out studies that are taken for abnormal."""
        if test.state is None or not self._told_apart:
            return None
        present = test.split.need("anatomy_present").numpy() > 0
        flags = self.flags(test.split)
        of_state = {"abnormal": present & (test.state == 1), "normal": present & (test.state == 0)}
        return {
            f"{name}_taken_for_abnormal": float(flags[rows].mean()) for name, rows in of_state.items() if rows.any()
        }


def nearest_studies(queries: Anatomies, candidates: Anatomies) -> Tensor:
    """`[n]`: the candidate of the highest mean cosine over the anatomies that both show; any, where there are none."""

    def flat(of: Anatomies) -> Tensor:
        return (of.embeds * of.present[:, :, None]).flatten(1)

    ours, theirs = flat(queries), flat(candidates)
    shown = candidates.present.float()
    nearest = []
    with torch.autocast(ours.device.type, enabled=False):
        for rows in torch.arange(len(queries)).split(1024):
            both = (queries.present[rows].float() @ shown.T).clamp(min=1.0)
            nearest.append((ours[rows] @ theirs.T / both).argmax(dim=1))
    return torch.cat(nearest)
