"""Zero-shot classification: is an image nearer to sentences that state a finding than to sentences that deny it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from core.evaluation.embed import EmbeddedSplit, Encoders, precision
from core.evaluation.statistics import AreasUnderCurve, areas_under_curve
from shards.errors import ConfigError

# Plain text, or what a structured report says of one disease: (section, text) of each part.
Prompt = str | tuple[tuple[int, str], ...]
# label -> {"positive": prompts, "negative": prompts}
Prompts = Mapping[str, Mapping[str, Sequence[Prompt]]]


class Tokens(Protocol):
    """`input_ids [n, L]`, `attention_mask [n, L]`."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def attention_mask(self) -> Tensor: ...


class Encode(Protocol):
    """A tokenizer's only methods that are needed here, the second for prompts in parts."""

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """`input_ids [n, L]`, `attention_mask [n, L]`."""

    def encode_parts(self, rows: Sequence[Sequence[tuple[int, str]]], max_length: int) -> Tokens:
        """The same of texts in parts, with a separator between neighbours."""


class ZeroShot:
    """AUC per label and macro AUC of prompt ensembles, with intervals by patient.

    Score of a label = mean similarity to its positive prompts - mean similarity to its negative ones (the similarity to
    the mean of the unit embeddings). With a temperature t the mean of similarities s is t log mean exp(s / t), which
    counts the nearest prompts most: of prompts that name different places an image can be like a few only. Studies
    where a label is uncertain or not annotated are left out for that label.
    """

    protocol = "zero_shot"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`text_length` in tokens; `replicates` of the bootstrap; `batch_size` prompts are encoded at once.

        `seen`: labels that training named, if it named any: of a class that was taught no zero-shot figure is strictly
        one, so the others are averaged apart. `temperature`: of cosines, None for plain means; about what the task
        divides by serves.
        """

        text_length: int = 128
        temperature: float | None = None
        replicates: int = 1000
        level: float = 0.95
        seed: int = 0
        batch_size: int = 256
        seen: tuple[str, ...] | None = None

    def __init__(self, prompts: Prompts, config: Config | None = None) -> None:
        """Raises ConfigError for a label without positive prompts or with an unknown member, or a bad temperature."""
        self.prompts, self.config = check_prompts(prompts), config or ZeroShot.Config()
        check_temperature(self.config.temperature)
        self._report: dict[str, Any] = {}

    def run(
        self,
        task: Encoders,
        tokenizer: Encode,
        split: EmbeddedSplit,
        labels: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Yields (label, AUC), then ("macro", their mean). `labels` name the columns of `split.labels`.

        Where some labels were seen in training and some not, ("macro_seen", AUC) and ("macro_unseen", AUC), too.

        Raises ConfigError when no label of the data has prompts.
        """
        scored = self.scored(labels)
        scores = self.scores(task, tokenizer, split.need("image_embeds"), scored, device, autocast)
        truth = split.labels[:, [list(labels).index(name) for name in scored]].numpy()

        def areas_of(columns: Sequence[int]) -> AreasUnderCurve:
            return areas_under_curve(
                scores[:, columns], truth[:, columns], split.patient_key.numpy(), [scored[k] for k in columns],
                seed=self.config.seed, replicates=self.config.replicates, level=self.config.level,
            )  # fmt: skip

        areas = areas_of(list(range(len(scored))))
        seen = [k for k, name in enumerate(scored) if self.config.seen is None or name in self.config.seen]
        unseen = [k for k in range(len(scored)) if k not in seen]
        apart = {"seen": areas_of(seen).macro, "unseen": areas_of(unseen).macro} if seen and unseen else {}
        self._report = {
            "protocol": self.protocol,
            "studies": len(split),
            "level": self.config.level,
            "labels_without_prompts": [name for name in labels if name not in self.prompts],
            "temperature": self.config.temperature,
            "prompts": {name: {side: len(texts) for side, texts in self.prompts[name].items()} for name in scored},
            "unseen": [scored[k] for k in unseen],
            "macro_of": {which: macro.to_json() for which, macro in apart.items()},
            **areas.to_json(),
        }
        yield from named_areas(areas)
        yield from ((f"macro_{which}", macro.value) for which, macro in apart.items() if np.isfinite(macro.value))

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON: intervals and counts per label."""
        return self._report

    def scored(self, labels: Sequence[str]) -> list[str]:
        """The labels that have prompts. Raises ConfigError when none has."""
        scored = [name for name in labels if name in self.prompts]
        if not scored:
            raise ConfigError(
                f"no prompts for the labels of this data ({', '.join(labels) or 'none'}); "
                f"there are some for {', '.join(self.prompts) or 'nothing'}: give others with --prompts"
            )
        return scored

    def scores(
        self,
        task: Encoders,
        tokenizer: Encode,
        image_embeds: Tensor,
        names: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> np.ndarray:
        """Unit vectors `[n, E]` of images -> `[n, K]` float64, higher where a label's positive prompts are nearer."""
        temperature = self.config.temperature
        if temperature is None:
            return scores_of(image_embeds, self.directions(task, tokenizer, names, device, autocast))
        embeds = self._embeds(task, tokenizer, names, device, autocast)

        def near(name: str, side: str) -> np.ndarray:
            texts = self.prompts[name].get(side)
            if not texts:
                return np.zeros(len(image_embeds))
            similarity = scores_of(image_embeds, torch.stack([embeds[text] for text in texts], dim=1))
            pooled: np.ndarray = temperature * (logsumexp(similarity / temperature, axis=1) - np.log(len(texts)))
            return pooled

        return np.stack([near(name, "positive") - near(name, "negative") for name in names], axis=1)

    def directions(
        self,
        task: Encoders,
        tokenizer: Encode,
        names: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> Tensor:
        """[E, K] float32 on the CPU: mean positive prompt less mean negative prompt of each label."""
        embeds = self._embeds(task, tokenizer, names, device, autocast)

        def mean(texts: Sequence[Prompt]) -> Tensor:
            return torch.stack([embeds[text] for text in texts]).mean(dim=0)

        columns = []
        for name in names:
            column = mean(self.prompts[name]["positive"])
            if self.prompts[name].get("negative"):
                column = column - mean(self.prompts[name]["negative"])
            columns.append(column)
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def _embeds(
        self,
        task: Encoders,
        tokenizer: Encode,
        names: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> dict[Prompt, Tensor]:
        """Every prompt of these labels -> its unit vector `[E]`, float32 on the CPU."""
        texts = list(dict.fromkeys(text for name in names for side in self.prompts[name].values() for text in side))
        was_training = getattr(task, "training", False)
        if isinstance(task, torch.nn.Module):
            task.eval()
        embeds = []
        try:
            for start in range(0, len(texts), self.config.batch_size):
                batch = texts[start : start + self.config.batch_size]
                ids, mask = encode_prompts(tokenizer, batch, self.config.text_length)
                with precision(device, autocast):
                    embeds.append(task.embed_texts(ids.to(device), mask.to(device)).float().cpu())
        finally:
            if isinstance(task, torch.nn.Module):
                task.train(was_training)
        return dict(zip(texts, torch.cat(embeds), strict=True))


def check_temperature(temperature: float | None) -> None:
    """Raises ConfigError where cosines cannot be pooled with it."""
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(
            f"temperature={temperature} of prompts must be positive, 0.05 say; leave it out for their mean"
        )


def encode_prompts(tokenizer: Encode, prompts: Sequence[Prompt], max_length: int) -> tuple[Tensor, Tensor]:
    """`input_ids [n, L]`, `attention_mask [n, L]`. Plain text beside prompts in parts is a row of one part."""
    plain = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(plain) == len(prompts):  # a tokenizer without a separator can encode these
        return tokenizer.encode(plain, max_length)
    rows = [((1, prompt),) if isinstance(prompt, str) else prompt for prompt in prompts]
    tokens = tokenizer.encode_parts(rows, max_length)
    return tokens.input_ids, tokens.attention_mask


def scores_of(image_embeds: Tensor, directions: Tensor) -> np.ndarray:
    """[n, E], [E, K] -> [n, K] float64. In NumPy, since a caller's autocast would make a product of tensors bf16."""
    scores: np.ndarray = image_embeds.numpy().astype(np.float64) @ directions.numpy().astype(np.float64)
    return scores


def check_prompts(prompts: Prompts) -> dict[str, dict[str, list[Prompt]]]:
    """As plain dicts and lists. Raises ConfigError naming the label whose prompts cannot be used."""
    checked: dict[str, dict[str, list[Prompt]]] = {}
    for label, sides in prompts.items():
        if not isinstance(sides, Mapping) or not set(sides) <= {"positive", "negative"}:
            found = ", ".join(map(str, sides)) if isinstance(sides, Mapping) else type(sides).__name__
            raise ConfigError(f"prompts of {label!r}: want lists `positive` and `negative`, found {found}")
        for side, texts in sides.items():
            if isinstance(texts, str) or not all(map(_says_something, texts)):
                raise ConfigError(f"prompts of {label!r}: {side} must be a list of sentences, none of them empty")
        if not sides.get("positive"):
            raise ConfigError(f"prompts of {label!r}: no positive sentence; give at least one")
        checked[label] = {side: list(texts) for side, texts in sides.items()}
    return checked


def _says_something(prompt: object) -> bool:
    return bool(prompt.strip()) if isinstance(prompt, str) else isinstance(prompt, tuple) and bool(prompt)


def named_areas(areas: AreasUnderCurve) -> Iterator[tuple[str, float]]:
    """(label, AUC) of each label that has both classes, then ("macro", the macro average)."""
    for name, estimate in zip(areas.names, areas.labels, strict=True):
        if np.isfinite(estimate.value):
            yield name, estimate.value
    if np.isfinite(areas.macro.value):
        yield "macro", areas.macro.value
