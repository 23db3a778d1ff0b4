"""Pictures: real bytes, read back by Pillow and an XML parser."""

import hashlib
import itertools
import pickle
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from service import render
from service.pictures import Chart, Size, Spectrum
from service.render import spectrum_gif, spectrum_png, spectrum_svg, style
from service.render.spectrum import Scene, index_ticks, lay_out

CHART = Chart("memo", "hidden.1", (64, 64))
HOSTILE = [
    "$\\frac{",
    "$x^2$ and $y$",
    "<script>alert(1)</script> --> ]]> &amp;",
    "'; DROP TABLE experiments; --",
    "שלום مرحبا \u202eabc",
    "é̂̃ 👩‍👩‍👧‍👦 😀 漢字",
    "\x00\x1b[31m\n\ud800\ufffe",
    "\\" * 200,
    " ",
    "W" * 200,
]
SVG = "{http://www.w3.org/2000/svg}"


def spectrum(epoch: int, count: int = 64) -> Spectrum:
    """A spectrum that falls the more steeply the later the epoch."""
    values = np.exp(-np.arange(count) * (1 + epoch) / count)
    return Spectrum(epoch, values / values.sum(), 1 / (1 + epoch), 1.1 / (1 + epoch), 40.0 - epoch, 9.5 - epoch / 10)


def frames(count: int) -> list[Spectrum]:
    return [spectrum(epoch) for epoch in range(count)]


def scene_of(shown: list[Spectrum], chart: Chart = CHART, size: Size | None = None) -> Scene:
    """The figure behind a picture, drawn."""
    with style.drawing():
        scene = lay_out(shown, chart, size)
        scene.canvas.draw()
    return scene


def pixels_at(scene: Scene, values: np.ndarray, picture: Image.Image) -> np.ndarray:
    """The picture's colours (k, 3) where the axes put (j, values)."""
    points = np.column_stack([np.arange(1, len(values) + 1), values])
    x, y = scene.figure.axes[0].transData.transform(points).T
    colors = np.asarray(picture.convert("RGB"))
    return colors[picture.height - 1 - np.floor(y).astype(int), np.floor(x).astype(int)]


def rgb(color: str) -> np.ndarray:
    return np.rint(255 * np.array(to_rgb(color)))


def opened(picture: bytes) -> Image.Image:
    return Image.open(BytesIO(picture))


def images(gif: bytes) -> list[Image.Image]:
    animation = opened(gif)
    found = []
    for place in range(animation.n_frames):
        animation.seek(place)
        found.append(animation.convert("RGB"))
    return found


def durations(gif: bytes) -> list[int]:
    animation = opened(gif)
    found = []
    for place in range(animation.n_frames):
        animation.seek(place)
        found.append(animation.info["duration"])
    return found


# Sizes


@pytest.mark.parametrize(
    "size", [Size(), Size(160, 120, 200), Size(333, 217, 73), Size(201, 203, 50), Size(2000, 2000)], ids=str
)
def test_a_png_has_exactly_the_pixels_asked_for(size: Size) -> None:
    picture = opened(spectrum_png(frames(2), CHART, size))
    assert (picture.format, picture.size) == ("PNG", (size.width, size.height))


def test_an_svg_and_a_gif_have_exactly_the_size_asked_for() -> None:
    root = ElementTree.fromstring(spectrum_svg(frames(2), CHART, Size(333, 217, 73)))  # noqa: S314 - our own bytes
    assert (root.get("width"), root.get("height")) == ("333", "217")
    assert opened(spectrum_gif(frames(2), CHART, Size(333, 217, 73))).size == (333, 217)


def test_more_dots_per_inch_make_the_text_larger() -> None:
    heights = [
        scene_of(frames(1), size=Size(800, 500, dpi)).rows[0].cells[0].get_window_extent().height
        for dpi in (50, 100, 200)
    ]
    assert heights == sorted(heights)
    assert heights[0] < heights[-1]


# The same bytes

DRAW_ELSEWHERE = """
import hashlib, pickle, sys
from service import render
for name, arguments in pickle.load(sys.stdin.buffer):
    print(hashlib.sha256(getattr(render, name)(*arguments)).hexdigest())
assert not [name for name in sys.modules if name.startswith(("matplotlib.pyplot", "torch", "sqlalchemy", "fastapi"))]
"""


