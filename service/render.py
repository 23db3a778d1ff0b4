"""Pictures of singular-value spectra: arrays in, bytes out.

Every picture has the same three parts: a title, a small table that is also the legend (a row for each curve), and the
axes with s*_j over j. The same arguments give the same bytes, in any process. Nothing here imports pyplot, keeps a
figure or leaves matplotlib's settings changed; while a call runs, its settings and warning filter are the process's,
so one thread draws at a time. A user's text is drawn letter by letter, never as mathtext.
"""

import functools
import re
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image

from service.lowrank.ranks import Array
from service.pictures import Chart, Size, Spectrum

Bytes = NDArray[np.uint8]

PAPER, GRID, INK, MUTED, REFERENCE = "#ffffff", "#e6e9ee", "#1b2330", "#667085", "#8fa3bf"
COLUMNS = ("epoch", "train loss", "validation loss", "entropy rank", "stable rank")
MARKED_LIMIT = 200  # More dots than this run into a band that hides the curve.
LOG_SPAN = 1e-16  # Below this share of the largest value a float64 singular value is rounding, not spectrum.
HOLD_CS = 100  # The last frame stays a second longer, so that the eye sees where training ended.
SHADES = 20  # Colours of the moving curve; with their paler steps they fill most of a GIF's 256.
CLEAR = 255  # The palette entry that means "as in the frame before".

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


@dataclass(frozen=True)
class Row:
    """A curve's line in the table: a dot in the curve's colour and its numbers."""

    dot: Line2D
    cells: list[Text]


@dataclass(frozen=True)
class Scene:
    """A laid-out figure: curve and row of each spectrum in the order given, the vertical axis's lower limit."""

    figure: Figure
    canvas: Any  # FigureCanvasAgg; matplotlib's backends have no types.
    curves: list[Line2D]
    rows: list[Row]
    floor: float


def spectrum_png(spectra: Sequence[Spectrum], chart: Chart, size: Size | None = None) -> bytes:
    """One epoch's spectrum, or the first and the last overlaid: `spectra` is one or two."""
    with _drawing():
        scene = _scene(spectra, spectra, chart, size or Size())
        buffer = BytesIO()
        scene.canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def spectrum_svg(spectra: Sequence[Spectrum], chart: Chart, size: Size | None = None) -> bytes:
    """The picture of `spectrum_png` as curves; `width` and `height` are CSS pixels."""
    size = size or Size()
    with _drawing():
        figure = _scene(spectra, spectra, chart, size).figure
        buffer = BytesIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    pixels = f'width="{size.width}" height="{size.height}"'.encode()
    # matplotlib states the size in points, which a browser turns into another number of pixels.
    return re.sub(rb'width="[\d.]+pt" height="[\d.]+pt"', pixels, buffer.getvalue(), count=1)


def spectrum_gif(frames: Sequence[Spectrum], chart: Chart, size: Size | None = None, fps: int = 10) -> bytes:
    """The memo's Figure 1: a frame for each spectrum, in order of epoch, over the first one; it loops for ever."""
    with _drawing():
        scene = _scene([frames[0], frames[-1]], frames, chart, size or Size())
        body = list(_encoded(_indexed(scene, frames), _durations(len(frames), fps)))
    blank = Image.new("P", scene.canvas.get_width_height())
    blank.putpalette(_palette()[0].tobytes())
    header, _ = GifImagePlugin.getheader(blank, info={"loop": 0})
    return b"".join([*header, *body, b";"])


