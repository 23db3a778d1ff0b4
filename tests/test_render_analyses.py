"""Pictures of an analysis: a layer, all layers, a budget; real bytes, read back by Pillow and an XML parser."""

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.text import Text
from PIL import Image

from service import render
from service.pictures import HEAT_COLUMNS, BudgetCurve, LayerSpectrum, ModelSpectra, Size, profile
from service.render import budget, heatmap, layer, style
from service.render.frame import Frame, settle

HOSTILE = [
    "$x^2$",
    "$\\frac{",
    "<script>alert(1)</script> ]]> &amp;",
    "\x00\n\ud800",
    "W" * 3000,
    "é̂̃ 😀 漢字 \u202eabc",
    "",
]
SIZES = [Size(), Size(160, 120, 200), Size(2000, 160, 50)]
FALLING = np.exp(-np.arange(64) / 8) / np.exp(-np.arange(64) / 8).sum()
LAYER = LayerSpectrum(
    "tiny.safetensors", "model.layers.0.q_proj.weight", (64, 64), FALLING, 0.02, 12, "energy 0.99", 31,
    3.2, 40.5, 0.9903, 0.0985, 0.375, "compress", "linear",
)  # fmt: skip
ZERO = replace(LAYER, values=np.zeros(64), noise_edge=None, rank=0, stable_rank=0, energy_kept=1, kept_fraction=0)
ONE = replace(LAYER, shape=(1, 10), values=np.ones(1), noise_edge=None, rank=1, break_even_rank=0)
LAYERS = {
    "usual": LAYER,
    "no noise edge": replace(LAYER, noise_edge=None),
    "zero": ZERO,
    "one value": ONE,
    "ranks coincide": replace(LAYER, rank=31),
    "rank k": replace(LAYER, rank=64, break_even_rank=63, verdict="keep_dense"),
    "both 0": replace(LAYER, rank=0, break_even_rank=0),
    "edge at the top": replace(LAYER, noise_edge=float(FALLING[0])),
    "edge above all": replace(LAYER, noise_edge=0.9),
    "edge among the least": replace(LAYER, noise_edge=float(FALLING[-1])),
    "long": replace(LAYER, chosen_by="W" * 200, rank=40),
    "wide": replace(LAYER, values=np.full(4096, 1 / 4096), rank=4000, break_even_rank=2047, noise_edge=0.0003),
}
FRACTIONS = np.linspace(0.05, 1, 20)
CURVE = BudgetCurve(
    "tiny.safetensors", 50, 85_054_464, FRACTIONS, 0.6 * (1 - FRACTIONS) ** 2, 0.7 * (1 - FRACTIONS),
    0.55 * (1 - FRACTIONS) ** 2, 0.25, 0.3375, 0.525, 0.309, "relative Frobenius error",
)  # fmt: skip
NOTHING = dict.fromkeys(("global_errors", "uniform_errors", "bounds"), np.full(20, np.nan))
ZEROS = dict.fromkeys(NOTHING, np.zeros(20))
CURVES = {
    "usual": CURVE,
    "no plan fits at first": replace(CURVE, global_errors=np.where(FRACTIONS < 0.3, np.nan, CURVE.global_errors)),
    "only one plan fits": replace(CURVE, **NOTHING),
    "no error": replace(CURVE, **ZEROS, fraction=1.0, global_error=0.0, uniform_error=0.0, bound=0.0),
    "one point": replace(CURVE, fractions=FRACTIONS[:1], **dict.fromkeys(NOTHING, np.ones(1)), fraction=0.05),
}


def model(count: int) -> ModelSpectra:
    """Layers that fall the faster the later they come; every fifth is zero, and every seventh has one value."""
    spectra = [
        np.zeros(4) if i % 5 == 3 else np.exp(-np.arange(1 if i % 7 == 6 else 300) * i / 999) for i in range(count)
    ]
    names = tuple(f"model.layers.{i}.self_attn.q_proj.with.a.rather.long.name.weight" for i in range(count))
    return ModelSpectra("tiny.safetensors", names, np.array([profile(s) for s in spectra]))


