"""Words of a bone phantom: French reports as they are written in France, Belgium and Switzerland, and prompts.

Templates are our own. What is there is named nearly always, what is absent is denied now and then, and nothing is said
that is not so: a fracture whose coin was undecided is left open. Sides agree with their noun: `{m}` droit, `{f}`
droite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from shards.ingest.phantom_bone_scene import (
    AXIS_NORMAL_DEGREES,
    CAST_PARTS,
    IMPLANTS,
    KL_DEFINITE,
    LABELS,
    PLACES,
    Arthritis,
    Fracture,
    Habit,
    Part,
    Scene,
    Side,
    draw_words,
)

Exist = Literal["yes", "unsure", "no"]
NORMAL_SHARE = 0.45  # of studies without a finding that get the sentences of a dictation key, word for word
NAMED: dict[str, float] = {
    "fracture": 0.97, "implant": 0.92, "cast": 0.85, "osteoarthritis": 0.95, "axis": 0.97, "bone age": 0.95,
    "lesion": 0.85,
}  # fmt: skip
DENIED: dict[str, float] = {"fracture": 0.55, "osteoarthritis": 0.35, "implant": 0.03}

# Noun with its article, gender, and how the limb's habitual views are written out and for short.
_LIMBS: dict[Part, tuple[str, str]] = {
    "WRIST": ("du poignet", "m"), "HAND": ("de la main", "f"), "KNEE": ("du genou", "m"),
    "LEG": ("du membre inférieur", "m"), "FOREARM": ("de l'avant-bras", "m"), "TIBIA": ("de la jambe", "f"),
}  # fmt: skip
_VIEWS: dict[tuple[str, ...], tuple[str, str, str]] = {
    ("AP", "LATERAL"): ("de face et de profil", "F/P", "ap/lat"),
    ("AP",): ("de face", "F", "ap"),
    ("LATERAL",): ("de profil", "P", "lat"),
    ("AP", "OBLIQUE"): ("de face et de trois quarts", "F/obl.", "dp et oblique"),
    ("LATERAL", "OBLIQUE"): ("de profil et de trois quarts", "P/obl.", "lat et oblique"),
    ("AP", "LATERAL", "OBLIQUE"): ("de face, de profil et de trois quarts", "F/P/obl.", "ap/lat et oblique"),
}
_TECHNIQUE: dict[Habit, tuple[str, ...]] = {
    "FR": ("Radiographies {limb} {side} {long}.", "Clichés {limb} {side} {long}.", "Incidences {long} {limb} {side}."),
    "BE": ("Rx {limb} {side} {short}.", "RX {limb} {brief} {short}.", "Radiographie {limb} {side} {short}."),
    "CH": ("Radiographie {limb} {side} {swiss}.", "Rx {limb} {side} {swiss}.", "Cliché {limb} {side} {long}."),
}
_LONG_LEG: dict[Habit, tuple[str, ...]] = {
    "FR": ("Pangonogramme {limb} {side} en charge.", "Télémétrie {limb} {side} de face en charge."),
    "BE": ("Rx full leg {limb} {side} en charge.", "Full leg en charge {limb} {side}."),
    "CH": ("Radiographie axée {limb} {side} en charge.", "Longs axes {limb} {side} en charge."),
}

_BONES: dict[str, tuple[tuple[str, str], ...]] = {  # where a fracture is, and the gender of the noun its side follows
    "wrist radius": (("de l'extrémité distale du radius", "m"), ("du radius distal", "m"),
                     ("métaphysaire distale du radius", "m")),
    "radius": (("de la diaphyse du radius", "m"), ("diaphysaire du radius", "m"), ("du tiers moyen du radius", "m")),
    "ulna": (("de la diaphyse de l'ulna", "f"), ("diaphysaire du cubitus", "m"), ("de l'ulna", "f")),
    "tibia": (("de la diaphyse du tibia", "m"), ("diaphysaire du tibia", "m"), ("du tibia", "m")),
    "fibula": (("de la diaphyse de la fibula", "f"), ("diaphysaire du péroné", "m"), ("du péroné", "m")),
    "tibial plateau": (("du plateau tibial latéral du genou", "m"), ("du plateau tibial externe du genou", "m")),
    "metacarpal 5": (("du cinquième métacarpien de la main", "f"), ("de la diaphyse de M5 de la main", "f")),
    "metacarpal 2": (("du deuxième métacarpien de la main", "f"), ("de la diaphyse de M2 de la main", "f")),
    "phalanx 3": (("de la phalange proximale du majeur de la main", "f"), ("de P1 du troisième doigt de la main", "f")),
    "phalanx 4": (("de la première phalange de l'annulaire de la main", "f"),
                  ("de P1 du quatrième doigt de la main", "f")),
}  # fmt: skip
_FRACTURES: dict[str, tuple[str, ...]] = {
    "torus": (
        "Fracture en motte de beurre {bone} {side}.",
        "Fracture {bone} {side} de type motte de beurre, tassement cortical.",
        "Fracture sous-périostée de type motte de beurre {bone} {side}.",
    ),
    "epiphyseal": (
        "Fracture-décollement épiphysaire {bone} {side}, Salter-Harris II, {shift}.",
        "Fracture avec décollement épiphysaire {bone} {side}, type Salter II, {shift}.",
        "Fracture Salter II {bone} {side}, {shift}.",
    ),
    "complete": (
        "Fracture {bone} {side}, {shift}.",
        "On visualise un trait de fracture {bone} {side}, {shift}.",
        "Trait de fracture {slant} {bone} {side}, {shift}.",
        "Solution de continuité corticale {bone} {side} en rapport avec une fracture {shift}.",
    ),
}
_HEDGED_FRACTURES = (
    "Doute sur une fracture {bone} {side}, à confronter à la clinique.",
    "Fine clarté {bone} {side}, une fracture non déplacée n'est pas exclue.",
    "Possible fracture {bone} {side}, à contrôler à J10.",
    "Image douteuse {bone} {side}, fissure possible.",
)
_CONCLUDED_FRACTURES = ("Fracture {bone} {side}.", "Fracture {bone} {side}, {shift}.")
_DENIED_FRACTURES: dict[Habit, tuple[str, ...]] = {
    "FR": ("Pas de lésion osseuse traumatique.", "Absence de fracture visible.", "Pas de trait de fracture décelable."),
    "BE": ("Pas de lésion osseuse traumatique.", "Pas de fracture visualisée.", "Pas d'image de fracture."),
    "CH": ("Pas de lésion osseuse post-traumatique visible.", "Pas de fracture.", "Pas de fracture décelable."),
}
_COMPARTMENTS = {"medial": ("interne", "médiale"), "lateral": ("externe", "latérale")}
_STAGES = ("", "", "II", "III", "IV")
_ARTHRITIS = (
    "Gonarthrose fémoro-tibiale {compartment} {side} stade {stage} : {signs}.",
    "{signs_start}, en rapport avec une gonarthrose fémoro-tibiale {compartment} {side} de stade {stage}.",
    "Arthrose fémoro-tibiale {compartment} du genou {m}, Kellgren-Lawrence {stage}, avec {signs}.",
)
_SIGNS = {
    2: ("ostéophytose marginale et pincement discret", "ostéophytes débutants"),
    3: ("pincement modéré de l'interligne et ostéophytes", "pincement net de l'interligne avec ostéophytose"),
    4: ("disparition de l'interligne, ostéophytes volumineux et sclérose sous-chondrale",
        "pincement complet de l'interligne avec condensation sous-chondrale"),
}  # fmt: skip
_CONCLUDED_ARTHRITIS = (
    "Gonarthrose fémoro-tibiale {compartment} {side} stade {stage}.", "Gonarthrose {side} stade {stage}.",
)  # fmt: skip
_DENIED_ARTHRITIS = (
    "Pas d'arthrose.", "Interlignes articulaires conservés.", "Respect des interlignes fémoro-tibiaux.",
    "Pas de pincement articulaire.",
)  # fmt: skip
_IMPLANTS: dict[str, tuple[str, ...]] = {
    "wires": ("Ostéosynthèse par broches {limb} {side}.", "Deux broches de Kirschner en place {limb} {side}."),
    "plate": ("Matériel d'ostéosynthèse par plaque vissée {limb} {side}.", "Plaque et vis en place {limb} {side}."),
    "nail": ("Enclouage centromédullaire {limb} {side}.", "Clou centromédullaire en place {limb} {side}."),
    "prosthesis": ("Prothèse totale de genou {f} en place.", "PTG {f} sans signe de descellement.",
                   "Arthroplastie totale du genou {m}."),
}  # fmt: skip
_CASTS: dict[Habit, tuple[str, ...]] = {
    "FR": ("Contrôle sous plâtre.", "Immobilisation plâtrée en place.", "Clichés réalisés sous plâtre."),
    "BE": ("Sous plâtre.", "Contrôle sous gypse.", "Attelle plâtrée en place."),
    "CH": ("Contrôle sous plâtre.", "Immobilisation par attelle plâtrée.", "Status sous plâtre."),
}
_LESIONS = (
    "Lésion lacunaire bien limitée, d'allure bénigne.", "Image kystique osseuse à contours condensés.",
    "Géode osseuse à bords nets, non agressive.",
)  # fmt: skip
_BONE_AGES = (
    "Âge osseux estimé à {age} selon Greulich et Pyle.", "Âge osseux de {age} (atlas de Greulich et Pyle).",
    "Maturation osseuse correspondant à {age}.",
)  # fmt: skip
_BONE_AGE_VERDICTS = {
    -1: ("Retard de maturation osseuse.", "Âge osseux en retard sur l'âge civil."),
    0: ("Âge osseux concordant avec l'âge civil.", "Maturation osseuse normale pour l'âge."),
    1: ("Avance de maturation osseuse.", "Âge osseux en avance sur l'âge civil."),
}
_AXES = {
    1: ("Genu varum {side}, axe mécanique mesuré à {angle}° de varus.", "Morphotype en varus de {angle}° à {at}."),
    0: ("Axe mécanique {limb} {side} normal ({angle}° de {direction}).", "Axe normal, {angle}° de {direction} à {at}."),
    -1: ("Genu valgum {side}, axe mécanique mesuré à {angle}° de valgus.", "Morphotype en valgus de {angle}° à {at}."),
}
_PLATES = {
    True: ("Cartilages de croissance encore ouverts.", "Cartilages de conjugaison visibles."),
    False: ("Cartilages de croissance fusionnés.", "Fermeture des cartilages de conjugaison."),
}
_FILLERS: dict[Habit, tuple[str, ...]] = {
    "FR": ("Parties molles sans particularité.", "Minéralisation osseuse normale.", "Rapports articulaires conservés."),
    "BE": ("Pas d'anomalie des tissus mous.", "Minéralisation homogène.", "Rapports articulaires respectés."),
    "CH": ("Parties molles sp.", "Trame osseuse conservée.", "Bons rapports articulaires."),
}
_NORMAL: dict[Habit, tuple[tuple[str, str], ...]] = {  # findings and conclusion of a dictation key
    "FR": (("Pas de lésion osseuse traumatique. Rapports articulaires conservés.", "Examen sans particularité."),
           ("Absence de fracture visible. Parties molles sans particularité.", "Pas d'anomalie.")),
    "BE": (("Pas de lésion osseuse traumatique. Rapports articulaires respectés.", "Examen normal."),
           ("Pas de fracture visualisée. Minéralisation homogène.", "Sans particularité.")),
    "CH": (("Pas de fracture. Bons rapports articulaires.", "Status radiologique normal."),
           ("Pas de lésion osseuse post-traumatique visible. Parties molles sp.", "Examen dans les normes.")),
}  # fmt: skip
_CONCLUDED_NORMAL: dict[Habit, tuple[str, ...]] = {
    "FR": ("Pas d'anomalie.", "Examen sans particularité.", "Bilan radiographique normal."),
    "BE": ("Examen normal.", "Sans particularité.", "Pas d'anomalie significative."),
    "CH": ("Status radiologique normal.", "Examen dans les normes.", "Pas d'anomalie."),
}


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One sentence and what it says of which thing: a label, or `axis`, `bone age`, `lesion`."""

    name: str
    exist: Exist
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """`sections`: technique, findings, impression."""

    sections: dict[str, str]
    statements: tuple[Statement, ...]


