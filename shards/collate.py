"""Members of the rows of a batch to the tensors of `shards.batch.FIELDS`; what cannot be used becomes a void slot.

`Collator.prepare` makes everything but the pixels, `submit` starts the decoder, `finish` waits for it and joins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from shards import keyed
from shards.anatomy_crops import crops_of_study
from shards.batch import NOT_ANNOTATED, Batch, LabelValue, StudyRecord, ViewRecord
from shards.dataset import DataSet, Found, Members, View, read_units
from shards.decode import Decoder, PendingBatch
from shards.decode_volume import Crop, VolumeBatch, VolumeDecoder, place_crop
from shards.errors import BadSampleError, ConfigError, DataError
from shards.label_union import table_of
from shards.manifest import Manifest
from shards.order import Slots
from shards.reports.structured import (
    OBSERVATION,
    Part,
    StructuredReport,
    answers,
    finding_key,
    parse,
    serialise,
)
from shards.tokenizer import EmptyReportError, Tokenizer, report_text
from shards.transforms import attention_grid, augment, label_text, report_sentences
from shards.transforms.anatomy import ABNORMAL, AnatomyTexts, Sides, anatomy_texts, plain_name, text_keys
from shards.transforms.augment import ViewParameters
from shards.transforms.entity_masking import MarkedReport, build_mlm, mark_report, tokenise
from shards.transforms.masking import draw_key, draw_patches, draw_text, patches_of
from shards.volume_codec import part_count

if TYPE_CHECKING:
    from shards.loader import Loader

KNOWN_ABSENT_AMONG = 16  # so many present labels beside no absent one are no chance
TOKENS_PER_DISEASE = 16  # below this a structured report's verdict could be cut off

ZERO_IN_VOID = frozenset(
    {"report_key", "patient_key", "uncertain_verdicts", "finding_key", "draw_key", "text_is_report"}
)

# Why nothing of a study counts in an objective by anatomy.
NONE_THERE = "no anatomy in the crop"
ALL_CUT = "all anatomies cut by the crop"
TELLS_OF_NONE = "report without any anatomy in the crop"
ENTITY_FIELDS = frozenset({"token_weight", "cut_tokens", "dropped_sentences"})

VOLUME_FIELDS = frozenset({"anatomy_share", "anatomy_intact", "anatomy_labels"})
ANATOMY_TEXT_FIELDS = frozenset(
    {"anatomy_input_ids", "anatomy_attention_mask", "anatomy_text_key", "anatomy_key", "anatomy_state"}
)

Place = Callable[[], tuple[str, str]]  # (shard, key) of a row, looked up only when it is to be logged


@dataclass(kw_only=True)
class Prepared:
    """Rows of a batch before decoding; `images` of row i are those with study_index i."""

    step: int
    images: list[memoryview]
    crops: list[Crop | None]  # of volumes, in place of images; None in a void slot
    study_index: list[int]
    window: list[tuple[float, float]]
    bits: list[int]
    view: list[int]
    grids: list[np.ndarray | None]  # attention grid of each image, over all of it
    columns: dict[str, np.ndarray]
    parts: list[list[Part]]  # of each row's text, none in a void slot
    marked: list[MarkedReport | None]  # of each row where words are masked by what they are, None in a void slot
    anatomy: list[AnatomyTexts | None]  # of each row where anatomy fields are made, None in a void slot
    places: list[Place]
    train: bool

    @property
    def sample_key(self) -> np.ndarray:
        """[B] int64: unit 7 of one set and unit 7 of another are different samples."""
        return _sample_key(self.columns["sample_id"], self.columns["set_index"])


class _Text(NamedTuple):
    """The parts of the text of a study that is read, and the key that equal ones share."""

    parts: list[Part]
    key: int
    is_report: bool = True


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A batch in the decoder; `present` [n] are the images that were given to it, of `study_index` [V]."""

    prepared: Prepared
    pending: PendingBatch
    present: np.ndarray
    study_index: np.ndarray
    parameters: ViewParameters | None = None  # [V], of images


def check_masks(config: Loader.Config, fields: Collection[str], url: str, manifest: Manifest) -> None:
    """Raises ConfigError where a set lacks the label maps that the fields need."""
    if config.volume is None or VOLUME_FIELDS.isdisjoint(fields):
        return
    known = {plain_name(name) for name in manifest.masks}
    missing = [name for name in config.volume.anatomies if plain_name(name) not in known]
    if missing:
        raise ConfigError(
            f"{url}: its label maps do not know {', '.join(missing)}, which data.volume.anatomies names; "
            f"there is {', '.join(sorted(known)) or 'none'}"
        )


