"""Taking dead channels out: a smaller dense model, its optimizer state, and the masks of the weights that are left.

With dead units held at 0.0 the two compute the same: every layer that reads a dead channel does so through columns that
are 0.0, so neither outputs nor the gradients of what is left depend on it, in eval mode and in training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from utils.masks import Masks, bare
from utils.pruning.structured.groups import ChannelGroup
from utils.pruning.structured.mask import ChannelMask, Keep
from utils.system.errors import UserError


def shrink(model: nn.Module, groups: Sequence[ChannelGroup], mask: ChannelMask) -> nn.Module:
    """A copy of the bare `model` without the dead units of `mask`; gradients are not copied.

    `groups` are the model's. Raises UserError for a tensor that two modules share and that would change.
    """
    keep = mask.keep(groups)
    _refuse_tied(bare(model), keep)
    smaller = copy.deepcopy(bare(model))
    with torch.no_grad():
        for name, tensor in [*smaller.named_parameters(), *smaller.named_buffers()]:
            if name in keep:
                _put(smaller, name, selected(tensor, keep[name]), tensor)
    _settle(smaller)
    return smaller


def selected(tensor: torch.Tensor, dims: dict[int, torch.Tensor]) -> torch.Tensor:
    """`tensor` with the entries of `dims` alone, in its own memory format."""
    found = tensor.detach()
    for dim, index in dims.items():
        found = found.index_select(dim, index.to(found.device))
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return found.contiguous(memory_format=torch.channels_last) if last else found.contiguous()


def _put(model: nn.Module, name: str, value: torch.Tensor, old: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value.clone(), requires_grad=old.requires_grad))
    else:
        owner._buffers[leaf] = value.clone()


def _refuse_tied(model: nn.Module, keep: Keep) -> None:
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(p), name)
        if first != name and (first in keep or name in keep):
            raise UserError(f"structured pruning: {first!r} and {name!r} are one tensor, which cannot be made narrower")


def _settle(model: nn.Module) -> None:
    """Make the numbers modules keep about themselves those of their tensors."""
    for module in model.modules():
        if isinstance(module, _ConvNd):
            each = module.out_channels // module.groups
            module.out_channels = module.weight.shape[0]
            if module.groups > 1:
                module.groups = module.out_channels // each
            module.in_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, (_BatchNorm, _InstanceNorm)) and (size := _norm_size(module)) is not None:
            module.num_features = size
        elif isinstance(module, nn.PReLU):
            module.num_parameters = module.weight.numel()
    for module in model.modules():
        settle_heads(module)


def _norm_size(module: Any) -> int | None:
    known = [t for t in (module.weight, module.running_mean) if t is not None]
    return len(known[0]) if known else None


def settle_heads(module: nn.Module) -> None:
    """Give timm's `Attention` the number of heads its projections have."""
    attention: Any = module
    if all(hasattr(attention, name) for name in ("attn_dim", "head_dim", "proj")):
        width = attention.proj.in_features
        if width != attention.attn_dim:
            attention.attn_dim, attention.num_heads = width, width // attention.head_dim


def shrink_masks(masks: Masks, keep: Keep) -> Masks:
    """The masks of the weights that are left: structured first, then unstructured."""
    return Masks({name: selected(mask, keep[name]) if name in keep else mask for name, mask in masks.items()})


def enlarge_masks(masks: Masks, keep: Keep, like: Masks) -> Masks:
    """The other way round: masks of the smaller model as masks of the whole one, `like` its masks by name and shape.

    What is not left is False; entries of `like` that `masks` lack stay as they are.
    """
    found = {}
    for name, whole in like.items():
        if name not in masks:
            found[name] = whole
            continue
        index = []
        for dim, size in enumerate(whole.shape):
            left = keep.get(name, {}).get(dim, torch.arange(size))
            index.append(left.view([-1 if at == dim else 1 for at in range(whole.dim())]))
        found[name] = torch.zeros_like(whole)
        found[name][tuple(index)] = masks[name]
    return Masks(found)


def shrink_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, smaller: nn.Module, keep: Keep) -> None:
    """Make `optimizer`, of `model`, that of `smaller`, in place: its state is sliced as the weights are."""
    new = dict(bare(smaller).named_parameters())
    names: dict[torch.Tensor, str] = {p: name for name, p in bare(model).named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [new[names[p]] for p in group["params"]]
    state, optimizer.state = optimizer.state, type(optimizer.state)(dict)
    for p, values in state.items():
        name = names[p]
        optimizer.state[new[name]] = {
            key: selected(value, keep[name]).clone()
            if name in keep and isinstance(value, torch.Tensor) and value.shape == p.shape
            else value
            for key, value in values.items()
        }
