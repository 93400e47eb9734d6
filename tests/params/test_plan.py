"""The level plan: densities by hand, sources and lengths."""

from __future__ import annotations

from typing import Any

import pytest

from utils.params.load import build
from utils.params.plan import level_plan, target_densities


def densities(**values: Any) -> list[float]:
    return target_densities(build({key.replace("__", "."): value for key, value in values.items()}))


def test_geometric_levels_follow_the_formula_until_count_or_target() -> None:
    assert densities(levels__count=1) == [1.0]
    assert densities(levels__count=4, levels__rate=0.5) == [1.0, 0.5, 0.25, 0.125]
    assert densities(levels__target=0.3, levels__rate=0.5) == [1.0, 0.5, 0.25]
    assert densities(levels__target=0.25, levels__rate=0.5) == [1.0, 0.5, 0.25]
    assert len(densities(levels__target=0.64)) == 3  # 0.8 * 0.8 is a hair above 0.64 in floating point
    assert densities(levels__target=0.01, levels__count=3, levels__rate=0.5) == [1.0, 0.5, 0.25]
    assert densities(levels__target=1.0) == [1.0]
    published = densities(levels__count=25)
    assert len(published) == 25
    assert published[-1] == pytest.approx(1 - 0.99528, abs=1e-5)


def test_linear_levels_end_at_the_target() -> None:
    assert densities(levels__spacing="linear", levels__target=0.1, levels__count=4) == pytest.approx([1, 0.7, 0.4, 0.1])


def test_listed_levels_have_a_dense_level_0_unless_pruned_at_initialisation() -> None:
    assert densities(levels__densities=[0.5, 0.2]) == [1.0, 0.5, 0.2]
    assert densities(levels__densities=[1, 0.5]) == [1.0, 0.5]
    assert densities(pruning__moment="oneshot", levels__densities=[0.2, 0.5]) == [1.0, 0.2, 0.5]
    assert densities(pruning__moment="oneshot", pruning__density=0.3) == [1.0, 0.3]
    assert densities(pruning__moment="init", levels__densities=[0.2, 0.5]) == [0.2, 0.5]
    assert densities(pruning__moment="init", pruning__density=0.3) == [0.3]


def test_sources_rewinds_and_lengths() -> None:
    def rows(values: dict[str, Any]) -> list[tuple[int | None, str | None, int]]:
        return [(level.source, level.rewind, level.epochs) for level in level_plan(build(values))]

    assert rows({"levels.count": 3, "levels.epochs": [5, 3, 2], "levels.rewind": "imp"}) == [
        (None, None, 5),
        (0, "imp", 3),
        (1, "imp", 2),
    ]
    oneshot = {"pruning.moment": "oneshot", "levels.densities": [0.5, 0.2], "levels.epochs": 4}
    assert rows(oneshot) == [(None, None, 4), (0, "lrr", 4), (0, "lrr", 4)]
    init = {"pruning.moment": "init", "levels.densities": [0.5, 0.2], "training.epochs": 7}
    assert rows(init) == [(None, None, 7), (None, None, 7)]
