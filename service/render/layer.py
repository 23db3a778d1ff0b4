"""One layer's spectrum with what bears on compressing it: the noise edge, the chosen rank, the break-even rank.

A rank r is a line at j = r + ½, so that what it keeps lies to its left. Labels of ranks have a lane each at the top of
the axes, above every value, where neither a curve nor another label can meet them.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from service.pictures import LayerSpectrum, Size
from service.render.frame import Frame, add_axes, blank, extent, headline, position, put, settle, table
from service.render.spectrum import add_curve, set_axes
from service.render.style import MUTED, PAPER, REFERENCE, ellipsise, number, plain, shades

COLUMNS = ("stable rank", "entropy rank", "energy kept", "error", "kept fraction", "verdict")
LANE = 12  # Points of the picture's own for a line of text within the axes.
LABEL = 7.5
AIR = 4  # Points between a line and its label.
BELOW = 40  # Points that ticks and label of the horizontal axis take.
BACKING = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # A line must not run through a word.


def lay_out(layer: LayerSpectrum, size: Size | None = None) -> Frame:
    """One layer's s*_j over j, with a labelled line at the noise edge, the chosen and the break-even rank."""
    frame = blank(size)
    color = shades()[-1]
    shape = " × ".join(map(str, layer.shape))
    headline(frame, layer.title, f"singular values of {layer.layer}, {shape}")
    _, top = table(frame, COLUMNS, [(_cells(layer), {0: {"color": color}})])
    axes = add_axes(frame, top)
    edge = [] if layer.noise_edge is None else [np.array([layer.noise_edge])]
    set_axes(axes, [layer.values, *edge], layer.scale, frame.scale)
    marks = _marks(layer)
    _raise_top(axes, LANE * (len(marks) + 0.5) / (frame.points()[1] * top - BELOW))
    add_curve(axes, layer.values, color, frame.scale)
    for rank, _, look in marks:
        axes.axvline(rank + 0.5, linewidth=1.2 * frame.scale, zorder=1.8, clip_on=False, **look)
    settle(frame)  # From here on the axes keep their place, and a label can be fitted to it.
    for lane, (rank, text, look) in enumerate(marks):
        _label_rank(frame, axes, (rank + 0.5, lane), text, look["color"])
    if layer.noise_edge is not None:
        _mark_edge(frame, axes, layer.noise_edge, len(marks))
    return frame


def _cells(layer: LayerSpectrum) -> list[str]:
    return [
        number(layer.stable_rank, ".2f"),
        number(layer.entropy_rank, ".2f"),
        number(layer.energy_kept, ".4f"),
        number(layer.relative_frobenius_error, "#.4g"),
        number(layer.kept_fraction, ".4f"),
        layer.verdict.replace("_", " "),
    ]


def _marks(layer: LayerSpectrum) -> list[tuple[int, str, dict[str, Any]]]:
    """The vertical lines: the rank, its label, and how the line looks."""
    chosen, even = layer.rank, layer.break_even_rank
    return [
        (chosen, f"rank {chosen} ({plain(layer.chosen_by)})", {"color": shades()[0]}),
        (even, f"break-even {even}", {"color": MUTED, "linestyle": (0, (4, 2.5))}),
    ]


def _raise_top(axes: Axes, share: float) -> None:
    """Leave this share of the axes free above the limit they have, on whichever scale."""
    transform = axes.yaxis.get_transform()
    low, high = transform.transform(np.array(axes.get_ylim()))
    raised = transform.inverted().transform(np.array([low + (high - low) / (1 - share)]))
    axes.set_ylim(top=float(raised[0]))


def _label_rank(frame: Frame, axes: Axes, place: tuple[float, int], text: str, color: str) -> None:
    """To the right of its line, or to the left where there is no room, or wherever it fits in its lane."""
    left, right, top = extent(frame, axes)
    x = position(frame, axes, (place[0], 1.0))[0]
    label = put(frame, (x, top + LANE * (place[1] + 0.85)), text, LABEL, color=color, bbox=BACKING)
    ellipsise(label, (right - left - 2 * AIR) * frame.scale)
    width = label.get_window_extent().width / frame.pixels()
    if x + AIR + width > right:
        x = max(x - 2 * AIR - width, left)
    label.set_x((x + AIR) / frame.points()[0])


def _mark_edge(frame: Frame, axes: Axes, edge: float, n_lanes: int) -> None:
    """The horizontal line, its label at the right end: above the line unless that is where the ranks' labels are."""
    axes.axhline(edge, color=REFERENCE, linewidth=1.2 * frame.scale, linestyle=(0, (1, 1.5)), zorder=1.9)
    _, right, top = extent(frame, axes)
    y = position(frame, axes, (1.0, edge))[1]
    below = y - LANE < top + LANE * (n_lanes + 0.1)
    put(frame, (right - AIR, y + (8.5 if below else -3.5)), "noise edge", LABEL, color=MUTED, ha="right", bbox=BACKING)