def test_the_same_arguments_give_the_same_bytes_here_and_in_another_process_without_pyplot() -> None:
    arguments = (frames(3)[::2], replace(CHART, title="שלום $x$ 漢字"), Size(400, 300))
    jobs = [(name, arguments) for name in ("spectrum_png", "spectrum_svg", "spectrum_gif")]
    here = [[getattr(render, name)(*arguments) for name, arguments in jobs] for _ in range(2)]
    assert here[0] == here[1]
    command = [sys.executable, "-W", "error", "-c", DRAW_ELSEWHERE]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, input=pickle.dumps(jobs), capture_output=True, check=True, cwd=root)
    assert answer.stdout.decode().split() == [hashlib.sha256(picture).hexdigest() for picture in here[0]]


def test_bytes_say_nothing_of_time_and_program() -> None:
    assert opened(spectrum_png(frames(1), CHART)).info.keys() <= {"dpi"}
    svg = spectrum_svg(frames(1), CHART)
    assert b"dc:date" not in svg
    assert b"Matplotlib" not in svg


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    spectrum_gif(frames(2), CHART)
    assert dict(matplotlib.rcParams) == before


# The animation


@pytest.mark.parametrize("count", [1, 2, 61])
def test_a_gif_has_a_frame_for_each_epoch_and_no_two_neighbours_are_equal(count: int) -> None:
    shown = images(spectrum_gif(frames(count), CHART))
    assert len(shown) == count
    assert all(a.tobytes() != b.tobytes() for a, b in itertools.pairwise(shown))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [Size(640, 400), Size(160, 120)], ids=str)
def test_equal_spectra_stay_frames_of_their_own(known: bool, size: Size) -> None:
    same = spectrum(3) if known else Spectrum(3, spectrum(3).values)
    shown = images(spectrum_gif([replace(same, epoch=epoch) for epoch in range(10)], CHART, size))
    assert len(shown) == 10
    assert all(a.tobytes() != b.tobytes() for a, b in itertools.pairwise(shown))


def test_even_frames_equal_in_everything_are_all_written() -> None:
    assert opened(spectrum_gif([spectrum(3)] * 5, CHART)).n_frames == 5


def test_200_frames_of_4096_values_are_drawn() -> None:
    gif = spectrum_gif([spectrum(epoch, 4096) for epoch in range(200)], CHART, Size(320, 240))
    assert opened(gif).n_frames == 200


@pytest.mark.parametrize("fps", [1, 3, 10, 24, 25])
def test_frames_last_as_long_as_their_number_a_second_says(fps: int) -> None:
    found = durations(spectrum_gif(frames(25), CHART, Size(160, 120), fps))
    assert all(abs(duration - 1000 / fps) < 10 for duration in found[:-1])
    assert sum(found) == pytest.approx(25 * 1000 / fps + 1000, abs=10)


def test_a_gif_loops_for_ever() -> None:
    assert opened(spectrum_gif(frames(2), CHART)).info["loop"] == 0


def test_all_frames_share_one_palette() -> None:
    assert local_palettes(spectrum_gif(frames(20), CHART)) == [False] * 20


def test_a_frame_holds_only_what_changed() -> None:
    one, many = (len(spectrum_gif(frames(count), CHART)) for count in (1, 20))
    assert many < 10 * one


def local_palettes(gif: bytes) -> list[bool]:
    """For each image block of a GIF, whether it carries a palette of its own (89a, section 20)."""
    assert gif[10] & 0x80
    place, found = 13 + 3 * 2 ** ((gif[10] & 7) + 1), []
    while gif[place : place + 1] != b";":
        if gif[place : place + 1] == b"!":
            place += 2
        else:
            found.append(bool(gif[place + 9] & 0x80))
            place += 11
        while gif[place]:
            place += gif[place] + 1
        place += 1
    return found


def test_the_palette_shows_what_was_drawn() -> None:
    shown = frames(9)
    gif = np.asarray(images(spectrum_gif(shown, CHART, Size(640, 400)))[-1], dtype=float)
    drawn = opened(spectrum_png([shown[0], shown[-1]], CHART, Size(640, 400))).convert("RGB")
    # The last of these spectra is the steepest, so both pictures have the same axes.
    difference = np.abs(gif - np.asarray(drawn, dtype=float))
    assert difference.mean() < 0.5
    assert np.percentile(difference, 99.5) < 24


