"""Soft activations against torch's named ones and formulas, and the stock network that is left."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training.recipe.recipe_cases import batches, network, optimizer_of, recipe, train
from utils import files
from utils.system.errors import UserError
from utils.training.recipe import stock
from utils.training.recipe.soft import SoftActivations, soften

POINTS = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0])])
NAMED = {"swish": functional.silu, "mish": functional.mish, "gelu": functional.gelu}
STOCK = {nn.ReLU: functional.relu, nn.ReLU6: functional.relu6, nn.Hardswish: functional.hardswish}


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance in floats that lie between, signs aside where both are 0."""
    x, y = (t.detach().numpy().view(np.int32).astype(np.int64) for t in (a, b))
    x, y = (np.where(v < 0, -(v & 0x7FFFFFFF), v) for v in (x, y))
    return int(np.abs(x - y).max())


class _SwishOfTwo(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (1 + torch.exp(-2 * x))


def one(kind: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), kind(inplace=True))


@pytest.mark.parametrize("module", list(STOCK), ids=lambda module: module.__name__)
@pytest.mark.parametrize("kind", list(NAMED))
def test_it_starts_as_the_named_activation_and_ends_as_the_stock_module(kind: str, module: type[nn.Module]) -> None:
    model = one(module)
    before = model[1]
    soft = SoftActivations(model, recipe(soft__kind=kind, soft__end="10it"), total=20, steps_per_epoch=5)
    assert model[1] is not before
    assert ulps(model[1](POINTS), NAMED[kind](POINTS)) <= 2
    soft.before_step(0)
    assert ulps(model[1](POINTS), NAMED[kind](POINTS)) <= 2
    soft.before_step(9)
    soft.after_step(8)
    assert model[1] is not before
    soft.after_step(9)
    assert model[1] is before
    assert torch.equal(model[1](POINTS.clone()).view(torch.int32), STOCK[module](POINTS).view(torch.int32))


def test_swish_grows_geometrically_towards_relu() -> None:
    model = one(nn.ReLU)
    section = recipe(soft__kind="swish", soft__end="4it", soft__beta=1, soft__beta_end=16)
    soft = SoftActivations(model, section, 8, 4)
    x = POINTS.double()
    for step, beta in enumerate((1.0, 2.0, 4.0, 8.0)):
        soft.before_step(step)
        torch.testing.assert_close(model[1](POINTS).double(), x / (1 + torch.exp(-beta * x)), rtol=1e-5, atol=1e-30)
        assert soft.epoch_end(0) == {"soft": beta}
    soft.after_step(3)
    assert soft.epoch_end(0) == {"soft": None}


@pytest.mark.parametrize("kind", ["mish", "gelu"])
def test_a_blend_is_a_convex_combination(kind: str) -> None:
    model = one(nn.ReLU)
    soft = SoftActivations(model, recipe(soft__kind=kind, soft__end="4it", soft__shape="linear"), 8, 4)
    soft.before_step(3)
    expected = 0.25 * NAMED[kind](POINTS) + 0.75 * POINTS.clamp(min=0)
    torch.testing.assert_close(model[1](POINTS), expected, rtol=1e-6, atol=1e-7)


def test_everything_stock_after_training_keys_and_logits_included() -> None:
    model = network()
    fresh = copy.deepcopy(model)
    keys = list(model.state_dict())
    soft = SoftActivations(model, recipe(soft__kind="swish", soft__end="3it"), 6, 3)
    assert list(model.state_dict()) == keys
    assert list(files.state_of(model)) == keys
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    train(model, optimizer_of(model), None, [soft], range(6))
    fresh.load_state_dict(model.state_dict())
    images = batches(1)[0][0]
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert torch.equal(model.eval()(images), fresh.eval()(images))
    assert all(module.training is False for module in model.modules())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in fresh.named_buffers()]


def test_it_changes_the_training_and_only_while_it_lasts() -> None:
    softened, plain = network(), network()
    soft = SoftActivations(softened, recipe(soft__kind="gelu", soft__end="3it"), 6, 3)
    first = train(softened, optimizer_of(softened), None, [soft], range(3))
    assert first != train(plain, optimizer_of(plain), None, [], range(3))
    plain.load_state_dict(softened.state_dict())
    after = [train(m, optimizer_of(m), None, e, range(3, 6)) for m, e in ((softened, [soft]), (plain, []))]
    assert after[0] == after[1]


def test_what_is_in_the_network_is_a_function_of_the_step() -> None:
    """Whatever was called before, as on a resume."""
    images = batches(1)[0][0]
    for step in (0, 3, 7, 8, 11):
        straight, jumped = network().eval(), network().eval()
        section = recipe(soft__kind="swish", soft__hold="2it", soft__end="8it")
        walks = SoftActivations(straight, section, 12, 3)
        for past in range(step + 1):
            walks.before_step(past)
            if past < step:
                walks.after_step(past)
        SoftActivations(jumped, section, 12, 3).before_step(step)
        assert torch.equal(straight(images), jumped(images))
    started_late = network()
    SoftActivations(started_late, section, 12, 3, start=9)
    assert not any(type(m).__name__ == "Swish" for m in started_late.modules())


def test_the_stock_network_for_a_while() -> None:
    model = network().eval()
    images = batches(1)[0][0]
    plain = model(images)
    soft = SoftActivations(model, recipe(soft__kind="swish"), 12, 3)
    gentle = model(images)
    with stock([soft]):
        assert torch.equal(model(images), plain)
    assert torch.equal(model(images), gentle)
    assert not torch.equal(gentle, plain)
    model.train()
    soft.close()
    assert all(module.training for module in model.modules())


def test_kept_for_good_as_released() -> None:
    model, images = network().eval(), batches(1)[0][0]
    plain = model(images)
    assert soften(model, recipe(soft__kind="swish")) is model
    assert torch.equal(model(images), plain)
    soften(model, recipe(soft__kind="swish", soft__keep=True, soft__beta=2))
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    other = network().eval()
    for parent in list(other.modules()):
        if hasattr(parent, "relu"):
            parent.relu = _SwishOfTwo()
    torch.testing.assert_close(model(images), other(images))
    assert not torch.allclose(other(images), plain)


def test_a_network_without_such_modules_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe.soft.kind=mish: Sequential has no ReLU"):
        SoftActivations(nn.Sequential(nn.Linear(2, 2), nn.GELU()), recipe(soft__kind="mish"), 4, 2)


def test_compiled_steps_are_not_compiled_anew() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 14 * 14, 10))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter)
    pair = []
    for network_, called in ((model, compiled), (reference, reference)):
        soft = SoftActivations(network_, recipe(soft__kind="swish", soft__end="4it"), 8, 4)
        run = lambda _, batch, called=called: functional.cross_entropy(called(batch[0]), batch[1])  # noqa: E731
        pair.append(train(network_, optimizer_of(network_), None, [soft], range(8), run))
    assert pair[0] == pair[1]
    assert counter.frame_count == 2  # soft, then stock
