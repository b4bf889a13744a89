"""Boxes and how they are scored; encoders compared on the same patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from core.evaluation.augmentation import moved
from core.evaluation.comparison import Areas, Means, by_subgroup, compare
from core.evaluation.detection import (
    AveragePrecision,
    DetectionConfig,
    Detections,
    FcosHead,
    assign,
    decode,
    detect,
    detection_loss,
    keep_best,
    not_asked,
)
from core.evaluation.fitting import FitConfig, fit, lr_factor, row_batches
from core.evaluation.images import ImageSplit
from core.models.initialise import draw_weights
from core.models.vision import VisionEncoder

CONFIG = VisionEncoder.Config(image_size=32, patch_size=8, width=32, depth=1, heads=2)


def of_one_label(boxes: torch.Tensor, score: float) -> Detections:
    return Detections(
        boxes=boxes, scores=torch.full((len(boxes),), score), labels=torch.zeros(len(boxes), dtype=torch.int64)
    )


def squares(count: int, seed: int) -> ImageSplit:
    """Dark images; two of three hold one bright square of 8 to 15 pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 1, 32, 32, generator=generator) * 0.1
    boxes = []
    for image in range(count):
        side, left, top = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((8, 16), (0, 16), (0, 16))
        )
        if image % 3 == 0:
            boxes.append(torch.zeros(0, 4))
            continue
        pixels[image, 0, top : top + side, left : left + side] += 2
        boxes.append(torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32))
    return ImageSplit(
        pixel_values=pixels, labels=torch.zeros(count, 0, dtype=torch.int8), label_names=(),
        patient_key=torch.arange(count), boxes=tuple(boxes),
        box_labels=tuple(torch.zeros(len(one), dtype=torch.int64) for one in boxes), box_names=("opacity",),
    )  # fmt: skip


def test_places_answer_for_the_smallest_box_that_holds_them() -> None:
    at, strides = torch.tensor([[12.0, 12.0], [4.0, 28.0]]), torch.tensor([8.0, 8.0])
    boxes = torch.tensor([[0.0, 0.0, 28.0, 28.0], [8.0, 8.0, 16.0, 16.0]])
    assert assign(at, strides, boxes).tolist() == [1, -1]
    assert assign(at, strides, boxes[:0]).tolist() == [-1, -1]


def test_overlapping_boxes_go_and_the_best_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [20.0, 20, 30, 30]])
    assert keep_best(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]


def test_decoded_boxes_lie_in_the_image() -> None:
    head = FcosHead(CONFIG, 2)
    for one in decode(head(torch.randn(3, 32, 4, 4)), 32):
        assert (one.boxes >= 0).all() and (one.boxes <= 32).all() and len(one.scores) <= 100
        assert (one.scores[:-1] >= one.scores[1:]).all() and set(one.labels.tolist()) <= {0, 1}


def test_average_precision_is_of_all_images() -> None:
    pytest.importorskip("pycocotools")
    test = squares(9, seed=1)
    ones = np.ones((9, 1))
    right = [of_one_label(boxes, 0.9) for boxes in test.boxes]
    assert AveragePrecision(right, test, test.box_names)(ones) == pytest.approx([1.0])
    alarm = of_one_label(torch.tensor([[1.0, 1.0, 9.0, 9.0]]), 0.95)
    wrong = [alarm, *right[1:]]  # on an image without a box: a surer false alarm than every hit
    measured = AveragePrecision(wrong, test, test.box_names)
    assert measured(ones)[0] == pytest.approx(6 / 7, abs=0.02)
    without = np.ones((9, 2))
    without[0, 0] = 0
    without[1, 1] = 3
    assert measured(without)[0] == pytest.approx(1.0)
    assert measured(without)[1] == pytest.approx(8 / 9, abs=0.02)
    none = [of_one_label(torch.zeros(0, 4), 0.0)] * 9
    assert AveragePrecision(none, test, test.box_names)(ones) == pytest.approx([0.0])


def test_what_nobody_drew_is_not_asked() -> None:
    """Image 0 has the finding and no box; image 3 has neither."""
    pytest.importorskip("pycocotools")
    labels = torch.tensor([[1], [1], [1], [0], [1], [1], [0], [1], [1]], dtype=torch.int8)
    test = replace(squares(9, seed=1), labels=labels, label_names=("opacity",))
    told = test.boxes_told(("opacity", "mass"))
    assert told[:, 0].tolist() == [False] + [True] * 8 and told[:, 1].all()
    alarm = of_one_label(torch.tensor([[1.0, 1.0, 9.0, 9.0]]), 0.95)
    right = [of_one_label(boxes, 0.9) for boxes in test.boxes]
    ones = np.ones((9, 1))
    assert AveragePrecision([alarm, *right[1:]], test, ("opacity",))(ones) == pytest.approx([1.0])
    assert AveragePrecision([*right[:3], alarm, *right[4:]], test, ("opacity",))(ones)[0] < 0.9
    assert not_asked(test, ("opacity",)) == {
        "box: of a label that was not taught": 0, "label: present, and no box drawn": 1,
    }  # fmt: skip
    assert not_asked(test, ("mass",))["box: of a label that was not taught"] == 6
    outputs = FcosHead(CONFIG, 1)(torch.randn(2, 32, 4, 4))
    boxes, names = (test.boxes[0], test.boxes[1]), (test.box_labels[0], test.box_labels[1])
    losses = [detection_loss(outputs, boxes, names, torch.tensor([[one], [True]])) for one in (True, False)]
    assert losses[1] < losses[0]
    gradient = torch.autograd.grad(losses[1], outputs[0])[0]
    assert not gradient[0].any() and gradient[1].any()


