"""`Step`: a point in training, written `500it`, `3ep` or `3ep50it`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORM = re.compile(r"(?:([0-9]{1,9})ep)?(?:([0-9]{1,9})it)?")


@dataclass(frozen=True)
class Step:
    """`epochs` whole epochs plus `iterations` optimizer steps from the start of training."""

    epochs: int = 0
    iterations: int = 0

    @staticmethod
    def parse(text: str) -> Step:
        """Read `500it`, `3ep` or `3ep50it`. Raises ValueError on anything else."""
        match = _FORM.fullmatch(text.strip())
        if not text.strip() or match is None:
            raise ValueError(f"{text!r} is not a step; write 500it, 3ep or 3ep50it")
        return Step(int(match[1] or 0), int(match[2] or 0))

    def at(self, steps_per_epoch: int) -> int:
        """The number of optimizer steps from the start, for epochs of `steps_per_epoch` steps."""
        return self.epochs * steps_per_epoch + self.iterations

    def __str__(self) -> str:
        if self.epochs and self.iterations:
            return f"{self.epochs}ep{self.iterations}it"
        return f"{self.epochs}ep" if self.epochs else f"{self.iterations}it"
