"""The learning rate as a pure function of the step: nothing is counted, so nothing can be off by one on a resume.

Training takes steps 0 to total - 1 and every one of them, the first included, uses `lr_at` of its own number. A
warm-up rises linearly from `warmup_start` at step 0 to the shape's first value, which is reached at step `warmup`; the
shape takes the steps from there to `total`, where it ends. So the last step of a shape that ends at 0 still learns.

A new shape is one function here: `(Point, params.Schedule) -> factor`, the factor being relative to the peak rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from utils import params
from utils.system.errors import ParamError
from utils.system.registry import Registry


@dataclass(frozen=True)
class Point:
    """A step within a training of `total` steps, the first `warmup` of which warm up."""

    step: int
    warmup: int
    total: int
    steps_per_epoch: int

    @property
    def progress(self) -> float:
        """Share of the way from the end of the warm-up (0.0) to the end of training (1.0)."""
        span = self.total - self.warmup
        return (self.step - self.warmup) / span if span else 0.0


Shape = Callable[[Point, params.Schedule], float]

schedule: Registry[Shape] = Registry("schedule")


@schedule("constant")
def constant(point: Point, section: params.Schedule) -> float:
    """The peak rate throughout."""
    return 1.0


@schedule("step")
def step_decay(point: Point, section: params.Schedule) -> float:
    """Times gamma at each milestone; milestones are counted from the start of training."""
    return section.gamma ** sum(milestone.at(point.steps_per_epoch) <= point.step for milestone in section.milestones)


@schedule("cosine")
def cosine(point: Point, section: params.Schedule) -> float:
    """Half a cosine from 1 to final (Loshchilov and Hutter 2017, eq. 5, without restarts)."""
    return section.final + (1.0 - section.final) * _ease(1.0 - point.progress)


@schedule("triangular")
def triangular(point: Point, section: params.Schedule) -> float:
    """Linear from start to 1 at the share peak, then linear to final."""
    return _rise_and_fall(point, section, lambda share: share)


@schedule("onecycle")
def onecycle(point: Point, section: params.Schedule) -> float:
    """One cycle (Smith 2018) with cosine legs: start to 1 at the share peak, then to final."""
    return _rise_and_fall(point, section, _ease)


@schedule("trapezoidal")
def trapezoidal(point: Point, section: params.Schedule) -> float:
    """Constant, then linear to final over the last share cooldown of training."""
    left, length = point.total - point.step, section.cooldown * point.total
    return 1.0 if left >= length else section.final + (1.0 - section.final) * left / length


def lr_at(step: int, section: params.Schedule, peak_lr: float, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate of `step`, 0 <= step <= total_steps (the end point, which no step uses, is allowed).

    Raises ParamError for a section that contradicts the length of training (see `check`).
    """
    check(section, total_steps, steps_per_epoch)
    if not 0 <= step <= total_steps:
        raise ValueError(f"step {step} is outside a training of {total_steps} steps")
    warmup = section.warmup.at(steps_per_epoch)
    shape = schedule[section.name]
    factor = shape(Point(max(step, warmup), warmup, total_steps, steps_per_epoch), section)
    if step < warmup:
        factor = section.warmup_start + (factor - section.warmup_start) * step / warmup
    return peak_lr * factor


def check(section: params.Schedule, total_steps: int, steps_per_epoch: int) -> None:
    """Raise ParamError when the section is impossible in a training of `total_steps`, naming the key and the mend."""
    warmup = section.warmup.at(steps_per_epoch)
    if warmup > total_steps:
        raise ParamError(
            f"schedule.warmup={section.warmup} is {warmup} steps but training has {total_steps}; "
            "shorten schedule.warmup or raise training.epochs"
        )
    if section.name == "step":
        if not section.milestones:
            raise ParamError("schedule.name=step needs schedule.milestones, e.g. 70ep,130ep")
        early = next((m for m in section.milestones if m.at(steps_per_epoch) < warmup), None)
        if early is not None:
            raise ParamError(
                f"schedule.milestones: {early} lies within schedule.warmup={section.warmup}; move one of them"
            )
    if section.name == "trapezoidal" and warmup + section.cooldown * total_steps > total_steps * (1 + 1e-9):
        raise ParamError(
            f"schedule.warmup={section.warmup} and schedule.cooldown={section.cooldown:g} together exceed training's "
            f"{total_steps} steps; shorten one of them"
        )


def _rise_and_fall(point: Point, section: params.Schedule, ease: Callable[[float], float]) -> float:
    if point.progress < section.peak:
        return section.start + (1.0 - section.start) * ease(point.progress / section.peak)
    left = (1.0 - point.progress) / (1.0 - section.peak) if section.peak < 1.0 else 1.0
    return section.final + (1.0 - section.final) * ease(left)


def _ease(share: float) -> float:
    """Half a cosine from 0 to 1. Written as a squared sine: exact at both ends, and positive right beside 0."""
    return math.sin(0.5 * math.pi * share) ** 2
