"""Sweeps: from a base specification and a grid to the members, and from the members to the batches that train them.

Pure. A member is a full specification; what it becomes does not depend on the others. The last axis of the grid varies
fastest.
"""

import functools
import itertools
import math
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from service.errors import BadRequestValue, BudgetExceeded
from service.schemas import (
    LONGEST_LABEL,
    PARAMETER_LIMIT,
    RECORDED_LIMIT,
    WORK_LIMIT,
    ExperimentSpec,
    Strict,
    resolve,
)

MEMBER_LIMIT = 1024
SWEEP_FACTOR = 10  # All members together may take this many times what the largest single experiment may.
BATCH_BYTES = 1 << 30
BATCH_MEMBERS = 256  # A member's cost is flat from a few dozen on; a batch that is lost is trained again.
LEAST_MEMBERS = 8  # Below it a member costs more than a second worker gains.
SECTIONS = ("data", "network", "training", "record")
FIELDS = ("seed", "preset", *(
    f"{name}.{field}" for name in SECTIONS for field in type(getattr(ExperimentSpec(), name)).model_fields
))  # fmt: skip


Values = tuple[object, ...]


class LogAxis(Strict):
    """n numbers from lo to hi, each the same multiple of the one before."""

    log: list[float] = Field(min_length=3, max_length=3, description="lo, hi, n")


class RangeAxis(Strict):
    """The integers from lo up to, and without, hi."""

    range: list[int] = Field(min_length=2, max_length=2, description="lo, hi")


class SweepSpec(Strict):
    """A base, and values for some of its fields; every combination of them is a member."""

    base: dict[str, Any] = Field({}, description="an experiment's specification; name, tags and priority: the sweep's")
    grid: Annotated[dict[str, list[Any] | LogAxis | RangeAxis], Field(min_length=1)] = Field(
        description="dotted field, as training.lr → list of values, {log: [lo, hi, n]} or {range: [lo, hi]}"
    )


class Member(NamedTuple):
    """The values of the varied fields, and the specification that they make."""

    varied: dict[str, Any]
    spec: ExperimentSpec


def expand(body: dict[str, Any]) -> list[Member]:
    """The members of a sweep's request body, in the order of the grid.

    Raises BadRequestValue or BudgetExceeded; a member that is refused is named by its values.
    """
    if unknown := sorted(body.keys() - {"base", "grid"}):
        raise BadRequestValue(f"/{unknown[0]}"[:100], None, "is unknown; a sweep has base and grid", "extra_forbidden")
    base, grid = (_object(body, name) for name in ("base", "grid"))
    axes = {field: _axis(field, values) for field, values in _checked(grid).items()}
    size = math.prod(len(axis) for axis in axes.values())
    if size > MEMBER_LIMIT:
        lengths = " × ".join(str(len(axis)) for axis in axes.values())
        raise BadRequestValue("/grid", size, f"{lengths} members are more than {MEMBER_LIMIT}")
    cells = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    members = [Member(varied, _member(base, varied)) for varied in cells]
    _check_budget([member.spec for member in members])
    return members


def _object(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise BadRequestValue(f"/{name}", _shown(value), "must be an object")
    return value


def _checked(grid: dict[str, Any]) -> dict[str, Any]:
    if not grid:
        raise BadRequestValue("/grid", None, "is empty; name at least one field and its values")
    for field in grid:
        if field not in FIELDS:
            raise BadRequestValue(_pointer(field), None, f"is no field that can vary; those are {', '.join(FIELDS)}")
    return grid


def _axis(field: str, given: object) -> Values:
    """The values of one axis."""
    match given:
        case list():
            values: Values = tuple(given)
        case {"log": [lo, hi, n], **rest} if not rest:
            values = _log(field, lo, hi, n)
        case {"range": [lo, hi], **rest} if not rest:
            values = _range(field, lo, hi)
        case _:
            forms = 'must be a list of values, {"log": [lo, hi, n]} or {"range": [lo, hi]}'
            raise BadRequestValue(_pointer(field), _shown(given), forms)
    if not values:
        raise BadRequestValue(_pointer(field), _shown(given), "has no values")
    if len(values) > MEMBER_LIMIT:
        raise BadRequestValue(_pointer(field), len(values), f"has more than {MEMBER_LIMIT} values")
    for place, value in enumerate(values):
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values[:place]):
            raise BadRequestValue(f"{_pointer(field)}/{place}", _shown(value), "is there twice")
    return values


def _log(field: str, lo: object, hi: object, n: object) -> Values:
    if not (is_number(lo) and is_number(hi) and isinstance(n, int) and is_number(n)):
        raise BadRequestValue(_pointer(field), _shown([lo, hi, n]), "log takes two numbers and an integer")
    low, high = _as_float(field, lo), _as_float(field, hi)
    if not 0 < low < high:
        raise BadRequestValue(_pointer(field), _shown([lo, hi, n]), "log needs 0 < lo < hi")
    if not 2 <= n <= MEMBER_LIMIT:
        raise BadRequestValue(_pointer(field), n, f"log takes 2 to {MEMBER_LIMIT} values")
    return tuple(np.geomspace(low, high, n).tolist())