def check_labels(config: label_text.Config, data: DataSet) -> None:
    """Raises ConfigError where the labels of a set cannot be told in classes, or teach wrong agreement.

    A set that notes findings only where they are present does not say which it has asked for: studies would agree in
    whatever they share. Its first studies tell.
    """
    if data.reads == "report" or not data.whole.labels:
        if data.reads == "labels":
            raise ConfigError(f"{data.url}: reads=labels, but the set has none; leave it out")
        return
    try:
        table_of(data.whole.labels, config.names)
    except ConfigError as error:
        raise ConfigError(f"{data.url}: {error}") from None
    values = Counter(value for record in _first_records(data) for value in record.labels.values())
    if values[1] >= KNOWN_ABSENT_AMONG and not values[0]:
        raise ConfigError(
            f"{data.url}: among its first studies {values[1]} labels are present and none is absent, so the set does "
            "not tell what was asked for from what was not; pack it with the names of all labels that it annotates, or "
            "read its reports alone with reads=report"
        )


def _first_records(data: DataSet) -> Iterator[StudyRecord]:
    """Of the first chunk, as far as they can be read."""
    views = (lambda unit, count: [0]) if data.manifest.adopted else (lambda unit, count: [])
    units = range(int(data.table.first_unit[0]), int(data.table.first_unit[0] + data.table.units[0]))
    for found in read_units(data, 0, units, views).values():
        if isinstance(found, Members):
            with suppress(DataError):  # counted when training meets it
                yield found.record(data.manifest.adopted)


