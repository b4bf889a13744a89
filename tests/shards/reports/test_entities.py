from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.reports.entities import Entity, entities
from shards.reports.lexicon import terms
from shards.reports.lexicon.terms import Entry, Trie, concepts, cut, stem, stemmed, vocabulary


def read(sentence: str, language: str = "en") -> tuple[Entity, ...]:
    return entities(sentence, [(0, len(sentence))], language)


def told(sentence: str) -> dict[str, str]:
    return {entity.concept: entity.status for entity in read(sentence)}


STATUS = {
    # lists, and what ends a denial
    "No pneumothorax, effusion or consolidation.": "pneumothorax- pleural_effusion- consolidation-",
    "Neither pneumothorax nor effusion is seen.": "pneumothorax- pleural_effusion-",
    "There is no effusion, but there is a small right pneumothorax.": "pleural_effusion- pneumothorax+",
    "No consolidation is seen and the heart is enlarged.": "consolidation- cardiomegaly+",
    "The heart is enlarged and no effusion is seen.": "cardiomegaly+ pleural_effusion-",
    "No evidence of pneumonia; small left effusion.": "pneumonia- pleural_effusion+",
    "No pneumothorax, small left effusion.": "pneumothorax- pleural_effusion+",
    "No pneumothorax, small or large effusion.": "pneumothorax- pleural_effusion-",
    "No edema with bilateral effusions.": "pulmonary_edema- pleural_effusion+",
    "No opacity suggestive of pneumonia, and a small effusion is seen.": "lung_opacity- pneumonia- pleural_effusion+",
    "No consolidation, the heart is enlarged.": "consolidation- cardiomegaly+",
    "Possible pneumonia and a small effusion.": "pneumonia? pleural_effusion+",
    "No sign of a pneumothorax and an effusion.": "pneumothorax- pleural_effusion-",
    "No pneumothorax, a nodule or an effusion.": "pneumothorax- nodule- pleural_effusion-",
    "No thickening of pleura and the pericardium.": "pleural_thickening- pericardial_thickening-",
    "Stable cardiomegaly and no edema.": "cardiomegaly+ pulmonary_edema-",
    "No abnormality apart from a hiatal hernia.": "abnormality- hiatal_hernia+",
    "The lungs are clear of consolidation, effusion, or edema.": "consolidation- pleural_effusion- pulmonary_edema-",
    # a denied finding and what it would speak for
    "No filling defect in favor of thrombus and mass was seen.": "pulmonary_embolism- mass-",
    "No nodule or opacity suspicious for pneumonia and mass.": "nodule- lung_opacity- pneumonia- mass-",
    "No nodule compatible with metastasis and mass.": "nodule- metastasis- mass-",
    "No pneumothorax, opacity suggestive of pneumonia.": "pneumothorax- lung_opacity- pneumonia?",
    "Opacity in favor of pneumonia and mass.": "lung_opacity+ pneumonia? mass?",
    # after the finding
    "Pleural effusion is not seen.": "pleural_effusion-",
    "Pericardial effusion-thickening was not observed.": "pericardial_effusion- pericardial_thickening-",
    "The previously seen left effusion has resolved.": "pleural_effusion-",
    "Pneumothorax: none.": "pneumothorax-",
    "Pleural effusion: no.": "pleural_effusion-",
    "Interval removal of the chest tube.": "support_device-",
    # words that look like denials
    "No change in the left pleural effusion.": "pleural_effusion+",
    "No significant interval change of the pneumothorax.": "pneumothorax+",
    "Not only cardiomegaly but also edema.": "cardiomegaly+ pulmonary_edema+",
    "The effusion has not resolved.": "pleural_effusion+",
    "A nodule is seen, not seen on prior study.": "nodule+",
    # doubt
    "Pneumonia cannot be excluded.": "pneumonia?",
    "Cannot exclude a small pneumothorax.": "pneumothorax?",
    "CT is recommended to rule out pulmonary embolism.": "pulmonary_embolism?",
    "Opacity may represent atelectasis or pneumonia.": "lung_opacity+ atelectasis? pneumonia?",
    "Scarring or atelectasis in the left base.": "scarring? atelectasis?",
    "Nodule in the left lung (metastasis?).": "nodule+ metastasis?",
    "No opacity to suggest pneumonia.": "lung_opacity- pneumonia-",
    "No evidence suggestive of pneumonia.": "pneumonia-",
    "Findings consistent with pneumonia.": "pneumonia+",
    # normal and not normal
    "Heart size is normal.": "cardiomegaly-",
    "The heart and mediastinum are unremarkable.": "cardiomegaly- enlarged_cardiomediastinum-",
    "The heart is not enlarged.": "cardiomegaly-",
    "Heart size is at the upper limits of normal.": "cardiomegaly-",
    # changes find their part
    "No pleural or pericardial effusion.": "pleural_effusion- pericardial_effusion-",
    "Enlarged mediastinal and hilar lymph nodes.": "lymphadenopathy+",
    "No lymph node in pathological size and appearance.": "lymphadenopathy-",
    "Lymph nodes that did not reach pathological size.": "lymph_node+",
    "Calcified plaques are observed in the aorta and coronary arteries.": "arterial_calcification+ "
    "coronary_calcification+",
    "Nodules in the thyroid gland.": "other_nodule+",
    "Thickening of the interlobular septa.": "septal_thickening+",
    # not of this examination, or of no image
    "History of pneumothorax.": "",
    "Bony overlap could obscure a small nodule.": "",
    "The parenchyma is normal and no nodular or infiltrative lesion is detected.": "abnormality- infiltrate-",
}


