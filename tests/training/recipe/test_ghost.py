"""Ghost skips: their sum by hand, what is left of them, whose parameters they are, and a resume in the middle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training.recipe.recipe_cases import batches, network, optimizer_of, random_masks, recipe, train
from utils import files, sparsity
from utils.masks import Masks, prunable_parameters
from utils.system.errors import UserError
from utils.training.optimizers import load_optimizer_state, optimizer_state
from utils.training.recipe import stock
from utils.training.recipe.ghost import GhostSkips

KINDS = ["identity", "1x1"]


def ghosts(
    model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "identity", total: int = 8, **keys: object
) -> GhostSkips:
    section = recipe(ghost__kind=kind, **{f"ghost__{name}": value for name, value in keys.items()})
    return GhostSkips(model, section, Masks.dense(model), optimizer, total, 4, side=16, seed=3, level=1)


def normed(x: torch.Tensor) -> torch.Tensor:
    mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt()


class Plain(nn.Module):
    """A stem and one convolution of every geometry, whose centres are told below."""

    def __init__(self, second: nn.Conv2d, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, second.in_channels, 1)
        self.second = second
        self.norm = nn.BatchNorm2d(second.out_channels) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.stem(x)))


def centre(x: torch.Tensor, row: int, column: int) -> torch.Tensor:
    inside = 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
    return x[:, :, row, column] if inside else torch.zeros_like(x[:, :, 0, 0])


GEOMETRIES = [
    (nn.Conv2d(4, 4, 3, padding=1), 0),
    (nn.Conv2d(4, 10, 3, stride=2, padding=1), 0),
    (nn.Conv2d(4, 3, 1), 0),
    (nn.Conv2d(4, 4, 5, padding=1), 1),
    (nn.Conv2d(4, 4, 1, padding=1), -1),
    (nn.Conv2d(4, 4, 3, dilation=2, padding="same"), 0),
    (nn.Conv2d(4, 8, 4, stride=4), 1),
    (nn.Conv2d(4, 8, 3, padding=1, groups=2), 0),
]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("conv", "first"), GEOMETRIES)
def test_the_skip_by_hand(conv: nn.Conv2d, first: int, norm: bool) -> None:
    """first: where the centre of the kernel lies in the image at the first place."""
    torch.manual_seed(0)
    model = Plain(copy.deepcopy(conv), norm).eval()
    images = batches(1)[0][0]
    with torch.no_grad():
        read, plain = model.stem(images), model(images)
        made = ghosts(model, torch.optim.SGD(model.parameters(), 0.1), alpha=0.5)
        assert [site.name for site in made.sites] == ["second.weight"]
        height, width, stride = plain.shape[2], plain.shape[3], conv.stride[0]
        rows = [[centre(read, first + stride * i, first + stride * j) for j in range(width)] for i in range(height)]
        under = torch.stack([torch.stack(row, -1) for row in rows], -2)
        tiled = torch.stack([under[:, c % under.shape[1]] for c in range(conv.out_channels)], 1)
        torch.testing.assert_close(model(images), plain + 0.5 * normed(tiled), rtol=1e-4, atol=1e-5)


def test_a_1x1_skip_by_hand() -> None:
    torch.manual_seed(0)
    model = Plain(nn.Conv2d(4, 6, 3, stride=2, padding=1), True).eval()
    images = batches(1)[0][0]
    with torch.no_grad():
        read, plain = model.stem(images), model(images)
        made = ghosts(model, torch.optim.SGD(model.named_parameters(), 0.1), "1x1")
        weight = made.weights["second.weight"]
        assert made.parameters == 4 * 6
        expected = plain + normed(functional.conv2d(read, weight, stride=2))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_network_is_left_bit_for_bit(kind: str) -> None:
    model = network()
    fresh, optimizer = copy.deepcopy(model), optimizer_of(model)
    names = [name for name, _ in model.named_parameters()]
    made = ghosts(model, optimizer, kind, end="5it")
    assert len(made.sites) == 6
    assert list(files.state_of(model)) == list(files.state_of(fresh))
    assert [name for name, _ in model.named_parameters()] == names
    assert prunable_parameters(model).keys() == prunable_parameters(fresh).keys()
    train(model, optimizer, None, [made], range(5))
    fresh.load_state_dict(model.state_dict())
    images = batches(1)[0][0]
    for module, other in zip(model.modules(), fresh.modules(), strict=True):
        assert type(module) is type(other)
        assert vars(module).keys() == vars(other).keys()
        assert module._buffers.keys() == other._buffers.keys()
        assert module._non_persistent_buffers_set == other._non_persistent_buffers_set
    assert torch.equal(model.eval()(images), fresh.eval()(images))
    assert made.parameters == sum(w.numel() for w in made.weights.values())
    assert len(optimizer.param_groups) == 1
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_at_alpha_0_the_logits_are_those_without_skips(kind: str) -> None:
    model, images = network().eval(), batches(1)[0][0]
    plain = model(images)
    made = ghosts(model, optimizer_of(model), kind)
    assert not torch.allclose(model(images), plain)
    made._alpha.zero_()
    assert torch.equal(model(images), plain)


def test_alpha_falls_by_the_schedule() -> None:
    model = network()
    made = ghosts(model, optimizer_of(model), hold="1it", end="5it")
    seen = []
    for step in range(6):
        made.before_step(step)
        seen.append(made.epoch_end(0)["ghost"])
    assert seen == [1.0, 1.0, 0.75, 0.5, 0.25, None]


def test_the_skips_own_weights_are_trained_and_counted_apart() -> None:
    model = network()
    optimizer, masks = optimizer_of(model), random_masks(model)
    held = sparsity.attach(model, optimizer, masks)
    made = ghosts(model, optimizer, "1x1")
    convs = [site.conv for site in made.sites]
    assert made.parameters == sum(c.in_channels * c.out_channels for c in convs)
    assert made.epoch_end(0)["ghost_weights"] == made.parameters
    before = {name: w.detach().clone() for name, w in made.weights.items()}
    train(model, optimizer, held, [made], range(2))
    assert all(not torch.equal(w, before[name]) for name, w in made.weights.items())
    assert held.masks.total == sum(p.numel() for p in prunable_parameters(model).values())
    assert not any("ghost" in name for name in optimizer_state(model, optimizer))
    assert held.violations() == []


def test_skips_of_two_ranks_are_drawn_alike_and_of_two_levels_are_not() -> None:
    def weights(level: int) -> torch.Tensor:
        model = network()
        section = recipe(ghost__kind="1x1")
        made = GhostSkips(model, section, Masks.dense(model), optimizer_of(model), 8, 4, side=16, seed=3, level=level)
        return torch.cat([w.detach().reshape(-1) for w in made.weights.values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert float(weights(1).std()) > 0.1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3, 6])
def test_a_resume_in_the_middle_has_the_bits_of_the_whole_run(kind: str, name: str, at: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, GhostSkips]:
        model = network()
        optimizer = optimizer_of(model, name)
        return model, optimizer, ghosts(model, optimizer, kind, end="6it")

    whole, optimizer, made = start()
    losses = train(whole, optimizer, None, [made], range(8))
    first, optimizer, made = start()
    train(first, optimizer, None, [made], range(at))
    kept = {k: v.clone() for k, v in first.state_dict().items()}
    moments, state = optimizer_state(first, optimizer), made.state()
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in state.values())
    second, optimizer, made = start()
    files.put_weights(second, kept)
    load_optimizer_state(second, optimizer, moments)
    made.load_state(state)
    shown = train(second, optimizer, None, [made], range(at, 8))
    assert shown == losses[at:]
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())


def test_another_models_state_is_refused() -> None:
    model = network()
    made = ghosts(model, optimizer_of(model), "1x1")
    state = made.state()
    state["weight.layer1.0.conv1.weight"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"another model's, first 'layer1.0.conv1.weight'"):
        made.load_state(state)


def test_the_stock_network_for_a_while() -> None:
    model, images = network().eval(), batches(1)[0][0]
    plain = model(images)
    made = ghosts(model, optimizer_of(model), "1x1")
    bridged = model(images)
    with stock([made]):
        assert torch.equal(model(images), plain)
    assert torch.equal(model(images), bridged)


def test_excluded_layers_get_no_skip() -> None:
    model = network()
    made = ghosts(model, optimizer_of(model), exclude=["layer1.*", "*.conv2.weight"])
    assert [site.name for site in made.sites] == ["layer2.0.conv1.weight", "layer3.0.conv1.weight"]
    with pytest.raises(UserError, match=r"recipe.ghost.exclude: 'layre1.\*' matches no prunable parameter"):
        ghosts(network(), optimizer_of(model), exclude=["layre1.*"])


def test_a_network_without_convolutions_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    with pytest.raises(UserError, match="no masked convolution to bridge"):
        ghosts(model, optimizer_of(model))


def test_compiled_steps_are_not_compiled_anew() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    losses = []
    for compiled in (True, False):
        model = network()
        called = torch.compile(model, backend=counter) if compiled else model
        optimizer = optimizer_of(model)
        made = ghosts(model, optimizer, "1x1", end="4it")

        def run(_: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], called: nn.Module = called) -> torch.Tensor:
            return functional.cross_entropy(called(batch[0]), batch[1])

        losses.append(train(model, optimizer, None, [made], range(7), run))
    assert losses[0] == losses[1]
    assert counter.frame_count == 2  # with skips, then without
