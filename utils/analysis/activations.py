"""What comes out of every activation of a network: how much of it is near zero, dead channels, mean and spread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.system import atomic
from utils.system.errors import UserError
from utils.tasks import Batch
from utils.training.recipe.soft import Blend, Swish

_SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin, nn.MultiheadAttention)
_KINDS = tuple(
    kind
    for kind in vars(nn.modules.activation).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module and kind not in _SOFTMAX
)
COLUMNS = ("layer", "call", "kind", "channels", "values", "near_zero", "dead_channels", "mean", "sd")


@dataclass
class _Sums:
    kind: str
    values: int
    near: Tensor
    total: Tensor
    square: Tensor
    largest: Tensor


@torch.no_grad()
def activation_rows(model: nn.Module, batches: Iterable[Batch], near: float = 0.01) -> list[dict[str, Any]]:
    """A row per activation module and call of it, in the order they run, over all images of `batches`.

    near_zero: share of values with |a| <= near. dead_channels: channels (second dimension) that are 0.0 for every image
    and place. mean and sd (over all values, not corrected) in float64. The model is run as it is (give it in
    eval mode). Raises UserError for a network without activation modules or without images.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[tuple[str, int], _Sums] = {}
    calls: dict[str, int] = {}

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        name = names[id(module)]
        calls[name] = calls.get(name, -1) + 1
        _add(found, (name, calls[name]), module, out.detach(), near)

    modules = [module for module in model.modules() if isinstance(module, (*_KINDS, Swish, Blend))]
    if not modules:
        raise UserError(f"{type(model).__name__} has no activation modules to look at")
    hooks = [module.register_forward_hook(look) for module in modules]
    try:
        for images, _ in batches:
            calls.clear()
            if len(images):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserError("there are no images to look at")
    return [_row(key, sums) for key, sums in found.items()]


def _add(
    found: dict[tuple[str, int], _Sums], key: tuple[str, int], module: nn.Module, out: Tensor, near: float
) -> None:
    """Add what one call returned to its sums, on the device."""
    wide = out.double()
    channels = out.abs().amax([d for d in range(out.dim()) if d != 1])
    if key not in found:
        zero = torch.zeros((), dtype=torch.float64, device=out.device)
        found[key] = _Sums(type(module).__name__, 0, zero.clone(), zero.clone(), zero.clone(), channels.clone())
    sums = found[key]
    sums.values += out.numel()
    sums.near += (out.abs() <= near).sum()
    sums.total += wide.sum()
    sums.square += wide.square().sum()
    sums.largest = torch.maximum(sums.largest, channels)


def _row(key: tuple[str, int], sums: _Sums) -> dict[str, Any]:
    mean = float(sums.total) / sums.values
    return {
        "layer": key[0],
        "call": key[1],
        "kind": sums.kind,
        "channels": sums.largest.numel(),
        "values": sums.values,
        "near_zero": float(sums.near) / sums.values,
        "dead_channels": int((sums.largest == 0).sum()),
        "mean": mean,
        "sd": max(float(sums.square) / sums.values - mean**2, 0.0) ** 0.5,
    }


def plot_activations(rows: list[dict[str, Any]], out: Path) -> Path:
    """Near-zero share and share of dead channels along the network, into the image `out`; returns its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 0.25 * len(rows)), 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.plot(places, [row["near_zero"] for row in rows], marker="o", markersize=3, label="near zero, share of values")
    dead = [row["dead_channels"] / row["channels"] for row in rows]
    axes.plot(places, dead, marker="s", markersize=3, label="dead, share of channels")
    axes.set_xticks(list(places), [f"{row['layer']}:{row['call']}" for row in rows], rotation=90, fontsize="x-small")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")
    with atomic.replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix.lower().lstrip(".") or "png")
    return out