@pytest.mark.parametrize("sentence", STATUS)
def test_status(sentence: str) -> None:
    sign = {"present": "+", "absent": "-", "possible": "?"}
    found = {concept + sign[status] for concept, status in told(sentence).items()}
    assert found == set(STATUS[sentence].split())


@pytest.mark.parametrize(
    ("sentence", "places"),
    [
        ("Small right apical pneumothorax.", {"pneumothorax": ("right", "apex")}),
        ("Blunting of the left costophrenic angle.", {"costophrenic_blunting": ("left", "costophrenic angle")}),
        (
            "Small left effusion with adjacent atelectasis at the right base.",
            {"pleural_effusion": ("left", ""), "atelectasis": ("right", "base")},
        ),
        ("Bilateral effusions, right greater than left.", {"pleural_effusion": ("bilateral", "")}),
        (
            "No fracture or dislocation of the left knee.",
            {"fracture": ("left", "knee"), "dislocation": ("left", "knee")},
        ),
        ("Nodule in the right upper lobe.", {"nodule": ("right", "upper lobe")}),
    ],
)
def test_places(sentence: str, places: dict[str, tuple[str, str]]) -> None:
    assert {entity.concept: (entity.laterality, entity.position) for entity in read(sentence)} == places


def test_spans_are_words_of_the_document_and_descriptors_stand_before_them() -> None:
    text = "Lungs are low. There is a moderate left pleural effusion.  ÉTAT: İ ground-glass opacities."
    spans = [(0, 14), (15, 57), (59, len(text))]
    found = entities(text, spans, "en")
    assert [(text[e.start : e.end], e.sentence) for e in found] == [
        ("pleural effusion", 1),
        ("ground-glass opacities", 2),
    ]
    assert found[0].descriptor is not None
    assert text[slice(*found[0].descriptor)] == "moderate left"


def test_each_sentence_is_read_for_itself() -> None:
    text = "No effusion. Pneumothorax."
    assert [e.status for e in entities(text, [(0, 12), (13, 26)], "en")] == ["absent", "present"]


