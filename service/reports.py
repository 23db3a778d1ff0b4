"""What an analysis has to say, from the stored spectra: every tensor's ranks and norms, and what a cut would save.

Rules choose ranks for W/2^exponent as they would for W: nothing but a norm depends on the scale.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from service.lowrank import compression, describe, rescaled
from service.lowrank.compression import Rule
from service.lowrank.ranks import Array, Shape
from service.rules import DEFAULTS, report_or_reason
from service.store import TensorRow, spectrum_of

TOP_K = 512
TABLE = ("rule", "rank", "verdict", "kept_fraction", "relative_frobenius_error", "energy_kept")


def matrix_shape(row: TensorRow) -> Shape:
    """(first axis, product of all others)."""
    first, *rest = row.shape or (0, 0)
    return first, math.prod(rest)


def analysed(rows: Iterable[TensorRow]) -> list[TensorRow]:
    """Those that have a spectrum."""
    return [row for row in rows if row.status == "analysed"]


def values_of(row: TensorRow) -> Array:
    """The singular values (k,), largest first; infinite where no float64 holds them."""
    with np.errstate(over="ignore"):
        return np.ldexp(spectrum_of(row), row.exponent)


def fields_of(rows: Sequence[TensorRow]) -> dict[int, dict[str, Any]]:
    """Position → ranks and norms of each analysed tensor; equal shapes and dtypes in one go."""
    fields: dict[int, dict[str, Any]] = {}

    def kind(row: TensorRow) -> tuple[Shape, str]:
        return matrix_shape(row), row.dtype

    for (shape, dtype), alike in itertools.groupby(sorted(analysed(rows), key=kind), kind):
        group = list(alike)
        described = describe(np.stack([spectrum_of(row) for row in group]), shape, dtype)
        fields |= {row.position: rescaled(one, row.exponent) for row, one in zip(group, described, strict=True)}
    return fields


def compression_of(row: TensorRow, rule: Rule) -> dict[str, Any]:
    """The report of a rule for one tensor. Raises BadRequestValue for a parameter that does not suit it."""
    report = compression.report(spectrum_of(row), matrix_shape(row), row.dtype, rule)
    return rescaled(report, row.exponent)


def compression_or_reason(row: TensorRow, rule: Rule) -> dict[str, Any]:
    """The same, or why the rule does not suit this one of many tensors."""
    return rescaled(report_or_reason(spectrum_of(row), matrix_shape(row), row.dtype, rule), row.exponent)


def table_of(row: TensorRow) -> list[dict[str, Any]]:
    """All rules at their defaults, side by side."""
    return [compression_or_reason(row, rule) for rule in DEFAULTS.values()]


def tensor(
    row: TensorRow, fields: dict[str, Any] | None, table: list[dict[str, Any]] | None, top_k: int
) -> dict[str, Any]:
    """One tensor of an analysis: pending, skipped with the reason, or analysed, with its fields and its table."""
    head = {
        "name": row.name,
        "shape": row.shape,
        "matrix_shape": None if row.status == "skipped" else matrix_shape(row),
        "dtype": row.dtype or None,
        "status": row.status,
        "reason": row.reason,
        "detail": row.detail,
        "notes": row.notes,
    }
    if fields is None or table is None:
        return head
    short = [{name: report.get(name) for name in TABLE} for report in table]
    # The first rule of the table is the default one.
    return {**head, "singular_values": values_of(row)[:top_k], **fields, "compression": {**table[0], "table": short}}


def totals(rows: Sequence[TensorRow], reports: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Sums over the layers that have a report, by position: what one choice of ranks would make of the model."""
    found = [row for row in rows if row.position in reports]
    listed = [reports[row.position] for row in found]
    before, after = (sum(one[f"parameters_{when}"] for one in listed) for when in ("before", "after"))
    return {
        "tensors": len(rows),
        **{status: sum(row.status == status for row in rows) for status in ("analysed", "skipped", "pending")},
        "parameters_before": before,
        "parameters_after": after,
        "kept_fraction": after / before if before else None,
        "times_smaller": before / after if after else None,
        "bytes_before": sum(one["bytes_before"] for one in listed),
        "bytes_after": sum(one["bytes_after"] for one in listed),
        "relative_frobenius_error": joint_error(found, [one["relative_frobenius_error"] for one in listed]),
    }


def joint_error(rows: Sequence[TensorRow], errors: Sequence[float]) -> float | None:
    """√(Σ_l energy lost by l/Σ_l ‖W_l‖²), over the largest norm, so that no square overflows."""
    norms = [(float(np.sqrt(np.square(spectrum_of(row)).sum())), row.exponent) for row in rows]
    largest = max((exponent for norm, exponent in norms if norm), default=0)
    scaled = [math.ldexp(norm, max(exponent - largest, -2000)) for norm, exponent in norms]
    unit = max(scaled, default=0.0)
    if unit == 0:
        return None if not rows else 0.0
    energies = [(norm / unit) ** 2 for norm in scaled]
    lost = math.fsum(energy * error**2 for energy, error in zip(energies, errors, strict=True))
    return math.sqrt(lost / math.fsum(energies))
