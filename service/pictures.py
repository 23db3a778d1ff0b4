"""What a picture shows: plain values that travel to the drawing process; no matplotlib here."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from service.lowrank.ranks import Array

Scale = Literal["linear", "log"]

HEAT_COLUMNS = 200


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One epoch's s*_j, (k,), largest first, finite and at least 0, and what the table says beside it."""

    epoch: int
    values: Array
    train_loss: float | None = None
    validation_loss: float | None = None
    entropy_rank: float | None = None
    stable_rank: float | None = None


@dataclass(frozen=True)
class Chart:
    """What the picture is of; `title` is a user's plain text."""

    title: str
    layer: str
    shape: tuple[int, ...]
    of: Literal["weights", "update"] = "weights"
    scale: Scale = "linear"


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """One layer's s*_j, (k,), largest first, finite and at least 0, with a line at its noise edge and at two ranks.

    `title` and `layer` are a user's plain text; `noise_edge` is divided by Σσ as the values are, None where there is
    none; `chosen_by` says in a word or two what chose `rank`, as "energy 0.99"; the rest is for the table.
    """

    title: str
    layer: str
    shape: tuple[int, ...]
    values: Array
    noise_edge: float | None
    rank: int
    chosen_by: str
    break_even_rank: int
    stable_rank: float | None
    entropy_rank: float | None
    energy_kept: float
    relative_frobenius_error: float
    kept_fraction: float
    verdict: Literal["compress", "keep_dense"]
    scale: Scale


@dataclass(frozen=True, eq=False)
class ModelSpectra:
    """A `profile` for each layer, (n_layers, HEAT_COLUMNS), in the file's order; title and names are plain text."""

    title: str
    names: tuple[str, ...]
    profiles: Array


def profile(s: Array) -> Array:
    """σ_j/σ₁ at evenly spaced shares j/k of a spectrum (k,), largest first: (HEAT_COLUMNS,), from σ₁ to σ_k.

    Every j gets the same width where k allows it. NaN for the zero matrix, which has no such ratio.
    """
    shares = np.linspace(0, 1, HEAT_COLUMNS)
    places = np.minimum((shares * len(s)).astype(np.intp), len(s) - 1)
    return s[places] / s[0] if s[0] > 0 else np.full(HEAT_COLUMNS, np.nan)


@dataclass(frozen=True, eq=False)
class BudgetCurve:
    """Errors of a whole model over the kept fraction of its parameters, and the numbers at the fraction asked for.

    `fractions` is (p,), rising, over 0 and at most 1; `global_errors`, `uniform_errors` and `bounds` are (p,), at least
    0, NaN where no plan fits. `measure` says what the errors are; `title` is a user's plain text.
    """

    title: str
    n_layers: int
    n_parameters: int
    fractions: Array
    global_errors: Array
    uniform_errors: Array
    bounds: Array
    fraction: float
    global_error: float
    uniform_error: float
    bound: float
    measure: str


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, exactly; more dots per inch make the text larger, not the picture."""

    width: int = 640
    height: int = 400
    dpi: int = 100


@dataclass(frozen=True, eq=False)
class SweepLine:
    """One setting's mean, least and greatest metric, each (n,), over `at`, rising; `name` may be empty."""

    name: str
    at: Array
    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class SweepLines:
    """A metric over a varied field; `ticks` names the places 0, 1, … of a field whose values are no numbers."""

    title: str
    x: str
    metric: str
    ticks: tuple[str, ...] | None
    lines: tuple[SweepLine, ...]


@dataclass(frozen=True, eq=False)
class SweepHeat:
    """A metric over two varied fields: (rows, columns), NaN where there is none."""

    title: str
    x: str
    y: str
    metric: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: Array


@dataclass(frozen=True)
class SweepChart:
    """What a picture of members' spectra is of; the colours stand for the values of `field`."""

    title: str
    layer: str
    field: str
    scale: Scale = "linear"


@dataclass(frozen=True, eq=False)
class SweepSpectra:
    """All members' s*_j, (frames, members, k), NaN where there is none; `colors` is each member's place in `groups`."""

    chart: SweepChart
    groups: tuple[str, ...]
    colors: tuple[int, ...]
    epochs: tuple[int, ...]
    values: Array