def side_word(side: Side, gender: str) -> str:
    """droit, droite or gauche."""
    return "gauche" if side == "L" else "droit" if gender == "m" else "droite"


def _start(text: str) -> str:
    return text[0].upper() + text[1:]


def _shift_word(fracture: Fracture) -> str:
    if fracture.displacement < 0.15:
        return "non déplacée"
    return "peu déplacée" if fracture.displacement < 0.5 else "déplacée"


def _age_words(months: float) -> str:
    """Rounded to half years, as atlases have it."""
    halves = round(months / 6.0)
    years, half = divmod(halves, 2)
    if years == 0:
        return "6 mois"
    return f"{years} an{'s' if years > 1 else ''}{' et demi' if half else ''}"


class _Writer:
    """Sentences of one scene as they are chosen."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self._numbers = scene, iter(draw_words(scene, 96))
        limb, gender = _LIMBS[scene.part]
        side = side_word(scene.side, gender)
        self.words = {
            "limb": limb, "side": side, "m": side_word(scene.side, "m"), "f": side_word(scene.side, "f"),
            "at": "gauche" if scene.side == "L" else "droite", "brief": {"droit": "dt", "droite": "dte"}.get(side, "G"),
        }  # fmt: skip
        self.said: list[str] = []
        self.concluded: list[str] = []
        self.statements: list[Statement] = []

    def number(self) -> float:
        return next(self._numbers)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.number() * len(options))]

    def fill(self, template: str, **more: str) -> str:
        return _start(template.format(**{**self.words, **more}))

    def say(self, name: str, exist: Exist, template: str, conclusion: str | None = None, **more: str) -> None:
        """A sentence among the findings and, where given, one of the conclusion."""
        sentence = self.fill(template, **more)
        self.said.append(sentence)
        self.statements.append(Statement(name=name, exist=exist, sentence=sentence))
        if conclusion is not None:
            self.concluded.append(self.fill(conclusion, **more))
            self.statements.append(Statement(name=name, exist=exist, sentence=self.concluded[-1]))

    def names(self, name: str, there: bool) -> bool:
        """Whether what is there is named; a number is drawn for what is not there, too."""
        return self.number() < NAMED[name] and there


def write_report(scene: Scene) -> Report:
    """The report of a scene; the choice of words is a function of the scene's key."""
    writer = _Writer(scene)
    long, short, swiss = _VIEWS[scene.views]
    form = _LONG_LEG if scene.part == "LEG" else _TECHNIQUE
    technique = writer.fill(writer.pick(form[scene.habit]), long=long, short=short, swiss=swiss)
    if writer.names("cast", scene.cast):
        writer.say("cast", "yes", writer.pick(_CASTS[scene.habit]))
    _say_fracture(writer)
    if writer.names("implant", bool(scene.implant)):
        template = writer.pick(_IMPLANTS[scene.implant])
        writer.say("implant", "yes", template, template if writer.number() < 0.5 else None)
    if scene.arthritis is not None:
        _say_arthritis(writer, scene.arthritis)
    if scene.axis_angle_degrees is not None and writer.names("axis", True):
        _say_axis(writer, scene.axis_angle_degrees)
    if scene.part == "HAND" and scene.bone_age_months is not None and writer.names("bone age", True):
        _say_bone_age(writer, scene.bone_age_months)
    if writer.names("lesion", scene.lesion > 0):
        template = writer.pick(_LESIONS)
        writer.say("lesion", "yes", template, template)
    if not writer.said and not scene.labels["anomaly"] and writer.number() < NORMAL_SHARE:
        findings, impression = _NORMAL[scene.habit][int(writer.number() * len(_NORMAL[scene.habit]))]
        statement = Statement(name="fracture", exist="no", sentence=findings.split(". ")[0] + ".")
        sections = {"technique": technique, "findings": findings, "impression": impression}
        return Report(sections=sections, statements=(statement,))
    _deny(writer)
    if scene.part in ("WRIST", "HAND") and scene.bone_age_months is not None and writer.number() < 0.15:
        writer.said.append(writer.pick(_PLATES[scene.plate_mm > 0.4]))
    if not writer.said or writer.number() < 0.35:
        writer.said.append(writer.pick(_FILLERS[scene.habit]))
    if not writer.concluded and not scene.labels["anomaly"]:
        writer.concluded.append(writer.pick(_CONCLUDED_NORMAL[scene.habit]))
    sections = {"technique": technique, "findings": " ".join(writer.said)}
    if writer.concluded:
        sections["impression"] = " ".join(writer.concluded)
    return Report(sections=sections, statements=tuple(writer.statements))


