"""A bone phantom's scene -> pixels of each of its views, and the box of its fracture.

Limbs are drawn as of the right side, the thumb, the fibula and the outer side of a knee on the image's left; the left
side is its mirror image, so that every view but a strict profile tells the side. Units: half films (`Film`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shards.ingest.phantom_bone_film import EDGE, HOLLOW, Break, Film, Point
from shards.ingest.phantom_bone_scene import FIELD_OF_VIEW_MM, Difficulty, Fracture, Scene
from shards.ingest.phantom_chest_draw import Array, cloud, pixel_noise, step, tone

BONE = 0.80  # attenuation of a thick bone over soft parts
METAL = 1.4
CAST_WIDTH = 0.16
# Place in the frame of a wrist, half width, half height, and the maturity at which each begins to show.
_CARPALS: tuple[tuple[float, float, float, float, float], ...] = (
    (-0.02, -0.31, 0.115, 0.145, 0.02), (0.17, -0.31, 0.095, 0.125, 0.03), (0.21, -0.12, 0.095, 0.080, 0.15),
    (-0.01, -0.08, 0.110, 0.085, 0.22), (-0.34, -0.29, 0.095, 0.090, 0.30), (-0.20, -0.35, 0.080, 0.085, 0.32),
    (-0.24, -0.12, 0.105, 0.115, 0.34), (0.25, -0.13, 0.050, 0.055, 0.58),
)  # fmt: skip
# Of the fingers 2 to 5: x of the base, sideways drift of the tip, lengths of metacarpal and three phalanges.
_FINGERS: tuple[tuple[float, float, tuple[float, float, float, float]], ...] = (
    (-0.17, -0.17, (0.36, 0.26, 0.16, 0.12)), (-0.06, -0.05, (0.35, 0.29, 0.19, 0.12)),
    (0.05, 0.06, (0.32, 0.27, 0.18, 0.12)), (0.15, 0.18, (0.29, 0.21, 0.13, 0.11)),
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """`pixels` [S, S] in [0, 1], 0 black; `fracture`: left, top, width, height in pixels, where one is drawn."""

    pixels: Array
    fracture: tuple[float, float, float, float] | None


class Limb:
    """One view of a scene while it is drawn: the film, and what a fracture does to the bone that it breaks."""

    def __init__(self, scene: Scene, number: int, difficulty: Difficulty, size: int) -> None:
        pose = scene.poses[number]
        if scene.part in ("WRIST", "HAND", "FOREARM"):  # small hands are brought nearer, but not to one size
            pose = replace(pose, scale=pose.scale * (0.82 + 0.18 * min(1.0, scene.age_years / 16.0)))
        self.film = Film(size, pose, mirrored=scene.side == "L")
        self.scene, self.view, self.contrast = scene, scene.views[number], difficulty.contrast
        self.shown = scene.fracture.shown[number] if scene.fracture else 0.0
        self.breaks: Point | None = None  # where the fracture is, in the limb's frame
        self.reach = 0.0

    def fracture_of(self, place: str) -> Fracture | None:
        """The fracture, if it is of this bone."""
        fracture = self.scene.fracture
        return fracture if fracture is not None and fracture.place == place else None

    def shaft(
        self, a: Point, b: Point, middle: float, end_a: float, end_b: float, *, place: str = "",
        stretch: tuple[float, float] = (0.3, 0.7), amount: float = 1.0, hollow: float = HOLLOW,
    ) -> None:  # fmt: skip
        """A long bone, broken where the scene says so: on `stretch` of its length, 0 at `a`."""
        fracture, broken = self.fracture_of(place) if place else None, None
        if fracture is not None and self.shown:
            at = stretch[0] + (stretch[1] - stretch[0]) * fracture.along
            seen = self.contrast * self.shown
            moved = fracture.displacement * fracture.shift * self.shown
            if fracture.kind == "torus":
                broken = Break(at=at, slant=0.1 * fracture.slant, line=-0.30 * fracture.strength * seen,
                               bulge=(0.20 + 0.30 * fracture.strength) * seen)  # fmt: skip
            else:
                broken = Break(
                    at=at, slant=0.7 * fracture.slant, line=min(0.95, (0.30 + 0.65 * fracture.strength) * seen),
                    offset=1.1 * middle * moved, bend=0.22 * moved,
                )  # fmt: skip
            self.breaks = (a[0] + (b[0] - a[0]) * at, a[1] + (b[1] - a[1]) * at)
            self.reach = 1.3 * max(middle, 0.6 * max(end_a, end_b)) + 0.03
        self.film.shaft(a, b, middle, end_a, end_b, amount=amount, hollow=hollow, broken=broken)

    def growing(
        self, half_width: float, centre: Point, up: float, half_height: float, unit_mm: float, amount: float = 1.0
    ) -> None:
        """The cap beyond a bone's end at `centre`, past its growth plate; `up`: -1 where it lies above the end."""
        scene = self.scene
        grown = min(1.0, max(0.0, (scene.maturity - 0.06) / 0.5))
        gap = scene.plate_mm / unit_mm
        slipped, widened = 0.0, 0.0
        fracture = scene.fracture
        if fracture and fracture.kind == "epiphyseal" and fracture.place == "radius" and half_width > 0.2:
            seen = self.contrast * self.shown
            slipped, widened = 0.10 * fracture.shift * fracture.strength * seen, 0.03 * fracture.strength * seen
            self.breaks, self.reach = centre, half_width
        middle = (centre[0] + slipped, centre[1] + up * (gap + widened + half_height))
        self.film.block(middle, half_width * grown, half_height * (0.5 + 0.5 * grown), amount=amount)


