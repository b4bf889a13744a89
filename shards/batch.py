"""The words the project speaks: one study as stored (`Sample`, `StudyRecord`), one step as trained on (`Batch`).

This module holds names, shapes and units only; nothing here reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator

from shards.keyed import hash_u64

if TYPE_CHECKING:  # packing needs no torch, and each of its worker processes would spend seconds importing it
    from torch import Tensor

# Extensions that some reader would unpickle or execute; refused by name wherever a member is met.
PICKLE_EXTENSIONS = frozenset(
    {"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill", "cloudpickle", "npy", "npz"}
)
VOLUME_EXTENSION = "vol"  # a part of a volume, or of its label map: `shards.volume_codec`
IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "png", "jp2", "jph", "j2k", "tif", "tiff", "bmp", "webp", "pnm", "pgm", VOLUME_EXTENSION}
)

NOT_ANNOTATED = -2  # in `Batch["labels"]`; in JSON such a label is absent
UNCERTAIN = -1
NO_FINDING = "no finding"  # a class of its own where labels are told in classes (`shards.label_union`)

# Members of a StudyRecord that say what its report says.
_OF_REPORT = (
    "report", "anatomy", "anatomy_status", "anatomy_findings", "anatomy_impression", "entities", "distilled",
    "boilerplate", "descriptors",
)  # fmt: skip
_NO_STRUCTURE: dict[str, Any] = {"structured_report": None}

LabelValue = Literal[0, 1, -1]
Span = tuple[int, int]  # characters [start, end)


class ViewRecord(BaseModel):
    """One image or volume of a study. `id` is the part of the member name after the key: `<key>.<id>.jpg`.

    A volume of `depth` slices is stored in parts, `<key>.<id>-<part>.vol`; its axes are (z, y, x): z grows
    towards the head, y to the front, x to the patient's right.
    """

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(pattern=r"^[0-9]+$")]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    depth: Annotated[int, Field(ge=1)] | None = None  # slices of a volume; None: an image
    bits: Literal[8, 16] = 8  # of the stored pixels
    view: str | None = None  # PA, AP, LATERAL, ...
    laterality: Literal["L", "R", "B"] | None = None
    body_part: str | None = None
    spacing_mm: tuple[float, float] | tuple[float, float, float] | None = None  # (slice,) row, column
    # Stored values shown as black and white. None: 0 and the largest value of `bits`.
    window: tuple[float, float] | None = None
    window_hu: tuple[float, float] | None = None
    mask_maps: Annotated[int, Field(ge=0)] = 0  # label maps of a volume; structures that overlap lie in different ones
    # Of each structure in the label maps of a volume: z0, y0, x0, z1, y1, x1 in voxels, the ends outside.
    anatomy_boxes: dict[str, tuple[int, int, int, int, int, int]] | None = None


class Box(BaseModel):
    """A finding's box in pixels of one view: left, top, width, height."""

    model_config = ConfigDict(extra="forbid")

    view: str
    label: str
    left: float
    top: float
    width: float
    height: float

    def fault(self, height: int, width: int) -> str | None:
        """Why this cannot be a box of an image of `height` and `width` pixels; None where it can."""
        sides = (self.left, self.top, self.width, self.height)
        if not all(map(math.isfinite, sides)) or self.width <= 0 or self.height <= 0:
            return "box: empty"
        # Half a pixel: what rounding of a scaled table may do.
        right, bottom = self.left + self.width, self.top + self.height
        if min(self.left, self.top) < -0.5 or right > width + 0.5 or bottom > height + 0.5:
            return "box: outside the image"
        return None


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a report says of one word of ECAMP's list, in a sentence of its language. `spans`: where it is mentioned."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    entity: str
    status: Literal["present", "possible", "absent"]
    sentence: str
    spans: tuple[Span, ...]


class StudyRecord(BaseModel):
    """`<key>.json`: everything about a study except its pixels. Unknown members are refused, absent ones default.

    Spans count characters of the report's sections joined in alphabetical order with a line break between them.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    study: str  # keyed hash
    patient: str  # keyed hash
    language: str = "en"
    report: dict[str, str] = Field(default_factory=dict)  # section -> text
    anatomy: dict[str, str] = Field(default_factory=dict)  # anatomy -> its sentences: impression, then findings
    anatomy_status: dict[str, Literal["normal", "abnormal"]] = Field(default_factory=dict)  # absent = not mentioned
    anatomy_findings: dict[str, str] = Field(default_factory=dict)  # anatomy -> its sentences there
    anatomy_impression: dict[str, str] = Field(default_factory=dict)  # absent = not mentioned in the impression
    entities: list[dict[str, Any]] = Field(default_factory=list)
    distilled: list[Distilled] = Field(default_factory=list)
    boilerplate: list[Span] = Field(default_factory=list)  # words that every report uses alike
    descriptors: list[Span] = Field(default_factory=list)  # words right before what is mentioned
    labels: dict[str, LabelValue] = Field(default_factory=dict)  # absent = not annotated
    # Name, with its unit where it has one (kl_grade, bone_age_months) -> number; absent = not measured.
    measurements: dict[str, FiniteFloat] | None = None
    boxes: list[Box] = Field(default_factory=list)
    structured_report: dict[str, Any] | None = None
    sex: Literal["F", "M", "O"] | None = None
    age_years: Annotated[float, Field(ge=0, le=120)] | None = None
    provenance: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    deidentifier: str | None = None  # version of the tool, or the user's statement, that cleared the text
    views: list[ViewRecord] = Field(min_length=1)

    def without_report(self) -> StudyRecord:
        """The study as if it had only its labels."""
        return self.model_copy(update={name: type(getattr(self, name))() for name in _OF_REPORT} | _NO_STRUCTURE)

    def without_labels(self) -> StudyRecord:
        """The study as if nobody had annotated it."""
        return self.model_copy(update={"labels": {}, "measurements": None})

    @field_validator("distilled", "boilerplate", "descriptors")
    @classmethod
    def _spans_lie_in_the_report(cls, value: list[Any], info: ValidationInfo) -> list[Any]:
        report = info.data.get("report", {})
        length = sum(map(len, report.values())) + max(0, len(report) - 1)
        spans = [span for one in value for span in (one.spans if isinstance(one, Distilled) else (one,))]
        if not all(0 <= start < end <= length for start, end in spans):
            raise ValueError("a span lies outside of the report")
        return value


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """Encoded pixels as they go into, or come out of, a shard member. `extension` has no dot."""

    data: bytes
    extension: str


@dataclass(frozen=True, kw_only=True)
class EncodedVolume:
    """A volume, or one of its label maps, as its parts from the feet to the head."""

    parts: tuple[EncodedImage, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One study before collation. `images[i]` belongs to `record.views[i]`; `masks`: (view id, n) -> label map.

    A view with a depth is a volume, and so are its label maps. `attention`: view id -> where the report's words look in
    it (`shards.transforms.attention_grid`), as encoded.
    """

    key: str
    record: StudyRecord
    images: tuple[EncodedImage | EncodedVolume, ...]
    masks: Mapping[tuple[str, int], EncodedImage | EncodedVolume] = field(default_factory=dict)
    attention: Mapping[str, bytes] = field(default_factory=dict)
    split: str = "train"


