"""Rescaled initialisation: derivatives against finite differences, its step by hand, the bound met, masks kept."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.training.recipe.recipe_cases import batches, network, plain_loss, random_masks, recipe
from utils.masks import Masks
from utils.system.errors import UserError
from utils.training.recipe import rescale as rescale_module
from utils.training.recipe.rescale import LAST, LookAhead, Rescaled, batch_statistics, rescale, rescale_initial

RECIPE = {"method": "sgd", "eta": 0.1, "gamma": 1.0, "normalize_grad": True, "lr": 1e-2, "clip": 1.0}


class Small(nn.Module):
    """Convolution, norm and linear layers in float64, smooth enough for finite differences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)
        nn.init.uniform_(self.norm.bias, 0.5, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(functional.softplus(self.norm(self.conv(x))).mean((2, 3)))


def small() -> tuple[Small, Masks]:
    model = Small().double()
    masks = random_masks(model, 0.5)
    masks.apply_(model)
    return model, masks


def double(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.double(), labels) for images, labels in batches(count, side=8)]


def scaled(model: nn.Module, names: list[str], scales: torch.Tensor) -> nn.Module:
    """A copy with these parameters multiplied, BatchNorm on the batch's statistics."""
    other = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, scale in zip(names, scales.tolist(), strict=True):
            other.get_parameter(name).mul_(scale)
    return other