def _say_fracture(writer: _Writer) -> None:
    fracture, scene = writer.scene.fracture, writer.scene
    named = writer.names("fracture", fracture is not None and (fracture.present or fracture.hedged))
    if fracture is None or not named:
        return
    bones = _bone_of(scene.part, fracture.place)
    bone, gender = bones[int(writer.number() * len(bones))]
    words = {
        "bone": bone, "side": side_word(scene.side, gender), "shift": _shift_word(fracture),
        "slant": "oblique" if abs(fracture.slant) > 0.4 else "transversal",
    }  # fmt: skip
    if fracture.hedged:
        writer.say("fracture", "unsure", writer.pick(_HEDGED_FRACTURES), **words)
        if writer.number() < 0.5 or fracture.present:
            writer.concluded.append(writer.fill("Possible fracture {bone} {side}.", **words))
        return
    conclusion = writer.pick(_CONCLUDED_FRACTURES[: 1 if fracture.kind == "torus" else 2])
    writer.say("fracture", "yes", writer.pick(_FRACTURES[fracture.kind]), conclusion, **words)


def _bone_of(part: Part, place: str) -> tuple[tuple[str, str], ...]:
    return _BONES["wrist radius" if part == "WRIST" else place]


def _say_arthritis(writer: _Writer, arthritis: Arthritis) -> None:
    if not writer.names("osteoarthritis", arthritis.grade >= KL_DEFINITE):
        return
    signs = writer.pick(_SIGNS[arthritis.grade])
    compartment = _COMPARTMENTS[arthritis.compartment][int(writer.number() * 2)]
    writer.say(
        "osteoarthritis", "yes", writer.pick(_ARTHRITIS), writer.pick(_CONCLUDED_ARTHRITIS),
        stage=_STAGES[arthritis.grade], signs=signs, signs_start=_start(signs), compartment=compartment,
        side=writer.words["f"],  # of the arthritis
    )  # fmt: skip


