"""Learning-rate schedules against numpy's interpolation, torch's own schedulers and published values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from utils.params import Schedule, Step
from utils.system.errors import ParamError
from utils.system.registry import declared
from utils.training.schedules import check, lr_at, schedule

NAMES = ["constant", "cosine", "onecycle", "step", "trapezoidal", "triangular"]
SMOOTH = [name for name in NAMES if name != "step"]


def section(name: str, **fields: Any) -> Schedule:
    if name == "step":
        fields.setdefault("milestones", (Step(iterations=30), Step(iterations=60)))
    return Schedule(name=name, **fields)


def curve(part: Schedule, total: int, peak: float = 1.0, steps_per_epoch: int = 10) -> np.ndarray:
    return np.array([lr_at(step, part, peak, total, steps_per_epoch) for step in range(total + 1)])


def torch_curve(make: Any, steps: int, lr: float = 1.0) -> np.ndarray:
    """Rates a torch scheduler uses at steps 0 to `steps`, stepped once per optimizer step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) <= steps:
            scheduler.step()
    return np.array(rates)


def test_names_read_from_source_are_the_registered_ones() -> None:
    assert sorted(declared("schedule")) == schedule.names() == NAMES


def test_published_cifar_schedule() -> None:
    """150 epochs, 10 of warm-up, a tenth at 70 and 130 epochs, peak 0.1; 195 steps per epoch at batch 256."""
    spe, peak = 195, 0.1
    part = Schedule(name="step", warmup=Step(10), milestones=(Step(70), Step(130)), gamma=0.1)

    def rate(step: int) -> float:
        return lr_at(step, part, peak, 150 * spe, spe)

    assert rate(0) == 0.0
    assert rate(5 * spe) == pytest.approx(0.05, rel=1e-12)
    assert rate(10 * spe - 1) == pytest.approx(0.1 * (1950 - 1) / 1950, rel=1e-12)
    assert rate(10 * spe) == 0.1
    assert rate(70 * spe - 1) == 0.1
    assert rate(70 * spe) == pytest.approx(0.01, rel=1e-12)
    assert rate(130 * spe - 1) == pytest.approx(0.01, rel=1e-12)
    assert rate(130 * spe) == pytest.approx(0.001, rel=1e-12)
    assert rate(150 * spe - 1) == pytest.approx(0.001, rel=1e-12)


def test_step_is_torchs_multistep() -> None:
    part = Schedule(name="step", milestones=(Step(1, 3), Step(4)), gamma=0.3)
    expected = torch_curve(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [13, 40], gamma=0.3), 60)
    np.testing.assert_allclose(curve(part, 60), expected, rtol=1e-12)


def test_cosine_is_torchs() -> None:
    expected = torch_curve(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 80, eta_min=0.05), 80)
    np.testing.assert_allclose(curve(Schedule(name="cosine", final=0.05), 80), expected, rtol=1e-9, atol=1e-12)


def test_cosine_with_warmup_is_the_closed_form_of_the_remaining_steps() -> None:
    rates = curve(Schedule(name="cosine", warmup=Step(1), warmup_start=0.1, final=0.02), 100, peak=0.4)
    t = np.arange(101)
    shape = 0.02 + 0.5 * (1 + np.cos(np.pi * (t - 10) / 90)) * 0.98
    expected = 0.4 * np.where(t < 10, 0.1 + 0.9 * t / 10, shape)
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-15)


def test_onecycle_is_torchs() -> None:
    """torch counts its phases to total_steps - 1: with total + 1 steps it ends where ours does, at step `total`."""
    total, peak, start, final = 100, 0.3, 0.2, 0.01

    def make(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=2.0,
            total_steps=total + 1,
            pct_start=(peak * total + 1) / (total + 1),
            div_factor=1 / start,
            final_div_factor=start / final,
            cycle_momentum=False,
        )

    rates = curve(Schedule(name="onecycle", start=start, peak=peak, final=final), total, peak=2.0)
    np.testing.assert_allclose(rates, torch_curve(make, total), rtol=1e-9)


@pytest.mark.parametrize("peak", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_triangular_is_linear_interpolation(peak: float, final: float) -> None:
    total, t = 200, np.arange(201)
    rates = curve(Schedule(name="triangular", start=0.25, peak=peak, final=final), total)
    if peak == 0.0:
        expected = np.interp(t, [0, total], [1.0, final])
    elif peak == 1.0:
        expected = np.interp(t, [0, total], [0.25, 1.0])
    else:
        expected = np.interp(t, [0, peak * total, total], [0.25, 1.0, final])
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-12)


def test_triangular_after_a_warmup_spans_the_remaining_steps() -> None:
    rates = curve(Schedule(name="triangular", warmup=Step(2), start=0.2, peak=0.25), 100)
    expected = np.interp(np.arange(101), [0, 20, 40, 100], [0.0, 0.2, 1.0, 0.0])
    np.testing.assert_allclose(rates, expected, atol=1e-12)


