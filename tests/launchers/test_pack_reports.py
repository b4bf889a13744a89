"""pack.py --reports structured: raw text passes the pipeline, prepared reports are joined, nothing raw gets in."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from launchers import pack, prepare_reports
from shards.manifest import Manifest
from shards.reports import pipeline
from tests.shards.sources import encoded
from tests.shards.test_dicom import PRIVATE, write

SECRET = b"0123456789abcdef0123456789abcdef"
UID = "1.2.826.0.1.3680043.8.498.77"
MAPPING = """
table = "t.csv"
[columns]
file = "file"
patient = "mrn"
study = "study"
{labels}
{report}
[known]
last_names = ["surname"]
birth_date = "born"
"""
REPORT = '[report]\nfindings = "text"'
LABELS = '[labels.columns.Nodule]\ncolumn = "nodule"\n[labels.columns."Pleural Effusion"]\ncolumn = "effusion"'
ROWS = [
    ("a.jpg", "MRN-4411", "s1", "Mr Quintrell. Small left pleural effusion.", "Quintrell", "03/02/1931", 1, 0),
    ("b.jpg", "MRN-4411", "s2", "No pleural effusion. Compared with 12/05/2019.", "Quintrell", "03/02/1931", 0, ""),
    ("c.jpg", "MRN-5512", "s3", "\1\2\3\4\5 Zwingmann", "Zwingmann", "", 1, 1),
    ("d.jpg", "MRN-5512", "s4", "", "Zwingmann", "", 1, ""),
]  # fmt: skip
HIDDEN = ("Quintrell", "Zwingmann", "MRN-", "12/05/2019", SECRET.decode())


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "site.key"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


def folder(tmp_path: Path, *, labels: str = LABELS, report: str = REPORT) -> Path:
    result = tmp_path / "input"
    result.mkdir(exist_ok=True)
    lines = ["file,mrn,study,text,surname,born,nodule,effusion"]
    lines += [",".join(str(cell) for cell in row) for row in ROWS]
    (result / "t.csv").write_text("\n".join(lines) + "\n")
    for number, row in enumerate(ROWS):
        (result / row[0]).write_bytes(encoded(number))
    (result / "mapping.toml").write_text(MAPPING.format(labels=labels, report=report))
    return result


def run(*words: object) -> int:
    return pack.main([str(word) for word in words])


def pack_table(tmp_path: Path, key: Path, output: str, *more: object, **mapping: str) -> int:
    common = ("--source", "table", "--input", folder(tmp_path, **mapping), "--key-file", key, "--workers", 1)
    return run(*common, "--fractions", "train=1", "--output", tmp_path / output, *more)


def records(output: Path) -> dict[str, dict[str, Any]]:
    """Report text, or "" -> record."""
    found = []
    for path in output.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if member.name.endswith(".json") and content is not None:
                    found.append(json.load(content))
    return {" ".join(record["report"].values()): record for record in found}


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_table_text_passes_the_pipeline(tmp_path: Path, key: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pack_table(tmp_path, key, "out", "--reports", "structured") == 0
    shown = "".join(capfd.readouterr())
    written = b"".join(files(tmp_path / "out").values()).decode("latin-1")
    assert not any(word in written or word in shown for word in HIDDEN)
    manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest.samples == 4 and sum(manifest.refused.values()) == 1
    (reason,) = manifest.refused
    assert reason.startswith("report: cleaning: ") and "binary" in reason
    assert manifest.fields["report"] == 2 and manifest.fields["entities"] == 2
    assert manifest.fields["anatomy_status"] == manifest.fields["distilled"] == 2 and "boxes" not in manifest.fields
    assert manifest.labels[:2] == ("Nodule", "Pleural Effusion") and "Pneumothorax" in manifest.labels
    found = records(tmp_path / "out")
    assert {name for record in found.values() for name in record["labels"]} <= set(manifest.labels)
    effusion = next(record for text, record in found.items() if "left pleural effusion" in text)
    assert effusion["labels"]["Pleural Effusion"] == 0  # what the table says goes before what was read
    assert effusion["deidentifier"] == pipeline.DEIDENTIFIER and effusion["language"] == "en"
    assert effusion["entities"][0]["concept"] == "pleural_effusion"
    assert effusion["provenance"]["extractor"] == pipeline.RULES
    absent = next(record for text, record in found.items() if text.startswith("No pleural"))
    assert absent["labels"]["Pleural Effusion"] == 0  # where the table is silent, the report speaks


def test_replays_give_identical_bytes(tmp_path: Path, key: Path) -> None:
    for output, workers in (("a", 1), ("b", 2)):
        assert pack_table(tmp_path, key, output, "--reports", "structured", "--workers", workers) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_raw_text_is_refused(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack_table(tmp_path, key, "out") == 2
    error = capsys.readouterr().err
    assert "--reports structured" in error and "--deidentified 'HOW'" in error
    assert not (tmp_path / "out").exists()


def test_study_without_text_and_labels_is_refused(tmp_path: Path, key: Path) -> None:
    assert pack_table(tmp_path, key, "out", "--reports", "structured", labels="") == 0
    manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest.samples == 2 and sum(manifest.refused.values()) == 2


def prepared(tmp_path: Path, key: Path, name: str, *more: str) -> Path:
    output = tmp_path / name
    columns = ["--study", "study", "--patient", "mrn", "--text", "findings=text", "--last-names", "surname"]
    command = ["--input", str(folder(tmp_path) / "t.csv"), "--output", str(output), *columns, "--birth-date", "born"]
    command += ["--key-file", str(key), "--workers", "1", "--failed-max", "0.6", *more]
    assert prepare_reports.main(command) == 0
    return output


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_prepared_reports_give_the_same_records(name: str, tmp_path: Path, key: Path) -> None:
    file = prepared(tmp_path, key, name)
    assert pack_table(tmp_path, key, "joined", "--reports", "structured", file, report="") == 0
    assert pack_table(tmp_path, key, "inside", "--reports", "structured") == 0
    inside, joined = records(tmp_path / "inside"), records(tmp_path / "joined")
    assert joined == inside and len(joined) == 3
    manifest = Manifest.from_bytes((tmp_path / "joined" / "manifest.json").read_bytes())
    assert manifest.refused == {"report: not among the prepared ones": 2}


def test_changed_or_foreign_prepared_reports_are_refused(
    tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = prepared(tmp_path, key, "p.jsonl")
    whole = file.read_text()
    file.write_text(whole.replace("left pleural", "right pleural"))
    assert pack_table(tmp_path, key, "out", "--reports", "structured", file, report="") == 2
    assert "seal does not fit" in capsys.readouterr().err
    file.write_text(whole)
    key.write_bytes(SECRET[::-1])
    assert pack_table(tmp_path, key, "out", "--reports", "structured", file, report="") == 2
    error = capsys.readouterr().err
    assert "made with another --key-file" in error and "effusion" not in error
    file.write_text('{"study": "s1", "report": {"findings": "Mr Quintrell"}, "seal": "0"}\n')
    assert pack_table(tmp_path, key, "out", "--reports", "structured", file, report="") == 2
    error = capsys.readouterr().err
    assert "no prepared report" in error and "Quintrell" not in error


def test_prepared_reports_with_other_labels(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prepared(tmp_path, key, "p.jsonl")
    words = ("--reports", "structured", file, "--labels", "ct_rate18")
    assert pack_table(tmp_path, key, "out", *words, report="") == 2
    assert "--labels ct_rate18: the reports of" in capsys.readouterr().err


def test_prepared_reports_of_other_studies(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prepared(tmp_path, key, "p.jsonl", "--study", "file")
    assert pack_table(tmp_path, key, "out", "--reports", "structured", file, report="") == 2
    assert "none of its studies is in --input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "report", "message"),
    [
        (["structured"], "", "the mapping names no column of report text"),
        (["structured"], '[report]\nremarks = "text"', "no section is called 'remarks'"),
        (["structured", "t.csv"], REPORT, "a table names its columns of text in the mapping"),
        (["structured", "a", "b"], REPORT, "write `structured`, `structured FILE` or `FILE`"),
        (["structured", "PREPARED"], REPORT, "leave [report] out of it, or the file"),
    ],
)
def test_bad_options(
    words: list[str], report: str, message: str, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(prepared(tmp_path, key, "p.jsonl")) if word == "PREPARED" else word for word in words]
    capsys.readouterr()
    assert pack_table(tmp_path, key, "out", "--reports", *words, report=report) == 2
    assert message in capsys.readouterr().err


class TestDicom:
    TEXT = "Isolde Verheyen, born 03.02.1931, MRN-4711-X, asked by Dr Grau. FINDINGS: Small left pleural effusion."

    def pack(self, tmp_path: Path, key: Path, output: str, *more: object) -> int:
        write(tmp_path / "in" / "a")
        (tmp_path / "reports.csv").write_text(f'study,report\n{UID},"{self.TEXT}"\n')
        common = ("--source", "dicom", "--input", tmp_path / "in", "--key-file", key, "--workers", 1)
        return run(*common, "--fractions", "train=1", "--output", tmp_path / output, *more)

    def test_header_facts_are_looked_for_in_the_text(
        self, tmp_path: Path, key: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert self.pack(tmp_path, key, "out", "--reports", "structured", tmp_path / "reports.csv") == 0
        written = b"".join(files(tmp_path / "out").values()).decode("latin-1") + "".join(capfd.readouterr())
        names = [part for name in PRIVATE.values() for part in name.split("^")]
        assert not any(name in written for name in (*names, "03.02.1931"))
        (record,) = records(tmp_path / "out").values()
        assert record["report"]["findings"] == "Small left pleural effusion."
        assert record["labels"]["Pleural Effusion"] == 1
        assert record["deidentifier"] == f"dicom headers dropped 2; text: {pipeline.DEIDENTIFIER}"
        manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
        assert "Pleural Effusion" in manifest.labels

    def test_raw_text_is_refused(self, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.pack(tmp_path, key, "out", "--reports", tmp_path / "reports.csv") == 2
        assert "--reports structured" in capsys.readouterr().err
        assert self.pack(tmp_path, key, "out", "--reports", "structured") == 2
        assert "name the table of the reports" in capsys.readouterr().err

    def test_prepared(self, tmp_path: Path, key: Path) -> None:
        assert self.pack(tmp_path, key, "inside", "--reports", "structured", tmp_path / "reports.csv") == 0
        (tmp_path / "raw.csv").write_text(f'study,patient,report\n{UID},MRN-4711-X,"{self.TEXT}"\n')
        output = tmp_path / "p.jsonl"
        command = ["--input", tmp_path / "raw.csv", "--output", output, "--key-file", key, "--workers", 1]
        assert prepare_reports.main([str(word) for word in command]) == 0
        assert self.pack(tmp_path, key, "joined", "--reports", "structured", output) == 0
        (inside,), (joined,) = (list(records(tmp_path / name).values()) for name in ("inside", "joined"))
        assert joined["labels"] == inside["labels"] and joined["entities"] == inside["entities"]


def test_prepared_reports_of_other_patients(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused at once where none fits, else one by one: a report must not meet the images of somebody else."""
    file = prepared(tmp_path, key, "p.jsonl", "--patient", "surname")
    assert pack_table(tmp_path, key, "out", "--reports", "structured", file, report="") == 2
    assert "belong to other patients here" in capsys.readouterr().err
    own, other = (path.read_bytes().splitlines(True) for path in (prepared(tmp_path, key, "own.jsonl"), file))
    file.write_bytes(own[0] + other[1])
    assert pack_table(tmp_path, key, "out", "--reports", "structured", file, report="") == 0
    manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest.refused["report: prepared for another patient"] == 1 and manifest.fields["report"] == 1
