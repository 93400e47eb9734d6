"""Exponential moving average of the weights, as an extension."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.masks import Masks, bare
from utils.system.errors import UserError
from utils.training.extension import Extension

_PREFIX = "average."


class ExponentialAverage(Extension):
    """average <- decay * average + (1 - decay) * weights after every optimizer step; the first step copies.

    The average is kept in float32 (float64 for float64 weights), in the weights' own strides, for parameters alone:
    buffers are always the live model's. Pruned weights are 0.0 in it, as in the model. The update neither waits for the
    device nor allocates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """model: on its final device and in its final memory format. decay: per optimizer step, in (0, 1)."""
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay {decay} is not between 0 and 1")
        self.decay = decay
        self.updates = 0
        self._live = dict(bare(model).named_parameters())
        self._average = {name: _wide(p) for name, p in self._live.items()}
        self._move = get_ema_multi_avg_fn(decay)
        self._swapped = False

    def after_step(self, step: int) -> None:
        """Move the average towards the weights."""
        if self._swapped:
            raise RuntimeError("the averaged weights are in the model; leave swapped() before training on")
        average = list(self._average.values())
        weights = [p.detach().to(a.dtype) for p, a in zip(self._live.values(), average, strict=True)]
        if self.updates == 0:
            torch._foreach_copy_(average, weights)
        else:
            self._move(average, weights, self.updates)
        self.updates += 1

    @contextlib.contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Within it the model holds the averaged weights, in place; afterwards the live ones, bit for bit.

        Before the first step the average is the live weights. Do not train within it.
        """
        if self._swapped:
            raise RuntimeError("the averaged weights are in the model already")
        if self.updates == 0:
            yield
            return
        live = {name: p.detach().clone() for name, p in self._live.items()}
        self._swapped = True
        try:
            self._put(self._average)
            yield
        finally:
            self._put(live)
            self._swapped = False

    @torch.no_grad()
    def masks_changed(self, masks: Masks) -> None:
        """Fill the average with 0.0 at pruned places."""
        for name, mask in masks.items():
            average = self._average[name]
            average.masked_fill_(~mask.to(average.device), 0.0)

    def state(self) -> dict[str, Tensor]:
        """The average as `average.<parameter>` and the number of `updates`."""
        tensors = {_PREFIX + name: _copy(a) for name, a in self._average.items()}
        return {**tensors, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned. Raises UserError when it is another model's."""
        expected = {_PREFIX + name: tuple(a.shape) for name, a in self._average.items()} | {"updates": ()}
        found = {name: tuple(t.shape) for name, t in state.items()}
        if expected != found:
            odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise UserError(f"the averaged weights are another model's, first {odd[0]!r}; remove the checkpoint")
        for name, average in self._average.items():
            average.copy_(state[_PREFIX + name])
        self.updates = int(state["updates"])

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self._live.items():
            p.copy_(values[name])


def _wide(p: Tensor) -> Tensor:
    """A copy in at least float32, strides kept."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(p.detach())


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