# One step's tensors. B = studies of this rank, V = images of this rank, C = channels, K = label names of the manifest,
# L = tokens, A = anatomies of the recipe, T = patches of a volume, z slowest, x fastest. Every tensor exists for void
# slots too, zero-filled, with `valid` False.
Batch = dict[str, "Tensor"]

FIELDS: dict[str, str] = {
    "pixel_values": "[V, C, H, W] float32, volumes [V, C, D, H, W], a channel a HU window; normalised by mean and std",
    "study_index": "[V] int64, row of the study each image belongs to, non-decreasing",
    "valid": "[B] bool, False for a void slot",
    "input_ids": "[B, L] int64, padded with the tokenizer's pad id; L is the longest of the batch, at most text_length",
    "attention_mask": "[B, L] bool, False for padding",
    "report_key": "[B] int64, equal for equal texts (structured: equal answers and verdicts): positives of each other",
    "labels": f"[B, K] int8, 1 present, 0 absent, {UNCERTAIN} uncertain, {NOT_ANNOTATED} not annotated",
    "patient_key": "[B] int64, equal for studies of one patient",
    "degradation_grade": "[B] float32, how badly the image was degraded on purpose; 0: clean, -1: the record is silent",
    "uncertain_verdicts": "[B] int64, verdicts of the structured report that are uncertain; 0 without such a report",
    "sample_id": "[B] int64, position of the study (or image) in its set, the id that random choices are keyed by",
    "set_index": "[B] int64, which set of the mixture",
    "epoch": "[B] int64, epoch of that set",
    # Made only for objectives that name them; zero and False in void slots.
    "section_ids": "[B, L] int64: 1 definition, 2 appearance, 3 observation (a raw report: all), 4 verdict, 0 special",
    "text_mask": "[B, L] bool, whole words to mask and predict; about text_mask_ratio of a report's own tokens",
    "token_weight": "[B, L] float32, what the loss of a token counts; 0 for one that is not predicted",
    "cut_tokens": "[B] int64, tokens of a report that the text's length left out",
    "dropped_sentences": "[B] int64, distilled sentences of a report that their budget left out",
    "attention_grid": "[V, P] float32, where the words look in the crop, mean 1 an image; 1 where nobody knows",
    "patch_mask": "[V, P] bool, exactly round(patch_mask_ratio * P) of an image's patches, in rows from top left",
    "finding_key": "[B] int64, equal for equal sets of diseases present or uncertain; report_key where unstructured",
    "text_is_report": "[B] bool, False where the text is made of labels, or the slot is void",
    "draw_key": "[B] int64, what a model keys its own random numbers for this study and epoch by",
    "anatomy_share": "[V, A, T] float32, share of a patch's voxels that an anatomy has",
    "anatomy_intact": "[V, A] bool, in the crop, not cut by it (or mentioned, if so configured), and annotated",
    "anatomy_labels": "[V, D, H, W] uint8, 1 + the number of a voxel's anatomy, 0 for none: for pictures",
    "anatomy_input_ids": "[B, A, L] int64, what the report says of each anatomy; a template where it is silent",
    "anatomy_attention_mask": "[B, A, L] bool",
    "anatomy_text_key": "[B, A] int64, equal for equal texts",
    "anatomy_key": "[B, A] int64, 0 for a normal anatomy, else the text's key: positives of each other",
    "anatomy_state": f"[B, A] int8, 1 abnormal, 0 normal or not mentioned, {NOT_ANNOTATED} not annotated",
}


def batch_hash(batch: Batch, first_row: int = 0) -> int:
    """Which samples stand in which rows, as a number below 2^52 that adds up: the sum over ranks is the global batch's.

    `first_row`: place of this rank's first row in the global batch. It depends on set, epoch and sample id of each row,
    not on pixels or the number of ranks; replay compares it with what the run logged. Exact as a float64.
    """
    ids = [batch[name].cpu().numpy() for name in ("set_index", "epoch", "sample_id")]
    assert len(ids[0]) <= 1 << 20, "the sum of more rows may not fit a float64"
    hashes = hash_u64(0, "batch row", first_row + np.arange(len(ids[0])), *ids) & np.uint64(0xFFFFFFFF)
    return int(hashes.sum())
