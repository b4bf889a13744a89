"""Detection from a transferred encoder: an FCOS head (arXiv 1904.01355) on a pyramid of its patch map, COCO's mAP.

The pyramid is a simple one of plain ViTs (after ViTDet, arXiv 2203.16527): the last map at twice, once and half its
resolution. Average precision is accumulated over all images, those without a box included, so that false alarms on
normal images count (ecamp.md, 9.8); a label that is present in an image where nobody drew it is asked in neither
teaching nor scoring.

Letters: b = images, G = boxes of an image, Q = labels, P = places of all levels, D = width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.evaluation.embed import precision
from core.evaluation.fitting import FitConfig, drawn, fit
from core.evaluation.images import ImageSplit, patch_map
from core.models.vision import VisionEncoder
from shards.errors import ConfigError

SCALES = (2.0, 1.0, 0.5)  # of the patch map
CENTRE = 1.5  # strides around a box's centre within which a place answers for it


class FcosHead(nn.Module):
    """Two towers of convolutions that all levels share, for classes and for boxes."""

    def __init__(self, encoder: VisionEncoder.Config, labels: int, width: int = 128) -> None:
        super().__init__()
        self.patch_size = encoder.patch_size
        self.inputs = nn.ModuleList(nn.Conv2d(encoder.width, width, 1) for _ in SCALES)
        self.classes, self.sides = self._tower(width), self._tower(width)
        self.label = nn.Conv2d(width, labels, 3, padding=1)
        self.side = nn.Conv2d(width, 4, 3, padding=1)
        self.centre = nn.Conv2d(width, 1, 3, padding=1)
        assert self.label.bias is not None
        nn.init.constant_(self.label.bias, -4.595)  # a place holds a finding in 1 of 100: the focal loss starts small

    @staticmethod
    def _tower(width: int) -> nn.Sequential:
        layers = [[nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()] for _ in range(2)]
        return nn.Sequential(*(layer for group in layers for layer in group))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`[b, D, h, w]` -> classes `[b, P, Q]`, sides `[b, P, 4]` in pixels, centre-ness `[b, P]` of all places.

        Then of each place its (x, y) in pixels `[P, 2]` and its stride `[P]`.
        """
        found: list[tuple[Tensor, ...]] = []
        for scale, inputs in zip(SCALES, self.inputs, strict=True):
            level = inputs(F.interpolate(tokens, scale_factor=scale, mode="bilinear", align_corners=False))
            of_class, of_side = self.classes(level), self.sides(level)
            stride = self.patch_size / scale
            rows, columns = (torch.arange(n, device=tokens.device) + 0.5 for n in level.shape[2:])
            at = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 2) * stride
            found.append((
                self.label(of_class).flatten(2).transpose(1, 2),
                F.softplus(self.side(of_side)).flatten(2).transpose(1, 2) * stride,
                self.centre(of_side).flatten(1),
                at, torch.full((len(at),), stride, device=tokens.device),
            ))  # fmt: skip
        levels = list(zip(*found, strict=True))
        classes, sides, centre = (torch.cat(level, 1) for level in levels[:3])
        return classes, sides, centre, torch.cat(levels[3]), torch.cat(levels[4])