@contextmanager
def _drawing() -> Iterator[None]:
    """Our settings, and one warning less, until the end of the block."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name may hold letters that no font of ours has; a box in their place is the answer, not a warning.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


# The figure


def _scene(shown: Sequence[Spectrum], every: Sequence[Spectrum], chart: Chart, size: Size) -> Scene:
    """Draw `shown` on axes that have room for `every`."""
    inches = (size.width / size.dpi, size.height / size.dpi)
    scale = _text_scale(*inches)
    figure = Figure(figsize=inches, dpi=size.dpi, facecolor=PAPER)
    canvas: Any = FigureCanvasAgg(figure)
    colors = [REFERENCE, _shades()[-1]][-len(shown) :]
    rows, bottom = _header(figure, chart, list(zip(shown, colors, strict=True)), scale)
    gap = 6 * scale / 72
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, bottom), w_pad=gap, h_pad=gap)
    figure.set_layout_engine(engine)
    axes = figure.add_subplot(facecolor=PAPER)
    floor = _dress(axes, every, chart, scale)
    curves = [_curve(axes, spectrum, color, scale, floor) for spectrum, color in zip(shown, colors, strict=True)]
    return Scene(figure, canvas, curves, rows, floor)


def _text_scale(width: float, height: float) -> float:
    """How much larger than at 6.4 by 4 inches the text is: less than proportional, so that small stays legible."""
    ratio = min(width / 6.4, height / 4)
    return float(ratio**0.5 if ratio > 1 else ratio**0.7)


def _header(figure: Figure, chart: Chart, entries: list[tuple[Spectrum, str]], scale: float) -> tuple[list[Row], float]:
    """Title, subtitle and table from the top down; the table's rows and the height left, as a fraction."""
    width, height = figure.get_size_inches() * 72 / scale  # From here on a point is one of the picture's own.
    room = width - 24

    def put(x: float, y: float, text: str, points: float, **look: Any) -> Text:
        place = (x / width, 1 - y / height)
        return figure.text(*place, text, fontsize=points * scale, va="baseline", parse_math=False, **look)

    symbol = "W" if chart.of == "weights" else "W − W₀"
    shape = " × ".join(map(str, chart.shape))
    subtitle = f"singular values of {chart.layer if symbol == 'W' else f'{symbol} of {chart.layer}'}, {shape}"
    _ellipsise(put(12, 20, _plain(chart.title), 12, weight="bold"), room * scale)
    _ellipsise(put(12, 34, _plain(subtitle), 8, color=MUTED), room * scale)
    step = min(room / len(COLUMNS), 96)
    points = 7.5 * min(1.0, step / 78)  # 78 points is what the longest heading takes, with air.
    # Likewise 66 points hold the longest value, 1.234e-300.
    starts = [12 + step * column for column in range(len(COLUMNS))]
    for x, name in zip(starts, COLUMNS, strict=True):
        put(x + (12 if name == "epoch" else 0), 50, name, points, color=MUTED)
    rows: list[Row] = []
    for place, (spectrum, color) in enumerate(entries):
        y = 62 + 13 * place
        values = [
            put(x + (12 if x == 12 else 0), y, text, 9.5 * min(1.0, step / 66))
            for x, text in zip(starts, _cells(spectrum), strict=True)
        ]
        dot = Line2D([16 / width], [1 - (y - 3.4) / height], marker="o", markersize=6 * scale, color=color)
        figure.add_artist(dot)
        rows.append(Row(dot, values))
    return rows, 1 - (67 + 13 * (len(entries) - 1)) / height


def _cells(spectrum: Spectrum) -> list[str]:
    """A table row; a number that does not exist is a dash."""
    losses = [_number(loss, "#.4g") for loss in (spectrum.train_loss, spectrum.validation_loss)]
    ranks = [_number(rank, ".2f") for rank in (spectrum.entropy_rank, spectrum.stable_rank)]
    return [str(spectrum.epoch), *losses, *ranks]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not np.isfinite(value) else format(value, form)


def _plain(text: str) -> str:
    """One line that stays in its place: no control characters, line breaks, surrogates or reversals of direction."""
    unwanted = {"Cc", "Cn", "Cs", "Zl", "Zp"}
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "".join("�" if c in turning or unicodedata.category(c) in unwanted else c for c in text[:400])


def _ellipsise(text: Text, points: float) -> None:
    """Shorten a line from the right until it is at most so wide."""
    figure = text.get_figure(root=True)
    assert figure is not None  # noqa: S101 - it was put there by `figure.text`
    whole, limit = text.get_text(), points * figure.dpi / 72

    def too_wide(length: int) -> bool:
        text.set_text(whole[:length].rstrip() + "…" if length < len(whole) else whole)
        return text.get_window_extent().width > limit

    if too_wide(len(whole)):
        too_wide(max(0, bisect_left(range(len(whole)), True, key=too_wide) - 1))


