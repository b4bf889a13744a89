"""French cleaning: what goes, what stays, and nothing lost on published cases."""

from __future__ import annotations

import unicodedata
from itertools import groupby
from pathlib import Path

import pytest

from ci.bench.reports_deid import french_prose
from shards.reports import french
from shards.reports.pipeline import WHOLE, Config, Pipeline, PreparedReport, RawReport
from shards.reports.text import clean
from shards.tokenizer import load_tokenizer


def told(text: str) -> list[str]:
    return [text[start:end] for start, end in french.sentences(text)]


def put_back(cleaned: str, text: str, removed: tuple[french.Removal, ...]) -> str:
    pieces, taken, position = [], 0, 0
    for one in removed:
        kept = one.start - position
        pieces += [cleaned[taken : taken + kept], text[one.start : one.end]]
        taken, position = taken + kept, one.end
    return "".join([*pieces, cleaned[taken:]])


@pytest.mark.parametrize(
    ("text", "left", "rules"),
    [
        ("Genou droit [...] sans lésion.", "Genou droit sans lésion.", ["empty_blocks"]),
        ("Indication : [ ]\nPas de fracture. [___]", "Indication :\nPas de fracture.", ["empty_blocks"] * 2),
        ("[ ] fracture\n[x] arthrose", "[ ] fracture\n[x] arthrose", []),
        ("Entorse [grade 2] ancienne.", "Entorse [grade 2] ancienne.", []),
        ("Résultats : normal.\nConclusion :", "Résultats : normal.\n", ["empty_conclusions"]),
        ("Résultats : normal.\nConclusion : [...]\n", "Résultats : normal.\n", ["empty_conclusions"]),
        ("Conclusion : -\nRésultats : normal.", "Résultats : normal.", ["empty_conclusions"]),
        ("Résultats : normal.\nConclusion : RAS", "Résultats : normal.\nConclusion : RAS", []),
    ],
)
def test_what_is_empty_goes(text: str, left: str, rules: list[str]) -> None:
    found, removed = french.cleaned(text)
    assert found == left and [one.rule for one in removed] == rules
    assert put_back(found, text, removed) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pas de fracture. Arthrose !", ["Pas de fracture.", "Arthrose !"]),
        ("Ostéophyte de 2.5 mm. Vu le 3.4.2019.", ["Ostéophyte de 2.5 mm.", "Vu le 3.4.2019."]),
        ("Contrôle 12./03. Stable", ["Contrôle 12./03.", "Stable"]),
        ("Fracture ? Pas de déplacement.", ["Fracture ? Pas de déplacement."]),
        ("(Pas d'épanchement.) Normal... Fin", ["(Pas d'épanchement.)", "Normal...", "Fin"]),
        ("GENOU DROIT\n\nPincement interne\n\n---", ["GENOU DROIT", "Pincement interne\n\n---"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert told(text) == expected


def test_the_pipeline_removes_what_is_empty_and_counts_it() -> None:
    text = "RÉSULTATS : Pas de fracture du poignet gauche. [...] Arthrose débutante.\nCONCLUSION :"
    (report,), counts = Pipeline(Config(), b"0123456789abcdef").prepare(
        [RawReport(study="a", patient="b", texts={WHOLE: text})]
    )
    assert isinstance(report, PreparedReport)
    assert report.report == {"findings": "Pas de fracture du poignet gauche. Arthrose débutante."}
    assert counts["repairs/empty_blocks"] == counts["repairs/empty_conclusions"] == 1


def test_nothing_is_lost_of_published_cases(shared_data: Path) -> None:
    """Removals put back give the text; sentences and the blanks between are all of it; tokens hold each of them."""
    tokenizer = load_tokenizer(shared_data / "vocab" / "barthez_fr")
    texts = [clean(text).text for text in french_prose()]
    assert len(texts) > 100
    count = spelt = tokenised = 0
    for number, text in enumerate(texts):
        left, removed = french.cleaned(text)
        assert put_back(left, text, removed) == text
        spans = french.sentences(left)
        edges = [0, *(edge for span in spans for edge in span), len(left)]
        assert edges == sorted(edges)
        assert not "".join(left[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)).strip()
        count += len(spans)
        if number % 20:
            continue
        parts = told(left)
        rows = tokenizer.encode_parts([[(1, part) for part in parts]], 100_000)
        ids = rows.input_ids[0].tolist()[len(tokenizer.prefix) : -len(tokenizer.suffix) or None]
        sentences = [list(group) for is_end, group in groupby(ids, tokenizer.sep_id.__eq__) if not is_end]
        assert len(sentences) == len(parts)
        tokenised += len(parts)
        for tokens, part in zip(sentences, parts, strict=True):
            if tokenizer.unk_id in tokens:  # a character that the vocabulary cannot spell
                continue
            written = unicodedata.normalize("NFKC", part)  # as this vocabulary's normaliser does
            assert "".join(tokenizer.decode([tokens])[0].split()) == "".join(written.split())
            spelt += 1
    assert count > 10_000 and spelt > 0.95 * tokenised > 400
