"""The step with masks in one pass: torch's own bits, nothing left at pruned places."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.native_library import need_update
from utils import sparsity
from utils.masks import Masks, prunable_parameters
from utils.training.masked_update import MaskedUpdate, Unfit

SIZES = (1, 7, 8, 15, 16, 33, 250, 1003, 4099)
"""Around the widths of vector registers, and far from multiples of them."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-2, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=True),
    "one by one": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True),
    "nesterov, no decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adam, decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1, fused=True),
    "adamw, betas": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.3, 0.95), eps=1e-3, fused=True),
}


class Layers(nn.Module):
    """Weights of awkward sizes; biases and a norm are not prunable."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(size, 1) for size in SIZES)
        self.norm = nn.BatchNorm1d(37)


def masks_of(model: nn.Module, seed: int = 1) -> Masks:
    """40 % of every weight; one is kept whole."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.rand(p.shape, generator=generator) < 0.4 for n, p in prunable_parameters(model).items()}
    drawn[list(drawn)[-2]].fill_(True)
    return Masks(drawn)


def updated(optimizer: torch.optim.Optimizer, held: sparsity.Sparsity) -> MaskedUpdate:
    """Where the step can be had at all it has torch's bits: that it is refused for its bits fails the test."""
    need_update()
    return MaskedUpdate(optimizer, held)


class Twins:
    """A model inside masks, stepped in one pass; and a copy stepped by torch alone, on masked gradients."""

    def __init__(self, name: str) -> None:
        self.model = Layers()
        self.masks = masks_of(self.model)
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.held = sparsity.attach(self.model, self.optimizer, self.masks)
        self.copy = copy.deepcopy(self.model)
        self.theirs = OPTIMIZERS[name](self.copy.parameters())
        self.update = updated(self.optimizer, self.held)
        self.generator = torch.Generator().manual_seed(3)

    def gradients(self, spoil: float | None = None) -> None:
        """The same gradients for both; pruned ones are 0.0 in the copy and what they are, or `spoil`, in the model."""
        for (name, p), q in zip(self.model.named_parameters(), self.copy.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=self.generator)
            q.grad = p.grad.clone()
            if name in self.masks:
                q.grad[~self.masks[name]] = 0.0
                if spoil is not None:
                    p.grad[~self.masks[name]] = spoil

    def mask(self, masks: Masks) -> None:
        """Change the masks of both; the copy by hand."""
        self.masks = masks
        self.held.set(masks)
        for name, q in self.copy.named_parameters():
            if name in masks:
                for value in (q, *self.theirs.state[q].values()):
                    if value is not None and value.shape == q.shape:
                        value.data[~masks[name]] = 0.0

    def check(self) -> None:
        for (name, p), q in zip(self.model.named_parameters(), self.copy.parameters(), strict=True):
            state = {"weight": p, **self.optimizer.state[p]}
            other = {"weight": q, **{k: v for k, v in self.theirs.state[q].items() if v is not None}}
            assert state.keys() == other.keys()
            for key, value in state.items():
                bits, expected = (v.detach().view(torch.int32) for v in (value, other[key]))
                assert torch.equal(bits, expected), f"{name} {key}"
                if name in self.masks and value.shape == p.shape:
                    assert not bits[~self.masks[name]].any(), f"{name} {key} at pruned places"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_torchs_bit_for_bit(name: str) -> None:
    twins = Twins(name)
    for step in range(30):
        for group, other in zip(twins.optimizer.param_groups, twins.theirs.param_groups, strict=True):
            group["lr"] = other["lr"] = 0.1 / (1 + step)
        twins.gradients()
        if step == 10:  # torch's own step in between: state is where it keeps it
            twins.held.project()
            twins.optimizer.step()
        else:
            twins.update.step()
        twins.theirs.step()
        if step == 20:
            twins.mask(twins.masks & masks_of(twins.model, 2))
        if step == 25:
            twins.mask(masks_of(twins.model, 3))  # weights return
        twins.check()
    assert float((twins.model.layers[-1].weight != 0).float().mean()) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("name", ["momentum, decay", "nesterov", "adam, decay", "adamw"])
