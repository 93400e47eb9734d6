"""`ChannelMask`: which units of which groups live. Held at 0.0, or taken out of the model for good (`shrink`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from utils.masks import Masks, bare, prunable_parameters
from utils.pruning.structured.groups import ChannelGroup, by_tensor

Keep = dict[str, dict[int, torch.Tensor]]
"""Per tensor and dimension the entries that stay, rising (int64); dimensions that stay whole have no entry."""


class ChannelMask(Mapping[str, torch.Tensor]):
    """Bool CPU tensors [units] by group name: True keeps a unit. Immutable; treat the tensors as read-only."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies `tensors`. Raises ValueError for one that is not bool, and for a group that would lose all units."""
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool or tensor.dim() != 1:
                raise ValueError(f"units of {name!r} are {tensor.dtype} {tuple(tensor.shape)}, not bool [units]")
            if not bool(tensor.any()):
                raise ValueError(f"group {name!r} would lose all of its channels")
        self._tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    @staticmethod
    def dense(groups: Sequence[ChannelGroup]) -> ChannelMask:
        """All units of all groups."""
        return ChannelMask({group.name: torch.ones(group.size, dtype=torch.bool) for group in groups})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"ChannelMask({len(self)} groups, {self.kept:,} of {self.total:,} units kept)"

    @property
    def widths(self) -> dict[str, int]:
        """Live units per group."""
        return {name: int(tensor.sum()) for name, tensor in self.items()}

    @property
    def kept(self) -> int:
        """Live units."""
        return sum(self.widths.values())

    @property
    def total(self) -> int:
        """All units."""
        return sum(len(tensor) for tensor in self.values())

    @property
    def digest(self) -> str:
        """Hex SHA-256 of names and bits."""
        sha = hashlib.sha256()
        for name in sorted(self):
            sha.update(f"{name}\0".encode() + bytes(self[name].tolist()))
        return sha.hexdigest()

    def keep(self, groups: Sequence[ChannelGroup]) -> Keep:
        """What stays of every tensor the groups run through."""
        found: Keep = {}
        for name, places in by_tensor(groups).items():
            for dim in sorted({dim for _, _, dim in places}):
                live = [self._live(group, part.units) for group, part, at in places if at == dim]
                whole = torch.stack(live).all(0)
                if not bool(whole.all()):
                    found.setdefault(name, {})[dim] = torch.nonzero(whole).squeeze(1)
        return found

    def _live(self, group: ChannelGroup, units: object) -> torch.Tensor:
        number = torch.as_tensor(units)
        mask = self.get(group.name)
        return torch.ones(len(number), dtype=torch.bool) if mask is None else mask[number.clamp(min=0)] | (number < 0)

    def parameters(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, torch.Tensor]:
        """Bool masks of every parameter with a dead entry: rows, biases, norm scales and shifts, columns."""
        named, found = dict(bare(model).named_parameters()), {}
        for name, dims in self.keep(groups).items():
            if name in named:
                found[name] = _outer(named[name].shape, dims)
        return found

    def masks(self, model: nn.Module, groups: Sequence[ChannelGroup], within: Masks | None = None) -> Masks:
        """The prunable weights that live, as `Masks` of `model`; `within` removes single weights besides."""
        dead = self.parameters(model, groups)
        own = Masks.dense(model) if within is None else within
        return Masks({name: mask & dead[name] if name in dead else mask for name, mask in own.items()})

    def others(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, torch.Tensor]:
        """Bool masks of what is held at 0.0 beside prunable weights: biases, norm scales and shifts, layer scales."""
        prunable = prunable_parameters(model)
        return {name: mask for name, mask in self.parameters(model, groups).items() if name not in prunable}

    @torch.no_grad()
    def apply_(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Fill everything that belongs to dead units with 0.0, in place; running statistics stay as they are."""
        named = dict(bare(model).named_parameters())
        for name, mask in self.parameters(model, groups).items():
            named[name].masked_fill_(~mask.to(named[name].device), 0.0)


def _outer(shape: torch.Size, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, index in dims.items():
        line = torch.zeros(shape[dim], dtype=torch.bool)
        line[index] = True
        mask &= line.view([-1 if at == dim else 1 for at in range(len(shape))])
    return mask
