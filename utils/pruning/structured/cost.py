"""What a choice of widths costs: multiply-accumulates and parameters of one image, by formula, without a forward pass.

A convolution or linear layer takes (output positions) x (weights) MACs, and both the rows and the columns of a weight
are sums over groups of (entries per unit) x (live units). Attention of timm's plain form adds 2 x tokens^2 x width. All
else that torch.utils.flop_counter counts (attention of other forms, say) belongs to no group and is a constant. As in
the literature, norms, activations, pooling and additions are not counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from utils.masks import Masks, bare
from utils.pruning.structured.groups import ChannelGroup, Part, by_tensor

Widths = Mapping[str, int]
"""Live units by group name; a group without an entry is whole."""


@dataclass(frozen=True)
class _Line:
    """One dimension of a tensor: entries that always stay, and entries per unit of each group."""

    fixed: int
    each: Mapping[str, int]

    def live(self, widths: Widths) -> int:
        return self.fixed + sum(count * widths[name] for name, count in self.each.items())


@dataclass(frozen=True)
class _Tensor:
    lines: tuple[_Line, ...]
    rest: int
    positions: int = 0

    def numel(self, widths: Widths) -> int:
        return math.prod((line.live(widths) for line in self.lines), start=self.rest)


@dataclass(frozen=True)
class Cost:
    """MACs and parameters of a model as functions of the widths of its groups. Made by `cost_of`."""

    sizes: Mapping[str, int]
    _tensors: Mapping[str, _Tensor]
    _attention: tuple[tuple[int, _Line], ...] = ()
    _constant: int = field(default=0)

    def macs(self, widths: Widths | None = None) -> int:
        """Multiply-accumulates of one image."""
        full = {**self.sizes, **(widths or {})}
        layers = sum(tensor.positions * tensor.numel(full) for tensor in self._tensors.values() if tensor.positions)
        return layers + sum(factor * line.live(full) for factor, line in self._attention) + self._constant

    def parameters(self, widths: Widths | None = None) -> int:
        """Parameters, tied ones once."""
        full = {**self.sizes, **(widths or {})}
        return sum(tensor.numel(full) for tensor in self._tensors.values())

    def units(self, widths: Widths | None = None) -> int:
        """Live units of all groups."""
        return sum({**self.sizes, **(widths or {})}.values())


def cost_of(model: nn.Module, groups: Sequence[ChannelGroup], input_shape: tuple[int, int, int]) -> Cost:
    """The cost of `model` for images of `input_shape`. One image runs through a copy; the model stays as it is.

    Raises RuntimeError when a group has units of different sizes, which the formulas do not know.
    """
    copied = copy.deepcopy(bare(model)).cpu().float().eval().requires_grad_(False)
    positions, total = _measure(copied, input_shape)
    places = by_tensor(groups)
    tensors = {name: _tensor(p, places.get(name, []), positions.get(name, 0)) for name, p in copied.named_parameters()}
    attention = []
    module: Any
    for name, module in copied.named_modules():
        if (tokens := positions.get(f"{name}.qkv.weight")) and hasattr(module, "attn_dim"):
            columns = tensors[f"{name}.proj.weight"].lines
            line = columns[1] if len(columns) == 2 and places.get(f"{name}.proj.weight") else None
            attention.append((2 * tokens * tokens, line or _Line(int(module.attn_dim), {})))
    found = Cost({group.name: group.size for group in groups}, tensors, tuple(attention))
    rest = total - found.macs()
    if rest < 0:  # attention that the counter does not see
        found, rest = Cost(found.sizes, tensors), total - Cost(found.sizes, tensors).macs()
    return Cost(found.sizes, tensors, found._attention, rest)


@dataclass(frozen=True)
class MaskedCost:
    """MACs and parameters of a network of which single weights are kept. Made by `of`."""

    positions: Mapping[str, int]
    macs: int
    parameters: int

    @staticmethod
    def of(model: nn.Module, input_shape: tuple[int, int, int]) -> MaskedCost:
        """For images of `input_shape`. One image runs through a copy; the model stays as it is."""
        copied = copy.deepcopy(bare(model)).cpu().float().eval().requires_grad_(False)
        return MaskedCost(*_measure(copied, input_shape), sum(p.numel() for p in copied.parameters()))

    def row(self, masks: Masks) -> dict[str, int]:
        """`macs_dense`, `macs` (a pruned weight of a layer costs nothing) and `parameters` (those that are kept)."""
        pruned = {name: masks[name].numel() - count for name, count in masks.counts.items()}
        saved = sum(self.positions.get(name, 0) * count for name, count in pruned.items())
        kept = self.parameters - sum(pruned.values())
        return {"macs_dense": self.macs, "macs": self.macs - saved, "parameters": kept}


def counted_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """MACs of one image as torch.utils.flop_counter counts them: half of its FLOPs."""
    return _measure(copy.deepcopy(bare(model)).cpu().float().eval().requires_grad_(False), input_shape)[1]


@torch.no_grad()
def _measure(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[dict[str, int], int]:
    """Output positions of every layer's weight, by its name, and all MACs the counter sees."""
    positions: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            key = f"{name}.weight" if name else "weight"

            def note(layer: Any, _: object, out: torch.Tensor, key: str = key) -> None:
                positions[key] = positions.get(key, 0) + out.numel() // layer.weight.shape[0]

            hooks.append(module.register_forward_hook(note))
    try:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return positions, counter.get_total_flops() // 2


def _tensor(p: torch.Tensor, places: Sequence[tuple[ChannelGroup, Part, int]], positions: int) -> _Tensor:
    lines, rest = [], 1
    for dim, size in enumerate(p.shape):
        own = [(group, part) for group, part, at in places if at == dim]
        if own or dim < 2:
            each = {group.name: _each(group, part) for group, part in own}
            lines.append(_Line(size - sum(group.size * each[group.name] for group, _ in own), each))
        else:
            rest *= size
    return _Tensor(tuple(lines), rest, positions)


def _each(group: ChannelGroup, part: Part) -> int:
    """Entries per unit."""
    counts = np.bincount(part.units[part.units >= 0], minlength=group.size)
    if counts.min() != counts.max():
        raise RuntimeError(f"group {group.name!r}: units of {part.module or part.tensors[0][0]} differ in size")
    return int(counts[0])