@pytest.mark.parametrize("spoil", [float("inf"), float("nan"), -0.0, -1e38])
def test_what_gradients_hold_at_pruned_places_leaves_no_trace(name: str, spoil: float) -> None:
    twins = Twins(name)
    for _ in range(3):
        twins.gradients(spoil)
        twins.update.step()
        twins.theirs.step()
        twins.check()


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_state_goes_through_a_state_dict(name: str) -> None:
    twins = Twins(name)
    for step in range(6):
        if step == 3:
            fresh = OPTIMIZERS[name](twins.model.parameters())
            fresh.load_state_dict(copy.deepcopy(twins.optimizer.state_dict()))
            twins.optimizer = fresh
            twins.held.watch(fresh)
            twins.update = updated(fresh, twins.held)
        twins.gradients()
        twins.update.step()
        twins.theirs.step()
        twins.check()


@pytest.mark.parametrize("name", ["momentum, decay", "adamw"])
def test_a_parameter_without_a_gradient_is_left_alone(name: str) -> None:
    twins = Twins(name)
    for step in range(4):
        twins.gradients()
        if step < 2:
            twins.model.layers[4].weight.grad = twins.copy.layers[4].weight.grad = None
        twins.update.step()
        twins.theirs.step()
        twins.check()


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_threads_change_no_bit(name: str) -> None:
    results = []
    for threads in (1, 3):
        model = nn.Linear(70_001, 5)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        optimizer = OPTIMIZERS[name](model.parameters())
        masks = Masks({"weight": torch.rand(5, 70_001, generator=torch.Generator().manual_seed(2)) < 0.5})
        update = updated(optimizer, sparsity.attach(model, optimizer, masks))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for step in range(3):
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                update.step()
        finally:
            torch.set_num_threads(before)
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["momentum, decay", "adamw"])
def test_weights_and_gradients_in_other_orders(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    optimizer, theirs = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    masks = Masks({"weight": torch.rand(7, 5, 3, 3) < 0.5})
    masks.apply_(twin)
    update = updated(optimizer, sparsity.attach(model, optimizer, masks))
    for step in range(4):
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            grad = torch.randn(p.shape)
            p.grad = grad if step % 2 else grad.to(memory_format=torch.channels_last) if grad.dim() == 4 else grad
            q.grad = torch.empty_like(q).copy_(grad.masked_fill(~masks[key], 0) if key in masks else grad)
        if step == 2:  # as a state_dict of another memory format leaves it
            state = optimizer.state[model.weight]
            for key, value in state.items():
                if value.dim() == 4:
                    state[key] = value.contiguous()
        update.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["plain", "adamw"])
def test_autograd_sees_that_weights_changed(name: str) -> None:
    twins = Twins(name)
    weight = twins.model.layers[3].weight
    twins.gradients()
    squared = weight.square().sum()
    twins.update.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def with_hook(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


class Own(torch.optim.SGD):
    pass


def with_gaps(model: nn.Module) -> torch.optim.Optimizer:
    model.weight = nn.Parameter(torch.zeros(2, 8)[:, ::2])
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "amsgrad"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True), "maximize"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1)), "rate"),
        (lambda m: torch.optim.RMSprop(m.parameters()), "RMSprop"),
        (lambda m: Own(m.parameters(), lr=0.1), "Own"),
        (lambda m: torch.optim.SGD(m.to(torch.bfloat16).parameters(), lr=0.1), "float32"),
        (with_gaps, "float32"),
        (with_hook, "hooks"),
    ],
)
def test_what_it_does_not_know_it_leaves_to_torch(make: Callable[[nn.Module], Any], words: str) -> None:
    model = nn.Linear(4, 2)
    optimizer = make(model)
    held = sparsity.attach(model, optimizer, Masks.dense(model))
    with pytest.raises(Unfit, match=words) as raised:
        MaskedUpdate(optimizer, held)
    assert not raised.value.told


def test_another_machines_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were torch to round otherwise, as with vectors of another width, the trial says so."""
    twins = Twins("adamw")
    monkeypatch.setattr("utils.training.masked_update._VECTOR", 64)
    with pytest.raises(Unfit, match="bits") as raised:
        MaskedUpdate(twins.optimizer, twins.held)
    assert raised.value.told
