"""Triggers: recorded distance curves with epochs worked out by hand, channel masks by hand, states."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from utils.params.early import Early
from utils.pruning.triggers import Reading, Trigger, build, trigger
from utils.pruning.triggers.early_bird import channel_mask, early_bird_fires
from utils.pruning.triggers.weight_distance import published_fires, released_fires
from utils.system.errors import UserError
from utils.system.registry import declared

# A recorded training: relative distance after epochs 0, 1, 2, ...; changes 0.9, 0.4, 0.25, 0.12, 0.13, -0.02, 0.
CURVE = [0.0, 0.9, 1.3, 1.55, 1.67, 1.80, 1.78, 1.78]


def first(fires: list[bool]) -> int | None:
    return fires.index(True) if True in fires else None


@pytest.mark.parametrize(
    ("density", "epoch"),
    [(0.95, 1), (0.9, 2), (0.5, 2), (0.3, 3), (0.2, 4), (0.125, 4), (0.11, 6), (0.015, 7), (1e-9, 7)],
)
def test_the_published_rule_on_a_recorded_curve(density: float, epoch: int) -> None:
    assert first([published_fires(CURVE[: t + 1], density) for t in range(len(CURVE))]) == epoch


def test_the_published_rule_never_fires_on_the_initial_weights_or_while_distances_jump() -> None:
    assert not published_fires([0.0], 1.0)
    growing = [0.2 * t for t in range(30)]
    assert not any(published_fires(growing[: t + 1], 0.1) for t in range(30))
    assert not published_fires([0.0, 0.5], 0.5), "the rule is strict"


# Distances from the weights after epoch 1, for epochs 1, 2, ...; changes 0.8, 0.35, 0.2, 0.06, -0.05, -0.03.
RELEASED = [0.0, 0.8, 1.15, 1.35, 1.41, 1.36, 1.33]


@pytest.mark.parametrize(
    ("density", "epoch"),
    [(1.0, 3), (0.5, 3), (0.3, 4), (0.1, 5), (0.07, 6), (0.05, 7), (0.03, None), (0.0, None)],
)
def test_the_released_rule_on_a_recorded_curve(density: float, epoch: int | None) -> None:
    # tau = 0.8 density: 0.8, 0.4, 0.24, 0.08, 0.056, 0.04, 0.024, 0
    found = first([released_fires(RELEASED[:t], density) for t in range(1, len(RELEASED) + 1)])
    assert (None if found is None else found + 1) == epoch


def test_a_given_threshold_replaces_the_released_one_but_not_before_epoch_3() -> None:
    assert released_fires(RELEASED[:3], 0.01, 0.36)
    assert not released_fires(RELEASED[:3], 1.0, 0.34)
    assert not released_fires([0.0, 0.001], 0.5, 1.0)


def two_layers() -> nn.Module:
    """Parameters of norm 5: weight (3, 0), bias 4."""
    model = nn.Linear(2, 1)
    put(model, 3.0, 0.0, 4.0)
    return model


@torch.no_grad()
def put(model: nn.Module, first: float, second: float, bias: float) -> None:
    model.weight.copy_(torch.tensor([[first, second]]))
    model.bias.fill_(bias)


def observe(watch: Trigger, model: nn.Module, *weights: tuple[float, float, float]) -> list[Reading]:
    readings = []
    for point in weights:
        put(model, *point)
        readings.append(watch.observe(model))
    return readings


# Distances from (3, 0, 4): 5, 5, 10, 10.5 over 5.
PATH = [(0.0, 0.0, 0.0), (3.0, 5.0, 4.0), (3.0, 10.0, 4.0), (3.0, 10.5, 4.0)]


def test_published_distances_are_those_of_all_parameters_from_the_start() -> None:
    model = two_layers()
    readings = observe(build(Early(trigger="weight_distance"), model=model, density=0.2), model, *PATH)
    assert [r.value for r in readings] == pytest.approx([1.0, 1.0, 2.0, 2.1])
    assert [r.fired for r in readings] == [False, True, False, True]


def test_a_threshold_replaces_the_density() -> None:
    model = two_layers()
    section = Early(trigger="weight_distance", threshold=1.5)
    assert observe(build(section, model=model, density=0.2), model, PATH[0])[0].fired


def test_released_distances_start_after_the_first_epoch() -> None:
    model = two_layers()
    watch = build(Early(trigger="weight_distance_released"), model=model, density=0.1)
    # Reference (0, 3, 4) of norm 5; distances 0, 2, 2.25, 2.4 over it; tau = 0.4 * 0.1.
    path = [(0.0, 3.0, 4.0), (0.0, 3.0, 6.0), (0.0, 3.0, 6.25), (0.0, 3.0, 6.4)]
    readings = observe(watch, model, *path)
    assert [r.value for r in readings] == pytest.approx([0.0, 0.4, 0.45, 0.48])
    assert [r.fired for r in readings] == [False, False, False, True]


def test_distances_are_taken_in_float64() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    watch = build(Early(trigger="weight_distance"), model=model, density=0.2)
    with torch.no_grad():
        model.weight[0, 0] = 1.0 + 2.0**-20
    assert watch.observe(model).value == pytest.approx(2.0**-20 / 1000, rel=1e-12)


def test_weights_that_start_at_zero_are_refused() -> None:
    model = two_layers()
    put(model, 0.0, 0.0, 0.0)
    watch = build(Early(trigger="weight_distance"), model=model, density=0.2)
    with pytest.raises(UserError, match="all reference weights are 0"):
        watch.observe(model)


# Early-Bird ---------------------------------------------------------------------------------------------------------


def normed(*gammas: list[float]) -> nn.Sequential:
    model = nn.Sequential(*(nn.BatchNorm2d(len(g)) for g in gammas), nn.LayerNorm(4), nn.BatchNorm1d(3, affine=False))
    set_gammas(model, *gammas)
    return model


@torch.no_grad()
def set_gammas(model: nn.Sequential, *gammas: list[float]) -> None:
    for module, values in zip(model, gammas, strict=False):
        module.weight.copy_(torch.tensor(values))


def test_channel_masks_are_global_by_size_and_exact() -> None:
    model = normed([0.5, -0.9, 0.1], [0.2, 0.7])
    assert channel_mask(model, 0.4).tolist() == [False, True, False, False, True]
    assert channel_mask(model, 0.6).tolist() == [True, True, False, False, True]
    assert channel_mask(model, 0.0).sum() == 0
    assert int(channel_mask(normed([1.0] * 7, [1.0] * 6), 0.5).sum()) == 7


@pytest.mark.parametrize(
    ("distances", "window", "expected"),
    [
        ([0.05] * 4, 5, False),
        ([0.05] * 5, 5, True),
        ([0.5, 0.05, 0.05, 0.05, 0.05], 5, False),
        ([0.5, 0.05, 0.05, 0.05, 0.05, 0.0], 5, True),
        ([0.05, 0.05, 0.1], 3, False),
        ([0.3, 0.0], 1, True),
        ([], 1, False),
    ],
)
def test_early_bird_looks_at_the_last_distances(distances: list[float], window: int, expected: bool) -> None:
    assert early_bird_fires(distances, 0.1, window) == expected


def test_early_bird_on_masks_by_hand() -> None:
    model = normed([4.0, 3.0], [2.0, 1.0])
    watch = build(Early(trigger="early_bird", window=2), model=model, density=0.5)
    values, fired = [], []
    # Kept: {0,1}, {0,2} (2 of 4 differ), {0,2}, {2,3} (2 of 4), {2,3}, {2,3}
    path = [[4, 3, 2, 1], [4, 1, -3, 2], [9, 0, 8, 1], [0, 0, 1, -1], [0.1, 0.2, 0.3, 0.4], [1, 2, 4, 3]]
    for a, b, c, d in path:
        set_gammas(model, [a, b], [c, d])
        reading = watch.observe(model)
        values.append(reading.value)
        fired.append(reading.fired)
    assert values == [None, 0.5, 0.0, 0.5, 0.0, 0.0]
    assert fired == [False, False, False, False, False, True]


def test_early_bird_takes_a_threshold() -> None:
    model = normed([4.0, 3.0], [2.0, 1.0])
    watch = build(Early(trigger="early_bird", window=1, threshold=0.6), model=model, density=0.5)
    watch.observe(model)
    set_gammas(model, [4, 1], [3, 2])
    assert watch.observe(model) == Reading(True, 0.5)


def test_early_bird_needs_batchnorm_weights() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.LayerNorm(3))):
        with pytest.raises(UserError, match="no BatchNorm with weights"):
            build(Early(trigger="early_bird"), model=model, density=0.5)


# All ----------------------------------------------------------------------------------------------------------------


def test_names_in_help_are_the_registered_ones() -> None:
    assert (
        sorted(declared("trigger")) == trigger.names() == ["early_bird", "weight_distance", "weight_distance_released"]
    )
    assert all(declared("trigger").values())


@pytest.mark.parametrize("name", ["early_bird", "weight_distance", "weight_distance_released"])
@pytest.mark.parametrize("stop", [0, 1, 2, 4])
def test_a_restart_goes_on_as_if_never_stopped(name: str, stop: int) -> None:
    def network(epoch: int) -> nn.Sequential:
        torch.manual_seed(epoch)
        model = nn.Sequential(nn.Linear(5, 20), nn.BatchNorm1d(20))
        with torch.no_grad():
            model[1].weight.uniform_()
        return model

    section = Early(trigger=name, window=2, threshold=0.5)
    whole = build(section, model=network(0), density=0.3)
    expected = [whole.observe(network(epoch)) for epoch in range(1, 7)]
    before = build(section, model=network(0), density=0.3)
    found = [before.observe(network(epoch)) for epoch in range(1, 1 + stop)]
    after = build(section, model=network(99), density=0.3)
    after.load_state(before.state())
    found += [after.observe(network(epoch)) for epoch in range(1 + stop, 7)]
    assert found == expected
    assert any(reading.value for reading in expected)


def test_states_of_others_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    bird = build(Early(trigger="early_bird"), model=model, density=0.5)
    distance = build(Early(trigger="weight_distance"), model=model, density=0.5)
    with pytest.raises(UserError, match="another trigger's"):
        bird.load_state(distance.state())
    with pytest.raises(UserError, match="another model's or trigger's"):
        distance.load_state(bird.state())
    with pytest.raises(UserError, match="another model's or trigger's"):
        build(Early(trigger="weight_distance"), model=two_layers(), density=0.5).load_state(distance.state())
    assert math.isfinite(float(distance.observe(model).value or 0.0))
