"""The miniature world: 64×64 pictures of sixteen objects in four styles, each drawn from a seed.

Everything a picture shows (object, pose, colours, background, lighting, style) is drawn from one random generator, so
that a (seed, index) pair names a picture for ever. Shape legend: N pictures · H, W pixels · 3 RGB in [0, 1].
"""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from trainer.miniature.objects import CLASSES, SHAPES, Part, Role

SIZE = 64  # pixels a side
SUPERSAMPLING = 3
SOFTNESS = 0.6  # pixels: radius of the lens blur
Style = Literal["photo", "old picture", "painting", "sketch"]
STYLES: tuple[Style, ...] = ("photo", "old picture", "painting", "sketch")
Lighting = Literal["bright", "dark", "normal"]
HELD_OUT_SEED = 1_000_003  # pictures of this seed are never trained on


class World(NamedTuple):
    """Which pictures a rendered set holds: the share of each style, and of each lighting; shares add up to 1."""

    styles: Mapping[Style, float]
    lighting: Mapping[Lighting, float]


# What the tokenizer and the judges see, and what the policy is pre-trained on (docs/miniature.md).
WIDE_WORLD = World(
    styles={"photo": 0.55, "old picture": 0.15, "painting": 0.15, "sketch": 0.15},
    lighting={"bright": 0.13, "dark": 0.14, "normal": 0.73},
)
POLICY_WORLD = World(
    styles={"photo": 0.96, "old picture": 0.04},
    lighting={"bright": 0.07, "dark": 0.06, "normal": 0.87},
)

HUES = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.15,
    "green": 0.35,
    "cyan": 0.5,
    "blue": 0.62,
    "purple": 0.77,
    "pink": 0.9,
}
STROKE_CONTRAST = 0.25  # luma: fainter strokes of a painting would not outlive the tokenizer
LUMA = np.array([0.2989, 0.5870, 0.1140])

Picture = NDArray[np.float64]
KindT = TypeVar("KindT", bound=str)


@dataclass(frozen=True)
class Scene:
    """What one picture shows, before any pixel is drawn."""

    label: int
    style: Style
    lighting: Lighting
    hue: str
    background_hue: str
    parts: list[Part]
    colours: dict[Role, Picture]
    background: Picture  # (2, 3): colours at the two ends of the gradient
    light_angle: float  # radians


