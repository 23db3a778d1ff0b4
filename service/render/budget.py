"""A whole model's error over the share of its parameters that is kept: one rule for all layers, or one budget."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from service.pictures import BudgetCurve, Size
from service.render.frame import Frame, Looks, add_axes, blank, dress, headline, table
from service.render.spectrum import MARKED_LIMIT
from service.render.style import INK, MUTED, PAPER, REFERENCE, number, plain, shades

COLUMNS = ("kept fraction", "error, global", "error, uniform", "bound")


def lay_out(curve: BudgetCurve, size: Size | None = None) -> Frame:
    """The error of the global and the uniform plan over the kept fraction, and the bound that no plan can beat."""
    frame = blank(size)
    layers = "1 layer" if curve.n_layers == 1 else f"{curve.n_layers} layers"
    parameters = f"{curve.n_parameters:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    headline(frame, curve.title, f"one budget for {layers} with {parameters} parameters")
    asked = _asked(curve)
    cells = [number(curve.fraction, ".4g"), *(number(value, "#.4g") for value in asked)]
    _, top = table(frame, COLUMNS, [(cells, _legend(frame.scale))])
    axes = add_axes(frame, top)
    _set_axes(axes, curve, frame.scale)
    _draw(axes, curve, frame.scale)
    _mark(axes, curve, frame.scale)
    return frame


def _asked(curve: BudgetCurve) -> tuple[float, float, float]:
    return curve.global_error, curve.uniform_error, curve.bound


def _legend(scale: float) -> Looks:
    dash = {"marker": "_", "markersize": 8 * scale, "markeredgewidth": 1.2 * scale}
    return {1: {"color": shades()[-1]}, 2: {"color": REFERENCE}, 3: {"color": MUTED, **dash}}


def _set_axes(axes: Axes, curve: BudgetCurve, scale: float) -> None:
    values = np.concatenate([curve.global_errors, curve.uniform_errors, curve.bounds, _asked(curve)])
    top = float(values[np.isfinite(values)].max(initial=0)) or 1.0
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.02 * top, 1.06 * top)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("kept fraction of the parameters", fontsize=9 * scale)
    axes.set_ylabel(plain(curve.measure), fontsize=9 * scale, parse_math=False)
    dress(axes, scale)


def _draw(axes: Axes, curve: BudgetCurve, scale: float) -> None:
    """The bound lies on top, thin: the global plan often meets it."""
    dots: dict[str, Any] = {"marker": "o", "markersize": 3.2 * scale} if len(curve.fractions) <= MARKED_LIMIT else {}
    thick: dict[str, Any] = {"linewidth": 1.6 * scale, "clip_on": False, **dots}
    axes.plot(curve.fractions, curve.uniform_errors, color=REFERENCE, **thick)
    axes.plot(curve.fractions, curve.global_errors, color=shades()[-1], **thick)
    thin: dict[str, Any] = {"linewidth": 0.9 * scale, "linestyle": (0, (4, 2.5)), "clip_on": False}
    axes.plot(curve.fractions, curve.bounds, color=MUTED, **thin)


def _mark(axes: Axes, curve: BudgetCurve, scale: float) -> None:
    """A line at the fraction asked for, and a larger dot where it meets each plan."""
    axes.axvline(curve.fraction, color=INK, linewidth=0.8 * scale, zorder=1.8)
    plans = ((curve.uniform_error, REFERENCE), (curve.global_error, shades()[-1]))
    look: dict[str, Any] = {"marker": "o", "markersize": 7 * scale, "markeredgecolor": PAPER, "clip_on": False}
    for error, color in plans:
        axes.plot([curve.fraction], [error], color=color, zorder=3, markeredgewidth=1.2 * scale, **look)