def _implant_along(limb: Limb, a: Point, b: Point, radius: float) -> None:
    """Wires, a plate with screws, or a nail, on the middle of the bone from `a` to `b`."""
    film, implant = limb.film, limb.scene.implant
    dx, dy = b[0] - a[0], b[1] - a[1]

    def at(part: float, side: float) -> Point:
        """A place along the bone, `side` radii off its axis (bones are drawn near upright)."""
        return a[0] + dx * part + side * radius, a[1] + dy * part

    if implant == "nail":
        film.band(at(0.04, 0.0), at(0.92, 0.0), 0.35 * radius, amount=1.0, layer="metal")
    elif implant == "plate":
        side = 1.0 if limb.view == "AP" else 0.1
        film.band(at(0.25, side), at(0.80, side), 0.22 * radius + 0.008, amount=1.0, layer="metal")
        for part in (0.30, 0.42, 0.60, 0.72):
            film.band(at(part, side), at(part, side - 1.8), 0.012, amount=0.8, layer="metal")
    elif implant == "wires":
        film.band(at(1.08, -0.9), at(0.55, 0.8), 0.012, amount=1.2, layer="metal")
        film.band(at(1.06, 0.6), at(0.50, -0.8), 0.012, amount=1.2, layer="metal")


def _wrist_bones(limb: Limb, scale: float, lower: float, unit_mm: float, squeeze: float = 1.0) -> None:
    """Forearm's end and carpus, thumb side left; shared by wrists and hands, which lie `lower` and smaller."""
    film, scene = limb.film, limb.scene

    def at(x: float, y: float) -> Point:
        return scale * squeeze * x, scale * y + lower

    radius_end, ulna_end = at(-0.20, 0.24), at(0.22, 0.32)
    limb.shaft(at(-0.18, 1.2), radius_end, 0.12 * scale, 0.12 * scale, 0.26 * scale,
               place="radius" if scene.part == "WRIST" else "", stretch=(0.55, 0.86))  # fmt: skip
    film.shaft(at(0.20, 1.2), ulna_end, 0.085 * scale, 0.085 * scale, 0.13 * scale)
    limb.growing(0.26 * scale * squeeze, radius_end, -1.0, 0.065 * scale, unit_mm)
    if scene.maturity > 0.36:
        limb.growing(0.11 * scale, ulna_end, -1.0, 0.045 * scale, unit_mm)
    for x, y, half_width, half_height, onset in _CARPALS:
        grown = min(1.0, max(0.0, (scene.maturity - onset) / 0.45))
        if grown > 0:
            size = scale * (0.35 + 0.65 * grown)
            film.lump(at(x, y), half_width * size * squeeze, half_height * size)
    if scene.part == "WRIST":
        _implant_along(limb, at(-0.18, 1.2), radius_end, 0.16 * scale)


