"""The summary of a sweep over HTTP: rows that agree with the members' own answers, and pictures of them."""

import csv
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.lowrank.compression import rank_within_r2
from service.pictures import SweepChart
from service.render import sweep_gif, sweep_heat_png, sweep_lines_png, sweep_overlay_png
from service.summary import distinct, heat, lines, spectra
from tests.conftest import Server, start_server, stop_server
from tests.test_bad_inputs import problem
from tests.test_sweeps import SMALL, finished, post

GRID: dict[str, Any] = {"training.weight_decay": [0, 0.1], "training.lr": [0.05, 0.1, 1e300], "seed": {"range": [0, 2]}}


@pytest.fixture(scope="module")
def swept(server: Server) -> dict[str, Any]:
    """A finished sweep of twelve members, four of which diverge."""
    state = finished(server, post(server, SMALL, GRID)["id"])
    assert state["counts"] == {"succeeded": 8, "failed": 4}
    return state


def summary(server: Server, state: dict[str, Any], **query: Any) -> Any:
    answer = server.client.get(f"/sweeps/{state['id']}/summary", params=query)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_row_says_what_the_member_says_itself(server: Server, swept: dict[str, Any]) -> None:
    document = summary(server, swept).json()
    assert document["varied"] == list(GRID)
    assert [row["id"] for row in document["members"]] == [member["id"] for member in swept["members"]]
    for place in (0, 7, 11):
        row = document["members"][place]
        assert {field: row[field] for field in GRID} == swept["members"][place]["varied"]
        metrics = server.client.get(f"/experiments/{row['id']}/metrics?layer=W2").json()
        last = metrics["epochs"][-1]
        assert row["tau"] == metrics["tau"]
        for name in ("epoch", "train_loss", "validation_loss", "train_r2", "validation_r2"):
            assert row[name] == last[name]
        for name in ("entropy_rank", "stable_rank", "numerical_rank", "spectral_norm"):
            assert row[name] == last["layers"][0][name]
        if (law := metrics["decay_law"]) is not None:
            assert row["predicted_shrinkage"] == law["predicted_shrinkage"]
            assert row["measured_shrinkage"] == law["layers"][0]["measured_shrinkage"]
        if row["status"] == "succeeded":
            curve = server.client.get(f"/experiments/{row['id']}/compression").json()["curve"]
            least = next(one["rank"] for one in curve if one["validation_r2"] >= curve[-1]["validation_r2"] - 0.01)
            assert row["rank_within_r2"] == least
    table = list(csv.DictReader(io.StringIO(summary(server, swept, format="csv").text)))
    assert [float(line["training.lr"]) for line in table] == [row["training.lr"] for row in document["members"]]
    assert list(table[0]) == list(document["members"][0])


@pytest.mark.parametrize(
    "query",
    [
        {"x": "training.lr"},
        {"x": "tau", "metric": "measured_shrinkage"},
        {"kind": "heatmap", "metric": "validation_r2"},
        {"kind": "heatmap", "x": "seed", "y": "training.lr", "layer": "W1"},
        {"kind": "overlay", "scale": "log", "x": "seed"},
    ],
)
def test_a_still_picture_is_one_and_is_drawn_once(server: Server, swept: dict[str, Any], query: dict[str, str]) -> None:
    answer = summary(server, swept, format="png", width=500, height=300, **query)
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.format, picture.size) == ("PNG", (500, 300))
    assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    again = summary(server, swept, format="png", width=500, height=300, **query)
    assert (again.content, again.headers["etag"]) == (answer.content, answer.headers["etag"])
    path = f"/sweeps/{swept['id']}/summary"
    parameters: dict[str, Any] = {"format": "png", "width": 500, "height": 300, **query}
    headers = {"if-none-match": answer.headers["etag"]}
    assert server.client.get(path, params=parameters, headers=headers).status_code == 304


def test_the_animation_has_a_frame_for_every_epoch(server: Server, swept: dict[str, Any]) -> None:
    picture = Image.open(io.BytesIO(summary(server, swept, format="gif").content))
    assert (picture.format, picture.n_frames) == ("GIF", 7)
    thinned = Image.open(io.BytesIO(summary(server, swept, format="gif", frames=3).content))
    assert thinned.n_frames == 3


def test_what_cannot_be_drawn_is_refused(server: Server, swept: dict[str, Any]) -> None:
    path = f"/sweeps/{swept['id']}/summary"
    for query, name in (
        ({"format": "png", "x": "network.bias"}, "x"),
        ({"format": "png", "kind": "heatmap", "x": "tau"}, "x"),
        ({"format": "png", "kind": "heatmap", "x": "seed", "y": "seed"}, "y"),
        ({"format": "png", "metric": "beauty"}, "metric"),
        ({"format": "gif", "kind": "line"}, "kind"),
        ({"format": "png", "kind": "animation"}, "kind"),
        ({"format": "csv", "kind": "line"}, "kind"),
        ({"kind": "heatmap"}, "kind"),
        ({"metric": "beauty"}, "metric"),
        ({"format": "csv", "x": "network.bias"}, "x"),
        ({"layer": "W17"}, "layer"),
        ({"colour": "red"}, "colour"),
    ):
        found = problem(server.client.get(path, params=query), 422, "validation-error")
        assert found["errors"][0]["parameter"] == name
    assert problem(server.client.get(path, headers={"accept": "application/xml"}), 406, "not-acceptable")["available"]
    problem(server.client.get(path, params={"format": "png", "layer": "W9"}), 409, "spectrum-not-ready")
    problem(server.client.get("/sweeps/none/summary"), 404, "not-found")


