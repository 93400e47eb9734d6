"""Scoring leaves the model bitwise as it was: what can change is put back, what must not change is checked."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.pruning.criteria._flow import replaced


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that the body leaves every parameter of `model` bitwise alone; RuntimeError names the first that differs.

    They are compared by digest, which costs no copy of them but reads them twice: one guard does for all the rounds of
    a pruning. Nothing is compared after an error.
    """
    before = _digests(model)
    yield
    after = _digests(model)
    if after != before:
        changed = [name for name in before if after.get(name) != before[name]] or sorted(after.keys() - before.keys())
        raise RuntimeError(f"scoring changed parameter {changed[0]!r}; a criterion must leave the model as it found it")


@contextlib.contextmanager
def preserved(model: nn.Module, batchnorm: str) -> Iterator[None]:
    """Run the body on `model` in eval mode, BatchNorm in the mode named, gradients cleared; then restore everything.

    Gradients, requires_grad, buffers, training flags and the random states of torch, numpy and Python are put back,
    also after an error. Parameters must not change: `unchanged` checks that. SyncBatchNorm takes the statistics of this
    rank's batch alone. batchnorm: `eval`, `train`, or `none`, which leaves all training flags alone.
    """
    flags = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None]
    with _random_states(model):
        try:
            for parameter, _, _ in grads:
                parameter.grad = None
            _set_modes(model, batchnorm)
            with replaced([(m, _local(m)) for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]):
                yield
        finally:
            for module, training in flags:
                module.training = training
            for parameter, grad, requires_grad in grads:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            _restore_buffers(buffers)


def _local(module: nn.SyncBatchNorm) -> Callable[..., torch.Tensor]:
    """What `module` computes on one rank: ranks score different micro-batches, or none, and must not wait in it."""

    def forward(images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _BatchNorm.forward(module, images)
        for name in ("drop", "act"):  # timm's has its activation within
            if isinstance(part := getattr(module, name, None), nn.Module):
                found = part(found)
        return found

    return forward


def _set_modes(model: nn.Module, batchnorm: str) -> None:
    if batchnorm == "none":
        return
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(batchnorm == "train")


@torch.no_grad()
def _restore_buffers(buffers: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]) -> None:
    for module, key, buffer, saved in buffers:
        buffer.copy_(saved)
        module._buffers[key] = buffer


@contextlib.contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is the point
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _digests(model: nn.Module) -> dict[str, bytes]:
    """SHA-256 of the bytes of every parameter in the order of its memory, and its strides, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        widest_first = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
        flat = parameter.detach().permute(widest_first).cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(flat.numpy()).digest()  # type: ignore[arg-type]
        found[name] = digest + repr(parameter.stride()).encode()
    return found
