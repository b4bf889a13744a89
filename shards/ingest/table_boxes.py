"""Boxes that a table of their own draws in the files of another table, such as NIH's BBox_List_2017.csv."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shards.batch import Box, ViewRecord
from shards.errors import ConfigError
from shards.ingest import Refusal
from shards.ingest.table_file import Rows, TableFile

Pixels = Annotated[int, Field(gt=0)]


class BoxTable(BaseModel):
    """`[boxes]` of a mapping: `table`, relative to the input folder, and names of its columns.

    A row names its file as the first table does, or by its name alone, without folder and suffix. `values`: a label of
    the boxes -> the label that studies have, where they differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    file: str
    label: str
    left: str
    top: str
    width: str
    height: str
    grid: tuple[Pixels, Pixels] | None = None  # width, height of the images that were drawn in; None: the files' own
    values: dict[str, str] = Field(default_factory=dict)

    @property
    def columns(self) -> dict[str, str]:
        """Key of the mapping -> column."""
        names = ("file", "label", "left", "top", "width", "height")
        return {f"boxes.{name}": getattr(self, name) for name in names}


@dataclass(frozen=True)
class DrawnBox:
    """A row: label, then left, top, width and height in pixels of the grid that was drawn in."""

    label: str
    sides: tuple[float, float, float, float]

    def on(self, view: ViewRecord, grid: tuple[int, int] | None) -> Box | str:
        """The box in pixels of a stored view, or why there is none."""
        wide, high = (1.0, 1.0) if grid is None else (view.width / grid[0], view.height / grid[1])
        left, top, width, height = self.sides
        box = Box(
            view=view.id, label=self.label, left=left * wide, top=top * high, width=width * wide, height=height * high
        )
        return box.fault(view.height, view.width) or box


def read_boxes(
    folder: Path, table: BoxTable, files: Iterable[str], shown: Callable[[str], str], given: Rows | None = None
) -> tuple[Mapping[str, tuple[DrawnBox, ...]], list[Refusal]]:
    """File -> its boxes, and the rows that give none. `shown`: a file's name as logs may have it; `given`: the table's
    rows, where they lie elsewhere.

    Raises ConfigError for a table that cannot be read, one of other files, and a name that stands for two of `files`.
    """
    known = list(files)
    count_of_stem = Counter(map(_stem, known))
    place = {_stem(file): file for file in known} | {file: file for file in known}
    found: dict[str, list[DrawnBox]] = {}
    refusals: list[Refusal] = []
    rows = 0
    for number, row in (given or TableFile(folder / table.table)).read(table.columns):
        rows = number
        if row is None:
            refusals.append(Refusal(f"row {number} of boxes", "box: row with too few or too many cells"))
            continue
        name = row[table.file].strip()
        file = place.get(name) or place.get(_stem(name))
        if file is None:
            refusals.append(Refusal(f"row {number} of boxes", "box: of a file that the table does not name"))
            continue
        if name != file and count_of_stem[_stem(name)] > 1:
            raise ConfigError(
                f"boxes.table {table.table}: row {number} names its file without a folder, and several files are "
                "called so; name it as columns.file does"
            )
        label = row[table.label].strip()
        sides = tuple(_number(row[column]) for column in (table.left, table.top, table.width, table.height))
        if not label or None in sides:
            reason = "box: no label" if not label else "box: not a number"
            refusals.append(Refusal(shown(file), reason, kept=True))
            continue
        found.setdefault(file, []).append(DrawnBox(table.values.get(label, label), sides))  # type: ignore[arg-type]
    if not found:
        raise ConfigError(
            f"boxes.table {table.table}: none of its {rows} rows draws a box in a file that columns.file names; check "
            "boxes.file, or leave [boxes] out"
        )
    return {file: tuple(boxes) for file, boxes in found.items()}, refusals


def _stem(file: str) -> str:
    return PurePosixPath(file).stem


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
