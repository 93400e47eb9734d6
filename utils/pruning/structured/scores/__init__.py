"""Scores of channels: a number for every unit of every group that may be pruned; higher is kept.

A criterion is a function `(model, groups, evidence, *, generator) -> {group name: float64 [units]}`:

    model       the bare model, in eval mode (before a train-mode BatchNorm a channel's scale does nothing)
    groups      those that may be pruned
    evidence    batches of training images (this rank's share), the loss, the shape of an image, and learned gates
    generator   CPU generator, the same on every rank; draw per group from `unit_generator`

The trait `reads` says what it needs: `nothing`, `train` (batches) or `gates` (learned by a level before). A new
criterion is one decorated function in a file of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from utils.data.stateless import derive
from utils.masks import bare
from utils.pruning.criteria import Batches, Loss
from utils.pruning.preserve import preserved, unchanged
from utils.pruning.structured.groups import WRITE, ChannelGroup
from utils.system import distributed
from utils.system.errors import UserError
from utils.system.registry import Registry

UnitScores = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Evidence:
    """What scores are taken from, beside the weights."""

    batches: Batches = ()
    loss: Loss | None = None
    input_shape: tuple[int, int, int] = (3, 32, 32)
    gates: Mapping[str, torch.Tensor] = field(default_factory=dict)


ChannelCriterion = Callable[..., UnitScores]

channel_criterion: Registry[ChannelCriterion] = Registry("channel_criterion")


def score_units(
    name: str, model: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, seed: int
) -> UnitScores:
    """Scores of criterion `name` for every group that is not protected; the model stays bitwise as it was.

    Every rank gets rank 0's scores. Raises UserError for a criterion that lacks what it reads.
    """
    reads = channel_criterion.entry(name).traits["reads"]
    if reads == "gates" and not evidence.gates:
        raise UserError(f"structured.criterion={name}: no gates were learned; set structured.gate_epochs")
    if reads == "train" and (evidence.loss is None or not any(distributed.gather(_holds(evidence.batches)))):
        raise UserError(f"structured.criterion={name} reads training batches and was given none")
    model = bare(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(derive("channel criterion", seed))
    open_groups = [group for group in groups if group.protected is None]
    with unchanged(model), preserved(model, "eval"), torch.autocast(device.type, enabled=False):
        scores = channel_criterion[name](model, open_groups, evidence, generator=generator)
    return {g.name: distributed.broadcast(scores[g.name].detach().double().to(device)).cpu() for g in open_groups}


def _holds(batches: Batches) -> bool:
    return len(batches) > 0 if isinstance(batches, Sized) else any(True for _ in batches)


def unit_generator(generator: torch.Generator, name: str) -> torch.Generator:
    """A fresh CPU generator that depends only on the seed of `generator` and the group's name."""
    return torch.Generator().manual_seed(derive("group", generator.initial_seed(), name))


def unit_means(
    group: ChannelGroup, values: Mapping[str, torch.Tensor], roles: Sequence[str] = (WRITE,)
) -> torch.Tensor:
    """The mean over all entries of `values` (by tensor name) that belong to a unit through `roles`: float64 [units].

    Averaged, because a sum would favour 3x3 layers over 1x1 ones, and groups of many layers over those of one.
    """
    totals, counts = torch.zeros(group.size, dtype=torch.float64), torch.zeros(group.size, dtype=torch.float64)
    for part in group.of(*roles):
        for name, dim in part.tensors:
            if name in values:
                rows = values[name].detach().double().cpu().movedim(dim, 0).reshape(len(part.units), -1)
                inside = np.flatnonzero(part.units >= 0)
                index = torch.as_tensor(part.units[inside])
                totals.index_add_(0, index, rows[inside].sum(1))
                counts.index_add_(0, index, torch.full((len(inside),), float(rows.shape[1]), dtype=torch.float64))
    return totals / counts.clamp(min=1.0)
