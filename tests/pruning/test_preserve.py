"""Scoring leaves the model bitwise unchanged."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from utils.pruning.preserve import preserved, unchanged


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 3))


def bits(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().contiguous().numpy().tobytes()


def everything(model: nn.Module) -> dict[str, Any]:
    """All state scoring might touch, as bytes and plain values."""
    state: dict[str, Any] = {f"module {n}": m.training for n, m in model.named_modules()}
    for name, p in model.named_parameters():
        state[name] = (bits(p), bits(p.grad), id(p), id(p.grad), p.requires_grad)
    state.update({name: (bits(b), id(b)) for name, b in model.named_buffers()})
    state["rng"] = (bits(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tobytes())  # noqa: NPY002
    return state


def disturb(model: Any) -> None:
    model(torch.randn(4, 2, 8, 8)).square().sum().backward()
    model[1].running_mean = torch.full((4,), 7.0)
    model.train()
    next(model.parameters()).requires_grad_(False)
    random.random()
    np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("batchnorm", ["eval", "train", "none"])
def test_everything_is_put_back(batchnorm: str) -> None:
    model = net()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model(torch.randn(4, 2, 8, 8)).sum().backward()
    before = everything(model)
    with preserved(model, batchnorm):
        assert all(p.grad is None for p in model.parameters())
        disturb(model)
        assert everything(model) != before
    assert everything(model) == before


def test_everything_is_put_back_after_an_error() -> None:
    model = net()
    before = everything(model)

    def fail() -> None:
        disturb(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), preserved(model, "train"):
        fail()
    assert everything(model) == before


@pytest.mark.parametrize(
    ("batchnorm", "norm", "dropout"), [("eval", False, False), ("train", True, False), ("none", True, True)]
)
def test_modes(batchnorm: str, norm: bool, dropout: bool) -> None:
    model = net().train()
    with preserved(model, batchnorm):
        assert (model[1].training, model[2].training) == (norm, dropout)


def test_a_changed_parameter_is_named() -> None:
    model = net()
    with pytest.raises(RuntimeError, match=r"scoring changed parameter '4.weight'"), unchanged(model):
        model[4].weight.data[0, 0] += 1e-7


def test_a_swap_of_two_weights_and_a_sign_of_zero_are_changes() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 0.0
    with pytest.raises(RuntimeError, match=r"'0.weight'"), unchanged(model):
        model[0].weight.data[0, 0, 0, 0] = -0.0
    with pytest.raises(RuntimeError, match=r"'4.weight'"), unchanged(model):
        model[4].weight.data = model[4].weight.data.flip(0)


def test_a_change_that_is_undone_is_no_change() -> None:
    model = net()
    with unchanged(model), torch.no_grad():
        saved = model[0].weight.clone()
        model[0].weight.abs_()
        model[0].weight.copy_(saved)


def test_a_weight_turned_over_is_a_change() -> None:
    """Its memory holds the same bytes in the same order, but the values stand elsewhere."""
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="scoring changed parameter 'weight'"), unchanged(model):
        model.weight.data = model.weight.data.t()
