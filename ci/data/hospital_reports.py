"""Invented French bone reports and the patients they name, in the habits of France, Belgium, Switzerland and Quebec.

Each report comes with every identifier that was put in, and with its prose alone.
"""

from __future__ import annotations

import datetime
import random
import re
from dataclasses import dataclass
from typing import Any

from faker import Faker

_MONTHS = ("janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre", "octobre", "novembre",
           "décembre")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the body: its DICOM term, its name with its article, and what reports say of it."""

    term: str
    name: str
    upper_limb: bool
    findings: tuple[str, ...]


PARTS = {
    "hand": Part("HAND", "de la main", True, (
        "Pas de lésion osseuse traumatique.", "Rhizarthrose débutante du pouce.",
        "Fracture non déplacée du col du cinquième métacarpien.", "Interlignes articulaires respectés.",
    )),
    "wrist": Part("WRIST", "du poignet", True, (
        "Fracture de l'extrémité distale du radius avec bascule dorsale.", "Pas de fracture du scaphoïde décelable.",
        "Trame osseuse normale.", "Tuméfaction des parties molles en regard du carpe.",
    )),
    "knee": Part("KNEE", "du genou", False, (
        "Pincement fémoro-tibial interne modéré, gonarthrose stade 2.", "Ostéophytes marginaux de 2.5 mm.",
        "Absence d'épanchement intra-articulaire.", "Pas de lésion osseuse focale.",
    )),
    "foot": Part("FOOT", "du pied", False, (
        "Hallux valgus mesuré à 24 degrés.", "Pas de trait de fracture visible sur les métatarsiens.",
        "Épine calcanéenne inférieure.", "Minéralisation osseuse satisfaisante.",
    )),
}  # fmt: skip
_SIDES = {"L": "gauche", "R": "droit"}
_INDICATIONS = (
    "Chute ce jour.",
    "Douleurs mécaniques depuis 3 mois.",
    "Contrôle post-opératoire.",
    "Arthrose.",
)
_TECHNIQUES = ("Incidences de face et de profil.", "Clichés F + P.", "Cliché de face, 3/4 et profil strict.")
_HOSPITALS = {
    "fr_FR": "Centre Hospitalier Universitaire de {city}", "fr_BE": "Cliniques universitaires Saint-{saint}",
    "fr_CH": "Hôpital cantonal de {city}", "fr_CA": "Hôpital Saint-{saint}",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Person:
    """A patient with all that an archive knows, and the doctors around."""

    locale: str
    first: str
    last: str
    sex: str
    born: datetime.date
    number: str
    national: str
    phone: str
    mail: str
    street: str
    city: str
    referrer: str
    reader: str
    reader_phone: str
    hospital: str

    @classmethod
    def drawn(cls, fake: Faker, locale: str, choose: random.Random, number: int) -> Person:
        """A patient of a country."""
        sex = choose.choice("FM")
        first = fake.first_name_female() if sex == "F" else fake.first_name_male()
        last = fake.last_name()
        born = datetime.date(1935, 1, 1) + datetime.timedelta(days=choose.randrange(28_000))
        digits = "".join(choose.choices("0123456789", k=6))
        national = {
            "fr_FR": f"{1 if sex == 'M' else 2} {born:%y} {born:%m} 75 {digits[:3]} {digits[3:]}",
            "fr_BE": f"{born:%y.%m.%d}-{digits[:3]}.{digits[3:5]}",
            "fr_CH": f"756.{digits[:4]}.{digits[2:]}.{digits[:2]}",
            "fr_CA": f"{last[:3].upper()}{first[0].upper()} {born:%y%m} {born:%d}{digits[:2]}",
        }[locale]  # fmt: skip
        city = fake.city()
        hospital = _HOSPITALS[locale].format(city=city, saint=fake.first_name_male())
        return cls(
            locale=locale, first=first, last=last, sex=sex, born=born, national=national,
            number=f"{choose.randrange(10**7, 10**8)}{number % 1000:03d}", phone=_phone(locale, choose),
            mail=f"{_ascii(first)}.{_ascii(last)}@{fake.free_email_domain()}", street=_street(fake, locale, choose),
            city=city, referrer=fake.last_name(), reader=f"{fake.first_name()} {fake.last_name()}",
            reader_phone=_phone(locale, choose), hospital=hospital,
        )  # fmt: skip

    def header(self, day: datetime.date, accession: str, part: str, side: str) -> dict[str, Any]:
        """DICOM elements with the person in them."""
        reader_first, _, reader_last = self.reader.partition(" ")
        return {
            "PatientName": f"{self.last.upper()}^{self.first}", "PatientID": self.number, "PatientSex": self.sex,
            "PatientBirthDate": f"{self.born:%Y%m%d}", "StudyDate": f"{day:%Y%m%d}",
            "AccessionNumber": accession or None, "BodyPartExamined": PARTS[part].term, "ImageLaterality": side,
            "ReferringPhysicianName": self.referrer, "NameOfPhysiciansReadingStudy": f"{reader_last}^{reader_first}",
            "InstitutionName": self.hospital, "PatientAddress": f"{self.street}, {self.city}",
            "PatientTelephoneNumbers": self.phone, "StudyDescription": f"{part} {self.last}",
            "SpecificCharacterSet": "ISO_IR 192",
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """A report's text, what was put in as (kind, text), the prose around it, and how the findings begin."""

    text: str
    opening: str
    injected: tuple[tuple[str, str], ...]
    prose: str


