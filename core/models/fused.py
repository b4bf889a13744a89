"""Gaussians of fused tokens and what is predicted from their samples: masked words, masked patches, the right report.

Everything is computed pair by pair, an image with its study's report; only matching looks at other studies.

Letters: b = studies, V = images and so pairs, N = patches, M = visible or masked patches, L = words, C = fusion width,
R = chosen tokens, K = samples and the mean, D = width of an encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.keyed import hash_keys
from core.losses.masked import normalise_patches, patch_loss, word_loss
from core.losses.matching import match_loss
from core.losses.per_study import PerStudy
from core.losses.variance import Divergence, divergence, variance_floor
from core.models.fusion import Fusion, MatchHead, PatchHead, Streams, WordHead
from core.models.gaussian import Gaussian, GaussianEncoder, sample
from core.models.text import TextEncoder, never_empty
from core.models.vision import VisionEncoder
from shards.batch import Batch


@dataclass(frozen=True, kw_only=True)
class PatchSplit:
    """Which patches of `[V, N]` are seen: `keep [V, M]` and `hidden [V, N - M]` int64, ascending in each image."""

    keep: Tensor
    hidden: Tensor

    @staticmethod
    def of(mask: Tensor) -> PatchSplit:
        """`mask [V, N]` bool, True for masked ones: as many in each image, or none in that of a void study."""
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        seen = mask.shape[1] - int(mask.sum(dim=1).max())
        return PatchSplit(keep=order[:, :seen], hidden=order[:, seen:])


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the encoders made of a (micro-)batch, global tokens first; masked views are None where nobody needs them.

    `image [V, 1 + N, D]`, `text [b, L, D]`, `masked_image [V, 1 + M, D]` of the patches that `patches.keep` names.
    """

    image: Tensor
    text: Tensor
    patches: PatchSplit
    masked_image: Tensor | None = None
    masked_text: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """V pairs as the fusion takes them: `image [V, 1 + N, C]`, `text [V, L, C]`, `mask [V, L]`.

    `study [V]` is the study of each, `keys [V]` what its random numbers are keyed by; `full` both streams after fusion,
    nothing masked, where matching or a divergence asks for them.
    """

    image: Tensor
    text: Tensor
    mask: Tensor
    study: Tensor
    keys: Tensor
    full: Streams | None


