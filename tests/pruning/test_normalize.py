"""LAMP scores against exact fractions of the definition, weight by weight."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.pruning.normalize import lamp
from utils.system.errors import UserError


def _place(name: str, index: int) -> int:
    """The documented order of equals in plain integers: a hash of (layer name, flat index)."""
    golden, wrap = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
        return x ^ (x >> 31)

    key = int.from_bytes(hashlib.sha256(f"lamp\x1f{name}".encode()).digest()[:8], "little") >> 1
    return mix((mix((key + index * golden) & wrap) + golden) & wrap) >> 11


def by_definition(name: str, scores: list[float], live: list[bool], squared: bool) -> list[float]:
    """s_u over the sum of s_v over all live v that rank no lower, in exact fractions."""
    power = 2 if squared else 1
    found = []
    for u, score in enumerate(scores):
        if not live[u] or not score:
            found.append(0.0)
            continue
        above = [
            v
            for v in range(len(scores))
            if live[v] and (scores[v] > score or (scores[v] == score and (v == u or _place(name, v) < _place(name, u))))
        ]
        found.append(float(Fraction(score) ** power / sum(Fraction(scores[v]) ** power for v in above)))
    return found


@given(
    st.lists(
        st.tuples(st.one_of(st.sampled_from([0.0, 1.0, 2.0, 2.0]), st.floats(0, 1e3, width=32)), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_scores_follow_the_definition(case: list[tuple[float, bool]], squared: bool) -> None:
    scores, live = [s for s, _ in case], [a for _, a in case]
    found = lamp({"w": torch.tensor(scores)}, {"w": torch.tensor(live)}, squared)["w"]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), by_definition("w", scores, live, squared), rtol=1e-12, atol=1e-290)
    if any(s > 1e-100 for s, a in case if a):
        assert found.max() == 1.0


def test_layers_are_scored_apart_and_shapes_stay() -> None:
    scores = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([30.0, 40.0, 0.0])}
    masks = {name: torch.ones(s.shape, dtype=torch.bool) for name, s in scores.items()}
    found = lamp(scores, masks, squared=True)
    assert found["a"].tolist() == [[9 / 25, 1.0]]
    assert found["b"].tolist() == [9 / 25, 1.0, 0.0]
    assert lamp(scores, masks, squared=False)["a"].tolist() == [[3 / 7, 1.0]]
    assert list(found) == ["a", "b"]


def test_equal_scores_are_ranked_without_a_favoured_place() -> None:
    size = 1000
    found = lamp({"w": torch.full((size,), 0.3)}, {"w": torch.ones(size, dtype=torch.bool)}, squared=True)["w"]
    np.testing.assert_allclose(np.sort(found.numpy())[::-1], 1 / np.arange(1, size + 1), rtol=1e-12)
    best = found.topk(100).indices
    assert 30 < int((best < size // 2).sum()) < 70
    assert found.argmax().item() == min(range(size), key=lambda i: _place("w", i))


def test_one_weight_and_empty_layers() -> None:
    scores = {"one": torch.tensor([[1e-30]]), "zero": torch.zeros(3), "none": torch.ones(4), "void": torch.zeros(0)}
    masks = {name: torch.ones(s.shape, dtype=torch.bool) for name, s in scores.items()}
    masks["none"][:] = False
    found = lamp(scores, masks, squared=True)
    assert found["one"].item() == 1.0
    assert found["zero"].tolist() == [0.0] * 3
    assert found["none"].tolist() == [0.0] * 4
    assert found["void"].shape == (0,)


def test_extreme_scores_neither_overflow_nor_vanish() -> None:
    masks = {"w": torch.ones(3, dtype=torch.bool)}
    for scale in (1e-200, 1.0, 1e300):
        scores = {"w": torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64) * scale}
        np.testing.assert_allclose(sorted(lamp(scores, masks, True)["w"].tolist()), [1 / 9, 1 / 2, 1], rtol=1e-12)
    mixed = lamp({"w": torch.tensor([math.inf, 5.0, math.inf])}, masks, squared=True)["w"].tolist()
    assert sorted(mixed) == [0.0, 0.5, 1.0]
    assert mixed[1] == 0.0


def test_order_within_a_layer_stays() -> None:
    scores = torch.randperm(100_000, generator=torch.Generator().manual_seed(0)).double().sqrt()
    found = lamp({"w": scores}, {"w": torch.ones(len(scores), dtype=torch.bool)}, squared=True)["w"]
    order = scores.argsort()
    assert bool((found[order].diff() >= 0).all())


def test_negative_scores_are_refused_unless_pruned() -> None:
    masks = {"w": torch.tensor([True, False])}
    with pytest.raises(UserError, match=r"pruning\.normalize=lamp: 'w' has negative scores"):
        lamp({"w": torch.tensor([-1.0, 2.0])}, masks, squared=False)
    assert lamp({"w": torch.tensor([1.0, -2.0])}, masks, squared=False)["w"].tolist() == [1.0, 0.0]


def test_inputs_are_left_alone() -> None:
    scores, mask = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64), torch.tensor([True, True, False])
    lamp({"w": scores}, {"w": mask}, squared=True)
    assert scores.tolist() == [2.0, 2.0, 1.0]
    assert mask.tolist() == [True, True, False]
