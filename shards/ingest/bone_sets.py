"""Public sets of bone radiographs in the folders and tables that they are downloaded as.

    fracatlas      dataset.csv, images/{Fractured,Non_fractured}/*.jpg, boxes in Annotations/COCO JSON/*.json
    grazpedwri     GRAZPEDWRI-DX: dataset.csv, <filestem>.png anywhere, boxes of YOLO in labels/<filestem>.txt
    mura           {train,valid}_image_paths.csv and {train,valid}_labeled_studies.csv, which have no header
    rsna_bone_age  boneage-training-dataset.csv and the validation set's table, <id>.png anywhere
    oai            contents.csv of images (DICOM), kxr_sq_bu*.txt with grades, flxr_kneealign*.txt with angles

Each is read into rows of one form, which the table source makes studies of. FracAtlas and RSNA do not say who the
patients are: each image counts as one. What MURA and RSNA call validation is the test split here, as papers use them.
OAI's layout is as its documents tell it; it was not tried on its files.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from shards.errors import ConfigError
from shards.ingest.image_file import ImageLimits
from shards.ingest.table import Columns, LabelColumn, Labels, TableMapping, TableSource
from shards.ingest.table_boxes import BoxTable
from shards.ingest.table_file import Rows, read_rows
from shards.ingest.view_files import ImageFiles, OpenedView, View, ViewFiles, path_within

Row = dict[str, str]
# An empty cell of these sets means absent.
PRESENT: dict[str, Literal[0, 1, -1]] = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": 0}
_NUMBER = re.compile(r"\s*(-?\d+(?:\.\d+)?)")
_COLUMNS = Columns(
    file="file", patient="patient", study="study", split="split", sex="sex", age="age", view="view",
    laterality="laterality", body_part="body_part",
)  # fmt: skip
_BOX = ("file", "label", "left", "top", "width", "height")
# GRAZPEDWRI-DX's classes, by the numbers of its YOLO files (Nagy et al. 2022).
_GRAZ_CLASSES = (
    "boneanomaly", "bonelesion", "foreignbody", "fracture", "metal", "periostealreaction", "pronatorsign",
    "softtissue", "text",
)  # fmt: skip
_OAI_READINGS = ("15", "37", "42")  # of grades: the reading of the whole cohort first, then those of parts


@dataclass(frozen=True)
class MadeRows:
    """Rows that a function makes of a folder; columns that a row lacks are empty."""

    make: Callable[[Path], Iterator[Row]]
    folder: Path

    def read(self, used: Mapping[str, str]) -> Iterator[tuple[int, Row | None]]:
        """As a table gives its rows."""
        for number, row in enumerate(self.make(self.folder), start=1):
            yield number, {column: row.get(column, "") for column in used.values()}


def files_by_stem(folder: Path, *endings: str) -> dict[str, str]:
    """Name without ending -> path below the folder. Raises ConfigError for a name that stands for two files."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in endings:
            if path.stem in found:
                raise ConfigError(f"--input {folder}: holds two files called {path.stem}; leave one copy of the images")
            found[path.stem] = path.relative_to(folder).as_posix()
    return found


def _named(columns: str) -> dict[str, str]:
    return {column: column for column in columns.split(",")}


def _table(folder: Path, name: str) -> Path:
    found = sorted(path for path in folder.rglob("*") if path.name.lower() == name.lower())
    if len(found) != 1:
        raise ConfigError(f"--input {folder}: {len(found)} files called {name} below it; give the folder of the set")
    return found[0]


def _cells(path: Path, columns: str) -> Iterator[Row]:
    """Rows of a table whose cells fit its header, stripped."""
    for number, row in read_rows(path, _named(columns)):
        if row is None:
            raise ConfigError(f"table {path}: row {number} has too few or too many cells; download it again")
        yield {name: cell.strip() for name, cell in row.items()}


# ---- FracAtlas ----

_FRACATLAS_PARTS = ("hand", "leg", "hip", "shoulder")
_FRACATLAS_VIEWS = {"frontal": "AP", "lateral": "LATERAL", "oblique": "OBLIQUE"}