# What is drawn


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_curves_are_the_spectra_put_in(scale: str) -> None:
    shown = [spectrum(0), spectrum(8)]
    scene = scene_of(shown, replace(CHART, scale=scale))
    for curve, put_in in zip(scene.curves, shown, strict=True):
        np.testing.assert_array_equal(curve.get_xdata(), np.arange(1, 65))
        np.testing.assert_array_equal(curve.get_ydata(), put_in.values)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_pixels_of_a_png_are_where_the_values_are(scale: str) -> None:
    shown, chart = [spectrum(0), spectrum(8)], replace(CHART, scale=scale)
    scene, picture = scene_of(shown, chart), opened(spectrum_png(shown, chart))
    found = pixels_at(scene, shown[1].values, picture)
    assert np.abs(found - rgb(style.shades()[-1])).max() < 3
    elsewhere = pixels_at(scene, np.full(64, shown[1].values[0]), picture)[8:]
    assert np.abs(elsewhere - rgb(style.shades()[-1])).sum(axis=1).min() > 100


def test_the_pixels_of_each_gif_frame_are_where_its_values_are() -> None:
    shown, size = frames(9), Size(640, 400)
    scene = scene_of([shown[0], shown[-1]], size=size)
    for place, picture in enumerate(images(spectrum_gif(shown, CHART, size))):
        found = pixels_at(scene, shown[place].values, picture)
        shade = rgb(style.shades()[round(19 * place / 8)])
        assert np.abs(found - shade).max() < 24
        # The first epoch stays in view; where it is far from the curve, its colour is its own.
        if place > 2:
            reference = pixels_at(scene, shown[0].values, picture)[:4:3]
            assert np.abs(reference - rgb(style.REFERENCE)).sum(axis=1).min() < 24


def test_each_gif_frame_has_its_own_numbers_in_the_table() -> None:
    shown, size = frames(9), Size(640, 400)
    for frame, picture in zip(shown, images(spectrum_gif(shown, CHART, size)), strict=True):
        still = opened(spectrum_png([shown[0], frame], CHART, size)).convert("RGB")
        table = (28, 0, 640, 110)  # To the right of the dots, whose colour is the epoch's in the GIF alone.
        difference = np.abs(np.asarray(picture.crop(table), float) - np.asarray(still.crop(table), float))
        assert difference.max() < 24


def test_the_axes_of_an_animation_have_room_for_every_frame() -> None:
    shown = [spectrum(0), spectrum(60), spectrum(1)]
    with style.drawing():
        scene = lay_out([shown[0], shown[-1]], CHART, every=shown)
    low, high = scene.figure.axes[0].get_ylim()
    assert low <= 0
    assert high > shown[1].values.max()


def test_the_table_says_the_numbers_and_a_dash_for_none_and_nan() -> None:
    scene = scene_of([Spectrum(0, np.ones(3) / 3, 0.5, None, np.nan, np.inf), spectrum(9)])
    table = [[cell.get_text() for cell in row.cells] for row in scene.rows]
    assert table == [["0", "0.5000", "–", "–", "–"], ["9", "0.1000", "0.1100", "31.00", "8.60"]]


def test_an_update_is_named_as_one() -> None:
    texts = [text.get_text() for text in scene_of(frames(1), replace(CHART, of="update")).figure.texts]
    assert "singular values of W − W₀ of hidden.1, 64 × 64" in texts


def test_zeros_on_a_logarithmic_axis_lie_on_its_edge() -> None:
    values = np.array([0.75, 0.25, 0.0])
    scene = scene_of([Spectrum(0, values)], replace(CHART, scale="log"))
    low, _ = scene.figure.axes[0].get_ylim()
    assert scene.curves[0].get_ydata().tolist() == [0.75, 0.25, low]
    assert 0 < low < 0.25


def test_many_values_are_drawn_without_dots() -> None:
    assert scene_of([spectrum(0, 200)]).curves[0].get_marker() == "o"
    assert scene_of([spectrum(0, 201)]).curves[0].get_marker() == "None"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 4096])