def _say_axis(writer: _Writer, angle_degrees: float) -> None:
    direction = 0 if abs(angle_degrees) <= AXIS_NORMAL_DEGREES else 1 if angle_degrees > 0 else -1
    template = writer.pick(_AXES[direction])
    words = {
        "angle": f"{abs(angle_degrees):.1f}".replace(".", ","), "direction": "varus" if angle_degrees > 0 else "valgus",
        "side": writer.words["m"],
    }  # fmt: skip
    writer.say("axis", "no" if direction == 0 else "yes", template, template if direction else None, **words)


def _say_bone_age(writer: _Writer, months: float) -> None:
    age = _age_words(months)
    difference = months - 12.0 * writer.scene.age_years
    verdict = 0 if not writer.scene.bone_age_is_off else 1 if difference > 0 else -1
    conclusion = writer.pick(_BONE_AGE_VERDICTS[verdict])
    writer.say("bone age", "no" if verdict == 0 else "yes", writer.pick(_BONE_AGES), conclusion, age=age)


def _deny(writer: _Writer) -> None:
    """Some of what is not there."""
    scene, labels = writer.scene, writer.scene.labels
    chances = {name: writer.number() for name in DENIED}
    if chances["fracture"] < DENIED["fracture"] and (scene.fracture is None or not _mentionable(scene.fracture)):
        writer.say("fracture", "no", writer.pick(_DENIED_FRACTURES[scene.habit]))
    if chances["osteoarthritis"] < DENIED["osteoarthritis"] and labels.get("osteoarthritis") == 0:
        assert scene.arthritis is not None
        if scene.arthritis.grade == 0:
            writer.say("osteoarthritis", "no", writer.pick(_DENIED_ARTHRITIS))
    if chances["implant"] < DENIED["implant"] and not scene.implant:
        writer.say("implant", "no", "Pas de matériel d'ostéosynthèse.")