def _fracatlas(folder: Path) -> Iterator[Row]:
    place = files_by_stem(folder, ".jpg", ".jpeg")
    asked = ",".join(("image_id", *_FRACATLAS_PARTS, *_FRACATLAS_VIEWS, "hardware", "fractured"))
    for row in _cells(_table(folder, "dataset.csv"), asked):
        stem = PurePosixPath(row["image_id"]).stem
        parts = [name for name in _FRACATLAS_PARTS if row[name] == "1"]
        views = [word for name, word in _FRACATLAS_VIEWS.items() if row[name] == "1"]
        yield {
            "file": place.get(stem, row["image_id"]), "patient": stem, "study": stem, "fracture": row["fractured"],
            "implant": row["hardware"], "body_part": parts[0].upper() if len(parts) == 1 else "",
            "view": views[0] if len(views) == 1 else "",
        }  # fmt: skip


def _fracatlas_boxes(folder: Path) -> Iterator[Row]:
    place = files_by_stem(folder, ".jpg", ".jpeg")
    for path in sorted(folder.rglob("*.json")):
        try:
            body = json.loads(path.read_text("utf-8"))
            if not isinstance(body, dict) or not {"images", "annotations"} <= set(body):
                continue  # the same boxes in VGG's form
            names = {image["id"]: PurePosixPath(str(image["file_name"])).stem for image in body["images"]}
            rows = []
            for one in body["annotations"]:
                sides = [str(float(side)) for side in one["bbox"]]
                stem = names.get(one["image_id"], "")
                rows.append(dict(zip(_BOX, (place.get(stem, stem), "fracture", *sides), strict=True)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path.relative_to(folder)}: not boxes in COCO's form ({type(error).__name__}); download it again"
            ) from None
        yield from rows


# ---- GRAZPEDWRI-DX ----


def _grazpedwri(folder: Path) -> Iterator[Row]:
    place = files_by_stem(folder, ".png")
    asked = "filestem,patient_id,study_number,gender,age,laterality,projection,cast,osteopenia,fracture_visible,metal"
    for row in _cells(_table(folder, "dataset.csv"), asked):
        yield {
            "file": place.get(row["filestem"], f"{row['filestem']}.png"), "patient": row["patient_id"],
            # Now and then both wrists were taken at one visit: what is known is known of one of them.
            "study": f"{row['patient_id']} {row['study_number']} {row['laterality']}", "sex": row["gender"],
            "age": row["age"], "laterality": row["laterality"], "body_part": "WRIST", "cast": row["cast"],
            "implant": row["metal"], "view": {"1": "AP", "2": "LATERAL", "3": "OBLIQUE"}.get(row["projection"], ""),
            "osteopenia": row["osteopenia"], "fracture": row["fracture_visible"],
        }  # fmt: skip


def _grazpedwri_boxes(folder: Path) -> Iterator[Row]:
    """Of YOLO's lines `class x y width height`, the middle and sides as shares of the image."""
    place = files_by_stem(folder, ".png")
    for path in sorted(folder.rglob("labels/**/*.txt")):
        for line in path.read_text("utf-8", "replace").splitlines():
            cells = line.split()
            try:
                x, y, width, height = map(float, cells[1:])
                label = _GRAZ_CLASSES[int(cells[0]) if cells[0].isdecimal() else len(_GRAZ_CLASSES)]
            except (ValueError, IndexError):
                raise ConfigError(
                    f"{path.relative_to(folder)}: {line!r} is no box of YOLO; download it again"
                ) from None
            sides = (x - width / 2, y - height / 2, width, height)
            yield dict(zip(_BOX, (place.get(path.stem, path.stem), label, *map(str, sides)), strict=True))


# ---- MURA ----

_MURA_PATH = re.compile(r"(?:.*/)?((?:train|valid)/XR_([A-Z]+)/(patient\d+)/study\d+_\w+)(?:/([^/]+))?/?$")
_SPLIT_OF = {"train": "train", "valid": "test"}


def _mura(folder: Path) -> Iterator[Row]:
    """The paths begin with MURA-v1.1, which is the folder or lies in it."""
    base = folder if (folder / "train").is_dir() or (folder / "valid").is_dir() else folder / "MURA-v1.1"
    below = base.relative_to(folder).as_posix()
    seen = False
    for part, split in _SPLIT_OF.items():
        paths, labelled = (base / f"{part}_{name}.csv" for name in ("image_paths", "labeled_studies"))
        if not paths.exists():
            continue
        seen = True
        label_of = {_mura_place(cells[0], labelled)[1]: cells[1].strip() for cells in _lines(labelled, 2)}
        for cells in _lines(paths, 1):
            match = _mura_place(cells[0], paths)
            yield {
                "file": "/".join(one for one in (below.strip("."), match[1], match[4] or "") if one),
                "patient": match[3], "study": match[1], "split": split, "body_part": match[2],
                "anomaly": label_of.get(match[1], ""),
            }  # fmt: skip
    if not seen:
        raise ConfigError(f"--input {folder}: no train_image_paths.csv; give the folder MURA-v1.1")


