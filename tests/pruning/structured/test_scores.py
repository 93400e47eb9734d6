"""Scores of channels against formulas written out, by finite differences where they are derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.pruning.structured_cases import SHAPE, Small, batch, cross_entropy, small
from utils.pruning.structured import Channels, Evidence
from utils.pruning.structured.scores import channel_criterion, score_units
from utils.system.errors import UserError

BATCHES = [batch(SHAPE, 3, size, seed) for seed, size in enumerate((4, 2))]


def scored(name: str, model: nn.Module, **more) -> dict[str, torch.Tensor]:
    found = Channels.of(model, SHAPE)
    evidence = Evidence([(images.double(), labels) for images, labels in BATCHES], cross_entropy, SHAPE, **more)
    return score_units(name, model, found.groups, evidence, seed=0)


class Scaled(Small):
    """`Small` whose layers' outputs are multiplied by plain numbers: gates written out by hand."""

    gates: dict[str, torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def gate(name: str, value: torch.Tensor) -> torch.Tensor:
            scale = self.gates[name]
            return value * (scale.view(1, -1, 1, 1) if value.dim() == 4 else scale)

        x = functional.silu(self.bn(gate("a", self.a(x))))
        x = self.dw(gate("b", self.b(x))) + gate("b", self.c(x))
        return self.fc2(torch.sigmoid(gate("fc1", self.fc1(self.pool(x).flatten(1)))))


def by_hand(model: Small) -> Scaled:
    copied = copy.deepcopy(model).double().eval()
    copied.__class__ = Scaled
    copied.gates = {name: torch.ones(size, dtype=torch.float64) for name, size in (("a", 6), ("b", 4), ("fc1", 5))}
    return copied


def total_loss(model: nn.Module) -> torch.Tensor:
    """Mean loss over the samples of both batches."""
    sums = [cross_entropy(model, (images.double(), labels)) * len(labels) for images, labels in BATCHES]
    return torch.stack(sums).sum() / 6


def differences(model: Scaled, value, step: float = 1e-5) -> dict[str, torch.Tensor]:
    """Central differences of `value(model)` with respect to every gate."""
    found = {}
    for name, gate in model.gates.items():
        slopes = []
        for unit in range(len(gate)):
            ends = []
            for sign in (1, -1):
                gate[unit] += sign * step
                ends.append(float(value(model).detach()))
                gate[unit] -= sign * step
            slopes.append((ends[0] - ends[1]) / (2 * step))
        found[name] = torch.tensor(slopes, dtype=torch.float64)
    return found


def test_snap_is_the_size_of_the_derivative_of_a_gate() -> None:
    model = small().double()
    expected = {name: slope.abs() for name, slope in differences(by_hand(model), total_loss).items()}
    total = sum(float(slope.sum()) for slope in expected.values())
    for name, score in scored("snap", model).items():
        assert torch.allclose(score, expected[name] / total, rtol=1e-5, atol=1e-9)


def test_taylor_averages_squares_over_micro_batches() -> None:
    model = small().double()
    hand = by_hand(model)
    one = [differences(hand, lambda m, i=i: cross_entropy(m, (BATCHES[i][0].double(), BATCHES[i][1]))) for i in (0, 1)]
    for name, score in scored("taylor", model).items():
        assert torch.allclose(score, (4 * one[0][name] ** 2 + 2 * one[1][name] ** 2) / 6, rtol=1e-4, atol=1e-12)


def test_crop_is_the_change_of_the_gradient_flow() -> None:
    model = small().double()
    hand = by_hand(model)
    weights = [p for p in hand.parameters() if p.dim() > 1]
    mean = [g.detach() for g in torch.autograd.grad(total_loss(hand), weights)]

    def flow(net: nn.Module) -> torch.Tensor:
        grads = torch.autograd.grad(total_loss(net), weights)
        return sum((g * m).sum() for g, m in zip(grads, mean, strict=True))

    expected = differences(hand, flow)
    for name, score in scored("crop", model).items():
        assert torch.allclose(score, expected[name].abs(), rtol=1e-4, atol=1e-10)


def test_norms_of_filters_are_averaged_over_everything_that_writes_the_channel() -> None:
    model = small()
    l1, l2 = scored("l1", model.double()), scored("l2", model.double())
    for unit in range(4):  # b and c write it with six weights each, and dw passes it on with nine
        rows = torch.cat(
            [model.b.weight[unit].flatten(), model.c.weight[unit].flatten(), model.dw.weight[unit].flatten()]
        )
        assert float(l1["b"][unit]) == pytest.approx(float(rows.abs().mean()), rel=1e-12)
        assert float(l2["b"][unit]) == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-12)


def test_norm_scales_need_a_norm() -> None:
    model = small().double()
    found = Channels.of(model, SHAPE, exclude=["b", "fc1"])
    scores = score_units("bn_scale", model, found.groups, Evidence(), seed=0)
    assert torch.equal(scores["a"], model.bn.weight.detach().abs())
    with pytest.raises(UserError, match="bn_scale: no norm with a scale follows 'b'"):
        scored("bn_scale", model)


def test_random_scores_depend_on_the_group_and_the_seed_alone() -> None:
    model = small()
    whole, some = Channels.of(model, SHAPE), Channels.of(model, SHAPE, exclude=["a"])
    first = score_units("random", model, whole.groups, Evidence(), seed=1)
    assert torch.equal(first["b"], score_units("random", model, some.groups, Evidence(), seed=1)["b"])
    assert not torch.equal(first["b"], score_units("random", model, whole.groups, Evidence(), seed=2)["b"])


@pytest.mark.parametrize("name", ["l1", "l2", "random", "snap", "taylor", "crop"])
def test_scoring_leaves_the_model_bitwise_as_it_was(name: str) -> None:
    model = small().double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scored(name, model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_a_criterion_lacks_is_said() -> None:
    model = small()
    found = Channels.of(model, SHAPE)
    with pytest.raises(UserError, match="snap reads training batches and was given none"):
        score_units("snap", model, found.groups, Evidence(), seed=0)
    with pytest.raises(UserError, match="no gates were learned"):
        score_units("gates", model, found.groups, Evidence(), seed=0)
    assert channel_criterion.names() == ["bn_scale", "crop", "gates", "l1", "l2", "random", "snap", "taylor"]