def _dress(axes: Axes, every: Sequence[Spectrum], chart: Chart, scale: float) -> float:
    """Limits, grid, ticks and labels; returns the lower limit of s*_j."""
    count = max(len(spectrum.values) for spectrum in every)
    margin = max(0.5, 0.02 * count)
    axes.set_xlim(1 - margin, count + margin)
    axes.set_xticks(_index_ticks(count))
    floor, top = _limits(every, chart.scale)
    axes.set_yscale(chart.scale)
    axes.set_ylim(floor, top)
    if chart.scale == "log":
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("index $j$", fontsize=9 * scale)
    axes.set_ylabel(r"$s^*_j = s_j \,/\, \Sigma_i\,s_i$", fontsize=9 * scale)
    axes.grid(color=GRID, linewidth=0.8 * scale)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8 * scale, pad=4 * scale)
    axes.spines[:].set_visible(False)
    return floor


def _index_ticks(count: int) -> list[int]:
    """1 and round numbers up to `count`: there is no index 0."""
    ticks = [int(tick) for tick in MaxNLocator(7, integer=True).tick_values(1, count) if 1 < tick <= count]
    step = min((b - a for a, b in pairwise(ticks)), default=1)
    return [1, *(tick for tick in ticks if tick - 1 > step / 2)]


def _limits(every: Sequence[Spectrum], scale: str) -> tuple[float, float]:
    """Least and greatest of the vertical axis, over all spectra of the picture."""
    values = np.concatenate([spectrum.values for spectrum in every])
    top = float(values.max()) or 1.0  # All zero: the axis of a spectrum that could have any value.
    if scale == "linear":
        return -0.02 * top, 1.06 * top
    # log 0 has no place on the axis: zeros lie on its lower edge, below every value that is one.
    # It spans a decade at least, or a constant spectrum would have no power of ten beside it.
    return float(values[values > top * LOG_SPAN].min(initial=top / 10)) / 2, 2 * top


def _curve(axes: Axes, spectrum: Spectrum, color: str, scale: float, floor: float) -> Line2D:
    line = Line2D(*_points(spectrum, floor), color=color, linewidth=1.6 * scale, clip_on=False)
    if len(spectrum.values) <= MARKED_LIMIT:
        line.set(marker="o", markersize=3.2 * scale)
    return axes.add_line(line)


def _points(spectrum: Spectrum, floor: float) -> tuple[Array, Array]:
    return np.arange(1.0, len(spectrum.values) + 1), np.maximum(spectrum.values, floor)


# The animation


