"""How many channels a budget allows: the most units, in the order of their scores, whose cost does not exceed it.

Units are ranked once: by score over all groups (`global`), or by their place within their group (`layer`, which thins
all groups alike); ties go by a seeded order. Taking one more unit never makes the model cheaper, minimum widths and
multiples included, so a binary search finds the largest count that fits: exact to one unit, without a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.data.stateless import derive
from utils.pruning.structured.cost import Cost
from utils.pruning.structured.groups import ChannelGroup
from utils.pruning.structured.mask import ChannelMask
from utils.system.errors import UserError

BUDGETS = ("channels", "parameters", "macs")


@dataclass(frozen=True)
class Limits:
    """What a choice of widths must respect.

    min_width  units a group keeps at least (all of a smaller one)
    round_to   widths are multiples of it, the nearest ones, or whole
    """

    min_width: int = 1
    round_to: int = 1

    def width(self, kept: int, size: int) -> int:
        """The width of a group of `size` units of which `kept` rank high enough; never falls as `kept` rises."""
        multiple = math.floor(kept / self.round_to + 0.5) * self.round_to
        return min(size, max(multiple, self.min_width, min(self.round_to, size), 1))


ANY = Limits()
"""Any width from one unit up."""


@dataclass(frozen=True)
class Chosen:
    """A mask, and its cost in units of the budget: reached, allowed, and of the model the share refers to."""

    mask: ChannelMask
    reached: int
    allowed: int
    reference: int


def choose_units(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, torch.Tensor],
    cost: Cost,
    *,
    budget: str,
    keep: float,
    reference: int | None = None,
    scope: str = "global",
    limits: Limits = ANY,
    seed: int = 0,
) -> Chosen:
    """The units that stay when a share `keep` of the budget may be spent; protected groups stay whole.

    scores: [units] by group name, higher is kept, for every group that is not protected. budget: channels (units of
    the groups that may be pruned), parameters or macs (of one image). reference: what the share refers to; the model's
    own cost by default. Raises UserError for NaN among the scores and when even the narrowest widths cost too much.
    """
    open_groups = [group for group in groups if group.protected is None]
    ranked = _Ranking(open_groups, scores, scope, seed)
    measure = _Measure(cost, open_groups, budget)
    reference = measure({}) if reference is None else reference
    allowed = math.floor(keep * reference + (0.5 if budget == "channels" else 0.0))
    low, high = -1, len(ranked)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(ranked.widths(middle, limits)) <= allowed:
            low = middle
        else:
            high = middle - 1
    if low < 0:
        least = measure(ranked.widths(0, limits))
        raise UserError(
            f"structured.keep={keep:g}: the narrowest widths allowed cost {least:,} {budget}, more than {allowed:,}; "
            f"raise it above {least / reference:.4f}, or lower structured.min_width or structured.round_to"
        )
    mask = ranked.mask(low, limits, groups)
    return Chosen(mask, measure(mask.widths), allowed, reference)


class _Measure:
    def __init__(self, cost: Cost, groups: Sequence[ChannelGroup], budget: str) -> None:
        if budget not in BUDGETS:
            raise ValueError(f"unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
        self.cost, self.budget = cost, budget
        self.sizes = {group.name: group.size for group in groups}

    def __call__(self, widths: Mapping[str, int]) -> int:
        if self.budget == "channels":
            return sum(widths.get(name, size) for name, size in self.sizes.items())
        return self.cost.macs(widths) if self.budget == "macs" else self.cost.parameters(widths)


class _Ranking:
    """All units of all groups, best first."""

    def __init__(
        self, groups: Sequence[ChannelGroup], scores: Mapping[str, torch.Tensor], scope: str, seed: int
    ) -> None:
        if scope not in ("global", "layer"):
            raise ValueError(f"unknown scope {scope!r}; known: global, layer")
        self.groups = list(groups)
        self.best: list[np.ndarray] = []
        keys, ties, owner = [], [], []
        for number, group in enumerate(self.groups):
            values = _values(scores, group)
            drawn = torch.Generator().manual_seed(derive("units", seed, group.name))
            tie = torch.rand(group.size, generator=drawn, dtype=torch.float64).numpy()
            best = np.lexsort((tie, -values))
            self.best.append(best)
            keys.append(-values[best] if scope == "global" else (np.arange(group.size) + 0.5) / group.size)
            ties.append(tie[best])
            owner.append(np.full(group.size, number))
        place = np.concatenate([np.arange(group.size) for group in self.groups])
        # A unit never comes before a better one of its own group, whatever the ties.
        order = np.lexsort((place, np.concatenate(ties), np.concatenate(keys)))
        self.owner = np.concatenate(owner)[order]

    def __len__(self) -> int:
        return len(self.owner)

    def widths(self, count: int, limits: Limits) -> dict[str, int]:
        """Widths when the first `count` units stay."""
        kept = np.bincount(self.owner[:count], minlength=len(self.groups))
        return {g.name: limits.width(int(k), g.size) for g, k in zip(self.groups, kept, strict=True)}

    def mask(self, count: int, limits: Limits, groups: Sequence[ChannelGroup]) -> ChannelMask:
        """Each group's best units, as many as `widths` says."""
        widths = self.widths(count, limits)
        units = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
        for group, best in zip(self.groups, self.best, strict=True):
            units[group.name][best[widths[group.name] :].copy()] = False
        return ChannelMask(units)


def _values(scores: Mapping[str, torch.Tensor], group: ChannelGroup) -> np.ndarray:
    values = scores[group.name].detach().cpu().double().numpy()
    if values.shape != (group.size,):
        raise ValueError(f"scores of {group.name!r} have shape {values.shape}, not ({group.size},)")
    if np.isnan(values).any():
        raise UserError(f"structured.criterion: NaN among the scores of {group.name!r}; its weights are not finite")
    return values
