"""Which rule chooses a layer's rank: the parameters of every request that names one."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.errors import BadRequestValue
from service.lowrank import compression
from service.lowrank.compression import Rule
from service.lowrank.ranks import Array, Shape

RuleName = compression.RuleName | Literal["all"]
PARAMETERS: dict[str, str] = {"rank": "rank", "energy": "threshold", "error": "threshold", "budget": "fraction"}
DEFAULTS: dict[str, Rule] = {
    "energy": Rule("energy", threshold=0.99),
    "error": Rule("error", threshold=0.1),
    "budget": Rule("budget", fraction=0.5),
    "entropy_rank": Rule("entropy_rank"),
    "optimal": Rule("optimal"),
    "spikes": Rule("spikes"),
}


class RuleQuery(BaseModel):
    """A rule and the parameter that it takes."""

    model_config = ConfigDict(extra="forbid")

    rule: RuleName = "energy"
    rank: int | None = Field(None, ge=1, le=65_536, description="for rule=rank")
    threshold: float | None = Field(None, ge=0, le=1, description="for rule=energy (0.99) and error (0.1)")
    fraction: float | None = Field(None, gt=0, le=1, description="for rule=budget (0.5): of the parameters kept")


def rules_of(query: RuleQuery) -> list[Rule]:
    """The rule asked for with its parameter. Raises BadRequestValue for a parameter of another rule."""
    wanted = PARAMETERS.get(query.rule)
    for name in ("rank", "threshold", "fraction"):
        if name != wanted and (value := getattr(query, name)) is not None:
            raise BadRequestValue(name, value, f"does not belong to rule={query.rule}")
    if query.rule == "all":
        return list(DEFAULTS.values())
    if wanted is None or (value := getattr(query, wanted)) is None:
        if query.rule == "rank":
            raise BadRequestValue("rank", None, "must be given for rule=rank")
        return [DEFAULTS[query.rule]]
    return [Rule(query.rule, **{wanted: value})]


def report_or_reason(s: Array, shape: Shape, dtype: str, rule: Rule) -> dict[str, Any]:
    """A rule's report; nobody asked for its default parameter, so one that does not suit the layer is no error."""
    try:
        return compression.report(s, shape, dtype, rule)
    except BadRequestValue as error:
        return {"rule": rule.name, "fraction": rule.fraction, "rank": None, "chosen_by": error.detail}
