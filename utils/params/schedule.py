"""Section `schedule`: the learning rate as a function of the step."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param
from utils.params.step import Step


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step. Factors are relative to optimizer.lr."""

    name: str = param("cosine", "shape of the learning rate", kind="schedule")
    warmup: Step = param(Step(), "linear warm-up before the schedule's own shape")  # noqa: RUF009
    warmup_start: float = param(0.0, "factor at which the warm-up begins", low=0.0, high=1.0)
    milestones: tuple[Step, ...] = param((), "steps at which `step` multiplies the rate by gamma")
    gamma: float = param(0.1, "factor of `step` at each milestone", above=0.0)
    start: float = param(0.2, "factor at the first step (triangular, onecycle)", low=0.0, high=1.0)
    peak: float = param(0.2, "share of training at which the peak is reached (triangular, onecycle)", low=0.0, high=1.0)
    cooldown: float = param(0.2, "share of training spent cooling down (trapezoidal)", low=0.0, high=1.0)
    final: float = param(0.0, "factor at the end (cosine, triangular, trapezoidal, onecycle)", low=0.0, high=1.0)
