"""`Ramp`: a number as a pure function of the optimizer step, the clock of every recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from utils.params.step import Step
from utils.system.errors import UserError


def _exponential(share: float, ratio: float) -> float:
    return (ratio**share - 1.0) / (ratio - 1.0)


_SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda share, ratio: share,
    "cosine": lambda share, ratio: math.sin(0.5 * math.pi * share) ** 2,
    "exponential": _exponential,
}


@dataclass(frozen=True)
class Ramp:
    """`first` up to step `hold`, `last` from step `end` on, and a way between them.

    shape: linear; cosine, which leaves and arrives flat; exponential, (ratio^u - 1) / (ratio - 1) of the way at share
    u: slow at first for a ratio above 1 and geometric if the ratio is last / first; fast at first for one below 1.
    """

    first: float
    last: float
    hold: int
    end: int
    shape: str = "linear"
    ratio: float = 20.0

    def at(self, step: int) -> float:
        """The value at `step`."""
        if step >= self.end:
            return self.last
        if step <= self.hold:
            return self.first
        share = (step - self.hold) / (self.end - self.hold)
        return self.first + (self.last - self.first) * _SHAPES[self.shape](share, self.ratio)


def span(key: str, hold: Step, end: Step | None, total: int, steps_per_epoch: int) -> tuple[int, int]:
    """Steps `hold` and `end` stand for in a level of `total` steps; without an end, half of it.

    Raises UserError, naming `key` (such as `recipe.soft`), when they do not lie in this order within the level.
    """
    first = hold.at(steps_per_epoch)
    last = total // 2 if end is None else end.at(steps_per_epoch)
    if last > total:
        raise UserError(f"{key}.end={end}: training has only {total} steps; choose an earlier step")
    if first >= last and total > 0:
        named = f"{key}.end={end}" if end is not None else f"half of the {total} steps of training, {key}.end=auto"
        raise UserError(f"{key}.hold={hold}: does not come before {named}; choose an earlier step")
    return first, last