def _wrist(limb: Limb) -> None:
    film, scene = limb.film, limb.scene
    unit_mm = FIELD_OF_VIEW_MM["WRIST"][0] / 2
    if limb.view == "LATERAL":
        film.soft((0.0, 1.2), (0.0, 0.0), 0.34, 0.30)
        film.soft((0.0, 0.0), (0.05, -1.2), 0.30, 0.36)
        radius_end = (0.0, 0.24)
        limb.shaft((0.02, 1.2), radius_end, 0.12, 0.12, 0.20, place="radius", stretch=(0.55, 0.86))
        film.shaft((-0.06, 1.2), (-0.07, 0.30), 0.08, 0.08, 0.11)
        limb.growing(0.21, radius_end, -1.0, 0.07, unit_mm)
        grown = min(1.0, max(0.0, (scene.maturity - 0.05) / 0.5))
        for x, y, half_width, half_height in ((0.0, -0.02, 0.15, 0.10), (0.02, -0.27, 0.14, 0.17),
                                              (0.10, -0.12, 0.10, 0.12), (0.20, -0.10, 0.06, 0.06)):  # fmt: skip
            film.lump((x, y), half_width * grown, half_height * grown)
        for x in (-0.03, 0.03, 0.09):
            film.shaft((x, -0.46), (x + 0.04, -1.2), 0.07, 0.10, 0.07, amount=0.7)
        film.shaft((0.24, -0.30), (0.50, -0.95), 0.07, 0.09, 0.08, amount=0.8)
        _implant_along(limb, (0.02, 1.2), radius_end, 0.14)
        return
    squeeze = 0.80 if limb.view == "OBLIQUE" else 1.0
    film.soft((0.0, 1.2), (-0.02, -0.1), 0.40 * squeeze, 0.42 * squeeze)
    film.soft((-0.02, -0.1), (-0.02, -1.2), 0.42 * squeeze, 0.58 * squeeze)
    _wrist_bones(limb, 1.0, 0.0, unit_mm, squeeze)
    film.shaft((-0.44 * squeeze, -0.40), (-0.88 * squeeze, -0.95), 0.075, 0.11, 0.09)
    for x, tip in ((-0.24, -0.34), (-0.04, -0.06), (0.13, 0.17), (0.27, 0.37)):
        film.shaft((x * squeeze, -0.48), (tip * squeeze, -1.2), 0.07, 0.10, 0.08)


def _hand(limb: Limb) -> None:
    film = limb.film
    unit_mm = FIELD_OF_VIEW_MM["HAND"][0] / 2 / 1.6  # plates of fingers are drawn wider than they are, to be seen
    squeeze = 0.82 if limb.view == "OBLIQUE" else 1.0
    film.soft((0.0, 1.2), (0.0, 0.5), 0.20, 0.20)
    film.soft((-0.02, 0.36), (-0.01, 0.0), 0.27 * squeeze, 0.27 * squeeze)
    _wrist_bones(limb, 0.5, 0.44, unit_mm, squeeze)
    for number, (base, drift, lengths) in enumerate(_FINGERS, start=2):
        x, y, total = base * squeeze, 0.20, sum(lengths) + 0.12
        slope = drift * squeeze / total
        film.soft((x + slope * 0.30, -0.10), (x + slope * total, 0.22 - total), 0.085, 0.07)
        for joint, length in enumerate(lengths):
            width = (0.042, 0.040, 0.035, 0.030)[joint]
            a, b = (x, y), (x + slope * length, y - length + 0.02)
            place = {0: f"metacarpal {number}", 1: f"phalanx {number}"}.get(joint, "")
            head = 1.25 * width
            limb.shaft(a, b, 0.75 * width, 1.3 * width, head if joint < 3 else 0.8 * width, place=place)
            if joint == 0:
                limb.growing(1.2 * width, b, -1.0, 0.022, unit_mm, 0.7)
            else:
                limb.growing(1.3 * width, a, 1.0, 0.012, unit_mm, 0.7)
            # room for the joint, for the cap and for the plate
            x, y = b[0], b[1] - 0.03 - (0.035 if joint == 0 else 0.02) - limb.scene.plate_mm / unit_mm
    a = (-0.24 * squeeze, 0.30)
    film.soft(a, (-0.66 * squeeze, -0.28), 0.10, 0.07)
    for length, width in ((0.26, 0.045), (0.19, 0.042), (0.14, 0.034)):
        b = (a[0] - 0.62 * length * squeeze, a[1] - 0.78 * length)
        film.shaft(a, b, 0.75 * width, 1.3 * width, 1.2 * width)
        a = (b[0] - 0.022 * squeeze, b[1] - 0.03)
    _implant_along(limb, (0.15 * squeeze, 0.20), (0.20 * squeeze, -0.10), 0.04)


