"""The level plan: densities from formulas, sources and lengths of levels."""

from __future__ import annotations

import pytest

from utils.params.load import build
from utils.params.plan import level_plan, target_densities
from utils.system.errors import ParamError


def densities(**keys: object) -> list[float]:
    return target_densities(build({key.replace("__", "."): value for key, value in keys.items()}))


def test_geometric_by_count_is_the_formula() -> None:
    assert densities(levels__count=25) == [(1.0 - 0.2) ** k for k in range(25)]
    assert densities(levels__count=25)[24] == pytest.approx(1 - 0.99528, abs=1e-5)  # the published 25 levels


@pytest.mark.parametrize(("target", "count"), [(0.5, 5), (0.8, 2), (0.81, 2), (0.001, 32), (1.0, 1)])
def test_geometric_ends_with_the_first_at_or_below_target(target: float, count: int) -> None:
    found = densities(levels__target=target)
    assert len(found) == count
    assert found[-1] <= target * (1 + 1e-9)
    assert all(density > target for density in found[:-1])


def test_count_and_target_end_at_whichever_comes_first() -> None:
    assert len(densities(levels__target=0.1, levels__count=3)) == 3
    assert len(densities(levels__target=0.5, levels__count=9)) == 5


def test_linear() -> None:
    assert densities(levels__spacing="linear", levels__target=0.2, levels__count=5) == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2]
    )


def test_explicit_lists_begin_dense_unless_pruned_at_initialisation() -> None:
    assert densities(levels__densities=[0.5, 0.2]) == [1.0, 0.5, 0.2]
    assert densities(levels__densities=[1.0, 0.5]) == [1.0, 0.5]
    assert densities(levels__densities=[0.2, 0.5], pruning__moment="init") == [0.2, 0.5]
    assert densities(pruning__density=0.3, pruning__moment="init") == [0.3]
    assert densities(pruning__density=0.3, pruning__moment="oneshot") == [1.0, 0.3]


def test_sources_rewinds_and_lengths() -> None:
    plan = level_plan(build({"levels.densities": [0.5, 0.2], "levels.epochs": [4, 2, 1], "levels.rewind": "imp"}))
    assert [(p.number, p.source, p.epochs, p.rewind) for p in plan] == [
        (0, None, 4, None),
        (1, 0, 2, "imp"),
        (2, 1, 1, "imp"),
    ]
    plan = level_plan(build({"levels.densities": [0.5, 0.2], "pruning.moment": "oneshot"}))
    assert [(p.source, p.epochs) for p in plan] == [(None, 10), (0, 10), (0, 10)]
    plan = level_plan(build({"levels.densities": [0.5, 0.2], "pruning.moment": "init"}))
    assert [(p.source, p.rewind) for p in plan] == [(None, None), (None, None)]


def test_a_rate_that_never_arrives_is_refused() -> None:
    with pytest.raises(ParamError, match=r"levels\.rate=1e-06: 1000 levels do not reach"):
        densities(levels__rate=1e-6, levels__target=0.1)
