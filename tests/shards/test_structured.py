"""Structured reports: schema, check against the text, the phantom's own, and a choice that does not leak the labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import keyed
from shards.errors import ConfigError, DataError
from shards.ingest.phantom_chest import _report, split_seed
from shards.ingest.phantom_chest_degrade import draw_degradation
from shards.ingest.phantom_chest_scene import STANDARD, draw_scene
from shards.ingest.phantom_chest_text import LABELS, structure
from shards.reports.structured import (
    APPEARANCE,
    DEFINITION,
    DISEASES,
    OBSERVATION,
    VERDICT,
    Config,
    Exist,
    Item,
    Observation,
    StructuredReport,
    checked,
    finding_key,
    make_item,
    observe,
    parse,
    serialise,
    source_text,
    verdict_of,
)

DISEASE_OF_DEFINITION = {disease.definition: name for name, disease in DISEASES.items()}


def said(exist: Exist, position: str = "") -> Observation:
    return observe("effusion", exist, position=position, span=(0, 4))


def report_of(present: Sequence[str] = (), uncertain: Sequence[str] = ()) -> StructuredReport:
    """A report on all eight diseases."""
    exists: dict[str, Exist] = {}
    for exist, names in (("no", LABELS), ("yes", present), ("unsure", uncertain)):
        exists |= dict.fromkeys(names, exist)  # type: ignore[arg-type]
    return StructuredReport(
        study="s", items=[make_item(name, [observe(name, exist, span=(0, 4))]) for name, exist in exists.items()]
    )


@cache
def phantoms(count: int = 400) -> list[tuple[StructuredReport, dict[str, str], dict[str, bool]]]:
    """Structured report, report and truth of phantoms, two in five degraded."""
    result = []
    for index in range(count):
        scene = draw_scene(split_seed(1, "train"), index, STANDARD)
        report = _report(scene, STANDARD, draw_degradation(scene.seed, index, 0.4))
        truth = dict.fromkeys(LABELS, False) | {finding.name: finding.present for finding in scene.findings}
        result.append((structure(str(index), report), report.sections, truth))
    return result


@pytest.mark.parametrize(
    ("observations", "verdict"),
    [
        ([], "absent"),
        ([said("no")], "absent"),
        ([said("yes")], "present"),
        ([said("unsure")], "uncertain"),
        ([said("yes", "left"), said("unsure", "right")], "present"),
        ([said("yes", "left"), said("no", "right")], "present"),
        ([said("yes", "left"), said("no", "left")], "uncertain"),
        ([said("yes", "left"), said("no")], "uncertain"),
        ([said("unsure", "left"), said("no")], "uncertain"),
    ],
)
def test_verdicts_follow_from_observations(observations: list[Observation], verdict: str) -> None:
    assert verdict_of(observations) == verdict
    assert make_item("effusion", observations).verdict == verdict


def test_a_verdict_without_grounds_becomes_uncertain() -> None:
    item = make_item("effusion", [said("no")])
    wrong = replace(item, verdict="present", verdict_text="Verdict: pleural effusion present.")
    mended = checked(StructuredReport(study="s", items=[wrong]), "No effusion.").items[0]
    assert (mended.verdict, mended.verdict_text) == ("uncertain", "Verdict: pleural effusion uncertain.")
    foreign = replace(wrong, disease="scoliosis")
    assert checked(StructuredReport(study="s", items=[foreign]), "No effusion.").items[0].verdict == "uncertain"
    right = StructuredReport(study="s", items=[item])
    assert checked(right, "No effusion.") == right


@pytest.mark.parametrize("span", [(0, 13), (20, 30), (2, 3), (11, 12)])
def test_spans_are_parts_of_the_report(span: tuple[int, int]) -> None:
    """Beyond the end, or holding no word; the error says where and repeats no text."""
    items = [make_item("edema", []), make_item("effusion", [observe("effusion", "no", span=span)])]
    report = StructuredReport(study="s7", items=items)
    with pytest.raises(DataError, match=rf"span \[{span[0]}, {span[1]}\) of observation 0 of item 1 ") as caught:
        checked(report, "No effusion.")
    assert not any(word in str(caught.value) for word in ("effusion", "s7"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "value_error at its top"),
        ({"studies": 1}, r"unexpected_keyword_argument at \?"),
        ({"study": None}, "string_type at study"),
    ],
)
def test_what_is_not_of_the_schema(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"structured report: {message}"):
        parse(asdict(report_of()) | change)


def test_diseases_that_go_unsaid_are_held_by_name_and_read_as_items_in_the_order_of_the_table() -> None:
    told = make_item("effusion", [observe("effusion", "yes", span=(0, 8))])
    silent = [make_item(name, [observe(name, "no")]) for name in ("atelectasis", "pneumothorax")]
    first, last = silent
    every = StructuredReport(study="s", items=[first, told, last])
    short = StructuredReport(study="s", items=[told], unsaid=["pneumothorax", "atelectasis"])
    assert parse(asdict(short)) == parse({"study": "s", "items": asdict(every)["items"]}) == every
    for unsaid in (["secret"], ["effusion"], ["atelectasis", "atelectasis"]):
        with pytest.raises(DataError, match="value_error at its top") as caught:
            parse({"study": "s", "items": [asdict(told)], "unsaid": unsaid})
        assert "secret" not in str(caught.value)


def test_faults_within_items_name_their_place_and_no_words() -> None:
    data = asdict(report_of())
    data["items"][2]["observations"][0]["exist"] = "the patient's secret"
    with pytest.raises(DataError, match=r"literal_error at items\.2\.observations\.0\.exist") as caught:
        parse(data)
    assert "secret" not in str(caught.value)
    data = asdict(report_of())
    data["items"][1] = data["items"][0]
    with pytest.raises(DataError, match="value_error at its top"):
        parse(data)


@pytest.mark.parametrize("bad", [{"exist": "yes", "span": None}, {"span": (5, 5)}, {"span": (-1, 5)}])
def test_bad_observations(bad: dict[str, Any]) -> None:
    item = asdict(make_item("effusion", [said("no")]))
    item["observations"][0] |= bad
    with pytest.raises(DataError, match=r"value_error at items\.0\.observations\.0"):
        parse({"study": "s", "items": [item]})


def test_tables_cover_the_labels_and_say_nothing_of_a_patient() -> None:
    assert tuple(DISEASES)[: len(LABELS)] == LABELS and len(DISEASES) >= 30
    assert len({disease.definition for disease in DISEASES.values()}) == len(DISEASES)
    for disease in DISEASES.values():
        assert disease.name in disease.one
        for text in (disease.definition, disease.appearance):
            assert text.endswith(".")
            assert not re.search(r"\b(left|right)\b", text), "one side would be one patient's"


def test_words_of_the_phantoms_diseases_do_not_change() -> None:
    """They stand in packed phantoms, whose bytes are compared."""
    words = repr([(name, DISEASES[name].definition, DISEASES[name].appearance) for name in sorted(LABELS)])
    assert keyed.text_key(words) == 6305170718567581905, "make a new phantom instead"


def test_phantoms_reports_tell_what_their_words_tell() -> None:
    verdicts = Counter[str]()
    for report, sections, truth in phantoms():
        assert parse(asdict(report)) == report
        assert [item.disease for item in report.items] == list(LABELS)
        text = source_text(sections)
        for item in report.items:
            verdicts[item.verdict] += 1
            if item.verdict == "present":
                assert truth[item.disease]
            if item.verdict == "absent":
                assert not truth[item.disease]
            for observation in item.observations:
                if observation.span is not None:
                    quote = text[slice(*observation.span)]
                    assert quote in sections["findings"]
                    assert quote.endswith(".")
                    if observation.exist != "no" and observation.position.endswith("zone"):
                        assert observation.position.split()[0] in quote.lower()
    assert min(verdicts[verdict] for verdict in ("present", "absent", "uncertain")) > 100


def test_keys_are_of_findings_present_or_uncertain() -> None:
    none = finding_key(report_of())
    assert none == finding_key(StructuredReport(study="t", items=[make_item("nodule", [])]))
    keys = [
        none,
        finding_key(report_of(["effusion"])),
        finding_key(report_of(["edema"])),
        finding_key(report_of(["effusion", "edema"])),
    ]
    assert len(set(keys)) == len(keys)
    assert finding_key(report_of(["edema"], ["effusion"])) == keys[3]
    turned = report_of(["effusion", "edema"])
    turned = StructuredReport(study="u", items=turned.items[::-1])
    assert finding_key(turned) == keys[3]
    assert min(keys) >= 0


names = st.lists(st.sampled_from(LABELS), unique=True)


@settings(deadline=None, max_examples=80)
@given(names, names, st.integers(0, 2**40), st.integers(2, 5))
def test_a_choice_holds_the_found_and_an_absent_one(
    present: list[str], uncertain: list[str], seed: int, diseases: int
) -> None:
    report = report_of(present, uncertain)
    verdicts = {DISEASES[item.disease].appearance: item.verdict for item in report.items}
    found = sum(verdict != "absent" for verdict in verdicts.values())
    for key in ((seed, 0, 3), None):
        parts = serialise(report, Config(diseases=diseases), key)
        shown = [verdicts[text] for section, text in parts if section == APPEARANCE]
        assert len(shown) == diseases
        assert sum(verdict != "absent" for verdict in shown) == min(found, diseases - (found < len(LABELS)))
        if found < len(LABELS):
            assert "absent" in shown
        sections = [section for section, _ in parts if section != DEFINITION]
        assert sections == [APPEARANCE, OBSERVATION, VERDICT] * diseases
        assert serialise(report, Config(diseases=diseases), key) == parts


def test_evaluation_keeps_the_order_and_every_definition() -> None:
    parts = serialise(report_of(["nodule"], ["effusion"]), Config())
    assert [DISEASE_OF_DEFINITION[text] for section, text in parts if section == DEFINITION] == [
        "atelectasis", "effusion", "nodule",
    ]  # fmt: skip
    assert [section for section, _ in parts] == [DEFINITION, APPEARANCE, OBSERVATION, VERDICT] * 3


def test_definitions_are_dropped_alike_whatever_the_verdict() -> None:
    """The leak: were definitions kept for what is present only, the topic of the text would name the label."""
    kept, shown, place = Counter[str](), Counter[str](), Counter[tuple[str, int]]()
    for number, (report, _, _) in enumerate(phantoms()):
        appearance = {item.appearance: item for item in report.items}
        for epoch in range(6):
            parts = serialise(report, Config(), (9, epoch, number))
            definitions = {text for section, text in parts if section == DEFINITION}
            items = [appearance[text] for section, text in parts if section == APPEARANCE]
            for position, item in enumerate(items):
                shown[item.verdict] += 1
                place[item.verdict, position] += 1
                kept[item.verdict] += item.definition in definitions
    for verdict in ("present", "absent", "uncertain"):
        assert abs(kept[verdict] / shown[verdict] - 0.7) < 0.04
    # Nor does the place in the text: shown diseases of any verdict stand anywhere.
    for verdict in ("present", "absent", "uncertain"):
        for position in range(3):
            assert abs(place[verdict, position] / shown[verdict] - 1 / 3) < 0.06


def test_every_disease_is_shown_absent_too() -> None:
    absent = Counter[str]()
    for number, (report, _, _) in enumerate(phantoms()):
        verdict = {item.definition: item.verdict for item in report.items}
        for section, text in serialise(report, Config(), (9, 0, number)):
            if section == DEFINITION and verdict[text] == "absent":
                absent[DISEASE_OF_DEFINITION[text]] += 1
    assert set(absent) == set(LABELS)
    assert min(absent.values()) > 30


def test_questions_do_not_answer_themselves() -> None:
    questions = {
        observe("nodule", exist, position="left upper zone", span=(0, 1)).question for exist in ("yes", "no", "unsure")
    }
    assert questions == {"Is there a pulmonary nodule?"}


def test_order_changes_with_epoch_and_study() -> None:
    report = report_of(["nodule"], ["effusion"])
    orders = {tuple(serialise(report, Config(), (1, epoch, 0))) for epoch in range(12)}
    assert len(orders) > 8
    assert serialise(report, Config(), (1, 0, 0)) != serialise(report, Config(), (2, 0, 0))
    assert serialise(report, Config(definition_drop=1.0), (1, 0, 0)) == [
        part for part in serialise(report, Config(definition_drop=0.0), (1, 0, 0)) if part[0] != DEFINITION
    ]


@pytest.mark.parametrize("options", [{"diseases": 1}, {"definition_drop": -0.1}, {"definition_drop": 2.0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Config(**options)


def test_an_item_without_observations_has_no_such_part() -> None:
    report = StructuredReport(study="s", items=[make_item("nodule", [])])
    assert [section for section, _ in serialise(report, Config())] == [DEFINITION, APPEARANCE, VERDICT]
    assert isinstance(report.items[0], Item)