def _knee(limb: Limb) -> None:
    film, scene, contrast = limb.film, limb.scene, limb.contrast
    arthritis, profile = scene.arthritis, limb.view == "LATERAL"
    narrowing = min(0.97, arthritis.narrowing * (0.85 + 0.15 * contrast)) if arthritis else 0.0
    spurs = arthritis.osteophytes * contrast if arthritis else 0.0
    dense = 0.30 * max(0.0, arthritis.severity - 1.8) / 3.0 * contrast if arthritis else 0.0
    healthy, plateau = 0.105, 0.12  # 6.3 mm, and the height of the joint
    squeeze = 0.85 if limb.view == "OBLIQUE" else 1.0
    film.soft((0.0, -1.2), (0.0, 0.0), 0.74, 0.62)
    film.soft((0.0, 0.0), (0.0, 1.2), 0.62, 0.56)
    if profile:
        space = healthy * (1.0 - narrowing)
        film.shaft((-0.12, -1.2), (-0.06, -0.36), 0.19, 0.19, 0.34)
        film.lump((0.0, plateau - space - 0.33), 0.42, 0.33)
        film.block((0.0, plateau + 0.10), 0.44, 0.10)
        limb.shaft((0.04, plateau + 0.10), (0.0, 1.2), 0.17, 0.38, 0.17)
        film.lump((0.52, -0.30), 0.10, 0.20)
        film.shaft((-0.30, 0.42), (-0.26, 1.2), 0.06, 0.09, 0.06)
        film.band((-0.25, plateau + 0.03), (0.25, plateau + 0.03), 0.03, amount=dense)
        for x, y in ((0.54, -0.50), (0.54, -0.10), (-0.44, plateau + 0.02), (0.44, plateau + 0.02)):
            film.lump((x, y), 0.09 * spurs, 0.07 * spurs, amount=1.2)
        cuts: tuple[Point, Point] = ((0.15, plateau), (-0.05, 0.50))
    else:
        inner = 1.0 if arthritis and arthritis.compartment == "medial" else -1.0
        film.shaft((0.0, -1.2), (0.0, -0.36), 0.20, 0.20, 0.42 * squeeze)
        for side in (1.0, -1.0):  # medial, lateral
            space = healthy * (1.0 - narrowing * (1.0 if side == inner else 0.25))
            film.lump((side * 0.26 * squeeze, plateau - space - 0.24), 0.27 * squeeze, 0.24)
        film.lump((0.02, -0.34), 0.20, 0.20, amount=0.45)  # kneecap
        film.block((0.0, plateau + 0.10), 0.53 * squeeze, 0.10)
        film.shaft((0.0, plateau + 0.10), (0.0, 1.2), 0.20, 0.46 * squeeze, 0.20)
        film.lump((0.0, plateau), 0.07, 0.05)
        film.shaft((-0.44 * squeeze, 0.42), (-0.40 * squeeze, 1.2), 0.06, 0.10, 0.06)
        film.band((inner * 0.10, plateau + 0.03), (inner * 0.45 * squeeze, plateau + 0.03), 0.03, amount=dense)
        for side in (1.0, -1.0):
            size = spurs * (1.0 if side == inner else 0.6)
            film.lump((side * 0.55 * squeeze, plateau + 0.03), 0.10 * size, 0.06 * size, amount=1.2)
            film.lump((side * 0.53 * squeeze, plateau - 0.20), 0.10 * size, 0.07 * size, amount=1.2)
        cuts = ((-0.30 * squeeze, plateau), (-0.05 * squeeze, 0.55))
    fracture = limb.fracture_of("tibial plateau")
    if fracture is not None:
        seen = contrast * limb.shown
        film.band(*cuts, 0.03, amount=-(0.20 + 0.45 * fracture.strength) * seen)
        film.band((cuts[0][0] - 0.16, plateau + 0.06), (cuts[0][0], plateau + 0.06), 0.035,
                  amount=-0.5 * fracture.displacement * seen)  # fmt: skip
        limb.breaks, limb.reach = ((cuts[0][0] + cuts[1][0]) / 2, (cuts[0][1] + cuts[1][1]) / 2), 0.22
    if scene.implant == "prosthesis":
        film.band((-0.50, 0.02), (0.50, 0.02), 0.07, amount=1.0, layer="metal")
        film.band((-0.50, plateau + 0.09), (0.50, plateau + 0.09), 0.035, amount=1.0, layer="metal")
        film.band((0.0, plateau + 0.09), (0.0, 0.62), 0.05, amount=0.8, layer="metal")


