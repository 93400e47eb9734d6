"""Scores by the derivative with respect to a gate on what a layer puts out, at 1.

Micro-batches are weighted by their samples and summed over ranks before absolute values are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils.masks import prunable_parameters
from utils.pruning.criteria._gradients import math_attention
from utils.pruning.structured.gates import Places, gate_places, gated
from utils.pruning.structured.groups import ChannelGroup
from utils.pruning.structured.scores import Evidence, UnitScores, channel_criterion
from utils.system.distributed import sum_over_ranks


class _Gates:
    """Gates at 1 on every writer of `groups`, and sums of what each micro-batch says about them."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        device = next(model.parameters()).device
        self.model, self.places = model, _places(model, groups)
        self.gates = {g.name: torch.ones(g.size, device=device, requires_grad=True) for g in groups}
        self.sums = {g.name: torch.zeros(g.size, dtype=torch.float64, device=device) for g in groups}
        self.samples = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, value: Tensor, samples: int, change: Callable[[Tensor], Tensor] = lambda grad: grad) -> None:
        """Add `samples` times the derivative of `value`, changed by `change`."""
        found = torch.autograd.grad(value, list(self.gates.values()), allow_unused=True)
        for name, grad in zip(self.gates, found, strict=True):
            if grad is not None:
                self.sums[name] += samples * change(grad.detach().double())
        self.samples += samples

    def means(self) -> UnitScores:
        """Means over the samples of all ranks."""
        for total in (*self.sums.values(), self.samples):
            sum_over_ranks(total)
        return {name: total / self.samples for name, total in self.sums.items()}


def _places(model: nn.Module, groups: Sequence[ChannelGroup]) -> Places:
    return gate_places(model, groups, at="writer")


def _loss(evidence: Evidence, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    assert evidence.loss is not None
    return evidence.loss(model, batch)


@channel_criterion("snap", reads="train")
def snap(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """|dL/dc| of a gate c on the channel, over the sum of all (Verdenius et al. 2020, SNAP)."""
    own = _Gates(model, groups)
    with gated(model, own.places, own.gates):
        for batch in evidence.batches:
            own.add(_loss(evidence, model, batch), len(batch[0]))
    scores = {name: mean.abs() for name, mean in own.means().items()}
    total = sum(float(score.sum()) for score in scores.values())
    return {name: score / (total or 1.0) for name, score in scores.items()}


@channel_criterion("taylor", reads="train")
def taylor(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """Mean over micro-batches of (dL/dc)^2, c a gate on the channel (Molchanov et al. 2019, first order)."""
    own = _Gates(model, groups)
    with gated(model, own.places, own.gates):
        for batch in evidence.batches:
            own.add(_loss(evidence, model, batch), len(batch[0]), torch.square)
    return own.means()


@channel_criterion("crop", reads="train")
def crop(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """|d/dc <G, g(c)>|: how the squared gradient norm changes with a gate (Rachwan et al. 2022, CroP-S).

    g is the gradient of the loss with respect to convolution and linear weights, G its mean held fixed.
    """
    weights = list(prunable_parameters(model).values())
    for p in model.parameters():
        p.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    mean = _mean_gradient(model, weights, evidence)
    own = _Gates(model, groups)
    with math_attention(), gated(model, own.places, own.gates):
        for batch in evidence.batches:
            grads = torch.autograd.grad(_loss(evidence, model, batch), weights, create_graph=True, allow_unused=True)
            flow = [(g * big.to(g.dtype)).sum() for g, big in zip(grads, mean, strict=True) if g is not None]
            own.add(torch.stack(flow).sum(), len(batch[0]))
    return {name: score.abs() for name, score in own.means().items()}


def _mean_gradient(model: nn.Module, weights: Sequence[nn.Parameter], evidence: Evidence) -> list[Tensor]:
    sums = [torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in weights]
    samples = torch.zeros(1, dtype=torch.float64, device=weights[0].device)
    for batch in evidence.batches:
        grads = torch.autograd.grad(_loss(evidence, model, batch), weights, allow_unused=True)
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total += len(batch[0]) * grad.double()
        samples += len(batch[0])
    for total in (*sums, samples):
        sum_over_ranks(total)
    return [total / samples for total in sums]
