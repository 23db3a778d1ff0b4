"""What a rule or one budget for the whole model makes of an analysis: a rank for every layer, and what that saves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service import reports
from service.errors import BadRequestValue
from service.lowrank import compression, describe, normalized, rescaled, times_power
from service.lowrank.allocation import Allocation, Layer, Weighting, allocator, global_budget, total_energy
from service.lowrank.compression import Rule
from service.lowrank.ranks import Array
from service.pictures import BudgetCurve, LayerSpectrum, Scale
from service.representations import rows_of
from service.rules import BUDGET, DEFAULTS, check_parameters, rule_of
from service.schemas import FactorsSpec
from service.store import TensorRow, spectrum_of

FRACTIONS = 40  # points of the curve over all budgets


@dataclass(frozen=True)
class Choice:
    """A layer's rank, None where it is to stay dense, and why."""

    rank: int | None
    reason: str


def choices_for(rows: Sequence[TensorRow], spec: FactorsSpec) -> dict[int, Choice]:
    """Position → what becomes of each analysed layer. Raises BadRequestValue, also for a layer that is not there."""
    found = reports.analysed(rows)
    wanted = {row.name for row in found} if spec.layers is None else set(spec.layers)
    if missing := wanted - {row.name for row in found}:
        raise BadRequestValue("/layers", min(missing), "is no tensor that was analysed")
    check_parameters(spec.rule, spec)
    rows = [row for row in rows if row.name in wanted]
    if spec.rule == "global_budget":
        report = budget_report(rows, spec.fraction or BUDGET, spec.weighting)
    else:
        report = model_report(rows, rule_of(spec.rule, spec))
    chosen = {layer["layer"]: _choice(layer) for layer in report["layers"]}
    return {row.position: chosen.get(row.name, Choice(None, "dense: not among the layers asked for")) for row in found}


def _choice(layer: dict[str, Any]) -> Choice:
    if layer["rank"] is None:
        return Choice(None, f"dense: {layer['chosen_by']}")
    if layer["verdict"] == "keep_dense":
        even = layer["break_even_rank"]
        return Choice(None, f"dense: rank {layer['rank']} saves nothing, up to {even} would ({layer['chosen_by']})")
    return Choice(layer["rank"], layer["chosen_by"])


def layer_report(row: TensorRow, rule: Rule) -> dict[str, Any]:
    """The report for one layer with its curve over all ranks.

    Raises BadRequestValue for a parameter that does not suit the layer.
    """
    return {**_head(row), **reports.compression_of(row, rule), "curve": _curve(row)}


def layer_table(row: TensorRow) -> dict[str, Any]:
    """One layer by all rules side by side, with its curve over all ranks."""
    return {**_head(row), "rule": "all", "rules": reports.table_of(row), "curve": _curve(row)}


def _curve(row: TensorRow) -> list[dict[str, Any]]:
    points = rows_of(compression.curve(spectrum_of(row), reports.matrix_shape(row)))
    return [rescaled(point, row.exponent) for point in points]


def model_report(rows: Sequence[TensorRow], rule: Rule) -> dict[str, Any]:
    """The reports for all layers, and the sums of those that the rule's parameter suits.

    Raises BadRequestValue where it suits none.
    """
    found = reports.analysed(rows)
    listed = {row.position: reports.compression_or_reason(row, rule) for row in found}
    suited = {position: report for position, report in listed.items() if report["rank"] is not None}
    if found and not suited:
        reports.compression_of(found[0], rule)  # It raises what it has against the first layer.
    return {
        "rule": rule.name,
        "layers": [{**_head(row), **listed[row.position]} for row in found],
        "totals": reports.totals(rows, suited),
    }


def model_table(rows: Sequence[TensorRow]) -> dict[str, Any]:
    """All layers by all rules side by side."""
    return {
        "rule": "all",
        "layers": [{**_head(row), "rules": reports.table_of(row)} for row in reports.analysed(rows)],
    }


def _head(row: TensorRow) -> dict[str, Any]:
    return {"layer": row.name, "shape": reports.matrix_shape(row), "dtype": row.dtype}


def layers_of(rows: Sequence[TensorRow]) -> tuple[list[Layer], int]:
    """The analysed layers with σ/2^e, and the e that they have in common: the largest of theirs.

    A layer smaller than 2^-500 of the largest counts as one of that size: it shall not look like a zero matrix.
    """
    found = reports.analysed(rows)
    common = max((row.exponent for row in found if spectrum_of(row)[0] > 0), default=0)

    def scaled(row: TensorRow) -> Array:
        return np.asarray(np.ldexp(spectrum_of(row), max(row.exponent - common, -500)))

    return [Layer(row.name, reports.matrix_shape(row), scaled(row)) for row in found], common