def _leg(limb: Limb) -> None:
    """Hip to ankle; the knee leaves the line between them to the outer side in varus."""
    film, scene = limb.film, limb.scene
    height_mm, width_mm = FIELD_OF_VIEW_MM["LEG"]
    hip, ankle = (0.10, -0.80), (0.02, 0.84)
    segment_mm = (ankle[1] - hip[1]) / 2 * height_mm / 2
    half_angle = (scene.axis_angle_degrees or 0.0) / 2.0 / 57.29577951
    knee = ((hip[0] + ankle[0]) / 2 - segment_mm * half_angle / (width_mm / 2), 0.02)
    film.soft((hip[0] - 0.05, -1.1), knee, 0.62, 0.30)
    film.soft(knee, ankle, 0.30, 0.17)
    film.lump((0.45, -0.92), 0.45, 0.16, amount=0.7)  # pelvis
    film.lump(hip, 0.11, 0.055, amount=1.2)
    film.band((hip[0], hip[1] + 0.01), (hip[0] - 0.20, hip[1] + 0.07), 0.03, amount=0.35)
    film.shaft((hip[0] - 0.19, hip[1] + 0.03), (knee[0], knee[1] - 0.02), 0.065, 0.09, 0.17)
    film.shaft((knee[0], knee[1] + 0.03), (ankle[0], ankle[1] - 0.02), 0.060, 0.17, 0.10)
    film.shaft((knee[0] - 0.16, knee[1] + 0.08), (ankle[0] - 0.12, ankle[1] + 0.03), 0.025, 0.04, 0.05)
    film.block((ankle[0], ankle[1] + 0.03), 0.11, 0.035)
    if scene.implant == "prosthesis":
        film.band((knee[0] - 0.17, knee[1] - 0.02), (knee[0] + 0.17, knee[1] - 0.02), 0.035, amount=1.0, layer="metal")
        film.band((knee[0] - 0.17, knee[1] + 0.04), (knee[0] + 0.17, knee[1] + 0.04), 0.025, amount=1.0, layer="metal")


def _two_bones(limb: Limb) -> None:
    """Forearm, hand upwards, or lower leg, foot downwards; in profile the bones lie one over the other."""
    film, scene = limb.film, limb.scene
    apart = {"AP": 1.0, "LATERAL": 0.30, "OBLIQUE": 0.65}[limb.view]
    if scene.part == "FOREARM":
        film.soft((0.0, 1.2), (0.0, -1.1), 0.42, 0.28)
        main = ((-0.11 * apart, 0.78), (-0.15 * apart, -0.78), 0.065)
        limb.shaft(main[0], main[1], 0.065, 0.085, 0.16, place="radius", stretch=(0.35, 0.75))
        limb.shaft((0.11 * apart, 0.86), (0.14 * apart, -0.74), 0.058, 0.13, 0.075, place="ulna", stretch=(0.3, 0.75))
        film.lump((0.0, 1.0), 0.30, 0.14)
        film.lump((-0.05 * apart, -0.93), 0.20, 0.10, amount=0.8)
        if scene.maturity < 1.0:
            limb.growing(0.15, main[1], -1.0, 0.03, FIELD_OF_VIEW_MM["FOREARM"][0] / 2)
    else:
        film.soft((0.0, -1.2), (0.0, 1.1), 0.50, 0.30)
        main = ((0.06, -0.90), (0.04, 0.82), 0.085)
        limb.shaft(main[0], main[1], 0.085, 0.25, 0.14, place="tibia", stretch=(0.25, 0.8))
        limb.shaft((-0.19 * apart, -0.74), (-0.13 * apart, 0.90), 0.035, 0.055, 0.06, place="fibula",
                   stretch=(0.15, 0.85))  # fmt: skip
        film.lump((0.05, -1.02), 0.29, 0.10)
        film.lump((0.02, 0.93), 0.16, 0.08)
    fracture = scene.fracture
    other = fracture is not None and fracture.place == "ulna" and scene.implant == "plate"
    if other:
        main = ((0.11 * apart, 0.86), (0.14 * apart, -0.74), 0.06)
    _implant_along(limb, main[0], main[1], main[2])