def _range(field: str, lo: object, hi: object) -> Values:
    if not (isinstance(lo, int) and isinstance(hi, int) and is_number(lo) and is_number(hi)):
        raise BadRequestValue(_pointer(field), _shown([lo, hi]), "range takes two integers")
    if not 0 < hi - lo <= MEMBER_LIMIT:
        raise BadRequestValue(_pointer(field), _shown([lo, hi]), f"range takes 1 to {MEMBER_LIMIT} integers, lo < hi")
    return tuple(range(lo, hi))


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(field: str, value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRequestValue(_pointer(field), _shown(value), "must be finite")
    return number


def _member(base: dict[str, Any], varied: dict[str, Any]) -> ExperimentSpec:
    body = dict(base)
    for field, value in varied.items():
        section, _, name = field.rpartition(".")
        if not section:
            body[name] = value
        elif isinstance(within := body.get(section, {}), dict):
            body[section] = {**within, name: value}
    try:
        return resolve(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        raise _refusal(place, first["input"], first["msg"], first["type"], varied) from error
    except BadRequestValue as error:
        found = error.extra["errors"][0]
        place = found["pointer"].split("/")[1:]
        raise _refusal(place, found["value"], found["detail"], found["type"], varied) from error
    except BudgetExceeded as error:
        what = f"{error.extra['what']} of the member {label(varied)}"
        advice = "each member is held to the limits of one experiment"
        raise BudgetExceeded(what, error.extra["figure"], error.extra["limit"], advice) from error


def _refusal(place: list[str], value: object, message: str, kind: str, varied: dict[str, Any]) -> BadRequestValue:
    """A member's refusal, at the axis that it comes from, else in the base."""
    field = next((name for name in varied if name.split(".") == place[: name.count(".") + 1]), None)
    pointer = "/base/" + "/".join(place) if field is None else _pointer(field)
    return BadRequestValue(pointer[:200], _shown(value), f"{message}, in the member {label(varied)}", kind)


def _check_budget(specs: Sequence[ExperimentSpec]) -> None:
    """The joint limits on time, storage and weight files of all members."""
    advice = "take fewer members or smaller ones"
    for what, figure, limit in (
        ("work of all members", sum(spec.work for spec in specs), WORK_LIMIT),
        ("parameters of all members", sum(spec.parameters for spec in specs), PARAMETER_LIMIT),
        ("recorded values of all members", sum(spec.recorded_values for spec in specs), RECORDED_LIMIT),
    ):
        if figure > limit * SWEEP_FACTOR:
            raise BudgetExceeded(what, figure, limit * SWEEP_FACTOR, advice)


def value_of(spec: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field."""
    return functools.reduce(lambda part, name: part[name], field.split("."), spec)


def named(member: Member) -> ExperimentSpec:
    """The member's specification under a name of its own: the base's, and what varies."""
    name = f"{member.spec.name or 'sweep'}: {label(member.varied)}"
    return member.spec.model_copy(update={"name": unicodedata.normalize("NFC", name)[:LONGEST_LABEL]})


def label(varied: dict[str, Any]) -> str:
    """The varied fields of a member in words: `lr=0.1, seed=3`."""
    return ", ".join(f"{field.rpartition('.')[2]}={word(value)}" for field, value in varied.items())


def word(value: object) -> str:
    """A value of a varied field in words."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shown(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _pointer(field: str) -> str:
    return "/grid/" + field.replace("~", "~0").replace("/", "~1")[:100]


# Batches


def shared(spec: ExperimentSpec) -> dict[str, object]:
    """What members must have in common to be trained as one batch: shapes and schedule, by name."""
    training, network = spec.training, spec.network
    return {
        "widths": spec.widths,
        "activation": network.activation,
        "bias": network.bias,
        "optimizer": training.optimizer,
        "batch_size": training.batch_size,
        "epochs": training.epochs,
        "record.every": spec.record.every,
        "n_training": spec.n_training,
        "n_validation": spec.n_validation,
    }


def batches(specs: Sequence[ExperimentSpec], at_once: int) -> list[list[int]]:
    """The places of the members of each batch: alike, within memory and one job's work, shared out over `at_once`.

    A batch that could be split so that as many run at once as may is split, down to LEAST_MEMBERS.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, spec in enumerate(specs):
        groups[repr((shared(spec), spec.device))].append(place)
    return [part for group in groups.values() for part in _split(group, specs[group[0]], at_once)]


def _split(group: list[int], spec: ExperimentSpec, at_once: int) -> list[list[int]]:
    """Parts of nearly equal size."""
    room = min(BATCH_BYTES // member_bytes(spec), WORK_LIMIT // spec.work, BATCH_MEMBERS)
    parts = max(-(-len(group) // max(1, room)), min(at_once, len(group) // LEAST_MEMBERS), 1)
    return [part.tolist() for part in np.array_split(np.array(group), parts)]


def member_bytes(spec: ExperimentSpec) -> int:
    """About what one member of a batch holds: parameters with gradient, state and start, data twice, activations."""
    data = 2 * spec.data.n_samples * (spec.data.n_features + spec.data.n_targets)
    batch = 3 * min(spec.training.batch_size, spec.n_training) * sum(spec.widths[1:])
    return 4 * (6 * spec.parameters + data + batch)