def _mura_place(path: str, table: Path) -> re.Match[str]:
    match = _MURA_PATH.match(path.strip())
    if match is None:
        raise ConfigError(f"{table}: a path is not of the form train/XR_WRIST/patient00001/study1_positive")
    return match


def _lines(path: Path, cells: int) -> Iterator[list[str]]:
    """Rows of a CSV file without a header."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigError(f"table {path}: {error.strerror}; give the folder of the whole set") from None
    if any(len(row) != cells for row in rows):
        raise ConfigError(f"table {path}: a row has not {cells} cells; download it again")
    yield from rows


# ---- RSNA bone age ----

# Columns of the tables of either split: id, months, male.
_RSNA_TABLES = {"train": ("id", "boneage", "male"), "test": ("Image ID", "Bone Age (months)", "male")}


def _rsna_bone_age(folder: Path) -> Iterator[Row]:
    place, seen = files_by_stem(folder, ".png"), False
    for path in sorted(folder.rglob("*.csv")):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            header = set(next(csv.reader(file), []))
        for split, (number, months, male) in _RSNA_TABLES.items():
            if not {number, months, male} <= header:
                continue  # such as the test set's, whose ages were never told
            seen = True
            for row in _cells(path, ",".join((number, months, male))):
                yield {
                    "file": place.get(row[number], f"{row[number]}.png"), "patient": row[number], "study": row[number],
                    "split": split, "sex": {"true": "M", "false": "F"}.get(row[male].lower(), ""),
                    "body_part": "HAND", "view": "AP", "bone_age_months": row[months],
                }  # fmt: skip
    if not seen:
        raise ConfigError(f"--input {folder}: no table with columns id, boneage, male below it")


# ---- OAI ----


def _oai(folder: Path) -> Iterator[Row]:
    """Each film of both knees or legs is a study; its grades and angles are told by side."""
    grades, angles = _oai_told(folder, "kxr_sq_bu", "XRKL"), _oai_told(folder, "flxr_kneealign", "HKANG")
    asked = "Folder,ParticipantID,SeriesDescription"
    for row in _cells(_table(folder, "contents.csv"), asked):
        series = row["SeriesDescription"].lower()
        knees, legs = "knee" in series and "bilateral" in series, "full limb" in series
        if not (knees or legs):
            continue
        visit = row["Folder"].split("/")[0].split(".")[0]
        told = (grades if knees else angles).get((row["ParticipantID"], visit), {})
        name = "kl_grade" if knees else "hip_knee_ankle_degrees"
        for file in _films(folder, row["Folder"]):
            yield {
                "file": file, "patient": row["ParticipantID"], "study": row["Folder"], "laterality": "B",
                "body_part": "KNEE" if knees else "LEG", "view": "PA" if knees else "AP",
                **{f"{name}_{side}": value for side, value in told.items()},
            }  # fmt: skip


def _films(folder: Path, place: str) -> list[str]:
    below = sorted(path for path in (folder / place).rglob("*") if path.is_file()) if (folder / place).is_dir() else []
    return [path.relative_to(folder).as_posix() for path in below] or [place]


def _oai_told(folder: Path, name: str, ending: str) -> dict[tuple[str, str], dict[str, str]]:
    """(participant, visit) -> side -> value of the column V<visit><ending>..., of tables whose cells `|` parts."""
    best: dict[tuple[str, str, str], tuple[int, str]] = {}
    for path in sorted(one for one in folder.rglob("*.txt") if one.name.lower().startswith(name)):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            for row in csv.DictReader(file, delimiter="|"):
                cells = {(key or "").upper(): (cell or "") for key, cell in row.items() if isinstance(cell, str)}
                side = {"1": "right", "2": "left"}.get(_first_number(cells.get("SIDE", "")))
                column = next((key for key in cells if re.match(rf"V\d\d{ending}", key)), None)
                value = "" if column is None else _first_number(cells[column])
                if side is None or column is None or not value:
                    continue
                reading = _first_number(cells.get("READPRJ", ""))
                rank = _OAI_READINGS.index(reading) if reading in _OAI_READINGS else len(_OAI_READINGS)
                key = (cells.get("ID", "").strip(), str(int(column[1:3])), side)
                if key not in best or rank < best[key][0]:
                    best[key] = rank, value
    told: dict[tuple[str, str], dict[str, str]] = {}
    for (participant, visit, side), (_, value) in best.items():
        told.setdefault((participant, visit), {})[side] = value
    return told


def _first_number(cell: str) -> str:
    """`2` of `2: Left`; empty where there is none, as in `.: Missing Form/Incomplete Workbook`."""
    match = _NUMBER.match(cell)
    return match[1] if match else ""


@dataclass(frozen=True, kw_only=True)
class DicomFiles:
    """Films that a table names and that are DICOM: what `ImageFiles` is for pictures."""

    folder: Path
    limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def masks(self) -> dict[str, int]:
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"side_min": self.limits.side_min, "area_max": self.limits.area_max, "files": "dicom"}

    def open(self, view: View, view_id: str) -> OpenedView:
        from shards.ingest.dicom import RADIOGRAPHY
        from shards.ingest.dicom_file import check_image, read_file
        from shards.ingest.dicom_pixels import load_view

        dataset = read_file(path_within(self.folder, view.file))
        check_image(dataset, RADIOGRAPHY)
        opened = load_view(dataset, view_id, self.limits, None)
        told = {"view": view.view, "laterality": view.laterality, "body_part": view.body_part}
        record = opened.record.model_copy(update={name: value for name, value in told.items() if value is not None})
        return OpenedView(record=record, image=opened.image, provenance=opened.provenance, notes=opened.notes)


# ---- sources ----


@dataclass(frozen=True, kw_only=True)
class BoneSet:
    """How a set is read, and what its rows tell. `grid`: of its boxes, None for pixels of the file."""

    rows: Callable[[Path], Iterator[Row]]
    labels: tuple[str, ...] = ()
    measurements: tuple[str, ...] = ()
    boxes: Callable[[Path], Iterator[Row]] | None = None
    grid: tuple[int, int] | None = None
    box_files: str = ""  # where boxes lie, if they were downloaded
    dicom: bool = False
    collection: str = ""


BONE_SETS: dict[str, BoneSet] = {
    "fracatlas": BoneSet(
        rows=_fracatlas, labels=("fracture", "implant"), boxes=_fracatlas_boxes, box_files="*.json",
        collection="FracAtlas",
    ),
    "grazpedwri": BoneSet(
        rows=_grazpedwri, labels=("fracture", "cast", "implant", "osteopenia"), boxes=_grazpedwri_boxes, grid=(1, 1),
        box_files="labels/**/*.txt", collection="GRAZPEDWRI-DX",
    ),
    "mura": BoneSet(rows=_mura, labels=("anomaly",), collection="MURA v1.1"),
    "rsna_bone_age": BoneSet(
        rows=_rsna_bone_age, measurements=("bone_age_months",), collection="RSNA Pediatric Bone Age"
    ),
    "oai": BoneSet(
        rows=_oai, dicom=True, collection="Osteoarthritis Initiative",
        measurements=("kl_grade_right", "kl_grade_left", "hip_knee_ankle_degrees_right", "hip_knee_ankle_degrees_left"),
    ),
}  # fmt: skip


def bone_set(name: str, folder: Path, limits: ImageLimits, secret: bytes | None) -> TableSource:
    """The source of a set below a folder. Raises ConfigError for a folder that is missing."""
    if not folder.is_dir():
        raise ConfigError(f"--input {folder}: no such folder; give the one that the set was unpacked into")
    of = BONE_SETS[name]
    has_boxes = of.boxes is not None and any(folder.rglob(of.box_files))
    boxes = {"table": "(boxes)", "grid": of.grid} | {key: key for key in _BOX}
    mapping = TableMapping(
        table=f"(the tables of {of.collection})",
        columns=_COLUMNS,
        labels=Labels(
            # MURA's test split may come without its labels: no cell is no answer there.
            columns={label: LabelColumn(column=label, values={} if name == "mura" else PRESENT) for label in of.labels}
        ),
        measurements={measurement: measurement for measurement in of.measurements},
        boxes=BoxTable.model_validate(boxes) if has_boxes else None,
        provenance={"collection": of.collection},
    )  # fmt: skip
    files: ViewFiles = (
        DicomFiles(folder=folder, limits=limits) if of.dicom else ImageFiles(folder=folder, limits=limits)
    )
    box_rows: Rows | None = MadeRows(of.boxes, folder) if has_boxes and of.boxes is not None else None
    return TableSource(
        input=folder, mapping=mapping, secret=secret, files=files, rows=MadeRows(of.rows, folder), box_rows=box_rows,
        name=name,
    )  # fmt: skip
