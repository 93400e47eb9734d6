"""Time and memory of one network, on the device it is on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from utils.training import precision

REPEATS = 5


def measure(
    model: nn.Module, input_shape: tuple[int, int, int], batch_size: int, dtype: torch.dtype, optimizer_states: int = 1
) -> dict[str, float]:
    """`train_seconds_per_image`, `seconds_per_image` and `peak_memory_mb` of a bare model; weights stay as they are.

    Medians of a few runs on made-up images, forward and backward without an optimizer's step. Memory (MB of 1e6 bytes)
    is, on a GPU, what the allocator held at the peak of a step; on a CPU, which keeps no such account, weights, their
    gradients, `optimizer_states` copies of them and the tensors autograd saved for the backward pass.
    """
    device = next(model.parameters()).device
    images = torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            memory = peak_megabytes(model.train(), images, dtype, optimizer_states)
            train = _seconds(lambda: _train_step(model, images, dtype), device)
            inference = _seconds(lambda: _infer(model.eval(), images, dtype), device)
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return {
        "train_seconds_per_image": train / batch_size,
        "seconds_per_image": inference / batch_size,
        "peak_memory_mb": memory,
    }


def _train_step(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
    with precision.autocast(images.device, dtype):
        out = model(images)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    loss = functional.cross_entropy(out.float(), labels)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)


@torch.no_grad()
def _infer(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
    with precision.autocast(images.device, dtype):
        model(images)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_megabytes(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, states: int) -> float:
    """Memory of a training step at its peak, as `measure` says; gradients are left as they were."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        _train_step(model, images, dtype)
        return (torch.cuda.max_memory_allocated(images.device) + states * weights) / 1e6
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _train_step(model, images, dtype)
    activations = sum(size for pointer, size in saved.items() if pointer not in own)
    return (activations + (2 + states) * weights) / 1e6