@pytest.mark.slow
def test_a_head_learns_to_find_squares() -> None:
    pytest.importorskip("pycocotools")
    encoder = VisionEncoder(CONFIG)
    draw_weights(encoder, 0)
    encoder.eval().requires_grad_(False)
    train, test = squares(96, seed=2), squares(30, seed=3)
    config = FitConfig(steps=300, batch_size=16, lr=3e-3, encoder_lr=3e-4)
    ones = np.ones((30, 1))
    for fine_tune in (False, True):
        found = detect(encoder, train, test, DetectionConfig(fine_tune=fine_tune, fit=config))
        assert AveragePrecision(found, test, train.box_names)(ones)[0] > 0.2


def test_differences_are_paired_and_subgroups_counted() -> None:
    rng = np.random.default_rng(0)
    truth = np.stack([np.arange(200) % 2, np.full(200, -2)], axis=1)
    patients = np.arange(200) // 2
    noise = rng.normal(size=(200, 1))
    weak, strong = (gain * truth[:, :1] + noise for gain in (0.5, 1.0))
    both = {
        name: Areas(scores=[np.hstack([one, one])], truth=truth, patient_key=patients)
        for name, one in (("weak", weak), ("strong", strong))
    }
    found = compare(both, patients, replicates=300)
    assert found is not None and found.reference == "weak"
    difference, p = found.differences["strong"]
    assert difference.value == pytest.approx(found.figures["strong"].value - found.figures["weak"].value)
    # Paired: far narrower than what either figure alone is sure of.
    alone = found.figures["weak"]
    assert 0 < difference.low and difference.high - difference.low < 0.7 * (alone.high - alone.low) and p < 0.01
    same = compare({"a": both["weak"], "b": both["weak"]}, patients, replicates=100)
    assert same is not None and same.differences["b"][1] == 1.0
    sexes = ["F" if i < 100 else "M" if i < 196 else None for i in range(200)]
    groups = by_subgroup(both, patients, {"sex": sexes, "view": ["PA"] * 200}, replicates=50)
    assert set(groups) == {"sex"} and {name: one["studies"] for name, one in groups["sex"].items()} == {
        "F": 100, "M": 96, "unknown": 4,
    }  # fmt: skip
    assert groups["sex"]["unknown"]["comparison"] is None and groups["sex"]["F"]["comparison"] is not None
    unlabelled = Areas(scores=[weak], truth=np.full((200, 1), -2), patient_key=patients)
    assert compare({"a": unlabelled}, patients) is None
    means = compare({"a": Means(values=[np.full(200, 0.25), np.full(200, 0.75)])}, patients, replicates=20)
    assert means is not None and means.figures["a"].value == means.figures["a"].low == pytest.approx(0.5)


def test_order_of_images_is_keyed_and_every_epoch_whole() -> None:
    config = FitConfig(steps=5, batch_size=4, seed=3)
    rows = torch.cat(list(row_batches(10, config)))
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert torch.equal(rows, torch.cat(list(row_batches(10, config))))
    assert [len(batch) for batch in row_batches(3, config)] == [3] * 5
    assert lr_factor(0, FitConfig(steps=100)) == pytest.approx(0.1) and lr_factor(99, FitConfig(steps=100)) < 0.01


def test_the_best_weights_on_the_way_stay() -> None:
    """The one weight goes from 0 towards 10 as steps go on; a judge that wants 3 gets the nearest that it was shown."""
    config = FitConfig(steps=20, batch_size=1, lr=1.0, weight_decay=0.0, judged=10)

    def fitted(judge: Callable[[torch.Tensor], float] | None) -> tuple[float, list[float]]:
        head, shown = nn.Linear(1, 1, bias=False), []
        nn.init.zeros_(head.weight)

        def judged() -> float:
            assert judge is not None and not head.training
            shown.append(float(head.weight))
            return judge(head.weight)

        fit(head, None, 4, lambda rows: (10 - head.weight).square().sum(), config, judge=judged if judge else None)
        return head.weight.item(), shown

    last, _ = fitted(None)
    wanted, shown = fitted(lambda weight: -abs(float(weight) - 3))
    assert len(shown) == 10 and wanted == min(shown, key=lambda weight: abs(weight - 3)) != last
    assert fitted(lambda weight: float("nan"))[0] == fitted(lambda weight: 0.5)[0] == last


def test_moved_images_are_keyed_and_stay_nearly_where_they_were() -> None:
    pixels = torch.zeros(64, 1, 32, 32)
    pixels[:, :, 10:20, 3:9] = 1.0  # on the left
    pixels += 0.01 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    ids = list(range(64))
    found = moved(pixels, 1, 0, ids)
    assert torch.equal(found, moved(pixels, 1, 0, ids)) and torch.equal(found[5:9], moved(pixels[5:9], 1, 0, ids[5:9]))
    for other in (moved(pixels, 2, 0, ids), moved(pixels, 1, 1, ids)):
        assert (other != found).flatten(1).any(1).all()
    bright = (found > 0.5).float()
    columns = (bright.sum((1, 2)) * torch.arange(32)).sum(1) / bright.sum((1, 2, 3))
    assert columns.std() > 0.3 and (columns - 5.5).abs().max() < 3.5
    assert (found.mean((1, 2, 3)) - pixels.mean((1, 2, 3))).abs().max() < 0.05
