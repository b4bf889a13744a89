"""A packed invented export against its truth: pairs, files accounted for, identifiers that last under another key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ci.data.hospital_export import Export, Injected
from ci.data.identity_search import in_own_study, records
from shards.ingest import hashed_key
from shards.ingest.archive import HospitalArchive
from shards.ingest.archive_reports import ArchiveMapping
from shards.ingest.dicom import DicomRadiographs
from shards.manifest import Manifest
from shards.reports.exam import is_of_other_part
from shards.reports.packing import Structured


def wrong_studies(export: Export, output: Path, secret: bytes) -> list[str]:
    """What is wrong with samples: missing, too many, another patient, report, side, part or number of views."""
    expected = {hashed_key(secret, "study", study.uid): study for study in export.studies if study.packed}
    found = records(output)
    wrong = ["not packed"] * len(set(expected) - set(found)) + ["not to be packed"] * len(set(found) - set(expected))
    for key in sorted(set(found) & set(expected)):
        record, study = found[key], expected[key]
        sides = {(view["body_part"], view["laterality"]) for view in record["views"]}
        text = " ".join(record["report"].values())
        checks = {
            "patient": record["patient"] == hashed_key(secret, "patient", study.patient),
            "number of views": len(record["views"]) == study.views,
            "side or part": sides == {(study.term, study.side)},
            "language": record["language"] == "fr",
            "report": record["report"].get("findings", "").startswith(study.opening),
            "part of the report": not is_of_other_part(text, "fr", [study.term]),
        }
        wrong += [name for name, holds in checks.items() if not holds]
    return wrong


def unaccounted(export: Export, manifest: Manifest) -> int:
    """Files and reports that are neither in a sample nor counted, or counted twice."""
    reports = sum(count for reason, count in manifest.refused.items() if reason.startswith("report: "))
    views = sum(shard.images for shard in manifest.shards)
    files = views + sum(manifest.refused.values()) - reports
    return abs(manifest.samples + reports - export.reports) + abs(files - export.files)


def suspects(export: Export, found: Mapping[str, Mapping[str, Any]], secret: bytes) -> dict[str, set[Injected]]:
    """StudyInstanceUID -> what was put into the study and stands in its record, by whatever chance.

    `found`: records by key, of a set or of `again`.
    """
    hits = {
        study.uid: in_own_study(found[key], study)
        for study in export.studies
        if (key := hashed_key(secret, "study", study.uid)) in found
    }
    return {uid: those for uid, those in hits.items() if those}


def again(export: Export, uids: Iterable[str], secret: bytes) -> dict[str, dict[str, Any]]:
    """Records of these studies alone, loaded with another key."""
    source = archive(export, secret)
    keys = {hashed_key(secret, "study", uid) for uid in uids}
    loads = (source.load(item) for item in source.plan().items if item.key in keys)
    samples = (loaded.sample for loaded in loads)
    return {one.key: one.record.model_dump(mode="json", exclude_none=True) for one in samples if one is not None}


def lasting(first: dict[str, set[Injected]], second: dict[str, set[Injected]]) -> Counter[str]:
    """Kind -> identifiers that two sets of different keys both hold: no surrogates, which would differ."""
    return Counter(one.kind for uid, those in first.items() for one in those & second.get(uid, set()))


def archive(export: Export, secret: bytes) -> HospitalArchive:
    """The source that `pack.py --source archive` makes of the export."""
    return HospitalArchive(
        folder=export.folder, mapping=ArchiveMapping.read(export.folder / "archive.toml"),
        images=DicomRadiographs(folder=export.folder, secret=secret, name="archive"), structured=Structured(secret),
        secret=secret,
    )  # fmt: skip
