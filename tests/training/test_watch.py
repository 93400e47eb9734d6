"""The watch over losses: the first bad step by name, and in float16 patience with those the scaler skips."""

from __future__ import annotations

import pytest
import torch

from utils.system.errors import UserError
from utils.training.watch import HOPELESS, LossWatch


def fed(watch: LossWatch, totals: torch.Tensor, losses: list[float], first: int = 0) -> None:
    for step, value in enumerate(losses, first):
        loss = torch.tensor(value)
        with watch.counted(totals, step, 0.1, loss):
            totals += torch.stack([loss.double(), torch.tensor(1.0, dtype=torch.float64)])


def zeros() -> torch.Tensor:
    return torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_step_is_named(bad: float) -> None:
    watch, totals = LossWatch(1, 3, skips=False), zeros()
    fed(watch, totals, [1.0, 2.0])
    watch.check(totals, "no checkpoint")
    fed(watch, totals, [1.0, bad, float("nan")], first=2)
    with pytest.raises(UserError, match=r"level 1, step 3, rank 3: the loss became .* at learning rate 0\.1; the last"):
        watch.check(totals, "the last checkpoint is of step 2")


def test_a_sum_that_overflows_is_told_as_such() -> None:
    watch, totals = LossWatch(1, 0, skips=False), zeros()
    fed(watch, totals, [1.0])
    totals[0] = float("inf")
    with pytest.raises(UserError, match="the sum of the losses became inf"):
        watch.check(totals, "no checkpoint")


def test_skipped_steps_count_nowhere() -> None:
    watch, totals = LossWatch(0, 0, skips=True), zeros()
    fed(watch, totals, [1.0, float("nan"), 2.0, float("inf")])
    watch.check(totals, "no checkpoint")
    assert totals.tolist() == [3.0, 2.0]


def test_only_many_in_a_row_are_an_error_whenever_one_looks() -> None:
    nan = float("nan")
    watch, totals = LossWatch(0, 0, skips=True), zeros()
    fed(watch, totals, [nan] * (HOPELESS - 1) + [1.0] + [nan] * (HOPELESS - 2))
    watch.check(totals, "no checkpoint")
    fed(watch, totals, [nan], first=100)
    watch.check(totals, "no checkpoint")
    fed(watch, totals, [nan], first=101)
    with pytest.raises(UserError, match=f"step {HOPELESS}, rank 0"):
        watch.check(totals, "no checkpoint")
