"""The most images a second that a device's memory allows a network's training, and the memory's speed itself.

A training step on a GPU waits for memory more than for arithmetic. With everything elementwise fused into its
neighbours, a training image still moves the bytes that NETWORKS states, so no such step is faster than

    bandwidth (bytes read and written per second) / bytes per image

The bandwidth is measured on the device at hand, by copying a tensor that no cache holds.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks import measure
from benchmarks.measure import Report

COPIED = {"cuda": 1 << 30}
"""Bytes of the tensor that is copied, by device type; `_COPIED` elsewhere."""
_COPIED = 1 << 28
_COPIES = 8


@dataclass(frozen=True)
class Network:
    """bytes: read and written per training image, forward and backward, in bfloat16 with fused elementwise operations;
    target: images/s wanted of a level on one GPU, a comparison."""

    bytes: float
    target: str


NETWORKS = {
    ("torchvision/resnet50", 224): Network(335e6, ">= 7,500"),
    ("torchvision/resnet18", 224): Network(75e6, ">= 18,000"),
    ("cifar/resnet18", 32): Network(18.5e6, ">= 50,000"),
}
"""By model and image side."""


def copy_bandwidth(device: torch.device, size: int | None = None, rounds: int = 7) -> float:
    """Bytes per second, read and written ones together, of copying `size` bytes on `device`: the median of `rounds`."""
    size = size or COPIED.get(device.type, _COPIED)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        for _ in range(_COPIES):
            target.copy_(source)
        measure.wait(device)

    copy()  # pages are made and the device wakes up
    seconds = statistics.median(measure.cost(copy, time.perf_counter) for _ in range(rounds))
    return 2.0 * size * _COPIES / seconds


def roof(bandwidth: float, bytes_per_image: float) -> float:
    """Images per second of a step that does nothing but move its bytes."""
    return bandwidth / bytes_per_image


def add_rows(report: Report, label: str, arm: str, network: Network, speed: float, bandwidth: float) -> None:
    """Images per second against the target, and their share of the roof."""
    report.add(measure.figure(f"level, {label}: images/s", arm, speed, "images/s", network.target))
    limit = roof(bandwidth, network.bytes)
    name = f"level, {label}: share of {limit:,.0f} images/s, its fused-memory roof"
    report.add(measure.figure(name, arm, speed / limit, ""))