class Collator:
    """Rows to tensors: JSON, text, view metadata, then one call of the decoder."""

    def __init__(
        self,
        config: Loader.Config,
        tokenizer: Tokenizer | None,
        labels: Sequence[str],
        seed: int,
        fields: Sequence[str] = (),
        *,
        around_anatomies: Sides | None = None,
    ):
        """`fields`: of `shards.batch.FIELDS`; the optional ones are made only if named.

        `around_anatomies`: volumes that are not for training are cropped so that every anatomy is seen whole
        (`shards.anatomy_crops`), several views a volume if need be, and whatever their report says of it; the value is
        the encoder's patch. Studies may differ in the size of their crops: batches are then of one study. None: they
        are cropped at their centre.

        Raises ConfigError where configuration or tokenizer cannot give them.
        """
        self.config, self.tokenizer, self.seed, self.fields = config, tokenizer, seed, frozenset(fields)
        self.around_anatomies = around_anatomies
        self.labels = {name: column for column, name in enumerate(labels)}
        self._decoder: Decoder | None = None
        self._volume_decoder: VolumeDecoder | None = None
        self.reads_masks = config.volume is not None and not VOLUME_FIELDS.isdisjoint(self.fields)
        self.reads_grids = "attention_grid" in self.fields and config.volume is None
        self._reads_anatomies = config.volume is not None and not ANATOMY_TEXT_FIELDS.isdisjoint(self.fields)
        wanted = (VOLUME_FIELDS | ANATOMY_TEXT_FIELDS) & self.fields
        if wanted and (config.volume is None or not config.volume.anatomies):
            raise ConfigError(
                f"{', '.join(sorted(wanted))}: data.volume.anatomies is empty; name some of the manifest's"
            )
        by_patch = not {"patch_mask", "attention_grid"}.isdisjoint(self.fields)
        self._patches = patches_of(config.masking, config.decode.image_size) if by_patch else 0
        self._reads_report = tokenizer is not None and not (self._reads_anatomies and "input_ids" not in self.fields)
        self._reads_structure = tokenizer is not None and config.report == "structured"
        self._reads_entities = tokenizer is not None and not ENTITY_FIELDS.isdisjoint(self.fields)
        if self._reads_entities:
            config.entity_masking.check_room(config.text_length)
            if self._reads_structure:
                raise ConfigError("words are masked by what they are in reports as written; set data.report=raw")
        if config.report not in ("raw", "structured"):
            raise ConfigError(f"data.report={config.report!r}: use raw or structured")
        if self._reads_structure and config.text_length < TOKENS_PER_DISEASE * config.structured.diseases:
            raise ConfigError(
                f"data.text_length={config.text_length} is too short for structured reports of "
                f"{config.structured.diseases} diseases; use {TOKENS_PER_DISEASE * config.structured.diseases} or more"
            )
        if config.sentences.changes and (self._reads_structure or self._reads_entities or self._reads_anatomies):
            raise ConfigError(
                "data.sentences changes whole reports, and this task reads parts or places of them; set "
                "data.sentences.shuffle=false and data.sentences.drop=0"
            )
        if self._reads_structure and config.label_text is not None:
            raise ConfigError("data.label_text makes texts beside raw reports; set data.report=raw")
        if "text_is_report" in self.fields and config.label_text is None:
            raise ConfigError("data.label_text is not set, which the task reads; the recipes chest:umcl_... do")
        if "text_mask" in self.fields and (tokenizer is None or tokenizer.mask_id is None):
            raise ConfigError(
                "masked text needs a tokenizer with a mask token, and this one names none; "
                "name it in tokenizer_config.json, or let the run train its own"
            )
        if "text_mask" in self.fields and tokenizer is not None and not tokenizer.prefix:
            raise ConfigError(
                "masked text needs a tokenizer that puts a token before every text, since the first one stands for "
                "the whole and is never masked; give it a post-processor that does, or let the run train its own"
            )

    @property
    def volume_decoder(self) -> VolumeDecoder:
        if self._volume_decoder is None:
            assert self.config.volume is not None
            self._volume_decoder = VolumeDecoder(self.config.volume)
        return self._volume_decoder

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:  # DALI takes a second to build, and describing a batch needs none
            self._decoder = Decoder(self.config.decode)
        return self._decoder

    def prepare(
        self,
        step: int,
        slots: Slots,
        found: Sequence[Found],
        places: list[Place],
        adopted: Sequence[bool],
        on_void: Callable[[int, str], None],
        *,
        train: bool,
    ) -> Prepared:
        """Everything but the pixels. `on_void(row, cause)` is told of each row that cannot be used."""
        count = len(slots)
        sample_key = _sample_key(slots.unit, slots.set_index)
        columns = {
            "valid": np.zeros(count, dtype=bool),
            "labels": np.full((count, len(self.labels)), NOT_ANNOTATED, dtype=np.int8),
            "report_key": np.zeros(count, dtype=np.int64),
            "patient_key": np.zeros(count, dtype=np.int64),
            "degradation_grade": np.full(count, -1.0, dtype=np.float32),
            "uncertain_verdicts": np.zeros(count, dtype=np.int64),
            "sample_id": slots.unit,
            "set_index": slots.set_index,
            "epoch": slots.epoch,
        }
        if "finding_key" in self.fields:
            columns["finding_key"] = np.zeros(count, dtype=np.int64)
        if "text_is_report" in self.fields:
            columns["text_is_report"] = np.zeros(count, dtype=bool)
        if "draw_key" in self.fields:
            columns["draw_key"] = draw_key(self.seed, slots.epoch, sample_key)
        result = Prepared(
            step=step, images=[], crops=[], study_index=[], window=[], bits=[], view=[], grids=[], columns=columns,
            parts=[[] for _ in range(count)], marked=[None] * count, anatomy=[None] * count, places=places, train=train,
        )  # fmt: skip
        for i, members in enumerate(found):
            try:
                if isinstance(members, BadSampleError):
                    raise members
                record = members.record(adopted[i])
                structure = self._structure(record)
                key = (self.seed, int(slots.epoch[i]), int(sample_key[i])) if train else None
                labels = self._labels(record, members)
                text = self._text(record, structure, labels, key)
                marked = mark_report(record, self.config.sections) if self._reads_entities else None
                views = _view_records(record, members)
                grids = [_attention_grid(chosen) for chosen in members.views]
                crops = self._crops(members, views, (int(slots.epoch[i]), int(sample_key[i])) if train else None)
            except (BadSampleError, EmptyReportError) as error:
                on_void(i, error.cause if isinstance(error, BadSampleError) else "empty report")
                self._add_image(result, i, 0, memoryview(b""), (0.0, 1.0), 8)
                result.grids.append(None)
                result.crops.append(None)
                continue
            columns["valid"][i] = True
            columns["patient_key"][i] = keyed.text_key(record.patient)
            columns["report_key"][i] = text.key
            columns["degradation_grade"][i] = _degradation_grade(record)
            columns["uncertain_verdicts"][i] = _uncertain_verdicts(record)
            result.parts[i], result.marked[i] = text.parts, marked
            if "text_is_report" in columns:
                columns["text_is_report"][i] = text.is_report
            if "finding_key" in columns:
                columns["finding_key"][i] = finding_key(structure) if structure is not None else text.key
            for name, value in labels.items():
                if name in self.labels:
                    columns["labels"][i, self.labels[name]] = value
            if self._reads_anatomies or self.reads_masks:
                assert self.config.volume is not None
                result.anatomy[i] = anatomy_texts(record, self.config.volume.anatomies)
            result.grids += grids
            for view, chosen, crops_of_view in zip(views, members.views, crops, strict=True):
                window = view.window or (0.0, 255.0 if view.bits == 8 else 65535.0)
                for crop in crops_of_view:
                    self._add_image(result, i, chosen.number, chosen.parts[0], window, view.bits)
                    result.crops.append(crop)
        return result

    def _crops(
        self, members: Members, views: list[ViewRecord], key: tuple[int, int] | None
    ) -> Sequence[Sequence[Crop | None]]:
        """Where each view is cropped, None for an image. Raises BadSampleError where record and members disagree."""
        config = self.config.volume
        volumes = [view.depth is not None for view in views]
        if config is None:
            if any(volumes):
                raise BadSampleError("", "", "a volume, and the recipe has no data.volume")
            return [[None]] * len(views)
        if not all(volumes):
            raise BadSampleError("", "", "an image where the recipe reads volumes")
        around = self.around_anatomies if key is None else None
        size, places = (None, []) if around is None else crops_of_study(config, views, around)
        crops = []
        for number, (view, chosen) in enumerate(zip(views, members.views, strict=True)):
            parts, maps = _read_parts(view, chosen, view.mask_maps if self.reads_masks else 0)
            crop = Crop(
                view=view, parts=chosen.parts, first_part=parts.start, maps=maps, mask_ids=members.mask_ids, size=size
            )
            if around is not None:
                crops.append([replace(crop, start=place.start, shows=place.shows) for place in places[number]])
                continue
            view_key = None if key is None else (*key, chosen.number)
            start, flip = place_crop(config, view, parts, view_key, self.seed)
            crops.append([replace(crop, start=start, flip=flip)])
        return crops

    def _structure(self, record: StudyRecord) -> StructuredReport | None:
        """The structured report if something reads it. Raises BadSampleError where it is missing or broken."""
        if not self._reads_structure and "finding_key" not in self.fields:
            return None
        if record.structured_report is None:
            if self._reads_structure:
                raise BadSampleError("", "", "no structured report")
            return None
        try:
            return parse(record.structured_report)
        except DataError as error:
            raise BadSampleError("", "", str(error)) from None

    def _labels(self, record: StudyRecord, members: Members) -> Mapping[str, LabelValue]:
        """The study's labels, or what they say of classes."""
        if self.config.label_text is None:
            return record.labels
        return table_of(members.labels, self.config.label_text.names).classes(record.labels)

    def _text(
        self,
        record: StudyRecord,
        structure: StructuredReport | None,
        labels: Mapping[str, LabelValue],
        key: label_text.Key | None,
    ) -> _Text:
        if not self._reads_report:
            return _Text([], keyed.text_key(""))
        if self._reads_structure and structure is not None:
            said = (text for item in structure.items for text in (*answers(item), item.verdict_text))
            return _Text(serialise(structure, self.config.structured, key), keyed.text_key(" ".join(said)))
        config, of_labels = self.config.label_text, None
        if config is not None and key is not None:
            of_labels = label_text.of_labels(config, labels, key)
            if of_labels is not None and label_text.takes_labels(config, key):
                return _Text([(OBSERVATION, of_labels.text)], of_labels.key, is_report=False)
        try:
            text = report_text(record, self.config.sections)
        except EmptyReportError:
            if of_labels is None:
                raise
            return _Text([(OBSERVATION, of_labels.text)], of_labels.key, is_report=False)
        text_key = keyed.text_key(text)  # of the whole report: equal reports are positives, however they are read
        if key is not None and self.config.sentences.changes:
            varied = report_sentences.varied(self.config.sentences, record, self.config.sections, key)
            text = report_text(varied, self.config.sections)
        return _Text([(OBSERVATION, text)], text_key)

    @staticmethod
    def _add_image(to: Prepared, row: int, view: int, data: memoryview, window: tuple[float, float], bits: int) -> None:
        to.images.append(data)
        to.study_index.append(row)
        to.view.append(view)
        to.window.append(window)
        to.bits.append(bits)

    def submit(self, prepared: Prepared) -> Decoding:
        """Start decoding; at most a few batches are under way at once, finished in order by `finish`."""
        columns, study_index = prepared.columns, np.asarray(prepared.study_index, dtype=np.int64)
        present = np.flatnonzero(columns["valid"][study_index])
        if self.config.volume is not None:
            crops = [crop for crop in prepared.crops if crop is not None]
            volumes = self.volume_decoder.submit(crops, labels="anatomy_labels" in self.fields)
            return Decoding(prepared=prepared, pending=volumes, present=present, study_index=study_index)
        if prepared.train:
            parameters = augment.draw(
                self.config.augment,
                self.seed,
                columns["epoch"][study_index],
                prepared.sample_key[study_index],
                np.asarray(prepared.view),
            )
        else:
            parameters = augment.identity(len(study_index))
        pending = self.decoder.submit(
            [prepared.images[i] for i in present],
            parameters.take(present),
            np.asarray(prepared.window, dtype=np.float32).reshape(-1, 2)[present],
            np.asarray(prepared.bits)[present],
        )
        return Decoding(
            prepared=prepared, pending=pending, present=present, study_index=study_index, parameters=parameters
        )

    def finish(
        self,
        decoding: Decoding,
        on_void: Callable[[int, str], None],
        on_unseen: Callable[[int, str], None] = lambda row, cause: None,
    ) -> Batch:
        """Wait for the pixels, make void what did not decode, and join the tensors of the batch.

        `on_unseen(row, cause)` is told of each valid row in which no anatomy counts.
        """
        prepared, present, study_index = decoding.prepared, decoding.present, decoding.study_index
        columns = prepared.columns
        pixels, decoded, causes = decoding.pending.result()
        for image in np.flatnonzero(~decoded):
            row = int(study_index[present[image]])
            if columns["valid"][row]:  # one event a study, whatever the number of its bad views
                columns["valid"][row] = False
                on_void(row, f"image: {causes[image]}")
        valid = columns["valid"]
        if len(present) == len(study_index):
            pixel_values = pixels
        else:
            pixel_values = torch.zeros(len(study_index), *pixels.shape[1:], dtype=pixels.dtype, device=pixels.device)
            pixel_values[torch.from_numpy(present)] = pixels
        if not valid.all():
            void_image = torch.from_numpy(~valid[study_index])
            pixel_values[void_image] = 0.0
            for name in ZERO_IN_VOID & columns.keys():
                columns[name] = np.where(valid, columns[name], np.zeros((), columns[name].dtype))
            columns["degradation_grade"][~valid] = -1.0
            columns["labels"][~valid] = NOT_ANNOTATED
        batch: Batch = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        batch["pixel_values"] = pixel_values
        batch["study_index"] = torch.from_numpy(study_index)
        if "patch_mask" in self.fields:
            epoch, sample_key = columns["epoch"][study_index], prepared.sample_key[study_index]
            view = np.asarray(prepared.view)
            mask = draw_patches(self.config.masking, self.seed, epoch, sample_key, view, self._patches)
            batch["patch_mask"] = torch.from_numpy(mask & valid[study_index][:, None])
        if self.reads_grids:
            batch["attention_grid"] = torch.from_numpy(self._attention(decoding, valid[study_index]))
        if isinstance(decoding.pending, VolumeBatch):
            batch |= self._anatomy_fields(decoding, decoding.pending, on_unseen)
        if self.tokenizer is not None and self._reads_report:
            if self._reads_entities:
                batch |= self._entity_tokens(self.tokenizer, prepared)
            else:
                parts = [parts if ok else [] for parts, ok in zip(prepared.parts, valid, strict=True)]
                batch |= self._tokens(self.tokenizer, parts, prepared)
        return batch

    def _attention(self, decoding: Decoding, valid: np.ndarray) -> np.ndarray:
        """Grids of the images that are `valid` [V], as their crops show them; 0 for the others."""
        parameters = decoding.parameters
        if self.config.entity_masking.compat == "original":
            parameters = augment.identity(len(valid))
        assert parameters is not None
        grid = attention_grid.carry(decoding.prepared.grids, parameters, math.isqrt(self._patches))
        grid[~valid] = 0.0
        return grid

    def _anatomy_fields(self, decoding: Decoding, volumes: VolumeBatch, on_unseen: Callable[[int, str], None]) -> Batch:
        """Shares of the crops and texts by anatomy; zero in void slots but for the tokens of an empty text."""
        config, prepared, present = self.config.volume, decoding.prepared, decoding.present
        assert config is not None
        valid, study_index = prepared.columns["valid"], decoding.study_index
        anatomies = len(config.anatomies)
        batch: Batch = {}
        if self.reads_masks:
            share = np.zeros((len(study_index), *volumes.share.shape[1:]), np.float32)
            intact = np.zeros((len(study_index), anatomies), bool)
            share[present], intact[present] = volumes.share, volumes.whole
            rows = [prepared.anatomy[row] for row in study_index[present]]
            if config.keep_cut_if_mentioned:
                mentioned = [row.mentioned for row in rows if row is not None]
                intact[present] |= volumes.present & np.array(mentioned, bool).reshape(-1, anatomies)
            if self.around_anatomies:
                shown = [crop.shows for crop in prepared.crops if crop is not None]
                names = [plain_name(name) for name in config.anatomies]
                made_for = [[names_shown is None or name in names_shown for name in names] for names_shown in shown]
                intact[present] &= np.array(made_for, bool).reshape(-1, anatomies)
            whole = intact.copy()
            if self._reads_anatomies and not self.around_anatomies:
                state = np.stack([row.state for row in rows if row is not None]) if len(present) else intact[:0]
                intact[present] &= state != NOT_ANNOTATED
            share[~valid[study_index]], intact[~valid[study_index]] = 0.0, False
            counts, seen = (_any_of_study(marked, study_index, len(valid)) for marked in (intact, whole))
            there = _any_of_study(volumes.present, study_index[present], len(valid))
            for row in np.flatnonzero(valid & ~counts).tolist():
                on_unseen(row, TELLS_OF_NONE if seen[row] else ALL_CUT if there[row] else NONE_THERE)
            batch |= {"anatomy_share": torch.from_numpy(share), "anatomy_intact": torch.from_numpy(intact)}
            if volumes.labels is not None:
                labels = np.zeros((len(study_index), *volumes.labels.shape[1:]), np.uint8)
                labels[present] = volumes.labels
                batch["anatomy_labels"] = torch.from_numpy(labels)
        if self._reads_anatomies:
            usable = [one if ok else None for one, ok in zip(prepared.anatomy, valid, strict=True)]
            batch |= self._anatomy_texts(usable, anatomies)
        return batch

    def _anatomy_texts(self, rows: Sequence[AnatomyTexts | None], anatomies: int) -> Batch:
        text_key = np.zeros((len(rows), anatomies), np.int64)
        state = np.full((len(rows), anatomies), NOT_ANNOTATED, np.int8)
        texts: dict[str, int] = {"": 0}  # each is tokenised once
        place = np.zeros((len(rows), anatomies), np.int64)
        for i, row in enumerate(rows):
            if row is not None:
                text_key[i], state[i] = text_keys(row.texts), row.state
                place[i] = [texts.setdefault(text, len(texts)) for text in row.texts]
        batch: Batch = {
            "anatomy_text_key": torch.from_numpy(text_key),
            "anatomy_key": torch.from_numpy(np.where(state == ABNORMAL, text_key, 0)),
            "anatomy_state": torch.from_numpy(state),
        }
        if self.tokenizer is not None:
            input_ids, attention_mask = self.tokenizer.encode(list(texts), self.config.text_length)
            index = torch.from_numpy(place)
            batch |= {"anatomy_input_ids": input_ids[index], "anatomy_attention_mask": attention_mask[index]}
        return batch

    def _tokens(self, tokenizer: Tokenizer, parts: list[list[Part]], prepared: Prepared) -> Batch:
        """The fields of the text; only what needs sections or words pays for them."""
        if not self._reads_structure and not self.fields & {"section_ids", "text_mask"}:
            texts = [text for row in parts for _, text in row or [(OBSERVATION, "")]]
            input_ids, attention_mask = tokenizer.encode(texts, self.config.text_length)
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        tokens = tokenizer.encode_parts(parts, self.config.text_length)
        batch: Batch = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        if "section_ids" in self.fields:
            batch["section_ids"] = torch.from_numpy(tokens.section_ids)
        if "text_mask" in self.fields:
            epoch, sample_key = prepared.columns["epoch"], prepared.sample_key
            config = self.config.masking
            mask = draw_text(config, self.seed, epoch, sample_key, tokens.words, tokens.section_ids)
            batch["text_mask"] = torch.from_numpy(mask)
        return batch

    def _entity_tokens(self, tokenizer: Tokenizer, prepared: Prepared) -> Batch:
        """The fields of a text whose words are masked by what they are."""
        config, columns = self.config.entity_masking, prepared.columns
        key = (self.seed, columns["epoch"], prepared.sample_key)
        reports = [one if ok else None for one, ok in zip(prepared.marked, columns["valid"], strict=True)]
        tokens = tokenise(config, tokenizer, reports, *key, length=self.config.text_length, train=prepared.train)
        text_mask, token_weight = build_mlm(config, *key, tokens.words, tokens.kinds)
        token_weight[~columns["valid"]] = 0.0
        return {
            "input_ids": torch.from_numpy(tokens.ids),
            "attention_mask": torch.from_numpy(tokens.seen),
            "text_mask": torch.from_numpy(text_mask),
            "token_weight": torch.from_numpy(token_weight),
            "cut_tokens": torch.from_numpy(tokens.cut),
            "dropped_sentences": torch.from_numpy(tokens.dropped),
        }


