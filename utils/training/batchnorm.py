"""BatchNorm statistics over ranks: each rank's own within an epoch, their average at its end."""

from __future__ import annotations

import torch
from torch import nn

from utils.system.distributed import active, mean_over_ranks


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances of a bare model, by buffer name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module.named_buffers(recurse=False)
        if name in ("running_mean", "running_var")
    }


@torch.no_grad()
def averaged_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """New tensors: the running statistics averaged over all ranks, in one reduction; the model stays as it is."""
    own = running_statistics(model)
    if not own or not active():
        return {name: buffer.clone() for name, buffer in own.items()}
    flat = mean_over_ranks(torch.cat([buffer.reshape(-1).float() for buffer in own.values()]))
    parts = flat.split([buffer.numel() for buffer in own.values()])
    return {name: part.view_as(own[name]).to(own[name].dtype) for name, part in zip(own, parts, strict=True)}


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Put the average over ranks into every rank's model."""
    if active():
        own = running_statistics(model)
        for name, value in averaged_statistics(model).items():
            own[name].copy_(value)
