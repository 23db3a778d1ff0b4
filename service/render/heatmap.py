"""All layers of a model at once: a row each, σ_j/σ₁ over the share j/k as colour, so that widths can be compared.

Its places are worked out here rather than by a layout engine: edges lie between pixels, and a name is as long as its
letters. What does not fit is left out evenly, first names, then rows, and the subtitle counts the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from numpy.typing import NDArray

from service.lowrank.ranks import Array
from service.pictures import ModelSpectra, Size
from service.render.frame import Frame, blank, headline, put
from service.render.style import INK, MUTED, PAPER, plain

Bytes = NDArray[np.uint8]

LABEL = 7
LINE = 9.5  # Points from one name to the next at least.
TOP, BELOW = 52, 36  # Points above the rows and below them.
BAR, BAR_GAP, BAR_LABELS = 9, 12, 38  # Points of the colour bar's width, the gap before it and its numbers.
NAME_SHARE = 0.36  # Of the width, for names at most.
MOST_DECADES = 4  # Below 10⁻⁴ of σ₁ everything is one colour: stored as float16, it would be rounding.


@dataclass(frozen=True)
class Area:
    """The rows' rectangle, in points from the figure's left and top; its edges lie between pixels."""

    left: float
    right: float
    top: float
    bottom: float


def lay_out(model: ModelSpectra, size: Size | None = None) -> Frame:
    """A model's layers as rows of colour: σ_j/σ₁, logarithmic, over j/k; a zero matrix is a blank row."""
    frame = blank(size)
    width, height = frame.points()
    bottom = _whole(frame, height - BELOW)
    top = _whole(frame, TOP)
    total = len(model.names)
    rows = evenly(total, round((bottom - top) * frame.pixels()))
    headline(frame, model.title, _subtitle(total, len(rows)))
    step = -int(-len(rows) * LINE // (bottom - top))
    labelled = range((step - 1) // 2, len(rows), step)
    names = _shortened(frame, [model.names[rows[place]] for place in labelled], NAME_SHARE * width)
    longest = max(length for _, length in names)
    right = width - 12 - BAR_LABELS - BAR - BAR_GAP
    area = Area(_whole(frame, 12 + longest + 5), _whole(frame, right), top, bottom)
    profiles = model.profiles[rows]
    decades = _decades(profiles)
    _draw_rows(frame, area, _colors(profiles, decades))
    pitch = (bottom - top) / len(rows)
    for place, (name, _) in zip(labelled, names, strict=True):
        put(frame, (area.left - 5, top + pitch * (place + 0.5) + 2.6), name, LABEL, color=INK, ha="right")
    _draw_bar(frame, area, decades, bool((profiles < 10.0**-decades).any()))
    return frame


def evenly(count: int, most: int) -> NDArray[np.intp]:
    """At most so many of the numbers 0…count − 1, evenly spaced."""
    shown = min(count, max(most, 1))
    return ((np.arange(shown) + 0.5) * count / shown).astype(np.intp)


def _subtitle(total: int, shown: int) -> str:
    layers = "1 layer" if total == 1 else f"{total} layers"
    return f"singular values of {layers}" + (f", of which {shown} are shown, evenly spaced" if shown < total else "")


def _whole(frame: Frame, points: float) -> float:
    """The nearest edge between pixels."""
    return round(points * frame.pixels()) / frame.pixels()


# Names


def _shortened(frame: Frame, names: Sequence[str], limit: float) -> list[tuple[str, float]]:
    """Each name and its width in points; of a longer one the end, which tells layers apart."""
    advances: dict[str, float] = {}
    return [_end_of(frame, plain(name[-400:]), limit, advances) for name in names]


def _end_of(frame: Frame, name: str, limit: float, advances: dict[str, float]) -> tuple[str, float]:
    length, dots = 0.0, _advance(frame, "…", advances)
    fits = len(name)  # From here on the name fits with an ellipsis before it.
    for place in reversed(range(len(name))):
        length += _advance(frame, name[place], advances)
        if length > limit:
            kept = "…" + name[fits:]
            return kept, sum(advances[letter] for letter in kept)
        if length + dots <= limit:
            fits = place
    return name, length


def _advance(frame: Frame, letter: str, known: dict[str, float]) -> float:
    """How far a letter takes the pen, in points: laying out whole names would take longer than all the rest."""
    if letter not in known:
        font = FontProperties(size=LABEL * frame.scale)
        once, more = (
            frame.canvas.get_renderer().get_text_width_height_descent(letter * count, font, False)[0]
            for count in (1, 9)
        )
        known[letter] = max(more - once, 0) / 8 / frame.pixels()
    return known[letter]


# Colours


def _decades(profiles: Array) -> int:
    """Powers of ten that the colours span: as many as the values need, within 1 and MOST_DECADES."""
    least = profiles[profiles > 0].min(initial=1.0)
    return int(np.clip(np.ceil(-np.log10(least)), 1, MOST_DECADES))


def _colors(values: Array, decades: int) -> Bytes:
    """Indigo to yellow by the logarithm, and paper where there is no value; (..., 4)."""
    depth = np.log10(np.clip(np.nan_to_num(values), 10.0**-decades, 1)) / decades + 1
    # Plasma from the indigo that animations begin with; its brightest end would be lost on paper.
    colors: Bytes = matplotlib.colormaps["plasma"](0.08 + 0.87 * depth, bytes=True)
    colors[np.isnan(values)] = 255
    return colors


# Drawing


def _draw_rows(frame: Frame, area: Area, colors: Bytes) -> None:
    axes = _axes(frame, area)
    axes.imshow(colors, aspect="auto", interpolation="none", extent=(0, 1, len(colors), 0))
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = area.left + share * (area.right - area.left)
        put(frame, (x, area.bottom + 11), f"{share:g}", 8, color=MUTED, ha="center")
    middle = (area.left + area.right) / 2
    put(frame, (middle, area.bottom + 25), "share j / k of the singular values", 9, color=INK, ha="center")


def _draw_bar(frame: Frame, area: Area, decades: int, below: bool) -> None:
    """The colours' scale; its last number says so where it stands for smaller values too."""
    left = area.right + BAR_GAP
    axes = _axes(frame, Area(_whole(frame, left), _whole(frame, left + BAR), area.top, area.bottom))
    ramp = 10 ** -np.linspace(0, decades, 256)
    axes.imshow(_colors(ramp[:, np.newaxis], decades), aspect="auto", interpolation="none", extent=(0, 1, 1, 0))
    put(frame, (left + BAR + BAR_LABELS, area.top - 6), "σ / σ₁", 8, color=INK, ha="right")
    for decade in range(decades + 1):
        text = ("≤ " if below and decade == decades else "") + f"{10.0**-decade:.{decade}f}"
        y = area.top + (area.bottom - area.top) * decade / decades
        put(frame, (left + BAR + 4, y + 2.6), text, LABEL, color=MUTED)


def _axes(frame: Frame, area: Area) -> Axes:
    """Bare axes in exactly this place."""
    width, height = frame.points()
    place = (area.left / width, 1 - area.bottom / height)
    extent = ((area.right - area.left) / width, (area.bottom - area.top) / height)
    look: dict[str, Any] = {"facecolor": PAPER, "xticks": [], "yticks": [], "frame_on": False}
    return frame.figure.add_axes((*place, *extent), **look)
