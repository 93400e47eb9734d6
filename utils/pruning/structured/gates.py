"""Gates: one factor per unit, multiplied into the channels while the model runs.

At the `writer` they scale what a layer puts out, bias included, before any norm (SNAP and CroP score by their
derivative at 1). At the `norm` they follow the norm that takes that output directly (Pruning from Scratch learns them
there: gate x norm(conv(x)), then the activation); a writer without such a norm is gated itself. A norm of timm with its
activation inside is gated behind it, which is the same for ReLU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from utils.masks import bare
from utils.pruning.structured.groups import NORM, WRITE, ChannelGroup

Places = dict[str, list[tuple[str, np.ndarray]]]
"""Per module that is gated: group names, and the unit each of its output channels belongs to (-1: none)."""


def gate_places(
    model: nn.Module, groups: Sequence[ChannelGroup], at: str, input_shape: tuple[int, int, int] | None = None
) -> Places:
    """Where the gates of `groups` go. at: `writer` or `norm`; the latter needs the shape of an image to look."""
    behind: dict[str, str] = {}
    if at == "norm":
        assert input_shape is not None
        behind = _norms_behind(bare(model), groups, input_shape)
    places: Places = {}
    for group in groups:
        writers = set(group.writers)
        for part in group.of(WRITE):
            if part.module in writers:
                places.setdefault(behind.get(part.module, part.module), []).append((group.name, part.units))
    return places


@torch.no_grad()
def _norms_behind(model: nn.Module, groups: Sequence[ChannelGroup], shape: tuple[int, int, int]) -> dict[str, str]:
    """The norm that takes each writer's output as it is, by the writer's name."""
    modules = dict(model.named_modules())
    made: dict[int, tuple[str, torch.Tensor]] = {}
    behind: dict[str, str] = {}
    hooks: list[RemovableHandle] = []
    for group in groups:
        for name in group.writers:
            hooks.append(modules[name].register_forward_hook(_noting(made, name)))
        for part in group.of(NORM):
            hooks.append(modules[part.module].register_forward_pre_hook(_looking(made, behind, part.module)))
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(torch.zeros(1, *shape).to(next(model.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in flags:
            module.training = training
    return behind


def _noting(made: dict[int, tuple[str, torch.Tensor]], name: str):  # type: ignore[no-untyped-def]
    def hook(_: nn.Module, __: object, out: torch.Tensor) -> None:
        made[id(out)] = (name, out)  # held, so that its id is no other's

    return hook


def _looking(made: dict[int, tuple[str, torch.Tensor]], behind: dict[str, str], norm: str):  # type: ignore[no-untyped-def]
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if found := made.get(id(inputs[0])):
            behind.setdefault(found[0], norm)

    return hook


@contextlib.contextmanager
def gated(model: nn.Module, places: Places, gates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it the outputs of `places` are multiplied by `gates` ([units] by group name)."""
    handles = attach_gates(model, places, gates)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attach_gates(model: nn.Module, places: Places, gates: Mapping[str, torch.Tensor]) -> list[RemovableHandle]:
    """The same until the hooks returned are removed. Gates are looked up anew at every pass."""
    modules = dict(bare(model).named_modules())
    return [modules[name].register_forward_hook(_gating(entries, gates)) for name, entries in places.items()]


def _gating(entries: list[tuple[str, np.ndarray]], gates: Mapping[str, torch.Tensor]):  # type: ignore[no-untyped-def]
    indices = [(name, torch.as_tensor(units)) for name, units in entries]

    def hook(module: nn.Module, _: object, out: torch.Tensor) -> torch.Tensor:
        dim = out.dim() - 1 if isinstance(module, nn.Linear) else 1
        for name, units in indices:
            gate = torch.cat([gates[name], gates[name].new_ones(1)])  # -1 is the last: not gated
            shape = [-1 if at == dim else 1 for at in range(out.dim())]
            out = out * gate[units.to(gate.device)].view(shape).to(out.dtype)
        return out

    return hook