@pytest.mark.parametrize(("cooldown", "final"), [(0.2, 0.0), (0.35, 0.1), (0.9, 0.0), (0.0, 0.5)])
def test_trapezoidal_is_linear_interpolation(cooldown: float, final: float) -> None:
    rates = curve(Schedule(name="trapezoidal", warmup=Step(1), cooldown=cooldown, final=final), 100)
    if cooldown == 0.0:
        expected = np.interp(np.arange(101), [0, 10, 100], [0.0, 1.0, 1.0])
    else:
        expected = np.interp(np.arange(101), [0, 10, 100 * (1 - cooldown), 100], [0.0, 1.0, 1.0, final])
    np.testing.assert_allclose(rates, expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_has_its_rate_and_warmup_ends_on_its_step(name: str) -> None:
    part = section(name, warmup=Step(iterations=7), warmup_start=0.125, start=0.5)
    rates = curve(part, 100, peak=0.8)
    first = 0.5 if name in ("triangular", "onecycle") else 1.0
    assert rates[0] == 0.8 * 0.125
    assert rates[7] == pytest.approx(0.8 * first, rel=1e-15)
    np.testing.assert_allclose(np.diff(rates[:8]), 0.8 * (first - 0.125) / 7, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_without_warmup_the_first_step_is_the_shapes(name: str) -> None:
    assert curve(section(name), 100)[0] == (0.2 if name in ("triangular", "onecycle") else 1.0)


@pytest.mark.parametrize(("name", "warmup", "total"), list(itertools.product(SMOOTH, [0, 1, 137, 1000], [5000, 20011])))
def test_continuous_bounded_and_alive_to_the_last_step(name: str, warmup: int, total: int) -> None:
    part = section(name, warmup=Step(iterations=warmup), warmup_start=0.3, cooldown=0.5, peak=0.4)
    rates = curve(part, total)
    jump = 1 if warmup == 1 else 0  # one step of warm-up may take it from start to peak
    # The steepest leg is a quarter of training long or a warm-up, cosines being pi/2 times as steep as lines.
    shortest = min(0.5 * (total - warmup) * 0.5, warmup if warmup > 1 else math.inf)
    assert np.abs(np.diff(rates))[jump:].max() <= 1.01 * math.pi / 2 / shortest
    assert rates.min() >= 0.0
    assert rates.max() <= 1.0
    assert rates[total - 1] > 0.0


@pytest.mark.parametrize("name", ["triangular", "onecycle"])
def test_one_rise_and_one_fall(name: str) -> None:
    rates = curve(section(name, warmup=Step(1), peak=0.3), 110)
    top = int(rates.argmax())
    assert top == 10 + 30
    assert rates[top] == 1.0
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()


@pytest.mark.parametrize("name", ["cosine", "step", "constant", "trapezoidal"])
def test_never_rises_after_the_warmup(name: str) -> None:
    assert (np.diff(curve(section(name, warmup=Step(1)), 100)[10:]) <= 0).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_long_trainings_keep_their_last_step(name: str) -> None:
    total = 50_000_000
    assert 0.0 < lr_at(total - 1, section(name), 0.1, total, 1000) <= 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_training_of_one_step(name: str, warmup: int) -> None:
    part = section(name, warmup=Step(iterations=warmup), warmup_start=0.5, cooldown=0.0)
    expected = 0.5 if warmup else (0.2 if name in ("triangular", "onecycle") else 1.0)
    assert lr_at(0, part, 3.0, 1, 1) == pytest.approx(3.0 * expected)


def test_all_of_training_may_be_warmup() -> None:
    rates = curve(Schedule(name="cosine", warmup=Step(iterations=50)), 50)
    np.testing.assert_allclose(rates, np.arange(51) / 50)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (Schedule(name="cosine", warmup=Step(10, 1)), "schedule.warmup"),
        (Schedule(name="step"), "schedule.milestones"),
        (Schedule(name="step", warmup=Step(5), milestones=(Step(4), Step(8))), "schedule.milestones"),
        (Schedule(name="trapezoidal", warmup=Step(5), cooldown=0.6), "schedule.cooldown"),
    ],
)
def test_contradictions_are_refused(part: Schedule, key: str) -> None:
    with pytest.raises(ParamError, match=key) as caught:
        check(part, 100, 10)
    assert "\n" not in str(caught.value)
    with pytest.raises(ParamError):
        lr_at(0, part, 0.1, 100, 10)


def test_warmup_and_cooldown_may_meet() -> None:
    rates = curve(Schedule(name="trapezoidal", warmup=Step(iterations=3), cooldown=0.7), 10)
    np.testing.assert_allclose(rates, np.interp(np.arange(11), [0, 3, 10], [0, 1, 0]), atol=1e-12)


@pytest.mark.parametrize("step", [-1, 101])
def test_steps_outside_training_are_errors(step: int) -> None:
    with pytest.raises(ValueError, match=str(step)):
        lr_at(step, Schedule(), 0.1, 100, 10)
