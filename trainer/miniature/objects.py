"""The sixteen objects of the miniature world, each a few coloured polygons.

Coordinates: x to the right, y downwards, the object fills about [−1, 1]². A part is painted over the parts before it.
Colours are roles, not values: "body" takes the object's own colour, the others are fixed hues around it.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Role = Literal["body", "shade", "light", "trim", "stem", "accent"]


class Part(NamedTuple):
    """One polygon (N, 2) and the role of its colour."""

    points: Points
    role: Role


def _ellipse(cx: float, cy: float, rx: float, ry: float, *, start: float = 0, stop: float = 360) -> Points:
    angle = np.radians(np.linspace(start, stop, 40))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)


def _poly(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=np.float64)


def _ball() -> list[Part]:
    return [
        Part(_ellipse(0, 0, 0.85, 0.85), "body"),
        Part(_poly((-0.83, -0.2), (0.83, -0.2), (0.83, 0.2), (-0.83, 0.2)), "light"),
        Part(_ellipse(0, 0, 0.28, 0.28), "shade"),
    ]


def _star() -> list[Part]:
    angle = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return [Part(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), "body")]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 48)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [Part(np.stack([x / 17, -(y + 2) / 16], axis=1), "body")]


def _tree() -> list[Part]:
    return [
        Part(_box(-0.17, 0.3, 0.17, 1.0), "stem"),
        Part(_poly((0, -1.0), (0.62, -0.25), (-0.62, -0.25)), "body"),
        Part(_poly((0, -0.65), (0.8, 0.45), (-0.8, 0.45)), "body"),
    ]


def _house() -> list[Part]:
    return [
        Part(_box(-0.72, -0.15, 0.72, 0.9), "body"),
        Part(_poly((-0.95, -0.15), (0, -0.95), (0.95, -0.15)), "trim"),
        Part(_box(-0.2, 0.3, 0.2, 0.9), "shade"),
    ]


def _mushroom() -> list[Part]:
    return [
        Part(_poly((-0.25, 0.0), (0.25, 0.0), (0.33, 0.95), (-0.33, 0.95)), "light"),
        Part(_ellipse(0, 0.1, 0.95, 0.95, start=180, stop=360), "body"),
        Part(_ellipse(-0.42, -0.25, 0.16, 0.14), "light"),
        Part(_ellipse(0.38, -0.2, 0.16, 0.14), "light"),
        Part(_ellipse(0, -0.58, 0.16, 0.14), "light"),
    ]


def _fish() -> list[Part]:
    return [
        Part(_poly((0.45, 0), (1.0, -0.5), (1.0, 0.5)), "shade"),
        Part(_ellipse(-0.2, 0, 0.75, 0.48), "body"),
        Part(_ellipse(-0.58, -0.1, 0.11, 0.11), "light"),
    ]


def _flower() -> list[Part]:
    petals = [
        Part(_ellipse(0.48 * np.cos(a), -0.25 + 0.48 * np.sin(a), 0.32, 0.32), "body")
        for a in np.radians(np.arange(5) * 72 - 90)
    ]
    return [Part(_box(-0.07, 0.1, 0.07, 1.0), "stem"), *petals, Part(_ellipse(0, -0.25, 0.28, 0.28), "accent")]


def _boat() -> list[Part]:
    return [
        Part(_poly((-0.9, 0.4), (0.9, 0.4), (0.55, 0.9), (-0.55, 0.9)), "body"),
        Part(_box(-0.05, -0.95, 0.05, 0.4), "stem"),
        Part(_poly((0.1, -0.9), (0.1, 0.25), (0.85, 0.25)), "light"),
        Part(_poly((-0.1, -0.6), (-0.1, 0.25), (-0.65, 0.25)), "light"),
    ]


def _cup() -> list[Part]:
    handle = np.concatenate([_ellipse(0.5, 0.05, 0.45, 0.45), _ellipse(0.5, 0.05, 0.24, 0.24)[::-1]])
    return [
        Part(handle, "body"),
        Part(_poly((-0.75, -0.65), (0.55, -0.65), (0.45, 0.8), (-0.65, 0.8)), "body"),
        Part(_ellipse(-0.1, -0.65, 0.65, 0.16), "shade"),
    ]


def _moon() -> list[Part]:
    outer = _ellipse(0, 0, 0.95, 0.95, start=50, stop=310)
    inner = _ellipse(0.4, 0, 0.74, 0.74, start=287, stop=73)
    return [Part(np.concatenate([outer, inner]), "body")]


def _car() -> list[Part]:
    return [
        Part(_poly((-0.55, 0.0), (-0.35, -0.5), (0.3, -0.5), (0.6, 0.0)), "light"),
        Part(_box(-0.98, -0.02, 0.98, 0.45), "body"),
        Part(_ellipse(-0.52, 0.48, 0.25, 0.25), "shade"),
        Part(_ellipse(0.52, 0.48, 0.25, 0.25), "shade"),
    ]


def _umbrella() -> list[Part]:
    return [
        Part(_box(-0.06, -0.1, 0.06, 0.9), "stem"),
        Part(_ellipse(0, 0.0, 1.0, 0.85, start=180, stop=360), "body"),
        Part(_ellipse(0, 0.0, 0.34, 0.82, start=180, stop=360), "light"),
    ]


def _cactus() -> list[Part]:
    return [
        Part(_box(-0.22, -0.95, 0.22, 0.6), "body"),
        Part(_box(-0.75, -0.4, -0.48, 0.1), "body"),
        Part(_box(-0.75, -0.08, 0, 0.14), "body"),
        Part(_box(0.48, -0.65, 0.75, -0.1), "body"),
        Part(_box(0, -0.3, 0.75, -0.08), "body"),
        Part(_poly((-0.5, 0.5), (0.5, 0.5), (0.38, 1.0), (-0.38, 1.0)), "trim"),
    ]


def _rocket() -> list[Part]:
    return [
        Part(_poly((-0.3, 0.6), (0, 1.0), (0.3, 0.6)), "accent"),
        Part(_poly((-0.3, 0.1), (-0.75, 0.7), (-0.3, 0.6)), "trim"),
        Part(_poly((0.3, 0.1), (0.75, 0.7), (0.3, 0.6)), "trim"),
        Part(_poly((0, -1.0), (0.33, -0.4), (0.33, 0.62), (-0.33, 0.62), (-0.33, -0.4)), "body"),
        Part(_ellipse(0, -0.2, 0.17, 0.17), "light"),
    ]


def _ice_cream() -> list[Part]:
    return [
        Part(_poly((-0.5, 0.0), (0.5, 0.0), (0, 1.0)), "accent"),
        Part(_ellipse(0, -0.3, 0.62, 0.6), "body"),
        Part(_ellipse(0, -0.85, 0.14, 0.14), "trim"),
    ]


SHAPES: dict[str, Callable[[], list[Part]]] = {
    "ball": _ball,
    "star": _star,
    "heart": _heart,
    "tree": _tree,
    "house": _house,
    "mushroom": _mushroom,
    "fish": _fish,
    "flower": _flower,
    "sailing boat": _boat,
    "cup": _cup,
    "moon": _moon,
    "car": _car,
    "umbrella": _umbrella,
    "cactus": _cactus,
    "rocket": _rocket,
    "ice cream": _ice_cream,
}
CLASSES: tuple[str, ...] = tuple(SHAPES)
