"""Figures of de-identification: recall and false alarms on French templates, French prose, English reports.

`figures_deid()` is part of `python -m ci.bench reports`. The templates are fictitious and tagged; rules were written
on their even blocks, figures are of the odd ones. Open-i and CT-RATE reports hold no identifier, so seeded ones of five
locales are put in: into headers, signatures, comparisons and prose. Needs ../shared/data and faker.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from faker import Faker

from ci.bench.figure import Figure, figure
from ci.bench.reports_data import ct_rate, folder, open_i
from shards.reports.identity.detector import Detector
from shards.reports.identity.view import Identifier

IDENTITY_TAGS = frozenset({"NOM", "PRENOM", "DATE_NAISSANCE", "TEL", "MAIL", "IPP", "NDA", "SECU"})
NAME_TAGS = frozenset({"NOM", "PRENOM"})
LOCALES = ("en_US", "en_GB", "fr_FR", "de_DE", "es_ES")
RARE_LOCALES = ("tr_TR", "pl_PL", "en_NG", "fr_DZ", "vi_VN", "hr_HR", "sw", "en_IN", "ro_RO", "hu_HU")
NOISE_RATE = 0.02  # characters of tagged text hit by OCR noise
BOOTSTRAPS = 1000
SEED = 20260901
REPORTS_EACH = 700  # of Open-i and of CT-RATE
_TAG = re.compile(r"\[([^\[\]]*?)\]\(([A-Z_]+)\)")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Tag:
    """Characters [start, end) that must not survive."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and what must be found in it."""

    text: str
    tags: tuple[Tag, ...]


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One document's outcome: tags `tagged` and `found` by label; identifiers that touch a tag (`right`) or none
    (`wrong`); words in all, words replaced, and those of them that lie in a tag.
    """

    tagged: Counter[str]
    found: Counter[str]
    right: int
    wrong: int
    words: int
    words_replaced: int
    words_right: int

    @property
    def clean(self) -> bool:
        """Whether nothing is left."""
        return self.tagged == self.found


def figures_deid(quick: bool = False) -> list[Figure]:
    """All de-identification figures. Raises ConfigError when the data folder is missing."""
    detector = Detector()
    return [*_french(detector, quick), *_english(detector, quick)]


def _french(detector: Detector, quick: bool) -> list[Figure]:
    started = time.perf_counter()
    held_out = templates(odd=True)
    counted = [count(document, detector.find(document.text, "fr")) for document in held_out]
    variants = {
        "rare and foreign names": [with_other_names(document, index) for index, document in enumerate(held_out)],
        "OCR noise": [with_noise(document, index) for index, document in enumerate(held_out)],
    }
    varied = {
        name: [count(document, detector.find(document.text, "fr")) for document in documents]
        for name, documents in variants.items()
    }
    labels = sorted({label for one in counted for label in one.tagged})
    identity = [label for label in labels if label in IDENTITY_TAGS]
    place_date = [label for label in labels if label not in IDENTITY_TAGS]
    figures = []
    for figure_id, group in (
        ("reports.deid_fr_recall_identity", identity),
        ("reports.deid_fr_recall_place_date", place_date),
    ):
        value = recall(counted, group)
        low, high = interval(counted, lambda chosen, group=group: recall(chosen, group))  # type: ignore[misc]
        by_class = ", ".join(f"{label} {recall(counted, [label]):.3f}" for label in group)
        also = ", ".join(f"{name} {recall(outcomes, group):.3f}" for name, outcomes in varied.items())
        figures.append(figure(figure_id, value, note=f"95 % {low:.3f}-{high:.3f}; {by_class}; with {also}"))
    low, high = interval(counted, precision)
    figures.append(
        figure(
            "reports.deid_fr_precision", precision(counted),
            note=f"of spans; 95 % {low:.3f}-{high:.3f}; of words {word_precision(counted):.3f}",
        )
    )  # fmt: skip
    low, high = interval(counted, clean_share)
    also = ", ".join(f"{name} {clean_share(outcomes):.3f}" for name, outcomes in varied.items())
    figures.append(
        figure(
            "reports.deid_fr_documents_clean", clean_share(counted),
            note=f"{len(counted)} held-out blocks, 95 % {low:.3f}-{high:.3f}; with {also}",
        )
    )  # fmt: skip
    prose = [Document(text=text, tags=()) for text in french_prose()][: 40 if quick else None]
    alarms = [detector.find(document.text, "fr") for document in prose]
    outcomes = [count(document, found) for document, found in zip(prose, alarms, strict=True)]
    low, high = interval(outcomes, false_per_1000)
    kinds = Counter(one.kind for found in alarms for one in found)
    figures.append(
        figure(
            "reports.deid_fr_false_per_1000", false_per_1000(outcomes), wall_s=time.perf_counter() - started,
            note=f"{len(prose)} texts, 95 % {low:.2f}-{high:.2f}; all spans counted, true years and places among them: "
            + ", ".join(f"{kind} {number}" for kind, number in kinds.most_common()),
        )
    )  # fmt: skip
    return figures


def _english(detector: Detector, quick: bool) -> list[Figure]:
    started = time.perf_counter()
    originals = english_reports(60 if quick else REPORTS_EACH)
    outcomes = [count(document, detector.find(document.text, "en")) for document in injected(originals)]
    labels = sorted({label for one in outcomes for label in one.tagged})
    low, high = interval(outcomes, lambda chosen: recall(chosen, labels))
    by_class = ", ".join(f"{label} {recall(outcomes, [label]):.4f}" for label in labels)
    figures = [
        figure(
            "reports.deid_en_recall", recall(outcomes, labels), seeds=(SEED,),
            note=f"{sum(sum(one.tagged.values()) for one in outcomes)} injected, 95 % {low:.4f}-{high:.4f}; {by_class}",
        )
    ]  # fmt: skip
    untouched = [
        count(Document(text=text, tags=()), detector.find(text, "en")) for texts in originals for text in texts
    ]
    low, high = interval(untouched, false_per_1000)
    figures.append(
        figure(
            "reports.deid_en_false_per_1000", false_per_1000(untouched), wall_s=time.perf_counter() - started,
            note=f"{len(untouched)} reports as published, 95 % {low:.2f}-{high:.2f}",
        )
    )  # fmt: skip
    return figures


# --- counting ---


def count(document: Document, found: Sequence[Identifier]) -> Counted:
    """A tag is found when every letter and digit of it lies in some identifier, of whatever kind."""
    covered = {position for one in found for position in range(one.start, one.end)}
    tagged: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    for tag in document.tags:
        tagged[tag.label] += 1
        if all(p in covered for p in range(tag.start, tag.end) if document.text[p].isalnum()):
            hit[tag.label] += 1
    right = sum(any(one.start < tag.end and tag.start < one.end for tag in document.tags) for one in found)
    words = [match.start() for match in _WORD.finditer(document.text)]
    replaced = [start for start in words if start in covered]
    words_right = sum(any(tag.start <= start < tag.end for tag in document.tags) for start in replaced)
    return Counted(
        tagged=tagged, found=hit, right=right, wrong=len(found) - right, words=len(words),
        words_replaced=len(replaced), words_right=words_right,
    )  # fmt: skip


def recall(outcomes: Sequence[Counted], labels: Sequence[str]) -> float:
    """Share of the tags of these labels that were found."""
    tagged = sum(one.tagged[label] for one in outcomes for label in labels)
    return sum(one.found[label] for one in outcomes for label in labels) / max(1, tagged)


def precision(outcomes: Sequence[Counted]) -> float:
    """Share of the replaced spans that touch a tag."""
    right = sum(one.right for one in outcomes)
    return right / max(1, right + sum(one.wrong for one in outcomes))


def word_precision(outcomes: Sequence[Counted]) -> float:
    """Share of the replaced words that lie in a tag."""
    return sum(one.words_right for one in outcomes) / max(1, sum(one.words_replaced for one in outcomes))


def clean_share(outcomes: Sequence[Counted]) -> float:
    """Share of the documents in which nothing is left."""
    return sum(one.clean for one in outcomes) / max(1, len(outcomes))


def false_per_1000(outcomes: Sequence[Counted]) -> float:
    """Identifiers that touch no tag, per 1,000 words."""
    return 1000 * sum(one.wrong for one in outcomes) / max(1, sum(one.words for one in outcomes))


def interval(outcomes: Sequence[Counted], statistic: Callable[[Sequence[Counted]], float]) -> tuple[float, float]:
    """Bootstrap interval of 95 % over documents."""
    generator = np.random.default_rng(SEED)
    values = [
        statistic([outcomes[i] for i in generator.integers(0, len(outcomes), len(outcomes))])
        for _ in range(BOOTSTRAPS if len(outcomes) < 200 else BOOTSTRAPS // 10)
    ]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


# --- French ---


def templates(*, odd: bool) -> list[Document]:
    """Blocks between blank lines, the odd or the even ones, with their tags."""
    text = (folder("fr_deid_templates") / "templates.txt").read_text("utf-8")
    chosen = [block for index, block in enumerate(text.split("\n\n")) if index % 2 == odd and block.strip()]
    return [tagged(block) for block in chosen]


def tagged(block: str) -> Document:
    """The text and the tags of a block in which tags are written `[text](LABEL)`."""
    pieces: list[str] = []
    tags = []
    length = position = 0
    for match in _TAG.finditer(block):
        pieces += [block[position : match.start()], match[1]]
        start = length + match.start() - position
        length = start + len(match[1])
        tags.append(Tag(start=start, end=length, label=match[2]))
        position = match.end()
    return Document(text="".join([*pieces, block[position:]]), tags=tuple(tags))


def rewritten(document: Document, change: Callable[[Tag, str], str]) -> Document:
    """The document with the text of its tags changed."""
    pieces: list[str] = []
    tags = []
    length = position = 0
    for tag in document.tags:
        written = change(tag, document.text[tag.start : tag.end])
        pieces += [document.text[position : tag.start], written]
        start = length + tag.start - position
        length = start + len(written)
        tags.append(Tag(start=start, end=length, label=tag.label))
        position = tag.end
    return Document(text="".join([*pieces, document.text[position:]]), tags=tuple(tags))


def with_other_names(document: Document, seed: int) -> Document:
    """Every name by a rare or foreign one in the same capitals; one name stays one name, initials stay."""
    fakers = [Faker(locale) for locale in RARE_LOCALES]
    for index, one in enumerate(fakers):
        one.seed_instance(SEED + 97 * seed + index)
    choose = random.Random(SEED + seed)
    known: dict[str, str] = {}

    def change(tag: Tag, written: str) -> str:
        if tag.label not in NAME_TAGS or len(re.sub(r"\W", "", written)) < 3:
            return written
        if written.lower() not in known:
            source = choose.choice(fakers)
            known[written.lower()] = source.first_name() if tag.label == "PRENOM" else source.last_name()
        name = known[written.lower()]
        return name.upper() if written.isupper() else name.lower() if written.islower() else name

    return rewritten(document, change)


def with_noise(document: Document, seed: int) -> Document:
    """Tagged text as a bad scan gives it: neighbours swapped, look-alikes, accents lost."""
    choose = random.Random(SEED + seed)
    alike = {"o": "0", "l": "1", "i": "l", "e": "c", "n": "m", "s": "5", "0": "O", "1": "l", "5": "S", "8": "B"}
    unaccented = str.maketrans("éèêëàâîïôöùûüçÉÈÊÀÂÎÔÛÇ", "eeeeaaiioouuucEEEAAIOUC")

    def change(tag: Tag, written: str) -> str:
        characters = list(written.translate(unaccented) if choose.random() < 0.3 else written)
        for place in range(len(characters)):
            if choose.random() >= NOISE_RATE or not characters[place].isalnum():
                continue
            if choose.random() < 0.5 and place + 1 < len(characters) and characters[place + 1].isalnum():
                characters[place : place + 2] = reversed(characters[place : place + 2])
            else:
                characters[place] = alike.get(characters[place], characters[place])
        return "".join(characters)

    return rewritten(document, change)


def french_prose() -> list[str]:
    """Published French cases: all spans found in them count as false."""
    cases = folder("fr_clinical_cases")
    lines = gzip.decompress((cases / "e3c_pamj_layer3.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    with tarfile.open(cases / "e3c_layer12_json.tar.gz") as archive:
        for member in sorted(archive.getnames()):
            file = archive.extractfile(member)
            if file is not None and member.endswith(".json"):
                texts.append(json.loads(file.read())["text"])
    return texts


# --- English ---


def english_reports(each: int) -> list[list[str]]:
    """`each` reports of CT-RATE and of Open-i, spread over the sets, as published."""
    return [
        [report.text for report in reports[:: max(1, len(reports) // each)][:each]] for reports in (ct_rate(), open_i())
    ]


def injected(originals: Sequence[Sequence[str]]) -> Iterator[Document]:
    """Every report with identifiers of one locale in a header, a signature, a comparison and in prose."""
    fakers = [Faker(locale) for locale in LOCALES]
    for index, fake in enumerate(fakers):
        fake.seed_instance(SEED + index)
    for number, text in enumerate(text for texts in originals for text in texts):
        choose = random.Random(SEED * 7 + number)
        yield _inject(text, fakers[number % len(fakers)], choose)


_HEADERS = (
    "Patient: {full}\nDOB: {birth}\nMRN: {mrn}\n", "PATIENT NAME: {caps}  DATE OF BIRTH: {birth}  ACCESSION #: {acc}\n",
    "Name: {last_first} | ID {mrn} | born {birth}\nAddress: {address}\nPhone: {phone}\n",
    "{mr} {full}, date of birth {birth}, was examined on {date}.\n",
    "Exam date: {date}\nReferring physician: Dr. {full}\n",
    "RE: {full} (MRN {mrn})\n{address}\n", "Pt. name: {last_first}  Tel: {phone}  Email: {mail}\n",
    "Study date {date}, ordered by Dr {last}, {hospital}.\n",
)  # fmt: skip
_PROSE = (
    "Comparison is made with the examination of {date} at {hospital}.",
    "As discussed by phone with Dr. {last} at {phone} on {date}.", "Compared to {date}, no change.",
    "{mr} {last} was informed of the result.", "Prior study dated {date}, accession {acc}, is available.",
    "Findings were communicated to {full}, M.D., on {date}.", "The patient lives in {city}.",
    "Results were sent to {mail}.", "According to the husband, {full}, the symptoms began in {date}.",
    "Nurse {full} was called at {phone}.",
)  # fmt: skip
_FOOTERS = (
    "Dictated by: {full}, MD\nTranscribed on {date}", "Electronically signed by Dr. {full} on {date}",
    "Dictated by Dr {full}", "Radiologist: {initial} {last}, {phone}", "Signed: {full}", "Read by {full}, M.D. {date}",
    "Attending radiologist: Prof. {full}\ncc: Dr {last}", "Social security number: {ssn}", "Contact: {mail}, {phone}",
)  # fmt: skip
_LABELS = {
    "full": "name", "caps": "name", "last_first": "name", "last": "name", "initial": "name", "birth": "birth_date",
    "date": "date", "mrn": "id", "acc": "id", "address": "address", "phone": "phone", "mail": "mail", "ssn": "ssn",
    "hospital": "hospital", "city": "city",
}  # fmt: skip


def _inject(text: str, fake: Faker, choose: random.Random) -> Document:
    pieces: list[str] = []
    tags: list[Tag] = []
    length = 0

    def put(piece: str, label: str | None = None) -> None:
        nonlocal length
        if label is not None:
            tags.append(Tag(start=length, end=length + len(piece), label=label))
        pieces.append(piece)
        length += len(piece)

    def fill(template: str) -> None:
        for position, part in enumerate(re.split(r"\{(\w+)\}", template)):
            if position % 2 == 0:
                put(part)
            elif part == "mr":
                put(choose.choice(("Mr.", "Mrs.", "Ms", "Mr")))
            else:
                put(_value(part, fake, choose), _LABELS[part])

    fill(choose.choice(_HEADERS))
    ends = [match.end() for match in re.finditer(r"[a-z]\. (?=[A-Z])", text)]
    middle = choose.choice(ends) if ends else len(text)
    put(text[:middle])
    fill(("" if text[:middle].endswith(" ") else " ") + choose.choice(_PROSE) + " ")
    put(text[middle:])
    fill("\n" + choose.choice(_FOOTERS) + "\n")
    return Document(text="".join(pieces), tags=tuple(tags))


def _value(name: str, fake: Faker, choose: random.Random) -> str:
    """One identifier of the faker's locale as it would be written."""
    first, last = fake.first_name(), fake.last_name()
    if name in ("date", "birth"):
        date = fake.date_between("-90y", "-20y") if name == "birth" else fake.date_between("-15y", "today")
        day = date.day
        ordinal = f"{day}{'th' if 4 <= day % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"
        return choose.choice((
            date.strftime("%m/%d/%Y"), date.strftime("%d/%m/%Y"), date.strftime("%Y-%m-%d"), date.strftime("%B %d, %Y"),
            date.strftime("%d %B %Y"), date.strftime("%d-%b-%Y"), date.strftime("%m/%d/%y"), date.strftime("%d.%m.%Y"),
            f"{ordinal} of {date:%B %Y}", f"{date:%b}. {day}, {date:%Y}", f"{date:%B} {ordinal}, {date:%Y}",
        ))  # fmt: skip
    if name == "hospital":
        return choose.choice((f"St {first} Hospital", f"{last} Medical Center", f"{last} Memorial Hospital"))
    if name in ("mrn", "acc"):
        prefix = choose.choice(("", "", "A", "CT-", "RX"))
        return prefix + str(choose.randrange(10**6, 10**9))
    values: dict[str, Callable[[], str]] = {
        "full": lambda: f"{first} {last}", "caps": f"{first} {last}".upper,
        "last_first": lambda: f"{last}, {first}", "last": lambda: last, "initial": lambda: f"{first[0]}.",
        "address": fake.address, "phone": fake.phone_number, "mail": fake.email,
        "ssn": fake.ssn, "city": fake.city,
    }  # fmt: skip
    return values[name]()
