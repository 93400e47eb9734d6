"""Whether all live scores are equal: against plain Python, and how often a GPU would be waited for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from utils.masks import Masks
from utils.pruning.harness import _all_equal

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
# 0.1 is another number in each precision.
VALUES = [[0.0, -0.0], [math.inf], [-math.inf], [0.1], [0.0, 1.0], [math.inf, -math.inf], [1.0, math.nan]]
LIVES = st.sampled_from([[True], [False], [True, False], [False, False, False, True]])


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and masks of one to four layers; what is pruned has scores of its own."""
    live_values, dead_values = (st.sampled_from(draw(st.sampled_from(VALUES))) for _ in range(2))
    scores, masks = {}, {}
    for index in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, 6))
        alive = st.sampled_from(draw(LIVES))
        live = [draw(alive) for _ in range(size)]
        values = [draw(live_values if one else dead_values) for one in live]
        scores[f"{index}"] = torch.tensor(values, dtype=draw(DTYPES)).reshape(1, size)
        masks[f"{index}"] = torch.tensor(live, dtype=torch.bool).reshape(1, size)
    return scores, masks


@given(cases())
@settings(max_examples=600, deadline=None)
def test_agrees_with_a_look_at_every_live_score(case: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    scores, masks = case
    live: list[float] = []
    for name, mask in masks.items():
        pairs = zip(scores[name].flatten().tolist(), mask.flatten().tolist(), strict=True)
        live += [score for score, alive in pairs if alive]
    expected = len(live) > 1 and all(one == other for one, other in itertools.pairwise(live))
    assert _all_equal(scores, Masks(masks)) == expected


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values that are read, sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor", "equal.default")
        self.count += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("values", "waits"), [([1.0, 2.0], 1), ([1.0, 1.0], 2)])
def test_a_gpu_is_waited_for_once_and_a_second_time_when_the_first_layer_ties(values: list[float], waits: int) -> None:
    masks = Masks({f"{i}": torch.tensor([True, True, False]) for i in range(9)})
    scores = {name: torch.tensor([*values, 3.0]) for name in masks}
    with Waits() as counted:
        equal = _all_equal(scores, masks)
    assert counted.count == waits
    assert equal == (values[0] == values[1])
    with Waits() as counted:
        bool(scores["0"][masks["0"]].isfinite().all())  # the count sees both kinds
    assert counted.count == 2
