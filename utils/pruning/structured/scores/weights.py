"""Scores read off the weights: norms of filters, scales of norms, chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from utils.pruning.structured.groups import NORM, ChannelGroup
from utils.pruning.structured.scores import Evidence, UnitScores, channel_criterion, unit_generator, unit_means
from utils.system.errors import UserError


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


@channel_criterion("l1", reads="nothing")
def l1(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """Mean |w| of the rows that write a channel (Li et al. 2017, over all layers a residual sum ties together)."""
    sizes = {name: w.abs() for name, w in _weights(model).items()}
    return {group.name: unit_means(group, sizes) for group in groups}


@channel_criterion("l2", reads="nothing")
def l2(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """Root mean square of the rows that write a channel."""
    squares = {name: w.double().square() for name, w in _weights(model).items()}
    return {group.name: unit_means(group, squares).sqrt() for group in groups}


@channel_criterion("random", reads="nothing")
def random(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """Uniform random scores: random widths with scope global, uniformly thinner layers with scope layer."""
    return {
        group.name: torch.rand(group.size, generator=unit_generator(generator, group.name), dtype=torch.float64)
        for group in groups
    }


@channel_criterion("bn_scale", reads="nothing")
def bn_scale(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """Mean |gamma| of the norms behind a channel (Liu et al. 2017, network slimming)."""
    vectors = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 1}
    scales = {name: vector.abs() for name, vector in vectors.items() if name.endswith("weight")}
    for group in groups:
        if not any(name in scales for part in group.of(NORM) for name, _ in part.tensors):
            raise UserError(
                f"structured.criterion=bn_scale: no norm with a scale follows {group.name!r}; exclude it or choose "
                "another criterion, such as l1"
            )
    return {group.name: unit_means(group, scales, (NORM,)) for group in groups}


@channel_criterion("gates", reads="gates")
def gates(
    model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, *, generator: torch.Generator
) -> UnitScores:
    """Gates learned on frozen random weights (Pruning from Scratch, Wang et al. 2020)."""
    if missing := [group.name for group in groups if group.name not in evidence.gates]:
        raise UserError(f"structured.criterion=gates: no gates of {missing[0]!r} were learned; run level 0 again")
    return {group.name: evidence.gates[group.name].detach().double().cpu() for group in groups}
