"""Anatomy decomposition by rules: places, clauses, normal and abnormal, English and French; sentences are ours."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reports.anatomy import AnatomyText, Survey, survey
from shards.reports.entities import Entity
from shards.reports.language import Language
from shards.reports.lexicon.anatomy import ANATOMIES, ELSEWHERE, GROUPS, SPINE, lexicon
from shards.reports.lexicon.trie import Node
from shards.reports.sections import sections
from shards.reports.sentences import sentences
from shards.reports.status import Status


def entity(concept: str, start: int, end: int, status: Status) -> Entity:
    """Of the first sentence."""
    return Entity(
        concept=concept, start=start, end=end, sentence=0, laterality=None, position="", status=status, descriptor=None
    )


def read(text: str, language: Language = "en", entities: tuple[Entity, ...] = ()) -> Survey:
    parts = sections(text)
    spans = [span for part in parts for span in sentences(text, *part.body, language)]
    return survey(text, parts, spans, entities, language)


def told(text: str, language: Language = "en") -> dict[str, tuple[str, list[str]]]:
    """place -> (status, its texts) of findings and impression together."""
    found = read(text, language)
    return {
        one.anatomy: (one.status, [text[start:end] for start, end in one.findings + one.impression])
        for one in found.anatomies + found.elsewhere
    }


def statuses(text: str, language: Language = "en") -> dict[str, str]:
    return {place: status for place, (status, _) in told(text, language).items()}


def test_there_are_36_anatomies_and_the_lexicon_names_each() -> None:
    assert len(ANATOMIES) == len(set(ANATOMIES)) == 36
    assert not set(ANATOMIES) & set(ELSEWHERE)

    def entries(node: Node) -> set[str]:
        named = set(node.entry[1]) if node.entry else set()
        return named.union(*map(entries, (node.following or {}).values()))

    for language in ("en", "fr", "unknown"):
        named = entries(lexicon(language))
        assert named - {SPINE, *GROUPS} == {*ANATOMIES, *ELSEWHERE}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart is normal in size.", {"heart": "normal"}),
        ("Both lungs are normally aerated.", {"lung": "normal"}),
        ("There is a small cyst in the left kidney.", {"kidney": "abnormal"}),
        ("No pleural or pericardial effusion.", {"lung": "normal", "heart": "normal"}),
        ("Small right pleural effusion.", {"lung": "abnormal"}),
        ("Pericardial effusion was not observed.", {"heart": "normal"}),
        ("Height loss of the L2 vertebral body.", {"lumbar vertebrae": "abnormal"}),
        ("Compression of T7 and C5.", {"thoracic vertebrae": "abnormal", "cervical vertebrae": "abnormal"}),
        ("The jejunum and the ileum are normal.", {"small bowel": "normal"}),
        ("The appendix is thickened.", {"large bowel": "abnormal"}),
        ("The splenic vein is patent.", {"portal vein": "normal"}),
        ("Hiatal hernia.", {"esophagus": "abnormal"}),
        ("The trachea and both main bronchi are open.", {"trachea": "normal"}),
        ("Bronchiectasis in both lower lobes.", {"lung": "abnormal"}),
        ("The lungs are clear of consolidation, effusion, or pneumothorax.", {"lung": "normal"}),
        ("Perigastric fat planes are clear.", {"stomach": "normal"}),
        ("Left nephrectomized.", {"kidney": "abnormal"}),
        ("Old fracture of the left fifth rib among the bony structures.", {"rib": "abnormal"}),
        ("A nodule of the left thyroid lobe.", {"thyroid": "abnormal"}),
        ("A mass of the left upper lobe adjacent to the aorta is seen.", {"lung": "abnormal"}),
        ("Right hilar and subcarinal lymph nodes are enlarged.", {"lymph nodes": "abnormal"}),
        ("Subcutaneous emphysema of the left side.", {"soft tissue": "abnormal"}),
        ("No lytic lesion of the bony structures.", dict.fromkeys(GROUPS["bones"], "normal")),
        ("The upper abdominal organs are normal.", dict.fromkeys(GROUPS["upper abdomen"], "normal")),
    ],
)
def test_places_and_statuses(text: str, expected: dict[str, str]) -> None:
    assert statuses(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Le foie est homogène.", {"liver": "normal"}),
        ("La rate est augmentée de taille.", {"spleen": "abnormal"}),
        ("Absence d'épanchement pleural.", {"lung": "normal"}),
        ("ABSENCE D'EPANCHEMENT PERICARDIQUE.", {"heart": "normal"}),
        ("Pas d'adénopathie médiastinale ni hilaire.", {"lymph nodes": "normal"}),
        ("Tassement de T12.", {"thoracic vertebrae": "abnormal"}),
        ("Fracture de la cinquième côte droite.", {"rib": "abnormal"}),
        ("Petit nodule du côté droit.", {"lung": "abnormal"}),
        ("Fracture de l'extrémité distale du radius.", {"limb bones": "abnormal"}),
        ("Opacité du lobe inférieur en regard de l'aorte.", {"lung": "abnormal"}),
        ("Les surrénales sont sans particularité.", {"adrenal gland": "normal"}),
    ],
)
def test_places_and_statuses_in_french(text: str, expected: dict[str, str]) -> None:
    assert statuses(text, "fr") == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (
            "The liver is normal, and there is a stone in the gallbladder.", "en",
            {"liver": ["The liver is normal"], "gallbladder": ["there is a stone in the gallbladder."]},
        ),
        (
            "Cardiomegaly, small hiatal hernia, cyst in the right kidney.", "en",
            {"heart": ["Cardiomegaly"], "esophagus": ["small hiatal hernia"], "kidney": ["cyst in the right kidney."]},
        ),
        (
            "Le foie est homogène et la rate est augmentée de taille.", "fr",
            {"liver": ["Le foie est homogène"], "spleen": ["la rate est augmentée de taille."]},
        ),
        # One predicate for all: cut apart, the first would read as stated.
        ("Pleural effusion, pericardial effusion were not seen.", "en", None),
        ("No nodule of the lung, cyst of the liver or stone of the gallbladder.", "en", None),
        ("The liver, spleen and pancreas are normal.", "en", None),
        ("A mass is seen in the pancreas, which invades the stomach.", "en", None),
    ],
)  # fmt: skip
def test_clauses_are_cut_only_where_each_stands_alone(
    text: str, language: Language, expected: dict[str, list[str]] | None
) -> None:
    found = {place: texts for place, (_, texts) in told(text, language).items()}
    if expected is None:
        assert len(found) > 1 and all(texts == [text] for texts in found.values())
    else:
        assert found == expected


def test_a_sentence_without_a_place_goes_on_with_the_last_one() -> None:
    text = "There is a mass in the left kidney. It measures 4 cm. The spleen is normal. No focal lesion is detected."
    found = told(text)
    assert found["kidney"] == ("abnormal", ["There is a mass in the left kidney.", "It measures 4 cm."])
    assert found["spleen"] == ("normal", ["The spleen is normal.", "No focal lesion is detected."])
    assert [one.use for one in read(text).sentences] == ["named", "carried", "named", "carried"]


def test_a_vertebra_without_a_level_is_of_the_last_level_named() -> None:
    assert statuses("Vertebral heights are preserved.") == {"thoracic vertebrae": "normal"}
    assert set(statuses("Collapse of L3. The vertebral canal is narrowed.")) == {"lumbar vertebrae"}


def test_findings_and_impression_are_kept_apart() -> None:
    text = "Findings: The liver is enlarged. Normal spleen.\n\nImpression: Hepatomegaly."
    liver, spleen = read(text).anatomies
    assert (liver.anatomy, liver.status, spleen.anatomy) == ("liver", "abnormal", "spleen")
    assert [text[start:end] for start, end in liver.findings] == ["The liver is enlarged."]
    assert [text[start:end] for start, end in liver.impression] == ["Hepatomegaly."]
    assert spleen.impression == ()


def test_other_sections_are_not_read() -> None:
    text = "Indication: liver mass.\n\nTechnique: CT of the kidneys.\n\nFindings: Normal spleen."
    assert list(statuses(text)) == ["spleen"]


def test_statements_on_the_whole_report_name_no_anatomy() -> None:
    text = "Findings: Clear lungs.\n\nImpression: Normal examination. Clinical follow-up is recommended."
    found = read(text)
    assert list(statuses(text)) == ["lung"]
    assert [text[start:end] for start, end in found.negatives] == ["Normal examination."]
    assert [one.use for one in found.sentences] == ["named", "report", "report"]


def test_what_could_not_be_seen_is_neither_normal_nor_abnormal() -> None:
    text = "The mediastinum could not be evaluated optimally in this unenhanced examination. Normal heart."
    assert statuses(text) == {"heart": "normal"}
    assert read(text).sentences[0].use == "technique"


def statuses_of(text: str, *entities: Entity) -> list[str]:
    return [one.status for one in read(text, entities=entities).anatomies]


def test_entities_decide_before_cues() -> None:
    text = "The right lung is normal."
    said = entity("nodule", 4, 9, "possible")
    assert [one.status for one in read(text, entities=(said,)).anatomies] == ["abnormal"]
    nodule = entity("nodule", 2, 8, "present")
    assert statuses_of("A nodule without calcification in the lung.", nodule) == ["abnormal"]
    assert statuses_of("No nodule in the lung.", entity("nodule", 3, 9, "possible")) == ["normal"]
    device = entity("support_device", 4, 9, "present")
    assert [one.status for one in read(text, entities=(device,)).anatomies] == ["normal"]


def test_a_device_or_node_makes_no_organ_abnormal() -> None:
    assert statuses("Enlarged prevascular lymph nodes. Aorta normal.") == {"lymph nodes": "abnormal", "aorta": "normal"}


def test_empty_and_unread_documents() -> None:
    for text in ("", " ", ".", "\n\n"):
        assert read(text) == Survey(anatomies=(), elsewhere=(), sentences=(), negatives=())
    assert survey("Normal heart.", (), [(0, 13)], (), "en").anatomies == ()


PIECES = (
    "the liver ", "heart ", "Côté ", "côte ", "no ", ", ", "and ", "is ", "İ", "ﬁ", "œ", "\u0301", "T12 ", ". ", '"',
    "1.5 ", "adjacent to ", "but ", "\n\n", "Impression: ",
)  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.sampled_from(["en", "fr", "unknown"]))
@settings(max_examples=150, deadline=None)
def test_spans_lie_within_their_sentence_whatever_the_text(text: str, language: Language) -> None:
    found = read(text, language)
    spans = [one.span for one in found.sentences]
    for place in found.anatomies + found.elsewhere:
        assert place.findings or place.impression
        for start, end in place.findings + place.impression:
            assert any(first <= start < end <= last for first, last in spans)
            assert any(character.isalnum() for character in text[start:end])
    assert found.anatomies == tuple(sorted(found.anatomies, key=lambda one: ANATOMIES.index(one.anatomy)))
    assert all(isinstance(one, AnatomyText) for one in found.anatomies)
