"""pack.py --source archive: an export with faults of every kind becomes pairs or counted refusals, and names nobody."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from ci.data import archive_check, identity_search
from ci.data.hospital_export import FAULTS, LAYOUTS, Layout, make_export
from launchers import pack
from shards.ingest.archive import NO_LATERALITY, NO_SIDE_NO_PART, ArchiveOptions, _check
from shards.ingest.archive_reports import day_of
from shards.ingest.dicom_file import RefusedError
from shards.manifest import Manifest
from shards.reports import pipeline
from shards.reports.exam import is_of_other_part, is_paired, term_of
from shards.reports.identity import Deidentified

SECRET = b"0123456789abcdef0123456789abcdef"
OTHER_SECRET = b"fedcba9876543210fedcba9876543210"
STUDIES = 42
REASONS: dict[str, str | tuple[str, ...]] = {  # of each fault, one that must be counted
    "study without report": "study: no report of its patient and day",
    "report without study": "report: no study of its patient and day",
    "two reports one day": "report: several reports of one ",
    "two studies one day": "study: several studies of one ",
    "impossible date of report": "report: impossible date", "impossible date of study": "study: impossible date",
    "date before birth": "report: date before birth", "two languages": "report: two languages",
    "no text": ("report: no text", "report: cleaning: report is a PDF file"),  # of a scan, with or without pypdf
    "another language": "report: neither French nor English",
    "another part": "report: another part of the body than its study",
    "two patients in one folder": "study with views in a folder of two patients",
    "study of two patients": "study of two patients", "no laterality": "no laterality of a part that there are two of",
    "colour photograph": "colour image, RGB", "dose report": "no radiograph: Enhanced SR Storage",
    "page saved as picture": "no radiograph: Secondary Capture Image Storage", "no pixels": "truncated: no pixel data",
    "truncated": "truncated: fewer pixels than rows x columns", "no DICOM": "not a DICOM file",
}  # fmt: skip


def packed(tmp_path: Path, name: str, *more: object, secret: bytes = SECRET, workers: int = 1) -> Path:
    key = tmp_path / f"{name}.key"
    key.write_bytes(secret)
    key.chmod(0o600)
    words = ["--source", "archive", "--input", tmp_path / "export", "--key-file", key, "--output", tmp_path / name]
    assert pack.main([str(word) for word in (*words, "--workers", workers, "--shard-samples", 8, *more)]) == 0
    return tmp_path / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_is_in_a_sample_or_counted_and_no_identity_is_left(
    layout: Layout, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    export = make_export(tmp_path / "export", studies=STUDIES, layout=layout, faulty=0.5, size=40)
    output = packed(tmp_path, "set")
    logs = "".join(capfd.readouterr()) + caplog.text
    manifest = Manifest.from_bytes((output / "manifest.json").read_bytes())
    assert not archive_check.wrong_studies(export, output, SECRET)
    assert not archive_check.unaccounted(export, manifest)
    for fault in FAULTS:
        assert any(reason.startswith(REASONS[fault]) for reason in manifest.refused), fault
    audit = (output / "audit.md").read_text()
    assert "in the set or counted below: yes." in audit and str(manifest.key_fingerprint) in audit
    assert "| names of the patient |" in audit
    assert not identity_search.everywhere(output, logs, export.studies)
    assert not identity_search.beside_samples(output, logs, export.studies)
    if found := archive_check.suspects(export, identity_search.records(output), SECRET):
        # Surrogates by chance, if another key gives others.
        again = archive_check.again(export, found, OTHER_SECRET)
        assert not archive_check.lasting(found, archive_check.suspects(export, again, OTHER_SECRET))


def test_the_search_finds_what_was_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = make_export(tmp_path / "export", studies=12, layout="text", faulty=0.0, size=40)

    def untouched(document: str, *_: object, **__: object) -> Deidentified:
        return Deidentified(text=document, spans=(), counts=Counter(), layers=Counter())

    monkeypatch.setattr(pipeline, "deidentify", untouched)
    output = packed(tmp_path, "set")
    kinds = {
        one.kind
        for those in archive_check.suspects(export, identity_search.records(output), SECRET).values()
        for one in those
    }
    assert {"name", "date", "phone"} <= kinds
    assert {"phone"} <= set(identity_search.everywhere(output, "", export.studies))
    person = export.studies[0]
    assert identity_search.everywhere(output, f"error {person.patient}", export.studies)["id"] > 0
    name = next(one.text for one in person.injected if one.kind == "name")
    assert identity_search.beside_samples(output, f"no view of {name}", export.studies)


def test_a_second_run_writes_the_same_bytes_and_an_interrupted_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_export(tmp_path / "export", studies=20, layout="text", faulty=0.2, size=40)
    first, second = packed(tmp_path, "first"), packed(tmp_path, "second", workers=2)
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}
    put, count = pack.writer._put_shard, 0

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count > 1:
            raise pack.ConfigError("stopped")
        return put(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pack.writer, "_put_shard", failing)
        with pytest.raises(AssertionError):
            packed(tmp_path, "third")
    assert (tmp_path / "third" / "receipts").is_dir() and not (tmp_path / "third" / "manifest.json").exists()
    packed(tmp_path, "third")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "third").iterdir() if path.is_file()}


def test_options_change_what_is_taken(tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", studies=STUDIES, layout="text", faulty=0.5, size=40)
    output = packed(tmp_path, "set", "--keep-without-laterality", "--shared-folders", "--window-days", 3)
    manifest = Manifest.from_bytes((output / "manifest.json").read_bytes())
    assert REASONS["no laterality"] not in manifest.refused
    assert REASONS["two patients in one folder"] not in manifest.refused
    sides = [view.get("laterality") for one in identity_search.records(output).values() for view in one["views"]]
    assert sides.count(None) == sum(study.fault == "no laterality" for study in export.studies)


@pytest.mark.parametrize(
    ("mapping", "words", "message"),
    [
        ('images = "images"', (), "give patterns of files, or a table"),
        ('files = ["reports/{patient}"]', (), "a pattern holds {patient} and {date} once"),
        ('table = "t.csv"\n[columns]\npatient = "p"\ndate = "d"', (), "name a column of text, or one of files"),
        ('table = "t.csv"\n[columns]\npatient = "p"\ndate = "d"\ntext = "t"\nside = "s"', (), "columns.side"),
        ('table = "t.csv"\n[columns]\npatient = "p"\ndate = "d"\ntext = "t"', (), "t.csv: No such"),
        ('files = ["{patient}_{date}"]', ("--window-days", "-1"), "--window-days -1"),
        ('files = ["{patient}_{date}"]', ("--reports", "r.csv"), "leave --reports out"),
    ],
)
def test_bad_options(
    mapping: str, words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "archive.toml").write_text(mapping)
    (tmp_path / "export" / "image").write_bytes(b"")
    with pytest.raises(AssertionError):
        packed(tmp_path, "set", *words)
    assert message in capsys.readouterr().err


def test_a_set_does_not_lie_in_what_it_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(AssertionError):
        packed(tmp_path, "export/set")
    assert "lies in --input" in capsys.readouterr().err
    assert not any(path.is_dir() for path in (tmp_path / "export").iterdir())


def test_an_archive_is_no_public_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", "archive", "--input", str(tmp_path), "--public", "--output", str(tmp_path / "set")]
    assert pack.main(words) == 2
    assert "give --key-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "day"),
    [
        ("2019-03-12", "2019-03-12"), ("20190312", "2019-03-12"), ("12/03/2019", "2019-03-12"),
        ("1.2.2019 14:05", "2019-02-01"), ("2019-03-12T14:05:00", "2019-03-12"), ("20190312140500", "2019-03-12"),
        ("31/02/2019", None), ("03/31/2019", None), ("20191345", None), ("12/03/19", None), ("1793-01-01", None),
        ("", None), ("mars 2019", None), ("201903121", None),
    ],
)  # fmt: skip
def test_days(written: str, day: str | None) -> None:
    found = day_of(written)
    assert (found and found.isoformat()) == day


@pytest.mark.parametrize(
    ("text", "parts", "told", "other"),
    [
        ("RADIOGRAPHIE DU POIGNET\nRésultats : normal.", ["KNEE"], "", True),
        ("RADIOGRAPHIE DU POIGNET\nRésultats : normal.", ["HAND"], "", False),
        ("Résultats : pas de fracture.", ["KNEE"], "", False),
        ("Résultats : pas de fracture.", ["KNEE"], "Main F/P", True),
        ("Résultats : main normale.", ["EXTREMITY"], "", False),
        ("Résultats : main normale.", [], "", False),
        ("Résultats : avant-bras normal.", ["HUMERUS"], "", True),
        ("Indication : chute sur la main, douleur du genou.\nRésultats : normal.", ["KNEE"], "", False),
    ],
)
def test_reports_of_other_parts(text: str, parts: list[str], told: str, other: bool) -> None:
    assert is_of_other_part(text, "fr", parts, told) == other


@pytest.mark.parametrize(
    ("body_part", "paired", "term"),
    [("KNEE", True, "KNEE"), ("CHEST", False, "CHEST"), ("PELVIS", False, "PELVIS"), ("EXTREMITY", True, "EXTREMITY"),
     ("GENOU DT", True, "KNEE"), ("ÉPAULE", True, "SHOULDER"), ("MAINS", True, "HAND"), ("MAIN/POIGNET", True, None),
     ("BASSIN", False, None), ("RACHIS LOMBAIRE", False, None), ("", None, None), ("RACHIS", None, None),
     ("OS", None, None)],
)  # fmt: skip
def test_what_headers_call_parts_of_the_body(body_part: str, paired: bool | None, term: str | None) -> None:
    assert is_paired(body_part) is paired and term_of(body_part) == term


@pytest.mark.parametrize(
    ("body_part", "side", "reason"),
    [("KNEE", "", NO_LATERALITY), ("KNEE", "R", None), ("GENOU", "U", NO_LATERALITY), ("GENOU", "L", None),
     ("", "", NO_SIDE_NO_PART), ("", "B", None), ("RACHIS", "", NO_SIDE_NO_PART), ("BASSIN", "", None),
     ("CHEST", "", None)],
)  # fmt: skip
def test_an_image_tells_its_side_or_needs_none(body_part: str, side: str, reason: str | None) -> None:
    dataset = Dataset()
    dataset.PatientID, dataset.BodyPartExamined, dataset.ImageLaterality = "P", body_part, side
    _check(dataset, ArchiveOptions(keep_without_laterality=True))
    if reason is None:
        _check(dataset, ArchiveOptions())
    else:
        with pytest.raises(RefusedError, match=reason):
            _check(dataset, ArchiveOptions())


def test_audit_of_refusals_names_only_hashes(tmp_path: Path) -> None:
    make_export(tmp_path / "export", studies=20, layout="files", faulty=0.5, size=40)
    lines = (packed(tmp_path, "set") / "refused.jsonl").read_text().splitlines()
    names = {json.loads(line)["input"] for line in lines}
    assert len(lines) > 10 and all(len(name) == 32 and set(name) <= set("0123456789abcdef") for name in names)