def _mentionable(fracture: Fracture) -> bool:
    return fracture.present or fracture.hedged


def _prompts(name: str) -> dict[str, list[str]]:
    """Whole small reports, of each limb and side as many that state one thing as ordinary ones.

    So that the two sides tell apart what is stated and not the limb.
    """
    positive: list[str] = []
    negative: list[str] = []
    normal = [" ".join(pair) for pairs in _NORMAL.values() for pair in pairs]
    for part, (limb, gender) in _LIMBS.items():
        for side in ("R", "L"):
            words = {"limb": limb, "side": side_word(side, gender)}  # type: ignore[arg-type]
            form = _LONG_LEG if part == "LEG" else _TECHNIQUE
            technique = form["FR"][0].format(**words, long=_VIEWS["AP", "LATERAL"][0])
            stated = _stated(name, part, side)  # type: ignore[arg-type]
            count = min(len(stated), len(normal))
            positive += [f"{technique} {stated[number * len(stated) // count]}" for number in range(count)]
            negative += [f"{technique} {text}" for text in normal[:count]]
    return {"positive": positive, "negative": negative}


def _stated(name: str, part: Part, side: Side) -> list[str]:
    """Findings and conclusions that state a label of a limb; none where the limb cannot have it."""
    both = {"m": side_word(side, "m"), "f": side_word(side, "f")}
    found: list[str] = []
    if name in ("fracture", "anomaly"):
        kinds = tuple(_FRACTURES) if part == "WRIST" else ("complete",)
        for place in PLACES[part]:
            for kind in kinds:
                for template, (bone, gender) in zip(_FRACTURES[kind], cycle(_bone_of(part, place)), strict=False):
                    words = {"bone": bone, "side": both[gender], "shift": "peu déplacée", "slant": "oblique"}
                    found.append(f"{template.format(**words)} {_CONCLUDED_FRACTURES[0].format(**words)}")
    if name in ("osteoarthritis", "anomaly") and part == "KNEE":
        for grade in (2, 3, 4):
            for template in _ARTHRITIS:
                words = {"compartment": "interne", "side": both["f"], "stage": _STAGES[grade], "m": both["m"],
                         "signs": _SIGNS[grade][0], "signs_start": _start(_SIGNS[grade][0])}  # fmt: skip
                found.append(f"{template.format(**words)} {_CONCLUDED_ARTHRITIS[1].format(**words)}")
    if name in ("implant", "anomaly"):
        limb, gender = _LIMBS[part]
        for implant in IMPLANTS[part]:
            texts = (template.format(limb=limb, side=both[gender], **both) for template in _IMPLANTS[implant])
            found += [f"{text} {text}" for text in texts]
    if name == "anomaly" and part == "LEG":
        words = {"angle": "7,5", "side": both["m"], "at": both["f"]}
        texts = (template.format(**words) for sign in (1, -1) for template in _AXES[sign])
        found += [f"{text} {text}" for text in texts]
    if name == "cast" and part in ("WRIST", *CAST_PARTS):
        for habit, casts in _CASTS.items():
            found += [f"{text} {denial}" for text, denial in zip(casts, _DENIED_FRACTURES[habit], strict=True)]
    return found


PROMPTS: dict[str, dict[str, list[str]]] = {name: _prompts(name) for name in LABELS}