MODELS = {str(count): model(count) for count in (1, 2, 12, 50, 600)}
MODELS["all zero"] = replace(model(3), profiles=np.full((3, HEAT_COLUMNS), np.nan))
PICTURES: list[tuple[str, Any]] = [("layer", LAYER), ("heatmap", model(12)), ("budget", CURVE)]
EVERY = [
    *(pytest.param(layer.lay_out, replace(x, scale=scale), id=f"{name} {scale}")
      for name, x in LAYERS.items() for scale in ("linear", "log")),
    *(pytest.param(heatmap.lay_out, x, id=f"{name} layers") for name, x in MODELS.items()),
    *(pytest.param(budget.lay_out, x, id=f"budget {name}") for name, x in CURVES.items()),
]  # fmt: skip


def drawn(lay_out: Callable[[Any, Size], Frame], picture: Any, size: Size | None = None) -> Frame:
    """The figure behind a picture, every text in its place."""
    with style.drawing():
        frame = lay_out(picture, size or Size())
        settle(frame)
    return frame


def texts(frame: Frame) -> list[Text]:
    """Every text in the picture; an axis also keeps labels for ticks beyond its limits, which are not drawn."""
    found = list(frame.figure.texts)
    for axes in frame.figure.axes:
        found += [axes.xaxis.label, axes.yaxis.label, *inside(axes.xaxis), *inside(axes.yaxis)]
    return [text for text in found if text.get_text()]


def inside(axis: Axis) -> list[Text]:
    low, high = axis.get_view_interval()
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def labels(frame: Frame, *starts: str) -> list[Text]:
    """The texts that begin so, in the order given."""
    return [text for start in starts for text in frame.figure.texts if text.get_text().startswith(start)]


def opened(picture: bytes) -> Image.Image:
    return Image.open(BytesIO(picture))


def draw(name: str, *arguments: Any) -> bytes:
    content: bytes = getattr(render, name)(*arguments)
    return content


# Bytes


@pytest.mark.parametrize(("name", "shown"), PICTURES, ids=[name for name, _ in PICTURES])
@pytest.mark.parametrize("size", [Size(), Size(160, 120, 200), Size(333, 217, 73), Size(2000, 2000)], ids=str)
def test_pictures_have_exactly_the_size_asked_for(name: str, shown: Any, size: Size) -> None:
    picture = opened(draw(f"{name}_png", shown, size))
    assert (picture.format, picture.size) == ("PNG", (size.width, size.height))
    root = ElementTree.fromstring(draw(f"{name}_svg", shown, size))  # noqa: S314 - our own bytes
    assert (root.get("width"), root.get("height")) == (str(size.width), str(size.height))


DRAW_ELSEWHERE = """
import hashlib, pickle, sys
from service import render
for name, argument in pickle.load(sys.stdin.buffer):
    print(hashlib.sha256(getattr(render, name)(argument)).hexdigest())
assert not [name for name in sys.modules if name.startswith(("matplotlib.pyplot", "torch", "sqlalchemy", "fastapi"))]
"""


def test_the_same_values_give_the_same_bytes_here_and_in_another_process_without_pyplot() -> None:
    jobs = [(f"{name}_{form}", shown) for name, shown in PICTURES for form in ("png", "svg")]
    here = [[draw(name, shown) for name, shown in jobs] for _ in range(2)]
    assert here[0] == here[1]
    command = [sys.executable, "-W", "error", "-c", DRAW_ELSEWHERE]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, input=pickle.dumps(jobs), capture_output=True, check=True, cwd=root)
    assert answer.stdout.decode().split() == [hashlib.sha256(picture).hexdigest() for picture in here[0]]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_letters_in_their_place(name: str) -> None:
    shown: list[tuple[Callable[[Any, Size], Frame], Any]] = [
        (layer.lay_out, replace(LAYER, title=name, layer=name, chosen_by=name)),
        (heatmap.lay_out, replace(model(2), title=name, names=(name, name))),
        (budget.lay_out, replace(CURVE, title=name)),
    ]
    for lay_out, picture in shown:
        frame = drawn(lay_out, picture)
        assert not any(text.get_parse_math() for text in frame.figure.texts)
        with style.drawing():
            assert all(text.get_window_extent().x1 <= 640 for text in frame.figure.texts)
    for form, picture in zip(("layer", "heatmap", "budget"), (picture for _, picture in shown), strict=True):
        root = ElementTree.fromstring(draw(f"{form}_svg", picture))  # noqa: S314 - our own bytes
        assert not [element for element in root.iter() if element.tag.endswith(("script", "text"))]