def budget_report(rows: Sequence[TensorRow], fraction: float, weighting: Weighting) -> dict[str, Any]:
    """The plan of `global_budget`, the bound and the uniform plan beside it. Raises BadRequestValue."""
    layers, common = layers_of(rows)
    answer = global_budget(layers, fraction, weighting)
    found = reports.analysed(rows)
    planned, uniform = (
        {row.position: _planned(row, plan.ranks[row.name]) for row in found} for plan in (answer.plan, answer.uniform)
    )
    power = 2 * common if weighting == "absolute" else 0
    total = sum(math.prod(layer.shape) for layer in layers)
    return {
        "rule": "global_budget",
        "fraction": fraction,
        "weighting": weighting,
        "chosen_by": _reason(answer, fraction),
        "budget_parameters": math.floor(fraction * total),
        "objective": times_power(answer.plan.objective, power),
        "bound": times_power(answer.bound, power),
        "uniform": {
            "objective": times_power(answer.uniform.objective, power),
            "parameters_after": answer.uniform.cost,
            "relative_frobenius_error": reports.totals(rows, uniform)["relative_frobenius_error"],
        },
        "layers": [
            {**_head(row), **planned[row.position], "uniform_rank": answer.uniform.ranks[row.name]} for row in found
        ],
        "totals": reports.totals(rows, planned),
    }


def _reason(answer: Allocation, fraction: float) -> str:
    same = answer.plan == answer.uniform
    how = "the same fraction for every layer is best" if same else "the energy lost is least over all layers together"
    return f"{how}, within {fraction:g} of the parameters"


def _planned(row: TensorRow, rank: int | None) -> dict[str, Any]:
    """The report for a planned rank: None is dense, 0 the zero matrix, which every rule gives it."""
    k = len(spectrum_of(row))
    rule = DEFAULTS["energy"] if rank == 0 else Rule("rank", rank=k if rank is None else rank)
    report = reports.compression_of(row, rule)
    for name in ("rule", "threshold"):
        report.pop(name, None)
    return {**report, "chosen_by": "dense is worth its price" if rank is None else "the plan"}


def marked_layer(row: TensorRow, rule: Rule, title: str, top_k: int | None, scale: Scale) -> LayerSpectrum:
    """One layer as it is drawn: s*_j, and marked on it the noise edge, the rule's rank and the break-even rank."""
    s, shape = spectrum_of(row), reports.matrix_shape(row)
    report = compression.report(s, shape, row.dtype, rule)
    (fields,) = describe(s[np.newaxis], shape, row.dtype)
    total = float(s.sum())
    parameters = [format(report[name], "g") for name in ("threshold", "fraction") if name in report]
    return LayerSpectrum(
        title=title,
        layer=row.name,
        shape=shape,
        values=normalized(s)[:top_k],
        noise_edge=None if fields["noise_edge"] is None else fields["noise_edge"] / total,
        rank=report["rank"],
        chosen_by=" ".join([rule.name, *parameters]),
        break_even_rank=report["break_even_rank"],
        scale=scale,
        stable_rank=fields["stable_rank"],
        entropy_rank=fields["entropy_rank"],
        **{name: report[name] for name in ("energy_kept", "relative_frobenius_error", "kept_fraction", "verdict")},
    )


def budget_curve(rows: Sequence[TensorRow], report: dict[str, Any], title: str) -> BudgetCurve:
    """Lost share of the weighted energy by both plans and the bound, over all budgets; marked the one of the report."""
    layers, _ = layers_of(rows)
    weighting: Weighting = report["weighting"]
    everything = total_energy(layers, weighting)
    fractions = np.linspace(1 / FRACTIONS, 1, FRACTIONS)
    allocate = allocator(layers, weighting)
    lost = np.array([_lost(allocate, fraction) for fraction in [*fractions.tolist(), report["fraction"]]])
    errors = np.sqrt(lost / everything if everything else lost)
    plan, uniform, bound = errors[-1].tolist()
    return BudgetCurve(
        title=title,
        n_layers=len(layers),
        n_parameters=sum(math.prod(layer.shape) for layer in layers),
        fractions=fractions,
        global_errors=errors[:-1, 0],
        uniform_errors=errors[:-1, 1],
        bounds=errors[:-1, 2],
        fraction=report["fraction"],
        global_error=plan,
        uniform_error=uniform,
        bound=bound,
        measure="relative Frobenius error" if weighting == "absolute" else "rms relative error of the layers",
    )


def _lost(allocate: Callable[[float], Allocation], fraction: float) -> list[float]:
    """Objectives of the plan and of the uniform plan, and the bound; NaN where the fraction is too little."""
    try:
        answer = allocate(fraction)
    except BadRequestValue:
        return [math.nan] * 3
    return [answer.plan.objective, answer.uniform.objective, answer.bound]
