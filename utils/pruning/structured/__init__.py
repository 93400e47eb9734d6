"""Structured pruning: channels taken out for good, so that a smaller dense model is left.

channels = Channels.of(model, (3, 32, 32), name="cifar/resnet20")
chosen = channels.prune(model, "l1", budget="macs", keep=0.5)
smaller = shrink(model, channels.groups, chosen.mask)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from utils.pruning.structured.budget import ANY, Chosen, Limits, choose_units
from utils.pruning.structured.cost import Cost, cost_of, counted_macs
from utils.pruning.structured.groups import COUPLED, ChannelGroup, channel_groups, exclude_groups
from utils.pruning.structured.mask import ChannelMask
from utils.pruning.structured.scores import Evidence, score_units
from utils.pruning.structured.shrink import shrink, shrink_masks, shrink_optimizer
from utils.pruning.structured.verify import verified

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel groups of one model, proven to shrink, and what widths cost."""

    name: str
    groups: tuple[ChannelGroup, ...]
    cost: Cost
    input_shape: Shape

    @staticmethod
    def of(
        model: nn.Module,
        input_shape: Shape,
        *,
        name: str = "the model",
        exclude: Sequence[str] = (),
        coupled: bool = True,
    ) -> Channels:
        """Follow the channels of `model`, which stays as it is.

        exclude: globs over group names. coupled: also prune channels that several layers write, as residual sums do.
        Raises UserError, naming the model and the reason, when nothing can be removed.
        """
        groups = verified(model, channel_groups(model, input_shape, exclude, name), input_shape, name)
        if not coupled:
            groups = tuple(
                group if group.single or group.protected else replace(group, protected=COUPLED) for group in groups
            )
        return Channels(name, groups, cost_of(model, groups, input_shape), input_shape)

    @property
    def open(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be pruned."""
        return tuple(group for group in self.groups if group.protected is None)

    def prune(
        self,
        model: nn.Module,
        criterion: str,
        *,
        budget: str,
        keep: float,
        evidence: Evidence | None = None,
        reference: int | None = None,
        scope: str = "global",
        limits: Limits = ANY,
        seed: int = 0,
    ) -> Chosen:
        """Score the units of `model` and keep the best that the budget allows; see `choose_units`."""
        scores = score_units(criterion, model, self.groups, evidence or Evidence(), seed)
        return self.choose(scores, budget=budget, keep=keep, reference=reference, scope=scope, limits=limits, seed=seed)

    def choose(
        self,
        scores: Mapping[str, torch.Tensor],
        *,
        budget: str,
        keep: float,
        reference: int | None = None,
        scope: str = "global",
        limits: Limits = ANY,
        seed: int = 0,
    ) -> Chosen:
        """`prune` from scores taken before."""
        return choose_units(
            self.groups, scores, self.cost, budget=budget, keep=keep, reference=reference, scope=scope, limits=limits,
            seed=seed,
        )  # fmt: skip

    def check_cost(self, smaller: nn.Module, mask: ChannelMask) -> int:
        """MACs of the shrunk model. Raises RuntimeError unless torch.utils.flop_counter counts as the formula does."""
        formula, counted = self.cost.macs(mask.widths), counted_macs(smaller, self.input_shape)
        if formula != counted:
            raise RuntimeError(f"{self.name}: {formula:,} MACs by formula, {counted:,} counted")
        return counted


__all__ = [
    "ChannelGroup",
    "ChannelMask",
    "Channels",
    "Chosen",
    "Cost",
    "Evidence",
    "Limits",
    "exclude_groups",
    "shrink",
    "shrink_masks",
    "shrink_optimizer",
]
