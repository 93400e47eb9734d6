"""What `pruning.pattern` may say: the granularity of a mask, parsed without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from utils.system.errors import UserError

KEY = "pruning.pattern"

_N_OF_M = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")
_BLOCK = re.compile(r"block=([0-9]{1,6})x([0-9]{1,6})")


@dataclass(frozen=True)
class Pattern:
    """A granularity. kind: weight, nm, block, kernel or channel; first and second: N and M, or H and W of a block."""

    kind: str
    first: int = 1
    second: int = 1

    def __str__(self) -> str:
        if self.kind == "nm":
            return f"{self.first}:{self.second}"
        return f"block={self.first}x{self.second}" if self.kind == "block" else self.kind

    @property
    def grouped(self) -> bool:
        """Whether whole groups of weights are kept or pruned together (blocks, kernels, channels)."""
        return self.kind in ("block", "kernel", "channel")


def parse(text: str) -> Pattern:
    """The pattern `text` names. Raises UserError for anything but weight, N:M, block=HxW, kernel and channel."""
    text = text.strip()
    if text in ("weight", "kernel", "channel"):
        return Pattern(text)
    if found := _N_OF_M.fullmatch(text):
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise UserError(f"{KEY}: {text!r} must keep more than none and fewer than all of a group, such as 2:4")
        return Pattern("nm", n, m)
    if found := _BLOCK.fullmatch(text):
        height, width = map(int, found.groups())
        if not height or not width:
            raise UserError(f"{KEY}: {text!r} has an empty side; give outputs x inputs, such as block=4x4")
        return Pattern("block", height, width)
    raise UserError(
        f"{KEY}: {text!r} is not weight, N:M (such as 2:4), block=HxW (such as block=4x4), kernel or channel"
    )


def check_text(text: str) -> None:
    """Raise UserError unless `text` is a pattern."""
    parse(text)