def test_index_ticks_begin_at_one_and_end_within(count: int) -> None:
    ticks = index_ticks(count)
    assert ticks[0] == 1
    assert ticks[-1] <= count
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize(
    "values",
    [np.zeros(8), np.full(64, 1 / 64), np.ones(1), np.zeros(1), np.array([1.0, 1e-300, 5e-324, 0.0]), np.full(9, 1e-9)],
    ids=["zero", "constant", "one value", "one zero", "tiny tail", "tiny"],
)
def test_edge_spectra_are_drawn(values: np.ndarray, scale: str) -> None:
    chart, shown = replace(CHART, scale=scale), [Spectrum(0, values), Spectrum(1, values)]
    assert opened(spectrum_png(shown, chart)).size == (640, 400)
    ElementTree.fromstring(spectrum_svg(shown, chart))  # noqa: S314 - our own bytes
    assert opened(spectrum_gif(shown, chart)).n_frames == 2


def test_a_zero_update_grows_into_a_spectrum_in_an_animation() -> None:
    shown = [Spectrum(0, np.zeros(64)), *frames(4)[1:]]
    for scale in ("linear", "log"):
        assert opened(spectrum_gif(shown, replace(CHART, of="update", scale=scale))).n_frames == 4


# Text


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_drawn_and_inert(name: str) -> None:
    chart = Chart(name, name, (64, 64))
    assert opened(spectrum_png(frames(2), chart)).size == (640, 400)
    assert opened(spectrum_gif(frames(2), chart)).n_frames == 2
    root = ElementTree.fromstring(spectrum_svg(frames(2), chart))  # noqa: S314 - our own bytes
    tags = {element.tag for element in root.iter() if element.tag.startswith(SVG)}
    assert tags <= {SVG + tag for tag in ("svg", "metadata", "defs", "style", "g", "path", "use", "clipPath", "rect")}


def test_dollars_are_letters() -> None:
    title, subtitle = scene_of(frames(1), Chart("$x^2$", "$y$", (2, 2))).figure.texts[:2]
    assert not title.get_parse_math()
    assert not subtitle.get_parse_math()
    assert title.get_text() == "$x^2$"


def test_long_names_are_shortened_and_short_ones_are_not() -> None:
    title, subtitle = scene_of(frames(1), Chart("word " * 40, "layer" * 40, (64, 64))).figure.texts[:2]
    assert title.get_text().endswith("word…")
    assert subtitle.get_text().endswith("…")
    assert 540 < title.get_window_extent().x1 <= 640
    assert scene_of(frames(1)).figure.texts[0].get_text() == "memo"


LARGEST = [
    replace(spectrum(epoch), epoch=10**5, train_loss=1.234e-300, validation_loss=1e300, stable_rank=4095.99)
    for epoch in (0, 8)
]


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize(
    "size",
    [Size(640, 400), Size(320, 240), Size(320, 240, 200), Size(160, 120), Size(2000, 200, 50), Size(160, 2000)],
    ids=str,
)
def test_no_text_is_clipped_and_no_number_meets_another(size: Size, scale: str) -> None:
    scene = scene_of(LARGEST, Chart("W" * 200, "m" * 200, (16384, 16384), scale=scale), size)
    for text in drawn_texts(scene):
        box = text.get_window_extent()
        assert box.x0 >= -0.5, text
        assert box.y0 >= -0.5, text
        assert box.x1 <= size.width + 0.5, text
        assert box.y1 <= size.height + 0.5, text
    for row in scene.rows:
        boxes = [cell.get_window_extent() for cell in row.cells]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    table_end = min(cell.get_window_extent().y0 for cell in scene.rows[-1].cells)
    assert scene.figure.axes[0].get_window_extent().y1 < table_end


def drawn_texts(scene: Scene) -> list[Text]:
    """Every text in the picture; an axis also keeps labels for ticks beyond its limits, which are not drawn."""
    axes = scene.figure.axes[0]
    return [*scene.figure.texts, axes.xaxis.label, axes.yaxis.label, *inside(axes.xaxis), *inside(axes.yaxis)]


def inside(axis: Axis) -> list[Text]:
    low, high = axis.get_view_interval()
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
