"""The score of a rank against a full sort, on every way to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.pruning import kth as module
from utils.pruning.kth import Part, kth

FEW = st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 1e-45, 0.5, 1.0, math.inf])
FINE = st.floats(allow_nan=False, width=32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Samples and pieces so small that a hundred scores take the way of millions."""
    monkeypatch.setattr(module, "SAMPLE", 8)
    monkeypatch.setattr(module, "_PIECE", 7)
    return monkeypatch


def counted(parts: list[Part]) -> np.ndarray:
    return np.concatenate([scores if live is None else scores[live] for scores, live in parts])


def drawn(draw: st.DrawFn, least: int, most: int) -> list[Part]:
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    source = draw(st.sampled_from([FEW, FINE]))
    parts: list[Part] = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(least, most))
        scores = np.array(draw(st.lists(source, min_size=size, max_size=size)), dtype=dtype)
        live = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=size, max_size=size)))
        parts.append((scores, None if live is None else np.array(live, dtype=bool)))
    return parts


@given(st.data(), st.sampled_from([6.0, 0.5, 0.0]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_rank_is_that_of_a_sort(small: pytest.MonkeyPatch, data: st.DataObject, deviations: float) -> None:
    """Brackets that hold the rank, that may miss it, and that are a single value."""
    small.setattr(module, "_DEVIATIONS", deviations)
    parts = data.draw(st.composite(drawn)(1, 40))
    ordered = np.sort(counted(parts))
    kept = [(scores.copy(), live) for scores, live in parts]
    for rank in range(len(ordered)):
        assert kth(parts, len(ordered), rank) == ordered[rank]
    assert all(np.array_equal(scores, before) for (scores, _), (before, _) in zip(parts, kept, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_a_million_scores_with_dead_ones_and_ties(monkeypatch: pytest.MonkeyPatch, dtype: type, shared: float) -> None:
    """And never by a partition of all, which would be as right and several times as slow."""
    sizes, whole = [], module._partitioned
    monkeypatch.setattr(module, "_partitioned", lambda some, rank: (sizes.append(len(some)), whole(some, rank))[1])
    rng = np.random.default_rng(4)
    parts: list[Part] = []
    for size in (700_001, 9, 300_000):
        scores = rng.standard_normal(size).astype(dtype)
        scores[rng.random(size) < shared] = 0.25
        parts.append((scores, None if size == 9 else rng.random(size) < 0.6))
    ordered = np.sort(counted(parts))
    for rank in (0, 1, len(ordered) // 10, len(ordered) // 2, len(ordered) - 2, len(ordered) - 1):
        assert kth(parts, len(ordered), rank) == ordered[rank]
    if shared < 1.0:  # of equal scores the lowest and the highest take all with them
        assert max(sizes) < len(ordered) / 2


@pytest.mark.parametrize("bracket", [(0.9, 0.95), (0.0, 0.1), (0.2, 0.2), (0.95, 0.95)])
def test_a_bracket_beside_the_rank_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, bracket: tuple[float, float]
) -> None:
    scores = np.random.default_rng(0).random(200_000)
    monkeypatch.setattr(module, "_bracket", lambda *_: tuple(map(np.float64, bracket)))
    assert kth([(scores, None)], len(scores), 100_000) == np.sort(scores)[100_000]


@pytest.mark.parametrize("size", [50, 300_000])
@pytest.mark.parametrize("value", [0.0, None])
def test_nan_has_no_rank(size: int, value: float | None) -> None:
    """One of many, where the others are all equal and where they are not; a dead one is no matter."""
    scores = np.random.default_rng(0).random(size) if value is None else np.full(size, value)
    live = np.ones(size, dtype=bool)
    scores[size // 3] = np.nan
    with pytest.raises(ValueError, match="NaN among the scores"):
        kth([(scores, live)], size, size // 2)
    live[size // 3] = False
    assert kth([(scores, live)], size - 1, size // 2) == np.sort(scores[live])[size // 2]


@pytest.mark.parametrize(("count", "rank"), [(3, -1), (3, 3), (0, 0)])
def test_a_rank_that_is_none(count: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"no rank {rank} among {count} scores"):
        kth([(np.zeros(count), None)], count, rank)


def test_a_pattern_in_the_places_does_not_mislead_the_sample() -> None:
    """Every 16th score large: a sample of every 16th would see these alone, or none, and copy everything."""
    scores = np.random.default_rng(1).random(1 << 20)
    scores[::16] += 10.0
    rank = len(scores) // 3
    low, high = module._bracket([(scores, None)], len(scores), rank) or (0.0, 0.0)
    below, inside = module._within([(scores, None)], low, high)
    assert below <= rank < below + len(inside)
    assert len(inside) < len(scores) // 20
