"""The learned layer of de-identification: what it adds to the rules, what it lets go, and which weights it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards.reports.identity.patterns as patterns
import shards.reports.identity.tagger as tagger
from shards.errors import ConfigError
from shards.reports.identity.detector import Detector
from shards.reports.identity.view import Identifier, Kind, view_of
from tests.shards.reports.rules import RULES

PROSE = (
    "L'échographie abdominale retrouve une masse hypoéchogène du foie droit, sans dilatation des voies biliaires.",
    "Le Doppler cardiaque montre une insuffisance mitrale modérée, la fraction d'éjection est de 55 %.",
    "Patient sous Kardégic et Lasilix, tension artérielle 130/80, glycémie à 1,2 g/l, plaquettes 210 000.",
    "Fracture de Pouteau-Colles, traitement orthopédique par plâtre pendant six semaines avec bonne évolution.",
)


def found_alone(text: str) -> tuple[Identifier, ...]:
    view = view_of(text)
    tagger.find(view, "fr")
    return tuple(view.identifiers)


def covered(text: str, found: tuple[Identifier, ...], words: str) -> bool:
    """Whether every word of `words` lies in an identifier."""
    return all(
        any(one.start <= text.index(word) and text.index(word) + len(word) <= one.end for one in found)
        for word in words.split()
    )


@pytest.mark.parametrize(
    ("text", "identifiers"),
    [
        ("Cordialement,\nTolvane BRUSQUETEAU\nService de cardiologie\nTél : 01 45 22 18 90", "Tolvane BRUSQUETEAU"),
        (
            "patiente : malvine trégastou née le 3 mai 1961, adressée par le docteur orsanne",
            "malvine trégastou orsanne",
        ),
        ("Radiologues : K. Nguyenthi, O. Adebayowale, Z. Szczepkowiak", "Nguyenthi Adebayowale Szczepkowiak"),
        (
            "Mme Oyelaranmi Folasade a été hospitalisée le 12/03/2019 au CH de Pontravel",
            "Oyelaranmi Folasade Pontravel",
        ),
        ("Identité : DUMOULAN Clémane\nDDN : 14/02/1950\nIPP : 8004417239", "DUMOULAN Clémane 8004417239"),
    ],
)
def test_names_that_no_list_knows(text: str, identifiers: str) -> None:
    assert covered(text, Detector().find(text, "fr"), identifiers)


def test_the_default_detector_has_the_tagger() -> None:
    text = "patiente : malvine trégastou née le 3 mai 1961, adressée par le docteur orsanne"
    assert covered(text, Detector().find(text, "fr"), "malvine trégastou orsanne")
    assert not covered(text, RULES.find(text, "fr"), "malvine trégastou orsanne")


def test_parts_of_one_identifier_are_one_span() -> None:
    text = "patiente : Malvine Trégastou née le 3 mai 1961"
    start = text.index("Malvine")
    view = view_of(text)
    view.note(start, start + len("Malvine"), "patient_name", "gazetteer")
    spans = tagger.spans_of(text)
    scores = np.zeros((len(spans), 1 + len(tagger.KINDS)), dtype=np.int32)
    scores[:, 0] = 500
    scores[2, 1 + tagger.KINDS.index("person_name")] = 1000
    tagger.load(tagger.WEIGHTS).decide(view, spans, scores, np.zeros(len(spans), dtype=np.int32))
    assert [text[one.start : one.end] for one in view.identifiers] == ["Malvine", "Malvine Trégastou"]


def test_prose_of_medicine_is_kept() -> None:
    for text in PROSE:
        assert found_alone(text) == ()


@pytest.mark.parametrize(
    "text", ["Selon Trebaud K, Ozwell P., Quintrec B et al.", "Reçoit Zelbutimab 45 mg et Xarnolib 2,5 g."]
)
def test_cited_authors_and_drugs_before_a_dose_are_kept(text: str) -> None:
    spans = tagger.spans_of(text)
    scores = np.zeros((len(spans), 1 + len(tagger.KINDS)), dtype=np.int32)
    scores[:, 0] = 500
    for index, (start, _) in enumerate(spans):
        scores[index, 1] = 1000 * text[start].isupper() * (text[start : start + 5] not in ("Selon", "Reçoi"))
    view = view_of(text)
    tagger.load(tagger.WEIGHTS).decide(view, spans, scores, np.zeros(len(spans), dtype=np.int32))
    assert not view.identifiers


def test_other_languages_are_left_to_the_rules() -> None:
    text = "The patient Tolvane BRUSQUETEAU was seen by K. Nguyenthi on 12/03/2019."
    for language in ("en", "unknown"):
        view = view_of(text)
        tagger.find(view, language)
        assert not view.identifiers
    french = view_of("Copie au confrère de la clinique pour le suivi :\nTolvane BRUSQUETEAU")
    tagger.find(french, "unknown")
    assert french.identifiers


def test_one_doubtful_word_of_a_rule_is_let_go_and_a_longer_find_is_not() -> None:
    text = PROSE[0]
    start = text.index("foie")
    lone = Identifier(start=start, end=start + 4, kind="person_name", layer="gazetteer")
    long = Identifier(start=0, end=start + 10, kind="person_name", layer="gazetteer")
    known = Identifier(start=start, end=start + 4, kind="patient_name", layer="patient")
    for one, kept in ((lone, []), (long, [long]), (known, [known])):
        view = view_of(text)
        view.identifiers.append(one)
        tagger.find(view, "fr")
        assert view.identifiers == kept


def test_a_name_that_a_word_announces_is_not_let_go() -> None:
    text = PROSE[0]
    start = text.index("foie")
    view = view_of(text)
    view.identifiers.append(Identifier(start=start, end=start + 4, kind="person_name", layer="gazetteer"))
    view.announced.add(start)
    tagger.find(view, "fr")
    assert len(view.identifiers) == 1


@pytest.mark.parametrize("text", ["Mutuelle : aucune", "RAMQ : inconnu", "stations 9L et libres", "loi 2011-814"])
def test_labels_short_numbers_and_references_are_not_added(text: str) -> None:
    view = view_of(text)
    patterns.find(view)
    spans = tagger.spans_of(text)
    scores = np.zeros((len(spans), 1 + len(tagger.KINDS)), dtype=np.int32)
    scores[:, 0] = 500
    for index, (start, end) in enumerate(spans):
        written = text[start:end]
        scores[index, 1 + tagger.KINDS.index("id" if any(map(str.isdigit, written)) else "person_name")] = 2000 * (
            written in ("Mutuelle", "RAMQ", "9L", "2011", "814")
        )
    tagger.load(tagger.WEIGHTS).decide(view, spans, scores, np.zeros(len(spans), dtype=np.int32))
    assert not view.identifiers


@pytest.mark.parametrize(
    ("text", "word", "kind", "kept"),
    [
        ("Rappel des Ateliers de mars", "Ateliers", "person_name", False),
        ("antécédent de derma connu", "derma", "person_name", False),
        ("une norme KVRTZ en cours", "KVRTZ", "city", False),
        ("Patients Discutés hier", "Discutés", "person_name", False),
        ("Profession : Zelbutin", "Zelbutin", "person_name", False),
        ("ligne 03 du tableau", "03", "date", False),
        ("Nom : Zelbutin", "Zelbutin", "person_name", True),
        ("hier Zelbutin est venu", "Zelbutin", "person_name", True),
    ],
)
def test_words_unlike_names_take_more_to_be_added(text: str, word: str, kind: Kind, kept: bool) -> None:
    made = tagger.load(tagger.WEIGHTS)
    spans = tagger.spans_of(text)
    start = text.index(word)
    scores = np.zeros((len(spans), 1 + len(tagger.KINDS)), dtype=np.int32)
    scores[:, 0] = 2000
    scores[spans.index((start, start + len(word))), 1 + tagger.KINDS.index(kind)] += 2000 + made.unlike - 1
    view = view_of(text)
    made.decide(view, spans, scores, np.zeros(len(spans), dtype=np.int32))
    assert [text[one.start : one.end] for one in view.identifiers] == ([word] if kept else [])


def test_the_year_of_a_publication_is_no_date() -> None:
    text = "Selon Roy A. et al., Methods Inf Med. 2024 ; vu avec Roy et al. en 2019"
    assert [text[one.start : one.end] for one in RULES.find(text, "fr") if one.kind == "date"] == ["2019"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("aé Dr.MmeNXx\n:,-'0123/@|ÀŒßﬁ²Ⅷ中\u0301\u200b"), max_size=60))
def test_spans_cover_whole_words_and_repeat(text: str) -> None:
    found = found_alone(text)
    assert found == found_alone(text)
    for one in found:
        assert 0 <= one.start < one.end <= len(text)
        assert text[one.start].isalnum() and text[one.end - 1].isalnum()
        assert not re.match(r"[^\W_]", text[one.end : one.end + 1])
        assert one.start == 0 or not re.match(r"[^\W_]", text[one.start - 1])


def test_weights_come_back_the_same(tmp_path: Path) -> None:
    made = tagger.load(tagger.WEIGHTS)
    for name in ("one.npz", "two.npz"):
        tagger.save(tmp_path / name, made)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    again = tagger.load(tmp_path / "one.npz")
    assert np.array_equal(again.weights, made.weights) and again.vocabulary == made.vocabulary
    assert all(getattr(again, name) == getattr(made, name) for name in tagger.THRESHOLDS)


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "other shape", "other features"])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.npz"
    raw = bytearray(tagger.WEIGHTS.read_bytes())
    if damage == "short":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 255
        path.write_bytes(raw)
    elif damage != "missing":
        with np.load(tagger.WEIGHTS) as arrays:
            held = dict(arrays)
        if damage == "other shape":
            held["weights"] = held["weights"][:-1]
        else:
            held["numbers"] = held["numbers"] + 1
        np.savez(path, **held)
    with pytest.raises(ConfigError, match=r"weights\.npz.*identity_tagger"):
        tagger.load(path)


def test_names_of_the_lists_are_no_context_words() -> None:
    from shards.reports.identity.gazetteers import Word, gazetteer

    flags = gazetteer().flags
    for word in tagger.load(tagger.WEIGHTS).vocabulary:
        flag = flags.get(word, 0)
        assert flag & Word.COMMON or not flag & tagger.NAMES_ONLY
