"""Wrapping a model for training: memory format, DistributedDataParallel, torch.compile."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from utils import params
from utils.system.distributed import World, active
from utils.system.errors import UserError

# torch 2.13 renamed the option and warns about the old name.
_NO_BUFFER_BROADCAST: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


def to_channels_last(model: nn.Module) -> None:
    """Put convolution weights into NHWC order, in place.

    The strides of 1x1 weights are ambiguous: they are given those that the convolution's own gradient has, for DDP
    copies every gradient whose strides are not the weight's.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = torch.empty_like(parameter, memory_format=torch.channels_last).copy_(parameter.data)


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with BatchNorm statistics over all ranks at every step; state_dict keys stay. One process: as it is.

    Raises UserError on a CPU, for which torch has no such layer.
    """
    if device.type != "cuda":
        raise UserError("distributed.sync_batchnorm=true needs GPUs; set it to false on CPUs")
    if not active():
        return model
    from timm.layers import convert_sync_batchnorm  # torch's own does not know timm's norm-and-activation layers

    converted: nn.Module = convert_sync_batchnorm(model)
    return converted


def wrap(model: nn.Module, section: params.Distributed, device: torch.device) -> nn.Module:
    """The module whose forward the trainer calls: the model in DDP when there is a process group.

    Every rank must hold the same weights already; nothing is broadcast, neither here nor per step.
    """
    if active():
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            **_NO_BUFFER_BROADCAST,
            gradient_as_bucket_view=True,
            find_unused_parameters=section.find_unused_parameters,
            init_sync=False,
        )
    return model


def warm(wrapped: nn.Module, bare: nn.Module, backward: Callable[[nn.Module], None], world: World) -> None:
    """Let DDP settle its gradient buckets: one dummy forward and backward that leaves no trace.

    DDP reorders its buckets after its first backward pass, which changes the order of sums on three or more ranks.
    Done here, every optimizer step of a fresh process adds as the steps of one that has run for days. Buffers,
    gradients, RNG and training mode are as before.
    """
    if world.size == 1 or not active():
        return
    buffers = {name: b.clone() for name, b in bare.named_buffers()}
    training = bare.training
    with _rng_kept():
        for _ in range(2):  # buckets are rebuilt by the forward after the first backward
            wrapped.train()
            backward(wrapped)
            for parameter in bare.parameters():
                parameter.grad = None
    with torch.no_grad():
        for name, b in bare.named_buffers():
            b.copy_(buffers[name])
    wrapped.train(training)


@contextlib.contextmanager
def _rng_kept() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield
