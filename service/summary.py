"""A sweep's summary: a row for each member, and what its pictures show of the rows. Pure."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.lowrank import FIELDS, decay, describe, normalized
from service.lowrank.compression import rank_within_r2
from service.lowrank.ranks import Array
from service.pictures import SweepChart, SweepHeat, SweepLine, SweepLines, SweepSpectra
from service.schemas import WEIGHT_DTYPE, ExperimentSpec
from service.store import JobRow
from service.store.outcomes import Outcome
from service.sweeps import is_number, value_of, word

SEEDS = ("seed", "data.seed")
LOSSES = ("train_loss", "validation_loss", "train_r2", "validation_r2")
METRICS = (*FIELDS, *LOSSES, "rank_within_r2", "tau", "measured_shrinkage")
Row = dict[str, Any]


def row_of(job: JobRow, fields: Sequence[str], layer: str, outcome: Outcome | None) -> Row:
    """A member's line: varied fields, τ, losses and R², ranks and norms of the layer; null is what does not exist."""
    spec = ExperimentSpec.model_validate(job.spec)
    training = spec.training
    epoch = 0 if outcome is None else outcome.losses["epoch"]
    law = decay.decay_law(
        epoch * spec.steps_per_epoch, training.lr, training.weight_decay, training.momentum, training.optimizer
    )
    row: Row = {"id": job.id, "status": job.status, **{field: value_of(job.spec, field) for field in fields}}
    row |= {"tau": law.tau, "predicted_shrinkage": law.predicted_shrinkage, "measured_shrinkage": None}
    row |= dict.fromkeys(("epoch", *LOSSES, "rank_within_r2", *FIELDS))
    if outcome is None:
        return row
    row |= outcome.losses
    if outcome.first is not None and outcome.last is not None and layer in spec.shapes:
        row["measured_shrinkage"] = _or_none(decay.measured_shrinkage(outcome.first, outcome.last))
        row |= describe(outcome.last[np.newaxis], spec.shapes[layer], WEIGHT_DTYPE)[0]
    if outcome.r2_by_rank is not None:
        row["rank_within_r2"] = rank_within_r2(outcome.r2_by_rank)
    return row


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Pictures


def distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers by size, others in the order of the grid."""
    found = [value for place, value in enumerate(values) if value not in values[:place]]
    return sorted(found) if all(is_number(value) for value in found) else found


def lines(title: str, rows: Sequence[Row], fields: Sequence[str], x: str, metric: str) -> SweepLines:
    """A metric over one field, or over τ: mean and spread over seeds, a line for each setting of the other fields.

    Over τ every setting is a point of one line.
    """
    settings = [field for field in fields if field not in SEEDS]
    others = [] if x == "tau" else [field for field in settings if field != x]
    ticks = distinct([row[x] for row in rows if row[x] is not None])
    names = None if all(is_number(tick) for tick in ticks) else tuple(word(tick) for tick in ticks)
    cells: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row[x] is not None and row[metric] is not None:
            at = float(row[x]) if names is None else float(ticks.index(row[x]))
            cell = _words(row, settings) if x == "tau" else repr(at)
            cells[_words(row, others)][cell].append((at, float(row[metric])))
    drawn = tuple(_line(name, list(points.values())) for name, points in cells.items())
    return SweepLines(title, x, metric, names, drawn)


def _line(name: str, cells: list[list[tuple[float, float]]]) -> SweepLine:
    cells = sorted(cells)
    at = np.array([cell[0][0] for cell in cells])
    values = [np.array([value for _, value in cell]) for cell in cells]
    mean, low, high = (np.array([function(one) for one in values]) for function in (np.mean, np.min, np.max))
    return SweepLine(name, at, mean, low, high)


def heat(title: str, rows: Sequence[Row], x: str, y: str, metric: str) -> SweepHeat:
    """The mean of a metric over all members with the same values of two fields."""
    columns, lines = (distinct([row[field] for row in rows]) for field in (x, y))
    values = np.full((len(lines), len(columns)), np.nan)
    for (i, line), (j, column) in itertools.product(enumerate(lines), enumerate(columns)):
        found = [row[metric] for row in rows if row[x] == column and row[y] == line and row[metric] is not None]
        if found:
            values[i, j] = np.mean(found)
    return SweepHeat(title, x, y, metric, tuple(map(word, columns)), tuple(map(word, lines)), values)


def spectra(
    chart: SweepChart, rows: Sequence[Row], histories: Mapping[str, Mapping[int, Array]], epochs: Sequence[int]
) -> SweepSpectra:
    """Every member's s*_j at each of the epochs; a member keeps its last one once it records no more."""
    shown = [row for row in rows if row["id"] in histories]
    groups = distinct([row[chart.field] for row in shown])
    k = max(len(s) for history in histories.values() for s in history.values())
    values = np.full((len(epochs), len(shown), k), np.nan)
    for place, row in enumerate(shown):
        known: Array | None = None
        for frame, epoch in enumerate(epochs):
            known = histories[row["id"]].get(epoch, known)
            if known is not None:
                values[frame, place, : len(known)] = normalized(known)
    colors = tuple(groups.index(row[chart.field]) for row in shown)
    return SweepSpectra(chart, tuple(map(word, groups)), colors, tuple(epochs), values)


def _words(row: Row, fields: Sequence[str]) -> str:
    return ", ".join(f"{field.rpartition('.')[2]}={word(row[field])}" for field in fields)