class FusedGaussians(nn.Module):
    """Fusion, a Gaussian encoder a stream, and the heads that the losses in use need."""

    def __init__(
        self,
        fusion: Fusion.Config,
        encoders: tuple[GaussianEncoder, GaussianEncoder],
        *,
        vision: VisionEncoder.Config,
        text: TextEncoder.Config,
        samples: int,
        floor: float | None,
        words: bool,
        patches: bool,
        match: bool,
        masked_divergence: Divergence | None,
    ) -> None:
        """`encoders`: of image and text tokens. `words`, `patches`, `match`: which heads are wanted."""
        super().__init__()
        self.samples, self.floor, self.divergence = samples, floor, masked_divergence
        rows, columns = vision.grid
        self.fusion = Fusion(fusion, image_width=vision.width, text_width=text.width, patches=rows * columns)
        self.image_gaussian, self.text_gaussian = encoders
        self.word_head = WordHead(fusion.width, text.vocab_size) if words else None
        self.patch_head = PatchHead(fusion.width, vision.channels * vision.patch_size**2) if patches else None
        self.match_head = MatchHead(fusion.width) if match else None

    def add_losses(
        self, out: PerStudy, tokens: Tokens, batch: Batch, pixels: Tensor, negatives: tuple[Tensor, Tensor] | None
    ) -> None:
        """Adds `mlm`, `mim`, `itm`, `kl`, `floor` and the logged `fused_logvar` to `out`, those that are in use.

        `pixels [V, N, P]`: the patches as they are; `negatives`: what `draw_negatives` gave, for matching.
        """
        study = batch["study_index"]
        text, mask = self.fusion.embed_text(tokens.text), never_empty(batch["attention_mask"])
        image = self.fusion.embed_image(tokens.image)
        full = None
        if self.match_head is not None:
            full = self.fusion(image, text[study], mask[study])
        elif self.divergence is not None:  # a target only
            with torch.no_grad():
                full = self.fusion(image.detach(), text[study].detach(), mask[study])
        view = torch.arange(len(study), device=study.device) - torch.searchsorted(study, study)
        keys = hash_keys("view", batch["draw_key"][study], view)
        pairs = Pairs(image=image, text=text[study], mask=mask[study], study=study, keys=keys, full=full)
        if tokens.masked_text is not None:
            self._words(out, pairs, tokens.masked_text, batch)
        if tokens.masked_image is not None:
            self._patches(out, pairs, tokens.masked_image, tokens.patches, pixels)
        if self.match_head is not None:
            assert full is not None and negatives is not None
            out.add("itm", self._match(out, full, study, keys, matched=True), study)
            other, exists = negatives
            rows = torch.arange(len(mask), device=study.device)
            first_view = torch.searchsorted(study, rows).clamp(max=len(study) - 1)
            wrong = self.fusion(image[first_view[other]], text, mask)
            # Keys of their own: the noise of the right pair would come again.
            negative_keys = hash_keys("negative", batch["draw_key"])
            loss = self._match(out, wrong, rows, negative_keys, matched=False, counts=exists)
            out.add("itm", torch.where(exists, loss, torch.zeros_like(loss)))

    def _words(self, out: PerStudy, pairs: Pairs, masked_text: Tensor, batch: Batch) -> None:
        """Masked words, their images whole."""
        text = self.fusion.embed_text(masked_text)[pairs.study]
        stream = self.fusion(pairs.image, text, pairs.mask, want_image=False).text
        pair, place = batch["text_mask"][pairs.study].nonzero(as_tuple=True)  # [R] each
        target = None if pairs.full is None else pairs.full.text
        words = self._read(out, self.text_gaussian, stream, target, pairs, pair, place, pairs.mask)
        if self.word_head is not None:
            drawn = sample(words, self.samples, hash_keys("place", pairs.keys[pair], place), "word")
            logits = self.word_head(drawn.flatten(0, 1), stream.dtype).unflatten(0, drawn.shape[:2])
            out.add("mlm", word_loss(logits, batch["input_ids"][pairs.study][pair, place]), pairs.study[pair])

    def _patches(self, out: PerStudy, pairs: Pairs, masked_image: Tensor, split: PatchSplit, pixels: Tensor) -> None:
        """Masked patches, their reports whole."""
        image = self.fusion.embed_image(masked_image, split.keep)
        stream = self.fusion(image, pairs.text, pairs.mask, want_text=False).image
        pair = torch.arange(len(split.hidden), device=image.device)[:, None].expand_as(split.hidden).flatten()
        place = split.hidden.flatten() + 1  # behind the global token
        target = None if pairs.full is None else pairs.full.image
        patches = self._read(out, self.image_gaussian, stream, target, pairs, pair, place, None)
        if self.patch_head is not None:
            drawn = sample(patches, self.samples, hash_keys("place", pairs.keys[pair], place), "patch")
            predicted = self.patch_head(drawn).unflatten(1, split.hidden.shape)  # [K, V, M, P]
            wanted = normalise_patches(pixels).gather(1, split.hidden[:, :, None].expand(-1, -1, pixels.shape[2]))
            out.add("mim", patch_loss(predicted, wanted), pairs.study)

    def _read(
        self,
        out: PerStudy,
        encoder: GaussianEncoder,
        stream: Tensor,
        target: Tensor | None,
        pairs: Pairs,
        pair: Tensor,
        place: Tensor,
        mask: Tensor | None,
    ) -> Gaussian:
        """Gaussians `[R, C]` of the masked tokens `pair [R]`, `place [R]` of a fused stream `[V, L, C]`.

        With a divergence, those of the first tokens too are held to what the same tokens of `target` are.
        """
        first = torch.arange(len(stream) if self.divergence is not None else 0, device=stream.device)
        study = pairs.study[torch.cat([first, pair])]
        rows = torch.cat([first, pair]) * stream.shape[1] + torch.cat([torch.zeros_like(first), place])
        gaussian: Gaussian = encoder(stream, rows, key_mask=mask)
        if self.divergence is not None:
            assert target is not None
            with torch.no_grad():
                full = encoder(target.detach(), rows, key_mask=mask)
            out.add("kl", divergence(self.divergence, gaussian, full, unit_norm=False), study)
        self._levels(out, gaussian, study)
        return Gaussian(mean=gaussian.mean[len(first) :], logvar=gaussian.logvar[len(first) :])

    def _match(
        self,
        out: PerStudy,
        streams: Streams,
        study: Tensor,
        keys: Tensor,
        *,
        matched: bool,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Loss `[n]` of n pairs, from samples of both first tokens. `counts [n]`: whose levels are added, None: all."""
        assert self.match_head is not None
        drawn = []
        for name, encoder, tokens, mask in (
            ("image", self.image_gaussian, streams.image, None),
            ("text", self.text_gaussian, streams.text, streams.text_mask),
        ):
            gaussian = encoder(tokens, key_mask=mask)
            self._levels(out, gaussian, study, counts)
            drawn.append(sample(gaussian, self.samples, keys, f"match {name}"))
        return match_loss(self.match_head(*drawn), matched)

    def _levels(self, out: PerStudy, gaussian: Gaussian, study: Tensor, counts: Tensor | None = None) -> None:
        found = {"fused_logvar": gaussian.uncertainty().detach()}
        if self.floor is not None:
            found["floor"] = variance_floor(gaussian, self.floor)
        for name, values in found.items():
            out.add(name, values if counts is None else torch.where(counts, values, torch.zeros_like(values)), study)
