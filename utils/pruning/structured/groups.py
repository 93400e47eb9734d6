"""Channel groups: which rows and columns of which tensors make up one removable channel.

A group is a set of layers whose widths change together; its units are what can be removed one by one. Usually a unit is
one channel: the rows of every layer that writes it (several, where a residual sum ties them), their biases, the norm
entries behind them and the columns of every layer that reads it. A grouped convolution goes by whole convolution groups
(a depthwise one by channels), a linear layer behind a flattened map by all positions of the channel, attention of
timm's `Attention` by heads.

Groups that cannot be shrunk without changing the function, or not at all, are protected, each with a reason.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from utils.masks import bare
from utils.pruning.structured._graph import IN, OUT, PARAMETER, Coupled, trace
from utils.system.errors import UserError
from utils.system.registry import nearest

WRITE, READ, NORM, SCALE, THROUGH = "write", "read", "norm", "scale", "through"

COUPLED, EXCLUDED = "several layers write it", "excluded"
"""Why a group stays whole that could be pruned: by `coupled=False` and by the user's globs."""

_PER_CHANNEL = (_BatchNorm, _InstanceNorm)
_SPREADING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


@dataclass(frozen=True, eq=False)
class Part:
    """One dimension of the tensors of one module that a group runs along.

    module    name of the module ("" where `tensors` are bare parameters of the model)
    role      write (rows of a layer), read (columns), norm, scale (a bare parameter), through (the inputs of a grouped
              convolution, which has no column of its own for them)
    tensors   full names of parameters and buffers, with the dimension each
    units     int64 [size of the dimension]: the unit an entry belongs to, -1 for none of this group's
    """

    module: str
    role: str
    tensors: tuple[tuple[str, int], ...]
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Layers whose widths change together.

    name       of its first layer in the model's order that writes the channels
    size       number of units
    parts      everything that belongs to them
    protected  why it must stay whole; None where it may be pruned
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    protected: str | None = None

    def of(self, *roles: str) -> list[Part]:
        """The parts with one of `roles`."""
        return [part for part in self.parts if part.role in roles]

    @property
    def single(self) -> bool:
        """Whether one layer alone makes it, depthwise ones behind it aside: no residual sum runs through it."""
        return len(self.writers) <= 1

    @property
    def writers(self) -> list[str]:
        """Layers that make the channels rather than pass them on, in the model's order."""
        passing = {part.module for part in self.of(THROUGH)}
        return [part.module for part in self.of(WRITE) if part.module not in passing]


def channel_groups(
    model: nn.Module, input_shape: tuple[int, int, int], exclude: Sequence[str] = (), name: str = "the model"
) -> tuple[ChannelGroup, ...]:
    """All groups of `model`, in the model's order of layers; protected ones carry their reason.

    input_shape: (channels, height, width) of an image. exclude: globs over group names (a group goes by its first
    layer), which stay whole. The model is left as it is. Raises UserError, naming the model, when its channels cannot
    be followed, when no group is left to prune, and for a glob that matches nothing.
    """
    model = bare(model)
    like = next(model.parameters())
    example = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        found = _Builder(model, trace(model, example)).groups()
    except UserError as error:
        raise UserError(f"structured pruning of {name}: {error}") from error
    groups = exclude_groups(found, exclude)
    if not any(group.protected is None for group in groups):
        reasons = Counter(group.protected for group in groups if group.protected).most_common(1)
        why = reasons[0][0] if reasons else "it has no layer whose output channels another layer reads"
        raise UserError(f"structured pruning of {name}: no channels can be removed ({why})")
    return groups


def exclude_groups(groups: Sequence[ChannelGroup], exclude: Sequence[str]) -> tuple[ChannelGroup, ...]:
    """`groups`, those that a glob of `exclude` matches protected. Raises UserError for a glob that matches none."""
    names = [group.name for group in groups]
    for glob in exclude:
        if not fnmatch.filter(names, glob):
            raise UserError(f"structured.exclude: {glob!r} matches no group of channels{nearest(glob, names)}")
    return tuple(
        replace(group, protected=group.protected or EXCLUDED)
        if any(fnmatch.fnmatchcase(group.name, glob) for glob in exclude)
        else group
        for group in groups
    )


Place = tuple[str, str]
"""(module or parameter, side)."""


