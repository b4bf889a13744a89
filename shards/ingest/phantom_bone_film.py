"""A film on which limbs are drawn: bones, growth plates, breaks, metal, casts and soft parts as attenuation.

As for chests, pixels use only + - * /, square roots, floor and comparisons, so that they are the same on every machine.
Each bone is computed on the part of the film that it covers.

Letters: S = side of the square film in pixels. Lengths are in half films, x to the right, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shards.ingest.phantom_bone_scene import Pose
from shards.ingest.phantom_chest_draw import Array, bump, squared, step

Point = tuple[float, float]
EDGE = 0.035  # width over which a border goes from outside to inside
HOLLOW = 0.62  # of a long bone's thickness that the marrow takes away


@dataclass(frozen=True, kw_only=True)
class Break:
    """What a fracture does to one long bone. `at`: 0 .. 1 from its first end; `slant`: of the line, rise over run."""

    at: float
    slant: float
    line: float  # how much of the bone's attenuation the gap takes away
    offset: float = 0.0  # of the second part, sideways, in half films
    bend: float = 0.0  # tangent of the angle between the parts
    bulge: float = 0.0  # of the cortex: a torus fracture


class Film:
    """Layers under construction, float32 [S, S]: `bone`, `metal` and `depth`, the distance into the soft parts."""

    def __init__(self, size: int, pose: Pose, *, mirrored: bool) -> None:
        self.size, self._pose, self._sign = size, pose, -1.0 if mirrored else 1.0
        axis = (np.arange(size, dtype=np.float32) * 2 + 1) / np.float32(size) - 1
        column, row = axis[None, :], axis[:, None]
        zoom = np.float32(1.0 / pose.scale)
        tilted = (column + np.float32(pose.tilt) * row - np.float32(pose.shift_x)) * zoom
        self.x: Array = tilted * np.float32(self._sign)
        self.y: Array = (row - np.float32(pose.tilt) * column - np.float32(pose.shift_y)) * zoom
        self.bone = np.zeros((size, size), np.float32)
        self.metal = np.zeros((size, size), np.float32)
        self.depth = np.full((size, size), -1.0, np.float32)

    def pixel(self, x: float, y: float) -> Point:
        """Column and row of a place, pixels from the film's corner."""
        pose = self._pose
        u, v = x * self._sign * pose.scale + pose.shift_x, y * pose.scale + pose.shift_y
        column = (u - pose.tilt * v) / (1.0 + pose.tilt**2)
        row = v + pose.tilt * column
        return (column + 1.0) * self.size / 2, (row + 1.0) * self.size / 2

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """Rows and columns of the film that a box of the limb touches."""
        corners = [self.pixel(x, y) for x in (left, right) for y in (top, bottom)]
        spans = []
        for place in (1, 0):
            values = [corner[place] for corner in corners]
            low, high = math.floor(min(values)) - 1, math.ceil(max(values)) + 1
            spans.append(slice(max(0, min(low, self.size)), max(0, min(high, self.size))))
        return spans[0], spans[1]

    def soft(self, a: Point, b: Point, radius_a: float, radius_b: float) -> None:
        """A limb's soft parts from `a` to `b`."""
        radius_a, radius_b = radius_a * self._pose.tissue, radius_b * self._pose.tissue
        along, across, length = _frame(self.x, self.y, a, b)
        part = np.clip(along * np.float32(1.0 / length), 0.0, 1.0)
        beyond = along - part * np.float32(length)
        radius = np.float32(radius_a) + np.float32(radius_b - radius_a) * part
        np.maximum(self.depth, radius - np.sqrt(squared(across) + squared(beyond)), out=self.depth)

    def shaft(
        self, a: Point, b: Point, middle: float, end_a: float, end_b: float, *, amount: float = 1.0,
        hollow: float = HOLLOW, broken: Break | None = None,
    ) -> None:  # fmt: skip
        """A long bone from `a` to `b`, cut flat at both ends; its half width is `middle`, flaring to that of an end."""
        widest = max(middle, end_a, end_b) + EDGE
        if broken:
            widest += abs(broken.offset) + abs(broken.bend) + broken.bulge * middle
        rows, columns = self.window(min(a[0], b[0]) - widest, min(a[1], b[1]) - widest,
                                    max(a[0], b[0]) + widest, max(a[1], b[1]) + widest)  # fmt: skip
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        along, across, length = _frame(self.x[rows, columns], self.y[rows, columns], a, b)
        part = along * np.float32(1.0 / length)
        radius = np.float32(middle) + np.float32(end_a - middle) * squared(
            np.maximum((np.float32(0.35) - part) * np.float32(1.0 / 0.35), 0.0)
        )
        radius = radius + np.float32(end_b - middle) * squared(
            np.maximum((part - np.float32(0.65)) * np.float32(1.0 / 0.35), 0.0)
        )
        gap: Array | None = None
        if broken:
            past = along - np.float32(broken.at * length) - np.float32(broken.slant) * across
            beyond = step(past, 0.02)
            across = across - beyond * (np.float32(broken.offset) + np.float32(broken.bend) * np.maximum(past, 0.0))
            radius = radius * (np.float32(1.0) + np.float32(broken.bulge) * bump(squared(past * np.float32(1 / 0.09))))
            gap = bump(squared(past * np.float32(1.0 / 0.045)))
        square = squared(across / np.maximum(radius, np.float32(1e-3)))
        outer = np.sqrt(np.maximum(np.float32(1.0) - square, 0.0))
        marrow = np.sqrt(np.maximum(np.float32(1.0) - square * np.float32(1.0 / 0.60), 0.0))
        value = outer - np.float32(hollow) * marrow
        value *= step(along, EDGE) * step(np.float32(length) - along, EDGE)
        if gap is not None and broken is not None:
            value *= np.float32(1.0) - np.float32(broken.line) * gap
        self.bone[rows, columns] += np.float32(amount) * value

    def lump(self, centre: Point, half_width: float, half_height: float, *, amount: float = 1.0) -> None:
        """A short bone, or a spur: an ellipse with a rim of cortex. A negative `amount` is a hole with a dense rim."""
        if half_width < 1e-3 or half_height < 1e-3:
            return
        rows, columns = self.window(centre[0] - half_width, centre[1] - half_height,
                                    centre[0] + half_width, centre[1] + half_height)  # fmt: skip
        x, y = self.x[rows, columns], self.y[rows, columns]
        square = squared((x - np.float32(centre[0])) * np.float32(1.0 / half_width)) + squared(
            (y - np.float32(centre[1])) * np.float32(1.0 / half_height)
        )
        inside = np.sqrt(np.maximum(np.float32(1.0) - square, 0.0))
        rim = bump(squared((square - np.float32(0.72)) * np.float32(1.0 / 0.30)))
        self.bone[rows, columns] += (
            np.float32(amount) * np.float32(0.55) * inside + np.float32(abs(amount) * 0.22) * rim
        )

    def block(
        self, centre: Point, half_width: float, half_height: float, *, amount: float = 1.0, slope: float = 0.0
    ) -> None:
        """A flat piece of bone with rounded corners, its top and bottom rising with x by `slope`."""
        if half_width < 1e-3 or half_height < 1e-3:
            return
        tall = half_height + abs(slope) * half_width
        rows, columns = self.window(centre[0] - half_width, centre[1] - tall, centre[0] + half_width, centre[1] + tall)
        x = (self.x[rows, columns] - np.float32(centre[0])) * np.float32(1.0 / half_width)
        y = self.y[rows, columns] - np.float32(centre[1]) - np.float32(slope * half_width) * x
        y = y * np.float32(1.0 / half_height)
        inside = np.float32(1.0) - squared(squared(x)) - squared(squared(y))
        rim = bump(squared((inside - np.float32(0.25)) * np.float32(1.0 / 0.35)))
        value = step(inside - np.float32(0.12), 0.3) * np.float32(0.5) + np.float32(0.2) * rim
        self.bone[rows, columns] += np.float32(amount) * value

    def band(self, a: Point, b: Point, width: float, *, amount: float, layer: str = "bone") -> None:
        """A straight band of half width `width`: metal, a dense line, or with a negative `amount` a dark one."""
        reach = width + EDGE
        rows, columns = self.window(min(a[0], b[0]) - reach, min(a[1], b[1]) - reach,
                                    max(a[0], b[0]) + reach, max(a[1], b[1]) + reach)  # fmt: skip
        along, across, length = _frame(self.x[rows, columns], self.y[rows, columns], a, b)
        value = step(np.float32(width) - np.abs(across), EDGE) * step(along, EDGE) * step(
            np.float32(length) - along, EDGE
        )  # fmt: skip
        target = self.metal if layer == "metal" else self.bone
        target[rows, columns] += np.float32(amount) * value


def _frame(x: Array, y: Array, a: Point, b: Point) -> tuple[Array, Array, float]:
    """Lengths along the line from `a` to `b`, across it (positive to its left on a screen), and its own."""
    length = math.sqrt((b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2)
    ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
    dx, dy = x - np.float32(a[0]), y - np.float32(a[1])
    return dx * np.float32(ux) + dy * np.float32(uy), dx * np.float32(uy) - dy * np.float32(ux), length
