"""An invented hospital's export for tests and the benchmark of `pack.py --source archive`: studies, reports, faults.

Names come from faker (fr_FR, fr_BE, fr_CH, fr_CA), numbers, phones and dates from the habits of each country. The
truth, which faults were put in and what must not survive, is returned and never written. Everything follows the seed.
"""

from __future__ import annotations

import csv
import datetime
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from faker import Faker
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    VLPhotographicImageStorage,
)

from ci.data.hospital_reports import PARTS, Person, written_report

LOCALES = ("fr_FR", "fr_BE", "fr_CH", "fr_CA")
Layout = Literal["text", "table of files", "files"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# What may be wrong with one study. Faults of files beside sound images leave it a sample, all others do not.
FAULTS = (
    "study without report", "report without study", "two reports one day", "two studies one day",
    "impossible date of report", "impossible date of study", "date before birth", "no text", "two languages",
    "another language", "another part", "two patients in one folder", "study of two patients", "no laterality",
    "colour photograph", "dose report", "page saved as picture", "no pixels", "truncated", "no DICOM",
)  # fmt: skip
# A scan: one page with a drawing and no text.
SCAN = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\ntrailer<</Size 4/Root 1 0 R>>\n%%EOF"
)
MAPPINGS: dict[Layout, str] = {
    "text": 'images = "images"\ntable = "reports.csv"\n[columns]\npatient = "ipp"\ndate = "date"\ntext = "texte"\n',
    "table of files": 'images = "images"\ntable = "reports.csv"\n[columns]\npatient = "ipp"\ndate = "date"\n'
    'file = "fichier"\n',
    "files": 'images = "images"\nfiles = ["reports/{patient}/{date}_{accession}", "reports/{patient}/{date}"]\n',
}
KNOWN = (
    'accession = "examen"\n[known]\nlast_names = ["nom"]\nfirst_names = ["prenom"]\nbirth_date = "naissance"\n'
    'ids = ["niss"]\nphones = ["telephone"]\naddress = "adresse"\ncity = "ville"\n'
)


@dataclass(frozen=True, kw_only=True)
class Injected:
    """One text that must not survive. `kind`: name, date, id, phone, mail, place."""

    kind: str
    text: str


@dataclass(kw_only=True)
class StudyTruth:
    """What was written of one study. `packed`: whether it must become a sample; `views`: how many its sample has.

    `term`: body part in the headers; `opening`: how the findings begin.
    """

    uid: str
    patient: str
    term: str
    side: str
    opening: str
    fault: str | None
    packed: bool
    views: int
    injected: list[Injected] = field(default_factory=list)
    prose: str = ""  # the report without identifiers


@dataclass(kw_only=True)
class Export:
    """A written export. `files`: below `images`; `reports`: rows or files of reports."""

    folder: Path
    studies: list[StudyTruth] = field(default_factory=list)
    files: int = 0
    reports: int = 0


def make_export(
    folder: Path,
    *,
    studies: int,
    layout: Layout = "text",
    seed: int = 10,
    size: int | tuple[int, int] = 64,
    faulty: float = 0.1,
) -> Export:
    """Write an export of about `studies` studies, of which the share `faulty` has one fault, each kind in turn.

    `size`: pixels a side, or rows and columns, of 12 bits. Sound studies have one to four views.
    """
    return _Maker(folder, layout, seed, size).make(studies, faulty)