# Places


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("lay_out", "shown"), EVERY)
def test_no_text_leaves_the_picture_and_no_label_the_axes(
    lay_out: Callable[[Any, Size], Frame], shown: Any, size: Size
) -> None:
    frame = drawn(lay_out, shown, size)
    for text in texts(frame):
        box = text.get_window_extent()
        assert -0.5 <= box.x0 <= box.x1 <= size.width + 0.5, text
        assert -0.5 <= box.y0 <= box.y1 <= size.height + 0.5, text
    area = frame.figure.axes[0].get_window_extent()
    boxes = [text.get_window_extent() for text in labels(frame, "rank ", "break-even ", "noise edge")]
    for box in boxes:
        assert area.x0 - 0.5 <= box.x0 <= box.x1 <= area.x1 + 0.5
        assert area.y0 - 0.5 <= box.y0 <= box.y1 <= area.y1 + 0.5
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize("shown", LAYERS.values(), ids=LAYERS)
def test_every_line_has_a_label(shown: LayerSpectrum) -> None:
    found = labels(drawn(layer.lay_out, shown), "rank ", "break-even ", "noise edge")
    assert len(found) == 2 + (shown.noise_edge is not None)


@pytest.mark.parametrize("count", [1, 12, 50, 600])
@pytest.mark.parametrize("size", [*SIZES, Size(160, 2000)], ids=str)
def test_names_of_layers_stay_apart_and_beside_their_rows(count: int, size: Size) -> None:
    frame = drawn(heatmap.lay_out, MODELS[str(count)], size)
    names = [text for text in frame.figure.texts if text.get_text().endswith("name.weight")]
    assert names
    boxes = [text.get_window_extent() for text in names]
    assert all(below.y1 <= above.y0 + 0.5 for above, below in pairwise(boxes))
    rows = frame.figure.axes[0].get_window_extent()
    assert all(box.x1 < rows.x0 for box in boxes)
    assert rows.width > 0.25 * size.width


# What is drawn


def test_a_rank_is_marked_between_what_it_keeps_and_what_it_drops() -> None:
    lines = drawn(layer.lay_out, LAYER).figure.axes[0].lines
    curve = next(line for line in lines if len(line.get_xdata()) == 64)
    np.testing.assert_array_equal(curve.get_ydata(), FALLING)
    assert [line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 2] == [12.5, 31.5, 0]
    assert lines[-1].get_ydata() == [0.02, 0.02]


def test_the_table_of_a_layer_says_its_numbers_and_a_dash_for_none() -> None:
    words = [text.get_text() for text in drawn(layer.lay_out, LAYER).figure.texts]
    assert words[2:14] == [*layer.COLUMNS, "3.20", "40.50", "0.9903", "0.09850", "0.3750", "compress"]
    assert words[14:] == ["rank 12 (energy 0.99)", "break-even 31", "noise edge"]
    unknown = drawn(layer.lay_out, replace(LAYER, stable_rank=None, entropy_rank=None)).figure.texts
    assert [text.get_text() for text in unknown][8:11] == ["–", "–", "0.9903"]


def test_a_layer_that_is_better_dense_is_called_so() -> None:
    assert labels(drawn(layer.lay_out, replace(LAYER, verdict="keep_dense")), "keep dense")


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_pixels_of_a_layer_are_where_its_values_are(scale: Any) -> None:
    shown = replace(LAYER, scale=scale)
    picture = np.asarray(opened(render.layer_png(shown)).convert("RGB"), float)
    points = np.column_stack([np.arange(1, 65), FALLING])[[0, 3, 20, 50]]
    for x, y in drawn(layer.lay_out, shown).figure.axes[0].transData.transform(points):
        assert np.abs(picture[399 - int(y), int(x)] - rgb(style.shades()[-1])).max() < 3


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)])


def test_a_profile_goes_from_the_first_value_to_the_last_in_equal_steps() -> None:
    np.testing.assert_array_equal(np.unique(profile(np.array([4.0, 2.0, 1.0])), return_counts=True)[1], [67, 66, 67])
    long = profile(np.linspace(1000, 1, 1000))
    assert (long[0], long[-1], len(long)) == (1, 0.001, HEAT_COLUMNS)
    assert (np.diff(long) < 0).all()


def test_a_profile_of_one_value_is_flat_and_that_of_zero_is_nothing() -> None:
    assert set(profile(np.array([1e-300]))) == {1.0}
    assert np.isnan(profile(np.zeros(7))).all()


