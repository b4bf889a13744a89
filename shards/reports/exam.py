"""Whether a report can be that of a study: the part of the body it tells of, and the languages it is in.

Both only refuse: what no word tells passes. Words are compared without case and accents.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from shards.reports import french
from shards.reports.identity.gazetteers import plain
from shards.reports.identity.header import BODY_PARTS
from shards.reports.language import Language, clear_language
from shards.reports.sections import sections

# Along limbs and trunk; parts next to each other are seen on one film, so that each other's report is no mistake.
_CHAINS = (
    ("hand", "wrist", "forearm", "elbow", "upper arm", "shoulder", "chest"),
    ("foot", "ankle", "lower leg", "knee", "thigh", "hip", "pelvis"),
    ("head", "neck", "chest", "lumbar", "pelvis"),
)
_TERMS = {
    "HAND": "hand", "FINGER": "hand", "WRIST": "wrist", "FOREARM": "forearm", "ELBOW": "elbow", "ARM": "upper arm",
    "HUMERUS": "upper arm", "SHOULDER": "shoulder", "CLAVICLE": "shoulder", "SCAPULA": "shoulder", "FOOT": "foot",
    "TOE": "foot", "CALCANEUS": "foot", "ANKLE": "ankle", "LEG": "lower leg", "TIBIA": "lower leg", "KNEE": "knee",
    "FEMUR": "thigh", "HIP": "hip", "PELVIS": "pelvis", "SSPINE": "pelvis", "COCCYX": "pelvis", "LSPINE": "lumbar",
    "ABDOMEN": "lumbar", "CHEST": "chest", "TSPINE": "chest", "RIB": "chest", "STERNUM": "chest", "BREAST": "chest",
    "CSPINE": "neck", "NECK": "neck", "SKULL": "head", "HEAD": "head", "JAW": "head",
}  # fmt: skip
_PAIRED_NAMES = frozenset((*_CHAINS[0][:-1], *_CHAINS[1][:-1]))
_TERM_OF = {
    "hand": "HAND", "wrist": "WRIST", "forearm": "FOREARM", "elbow": "ELBOW", "upper arm": "HUMERUS",
    "shoulder": "SHOULDER", "foot": "FOOT", "ankle": "ANKLE", "lower leg": "LEG", "knee": "KNEE", "thigh": "FEMUR",
    "hip": "HIP",
}  # fmt: skip
# Of which each image is of one side; "EXTREMITY" stands for any limb.
PAIRED_PARTS = frozenset(
    term for term, part in _TERMS.items() if part in _PAIRED_NAMES
) | {"EXTREMITY", "BREAST"}  # fmt: skip
_WORDS = {
    "hand": r"doigts?|pouces?|metacarp\w*|hands?|fingers?|thumbs?",
    "wrist": r"poignets?|carpe|carpien\w*|scaphoid\w*|wrists?|carpals?",
    "forearm": r"avant-?\s?bras|forearms?",
    "elbow": r"coudes?|olecran\w*|elbows?",
    "upper arm": r"humerus|humera\w*|(?<!avant-)(?<!avant )(?<!avant)bras|upper arms?",
    "shoulder": r"epaules?|clavic\w*|omoplates?|scapul\w*|shoulders?",
    "foot": r"pieds?|orteils?|hallux|calcane\w*|metatars\w*|foot|feet|toes?",
    "ankle": r"chevilles?|malleol\w*|ankles?",
    "lower leg": r"jambes?|tibias?|perone|fibulas?|lower legs?",
    "knee": r"genoux?|rotul\w*|patell\w*|femoro-?\s?tibia\w*|gonarthros\w*|knees?",
    "thigh": r"cuisses?|femurs?|femora\w*|thighs?",
    "hip": r"hanches?|coxo-?\s?femora\w*|coxarthros\w*|cotyles?|acetabul\w*|hips?",
    "pelvis": r"bassins?|pelvi\w*|sacr\w*|pelvis",
    "lumbar": r"lombaires?|lombo\w*|abdom\w*|lumbar",
    "chest": r"thora\w*|poumons?|pulmona\w*|sternum|chest|lungs?|ribs?",
    "neck": r"cervica\w*|neck",
    "head": r"cranes?|mandibul\w*|skull|jaw",
}
_FRENCH_HAND = r"mains?"  # an adjective in English
_TITLE_CHARACTERS = 120  # of a report without headings: where its title stands
_MINORITY_SENTENCES = 2  # clearly in another language, or one in as few as
_MINORITY_SHARE = 0.25


def _pattern(hand: str) -> re.Pattern[str]:
    groups = {**_WORDS, "hand": f"{_WORDS['hand']}{hand}"}
    named = (f"(?P<{part.replace(' ', '_')}>{words})" for part, words in groups.items())
    return re.compile(rf"(?<![a-z0-9])(?:{'|'.join(named)})(?![a-z0-9])")


_PATTERNS = {"fr": _pattern(f"|{_FRENCH_HAND}"), "en": _pattern("")}


def named_parts(text: str, language: Language) -> set[str]:
    """The parts of the body that words of the text name."""
    pattern = _PATTERNS["en" if language == "en" else "fr"]
    return {str(match.lastgroup).replace("_", " ") for match in pattern.finditer(plain(text))}


def term_of(body_part: str) -> str | None:
    """The DICOM term of what a header calls a part of the body, upper case: of such a term, or of words that name one
    part of a limb in French or English, "GENOU DT"; None of all else.
    """
    if body_part in BODY_PARTS:
        return body_part
    named = _named_by_header(body_part)
    return _TERM_OF.get(named.pop()) if len(named) == 1 else None


def _named_by_header(body_part: str) -> set[str]:
    """Parts that a header names in words, whose language it does not tell."""
    return named_parts(body_part, "fr") | named_parts(body_part, "en")


def is_paired(body_part: str) -> bool | None:
    """Whether there are two of a part, so that an image of it is of one side; None where nobody can tell.

    `body_part`: upper case, a term of DICOM or the word that a clinic writes instead: "GENOU", "BASSIN".
    """
    if body_part in BODY_PARTS:
        return body_part in PAIRED_PARTS
    named = _named_by_header(body_part)
    return bool(named & _PAIRED_NAMES) if named else None


def is_of_other_part(text: str, language: Language, body_parts: Iterable[str], told: str = "") -> bool:
    """Whether a report names parts of the body, and none that is, or lies beside, one of the study's.

    `body_parts`: DICOM terms of the study's views; `told`: what a table says of the part. Where that, or else the part
    of the report before its findings, names any, it alone counts.
    """
    near: set[str] = set()
    for term in body_parts:
        if (part := _TERMS.get(term)) is None:  # EXTREMITY, SPINE, or nothing: any report may be its own
            return False
        for chain in _CHAINS:
            if part in chain:
                place = chain.index(part)
                near |= set(chain[max(0, place - 1) : place + 2])
    if not near:
        return False
    for words in (told, _lead(text), text):
        if found := named_parts(words, language):
            return not found & near
    return False


def _lead(text: str) -> str:
    """What stands before the findings: title, indication, technique."""
    parts = sections(text)
    lead = [text[part.start : part.end] for part in parts if part.name in ("header", "indication", "technique")]
    first = text.partition("\n")[0]
    return "\n".join(lead) if lead else first[:_TITLE_CHARACTERS] if len(first) < len(text) else ""


def has_two_languages(text: str) -> bool:
    """Whether some sentences are clearly in one language and some clearly in another."""
    told = Counter(filter(None, (clear_language(text[start:end]) for start, end in french.sentences(text))))
    if len(told) < 2:
        return False
    minority = sum(told.values()) - max(told.values())
    return minority >= _MINORITY_SENTENCES or minority >= _MINORITY_SHARE * sum(told.values())
