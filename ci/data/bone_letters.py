"""Whole letters around the bone phantom's reports, with identities that nobody has: raw text to test de-identification.

Headings, salutations and number formats are those of French, Belgian and Swiss departments; names, towns and phone
numbers come from faker, numbers of patients and social insurance are made up. Every planted identifier is listed.
"""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from faker import Faker

from shards.ingest.phantom_bone_scene import Habit
from shards.reports.identity.known_patient import KnownPatient

_LOCALES: dict[Habit, str] = {"FR": "fr_FR", "BE": "fr_BE", "CH": "fr_CH"}
_HEADERS: dict[Habit, tuple[str, ...]] = {
    "FR": (
        "{hospital}\nService d'imagerie - Tél : {phone}\nPatient : {caps} {first}, né(e) le {birth}\n"
        "IPP : {id}  N° SS : {insurance}\nExamen du {date}\nMédecin prescripteur : Dr {doctor}\n",
        "Concernant {title} {first} {caps}, né(e) le {birth}, demeurant {address} à {city}.\nExamen le {date}.\n",
    ),
    "BE": (
        "{hospital} - Imagerie médicale\nNom : {caps} {first}   DN : {birth}   NISS : {insurance}\n"
        "Dossier : {id}   Date : {date}\nDemandeur : Dr {doctor}\n",
        "Cher Confrère,\nVotre patient(e) {title} {caps} {first} ({birth}), {address}, {city}, vu(e) le {date}.\n",
    ),
    "CH": (
        "{hospital}, Radiologie\n{title} {caps} {first}, {birth}\nAVS {insurance} - Pat. {id}\n"
        "Examen du {date}, demandé par la Dresse {doctor}, tél. {phone}\n",
        "Madame, Monsieur,\nExamen du {date} : {title} {first} {last}, né(e) le {birth}, {address}, {city}.\n",
    ),
}  # fmt: skip
_COMPARISONS = ("Comparaison : cliché du {old}.", "Comparatif avec l'examen du {old} réalisé à {city}.", "")
_HEADINGS: dict[Habit, tuple[str, str, str]] = {
    "FR": ("Technique :", "Résultats :", "Conclusion :"), "BE": ("Technique :", "Description :", "Conclusion :"),
    "CH": ("Technique :", "Description :", "Appréciation :"),
}  # fmt: skip
_FOOTERS: dict[Habit, tuple[str, ...]] = {
    "FR": ("Dr {radiologist}", "Compte rendu validé par le Dr {radiologist} le {date}."),
    "BE": ("Bien confraternellement,\nDr {radiologist}", "Protocolé par : Dr {radiologist}"),
    "CH": ("Avec mes salutations les meilleures,\nDr méd. {radiologist}", "Dr {radiologist}, {mail}"),
}


@dataclass(frozen=True, kw_only=True)
class Letter:
    """`identifiers`: (kind, as written) of all that was planted; `known`: what the hospital's record would say."""

    text: str = field(repr=False)
    identifiers: tuple[tuple[str, str], ...] = field(repr=False)
    known: KnownPatient = field(repr=False)


def write_letter(sections: Mapping[str, str], habit: Habit, *, sex: str, age_years: float, number: int) -> Letter:
    """The report `sections` as the letter of a department; `number` keys the identity, which is drawn anew for each."""
    fake = Faker(_LOCALES[habit])
    fake.seed_instance(number)
    choose = random.Random(number)
    first, last = (fake.first_name_female if sex == "F" else fake.first_name_male)(), fake.last_name()
    day = datetime.date(2023, 1, 1) + datetime.timedelta(days=choose.randrange(700))
    birth = day - datetime.timedelta(days=round(age_years * 365.25))
    # one place, so that what is known of the patient is what the letter says
    values = {
        "first": first, "last": last, "caps": last.upper(), "title": "Madame" if sex == "F" else "Monsieur",
        "birth": _date(birth, habit), "date": _date(day, habit),
        "old": _date(day - datetime.timedelta(days=choose.randrange(20, 900)), habit),
        "doctor": f"{fake.first_name()} {fake.last_name()}",
        "radiologist": f"{fake.first_name()[0]}. {fake.last_name()}",
        "hospital": choose.choice(("Clinique {}", "Centre hospitalier {}", "Hôpital {}")).format(
            f"Saint-{fake.first_name_male()}"
        ),
        "address": fake.street_address(), "city": fake.city(), "phone": fake.phone_number(), "mail": fake.email(),
        "id": str(choose.randrange(10**7, 10**8)), "insurance": _insurance(habit, birth, sex, choose),
    }  # fmt: skip
    planted: list[tuple[str, str]] = []

    def fill(template: str) -> str:
        for name in re.findall(r"\{(\w+)\}", template):
            if name != "title":
                planted.append((name, values[name]))
        return template.format(**values)

    technique, findings, impression = _HEADINGS[habit]
    parts = [fill(choose.choice(_HEADERS[habit])), f"{technique} {sections['technique']}"]
    comparison = choose.choice(_COMPARISONS)
    parts += [fill(comparison)] if comparison else []
    parts.append(f"{findings} {sections['findings']}")
    parts += [f"{impression} {sections['impression']}"] if "impression" in sections else []
    parts.append(fill(choose.choice(_FOOTERS[habit])))
    known = KnownPatient(
        key=values["id"], first_names=(first,), last_names=(last,), birth_date=birth,
        ids=(values["id"], values["insurance"]), address=values["address"], city=values["city"],
    )  # fmt: skip
    return Letter(text="\n".join(parts) + "\n", identifiers=tuple(planted), known=known)


def _date(day: datetime.date, habit: Habit) -> str:
    return day.strftime({"FR": "%d/%m/%Y", "BE": "%d/%m/%Y", "CH": "%d.%m.%Y"}[habit])


def _insurance(habit: Habit, birth: datetime.date, sex: str, choose: random.Random) -> str:
    """A number in the form of the country, its check digits right."""
    if habit == "FR":
        body = f"{1 if sex == 'M' else 2}{birth:%y%m}{choose.randrange(1, 95):02d}{choose.randrange(1, 990):03d}"
        body += f"{choose.randrange(1, 999):03d}"
        return f"{body[0]} {body[1:3]} {body[3:5]} {body[5:7]} {body[7:10]} {body[10:]} {97 - int(body) % 97:02d}"
    if habit == "BE":
        serial = f"{2 * choose.randrange(1, 498) + (sex == 'M'):03d}"
        digits = f"{birth:%y%m%d}{serial}"
        check = 97 - int(("2" if birth.year >= 2000 else "") + digits) % 97
        return f"{birth:%y.%m.%d}-{serial}.{check:02d}"
    digits = f"756{choose.randrange(10**9):09d}"
    total = sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(digits))
    return f"756.{digits[3:7]}.{digits[7:11]}.{digits[11]}{-total % 10}"