def _sample_key(unit: np.ndarray, set_index: np.ndarray) -> np.ndarray:
    return unit + (set_index << 48)


def _attention_grid(view: View) -> np.ndarray | None:
    """None where the view has none. Raises BadSampleError where it is broken."""
    if view.id not in view.attention:
        return None
    try:
        return attention_grid.decode(view.attention[view.id])
    except ValueError as error:
        raise BadSampleError("", "", str(error)) from None


def _degradation_grade(record: StudyRecord) -> float:
    """As phantoms note it; -1 for a record that does not say (no NaN: two equal batches must compare equal)."""
    grade = record.provenance.get("degradation grade")
    return float(grade) if isinstance(grade, int | float) and 0 <= grade < math.inf else -1.0


def _uncertain_verdicts(record: StudyRecord) -> int:
    items = (record.structured_report or {}).get("items")
    if not isinstance(items, list):
        return 0
    return sum(isinstance(item, dict) and item.get("verdict") == "uncertain" for item in items)


def _view_records(record: StudyRecord, members: Members) -> list[ViewRecord]:
    """What the record says of each chosen image. Raises BadSampleError when it says nothing of one."""
    if not members.views:
        raise BadSampleError("", "", "no image")
    if record.provenance.get("adopted") and len(record.views) == len(members.views):
        return record.views  # it was made from just these images, in this order
    known = {view.id: view for view in record.views}
    names = [view.id for view in members.views]
    if not known.keys() >= set(names):
        raise BadSampleError("", "", "an image that the record does not list")
    return [known[name] for name in names]


def _any_of_study(marked: np.ndarray, study_index: np.ndarray, studies: int) -> np.ndarray:
    """[V, A] bool of views -> [b] bool: is anything marked in some view of the study."""
    found = np.zeros(studies, bool)
    np.logical_or.at(found, study_index, marked.any(axis=1))
    return found


def _read_parts(view: ViewRecord, chosen: View, mask_maps: int) -> tuple[range, list[list[memoryview]]]:
    """The numbers of the parts that were read, and those parts of each label map.

    Raises BadSampleError where parts or label maps are not those of the record.
    """
    there, needed = chosen.parts_there, part_count(view.depth or 1)
    if there != needed:
        raise BadSampleError("", "", f"{there} parts of a volume of {view.depth} slices, which need {needed}")
    parts = range(chosen.first_part, chosen.first_part + len(chosen.parts))
    maps = []
    for number in range(mask_maps):
        if any((number, part) not in chosen.masks for part in parts):
            raise BadSampleError("", "", f"label map {number}: a part is missing")
        maps.append([chosen.masks[number, part] for part in parts])
    return parts, maps
