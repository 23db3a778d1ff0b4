"""Pictures of one layer's s*_j over j at one epoch or two."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from service.lowrank.ranks import Array
from service.pictures import Chart, Scale, Size, Spectrum
from service.render.frame import Frame, Row, add_axes, blank, dress, headline, table
from service.render.style import REFERENCE, number, shades

COLUMNS = ("epoch", "train loss", "validation loss", "entropy rank", "stable rank")
MARKED_LIMIT = 200  # More dots than this run into a band that hides the curve.
LOG_SPAN = 1e-16  # Below this share of the largest value a float64 singular value is rounding, not spectrum.


@dataclass(frozen=True)
class Scene(Frame):
    """A frame that is drawn: curve and row of each spectrum in the order given, the vertical axis's lower limit."""

    curves: list[Line2D]
    rows: list[Row]
    floor: float


def lay_out(
    shown: Sequence[Spectrum], chart: Chart, size: Size | None = None, every: Sequence[Spectrum] | None = None
) -> Scene:
    """One epoch's spectrum, or the first and the last overlaid, on axes with room for `every`: those shown, or more."""
    frame = blank(size)
    colors = [REFERENCE, shades()[-1]][-len(shown) :]
    symbol = "W" if chart.of == "weights" else "W − W₀"
    shape = " × ".join(map(str, chart.shape))
    of = chart.layer if symbol == "W" else f"{symbol} of {chart.layer}"
    headline(frame, chart.title, f"singular values of {of}, {shape}")
    entries = [(cells(spectrum), {0: {"color": color}}) for spectrum, color in zip(shown, colors, strict=True)]
    rows, top = table(frame, COLUMNS, entries)
    axes = add_axes(frame, top)
    floor = set_axes(axes, [spectrum.values for spectrum in every or shown], chart.scale, frame.scale)
    curves = [
        add_curve(axes, spectrum.values, color, frame.scale) for spectrum, color in zip(shown, colors, strict=True)
    ]
    return Scene(**vars(frame), curves=curves, rows=rows, floor=floor)


def cells(spectrum: Spectrum) -> list[str]:
    """A table row; a number that does not exist is a dash."""
    losses = [number(loss, "#.4g") for loss in (spectrum.train_loss, spectrum.validation_loss)]
    ranks = [number(rank, ".2f") for rank in (spectrum.entropy_rank, spectrum.stable_rank)]
    return [str(spectrum.epoch), *losses, *ranks]


def set_axes(axes: Axes, every: Sequence[Array], kind: Scale, scale: float) -> float:
    """Limits, grid, ticks and labels for curves of s*_j; returns the lower limit of s*_j."""
    count = max(len(values) for values in every)
    margin = max(0.5, 0.02 * count)
    axes.set_xlim(1 - margin, count + margin)
    axes.set_xticks(index_ticks(count))
    floor, top = limits(every, kind)
    axes.set_yscale(kind)
    axes.set_ylim(floor, top)
    if kind == "log":
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("index $j$", fontsize=9 * scale)
    axes.set_ylabel(r"$s^*_j = s_j \,/\, \Sigma_i\,s_i$", fontsize=9 * scale)
    dress(axes, scale)
    return floor


def index_ticks(count: int) -> list[int]:
    """1 and round numbers up to `count`: there is no index 0."""
    ticks = [int(tick) for tick in MaxNLocator(7, integer=True).tick_values(1, count) if 1 < tick <= count]
    step = min((b - a for a, b in pairwise(ticks)), default=1)
    return [1, *(tick for tick in ticks if tick - 1 > step / 2)]


def limits(every: Sequence[Array], kind: Scale) -> tuple[float, float]:
    """Least and greatest of the vertical axis, over all values of the picture."""
    values = np.concatenate(every)
    top = float(values.max()) or 1.0  # All zero: the axis of a spectrum that could have any value.
    if kind == "linear":
        return -0.02 * top, 1.06 * top
    # log 0 has no place on the axis: zeros lie on its lower edge, below every value that is one.
    # It spans a decade at least, or a constant spectrum would have no power of ten beside it.
    return float(values[values > top * LOG_SPAN].min(initial=top / 10)) / 2, 2 * top


def add_curve(axes: Axes, values: Array, color: str, scale: float) -> Line2D:
    """s*_j over j; what lies below the axis is drawn on its edge."""
    line = Line2D(*coordinates(values, axes.get_ylim()[0]), color=color, linewidth=1.6 * scale, clip_on=False)
    if len(values) <= MARKED_LIMIT:
        line.set(marker="o", markersize=3.2 * scale)
    return axes.add_line(line)


def coordinates(values: Array, floor: float) -> tuple[Array, Array]:
    """j and s*_j of a curve, none below the axis."""
    return np.arange(1.0, len(values) + 1), np.maximum(values, floor)
