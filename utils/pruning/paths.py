"""Collapse: which kept weights lie on a path from input to output, and whether any path is left.

A kept weight no path runs through cannot change the output; the effective density leaves those out. Paths are found by
one differentiation: with positive weights at the kept places, zeros at the pruned ones, no biases and no norms, the
derivative of the summed outputs with respect to a weight is a sum of positive products, one for each path through it,
hence nonzero exactly if there is such a path. The values do not matter for that, so they are chosen to be harmless:

    random in [0.5, 1)       attention's derivatives vanish when all tokens are alike
    rows sum to 1/8          activations neither grow through residual sums nor saturate gates, and what a layer takes
                             from float64's range (2^-1022) is little: even 300 layers without shortcut fit in
    max pooling averages     otherwise only the maximum's path would count

Other parameters (embeddings, layer scales) are positive constants, that is, present.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.data.stateless import derive
from utils.masks import Masks, bare, filled, pieces, prunable_parameters
from utils.pruning.criteria._flow import flow, is_bias, neutral, ones, replaced
from utils.system.errors import UserError

_ROW_SUM = 1 / 8
_SHOWN = 5


@dataclass(frozen=True)
class Effective:
    """What a mask is worth.

    masks: the kept weights that lie on a path; total: prunable weights; dead: parameters without a kept weight;
    connected: whether the output depends on the input.
    """

    masks: Masks
    total: int
    dead: tuple[str, ...]
    connected: bool

    @property
    def counts(self) -> dict[str, int]:
        """Kept weights on a path, per parameter."""
        return self.masks.counts

    @property
    def density(self) -> float:
        """Effective density: kept weights on a path / prunable weights; 1.0 where nothing is prunable."""
        return self.masks.density


def effective(model: nn.Module, masks: Masks, input_shape: tuple[int, int, int] | None) -> Effective:
    """Follow the paths that `masks` leave in `model` for images of `input_shape` (channels, height, width).

    Weights that meet nothing but zero padding at this image size are on no path. The model, its gradients, buffers and
    flags stay as they are. Raises UserError without a shape and for networks that do not return one tensor.
    """
    model = bare(model)
    masks.check(model)
    image = ones(model, input_shape, "the search for paths")
    image = image.mul_(_random(image, "input")).requires_grad_()
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor, gradient: Tensor) -> None:
        on_path = torch.empty_like(gradient, dtype=torch.bool)
        for reached, along, weight in pieces(on_path, gradient, value):
            torch.logical_and(along, weight, out=reached)
        found[name] = on_path.cpu()

    with torch.no_grad():
        values = _values(model, masks)
    for name in masks:
        values[name].requires_grad_()
    with neutral(model), replaced(list(_pools(model))):
        total = flow(model, values, image, keep)
    if not total.isfinite():
        raise RuntimeError("the search for paths overflowed; is there a layer that is neither norm nor positive?")
    on_path = Masks({name: found.get(name, torch.zeros_like(mask)) for name, mask in masks.items()})
    connected = image.grad is not None and bool(image.grad.count_nonzero())
    return Effective(on_path, masks.total, _dead(masks), connected)


def check_connected(found: Effective, masks: Masks) -> None:
    """Raise UserError, naming the layers that `masks` empty, unless a path is left from input to output."""
    if found.connected:
        return
    dead = _dead(masks)
    more = f" and {len(dead) - _SHOWN} more" if len(dead) > _SHOWN else ""
    emptied = f"emptied: {', '.join(dead[:_SHOWN])}{more}" if dead else "though no layer is empty"
    raise UserError(
        f"pruning: no path is left from input to output ({emptied}); raise pruning.density, set pruning.min_kept, "
        "choose another criterion or allocation, or set pruning.allow_disconnected=true"
    )


def _dead(masks: Masks) -> tuple[str, ...]:
    return tuple(name for name, count in masks.counts.items() if count == 0 < masks[name].numel())


def _values(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Positive float64 values for every parameter, 0 at pruned places and in biases."""
    weights = prunable_parameters(model)
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if is_bias(name):
            values[name] = torch.zeros_like(parameter, dtype=torch.float64)
            continue
        values[name] = value = _random(parameter, name)
        kept = masks[name].to(value.device) if name in masks else None
        normalised = name in weights and value.ndim > 1
        for part, live in pieces(value, value if kept is None else kept):
            if kept is not None:
                part.copy_(filled(part, live))
            if normalised:
                rows = part.view(len(part), -1)
                sums = rows.sum(1, keepdim=True)
                rows.mul_(torch.where(sums > 0, _ROW_SUM / sums, 0.0))
    return values


def _random(like: Tensor, name: str) -> Tensor:
    """Float64 in [0.5, 1), a function of the name and the shape, contiguous on the device of `like`."""
    generator = torch.Generator().manual_seed(derive("paths", name))
    value = torch.empty(like.shape, dtype=torch.float64)
    for (part,) in pieces(value):
        part.copy_(torch.rand(part.shape, generator=generator)).add_(1.0).mul_(0.5)
    return value.to(like.device)


def _pools(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Averages to put in the place of max pooling layers (those without dilation and indices)."""
    for module in model.modules():
        if type(module) is nn.MaxPool2d and module.dilation in (1, (1, 1)) and not module.return_indices:
            average = nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            yield module, average.forward
        elif isinstance(module, nn.AdaptiveMaxPool2d) and not module.return_indices:
            yield module, functools.partial(functional.adaptive_avg_pool2d, output_size=module.output_size)
