"""How every picture looks: colours, fonts, text that is safe and fits, and the settings of a drawing call."""

import functools
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.text import Text

PAPER, GRID, INK, MUTED, REFERENCE = "#ffffff", "#e6e9ee", "#1b2330", "#667085", "#8fa3bf"
SHADES = 20  # Colours of the moving curve; with their paler steps they fill most of a GIF's 256.

STYLE: Any = {  # matplotlib types its settings by a list of every name.
    "font.family": ["DejaVu Sans"],  # It comes with matplotlib, so every machine draws the same picture.
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "text.usetex": False,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "path",
    "svg.hashsalt": "rankscope",  # Without a salt the ids in an SVG are drawn at random.
}


@contextmanager
def drawing() -> Iterator[None]:
    """Our settings, and one warning less, until the end of the block."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name may hold letters that no font of ours has; a box in their place is the answer, not a warning.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


@functools.cache
def shades() -> list[str]:
    """The moving curve from its first colour to its last: indigo to coral, told apart by the colour-blind."""
    return [to_hex(color) for color in matplotlib.colormaps["plasma"](np.linspace(0.08, 0.6, SHADES))]


def text_scale(width: float, height: float) -> float:
    """How much larger than at 6.4 by 4 inches the text is: less than proportional, so that small stays legible."""
    ratio = min(width / 6.4, height / 4)
    return float(ratio**0.5 if ratio > 1 else ratio**0.7)


def number(value: float | None, form: str) -> str:
    """A table's number; one that does not exist is a dash."""
    return "–" if value is None or not np.isfinite(value) else format(value, form)


def plain(text: str) -> str:
    """One line that stays in its place: no control characters, line breaks, surrogates or reversals of direction."""
    unwanted = {"Cc", "Cn", "Cs", "Zl", "Zp"}
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "".join("�" if c in turning or unicodedata.category(c) in unwanted else c for c in text[:400])


def ellipsise(text: Text, points: float) -> None:
    """Shorten a line from the right until it is at most so wide."""
    figure = text.get_figure(root=True)
    assert figure is not None  # noqa: S101 - it was put there by `figure.text`
    whole, limit = text.get_text(), points * figure.dpi / 72

    def too_wide(length: int) -> bool:
        text.set_text(whole[:length].rstrip() + "…" if length < len(whole) else whole)
        return text.get_window_extent().width > limit

    if too_wide(len(whole)):
        too_wide(max(0, bisect_left(range(len(whole)), True, key=too_wide) - 1))
