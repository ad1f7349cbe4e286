"""Charts as SVG that stands inside the page: its text is the page's, its colours are the page's variables.

The page names its colours in CSS, so that a chart follows the reader's choice of light or dark. matplotlib is given a
colour that nothing else has for each, and its name takes that colour's place in what comes out.

Shape legend: N points of a line.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Scale = Literal["linear", "log", "symlog"]
COLOURS = 8  # series of their own colour; later ones begin again, with dashes
INK, MUTED, GRID = "#010203", "#010204", "#010205"
NAMES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
SIZE_IN = (4.6, 2.9)
FEW = 15  # points of a line that are marked
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trainer.report",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Line:
    """A line through points (N,): a mean, thick; one run, thin; or a run that was cut short, thin and dashed."""

    x_N: Numbers
    y_N: Numbers
    kind: Literal["mean", "run", "cut"] = "mean"
    colour: int = 0


@dataclass(frozen=True)
class Band:
    """What lies between two lines over the same points (N,)."""

    x_N: Numbers
    low_N: Numbers
    high_N: Numbers
    colour: int = 0


@dataclass(frozen=True)
class Dots:
    """Points (N,) by themselves."""

    x_N: Numbers
    y_N: Numbers
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Args:
        alt: what it says, in words.
        x, y: titles of the axes.
        parts: lines, bands and dots.
        is_share: y is a share, from 0 to 1, shown in per cent.
        ticks: names of places on the x axis; numbers where None.
        scale: of the x axis; `symlog` is linear up to `linear_to`.
        starts_at_zero: y begins at 0.
    """

    alt: str
    x: str
    y: str
    parts: tuple[Line | Band | Dots, ...]
    is_share: bool = False
    ticks: Mapping[float, str] | None = None
    scale: Scale = "linear"
    linear_to: float = 1.0
    starts_at_zero: bool = False


def draw(chart: Chart) -> Markup:
    """The chart as an SVG element for a page of HTML; the same chart is the same text, byte for byte."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # the page's font may have it
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        for part in chart.parts:
            _add(axes, part)
        _dress(axes, chart)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), chart.alt)


def series_colour(index: int) -> str:
    """The page's name for the colour of a series."""
    return f"var(--series-{index % COLOURS})"


def _sentinel(index: int) -> str:
    return f"#0203{index % COLOURS:02x}"


def _add(axes: Axes, part: Line | Band | Dots) -> None:
    colour = _sentinel(part.colour)
    if isinstance(part, Band):
        axes.fill_between(part.x_N, part.low_N, part.high_N, color=colour, alpha=0.22, linewidth=0)
    elif isinstance(part, Dots):
        axes.plot(part.x_N, part.y_N, "o", color=colour, markersize=4.5, alpha=0.75, markeredgewidth=0)
    else:
        dashes = "--" if part.kind == "cut" or part.colour >= COLOURS else "-"
        width, alpha = (2.0, 1.0) if part.kind == "mean" else (0.9, 0.6)
        marker = "o" if len(part.x_N) <= FEW else ""
        axes.plot(part.x_N, part.y_N, dashes, color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=3)


def _dress(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.x)  # the page says above the chart what y is
    axes.set_axisbelow(True)
    if chart.scale == "symlog":
        axes.set_xscale("symlog", linthresh=chart.linear_to)
    elif chart.scale == "log":
        axes.set_xscale("log")
    if chart.ticks is not None:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
        axes.set_xticks([], minor=True)
        if sum(len(name) for name in chart.ticks.values()) > 40:
            axes.tick_params(axis="x", labelrotation=30)
    elif chart.x in {"step", "images"}:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if chart.is_share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif chart.starts_at_zero:
        axes.set_ylim(bottom=0)


def _inline(svg: str, alt: str) -> Markup:
    """An SVG file as an element: no prologue, no size of its own, and no name that another chart has, too."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)  # a style here would be the whole page's
    own = "c" + hashlib.sha256((alt + svg).encode("utf-8", "replace")).hexdigest()[:10]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{own}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{own}-", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"\n\s+", "\n", svg)
    for colour, name in NAMES.items():
        svg = svg.replace(colour, name)
    for index in range(COLOURS):
        svg = svg.replace(_sentinel(index), series_colour(index))
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    svg = re.sub(r"^<svg[^>]*>", f'<svg role="img" aria-label="{escape(alt)}" {view[0]}>', svg)
    return Markup(svg)  # noqa: S704 - made here; matplotlib escapes the texts of the axes, and `alt` is escaped