def assign(at: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Which box each place answers for `[P]`, -1 for none: the smallest whose centre region and extent hold it.

    A level answers for boxes of its own sizes: the longest reach from the place is 2 to 4 strides, open at both ends
    of the pyramid.
    """
    if not len(boxes):
        return torch.full((len(at),), -1, dtype=torch.int64, device=at.device)
    sides = _sides(at[:, None], boxes[None])  # [P, G, 4]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = ((at[:, None] - middle[None]).abs() <= CENTRE * strides[:, None, None]).all(-1)
    reach = sides.max(-1).values / strides[:, None]
    low = torch.where(strides == strides.min(), 0.0, 2.0)[:, None]
    high = torch.where(strides == strides.max(), torch.inf, 4.0)[:, None]
    fits = near & (sides.min(-1).values > 0) & (reach >= low) & (reach < high)
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[None].expand(len(at), -1)
    smallest, which = torch.where(fits, area, torch.inf).min(1)
    return torch.where(smallest.isfinite(), which, -1)


def _sides(at: Tensor, boxes: Tensor) -> Tensor:
    """Distances from places (x, y) to the left, top, right and bottom of boxes."""
    return torch.cat([at - boxes[..., :2], boxes[..., 2:] - at], dim=-1)


def detection_loss(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    told: Tensor,
) -> Tensor:
    """Focal loss of classes, 1 - IoU of boxes weighted by centre-ness, cross-entropy of centre-ness; per positive.

    `told [b, Q]`: classes whose boxes an image has all; the others are not asked (`ImageSplit.boxes_told`).
    """
    classes, sides, centre, at, strides = outputs
    total, positives = classes.new_zeros(()), 0
    for image, (truth, names) in enumerate(zip(boxes, labels, strict=True)):
        which = assign(at, strides, truth)
        taken = which >= 0
        target = torch.zeros_like(classes[image])
        if taken.any():
            target[taken, names[which[taken]]] = 1.0
            wanted = _sides(at[taken], truth[which[taken]])
            across, down = wanted[:, [0, 2]], wanted[:, [1, 3]]
            central = ((across.min(1).values / across.max(1).values) * (down.min(1).values / down.max(1).values)).sqrt()
            overlap = _overlap_of_sides(sides[image][taken], wanted)
            total = total + ((1 - overlap) * central).sum()
            total = total + F.binary_cross_entropy_with_logits(centre[image][taken], central, reduction="sum")
            positives += int(taken.sum())
        total = total + (_focal(classes[image], target) * told[image]).sum()
    return total / max(1, positives)


def _overlap_of_sides(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes around the same place, given by their sides `[n, 4]`."""
    inner = torch.minimum(first, second)
    both = (inner[:, 0] + inner[:, 2]) * (inner[:, 1] + inner[:, 3])
    areas = [(one[:, 0] + one[:, 2]) * (one[:, 1] + one[:, 3]) for one in (first, second)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-6)


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = torch.where(target > 0, 0.25, 0.75)
    return weight * (1 - torch.exp(-cross)) ** 2 * cross


def keep_best(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Greedy non-maximum suppression: places of `boxes [n, 4]` kept, best first; overlaps above `overlap` go."""
    order = scores.argsort(descending=True)
    corners = boxes[order]
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    inner = torch.minimum(corners[:, None, 2:], corners[None, :, 2:]) - torch.maximum(
        corners[:, None, :2], corners[None, :, :2]
    )
    both = inner.clamp(min=0).prod(-1)
    close = both / (area[:, None] + area[None] - both).clamp(min=1e-6) > overlap
    kept = torch.ones(len(order), dtype=torch.bool)
    for place in range(len(order)):
        if kept[place]:
            kept[place + 1 :] &= ~close[place, place + 1 :]
    return order[kept]


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Of one image: `boxes [n, 4]` in pixels, `scores [n]`, `labels [n]`, best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def decode(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], size: int, *, most: int = 100, overlap: float = 0.5
) -> list[Detections]:
    """The best boxes of each image, label by label; `size`: pixels a side, to which they are cut."""
    classes, sides, centre, at, _ = (value.detach().float().cpu() for value in outputs)
    chance = (torch.sigmoid(classes) * torch.sigmoid(centre)[..., None]).sqrt()
    found = []
    for scores, reach in zip(chance, sides, strict=True):
        corners = torch.cat([at - reach[:, :2], at + reach[:, 2:]], dim=1).clamp(0, size)
        parts = []
        for label in range(scores.shape[1]):
            best = scores[:, label].topk(min(300, len(scores))).indices
            kept = best[keep_best(corners[best], scores[best, label], overlap)]
            parts.append((corners[kept], scores[kept, label], torch.full((len(kept),), label)))
        boxes, each, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        order = each.argsort(descending=True)[:most]
        found.append(Detections(boxes=boxes[order], scores=each[order], labels=labels[order]))
    return found


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """`fine_tune`: the encoder learns, too."""

    fine_tune: bool = False
    fit: FitConfig = field(default_factory=lambda: FitConfig(batch_size=16))


def detect(
    encoder: VisionEncoder,
    train: ImageSplit,
    test: ImageSplit,
    config: DetectionConfig,
    *,
    rows: Tensor | None = None,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Detections]:
    """Boxes in the test images after a head was taught with `train`, or its `rows` only; `encoder` is not changed.

    Labels are those of `train.box_names`. Raises ConfigError where it has no box.
    """
    if rows is not None:
        train = train.rows(rows)
    if not sum(map(len, train.boxes)):
        raise ConfigError("detection needs boxes, and the training images have none that can be used")
    device = encoder.patch.weight.device
    learner = copy.deepcopy(encoder).requires_grad_(True) if config.fine_tune else None
    model = learner or encoder
    told = train.boxes_told(train.box_names)
    head = drawn(lambda: FcosHead(encoder.config, len(train.box_names)), config.fit.seed).to(device)

    def outputs_of(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch.set_grad_enabled(learner is not None and torch.is_grad_enabled()), precision(device, autocast):
            tokens = model(pixels.to(device)).tokens
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = head(patch_map(encoder, tokens, pixels).float())
        return found

    def loss_of(at: Tensor) -> Tensor:
        places = at.tolist()
        return detection_loss(
            outputs_of(train.pixel_values[at]),
            [train.boxes[i].to(device) for i in places],
            [train.box_labels[i].to(device) for i in places],
            told[at].to(device),
        )

    fit(head, learner, len(train), loss_of, config.fit, on_step)
    size = test.pixel_values.shape[-1]
    with torch.no_grad():
        return [one for pixels in test.pixel_values.split(32) for one in decode(outputs_of(pixels), size)]


class AveragePrecision:
    """COCO's mAP of detections, under whole weights of images: what `core.evaluation.comparison` resamples.

    Boxes are matched once per image by pycocotools; a replicate only accumulates the images it drew, each as often as
    it was drawn. Truth whose name is not among the detector's `names` is left out: it could not be taught.
    """

    def __init__(self, found: Sequence[Detections], test: ImageSplit, names: Sequence[str]) -> None:
        """Raises ConfigError where pycocotools is not installed."""
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ModuleNotFoundError:
            raise ConfigError("detection is measured by pycocotools; pip install pycocotools") from None
        numbers = {name: number for number, name in enumerate(names, start=1)}
        truth: list[dict[str, Any]] = []
        for image, (corners, labels) in enumerate(zip(test.boxes, test.box_labels, strict=True)):
            for sides, label in zip(corners.tolist(), labels.tolist(), strict=True):
                if test.box_names[label] in numbers:
                    truth.append(_annotation(len(truth) + 1, image, numbers[test.box_names[label]], sides))
        detected = [
            {**_annotation(0, image, label + 1, sides), "score": score}
            for image, one in enumerate(found)
            for sides, score, label in zip(
                one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True
            )
        ]  # fmt: skip
        with redirect_stdout(StringIO()):  # it prints its progress
            coco = COCO()
            coco.dataset = {
                "images": [{"id": image} for image in range(len(found))], "annotations": truth,
                "categories": [{"id": number, "name": name} for name, number in numbers.items()], "info": {},
            }  # fmt: skip
            coco.createIndex()
            results = coco.loadRes(detected) if detected else COCO()
            self._evaluation = COCOeval(coco, results, "bbox")
            self._evaluation.params.areaRng = self._evaluation.params.areaRng[:1]
            self._evaluation.params.areaRngLbl = ["all"]
            self._evaluation.evaluate()
        self._of_image = np.array(self._evaluation.evalImgs, dtype=object).reshape(len(names), len(found))
        # None is how pycocotools has an image that a label is not counted in.
        self._of_image[~test.boxes_told(names).numpy().T] = None

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """`[n, r]` -> mAP `[r]` over IoU 0.50 to 0.95, NaN where no truth was drawn."""
        return np.array([self._map(np.repeat(np.arange(len(column)), column.astype(int))) for column in weights.T])

    def _map(self, drawn_images: np.ndarray) -> float:
        evaluation = self._evaluation
        evaluation.evalImgs = list(self._of_image[:, drawn_images].ravel())
        evaluation.params.imgIds = list(range(len(drawn_images)))
        evaluation._paramsEval = copy.copy(evaluation.params)
        with redirect_stdout(StringIO()):
            evaluation.accumulate()
        precisions = evaluation.eval["precision"][..., -1]  # [thresholds, recalls, labels, areas], most detections
        known = precisions > -1
        return float(precisions[known].mean()) if known.any() else float("nan")


def not_asked(test: ImageSplit, names: Sequence[str]) -> dict[str, int]:
    """What of the truth is in no figure of a detector of `names`, by cause."""
    untaught = sum(int(test.box_names[label] not in names) for labels in test.box_labels for label in labels.tolist())
    return {
        "box: of a label that was not taught": untaught,
        "label: present, and no box drawn": int((~test.boxes_told(names)).sum()),
    }


def _annotation(number: int, image: int, label: int, sides: Sequence[float]) -> dict[str, Any]:
    left, top, right, bottom = sides
    width, height = right - left, bottom - top
    return {
        "id": number, "image_id": image, "category_id": label, "bbox": [left, top, width, height],
        "area": width * height, "iscrowd": 0,
    }  # fmt: skip