class _Builder:
    """Joins what is coupled, channel by channel, and sorts the result into groups."""

    def __init__(self, model: nn.Module, coupled: list[Coupled]) -> None:
        self.modules = dict(model.named_modules())
        self.order = {name: number for number, name in enumerate(self.modules)}
        self.parameters = dict(model.named_parameters())
        self.tensors = self.parameters | dict(model.named_buffers())
        self.coupled = coupled
        self.dims: dict[Place, int] = {}
        self.offset: dict[Place, int] = {}
        self.nodes = 0
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.outputs: set[Place] = set()
        self.misread: dict[Place, str] = {}

    def groups(self) -> tuple[ChannelGroup, ...]:
        for one in self.coupled:
            start = self._nodes((one.root, OUT))
            for link in one.links:
                place = (link.name, link.side)
                self.dims[place] = link.dim
                size = self._size(place)
                if size == 1 and isinstance(self.modules.get(link.name), nn.PReLU):
                    continue  # one slope for all channels
                whole = self._size((one.root, OUT))
                if one.output:
                    self.outputs.add(place)
                odd = _outside((link.name, link.index, size), (one.root, link.root, whole))
                if odd is None:
                    self.edges.append((start + link.root, self._nodes(place) + link.index))
                else:  # which channels go together is not known, so those of both stay
                    self.misread |= {place: odd, (one.root, OUT): odd}
        self._join_within_modules()
        found = [self._group(units) for units in self._sorted_units()]
        found.sort(key=lambda group: self.order.get(group.name, -1))
        # A layer whose channels go separate ways (a split) is the first writer of several groups.
        seen: Counter[str] = Counter()
        for number, group in enumerate(found):
            seen[group.name] += 1
            if seen[group.name] > 1:
                found[number] = replace(group, name=f"{group.name}#{seen[group.name]}")
        return tuple(found)

    def _nodes(self, place: Place) -> int:
        """First number of the nodes of `place`, one per channel."""
        if place not in self.offset:
            self.offset[place] = self.nodes
            self.nodes += self._size(place)
        return self.offset[place]

    def _size(self, place: Place) -> int:
        name, side = place
        if side == PARAMETER:
            return self.parameters[name].shape[self.dims.get(place, 0)]
        module = self.modules[name]
        if isinstance(module, _ConvNd):
            return module.out_channels if side == OUT else module.in_channels
        if isinstance(module, nn.Linear):
            return module.out_features if side == OUT else module.in_features
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim
        return next(p.shape[-1] for p in [*module.parameters(), *module.buffers()] if p.dim())

    def _join_within_modules(self) -> None:
        for name, module in self.modules.items():
            if isinstance(module, _ConvNd) and module.groups > 1 and (name, OUT) in self.offset:
                self._join_convolution_groups(name, module)
            if _has_heads(module) and (f"{name}.qkv", OUT) in self.offset:
                self._join_heads(name, module)

    def _join_convolution_groups(self, name: str, module: _ConvNd) -> None:
        """A convolution group's inputs and outputs go together, so that those left keep their shape."""
        for side, size in ((OUT, module.out_channels), (IN, module.in_channels)):
            start, each = self._nodes((name, side)), size // module.groups
            first = np.arange(module.groups) * (module.out_channels // module.groups) + self._nodes((name, OUT))
            self.edges.append((np.repeat(first, each), start + np.arange(size)))

    def _join_heads(self, name: str, module: nn.Module) -> None:
        """Queries, keys, values and what the projection reads of one head."""
        heads, width = int(module.num_heads), int(module.attn_dim)  # type: ignore[arg-type]
        first = np.repeat(np.arange(heads) * (width // heads), width // heads)
        start, columns = self._nodes((f"{name}.qkv", OUT)), self._nodes((f"{name}.proj", IN))
        for third in range(3):
            self.edges.append((start + first, start + third * width + np.arange(width)))
        self.edges.append((start + first, columns + np.arange(width)))

    def _sorted_units(self) -> Iterator[list[dict[Place, np.ndarray]]]:
        """The units of each group: per place the channels of a unit, rising; units in the order of their channels."""
        heads, tails = (np.concatenate(ends) for ends in zip(*self.edges, strict=True))
        # Here, not above: every run imports this module, and scipy's graphs take a third of a second.
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        graph = coo_matrix((np.ones(len(heads)), (heads, tails)), shape=(self.nodes, self.nodes))
        _, label = connected_components(graph, directed=False)
        units: dict[int, dict[Place, np.ndarray]] = {}
        for place, start in self.offset.items():
            own = label[start : start + self._size(place)]
            for unit in np.unique(own):
                units.setdefault(int(unit), {})[place] = np.flatnonzero(own == unit)
        groups: dict[frozenset[Place], list[dict[Place, np.ndarray]]] = {}
        for unit_places in units.values():
            groups.setdefault(frozenset(unit_places), []).append(unit_places)
        for places, members in groups.items():
            first = min(places, key=lambda place: (place[1] != OUT, self.order.get(place[0], -1)))
            yield sorted(members, key=lambda unit: int(unit[first][0]))

    def _group(self, units: list[dict[Place, np.ndarray]]) -> ChannelGroup:
        parts = []
        for place in sorted(units[0], key=lambda place: (self.order.get(place[0], -1), place[1])):
            number = np.full(self._size(place), -1, dtype=np.int64)
            for index, unit in enumerate(units):
                number[unit[place]] = index
            parts.append(self._part(place, number))
        writers = [part.module for part in parts if part.role == WRITE]
        name = writers[0] if writers else (parts[0].module or parts[0].tensors[0][0])
        return ChannelGroup(name, len(units), tuple(parts), self._reason(set(units[0]), parts, units))

    def _part(self, place: Place, units: np.ndarray) -> Part:
        name, side = place
        if side == PARAMETER:
            return Part("", SCALE, ((name, self.dims[place]),), units)
        module, prefix = self.modules[name], f"{name}." if name else ""
        if isinstance(module, (_ConvNd, nn.Linear)):
            if side == IN:
                grouped = isinstance(module, _ConvNd) and module.groups > 1
                return Part(name, THROUGH if grouped else READ, () if grouped else ((f"{prefix}weight", 1),), units)
            rows = [(f"{prefix}{leaf}", 0) for leaf in ("weight", "bias") if f"{prefix}{leaf}" in self.tensors]
            return Part(name, WRITE, tuple(rows), units)
        own = [leaf for leaf, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.dim()]
        return Part(name, NORM, tuple((f"{prefix}{leaf}", 0) for leaf in own), units)

    def _reason(self, places: set[Place], parts: list[Part], units: list[dict[Place, np.ndarray]]) -> str | None:
        """Why the group must stay whole."""
        modules = {part.module: self.modules[part.module] for part in parts if part.module}
        if places & self.outputs:
            return "it is the output of the model"
        for place in sorted(places & self.misread.keys()):
            return self.misread[place]
        for name, module in modules.items():
            if isinstance(module, _SPREADING):
                return f"{type(module).__name__} {name} takes statistics over its channels"
            if isinstance(module, nn.MultiheadAttention):
                return f"nn.MultiheadAttention {name} has a fixed width"
            if isinstance(module, _ConvTransposeNd):
                return f"{name} is a transposed convolution"
            if not isinstance(module, (_ConvNd, nn.Linear, nn.PReLU, *_PER_CHANNEL)):
                return f"{type(module).__name__} {name} is not a layer that can be made narrower"
        if not any(part.role == WRITE for part in parts):
            return "no layer writes it"
        if not any(part.role == READ for part in parts):
            return "no layer reads it"
        if len(units) < 2:
            return "it has a single unit"
        return None


def _outside(*indices: tuple[str, np.ndarray, int]) -> str | None:
    """What is wrong with channels by (layer, indices, how many it has); None where all exist."""
    for name, index, limit in indices:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < limit:
            return f"the graph counts other channels of {name} than its {limit}"
    return None


def _has_heads(module: nn.Module) -> bool:
    """Whether `module` is attention of timm's plain form, whose forward pass reads num_heads and attn_dim."""
    try:
        from timm.layers import Attention
    except ImportError:  # timm before 1.0.20
        return False
    return type(module) is Attention and hasattr(module, "attn_dim") and module.gate is None


def by_tensor(groups: Sequence[ChannelGroup]) -> Mapping[str, list[tuple[ChannelGroup, Part, int]]]:
    """The groups, parts and dimensions that run through each tensor, by the tensor's name."""
    found: dict[str, list[tuple[ChannelGroup, Part, int]]] = {}
    for group in groups:
        for part in group.parts:
            for name, dim in part.tensors:
                found.setdefault(name, []).append((group, part, dim))
    return found