_PARTS: dict[str, Callable[[Limb], None]] = {
    "WRIST": _wrist, "HAND": _hand, "KNEE": _knee, "LEG": _leg, "FOREARM": _two_bones, "TIBIA": _two_bones,
}  # fmt: skip
_CYSTS: dict[str, tuple[float, float, float, float]] = {
    "WRIST": (-0.18, 0.55, 0.085, 0.13), "HAND": (0.075, -0.27, 0.024, 0.055), "KNEE": (0.20, 0.55, 0.15, 0.16),
    "FOREARM": (-0.12, 0.35, 0.05, 0.11), "TIBIA": (0.06, -0.58, 0.09, 0.13),
}  # fmt: skip


def render(scene: Scene, number: int, difficulty: Difficulty, size: int) -> Drawing:
    """View `number` of the scene at `size` x `size` pixels."""
    limb = Limb(scene, number, difficulty, size)
    film = limb.film
    _PARTS[scene.part](limb)
    if scene.lesion:
        x, y, half_width, half_height = _CYSTS[scene.part]
        if scene.views[number] != "AP":
            x *= 0.3
        film.lump((x, y), half_width, half_height, amount=-min(1.0, scene.lesion * difficulty.contrast))
    _clutter(limb)
    place = 8 * scene.index + number
    inside = step(film.depth, 0.05)
    attenuation = inside * (np.float32(0.20) + np.float32(0.28) * np.minimum(np.maximum(film.depth, 0.0), 0.5))
    attenuation += np.float32(BONE * scene.poses[number].mineral) * np.maximum(film.bone, 0.0)
    attenuation += np.float32(METAL) * film.metal
    mottle = cloud(scene.seed, "bone phantom: mottle", place, size, max(2, size // 5))
    if scene.cast:
        shell = step(film.depth + np.float32(CAST_WIDTH), 0.06)
        edge = shell - step(film.depth + np.float32(0.04), 0.10)
        attenuation += (
            np.float32(0.16) * shell * (np.float32(1.0) + np.float32(0.35) * mottle) + np.float32(0.14) * edge
        )
    pose = scene.poses[number]
    level = (attenuation - np.float32(0.10 - pose.exposure)) * np.float32(1.0 / pose.latitude)
    noise = pixel_noise(scene.seed, "bone phantom: pixel noise", place, (size, size)) + np.float32(0.5) * mottle
    level = level + np.float32(difficulty.noise) * noise * (np.float32(0.5) + np.maximum(level, 0.0))
    return Drawing(tone(level), _fracture_box(limb))


def _clutter(limb: Limb) -> None:
    """Look-alikes: a vessel's canal crosses a bone as a fine fracture would, but not both cortices."""
    film, scene = limb.film, limb.scene
    if "canal" in scene.clutter and scene.part in ("WRIST", "FOREARM", "TIBIA"):
        x = {"WRIST": -0.18, "FOREARM": -0.12, "TIBIA": 0.05}[scene.part] * (1.0 if limb.view == "AP" else 0.3)
        film.band((x - 0.03, 0.70), (x + 0.03, 0.58), 0.008, amount=-0.25)
    if "fold" in scene.clutter:
        film.band((-0.5, 0.93), (0.5, 0.87), 0.02, amount=0.06)


def _fracture_box(limb: Limb) -> tuple[float, float, float, float] | None:
    """Around the place of the break, cut at the film's borders; None where it leaves no trace in this view."""
    if limb.breaks is None or limb.shown < 0.5:
        return None
    (x, y), reach = limb.breaks, max(limb.reach, EDGE)
    rows, columns = limb.film.window(x - reach, y - reach, x + reach, y + reach)
    if rows.stop - rows.start < 1 or columns.stop - columns.start < 1:
        return None
    return (
        float(columns.start), float(rows.start), float(columns.stop - columns.start), float(rows.stop - rows.start)
    )  # fmt: skip
