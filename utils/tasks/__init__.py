"""Tasks: what a batch, a loss and a metric are."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, both on the device."""


class Task(Protocol):
    """What training, pruning and evaluation need to know about a task; the model runs in the caller's precision."""

    def loss(self, model: nn.Module, batch: Batch, key: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean training loss of the batch (0-dim, with graph) and the model's outputs. `key` seeds random mixing."""
        ...

    def scoring_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The plain mean loss that pruning criteria differentiate: no smoothing, no mixing."""
        ...

    def totals(self, device: torch.device) -> Tensor:
        """Zeros to which metric sums are added, on the device; sums over batches and ranks are plain additions."""
        ...

    def accumulate(self, totals: Tensor, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a training batch to `totals` in place, from what `loss` returned; never waits for the device."""
        ...

    def evaluate_batch(self, model: nn.Module, batch: Batch) -> Tensor:
        """The totals of one evaluation batch; never waits for the device."""
        ...

    def read(self, totals: Tensor) -> dict[str, float]:
        """Metrics by name from totals already summed over ranks."""
        ...
