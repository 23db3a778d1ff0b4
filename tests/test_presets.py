"""The presets through the API: every band of the studies, for three seeds, the honest negative included."""

import math
from typing import Any, NamedTuple

import pytest

from tests.conftest import Server


class Band(NamedTuple):
    """What must hold of W2 after training; a bound of None is not asked for."""

    entropy_ratio: tuple[float, float]
    above_tenth: tuple[int, int]
    least_r2: float


BANDS = {
    "memo": Band((0.22, 0.40), (3, 6), 0.97),
    "memo-adamw": Band((0.18, 0.35), (3, 7), 0.99),
    "small-init": Band((0.16, 0.33), (3, 6), 0.99),
    "raw-relu": Band((0.35, 0.60), (0, 100), 0.99),
    "no-decay": Band((0.93, math.inf), (45, 64), 0.98),
}


def ends(server: Server, experiment_id: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The metrics, and W2's fields with its singular values at the first and the last epoch."""
    path = f"/experiments/{experiment_id}"
    metrics = server.client.get(f"{path}/metrics", params={"layer": "W2"}).json()
    epochs = server.client.get(f"{path}/spectrum").json()["epochs"]
    return metrics, epochs[0]["layers"][0], epochs[-1]["layers"][0]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", BANDS)
def test_a_preset_lands_in_its_bands(server: Server, preset: str, seed: int) -> None:
    band = BANDS[preset]
    state = server.run({"preset": preset, "seed": seed})
    assert state["status"] == "succeeded", state["error"]
    metrics, start, end = ends(server, state["id"])
    h = len(start["singular_values"])

    assert 0.78 <= start["entropy_rank"] / h <= 0.83
    assert 0.23 <= start["stable_rank"] / h <= 0.30
    assert 2.1 <= h * start["top_share_1"] <= 2.5

    ratio = end["entropy_rank"] / start["entropy_rank"]
    assert band.entropy_ratio[0] <= ratio <= band.entropy_ratio[1]
    above = sum(s > 0.1 * end["singular_values"][0] for s in end["singular_values"])
    assert band.above_tenth[0] <= above <= band.above_tenth[1]
    assert metrics["epochs"][-1]["validation_r2"] >= band.least_r2

    medians = [(s[h // 2 - 1] + s[h // 2]) / 2 for s in (start["singular_values"], end["singular_values"])]
    shrinkage = medians[1] / medians[0]
    if preset == "small-init":
        assert end["spectral_norm"] >= 20 * start["spectral_norm"]
    if preset == "raw-relu":
        assert 0.9 <= shrinkage <= 1.4
    check_the_law(preset, metrics, shrinkage)


def check_the_law(preset: str, metrics: dict[str, Any], shrinkage: float) -> None:
    """The tail shrinks as e^−τ where the law holds, and the run says so where it does not."""
    steps, lr, decay = {"memo": (3000, 0.2, 5e-3), "memo-adamw": (1500, 2e-3, 1.0)}.get(preset, (0, 0, 0))
    if not steps:
        assert metrics["decay_law"] is None
        assert metrics["notes"]
        return
    assert metrics["tau"] == pytest.approx(-steps * math.log1p(-lr * decay), rel=1e-12)
    law = metrics["decay_law"]
    assert law["predicted_shrinkage"] == pytest.approx(math.exp(-metrics["tau"]), rel=1e-12)
    assert law["layers"] == [{"name": "W2", "measured_shrinkage": pytest.approx(shrinkage, rel=1e-12)}]
    low, high = {"memo": (0.90, 1.20), "memo-adamw": (0.95, 1.6)}[preset]
    assert low <= shrinkage / law["predicted_shrinkage"] <= high
