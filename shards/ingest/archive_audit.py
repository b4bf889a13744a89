"""What a data-protection officer reads of a packed archive: counts, versions and rules; no name, date, id or text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.ingest.archive import REPORT
from shards.manifest import Manifest
from shards.reports.identity import DEIDENTIFIER
from shards.reports.identity.header import OLDEST_AGE_YEARS, PASSES
from shards.reports.pipeline import RULES

KINDS = {
    "patient_name": "names of the patient", "person_name": "names of other persons", "birth_date": "birth dates",
    "date": "other dates", "age_over_89": f"ages of {OLDEST_AGE_YEARS:.0f} and more", "phone": "phone and fax numbers",
    "mail": "mail addresses", "url": "web addresses", "id": "record, visit and accession numbers",
    "social_security": "national numbers", "address": "streets and houses", "zip": "postal codes", "city": "towns",
    "hospital": "hospitals and practices",
}  # fmt: skip
LAYERS = {
    "patient": "found as the record of the patient has it", "pattern": "found by its form",
    "gazetteer": "found by lists of names and places", "tagger": "found by the learned layer",
    "plugin": "found by a model beside the rules",
}  # fmt: skip


def audit(settings: Mapping[str, Any], manifest: Manifest, counts: Mapping[str, int]) -> str:
    """Markdown; the same for the same set. `counts` are those of `HospitalArchive`'s plan and loads."""
    groups: dict[str, dict[str, int]] = {}
    for name, count in sorted(counts.items()):
        group, _, member = name.partition("/")
        groups.setdefault(group, {})[member] = count
    inputs, outputs = groups.get("inputs", {}), groups.get("outputs", {})
    views = {reason: count for reason, count in manifest.refused.items() if not reason.startswith(REPORT)}
    reports = {
        reason.removeprefix(REPORT): count for reason, count in manifest.refused.items() if reason.startswith(REPORT)
    }
    files, rows = inputs.get("files of images", 0), inputs.get("reports", 0)
    packed_views, packed_reports = outputs.get("views", 0), outputs.get("reports", 0)
    whole = files == packed_views + sum(views.values()) and rows == packed_reports + sum(reports.values())
    identifiers = {KINDS.get(kind, kind): count for kind, count in groups.get("identifiers", {}).items()}
    layers = {LAYERS.get(layer, layer): count for layer, count in groups.get("layers", {}).items()}
    kept = sorted(name for name, how in PASSES.items() if how in ("closed list", "number"))
    hashed = sorted(name for name, how in PASSES.items() if how == "keyed hash")
    parts = [
        "# Audit of a packed archive",
        "This page holds counts, versions and rules only. It names no person, date, number or file of the archive.",
        _table("What made the set", ("what", "value"), {
            "program": manifest.creator, "de-identifier": DEIDENTIFIER, "reading of reports": RULES,
            "header policy": settings["deidentifier"],
            "fingerprint of the key": manifest.key_fingerprint or "none",
            "days allowed between study and report": settings["options"]["window_days"],
            "images of an unknown side": "kept" if settings["options"]["keep_without_laterality"] else "left out",
            "images with burned-in text": "left out" if "burned_in" in settings else "not looked for",
        }),
        _table("What came in and what is in the set", ("what", "came in", "in the set", "left out"), {
            "image files": (files, packed_views, sum(views.values())),
            "reports": (rows, packed_reports, sum(reports.values())),
        }),
        f"Every file and every report is in the set or counted below: {'yes' if whole else 'NO, do not use this set'}. "
        f"The set holds {manifest.samples} studies of {sum(manifest.patients.values())} patients. "
        "`refused.jsonl` names what was left out by keyed hashes, which only the holder of the key can trace.",
        _table("Image files left out", ("reason", "files"), views),
        _table("Reports left out", ("reason", "reports"), reports),
        _table("How studies and reports were matched, before any date was shifted", ("by", "pairs"),
               groups.get("matched by", {})),
        _table("Remarks", ("remark", "views"), groups.get("remarks", {})),
        _table("Identifiers replaced in the text of reports, by kind", ("kind", "replaced"), identifiers),
        _table("The same, by what found them", ("how", "found"), layers),
        _table("Languages of the reports", ("language", "reports"), groups.get("languages", {})),
        _table("Characters and empty parts of the text repaired", ("repair", "times"), groups.get("repairs", {})),
        "## Rules",
        "* Names, numbers and places in reports are replaced by others of their kind, dates move by one number of days "
        "per patient; all follow from the key. Without the key nobody can undo or repeat it: keep it apart from the "
        "set, or destroy it.",
        "* Patients, studies and refused files are named by keyed hashes.",
        f"* Of DICOM headers these values may pass, each a number or a term of a closed list: {', '.join(kept)}. "
        f"These pass as keyed hashes: {', '.join(hashed)}. Nothing else does.",
        "* Pixels are kept as they are. A name burned into an image is found only where text in images was looked for, "
        "and only from 35 characters on.",
        "* The detector's recall is high and not perfect (`python -m ci.bench reports`): read a sample of the set "
        "before it leaves the hospital.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, head: tuple[str, ...], rows: Mapping[str, Any]) -> str:
    """A section with a table, largest counts first; empty without rows."""
    if not rows:
        return ""
    ordered = list(rows.items())
    if all(isinstance(value, int) for value in rows.values()):
        ordered.sort(key=lambda row: (-row[1], row[0]))
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, value in ordered:
        cells = value if isinstance(value, tuple) else (value,)
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in (name, *cells))} |")
    return "\n".join(lines)