def _durations(count: int, fps: int) -> list[int]:
    """Milliseconds of each frame. A GIF counts hundredths: differences of cut-off times keep the mean rate right."""
    times = [100 * place // fps for place in range(count + 1)]
    hundredths = [after - before for before, after in pairwise(times)]
    hundredths[-1] += HOLD_CS
    return [10 * duration for duration in hundredths]


def _indexed(scene: Scene, frames: Sequence[Spectrum]) -> Iterator[Bytes]:
    """Draw everything but the last curve and its row once, then only those two, one frame after another."""
    canvas, curve, row = scene.canvas, scene.curves[-1], scene.rows[-1]
    for artist in (curve, row.dot, *row.cells):
        artist.set_animated(True)
    canvas.draw()
    still = canvas.copy_from_bbox(scene.figure.bbox)
    pixels = np.asarray(canvas.buffer_rgba()).view(np.uint32)[..., 0]
    still_pixels, still_indices = pixels.copy(), _lookup(pixels)
    floor, renderer = scene.floor, canvas.get_renderer()
    span = max(1, frames[-1].epoch - frames[0].epoch)
    for frame in frames:
        shade = _shades()[round((SHADES - 1) * (frame.epoch - frames[0].epoch) / span)]
        curve.set_data(*_points(frame, floor))
        curve.set_color(shade)
        row.dot.set_color(shade)
        canvas.restore_region(still)
        curve.draw(renderer)
        row.dot.draw(renderer)
        for cell, text in zip(row.cells, _cells(frame), strict=True):
            _draw_line(renderer, cell, text)
        changed = pixels != still_pixels
        indices = still_indices.copy()
        indices[changed] = _lookup(pixels[changed])
        yield indices


def _draw_line(renderer: Any, place: Text, text: str) -> None:
    """Draw one line as `place` would: a Text works out its layout anew for every string, at twice the cost."""
    x, y = place.get_transform().transform(place.get_position())
    context = renderer.new_gc()
    context.set_foreground(place.get_color())
    renderer.draw_text(context, x, renderer.height - y, text, place.get_fontproperties(), 0, mtext=place)
    context.restore()


def _encoded(drawn: Iterator[Bytes], durations: Sequence[int]) -> Iterator[bytes]:
    """GIF image blocks, each holding what changed since the frame before.

    `Image.save` would merge equal neighbours, keep every frame in memory and look for the changes itself.
    """
    before: Bytes | None = None
    for indices, duration in zip(drawn, durations, strict=True):
        changed = np.ones_like(indices, bool) if before is None else indices != before
        rows, columns = _extent(np.any(changed, axis=1)), _extent(np.any(changed, axis=0))
        part = np.where(changed, indices, np.uint8(CLEAR))[rows, columns]
        image = Image.fromarray(part)
        offset = (columns.start, rows.start)
        yield from GifImagePlugin.getdata(image, offset, duration=duration, transparency=CLEAR, disposal=1)
        before = indices


def _extent(used: NDArray[np.bool_]) -> slice:
    """From the first to the last place in use, and one place where there is none: no frame is ever left out."""
    places = np.flatnonzero(used)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 1)


@functools.cache
def _shades() -> list[str]:
    """The moving curve from its first colour to its last: indigo to coral, told apart by the colour-blind."""
    return [to_hex(color) for color in matplotlib.colormaps["plasma"](np.linspace(0.08, 0.6, SHADES))]


@functools.cache
def _palette() -> tuple[Bytes, Bytes]:
    """The colours of every GIF, (n, 3), and the nearest of them for each 15-bit colour.

    A picture holds our own colours and what smoothing makes of them on paper, so the palette is known beforehand.
    """
    steps = {REFERENCE: 20, MUTED: 24, INK: 48, **dict.fromkeys(_shades(), 7)}
    ramps = [np.linspace(to_rgb(PAPER), to_rgb(color), count + 1)[1:-1] for color, count in steps.items()]
    pure = [to_rgb(color) for color in (*steps, GRID, PAPER)]
    colors = np.rint(255 * np.concatenate([*ramps, pure]))
    fifths = np.rint(np.arange(32) * 255 / 31)
    cube = np.stack(np.meshgrid(fifths, fifths, fifths, indexing="ij"), axis=-1).reshape(-1, 3)
    squares = (colors**2).sum(axis=1)
    # In slabs that fit the cache: all at once takes four times as long, most of it for fresh memory.
    slabs = [np.argmin(squares - 2 * slab @ colors.T, axis=1) for slab in np.split(cube, 32)]
    nearest = np.concatenate(slabs).astype(np.uint8)
    palette = colors.astype(np.uint8)
    nearest[_fifteen_bits(palette)] = np.arange(len(palette))  # Pure colours come last, so each stays itself.
    return palette, nearest


def _lookup(pixels: NDArray[np.uint32]) -> Bytes:
    """RGBA pixels to palette indices."""
    indices: Bytes = _palette()[1][_fifteen_bits(pixels[..., np.newaxis].view(np.uint8))]
    return indices


def _fifteen_bits(colors: Bytes) -> NDArray[np.intp]:
    coarse = (colors >> 3).astype(np.intp)
    return coarse[..., 0] << 10 | coarse[..., 1] << 5 | coarse[..., 2]