def written_report(
    person: Person, part: str, side: str, day: datetime.date, accession: str, choose: random.Random
) -> WrittenReport:
    """A report on one part in one of four layouts of letterhead, with identifiers in head, prose and signature."""
    before = day - datetime.timedelta(days=choose.randrange(30, 900))
    about = PARTS[part]
    said = choose.sample(about.findings, k=choose.choice((2, 3)))
    title = choose.choice(("civility", "doctor"))
    civility = "Madame" if person.sex == "F" else "Monsieur"
    values = {
        "first": ("name", person.first), "last": ("name", person.last), "LAST": ("name", person.last.upper()),
        "born": ("date", f"{person.born:%d/%m/%Y}"), "day": ("date", f"{day:%d/%m/%Y}"),
        "longday": ("date", f"{day.day} {_MONTHS[day.month - 1]} {day.year}"),
        "before": ("date", choose.choice((f"{before:%d/%m/%Y}", f"{before:%d.%m.%Y}"))), "ipp": ("id", person.number),
        "national": ("id", person.national), "accession": ("id", accession), "phone": ("phone", person.phone),
        "readerphone": ("phone", person.reader_phone), "mail": ("mail", person.mail),
        "street": ("place", person.street),
        "referrer": ("name", person.referrer), "reader": ("name", person.reader),
    }  # fmt: skip
    exam = f"RADIOGRAPHIE {about.name} {_SIDES[side]}".upper()
    head = choose.choice((
        f"{{LAST}} {{first}}, né(e) le {{born}}\nIPP : {{ipp}}\n{exam} du {{day}}\n",
        f"Patient : {civility} {{first}} {{last}}\nDate de naissance : {{born}}\nN° national : {{national}}\n"
        f"Adresse : {{street}}\nTél. {{phone}}\n\n{exam}\n",
        f"Concerne : {{LAST}} {{first}} - {{born}} - dossier {{ipp}}\nExamen du {{longday}}\n{exam}\n",
        f"{civility} {{LAST}}, {{mail}}, {{phone}}\nDemandé par le Dr {{referrer}}\n{exam}, le {{day}}\n",
    ))  # fmt: skip
    number = "N° d'examen : {accession}\n" if accession else ""
    history = choose.choice((
        f"Chez {civility} {{last}}, comparé au cliché du {{before}}.", "Comparaison : examen du {before}.",
        "Résultat transmis par téléphone au Dr {referrer}.", "",
    ))  # fmt: skip
    conclusion = choose.choice(
        (f"CONCLUSION : {said[0]}", "CONCLUSION : Examen sans anomalie notable.", "CONCLUSION :")
    )
    sign = choose.choice((
        "Dr {reader}", "Docteur {reader}, le {day}", "Cordialement,\nDr {reader}\nSecrétariat : {readerphone}",
        "Validé par le Dr {reader} le {day}",
    ))  # fmt: skip
    empty = " [...]" if choose.random() < 0.2 else ""
    thanks = "Merci de nous avoir adressé ce patient.\n" if title == "civility" else ""
    opening = f"{about.name[0].upper()}{about.name[1:]} {_SIDES[side]}. {' '.join(said)}"
    template = (
        f"{head}{number}\nINDICATION : {choose.choice(_INDICATIONS)}\nTECHNIQUE : {choose.choice(_TECHNIQUES)}\n"
        f"RÉSULTATS : {about.name[0].upper()}{about.name[1:]} {_SIDES[side]}. {' '.join(said)}{empty} {history}\n"
        f"{conclusion}\n\n{thanks}{sign}\n"
    )
    names = re.findall(r"\{(\w+)\}", template)
    text = template.format(**{name: text for name, (_, text) in values.items()})
    injected = dict.fromkeys(values[name] for name in names)
    # What header or table alone hold must not survive either.
    always = (("id", person.number), ("id", person.national), ("phone", person.phone), ("name", person.last),
              ("date", f"{person.born:%Y%m%d}"), ("date", f"{day:%Y%m%d}"), ("id", accession))  # fmt: skip
    everything = tuple(dict.fromkeys((*injected, *always)))
    return WrittenReport(text=text, injected=everything, prose=re.sub(r"\{\w+\}", " ", template), opening=opening)


def _ascii(name: str) -> str:
    folded = name.lower().translate(str.maketrans("àâäçéèêëîïôöùûü", "aaaceeeeiioouuu"))
    return re.sub(r"[^a-z]", "", folded) or "patient"


def _phone(locale: str, choose: random.Random) -> str:
    a, b, c, d = (f"{choose.randrange(10, 100)}" for _ in range(4))
    swiss, canadian = choose.choice((21, 22, 24, 26, 27, 32, 79)), choose.choice((418, 438, 450, 514, 819))
    return {
        "fr_FR": f"0{choose.choice('123456')} {a} {b} {c} {d}",
        "fr_BE": f"04{a}/{b}.{c}.{d}",
        "fr_CH": f"0{swiss} {a}{choose.randrange(10)} {b} {c}",
        "fr_CA": f"{canadian}-{choose.randrange(200, 999)}-{a}{b}",
    }[locale]


def _street(fake: Faker, locale: str, choose: random.Random) -> str:
    if locale == "fr_BE":  # faker has no Belgian streets
        return (
            f"rue {choose.choice(('de la Station', 'du Moulin', 'des Tilleuls', 'Haute'))} {choose.randrange(1, 300)}"
        )
    return str(fake.street_address()).replace("\n", " ")
