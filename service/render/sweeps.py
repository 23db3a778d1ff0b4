"""Pictures of a sweep: a metric over one varied field or two, and the spectra of all members.

Colours stand for the values of one field, from indigo to coral in the order of the legend.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from service.lowrank.ranks import Array
from service.pictures import Size, SweepHeat, SweepLines, SweepSpectra
from service.render.frame import Frame, Row, add_axes, blank, dress, headline, table
from service.render.heatmap import evenly
from service.render.spectrum import set_axes
from service.render.style import INK, MUTED, PAPER, plain, shades

MOST_ENTRIES = 9  # Lines of a legend; of more settings an even choice is named.
MOST_TICKS = 9
WIDE = 20  # A field whose largest value is so many times its smallest is drawn on a logarithmic axis.
MOST_NUMBERS = 12  # Columns up to which a heat map's cells have room for their numbers.
LARGE = 40  # Settings beyond which dots would hide the lines.


def lay_out_lines(shown: SweepLines, size: Size | None = None) -> Frame:
    """A metric over a varied field: a line for each setting of the others, its band from least to greatest."""
    frame = blank(size)
    headline(frame, shown.title, f"{shown.metric} over {shown.x}: mean, least and greatest over seeds")
    axes = add_axes(frame, _below_headline(frame))
    colors = _colors(len(shown.lines))
    every = np.concatenate([line.at for line in shown.lines]) if shown.lines else np.array([])
    _scale_x(axes, every, shown.ticks)
    for line, color in zip(shown.lines, colors, strict=True):
        _draw_line(axes, line.at, (line.mean, line.low, line.high), color, frame.scale)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    _name_axes(axes, shown.x, shown.metric, frame.scale)
    dress(axes, frame.scale)
    _legend(frame, axes, [line.name for line in shown.lines], colors)
    return frame


def _draw_line(axes: Axes, at: Array, values: tuple[Array, Array, Array], color: str, scale: float) -> None:
    mean, low, high = values
    dots: dict[str, Any] = {"marker": "o", "markersize": 4 * scale} if len(at) <= LARGE else {}
    axes.plot(at, mean, color=color, linewidth=1.4 * scale, **dots)
    spread = np.stack([mean - low, high - mean])
    axes.errorbar(at, mean, yerr=spread, fmt="none", ecolor=color, elinewidth=0.9 * scale, capsize=2.5 * scale)


def _scale_x(axes: Axes, values: Array, ticks: Sequence[str] | None) -> None:
    if ticks is not None:
        axes.set_xticks(range(len(ticks)), [plain(tick)[:16] for tick in ticks])
        axes.set_xlim(-0.5, len(ticks) - 0.5)
        return
    known = np.unique(values)
    if known.size and known[0] > 0 and known[-1] >= WIDE * known[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    if 0 < known.size <= MOST_TICKS and _apart(known, axes.get_xscale() == "log"):
        axes.set_xticks(known, [f"{value:.3g}" for value in known])


def _apart(known: Array, logarithmic: bool) -> bool:
    """Whether ticks at just these values have room for their labels."""
    places = np.log(known) if logarithmic else known
    return known.size == 1 or float(np.diff(places).min()) >= 0.07 * float(places[-1] - places[0])


def lay_out_heat(shown: SweepHeat, size: Size | None = None) -> Frame:
    """A metric over two varied fields; a cell without members is blank."""
    frame = blank(size)
    headline(frame, shown.title, f"{shown.metric} over {shown.x} and {shown.y}, mean over all else")
    axes = add_axes(frame, _below_headline(frame))
    known = shown.values[np.isfinite(shown.values)]
    limits = Normalize(float(known.min(initial=np.inf)), float(known.max(initial=-np.inf))) if known.size else None
    colors = matplotlib.colormaps["plasma"].with_extremes(bad=PAPER)
    image = axes.imshow(np.ma.masked_invalid(shown.values), aspect="auto", origin="lower", norm=limits, cmap=colors)
    _name_places(axes, shown)
    _name_axes(axes, shown.x, shown.y, frame.scale)
    dress(axes, frame.scale)
    axes.grid(visible=False)
    if len(shown.columns) <= MOST_NUMBERS and len(shown.rows) <= MOST_NUMBERS and limits is not None:
        _print_values(axes, shown.values, limits, frame.scale)
    bar = frame.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.tick_params(length=0, labelsize=8 * frame.scale)
    bar.outline.set_visible(False)
    return frame


def _name_places(axes: Axes, shown: SweepHeat) -> None:
    columns, rows = (evenly(len(names), MOST_NUMBERS) for names in (shown.columns, shown.rows))
    axes.set_xticks(columns, [plain(shown.columns[place])[:12] for place in columns])
    axes.set_yticks(rows, [plain(shown.rows[place])[:12] for place in rows])


def _print_values(axes: Axes, values: Array, limits: Normalize, scale: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = INK if limits(value) > 0.55 else PAPER
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=color, fontsize=8 * scale)


@dataclass(frozen=True)
class SweepScene(Frame):
    """The members' spectra, drawn: the curves, the row with the epoch, the lower limit of the vertical axis."""

    curves: LineCollection
    row: Row
    floor: float


