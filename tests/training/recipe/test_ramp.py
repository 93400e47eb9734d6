"""Ramps: values by hand, ends exact, and the steps they may not have."""

from __future__ import annotations

import math

import pytest

from utils.params.step import Step
from utils.system.errors import UserError
from utils.training.recipe.ramp import Ramp, span


@pytest.mark.parametrize(
    ("shape", "ratio", "values"),
    [
        ("linear", 20.0, [1.0, 1.0, 3.25, 5.5, 7.75, 10.0, 10.0]),
        ("cosine", 20.0, [1.0, 1.0, 1 + 9 * (1 - math.sqrt(0.5)) / 2, 5.5, 1 + 9 * (1 + math.sqrt(0.5)) / 2, 10, 10]),
        ("exponential", 10.0, [1.0, 1.0, 10**0.25, 10**0.5, 10**0.75, 10.0, 10.0]),
    ],
)
def test_values_by_hand(shape: str, ratio: float, values: list[float]) -> None:
    ramp = Ramp(1.0, 10.0, hold=2, end=6, shape=shape, ratio=ratio)
    assert [ramp.at(step) for step in (0, 2, 3, 4, 5, 6, 100)] == pytest.approx(values, rel=1e-12)
    assert ramp.at(2) == 1.0
    assert ramp.at(6) == 10.0


def test_a_small_ratio_is_fast_at_first_and_ends_at_the_end() -> None:
    ramp = Ramp(1.0, 0.0, hold=0, end=100, shape="exponential", ratio=0.01)
    values = [ramp.at(step) for step in range(101)]
    assert values[50] == pytest.approx(1 - 0.9 / 0.99)
    assert values == sorted(values, reverse=True)
    assert values[100] == 0.0


def test_spans_in_steps() -> None:
    assert span("recipe.soft", Step(), None, 101, 10) == (0, 50)
    assert span("recipe.soft", Step(1), Step(3, 5), 100, 10) == (10, 35)
    assert span("recipe.soft", Step(), None, 0, 10) == (0, 0)  # a level that trains nothing has no ramp


@pytest.mark.parametrize(
    ("hold", "end", "text"),
    [
        (Step(), Step(11), "recipe.ghost.end=11ep: training has only 100 steps"),
        (Step(6), None, "recipe.ghost.hold=6ep: does not come before half of the 100 steps"),
        (Step(0, 30), Step(3), "recipe.ghost.hold=30it: does not come before recipe.ghost.end=3ep"),
    ],
)
def test_impossible_steps_are_named(hold: Step, end: Step | None, text: str) -> None:
    with pytest.raises(UserError) as caught:
        span("recipe.ghost", hold, end, 100, 10)
    assert str(caught.value).startswith(text)
