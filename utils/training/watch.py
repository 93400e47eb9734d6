"""What the trainer watches while it steps: the losses, without waiting for them, and the clock."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from utils.data.protocol import Loader
from utils.system.errors import UserError
from utils.training.progress import Progress

HOPELESS = 50
"""Micro-batches in a row without a finite loss after which float16 is not waited for any longer."""


class LossWatch:
    """Finds the first step whose loss was NaN or infinite, looking at the device only now and then.

    In float16 the scaler skips such steps: they count nowhere, and only `HOPELESS` of them in a row are an error.
    """

    def __init__(self, level: int, rank: int, skips: bool) -> None:
        """skips: a scaler skips steps that are not finite."""
        self.level, self.rank, self.skips = level, rank, skips
        self._recent: list[tuple[int, float, Tensor]] = []

    @contextlib.contextmanager
    def counted(self, totals: Tensor, step: int, lr: float, loss: Tensor) -> Iterator[None]:
        """Around the sums of a micro-batch with this loss: those of one that is skipped are taken back."""
        self._recent.append((step, lr, loss))
        before = totals.clone() if self.skips else None
        yield
        if before is not None:
            totals.copy_(torch.where(torch.isfinite(loss), totals, before))

    def check(self, totals: Tensor, last: str) -> None:
        """Raise UserError naming the first bad step since the last look, rank, learning rate, and `last`, the last
        state stored."""
        # The sum keeps a NaN or an infinity, so a look now and then misses none.
        if not self.skips and math.isfinite(float(totals[0])):
            self._recent = []
            return
        finite = torch.isfinite(torch.stack([loss for _, _, loss in self._recent])).tolist() if self._recent else []
        if self.skips:
            good = max((index for index, good in enumerate(finite) if good), default=-1)
            self._recent, finite = self._recent[good + 1 :], finite[good + 1 :]
            if len(self._recent) < HOPELESS:
                return
        if False in finite:
            step, lr, loss = self._recent[finite.index(False)]
            what = f"step {step}, rank {self.rank}: the loss became {float(loss)} at learning rate {lr:g}"
        else:
            what = f"rank {self.rank}: the sum of the losses became {float(totals[0])}"
        raise UserError(f"level {self.level}, {what}; {last}; lower optimizer.lr, add schedule.warmup or training.clip")


class Clock:
    """Wall time of an epoch and the part of it spent waiting for data."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin = time.perf_counter()
        self.waited = 0.0

    def waits(self, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The loader's batches, timing each wait."""
        iterator = iter(loader)
        while True:
            begin = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def stop(self, progress: Progress) -> None:
        """Add the time since the last look, and the part of it waited, to the epoch's, once the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        progress.seconds += now - self.begin
        progress.waited += self.waited
        self.begin, self.waited = now, 0.0
