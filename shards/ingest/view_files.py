"""How the file that a table names becomes a view of a study: one image, or whatever else a set's files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from shards.batch import EncodedImage, EncodedVolume, ViewRecord
from shards.ingest.image_file import ImageLimits, ImageRefusedError, load_image_file

if TYPE_CHECKING:  # only --refuse-burned-in-text needs it
    from shards.reports.identity.burned_in import BurnedInText

Fact = str | int | float | bool | None


@dataclass(frozen=True)
class View:
    """What a row of a table says of its file. `numbers` are those of VIEW_NUMBERS, for sets that need them."""

    file: str
    view: str | None
    laterality: Literal["L", "R", "B"] | None
    body_part: str | None
    numbers: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpenedView:
    """A view as a sample takes it. `notes` are reasons for what was left out of it."""

    record: ViewRecord
    image: EncodedImage | EncodedVolume
    masks: Mapping[tuple[str, int], EncodedImage | EncodedVolume] = field(default_factory=dict)
    provenance: Mapping[str, Fact] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class ViewFiles(Protocol):
    """Reads the files of a set; picklable, since it goes to worker processes."""

    @property
    def folder(self) -> Path: ...

    @property
    def masks(self) -> dict[str, int]: ...  # name -> id in the label maps

    @property
    def settings(self) -> dict[str, Any]: ...  # all that changes the output

    def open(self, view: View, view_id: str) -> OpenedView:
        """Read, check and encode one file. Raises ImageRefusedError with the reason."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Radiographs and the like: JPEG, PNG and what Pillow reads."""

    folder: Path
    limits: ImageLimits = field(default_factory=ImageLimits)
    burned_in: BurnedInText | None = None

    @property
    def masks(self) -> dict[str, int]:
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"side_min": self.limits.side_min, "area_max": self.limits.area_max}
        return sizes | ({"burned_in": self.burned_in.settings} if self.burned_in else {})

    def open(self, view: View, view_id: str) -> OpenedView:
        try:
            data = path_within(self.folder, view.file).read_bytes()
        except FileNotFoundError:
            raise ImageRefusedError("image missing") from None
        except OSError as error:
            raise ImageRefusedError(f"image cannot be read: {error.strerror}") from None
        stored = load_image_file(data, self.limits, self.burned_in)
        record = ViewRecord(
            id=view_id, height=stored.height, width=stored.width, bits=16 if stored.bits == 16 else 8, view=view.view,
            laterality=view.laterality, body_part=view.body_part,
        )  # fmt: skip
        return OpenedView(record=record, image=stored.encoded)


def path_within(folder: Path, file: str) -> Path:
    """The path of a file that a table names. Raises ImageRefusedError when it leads out of the folder."""
    folder = folder.resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder):
        raise ImageRefusedError("file outside the image folder")
    return path
