"""Models beside the rules: stand-ins, and the real ones where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launchers import prepare_reports
from shards.errors import ConfigError
from shards.reports.identity.plugin import Models, Recogniser, presidio_recogniser
from shards.reports.identity.view import Identifier
from shards.reports.pipeline import WHOLE, Config, Pipeline, RawReport
from shards.reports.prepared import PreparedReport


class Told(Models):
    """Takes "marker" for a name."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"told": 1}

    def recognisers(self) -> tuple[Recogniser, ...]:
        def recognise(text: str, language: str) -> list[Identifier]:
            start = text.find("marker")
            return [Identifier(start=start, end=start + 6, kind="person_name", layer="plugin")]

        return (recognise,)


def test_a_model_replaces_what_the_rules_leave() -> None:
    report = RawReport(study="a" * 32, patient="b" * 32, texts={WHOLE: "FINDINGS: Effusion beside the marker."})
    for ner, kept in ((None, True), (Told(), False)):
        config = Config(ner=ner)
        (result,), counts = Pipeline(config, b"0123456789abcdef").prepare([report])
        assert isinstance(result, PreparedReport) and ("marker" in result.report["findings"]) is kept
        assert ("ner" in config.settings) is not kept and counts["layers/plugin"] == (not kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ner-presidio", "french"), "write e.g. fr=fr_core_news_sm"),
        (("--ner-presidio", "fr=no_such_pipeline"), "--ner-presidio"),
        (("--ner-edsnlp", "nowhere"), "--ner-edsnlp"),
    ],
)
def test_what_is_not_installed_is_said_at_once(
    words: tuple[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("study,patient,report\n1,2,Normal.\n")
    common = ["--public", "--workers", "1", "--input", str(tmp_path / "t.csv")]
    assert prepare_reports.main([*common, "--output", str(tmp_path / "o.jsonl"), *words]) == 2
    assert message in capsys.readouterr().err and sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]


@pytest.mark.slow
def test_presidio_finds_names_and_leaves_words_of_medicine() -> None:
    pytest.importorskip("presidio_analyzer")
    pytest.importorskip("fr_core_news_sm")
    recognise = presidio_recogniser({"fr": "fr_core_news_sm"})
    text = "CONCLUSION : Fracture du radius. Maladie de Paget. Vu par Bertrand Lefèvre à Namur."
    found = {text[one.start : one.end]: one.kind for one in recognise(text, "fr")}
    assert found == {"Bertrand Lefèvre": "person_name", "Namur": "city"}
    assert recognise(text, "en") == []


@pytest.mark.slow
def test_an_edsnlp_pipeline_from_disk(tmp_path: Path) -> None:
    edsnlp = pytest.importorskip("edsnlp")
    pipeline = edsnlp.blank("eds")
    pipeline.add_pipe("eds.matcher", config={"terms": {"NOM": ["Wolubilis"], "VILLE": ["Namur"], "OTHER": ["radius"]}})
    pipeline.to_disk(tmp_path / "model")
    (recognise,) = Models(edsnlp=tmp_path / "model").recognisers()
    text = "Fracture du radius, vue par Wolubilis à Namur."
    found = {text[one.start : one.end]: one.kind for one in recognise(text, "fr")}
    assert found == {"Wolubilis": "person_name", "Namur": "city"} and recognise(text, "en") == ()


def test_a_pipeline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ner-presidio"):
        Models(spacy=(("fr", "../x"),)).check()
