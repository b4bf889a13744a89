"""Images of a split with all that downstream tasks ask of them, in memory, and what a frozen encoder makes of them.

Letters: n = images, one a study; K = labels, M = structures, S = pixels a side, D = width, h x w = patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from core.evaluation.embed import precision
from core.models.vision import VisionEncoder
from shards import keyed
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """`pixel_values [n, 1, S, S]` float32, normalised for the encoder; `labels [n, K]` int8 as in a batch.

    `masks [n, M, S, S]` bool of `structures`; `boxes`: of each image `[m, 4]` float32 (left, top, right, bottom, in
    pixels) and `box_labels [m]` int64, places in `box_names`. `groups`: attribute -> value of each image, None where
    it is not known. `skipped`: cause -> how many images or boxes were left out.
    """

    pixel_values: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    patient_key: Tensor
    masks: Tensor | None = None
    structures: tuple[str, ...] = ()
    boxes: tuple[Tensor, ...] = ()
    box_labels: tuple[Tensor, ...] = ()
    box_names: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pixel_values)

    def rows(self, chosen: Tensor) -> ImageSplit:
        """The images at these places."""
        places = chosen.tolist()
        return replace(
            self,
            pixel_values=self.pixel_values[chosen],
            labels=self.labels[chosen],
            patient_key=self.patient_key[chosen],
            masks=None if self.masks is None else self.masks[chosen],
            boxes=tuple(self.boxes[i] for i in places) if self.boxes else (),
            box_labels=tuple(self.box_labels[i] for i in places) if self.box_labels else (),
            groups={name: tuple(values[i] for i in places) for name, values in self.groups.items()},
        )

    def boxes_told(self, names: Sequence[str]) -> Tensor:
        """[n, len(names)] bool: whether an image's boxes of a label are all there is of it.

        Sets such as ChestX-ray14 draw boxes in a few images only: where a label of that name is present and no box
        shows it, nobody looked for one, and a detector that finds it is not wrong.
        """
        told = torch.ones(len(self), len(names), dtype=torch.bool)
        for column, name in enumerate(names):
            if name not in self.label_names:
                continue
            number = self.box_names.index(name) if name in self.box_names else -1
            drawn = torch.tensor([bool((labels == number).any()) for labels in self.box_labels], dtype=torch.bool)
            told[:, column] = drawn | (self.labels[:, self.label_names.index(name)] != 1)
        return told

    def need_masks(self) -> Tensor:
        """Raises ConfigError where the split was read without."""
        if self.masks is None:
            raise ConfigError("segmentation needs label maps, and this data has none of the structures; name others")
        return self.masks


def share_of_patients(split: ImageSplit, share: float, seed: int) -> Tensor:
    """Places of the images of this share of the patients, at least one; a smaller share's lie within a larger one's."""
    patients, patient = np.unique(split.patient_key.numpy(), return_inverse=True)
    order = np.argsort(keyed.uniform(seed, "transfer: share of labels", patients)[:, 0], kind="stable")
    chosen = np.zeros(len(patients), dtype=bool)
    chosen[order[: max(1, round(share * len(patients)))]] = True
    return torch.from_numpy(np.flatnonzero(chosen[patient]))


def halves_by_patient(split: ImageSplit, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of the images of `1 - share` and of `share` of the patients: for sets without a validation split."""
    held = keyed.uniform(seed, "transfer: validation patients", split.patient_key.numpy())[:, 0] < share
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


@torch.no_grad()
def _over_batches(
    split: ImageSplit, batch_size: int, device: torch.device, autocast: torch.dtype | None,
    of: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    found = []
    for pixels in split.pixel_values.split(batch_size):
        with precision(device, autocast):
            found.append(of(pixels.to(device)).cpu())
    return torch.cat(found)


def pooled_features(
    encoder: VisionEncoder, split: ImageSplit, *, batch_size: int = 64, autocast: torch.dtype | None = None
) -> Tensor:
    """`[n, D]` float32 of the frozen encoder."""
    device = encoder.patch.weight.device
    return _over_batches(split, batch_size, device, autocast, lambda x: encoder(x).pooled.float())


def patch_map(encoder: VisionEncoder, tokens: Tensor, pixel_values: Tensor) -> Tensor:
    """Patch tokens `[V, h w, D]` of all patches of `pixel_values [V, C, S, S]` -> `[V, D, h, w]`."""
    side = encoder.config.patch_size
    rows, columns = (length // side for length in pixel_values.shape[2:])
    return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)


def patch_maps(
    encoder: VisionEncoder, split: ImageSplit, *, batch_size: int = 64, autocast: torch.dtype | None = None
) -> Tensor:
    """`[n, D, h, w]` bfloat16 of the frozen encoder: half the memory, and decoders do not miss the rest."""
    device = encoder.patch.weight.device
    return _over_batches(
        split, batch_size, device, autocast,
        lambda x: patch_map(encoder, encoder(x).tokens, x).to(torch.bfloat16),
    )  # fmt: skip
