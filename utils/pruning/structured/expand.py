"""Other widths for a stock network: those a mask leaves, and those of a network made wider before it is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from utils.masks import bare
from utils.models.widths import Widths
from utils.pruning.structured.groups import COUPLED, EXCLUDED, ChannelGroup
from utils.system.errors import UserError


def widths_of(model: nn.Module, groups: Sequence[ChannelGroup], units: Mapping[str, int]) -> Widths:
    """What `model` must be built with so that its groups have `units` units; a group without an entry keeps its own."""
    numbers: dict[str, dict[str, int]] = {}
    shapes: dict[str, list[int]] = {}
    modules, parameters = dict(bare(model).named_modules()), dict(bare(model).named_parameters())
    for group in groups:
        more = units.get(group.name, group.size) - group.size
        if not more:
            continue
        for part in group.parts:
            entries = int((part.units >= 0).sum()) // group.size * more
            if part.module:
                own = numbers.setdefault(part.module, {})
                name = _attribute(modules[part.module], part.role)
                own[name] = own.get(name, int(getattr(modules[part.module], name))) + entries
            for name, dim in part.tensors if not part.module else ():
                shapes.setdefault(name, list(parameters[name].shape))[dim] += entries
    for name, own in numbers.items():
        module: Any = modules[name]
        if isinstance(module, _ConvNd) and module.groups > 1 and "out_channels" in own:
            own["groups"] = own["out_channels"] // (module.out_channels // module.groups)
    for name, module in modules.items():
        if hasattr(module, "attn_dim") and "in_features" in (proj := numbers.get(f"{name}.proj", {})):
            width = proj["in_features"]
            numbers[name] = {"attn_dim": width, "num_heads": width // module.head_dim}
    return Widths(numbers, {name: tuple(shape) for name, shape in shapes.items()})


def _attribute(module: nn.Module, role: str) -> str:
    reads = role in ("read", "through")
    if isinstance(module, _ConvNd):
        return "in_channels" if reads else "out_channels"
    if isinstance(module, nn.Linear):
        return "in_features" if reads else "out_features"
    return "num_features" if isinstance(module, _NormBase) else "num_parameters"


def expanded_units(
    model: nn.Module, groups: Sequence[ChannelGroup], first_width: int | None, multiplier: float
) -> dict[str, int]:
    """Units of every group of the network made wider, as Pruning from Scratch does.

    first_width: the first convolution's; channels that one layer alone writes grow by its ratio to the stock width.
    multiplier: of the backbone: channels that several layers write (residual streams), and groups the user excluded.
    Groups protected for other reasons keep their size. Raises UserError for a width below the stock one.
    """
    base = next((m.out_channels for m in bare(model).modules() if isinstance(m, _ConvNd)), 0)
    if first_width is not None and first_width < base:
        raise UserError(f"structured.expansion={first_width}: the first layer is {base} wide already; raise it")
    ratio = 1.0 if first_width is None else first_width / base
    units = {}
    for group in groups:
        if group.protected in (None, COUPLED, EXCLUDED):
            factor = ratio if group.single and group.protected is None else multiplier
            units[group.name] = int(group.size * factor + 0.5)
    return units
