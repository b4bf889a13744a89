"""CT-RATE's folders and tables as studies: a patient's studies, a study's reconstructions as views.

    train_fixed/train_1/train_1_a/train_1_a_1.nii.gz    patient train_1, study train_1_a, reconstruction 1
    metadata/*.csv, radiology_text_reports/*.csv, multi_abnormality_labels/*.csv    rows by VolumeName

The folder says which volumes there are; tables add what they know of them, wherever they lie below the input. Spacing
and rescale come from the metadata table, since headers of the first release lack them; whether values are HU already is
seen from the values themselves (nifti.py). The axes are those of the header.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ConfigError
from shards.ingest.table import Columns, LabelColumn, Labels, TableMapping, TableSource
from shards.ingest.table_file import read_rows
from shards.ingest.volume_file import VolumeFiles
from shards.reports.labels import label_names

VOLUME = "VolumeName"
SPLITS = {"train": "train", "valid": "validation"}
_NAME = re.compile(r"^((train|valid)_\d+)_([a-z]+)_\d+\.nii\.gz$")
_REPORT = {
    "indication": "ClinicalInformation_EN", "technique": "Technique_EN", "findings": "Findings_EN",
    "impression": "Impressions_EN",
}  # fmt: skip
# What this module makes of a file's name.
_FILE, _PATIENT, _STUDY, _SPLIT = "file", "patient", "study", "split"
# Columns of the tables, by the key of the mapping that takes them.
_METADATA = {
    "sex": "PatientSex", "age": "PatientAge", "rescale_slope": "RescaleSlope",
    "rescale_intercept": "RescaleIntercept", "xy_spacing": "XYSpacing", "z_spacing": "ZSpacing",
}  # fmt: skip


@dataclass(frozen=True)
class CtRateRows:
    """One row for each volume under a folder, with what the tables say of it."""

    folder: Path
    masks: Path | None = None  # not looked into

    def columns(self) -> dict[str, list[Path]]:
        """Column -> the tables that have it, of those with a column VolumeName."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*.csv")):
            with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
                header = next(csv.reader(file), [])
            if VOLUME in header:
                for column in header:
                    found.setdefault(column, []).append(path)
        return found

    def read(self, used: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str] | None]]:
        """Volumes in the order of their names; those of another form come without a patient. Raises ConfigError."""
        told = self._told(used)
        for number, path in enumerate(self._volumes(), start=1):
            row = dict.fromkeys(used.values(), "") | told.get(path.name, {})
            row[_FILE] = path.relative_to(self.folder).as_posix()
            if match := _NAME.match(path.name):
                row |= {_PATIENT: match[1], _STUDY: f"{match[1]}_{match[3]}", _SPLIT: SPLITS[match[2]]}
            yield number, row

    def _volumes(self) -> list[Path]:
        masks = self.masks.resolve() if self.masks else None
        volumes: dict[str, Path] = {}
        for path in sorted(self.folder.rglob("*.nii.gz")):
            if masks is not None and path.resolve().is_relative_to(masks):
                continue
            if path.name in volumes:
                raise ConfigError(
                    f"--input {self.folder}: holds {path.name} twice; give the folder of one release: train_fixed"
                )
            volumes[path.name] = path
        if not volumes:
            raise ConfigError(f"--input {self.folder}: no *.nii.gz below it; give the folder that holds train_fixed")
        return [volumes[name] for name in sorted(volumes)]

    def _told(self, used: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """VolumeName -> column -> cell of all tables."""
        columns = self.columns()
        told: dict[str, dict[str, str]] = {}
        for path in sorted({path for paths in columns.values() for path in paths}):
            wanted = {key: column for key, column in used.items() if path in columns.get(column, ())}
            for _, row in read_rows(path, {**wanted, VOLUME: VOLUME}):
                if row is not None:
                    told.setdefault(row.pop(VOLUME).strip(), {}).update(row)
        return told


def ct_rate(folder: Path, files: VolumeFiles, **options: Any) -> TableSource:
    """The source of a folder in CT-RATE's layout; `options` are those of TableSource: secret, deidentified, structured.

    Columns that no table has are left out, so volumes alone are a set, too. Raises ConfigError for a folder that is
    missing.
    """
    if not folder.is_dir():
        raise ConfigError(f"--input {folder}: no such folder")
    rows = CtRateRows(folder, files.mask_folder)
    there = rows.columns()
    prepared = options.get("structured") is not None and options["structured"].prepared is not None
    mapping = TableMapping(
        table="(the tables of CT-RATE)",
        columns=Columns(
            file=_FILE, patient=_PATIENT, study=_STUDY, split=_SPLIT,
            **{key: column for key, column in _METADATA.items() if column in there},
        ),
        report={} if prepared else {section: column for section, column in _REPORT.items() if column in there},
        labels=Labels(columns={name: LabelColumn(column=name) for name in label_names("ct_rate18") if name in there}),
    )  # fmt: skip
    return TableSource(input=folder, mapping=mapping, files=files, rows=rows, name="ct_rate", **options)