def lay_out_spectra(shown: SweepSpectra, size: Size | None = None) -> SweepScene:
    """All members' s*_j at the last epoch, on axes with room for every epoch; a colour for each value of the field."""
    frame, chart = blank(size), shown.chart
    count = len(shown.colors)
    headline(frame, chart.title, f"singular values of {chart.layer} of {count} members, coloured by {chart.field}")
    rows, top = table(frame, ("epoch", "members"), [((str(shown.epochs[-1]), str(count)), {})])
    axes = add_axes(frame, top)
    # What does not exist is no smaller than zero: it changes no limit.
    every = list(np.nan_to_num(shown.values).reshape(-1, shown.values.shape[-1]))
    floor = set_axes(axes, every, chart.scale, frame.scale)
    colors = _colors(len(shown.groups))
    curves = LineCollection(
        segments(shown.values[-1], floor),
        colors=[colors[place] for place in shown.colors],
        linewidths=1.1 * frame.scale,
        capstyle="round",
    )
    axes.add_collection(curves, autolim=False)
    _legend(frame, axes, list(shown.groups), colors)
    return SweepScene(**vars(frame), curves=curves, row=rows[0], floor=floor)


def segments(values: Array, floor: float) -> list[Array]:
    """Each member's points (j, s*_j), none below the axis."""
    places = np.arange(1.0, values.shape[-1] + 1)
    return [np.stack([places, np.maximum(one, floor)], axis=1)[np.isfinite(one)] for one in values]


def _below_headline(frame: Frame) -> float:
    return 1 - 42 / frame.points()[1]


def _colors(count: int) -> list[str]:
    every = shades()
    return [every[round(place * (len(every) - 1) / max(count - 1, 1))] for place in range(count)]


def _name_axes(axes: Axes, x: str, y: str, scale: float) -> None:
    axes.set_xlabel(plain(x), fontsize=9 * scale, parse_math=False)
    axes.set_ylabel(plain(y), fontsize=9 * scale, parse_math=False)


def _legend(frame: Frame, axes: Axes, names: Sequence[str], colors: Sequence[str]) -> None:
    """The settings by their colours, beside the axes."""
    if len(names) < 2:
        return
    entries = [(plain(names[place])[:36], colors[place]) for place in evenly(len(names), MOST_ENTRIES)]
    handles = [Line2D([], [], color=color, linewidth=2 * frame.scale, label=name) for name, color in entries]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)}
    legend = axes.legend(handles=handles, frameon=False, fontsize=7.5 * frame.scale, labelcolor=MUTED, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)
