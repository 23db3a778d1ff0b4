"""What all pictures share: the blank figure, title and subtitle, the table that is also the legend, axes, the bytes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ParamSpec

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text

from service.pictures import Size
from service.render.style import GRID, MUTED, PAPER, drawing, ellipsise, plain, text_scale

# Every renderer comes with a parser that has seen no formula yet; ours remembers those of the labels.
FORMULAS = MathTextParser("path")
Looks = dict[int, dict[str, Any]]
Shown = ParamSpec("Shown")


@dataclass(frozen=True)
class Frame:
    """A figure of so many pixels, and how much larger than usual its text is."""

    size: Size
    figure: Figure
    canvas: Any  # FigureCanvasAgg; matplotlib's backends have no types.
    scale: float

    def points(self) -> tuple[float, float]:
        """Width and height in the picture's own points, of which the usual title is 12 high."""
        width, height = self.figure.get_size_inches() * 72 / self.scale
        return float(width), float(height)

    def pixels(self) -> float:
        """How many pixels such a point is."""
        return self.figure.dpi / 72 * self.scale


@dataclass(frozen=True)
class Row:
    """A line in the table: numbers, and before some of them a dot or dash in a curve's colour."""

    dots: list[Line2D]
    cells: list[Text]


def blank(size: Size | None) -> Frame:
    """An empty figure of exactly so many pixels, or as many as usual."""
    size = size or Size()
    inches = (size.width / size.dpi, size.height / size.dpi)
    figure = Figure(figsize=inches, dpi=size.dpi, facecolor=PAPER)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.get_renderer().mathtext_parser = FORMULAS
    return Frame(size, figure, canvas, text_scale(*inches))


def put(frame: Frame, place: tuple[float, float], text: str, points: float, **look: Any) -> Text:
    """A line of text as it is, its baseline so many points from the left and from the top."""
    width, height = frame.points()
    x, y = place[0] / width, 1 - place[1] / height
    return frame.figure.text(x, y, text, fontsize=points * frame.scale, va="baseline", parse_math=False, **look)


def headline(frame: Frame, title: str, subtitle: str) -> None:
    """What the picture is of, in two lines."""
    room = (frame.points()[0] - 24) * frame.scale
    ellipsise(put(frame, (12, 20), plain(title), 12, weight="bold"), room)
    ellipsise(put(frame, (12, 34), plain(subtitle), 8, color=MUTED), room)


def table(
    frame: Frame, names: Sequence[str], entries: Sequence[tuple[Sequence[str], Looks]]
) -> tuple[list[Row], float]:
    """Headings and rows below the headline; the rows, and the height left as a fraction.

    An entry is its numbers and, for the columns whose number is a curve's, how the curve's dot looks.
    """
    width, height = frame.points()
    step = min((width - 24) / len(names), 96)
    points = 7.5 * min(1.0, step / 78)  # 78 points is what the longest heading takes, with air.
    # Likewise 66 points hold the longest value, 1.234e-300.
    dotted = set().union(*(looks for _, looks in entries))
    starts = [12 + step * column + 12 * (column in dotted) for column in range(len(names))]
    for x, name in zip(starts, names, strict=True):
        put(frame, (x, 50), name, points, color=MUTED)
    rows: list[Row] = []
    for line, (cells, looks) in enumerate(entries):
        y = 62 + 13 * line
        values = [put(frame, (x, y), text, 9.5 * min(1.0, step / 66)) for x, text in zip(starts, cells, strict=True)]
        dots = [_dot(frame, (starts[column] - 8, y), look) for column, look in looks.items()]
        rows.append(Row(dots, values))
    return rows, 1 - (67 + 13 * (len(entries) - 1)) / height


def _dot(frame: Frame, place: tuple[float, float], look: dict[str, Any]) -> Line2D:
    width, height = frame.points()
    sizes: dict[str, Any] = {"marker": "o", "markersize": 6 * frame.scale}
    dot = Line2D([place[0] / width], [1 - (place[1] - 3.4) / height], **(sizes | look))
    frame.figure.add_artist(dot)
    return dot


def add_axes(frame: Frame, top: float) -> Axes:
    """Axes that fill what the table has left, with their labels."""
    gap = 6 * frame.scale / 72
    frame.figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, top), w_pad=gap, h_pad=gap))
    return frame.figure.add_subplot(facecolor=PAPER)


def dress(axes: Axes, scale: float) -> None:
    """A pale grid behind the curves, ticks without marks, no box."""
    axes.grid(color=GRID, linewidth=0.8 * scale)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8 * scale, pad=4 * scale)
    axes.spines[:].set_visible(False)


def settle(frame: Frame) -> None:
    """Lay the figure out now and for good, so that a label can be put where the axes have come to lie."""
    engine = frame.figure.get_layout_engine()
    if engine is not None:
        engine.execute(frame.figure)
    frame.figure.set_layout_engine(None)


def extent(frame: Frame, axes: Axes) -> tuple[float, float, float]:
    """Left, right and top of settled axes, in points from the figure's left and top."""
    box, pixels = axes.get_window_extent(), frame.pixels()
    return box.x0 / pixels, box.x1 / pixels, frame.points()[1] - box.y1 / pixels


def position(frame: Frame, axes: Axes, values: tuple[float, float]) -> tuple[float, float]:
    """Where settled axes put a pair of values, in points from the figure's left and top."""
    x, y = axes.transData.transform(values)
    return float(x) / frame.pixels(), frame.points()[1] - float(y) / frame.pixels()


def stills(lay_out: Callable[Shown, Frame]) -> tuple[Callable[Shown, bytes], Callable[Shown, bytes]]:
    """What draws what `lay_out` lays out: as PNG, and as SVG, the same picture as curves."""

    def draw_png(*shown: Shown.args, **options: Shown.kwargs) -> bytes:
        with drawing():
            return _png(lay_out(*shown, **options))

    def draw_svg(*shown: Shown.args, **options: Shown.kwargs) -> bytes:
        with drawing():
            return _svg(lay_out(*shown, **options))

    return draw_png, draw_svg


def _png(frame: Frame) -> bytes:
    """With nothing in it that changes from run to run."""
    buffer = BytesIO()
    frame.canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _svg(frame: Frame) -> bytes:
    """Likewise; `width` and `height` are CSS pixels."""
    buffer = BytesIO()
    canvas: Any = FigureCanvasSVG(frame.figure)
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    pixels = f'width="{frame.size.width}" height="{frame.size.height}"'.encode()
    # matplotlib states the size in points, which a browser turns into another number of pixels.
    return re.sub(rb'width="[\d.]+pt" height="[\d.]+pt"', pixels, buffer.getvalue(), count=1)