# Cues, findings, marks and letters that change their length in lower case or stand in two characters.
PIECES = [
    *("no", "not", "without", "cannot", "exclude", "is", "are", "seen", "and", "or", "effusion", "pleural", "heart"),
    *("enlarged", "normal", "sans", "pas", "d'", "ni", "épanchement", "œdème", "XXXX", "12", "mm", "left", "gauche"),
    *(",", ";", ".", "?", "(", ")", "-", "\n\n", "\x00", "ﬁ", "İ", "e\u0301", "’", "“"),
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(PIECES),
            st.text(max_size=6),
        ),
        max_size=25,
    ),
    st.sampled_from(["en", "fr", "unknown"]),
)
def test_any_text_gives_sound_entities(words: list[str], language: str) -> None:
    text = " ".join(words)
    for entity in read(text, language):
        assert 0 <= entity.start < entity.end <= len(text)
        assert entity.concept in concepts()
        assert entity.status in ("present", "absent", "possible")
        if entity.descriptor is not None:
            assert 0 <= entity.descriptor[0] < entity.descriptor[1] <= entity.start


def test_nothing_of_a_report_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        read("Zyxwvut effusion, no pneumothorax.")
    assert "zyxwvut" not in caplog.text.lower()


def test_empty_text_and_empty_sentences() -> None:
    assert entities("", [], "en") == ()
    assert entities("   ", [(0, 3), (1, 1)], "fr") == ()


# ---------------------------------------------------------------- the lexicon


def test_no_phrase_is_two_findings() -> None:
    tables = terms._read("findings.toml")
    for language in ("en", "fr"):
        owner: dict[tuple[str, ...], str] = {}
        for kind in ("finding", "change"):
            for name, table in tables[kind].items():
                for phrase in table[language]:
                    for wording in terms._expand(phrase):
                        stems = tuple(stemmed(cut(wording), language).stems)
                        assert owner.setdefault(stems, name) == name, (language, wording)


def test_every_phrase_is_found_in_its_own_words() -> None:
    for language in ("en", "fr"):
        words = vocabulary(language)
        for name, table in terms._read("findings.toml")["finding"].items():
            for phrase in table[language]:
                wording = next(terms._expand(phrase))
                matches = words.terms.find(stemmed(cut(wording), language).stems)
                assert [match.term.finding for match in matches] == [name], (language, wording)


def test_changes_name_parts_that_exist() -> None:
    tables = terms._read("findings.toml")
    known = set(tables["part"]) | {change.get("also_part") for change in tables["change"].values()}
    for change in tables["change"].values():
        assert known.issuperset(change.get("of", {}))


@pytest.mark.parametrize(
    ("one", "other", "language"),
    [
        ("effusions", "effusion", "en"),
        ("opacities", "opacity", "en"),
        ("masses", "mass", "en"),
        ("vertebrae", "vertebra", "en"),
        ("oedema", "edema", "en"),
        ("pleuraux", "pleural", "fr"),
        ("pleurale", "pleural", "fr"),
        ("œdèmes", "oedeme", "fr"),
        ("visualisées", "visualisé", "fr"),
    ],
)
def test_stems_join_the_forms_of_a_word(one: str, other: str, language: terms.Language) -> None:
    assert stem(one, language) == stem(other, language)


def test_a_rib_is_no_side() -> None:
    assert stem("côte", "fr") != stem("côté", "fr")


def test_trie_takes_the_longest_phrase_and_refuses_bad_ones() -> None:
    trie = Trie([("pleural effusion", Entry("finding", "a")), ("effusion", Entry("finding", "b"))], "en", {})
    found = trie.find(["left", "pleural", "effusion", "effusion", "pleural"])
    assert [(match.first, match.last, match.term.finding) for match in found] == [(1, 2, "a"), (3, 3, "b")]
    with pytest.raises(ConfigError, match="nested"):
        Trie([("(a (b|c)|d) e", Entry("finding", "a"))], "en", {})
    with pytest.raises(ConfigError, match="no word"):
        Trie([("the", Entry("finding", "a"))], "en", {})


def test_remembered_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = terms._Stems("en")
    monkeypatch.setattr(terms._Stems, "LIMIT", 10)
    for number in range(50):
        assert known[f"word{number}"] == f"word{number}"
        assert len(known) <= 10