def row_colors(shown: ModelSpectra, place: int) -> np.ndarray:
    """The colours along the middle of a row of the PNG, (pixels, 3)."""
    rows = drawn(heatmap.lay_out, shown).figure.axes[0].get_window_extent()
    picture = np.asarray(opened(render.heatmap_png(shown)).convert("RGB"), float)
    y = 400 - rows.y1 + rows.height * (place + 0.5) / len(shown.names)
    return picture[int(y), round(rows.x0) : round(rows.x1)]


def test_the_colours_of_a_row_are_its_values_and_a_zero_matrix_is_blank() -> None:
    profiles = np.stack([profile(s) for s in (np.array([1.0, 0.1, 0.01, 0.0]), np.zeros(3), np.ones(1))])
    shown = ModelSpectra("t", ("a", "b", "c"), profiles)
    quarters = row_colors(shown, 0)[[20, -20]]
    # Two decades: σ₁ has the brightest colour, 0 the darkest, which stands for 0.01 and all below.
    np.testing.assert_array_equal(quarters, heatmap._colors(np.array([1.0, 0.01]), 2)[:, :3])
    assert (row_colors(shown, 1) == 255).all()
    assert (row_colors(shown, 2) == quarters[0]).all()
    assert labels(drawn(heatmap.lay_out, shown), "≤ 0.01")


def test_colours_stop_at_the_ten_thousandth_of_the_first_value() -> None:
    shown = ModelSpectra("t", ("a",), profile(np.array([1.0, 1e-9]))[np.newaxis])
    assert labels(drawn(heatmap.lay_out, shown), "≤ 0.0001")


def test_layers_beyond_the_pixels_are_left_out_evenly_and_counted() -> None:
    frame = drawn(heatmap.lay_out, model(1000))
    shown = frame.figure.axes[0].images[0].get_array().shape[0]
    assert shown == round(frame.figure.axes[0].get_window_extent().height)
    assert (
        frame.figure.texts[1].get_text() == f"singular values of 1000 layers, of which {shown} are shown, evenly spaced"
    )
    assert drawn(heatmap.lay_out, MODELS["50"]).figure.texts[1].get_text() == "singular values of 50 layers"


@pytest.mark.parametrize(("count", "most"), [(1, 1), (5, 9), (9, 5), (10_000, 269), (3, 0)])
def test_evenly_spaced_numbers_are_distinct_and_cover_the_range(count: int, most: int) -> None:
    places = heatmap.evenly(count, most)
    assert len(places) == max(min(count, most), 1)
    assert np.ptp(np.diff(np.concatenate([[-1], places, [count]]))) <= count / len(places)
    assert len(set(places.tolist())) == len(places)


def test_ten_thousand_layers_are_drawn() -> None:
    shown = ModelSpectra("t", tuple(f"layer.{i}" for i in range(10_000)), np.tile(profile(np.ones(9)), (10_000, 1)))
    assert opened(render.heatmap_png(shown)).size == (640, 400)


def test_a_long_name_keeps_its_end() -> None:
    names = [text.get_text() for text in drawn(heatmap.lay_out, MODELS["2"]).figure.texts]
    assert [name for name in names if name.startswith("…") and name.endswith(".with.a.rather.long.name.weight")]
    short = replace(MODELS["2"], names=("wte", "wpe"))
    assert {"wte", "wpe"} < {text.get_text() for text in drawn(heatmap.lay_out, short).figure.texts}


def test_the_curves_of_a_budget_are_those_put_in() -> None:
    uniform, together, bound, *_ = drawn(budget.lay_out, CURVE).figure.axes[0].lines
    np.testing.assert_array_equal(uniform.get_ydata(), CURVE.uniform_errors)
    np.testing.assert_array_equal(together.get_ydata(), CURVE.global_errors)
    np.testing.assert_array_equal(bound.get_ydata(), CURVE.bounds)


def test_the_fraction_asked_for_is_marked_on_both_plans_and_in_the_table() -> None:
    frame = drawn(budget.lay_out, CURVE)
    marks = [tuple(map(float, line.get_xydata()[0])) for line in frame.figure.axes[0].lines[4:]]
    assert marks == [(0.25, 0.525), (0.25, 0.3375)]
    words = [text.get_text() for text in frame.figure.texts]
    assert words[2:] == [*budget.COLUMNS, "0.25", "0.3375", "0.5250", "0.3090"]