def test_one_field_makes_no_heat_map_and_nothing_recorded_no_picture(server: Server) -> None:
    ahead = server.post({"training": {"epochs": 100_000}, "record": {"every": 1000}})["id"]
    server.wait(ahead, "running")  # The one worker is taken.
    posted = post(server, SMALL, {"seed": [0, 1]})
    path = f"/sweeps/{posted['id']}/summary"
    problem(server.client.get(path, params={"format": "png"}), 409, "spectrum-not-ready")
    rows = server.client.get(path).json()["members"]
    assert [(row["seed"], row["entropy_rank"], row["epoch"]) for row in rows] == [(0, None, None), (1, None, None)]
    server.client.post(f"/experiments/{ahead}/cancel")
    finished(server, posted["id"])
    found = problem(server.client.get(path, params={"format": "png", "kind": "heatmap"}), 422, "validation-error")
    assert "only seed varies" in found["detail"]


# The pictures' own arithmetic


def rows_of(values: dict[tuple[Any, Any, int], float | None]) -> list[dict[str, Any]]:
    return [
        {"id": str(place), "a": a, "b": b, "seed": seed, "m": value, "tau": None if a is None else float(place // 2)}
        for place, ((a, b, seed), value) in enumerate(values.items())
    ]


def test_lines_are_means_with_least_and_greatest_over_seeds() -> None:
    rows = rows_of({
        (2, "x", 0): 1.0, (2, "x", 1): 3.0, (1, "x", 0): 5.0, (1, "x", 1): 9.0, (1, "y", 0): 4.0, (1, "y", 1): None,
    })  # fmt: skip
    shown = lines("t", rows, ["a", "b", "seed"], "a", "m")
    assert [(line.name, line.at.tolist(), line.mean.tolist()) for line in shown.lines] == [
        ("b=x", [1, 2], [7, 2]),
        ("b=y", [1], [4]),
    ]
    assert (shown.lines[0].low.tolist(), shown.lines[0].high.tolist()) == ([5, 1], [9, 3])
    named = lines("t", rows, ["a", "b", "seed"], "b", "m")
    assert named.ticks == ("x", "y")
    over = lines("t", rows, ["a", "b", "seed"], "tau", "m")
    assert [line.at.tolist() for line in over.lines] == [[0, 1, 2]]
    for picture in (shown, named, over):
        assert sweep_lines_png(picture).startswith(b"\x89PNG")


def test_a_heat_map_has_means_and_blanks() -> None:
    rows = rows_of({(2, "x", 0): 1.0, (2, "x", 1): 3.0, (10, "y", 0): 5.0, (10, "x", 0): None})
    shown = heat("t", rows, "a", "b", "m")
    assert (shown.columns, shown.rows) == (("2", "10"), ("x", "y"))
    np.testing.assert_array_equal(shown.values, [[2, np.nan], [np.nan, 5]])
    assert sweep_heat_png(shown).startswith(b"\x89PNG")


def test_a_member_keeps_its_last_spectrum() -> None:
    rows = rows_of({(1, "x", 0): 1.0, (2, "x", 0): 1.0, (3, "x", 0): 1.0})
    histories = {"0": {0: np.array([3.0, 1.0]), 2: np.array([1.0, 0.0])}, "1": {0: np.array([1.0, 1.0, 2.0])}}
    shown = spectra(SweepChart("t", "W2", "a"), rows, histories, [0, 1, 2])
    assert (shown.groups, shown.colors) == (("1", "2"), (0, 1))
    np.testing.assert_array_equal(shown.values[:, 0, :2], [[0.75, 0.25], [0.75, 0.25], [1, 0]])
    np.testing.assert_array_equal(shown.values[2, 1], [0.25, 0.25, 0.5])
    assert sweep_overlay_png(shown).startswith(b"\x89PNG")
    assert Image.open(io.BytesIO(sweep_gif(shown))).n_frames == 3


def test_values_once_and_ranks_within_r2() -> None:
    assert distinct([3, 1, 3, 2]) == [1, 2, 3]
    assert distinct([[8], [5], [8], True]) == [[8], [5], True]
    assert rank_within_r2(np.array([0.5, 0.98, 0.985, 0.99])) == 2
    assert rank_within_r2(np.array([-3.0, -2.0, -2.0])) == 2
    assert rank_within_r2(np.array([np.nan, np.nan])) is None


@pytest.mark.slow
def test_the_entropy_rank_falls_with_tau(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=2)
    grid = {
        "training.weight_decay": [0, 1e-3, 3e-3, 6e-3],
        "training.lr": [0.05, 0.1, 0.2, 0.4],
        "seed": {"range": [0, 4]},
    }
    posted = post(server, {"name": "decay"}, grid)
    assert [len(batch["members"]) for batch in posted["batches"]] == [32, 32]  # Each worker gets one.
    state = finished(server, posted["id"])
    assert state["counts"] == {"succeeded": 64}
    rows = summary(server, state).json()["members"]
    by_tau: dict[float, list[float]] = {}
    for row in rows:
        by_tau.setdefault(round(row["tau"], 6), []).append(row["entropy_rank"])
    ordered = [ranks for _, ranks in sorted(by_tau.items())]
    assert len(ordered) == 10  # Four cells have τ = 0, and three pairs of cells the same one.
    for before, after in itertools.pairwise(ordered):
        assert min(after) <= max(before)  # Monotone within the spread over seeds.
    assert np.mean(ordered[-1]) < 0.2 * np.mean(ordered[0])
    for row in rows:
        if row["training.weight_decay"] and row["tau"] <= 4:
            assert 0.9 <= row["measured_shrinkage"] / row["predicted_shrinkage"] <= 1.2
    for query in ({"x": "tau"}, {"kind": "heatmap"}, {"kind": "overlay"}):
        assert summary(server, state, format="png", **query).content.startswith(b"\x89PNG")
    assert stop_server(server) == 0
