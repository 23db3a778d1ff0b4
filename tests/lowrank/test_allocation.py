"""One budget for many layers, against every plan there is and against the envelope built another way."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import BadRequestValue
from service.lowrank import allocation
from service.lowrank.allocation import Allocation, Layer, Plan, Weighting, allocator, global_budget, total_energy

WEIGHTINGS: list[Weighting] = ["absolute", "relative"]
Points = list[tuple[int, float, int | None]]  # cost, energy lost, rank


def points(layer: Layer, weighting: Weighting) -> Points:
    """Every option of a layer, straight from the definition."""
    m, n = layer.shape
    energies = layer.s**2
    total = float(energies.sum())
    if total == 0:
        return [(0, 0.0, 0)]
    weight = 1.0 if weighting == "absolute" else 1 / total
    cut = [(r * (m + n), weight * float(energies[r:].sum()), r) for r in range(1, len(energies)) if r * (m + n) < m * n]
    return [*cut, (m * n, 0.0, None)]


def budget_of(layers: list[Layer], fraction: float) -> float:
    return fraction * sum(math.prod(layer.shape) for layer in layers) * (1 + 1e-12)


def brute_force(layers: list[Layer], fraction: float, weighting: Weighting) -> float:
    plans = itertools.product(*(points(layer, weighting) for layer in layers))
    budget = budget_of(layers, fraction)
    return min(sum(lost for _, lost, _ in plan) for plan in plans if sum(cost for cost, _, _ in plan) <= budget)


def dual(layers: list[Layer], fraction: float, weighting: Weighting) -> float:
    """The bound by duality: max over prices λ of Σ_l min(lost + λ·cost) − λ·budget, tried at every kink."""
    menus = [points(layer, weighting) for layer in layers]
    pairs = [pair for menu in menus for pair in itertools.combinations(menu, 2)]
    prices = {0.0, *((a[1] - b[1]) / (b[0] - a[0]) for a, b in pairs)}
    budget = math.floor(budget_of(layers, fraction))
    return max(
        sum(min(lost + price * cost for cost, lost, _ in menu) for menu in menus) - price * budget for price in prices
    )


def largest_step(layers: list[Layer], weighting: Weighting) -> float:
    """The largest gain between neighbours on an upper hull, found by testing each point against every chord."""
    gains = [0.0]
    for layer in layers:
        all_points = points(layer, weighting)
        hull = [p for p in all_points if not any(below(p, a, b) for a in all_points for b in all_points)]
        gains += [a[1] - b[1] for a, b in itertools.pairwise(hull)]
    return max(gains)


def below(p: tuple[int, float, int | None], a: tuple[int, float, int | None], b: tuple[int, float, int | None]) -> bool:
    if not a[0] < p[0] < b[0]:
        return False
    chord = a[1] + (b[1] - a[1]) * (p[0] - a[0]) / (b[0] - a[0])
    return p[1] > chord + 1e-12 * (1 + abs(a[1]))


def check_plan(plan: Plan, layers: list[Layer], fraction: float, weighting: Weighting) -> None:
    """The plan fits, and its cost and objective are those of its ranks."""
    taken = []
    for layer in layers:
        (option,) = [option for option in points(layer, weighting) if option[2] == plan.ranks[layer.name]]
        taken.append(option)
    assert plan.cost == sum(cost for cost, _, _ in taken) <= budget_of(layers, fraction)
    assert plan.objective == pytest.approx(sum(lost for _, lost, _ in taken), rel=1e-9, abs=1e-12)


def geometric(name: str, shape: tuple[int, int], q: float, top: float = 1.0) -> Layer:
    return Layer(name, shape, top * q ** np.arange(min(shape)))


@st.composite
def models(draw: st.DrawFn) -> list[Layer]:
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    shapes = draw(st.lists(sizes, min_size=1, max_size=4))
    layers = []
    for i, shape in enumerate(shapes):
        values = draw(st.lists(st.floats(0, 10), min_size=min(shape), max_size=min(shape)))
        s = np.sort(np.where(np.array(values) < 1e-3, 0.0, values))[::-1].copy()
        layers.append(Layer(f"W{i}", shape, s))
    return layers


@settings(deadline=None, max_examples=300)
@given(models(), st.floats(0.05, 1.0), st.sampled_from(WEIGHTINGS))
def test_between_its_bound_and_uniform_and_near_the_best(
    layers: list[Layer], fraction: float, weighting: Weighting
) -> None:
    least = sum(points(layer, weighting)[0][0] for layer in layers)
    if least > budget_of(layers, fraction):
        with pytest.raises(BadRequestValue):
            global_budget(layers, fraction, weighting)
        return
    answer = global_budget(layers, fraction, weighting)
    for plan in (answer.plan, answer.uniform):
        check_plan(plan, layers, fraction, weighting)
    best = brute_force(layers, fraction, weighting)
    rounding = 1e-12 * sum(float(layer.s @ layer.s) + 1 for layer in layers)
    assert 0 <= answer.bound <= best + rounding
    assert answer.bound == pytest.approx(dual(layers, fraction, weighting), rel=1e-9, abs=rounding)
    assert best - rounding <= answer.plan.objective <= answer.uniform.objective
    assert answer.plan.objective - answer.bound <= largest_step(layers, weighting) + rounding


def random_options(generator: np.random.Generator) -> list[allocation._Options]:
    shapes = [tuple(int(side) for side in generator.integers(2, 12, 2)) for _ in range(6)]
    layers = [Layer(f"W{i}", shape, np.sort(generator.random(min(shape)))[::-1]) for i, shape in enumerate(shapes)]
    return allocation._weighted_options(layers, "absolute")[1]


@pytest.mark.parametrize("seed", range(30))
def test_single_changes_are_made_largest_gain_first_until_none_fits(seed: int) -> None:
    generator = np.random.default_rng(seed)
    options = random_options(generator)
    left = int(generator.integers(0, 200))
    expected = [0] * len(options)
    budget = sum(int(option.costs[0]) for option in options) + left
    while True:
        changes = [
            (float(option.lost[at] - option.lost[to]), int(option.costs[to] - option.costs[at]), i, to)
            for i, (option, at) in enumerate(zip(options, expected, strict=True))
            for to in range(at + 1, len(option.costs))
        ]
        fitting = [change for change in changes if change[1] <= left]
        if not fitting:
            break
        _, cost, i, to = max(fitting)
        expected[i], left = to, left - cost
    assert allocation._improve(options, [0] * len(options), budget) == expected


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_total_energy_is_what_keeping_nothing_loses(weighting: Weighting) -> None:
    zero, small = Layer("0", (2, 2), np.zeros(2)), Layer("b", (2, 3), np.array([2.0, 1.0]))
    layers = [geometric("a", (5, 4), 0.5, top=3.0), small, zero]
    norms = [float(np.sum(layer.s**2)) for layer in layers]
    expected = 2.0 if weighting == "relative" else sum(norms)
    assert total_energy(layers, weighting) == pytest.approx(expected, rel=1e-14)


def test_what_the_filling_leaves_is_spent() -> None:
    layers = [geometric("a", (30, 30), 0.9), geometric("b", (12, 12), 0.5)]
    for fraction in np.linspace(0.1, 0.95, 30):
        answer = global_budget(layers, fraction, "relative")
        left = budget_of(layers, fraction) - answer.plan.cost
        costs = {layer.name: {rank: cost for cost, _, rank in points(layer, "relative")} for layer in layers}
        for layer in layers:
            now = costs[layer.name][answer.plan.ranks[layer.name]]
            assert not any(now < cost <= now + left for cost in costs[layer.name].values())


def test_uniform_is_answered_where_it_is_better() -> None:
    layers = [Layer("a", (5, 5), np.array([8.0, 4, 4, 3, 3])), Layer("b", (3, 3), np.array([4.0, 3, 2]))]
    answer = global_budget(layers, 0.8, "absolute")
    assert answer.plan == answer.uniform
    assert answer.plan.ranks == {"a": 2, "b": 1}  # Steps alone end at {"a": 1, "b": None}, which loses 50.
    assert answer.plan.objective == pytest.approx(47)


def test_uniform_makes_room_for_layers_that_cannot_shrink() -> None:
    layers = [Layer("row", (1, 9), np.ones(1)), geometric("square", (9, 9), 0.9)]
    assert global_budget(layers, 0.5, "absolute").uniform.ranks == {"row": None, "square": 2}
    assert global_budget(layers, 0.45, "absolute").uniform.ranks == {"row": None, "square": 1}  # 9 + 36 > 40.5.


@pytest.mark.parametrize("side", range(4, 40))
def test_the_fraction_of_exactly_r_ranks_gives_r(side: int) -> None:
    m, n = side, side + 3
    layer = geometric("a", (m, n), 0.9)
    for rank in range(1, (m * n - 1) // (m + n) + 1):
        answer = global_budget([layer], rank * (m + n) / (m * n), "absolute")
        assert answer.plan.ranks == answer.uniform.ranks == {"a": rank}


def model() -> list[Layer]:
    return [
        geometric("steep", (64, 64), 0.6),
        geometric("flat", (64, 64), 0.99),
        geometric("wide", (16, 200), 0.8, top=5.0),
        geometric("tall", (300, 40), 0.9, top=0.1),
    ]


def solve(fraction: float, weighting: Weighting = "relative") -> Allocation:
    return global_budget(model(), fraction, weighting)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_mixed_model_beats_uniform_and_comes_close_to_the_bound(fraction: float, weighting: Weighting) -> None:
    answer = solve(fraction, weighting)
    check_plan(answer.plan, model(), fraction, weighting)
    assert answer.bound <= answer.plan.objective < answer.uniform.objective
    assert answer.plan.objective - answer.bound <= largest_step(model(), weighting) * (1 + 1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_many_fractions_get_what_each_gets_alone(weighting: Weighting) -> None:
    layers = [*model(), Layer("row", (1, 30), np.ones(1)), Layer("zero", (64, 64), np.zeros(64))]
    allocate = allocator(layers, weighting)
    for fraction in (0.9, 0.05, 1.0, 0.3):
        assert allocate(fraction) == global_budget(layers, fraction, weighting)
        with pytest.raises(BadRequestValue, match="too little"):
            allocate(0.001)


def test_the_bound_falls_as_the_budget_grows() -> None:
    bounds = [solve(fraction).bound for fraction in np.linspace(0.05, 1, 40)]
    assert all(after <= before for before, after in itertools.pairwise(bounds))
    assert bounds[0] > 0
    assert bounds[-1] == 0


def test_the_whole_budget_loses_nothing() -> None:
    answer = solve(1.0)
    assert answer.plan.objective == answer.bound == 0
    assert answer.uniform.ranks == dict.fromkeys(answer.uniform.ranks)  # All dense.


def test_nothing_is_bought_that_gains_nothing() -> None:
    layer = Layer("W1", (20, 20), np.array([3.0, 2.0, *[0.0] * 18]))
    answer = global_budget([layer], 1.0, "absolute")
    assert answer.plan == Plan({"W1": 2}, 80, 0.0)
    assert answer.bound == 0
    assert global_budget([layer], 0.2, "absolute").plan == Plan({"W1": 2}, 80, 0.0)


def test_the_jump_to_dense_is_seen() -> None:
    layers = [Layer("a", (10, 10), np.ones(10)), Layer("b", (10, 10), np.ones(10))]
    answer = global_budget(layers, 0.6, "absolute")
    # 120 of 200: one dense at 100 and the other at rank 1 lose 9; three ranks each lose 14.
    assert sorted(answer.plan.ranks.values(), key=str) == [1, None]
    assert answer.plan.objective == pytest.approx(9)
    assert answer.uniform.ranks == {"a": 3, "b": 3}
    assert answer.uniform.objective == pytest.approx(14)


def test_the_weighting_decides_who_counts() -> None:
    layers = [geometric("loud", (40, 40), 0.9, top=100.0), geometric("quiet", (40, 40), 0.9)]
    equal = [geometric("loud", (40, 40), 0.9), geometric("quiet", (40, 40), 0.9)]
    absolute, relative = (global_budget(layers, 0.5, weighting).plan for weighting in WEIGHTINGS)
    assert absolute.ranks["quiet"] == 1
    assert relative.ranks == global_budget(equal, 0.5, "relative").plan.ranks != absolute.ranks


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_absolute_objectives_follow_the_square_of_scale(scale: float) -> None:
    large = [Layer(layer.name, layer.shape, layer.s * scale) for layer in model()]
    plain, scaled = solve(0.3, "absolute"), global_budget(large, 0.3, "absolute")
    assert scaled.plan.ranks == plain.plan.ranks
    assert scaled.plan.objective == pytest.approx(plain.plan.objective * scale * scale, rel=1e-9)
    assert scaled.bound == pytest.approx(plain.bound * scale * scale, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_no_scale_changes_the_plan(scale: float) -> None:
    large = [Layer(layer.name, layer.shape, layer.s * scale) for layer in model()]
    for weighting in WEIGHTINGS:
        assert global_budget(large, 0.3, weighting).plan.ranks == solve(0.3, weighting).plan.ranks


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_zero_layer_costs_nothing(weighting: Weighting) -> None:
    zero = Layer("zero", (64, 64), np.zeros(64))
    answer = global_budget([*model(), zero], 0.3, weighting)
    assert answer.plan.ranks["zero"] == answer.uniform.ranks["zero"] == 0
    check_plan(answer.plan, [*model(), zero], 0.3, weighting)
    assert global_budget([zero], 0.5, weighting) == Allocation(
        Plan({"zero": 0}, 0, 0.0), 0.0, Plan({"zero": 0}, 0, 0.0)
    )


def test_the_fraction_that_a_refusal_names_is_taken() -> None:
    with pytest.raises(BadRequestValue) as caught:
        solve(0.001)
    named = float(caught.value.detail.split("at least ")[1].split()[0])
    assert set(solve(named).plan.ranks.values()) == {1}
    with pytest.raises(BadRequestValue):
        solve(named - 2e-6)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, math.nan])
def test_fractions_out_of_bounds_are_refused(fraction: float) -> None:
    with pytest.raises(BadRequestValue, match=r"^fraction: "):
        solve(fraction)