def gradients(model: nn.Module, masks: Masks, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    plain_loss(model, batch).backward()
    return {n: p.grad * masks[n] if n in masks else p.grad.clone() for n, p in model.named_parameters()}


def norm_by_hand(found: dict[str, torch.Tensor], method: str) -> float:
    flat = torch.cat([grad.reshape(-1) for grad in found.values()])
    return float(flat.abs().sum() if method == "adam" else flat.square().sum().sqrt())


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_the_norms_derivative_by_finite_differences(method: str) -> None:
    model, masks = small()
    (batch,) = double(1)
    ahead = LookAhead(model, masks, plain_loss, method, 0.1)
    scales = torch.linspace(0.7, 1.3, len(ahead.names), dtype=torch.float64)
    with batch_statistics(model):
        first = ahead.first(scales, batch)
        derivative = ahead.constraint(first)

    def norm(at: torch.Tensor) -> float:
        return norm_by_hand(gradients(scaled(model, ahead.names, at), masks, batch), method)

    assert float(first.norm.detach()) == pytest.approx(norm(scales), rel=1e-9)
    for i in range(len(ahead.names)):
        step = torch.zeros_like(scales)
        step[i] = 1e-6
        slope = (norm(scales + step) - norm(scales - step)) / 2e-6
        assert float(derivative[i]) == pytest.approx(slope, rel=1e-3, abs=1e-6), ahead.names[i]


@pytest.mark.parametrize(("method", "normalize"), [("sgd", False), ("sgd", True), ("adam", False)])
def test_the_look_ahead_and_its_derivative_by_hand(method: str, normalize: bool) -> None:
    """The step is held constant; pruned weights are exactly 0 behind it."""
    model, masks = small()
    batch, other = double(2)
    eta = 0.05
    ahead = LookAhead(model, masks, plain_loss, method, eta, normalize)
    scales = torch.linspace(1.2, 0.8, len(ahead.names), dtype=torch.float64)
    with batch_statistics(model):
        first = ahead.first(scales, batch, graph=False)
        value, derivative = ahead.objective(first, other)
    found = gradients(scaled(model, ahead.names, scales), masks, batch)
    norm = norm_by_hand(found, "sgd")
    moves = {n: g.sign() if method == "adam" else g / norm if normalize else g for n, g in found.items()}

    def loss(at: torch.Tensor) -> float:
        stepped = scaled(model, ahead.names, at)
        with torch.no_grad():
            for name, parameter in stepped.named_parameters():
                parameter -= eta * moves[name]
        assert all(float(stepped.get_parameter(n).detach()[~mask].abs().sum()) == 0.0 for n, mask in masks.items())
        return plain_loss(stepped, other).item() / eta

    assert float(value) == pytest.approx(loss(scales), rel=1e-9)
    for i in range(len(ahead.names)):
        step = torch.zeros_like(scales)
        step[i] = 1e-6
        slope = (loss(scales + step) - loss(scales - step)) / 2e-6
        assert float(derivative[i]) == pytest.approx(slope, rel=1e-3, abs=1e-5), ahead.names[i]


def test_what_the_look_ahead_runs_on_is_zero_where_pruned() -> None:
    model, masks = small()
    seen: list[dict[str, torch.Tensor]] = []

    class Watching(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append({name: p.detach().clone() for name, p in self.named_parameters()})
            return super().forward(x)

    watched = Watching().double()
    watched.load_state_dict(model.state_dict())
    rescale(watched, masks, double(4), plain_loss, iterations=3, lr=0.1, eta=0.5)
    assert len(seen) == 6
    for values in seen:
        assert all(bool((values[name][~mask] == 0.0).all()) for name, mask in masks.items())
    assert not torch.equal(seen[0]["conv.weight"], seen[1]["conv.weight"])


def test_the_bound_is_met() -> None:
    model = network()
    masks = random_masks(model, 0.05)
    masks.apply_(model)
    with torch.no_grad():
        model.fc.weight.mul_(24.0)  # far above the bound at first
    shown = batches(6, size=16)
    report = rescale(model, masks, shown, plain_loss, iterations=110, **{**RECIPE, "lr": 3e-2})
    assert report.norms[0] > 3.0
    assert report.norm == pytest.approx(sum(report.norms[-LAST:]) / LAST)
    assert report.norm <= 1.1
    images, labels = (torch.cat([a, b]) for a, b in zip(shown[0], shown[1], strict=True))
    found = gradients(model.train(), masks, (images, labels))
    assert norm_by_hand(found, "sgd") <= 1.3  # on one batch, with the weights it left


def test_scales_are_all_it_changes() -> None:
    model = network()
    masks = random_masks(model)
    masks.apply_(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    report = rescale(model, masks, batches(3), plain_loss, iterations=4, lr=0.05)
    assert list(model.state_dict()) == list(before)  # running statistics are there again
    for name, value in model.state_dict().items():
        expected = before[name] * report.scales.get(name, 1.0)
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=0)
        if name in masks:
            assert bool((value[~masks[name]].view(torch.int32) == 0).all())
    assert set(report.scales) == {n for n, p in model.named_parameters() if float(before[n].abs().sum())}
    assert max(abs(scale - 1.0) for scale in report.scales.values()) > 0.01
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_weights_outside_the_masks_count_as_zeros_and_end_as_zeros() -> None:
    (masked, masks), unmasked = small(), Small().double()
    assert bool((unmasked.conv.weight[~masks["conv.weight"]] != 0).any())
    reports = [rescale(one, masks, double(3), plain_loss, iterations=3, lr=0.05) for one in (masked, unmasked)]
    assert reports[0] == reports[1]
    for name, value in unmasked.state_dict().items():
        assert torch.equal(value, masked.state_dict()[name]), name


@pytest.mark.parametrize(("norm", "over"), [(2.19, ""), (2.21, ", above gamma 2")])
def test_a_bound_that_was_not_met_is_told(norm: float, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tenth at most, as published."""
    monkeypatch.setattr(rescale_module, "rescale", lambda *_, **__: Rescaled({}, [9.0, *[norm] * LAST], []))
    scoring = SimpleNamespace(close=lambda: None)
    loaders = SimpleNamespace(train=SimpleNamespace(samples=512), scoring=lambda **_: scoring)
    told: list[str] = []
    section = recipe(rescale__method="sgd", rescale__gamma=2.0)
    rescale_initial(network(), section, Masks({}), loaders, plain_loss, told.append)  # type: ignore[arg-type]
    assert told == [f"rescaled initial weights: gradient norm 9 to {norm:.3g}{over}"]


def test_steps_on_the_scales_by_hand() -> None:
    """Adam with first moments per aim and one second moment, clipped gradients and lower bounds."""
    model, masks = small()
    shown = double(6)
    settings = {"method": "sgd", "lr": 0.05, "eta": 0.1, "clip": 0.02, "min_scale": 0.97}
    ahead = LookAhead(model, masks, plain_loss, "sgd", 0.1)

    def joined(*numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([shown[i][0] for i in numbers]), torch.cat([shown[i][1] for i in numbers])

    with batch_statistics(model):
        start = ahead.first(ahead.ones(), joined(0, 1)).norm.item()
    # The first iteration is above the bound, what follows is below it or not as the scales have it.
    report = rescale(copy.deepcopy(model), masks, shown, plain_loss, iterations=3, gamma=start * 0.999, **settings)
    scales = torch.ones(len(ahead.names), dtype=torch.float64)
    first, second, counts, place = {"up": 0.0, "down": 0.0}, 0.0, {"up": 0, "down": 0}, 0
    aims = []
    for number in range(3):
        with batch_statistics(model):
            now = ahead.first(scales, joined(place % 6, (place + 1) % 6))
            if now.norm.item() > start * 0.999:
                aim, grad, used = "up", ahead.constraint(now), 2
            else:
                later = joined(place % 6, (place + 2) % 6)
                aim, grad, used = "down", ahead.objective(now, later)[1], 3
        assert now.norm.item() == pytest.approx(report.norms[number], rel=1e-4)
        place, counts[aim] = place + used, counts[aim] + 1
        aims.append(aim)
        grad = grad.double().clamp(-0.02, 0.02)
        first[aim] = 0.9 * first[aim] + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        move = first[aim] / (1 - 0.9 ** counts[aim]) / ((second / (1 - 0.999 ** (number + 1))) ** 0.5 + 1e-8)
        scales = scales - 0.05 * move
        lowest = torch.tensor([0.0 if name.endswith("bias") else 0.97 for name in ahead.names], dtype=torch.float64)
        scales = torch.maximum(scales, lowest)
    assert aims[0] == "up"
    assert list(report.scales.values()) == pytest.approx(scales.tolist(), rel=1e-4)
    assert 0.97 in [pytest.approx(scale, abs=1e-6) for scale in report.scales.values()]


def test_a_diverging_network_is_told() -> None:
    model, masks = small()
    with torch.no_grad():
        model.fc.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"recipe.rescale: the gradient's norm became nan"):
        rescale(model, masks, double(2), plain_loss, iterations=1)


def test_no_batches() -> None:
    model, masks = small()
    with pytest.raises(ValueError, match="no batches"):
        rescale(model, masks, [], plain_loss, iterations=1)
