"""The one function that changes masks in training: projection, who hears of it, and ranks that differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils import sparsity
from utils.masks import Masks, prunable_parameters
from utils.system import distributed
from utils.training.averaging import ExponentialAverage
from utils.training.extension import Extension
from utils.training.masking import change_masks


def random_masks(model: nn.Module, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in prunable_parameters(model).items()})


class Listener(Extension):
    def __init__(self) -> None:
        self.heard: list[Masks] = []

    def masks_changed(self, masks: Masks) -> None:
        self.heard.append(masks)


def trained() -> tuple[nn.Module, torch.optim.Optimizer, sparsity.Sparsity]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    held = sparsity.attach(model, optimizer, random_masks(model, 1))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    return model, optimizer, held


def test_weights_gradients_state_and_averages_are_zero_wherever_pruned_before_or_now() -> None:
    model, optimizer, held = trained()
    average, listener = ExponentialAverage(model, 0.9), Listener()
    average.after_step(0)
    before, after = held.masks, random_masks(model, 2)
    change_masks(held, after, [average, listener], "the masks")
    assert held.masks == after
    assert listener.heard == [after]
    averaged = average.state()
    for name, p in prunable_parameters(model).items():
        both, returning = before[name] & after[name], after[name] & ~before[name]
        assert returning.any()
        assert both.any()
        state = optimizer.state[p]
        for tensor in (p, p.grad, state["exp_avg"], state["exp_avg_sq"], averaged[f"average.{name}"]):
            assert not tensor[~both].any()
            assert tensor[both].all()


def test_ranks_that_differ_stop_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, held = trained()
    before, weights, listener = held.masks, model[0].weight.detach().clone(), Listener()
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "another"])
    with pytest.raises(RuntimeError, match=r"masks at step 7 differ between ranks \(rank 0: .*, rank 1: another\)"):
        change_masks(held, random_masks(model, 2), [listener], "masks at step 7")
    assert held.masks == before
    assert torch.equal(model[0].weight, weights)
    assert listener.heard == []
