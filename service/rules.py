"""Which rule chooses a layer's rank: the parameters of every request that names one.

A new rule: a name and a case in `lowrank/compression.py`; here its parameter if it has one, and its default.
"""

from typing import Any

from service.errors import BadRequestValue
from service.lowrank import compression
from service.lowrank.compression import Rule
from service.lowrank.ranks import Array, Shape
from service.schemas import RuleParameters

PARAMETERS: dict[str, str] = {
    "rank": "rank",
    "energy": "threshold",
    "error": "threshold",
    "budget": "fraction",
    "global_budget": "fraction",
}
BUDGET = 0.5
DEFAULTS: dict[str, Rule] = {
    "energy": Rule("energy", threshold=0.99),
    "error": Rule("error", threshold=0.1),
    "budget": Rule("budget", fraction=BUDGET),
    "entropy_rank": Rule("entropy_rank"),
    "optimal": Rule("optimal"),
    "spikes": Rule("spikes"),
}


def check_parameters(rule: str, given: RuleParameters) -> None:
    """Raise BadRequestValue for a parameter of another rule, and for one that is missing."""
    wanted = PARAMETERS.get(rule)
    for name in ("rank", "threshold", "fraction"):
        if name != wanted and (value := getattr(given, name)) is not None:
            raise BadRequestValue(name, value, f"does not belong to rule={rule}")
    if rule == "rank" and given.rank is None:
        raise BadRequestValue("rank", None, "must be given for rule=rank")


def rule_of(name: compression.RuleName, given: RuleParameters) -> Rule:
    """The rule with its parameter, given or default. Raises BadRequestValue."""
    check_parameters(name, given)
    wanted = PARAMETERS.get(name)
    value = None if wanted is None else getattr(given, wanted)
    return DEFAULTS[name] if wanted is None or value is None else Rule(name, **{wanted: value})


def report_or_reason(s: Array, shape: Shape, dtype: str, rule: Rule) -> dict[str, Any]:
    """A rule's report, or why its parameter does not suit this one of several layers or rules: that is no error."""
    try:
        return compression.report(s, shape, dtype, rule)
    except BadRequestValue as error:
        return {"rule": rule.name, "fraction": rule.fraction, "rank": None, "chosen_by": error.detail}