class Renders(NamedTuple):
    """A rendered set: images uint8 (N, H, W, 3), labels and styles int64 (N,), one caption a picture."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    styles: NDArray[np.int64]
    captions: list[str]


def _rgb(hue: float, saturation: float, value: float) -> Picture:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0), 1), min(max(value, 0), 1)))


def _pose(parts: list[Part], rng: np.random.Generator) -> list[Part]:
    """Rotates, mirrors, scales and moves the object; coordinates become pixels of the final picture."""
    angle, scale = np.radians(rng.uniform(-14, 14)), rng.uniform(0.58, 0.8) * SIZE / 2
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    shift = rng.uniform(-0.12, 0.12, size=2) * SIZE + SIZE / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return [Part((p.points * (mirror, 1.0)) @ turn.T * scale + shift, p.role) for p in parts]


def _draw(shares: Mapping[KindT, float], rng: np.random.Generator) -> KindT:
    kinds = list(shares)
    return kinds[rng.choice(len(kinds), p=list(shares.values()))]


def draw_scene(label: int, style: Style, rng: np.random.Generator, lightings: Mapping[Lighting, float]) -> Scene:
    """Chooses pose, colours, background and lighting of one picture; `lightings` gives the share of each lighting."""
    lighting = _draw(lightings, rng)
    hue_name, back_name = rng.choice(list(HUES), size=2, replace=False)
    hue = HUES[hue_name] + rng.uniform(-0.02, 0.02)
    back_hue = HUES[back_name] + rng.uniform(-0.03, 0.03)
    if lighting == "bright":
        level, saturation = rng.uniform(0.92, 1.0), rng.uniform(0.55, 0.85)
        back_value, back_saturation = rng.uniform(0.94, 1.0), rng.uniform(0.0, 0.12)
    elif lighting == "dark":
        level, saturation = rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.0)
        back_value, back_saturation = rng.uniform(0.02, 0.14), rng.uniform(0.2, 0.9)
    else:
        level, saturation = rng.uniform(0.7, 1.0), rng.uniform(0.6, 1.0)
        back_value, back_saturation = rng.uniform(0.25, 0.85), rng.uniform(0.15, 0.6)
    colours: dict[Role, Picture] = {
        "body": _rgb(hue, saturation, level),
        "shade": _rgb(hue, saturation, level * 0.5),
        "light": _rgb(hue, saturation * 0.2, min(level * 1.15, 1)),
        "trim": _rgb(hue + 0.45, saturation, level * 0.85),
        "stem": _rgb(0.08, 0.6, level * 0.55),
        "accent": _rgb(0.12, 0.75, level),
    }
    # An object that would melt into its background is made darker or lighter than it.
    back = _rgb(back_hue, back_saturation, back_value)
    if abs(float((colours["body"] - back) @ LUMA)) < 0.2:
        factor = 0.55 if back_value > 0.45 else 1.6
        colours = {role: np.clip(c * factor, 0, 1) for role, c in colours.items()}
    fade = rng.uniform(0.75, 1.0)
    return Scene(
        label=label,
        style=style,
        lighting=lighting,
        hue=str(hue_name),
        background_hue=str(back_name),
        parts=_pose(SHAPES[CLASSES[label]](), rng),
        colours=colours,
        background=np.stack([back, back * (fade if lighting != "bright" else 0.97)]),
        light_angle=float(rng.uniform(0, 2 * np.pi)),
    )


def _shrink(layer: Image.Image) -> Picture:
    small = layer.resize((SIZE, SIZE), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(SOFTNESS))
    return np.asarray(small, dtype=np.float64) / 255


def _rasterise(scene: Scene, *, filled: bool, outline: float) -> tuple[Picture, Picture, Picture]:
    """Draws the parts: object colour (H, W, 3), its coverage (H, W, 1) and its outlines (H, W, 1), all in [0, 1]."""
    side = SIZE * SUPERSAMPLING
    colour = Image.new("RGB", (side, side))
    cover, lines = Image.new("L", (side, side)), Image.new("L", (side, side))
    paint, mask, pen = ImageDraw.Draw(colour), ImageDraw.Draw(cover), ImageDraw.Draw(lines)
    for part in scene.parts:
        points = [(float(x), float(y)) for x, y in part.points * SUPERSAMPLING]
        if filled:
            paint.polygon(points, fill=tuple(int(255 * c) for c in scene.colours[part.role]))
            mask.polygon(points, fill=255)
        if outline:
            if filled:
                pen.polygon(points, fill=0)
            pen.line([*points, points[0]], fill=255, width=round(outline * SUPERSAMPLING), joint="curve")
    colour_HW3, cover_HW, lines_HW = (_shrink(layer) for layer in (colour, cover, lines))
    return colour_HW3, cover_HW[..., None], lines_HW[..., None]


_Y, _X = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) * 2 - 1  # pixel centres in [−1, 1]


def _background(scene: Scene) -> Picture:
    along = 0.5 + 0.5 * (np.cos(scene.light_angle) * _X + np.sin(scene.light_angle) * _Y) / 1.42
    first, second = scene.background
    gradient: Picture = along[..., None] * first + (1 - along[..., None]) * second
    return gradient


def _photo(scene: Scene, rng: np.random.Generator) -> Picture:
    """Gradient background, a shaded object, a soft exposure difference across the picture."""
    colour, cover, _ = _rasterise(scene, filled=True, outline=0)
    toward_light = (np.cos(scene.light_angle) * _X + np.sin(scene.light_angle) * _Y)[..., None]
    shaded = colour * (1 + 0.16 * toward_light)  # `colour` is already weighted by coverage
    picture: Picture = shaded + (1 - cover) * _background(scene) + rng.normal(0, 0.006, size=(SIZE, SIZE, 1))
    return picture


def _old_picture(scene: Scene, rng: np.random.Generator) -> Picture:
    """A faded sepia print: no colour left, low contrast, darkened corners, light grain."""
    luma = (_photo(scene, rng) @ LUMA)[..., None]
    faded = 0.16 + 0.66 * luma
    vignette = 1 - 0.28 * np.clip((_X**2 + _Y**2) - 0.5, 0, 1.5)[..., None]
    toned: Picture = faded * vignette * np.array([1.12, 0.94, 0.68])
    return toned + rng.normal(0, 0.012, size=(SIZE, SIZE, 1))


def _set_apart(colour: Picture, ground: Picture) -> Picture:
    """Makes a colour (3,) lighter than its ground, or darker on a light one, by at least `STROKE_CONTRAST`."""
    apart, side = float((colour - ground) @ LUMA), 1.0 if float(ground @ LUMA) < 0.5 else -1.0
    moved: Picture = np.clip(colour + side * max(STROKE_CONTRAST - side * apart, 0), 0, 1)
    return moved


def _painting(scene: Scene, rng: np.random.Generator) -> Picture:
    """Flat saturated paint inside dark outlines, over a background of broad curved strokes."""
    colour, cover, lines = _rasterise(scene, filled=True, outline=1.8)
    centre_x, centre_y, phase = rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5), rng.uniform(0, 2 * np.pi)
    radius = np.hypot(_X - centre_x, _Y - centre_y)
    stroke = np.tanh(1.5 * np.sin(radius * 10 + phase + 0.6 * np.sin(3 * _X + phase)))[..., None]
    first = scene.background[0]
    vivid = np.clip(first.mean() + 1.5 * (first - first.mean()), 0, 1)
    other = _rgb(HUES[scene.background_hue] + 0.12, 0.75, float(np.clip(first.max() * 0.8 + 0.1, 0.2, 0.9)))
    canvas = 0.5 * (1 + stroke) * vivid + 0.5 * (1 - stroke) * _set_apart(other, vivid)
    mean = colour.mean(axis=2, keepdims=True)
    flat = np.clip(mean + 1.4 * (colour - mean), 0, 1) * (1 + 0.08 * stroke)
    painted: Picture = (flat + (1 - cover) * canvas) * (1 - lines) + 0.08 * lines
    return painted


def _sketch(scene: Scene, rng: np.random.Generator) -> Picture:
    """Dark pencil lines on pale paper, the object lightly hatched."""
    _, cover, lines = _rasterise(scene, filled=True, outline=1.8)
    paper = np.array([0.93, 0.91, 0.86]) * rng.uniform(0.85, 1.05)
    if scene.lighting == "dark":
        paper = paper * 0.7
    hatch = 0.5 + 0.5 * np.sin((_X + _Y) * 11)[..., None]
    tone = paper * (1 - 0.22 * cover * hatch)
    drawn: Picture = tone * (1 - lines) + 0.3 * lines
    return drawn + rng.normal(0, 0.008, size=(SIZE, SIZE, 1))


_PAINTERS = {"photo": _photo, "old picture": _old_picture, "painting": _painting, "sketch": _sketch}


def caption(scene: Scene) -> str:
    """One English sentence that says what the picture shows."""
    article = "an" if scene.style == "old picture" else "a"
    light = {"bright": ", brightly lit", "dark": ", in the dark", "normal": ""}[scene.lighting]
    colour = "" if scene.style in ("old picture", "sketch") else f"{scene.hue} "
    noun = CLASSES[scene.label]
    determiner = "an" if (colour or noun)[0] in "aeiou" else "a"
    return f"{article} {scene.style} of {determiner} {colour}{noun}{light}"


def render(
    label: int, style: Style, rng: np.random.Generator, lightings: Mapping[Lighting, float] = WIDE_WORLD.lighting
) -> tuple[NDArray[np.uint8], str]:
    """Draws one picture.

    Args:
        label: index into `CLASSES`.
        style: one of `STYLES`.
        rng: every random choice comes from it.
        lightings: share of each lighting.

    Returns:
        The picture, uint8 (64, 64, 3), and its caption.
    """
    scene = draw_scene(label, style, rng, lightings)
    picture = _PAINTERS[style](scene, rng)
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8), caption(scene)


def _render_range(seed: int, start: int, stop: int, world: World) -> Renders:
    images = np.empty((stop - start, SIZE, SIZE, 3), dtype=np.uint8)
    labels, style_ids, captions = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64), []
    for row, index in enumerate(range(start, stop)):
        rng = np.random.default_rng((seed, index))
        label, style = index % len(CLASSES), _draw(world.styles, rng)
        images[row], text = render(label, style, rng, world.lighting)
        labels[row], style_ids[row] = label, STYLES.index(style)
        captions.append(text)
    return Renders(images, labels, style_ids, captions)


def render_set(seed: int, count: int, world: World, *, workers: int = 1) -> Renders:
    """Renders pictures 0 … count−1 of a seed; classes take turns, style and lighting are drawn.

    Args:
        seed: names the set; use `HELD_OUT_SEED` for evaluation.
        count: number of pictures.
        world: the shares that style and lighting are drawn with.
        workers: processes to use.
    """
    bounds = np.linspace(0, count, (workers * 8 if workers > 1 else 1) + 1).astype(int)
    jobs = [(seed, int(a), int(b), world) for a, b in pairwise(bounds)]
    if workers == 1:
        return _render_range(*jobs[0])
    with get_context("spawn").Pool(workers) as pool:
        pieces = pool.starmap(_render_range, jobs)
    return Renders(
        np.concatenate([p.images for p in pieces]),
        np.concatenate([p.labels for p in pieces]),
        np.concatenate([p.styles for p in pieces]),
        [text for p in pieces for text in p.captions],
    )
