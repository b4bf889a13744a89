"""Label tables told in one ontology, and studies with reports, labels or both in one mixture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import schema
from configs.prompts import LABEL_SENTENCES
from core.tasks.clip import CLIP
from core.tasks.umcl import UMCL
from shards.batch import NO_FINDING, NOT_ANNOTATED, EncodedImage, LabelValue, Sample, StudyRecord, ViewRecord
from shards.errors import BadSampleError, ConfigError
from shards.ingest import Item, Loaded, Plan, hashed_key
from shards.ingest.phantom_chest_text import LABELS as PHANTOM
from shards.label_union import THORAX, LabelTable, class_of, plain
from shards.loader import Loader, MixtureSet
from shards.reports.labels import ONTOLOGIES
from shards.tokenizer import train_wordpiece
from shards.transforms import label_text
from shards.writer import WriterConfig, write_shards
from tests.shards.sources import encoded

NIH = tuple(ONTOLOGIES["nih14"])


def test_every_set_at_hand_is_understood_and_no_name_means_two_things() -> None:
    mappings = {"Bacterial pneumonia", "Viral pneumonia", "Pneumonia", "COVID-19", "ARDS"}
    adjudicated = {"Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass"}
    silver = {"Opacity", "Granuloma", "Calcinosis", "Scoliosis", "Atherosclerosis", "Normal", *NIH}
    for labels in (NIH, PHANTOM, tuple(ONTOLOGIES["chexpert14"]), mappings, adjudicated, silver):
        LabelTable.of(labels)
    names = [plain(name) for key, one in THORAX.items() for name in (key, *one.same, *one.narrower)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert class_of("Pleural_Thickening") == "pleural thickening" and class_of("unheard of") is None


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({"Effusion": 1, "Mass": 0, "Edema": -1}, {"pleural effusion": 1, "lung mass": 0, "pulmonary edema": -1,
                                                   NO_FINDING: 0}),
        ({"Effusion": 0, "Mass": 0, "Edema": 0}, {"pleural effusion": 0, "lung mass": 0, "pulmonary edema": 0,
                                                  NO_FINDING: 1}),
        ({"Effusion": 0, "Mass": 0}, {"pleural effusion": 0, "lung mass": 0}),
        ({}, {}),
    ],
)  # fmt: skip
def test_no_finding_is_where_all_that_is_asked_for_is_absent(
    labels: dict[str, LabelValue], found: dict[str, int]
) -> None:
    assert LabelTable.of(("Effusion", "Mass", "Edema")).classes(labels) == found


def test_a_narrower_label_tells_presence_alone() -> None:
    table = LabelTable.of(("Pneumonia", "Bacterial pneumonia", "Support Devices", "No Finding"))
    assert table.classes({"Bacterial pneumonia": 1})["pneumonia"] == 1
    assert "pneumonia" not in table.classes({"Bacterial pneumonia": 0})
    assert table.known == ("pneumonia", "support devices", NO_FINDING)
    assert table.classes({"No Finding": 1, "Support Devices": 1}) == {NO_FINDING: 1, "support devices": 1}
    for contradiction in ({"Pneumonia": 0, "Bacterial pneumonia": 1}, {"Pneumonia": 1, "No Finding": 1}):
        with pytest.raises(BadSampleError, match="labels disagree"):
            table.classes(contradiction)  # type: ignore[arg-type]


def test_tables_that_cannot_be_joined() -> None:
    with pytest.raises(ConfigError, match=r"'Effusions' \(close to 'effusion'\) is not in the ontology"):
        LabelTable.of(("Effusions",))
    with pytest.raises(ConfigError, match=r"'Edema', 'Pulmonary Edema' all mean 'pulmonary edema'"):
        LabelTable.of(("Edema", "Pulmonary Edema"))
    assert LabelTable.of(("Edema", "Pulmonary Edema"), {"Pulmonary edema": ""}).meaning == {"Edema": "pulmonary edema"}
    assert LabelTable.of(("Rare",), {"rare": "rare disease"}).meaning == {"Rare": "rare disease"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": ("edema", "edema")}, "edema is named twice"),
        ({"classes": ()}, "no class is named"),
        ({"classes": ("effusions",)}, "no label means 'effusions'"),
        ({"classes": ("ards", "copd"), "sentences": {"ards": ("ARDS.",)}}, "none for copd"),
        ({"classes": ("ards",), "share": 1.5}, "share=1.5"),
    ],
)
def test_a_config_that_cannot_be(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        label_text.Config(**changed)


CLASSES = (NO_FINDING, "pulmonary edema", "pleural effusion")
TEXTS = label_text.Config(classes=CLASSES)


@dataclass(frozen=True, kw_only=True)
class Studies:
    """48 studies that all have a report; labels by `i`: normal, effusion, edema uncertain, both."""

    labels: tuple[str, ...] = ("Edema", "Effusion")
    positive_only: bool = False
    name: str = "studies"
    masks: Mapping[str, int] = field(default_factory=dict)
    key_fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> Plan:
        keys = [(hashed_key(None, self.name, str(i)), i) for i in range(48)]
        return Plan(items=[Item(key=key, patient=key, split="train", payload=i) for key, i in keys])

    def load(self, item: Item) -> Loaded:
        edema, effusion = ((0, 0), (0, 1), (-1, 0), (1, 1))[item.payload % 4]
        labels = {self.labels[0]: edema, self.labels[1]: effusion}
        if self.positive_only:
            labels = {name: value for name, value in labels.items() if value == 1}
        record = StudyRecord(
            study=item.key, patient=item.key, labels=labels,
            report={"findings": f"Report {item.payload}. There is pulmonary edema."},
            provenance={"degradation grade": float(item.payload)},  # a batch has it
            views=[ViewRecord(id="0", height=8, width=8)],
        )  # fmt: skip
        image = EncodedImage(data=encoded(0, 8, 8, "png"), extension="png")
        return Loaded(sample=Sample(key=item.key, record=record, images=(image,), split="train"))


def packed(folder: Path, **of: Any) -> str:
    write_shards(Studies(**of), str(folder), WriterConfig(shard_samples=48, workers=1))
    return str(folder / "manifest.json")


def loader_of(train: tuple[MixtureSet, ...], fields: tuple[str, ...] = UMCL.fields, **changed: Any) -> Loader:
    config = Loader.Config(train=train, lanes=12, label_text=TEXTS, sections=("findings",), max_skip_rate=1.0)
    config = replace(config, decode=replace(config.decode, image_size=8, threads=1), **changed)
    tokenizer = train_wordpiece(["report 0 1 2 3 4 5 6 7 8 9 . there is pulmonary edema"] * 2, 80)
    return Loader(config, global_batch_size=12, seed=3, fields=fields, tokenizer=tokenizer)


def mixture(manifest: str) -> tuple[MixtureSet, ...]:
    return tuple(MixtureSet(manifest=manifest, quota=4, reads=reads) for reads in ("report", "labels", "everything"))  # type: ignore[arg-type]


def test_a_mixture_of_reports_labels_and_both(tmp_path: Path) -> None:
    manifest = packed(tmp_path / "a")
    seen: dict[tuple[int, int], set[bool]] = {}
    voids: set[int] = set()
    with loader_of(mixture(manifest)).start(0) as run:
        for batch in (next(run) for _ in range(24)):
            assert batch["text_is_report"].dtype is torch.bool
            for row in range(12):
                place, unit = int(batch["set_index"][row]), int(batch["degradation_grade"][row])
                labels, is_report = batch["labels"][row].tolist(), bool(batch["text_is_report"][row])
                if not batch["valid"][row]:
                    voids.add(place)
                    continue
                # Study 2 of 4 is uncertain of one and knows no other: it has a text only where its report is read.
                assert (place, unit % 4) != (1, 2)
                expected = [[1, 0, 0], [0, 0, 1], [NOT_ANNOTATED, -1, 0], [0, 1, 1]][unit % 4]
                assert labels == (expected if place != 0 else [NOT_ANNOTATED] * 3)
                assert is_report == bool(batch["attention_mask"][row].sum() > 2)
                seen.setdefault((place, unit), set()).add(is_report)
    assert voids == {1}
    assert all(found == {True} for (place, _), found in seen.items() if place == 0)
    assert all(found == {False} for (place, _), found in seen.items() if place == 1)
    both = [found for (place, unit), found in seen.items() if place == 2 and unit % 4 != 2]
    assert any(found == {True, False} for found in both), "the draw is of study and epoch"
    assert all(found == {True} for (place, unit), found in seen.items() if place == 2 and unit % 4 == 2)


def test_sentences_stand_for_reports_and_equal_ones_are_positives(tmp_path: Path) -> None:
    manifest = packed(tmp_path / "a")
    sentences = {name: LABEL_SENTENCES[name] for name in CLASSES}
    texts = replace(TEXTS, sentences=sentences)
    assert label_text.of_labels(texts, {"pulmonary edema": 1, "pleural effusion": 1}, (0, 0, 1)) is not None
    with loader_of(mixture(manifest)[1:2] * 3, CLIP.fields, label_text=texts).start(0) as run:
        batch = next(run)
    valid = batch["valid"]
    assert valid.any() and (batch["attention_mask"][valid].sum(dim=1) > 3).all()
    keys = batch["report_key"][valid].tolist()
    assert len(set(keys)) < len(keys), "few sentences, many studies"
    with pytest.raises(ConfigError, match="no prompts of its own"):
        loader_of(mixture(manifest), CLIP.fields)


def test_sets_that_cannot_be_read(tmp_path: Path) -> None:
    never_absent = packed(tmp_path / "a", positive_only=True)
    with pytest.raises(ConfigError, match=r"manifest\.json: .* present and none is absent.*reads=report"):
        loader_of(mixture(never_absent)[1:2] * 3)
    loader_of(mixture(never_absent)[:1] * 3)
    unknown = packed(tmp_path / "b", labels=("Edema", "Efusion"))
    with pytest.raises(ConfigError, match=r"manifest\.json: label 'Efusion' \(close to 'effusion'\)"):
        loader_of(mixture(unknown))
    with pytest.raises(ConfigError, match=r"data\.label_text is not set"):
        loader_of(mixture(unknown), label_text=None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.label_text.classes=[\"ards\"]"], "task.classes and data.label_text.classes differ"),
        (["task.prompts=hand"], "sentences are for task.prompts=hand"),
    ],
)  # fmt: skip
def test_task_and_data_speak_of_the_same_classes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema.apply_overrides(schema.load_recipe("chest:umcl_tiny"), overrides)


def test_a_task_that_reads_labels_needs_them_told_in_classes() -> None:
    recipe = schema.load_recipe("chest:umcl_tiny")
    with pytest.raises(ConfigError, match=r"data\.label_text is not set"):
        replace(recipe, data=replace(recipe.data, label_text=None))


def test_the_recipe_of_prompts_by_hand() -> None:
    recipe = schema.load_recipe("chest:umcl_tiny")
    sentences = json.dumps({name: LABEL_SENTENCES[name] for name in recipe.task.classes})
    by_hand = schema.apply_overrides(recipe, ["task.prompts=hand", f"data.label_text.sentences={sentences}"])
    assert by_hand.data.label_text is not None and by_hand.data.label_text.sentences[NO_FINDING]