class _Maker:
    def __init__(self, folder: Path, layout: Layout, seed: int, size: int | tuple[int, int]) -> None:
        self.layout, self.choose = layout, random.Random(seed)
        self.fakers = []
        for number, locale in enumerate(LOCALES):
            self.fakers.append(Faker(locale))
            self.fakers[-1].seed_instance(seed + number)
        self.export = Export(folder=folder)
        self.rows: list[dict[str, str]] = []
        self.pixels = _films(*((size, size) if isinstance(size, int) else size), seed)
        self.uid = 0

    def make(self, studies: int, faulty: float) -> Export:
        """All of it."""
        kinds = 0
        for number in range(studies):
            fault = None
            if int((number + 1) * faulty) > int(number * faulty):
                fault, kinds = FAULTS[kinds % len(FAULTS)], kinds + 1
            self._study(number, fault)
        folder = self.export.folder
        (folder / "archive.toml").write_text(MAPPINGS[self.layout] + ("" if self.layout == "files" else KNOWN))
        if self.layout != "files":
            with open(folder / "reports.csv", "w", encoding="cp1252", errors="replace", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(self.rows[0]), delimiter=";")
                writer.writeheader()
                writer.writerows(self.rows)
        return self.export

    def _uid(self) -> str:
        self.uid += 1
        return f"1.2.826.0.1.3680043.10.543.{self.uid}"

    def _person(self, number: int) -> Person:
        place = number % len(LOCALES)
        return Person.drawn(self.fakers[place], LOCALES[place], self.choose, number)

    def _study(self, number: int, fault: str | None) -> None:
        choose, person = self.choose, self._person(number)
        part = choose.choice(list(PARTS))
        day = datetime.date(2015, 1, 1) + datetime.timedelta(days=choose.randrange(2900))
        accession = f"RX{day:%y}{choose.randrange(10**6, 10**7)}" if choose.random() < 0.5 else ""
        side = choose.choice("LR")
        report = written_report(person, part, side, day, accession, choose)
        truth = StudyTruth(
            uid=self._uid(), patient=person.number, term=PARTS[part].term, side=side, opening=report.opening,
            fault=fault, packed=True, views=0, prose=report.prose,
        )  # fmt: skip
        truth.injected = [Injected(kind=kind, text=text) for kind, text in report.injected if text]
        self.export.studies.append(truth)
        name = f"{person.last} {person.first} {day:%Y%m%d}".replace("/", "-")
        place = self.export.folder / "images" / f"{number:05d} {name}"
        header = person.header(day, accession, part, side) | {"StudyInstanceUID": truth.uid}
        if fault != "report without study":
            for _ in range(choose.choice((1, 2, 2, 3, 4))):
                self._image(place, header)
                truth.views += 1
        if fault in _OF_IMAGES:
            self._add_bad_file(fault, place, header, truth)
        elif fault is not None:
            truth.packed = False
        text, date = report.text, day
        if fault == "two studies one day":
            header |= {"StudyInstanceUID": self._uid()}
            self._image(place, header)
        elif fault == "study of two patients":
            self._image(place, header | self._person(number + 1).header(day, accession, part, side))
        elif fault == "two patients in one folder":
            other = self._person(number + 1).header(day, "", part, side)
            self._image(place, other | {"StudyInstanceUID": self._uid()})
        if fault == "two languages":
            text += "\nGeen fractuur van de voet. Het gewricht is normaal en niet gezwollen met geen letsel."
        elif fault == "another language":
            text = "Geen fractuur van de hand. Het gewricht is normaal. De weke delen zijn niet gezwollen. Dank u."
        elif fault == "another part":
            other_part = "foot" if PARTS[part].upper_limb else "hand"
            text = written_report(person, other_part, side, day, accession, choose).text
        elif fault == "date before birth":
            date = person.born - datetime.timedelta(days=400)
            truth.injected.append(Injected(kind="date", text=f"{date:%d/%m/%Y}"))
            self._redate(place, date)
        elif fault == "no text":
            text = ""
        elif fault == "impossible date of study":
            self._redate(place, None)
        written = f"31/02/{day.year}" if fault == "impossible date of report" else f"{date:%d/%m/%Y}"
        if fault != "study without report":
            self._report(number, person, written, accession, text)
        if fault == "two reports one day":
            second = written_report(person, part, side, day, accession, choose)
            self._report(number + 10**6, person, written, accession, second.text)

    def _report(self, number: int, person: Person, date: str, accession: str, text: str) -> None:
        """One row, or one file; a report without text is a scan where it is a file."""
        self.export.reports += 1
        data = text.encode("cp1252", "replace") if number % 3 == 0 else text.encode()
        ending = ".txt" if text else ".pdf"
        data = data or SCAN
        if self.layout == "files":
            stem = "-".join(reversed(date.split("/"))) + (f"_{accession}" if accession else "")
            path = self.export.folder / "reports" / person.number / (stem + ending)
            if path.exists():  # a second report of that day
                path = path.with_suffix(".text")
        else:
            path = self.export.folder / "reports" / f"{person.last}_{number}{ending}"
            self.rows.append(
                {"ipp": person.number, "date": date, "examen": accession, "nom": person.last, "prenom": person.first,
                 "naissance": f"{person.born:%d/%m/%Y}", "niss": person.national, "telephone": person.phone,
                 "adresse": person.street, "ville": person.city}
                | ({"texte": text} if self.layout == "text" else {"fichier": f"reports/{path.name}"})
            )  # fmt: skip
        if self.layout != "text":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    # --- files of images ---

    def _image(self, place: Path, header: dict[str, Any], **changes: Any) -> Path:
        film = self.pixels[self.uid % len(self.pixels)]
        elements = {
            "SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX", "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11,
            "PixelRepresentation": 0, "Rows": film.shape[0], "Columns": film.shape[1], "PixelData": film.tobytes(),
            "SeriesNumber": 1, "InstanceNumber": self.uid, "ImagerPixelSpacing": [0.143, 0.143], **header, **changes,
        }  # fmt: skip
        dataset = Dataset()
        dataset.SOPInstanceUID = self._uid()
        for name, value in elements.items():
            if value is not None:
                setattr(dataset, name, value)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.private_block(0x0011, "ACME", create=True).add_new(0x01, "LO", str(header["PatientName"]))
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"IM{self.uid:06d}"
        dataset.save_as(path, enforce_file_format=True)
        self.export.files += 1
        return path

    def _add_bad_file(self, fault: str, place: Path, header: dict[str, Any], truth: StudyTruth) -> None:
        """One more file beside sound views, or a sound study whose only fault is a file that is none."""
        film = self.pixels[0]
        colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0,
                  "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7,
                  "PixelData": bytes(3 * film.size)}  # fmt: skip
        changes: dict[str, dict[str, Any]] = {
            "no laterality": {"ImageLaterality": None},
            "colour photograph": colour | {"SOPClassUID": VLPhotographicImageStorage},
            "dose report": {"SOPClassUID": EnhancedSRStorage, "Modality": "SR", "PixelData": None, "Rows": None},
            "page saved as picture": {"SOPClassUID": SecondaryCaptureImageStorage},
            "no pixels": {"PixelData": None},
        }
        if fault == "no DICOM":
            (place / "Thumbs.db").write_bytes(str(header["PatientName"]).encode() * 50)
            self.export.files += 1
            return
        path = self._image(place, header, **changes.get(fault, {}))
        if fault == "truncated":
            data = path.read_bytes()
            path.write_bytes(data[: len(data) - film.nbytes // 2])

    def _redate(self, place: Path, date: datetime.date | None) -> None:
        """Write another date, or one of no calendar, into the headers of a study."""
        for path in sorted(place.iterdir()):
            dataset = dcmread(path)
            if date is None:
                dataset.add_new("StudyDate", "LO", "20201345")
            else:
                dataset.StudyDate = f"{date:%Y%m%d}"
            dataset.save_as(path, enforce_file_format=True)


_OF_IMAGES = ("no laterality", "colour photograph", "dose report", "page saved as picture", "no pixels", "truncated",
              "no DICOM")  # fmt: skip


def _films(rows: int, columns: int, seed: int) -> list[np.ndarray]:
    """[rows, columns] uint16 of 12 bits: a shaft, soft tissue and a detector's noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns] / max(rows, columns)
    films = []
    for _ in range(8):
        bone = np.exp(
            -(((x - 0.5 - 0.1 * np.sin(6 * y + generator.uniform(0, 6))) / generator.uniform(0.05, 0.2)) ** 2)
        )
        film = 500 + 900 * np.sin(np.pi * x) + 1500 * bone + generator.normal(0, 12, x.shape)
        films.append(np.clip(film, 0, 4095).astype(np.uint16))
    return films
