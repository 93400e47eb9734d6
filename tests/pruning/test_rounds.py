"""Rounds: densities of the published schedules, by hand, and the laws they obey."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.pruning.rounds import round_densities


def test_exponential_rounds_multiply_by_the_same_factor() -> None:
    assert round_densities("exponential", 1.0, 0.01, 2) == pytest.approx([0.1, 0.01])
    way = round_densities("exponential", 0.8, 0.05, 100)
    factors = [b / a for a, b in zip([0.8, *way], way, strict=False)]
    assert factors == pytest.approx([(0.05 / 0.8) ** 0.01] * 100)


def test_linear_rounds_take_equal_steps() -> None:
    assert round_densities("linear", 1.0, 0.2, 4) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_snipit_rounds_are_the_published_sparsities() -> None:
    way = round_densities("snipit", 1.0, 0.02, 7)
    assert [1 - density for density in way] == pytest.approx([0.5, 0.74, 0.86, 0.92, 0.95, 0.965, 0.98])


def test_snipit_never_exceeds_a_target_below_one_half() -> None:
    way = round_densities("snipit", 1.0, 0.6, 3)
    assert [1 - density for density in way] == pytest.approx([0.2, 0.3, 0.4])


def test_zero_density_and_one_round() -> None:
    assert round_densities("exponential", 1.0, 0.0, 3)[-1] == 0.0
    for schedule in ("exponential", "linear", "snipit"):
        assert round_densities(schedule, 1.0, 0.3, 1) == [0.3]


@given(
    st.sampled_from(["exponential", "linear", "snipit"]),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.integers(1, 50),
)
def test_densities_fall_from_the_start_to_the_target(schedule: str, a: float, b: float, rounds: int) -> None:
    start, target = max(a, b), min(a, b)
    way = round_densities(schedule, start, target, rounds)
    assert len(way) == rounds
    assert way[-1] == target
    assert all(first >= second for first, second in zip([start, *way], way, strict=False))
    assert all(math.isfinite(density) for density in way)


def test_unknown_schedules_and_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        round_densities("cosine", 1.0, 0.1, 3)
    with pytest.raises(ValueError, match="0 rounds"):
        round_densities("linear", 1.0, 0.1, 0)
