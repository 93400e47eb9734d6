"""Gradient norms of every parameter over the first steps of a level, as an extension."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.masks import bare
from utils.system.atomic import write_text
from utils.system.errors import UserError
from utils.training.extension import Extension


class GradientNorms(Extension):
    """Records |gradient|_2 per parameter (masked, averaged over ranks, not clipped) and writes them when closed."""

    def __init__(self, model: nn.Module, steps: int, start: int, scale: Callable[[], float], out: Path | None) -> None:
        """steps: how many from step `start` on; scale: of the loss; out: CSV with a row per step (None: none)."""
        self._named = {name: p for name, p in bare(model).named_parameters() if p.requires_grad}
        self._range = range(start, start + steps)
        self._scale, self._out = scale, out
        self._norms: dict[int, Tensor] = {}

    def reads_gradients(self, step: int) -> bool:
        """While norms are taken."""
        return step in self._range

    def after_backward(self, step: int) -> None:
        """Take the norms of this step, on the device: nothing waits."""
        if step in self._range:
            zero = next(iter(self._named.values())).new_zeros(())
            norms = [zero if p.grad is None else p.grad.detach().norm() for p in self._named.values()]
            self._norms[step] = torch.stack([norm.float() for norm in norms]) / self._scale()

    def close(self) -> None:
        """Write the file."""
        if self._out is not None:
            write_text(self._out, self.text())

    def text(self) -> str:
        """CSV: step, then a column per parameter."""
        handle = io.StringIO()
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["step", *self._named])
        writer.writerows([step, *norms.tolist()] for step, norms in self._norms.items())
        return handle.getvalue()

    def state(self) -> dict[str, Tensor]:
        """The norms taken so far, [steps, parameters], and the numbers of their steps."""
        if not self._norms:
            return {}
        return {"norms": torch.stack(list(self._norms.values())).cpu(), "steps": torch.tensor(list(self._norms))}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned. Raises UserError when it is another model's."""
        self._norms = {}
        if not state:
            return
        if state["norms"].shape != (len(state["steps"]), len(self._named)):
            raise UserError("the gradient norms are another model's; remove the checkpoint")
        self._norms = dict(zip(state["steps"].tolist(), state["norms"], strict=True))
