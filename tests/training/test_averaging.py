"""The weight average against a float64 recursion in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from utils import sparsity
from utils.masks import Masks
from utils.system.errors import UserError
from utils.training.averaging import ExponentialAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
    return model.to(memory_format=torch.channels_last)


def move(model: nn.Module, seed: int) -> None:
    """Stand-in for an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in model.state_dict().items()}


def averaged(average: ExponentialAverage, model: nn.Module) -> dict[str, np.ndarray]:
    with average.swapped():
        return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def half_masks(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(7)
    return Masks({name: torch.rand(m.shape, generator=generator) < 0.5 for name, m in Masks.dense(model).items()})


def test_follows_the_recursion_from_a_copy() -> None:
    model, decay = network(), 0.9
    average = ExponentialAverage(model, decay)
    expected: dict[str, np.ndarray] = {}
    for step in range(20):
        move(model, step)
        average.after_step(step)
        for name, p in model.named_parameters():
            w = p.detach().numpy().astype(np.float64)
            expected[name] = w if step == 0 else decay * expected[name] + (1 - decay) * w
        if step == 0:
            for name, value in averaged(average, model).items():
                np.testing.assert_array_equal(value, dict(model.named_parameters())[name].detach().numpy())
    for name, value in averaged(average, model).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    assert average.updates == 20


def test_swapping_restores_the_live_weights_bit_for_bit() -> None:
    model = network()
    average = ExponentialAverage(model, 0.5)
    for step in range(3):
        move(model, step)
        average.after_step(step)
    with torch.no_grad():
        model[4].weight[0, 0], model[4].weight[0, 1] = float("nan"), -0.0
    before, addresses = bits(model), [p.data_ptr() for p in model.parameters()]
    with average.swapped():
        assert bits(model) != before
        assert [p.data_ptr() for p in model.parameters()] == addresses
    assert bits(model) == before
    with pytest.raises(KeyError), average.swapped():
        raise KeyError
    assert bits(model) == before


def test_before_the_first_step_it_is_the_live_weights() -> None:
    model = network()
    average = ExponentialAverage(model, 0.5)
    move(model, 0)
    before = bits(model)
    with average.swapped():
        assert bits(model) == before


def test_buffers_stay_those_of_the_live_model() -> None:
    model = network()
    average = ExponentialAverage(model, 0.5)
    for step in range(2):
        move(model, step)
        model(torch.randn(4, 3, 4, 4).add_(step))
        average.after_step(step)
    live = {name: b.clone() for name, b in model.named_buffers()}
    with average.swapped():
        assert all(torch.equal(b, live[name]) for name, b in model.named_buffers())


def test_averaged_weights_are_zero_at_pruned_places() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    for step in range(3):
        move(model, step)
        average.after_step(step)
    masks = half_masks(model)
    masks.apply_(model)
    average.masks_changed(masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparsity.attach(model, optimizer, masks)
    for step in range(3, 6):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        average.after_step(step)
        for name, value in averaged(average, model).items():
            if name in masks:
                pruned = value[~masks[name].numpy()]
                assert pruned.tobytes() == bytes(pruned.nbytes)
                assert np.count_nonzero(value) == masks.counts[name]


def test_state_resumes_bit_for_bit() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    for step in range(4):
        move(model, step)
        average.after_step(step)
    other = copy.deepcopy(model)
    resumed = ExponentialAverage(other, 0.9)
    state = average.state()
    resumed.load_state(state)
    for step in range(4, 8):
        for net, mean in ((model, average), (other, resumed)):
            move(net, step)
            mean.after_step(step)
    first, second = averaged(average, model), averaged(resumed, other)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert state["average.0.weight"].is_contiguous()
    assert not torch.equal(state["average.0.weight"], average.state()["average.0.weight"])


def test_state_of_another_model_is_refused() -> None:
    average = ExponentialAverage(network(), 0.9)
    state = average.state()
    with pytest.raises(UserError, match=r"average\.0\.weight"):
        average.load_state({name: t for name, t in state.items() if name != "average.0.weight"})
    with pytest.raises(UserError, match=r"average\.4\.weight"):
        average.load_state({**state, "average.4.weight": torch.zeros(5, 31)})


def test_half_precision_weights_are_averaged_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    average = ExponentialAverage(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.after_step(0)
        model.weight.fill_(2.0)
        for step in range(1, 101):
            average.after_step(step)
    assert float(average.state()["average.weight"]) == pytest.approx(2.0 - 0.999**100, rel=1e-4)


def test_misuse_is_refused() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    average.after_step(0)
    with average.swapped():
        with pytest.raises(RuntimeError, match="swapped"):
            average.after_step(1)
        with pytest.raises(RuntimeError, match="already"), average.swapped():
            pass
    average.after_step(1)
    for decay in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="decay"):
            ExponentialAverage(model, decay)


def test_updates_never_wait_for_the_device() -> None:
    """Tensors on `meta` hold no numbers: whatever reads one raises."""
    model = nn.Linear(3, 3, device="meta")
    average = ExponentialAverage(model, 0.9)
    for step in range(3):
        average.after_step(step)
    assert average.updates == 3
