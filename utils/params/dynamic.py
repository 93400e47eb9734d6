"""Section `dynamic`: masks that change while the network trains."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param
from utils.params.step import Step


@dataclass(frozen=True)
class Dynamic:
    """Mask updates during training: gradual pruning and drop-and-grow methods."""

    method: str | None = param(None, "changes masks while training", kind="dynamic", empty="none")
    every: int = param(100, "optimizer steps from one mask update to the next", low=1)
    start: Step = param(Step(), "no update before this step")  # noqa: RUF009
    until: float = param(0.75, "no update from this share of training on", above=0.0, high=1.0)
    fraction: float = param(0.3, "share of a layer's live weights dropped and grown at first", above=0.0, below=1.0)
    decay: str = param("cosine", "how the share falls until the last update", choices=("cosine", "constant", "linear"))
    initial_density: float = param(1.0, "gmp: density training starts from", above=0.0, high=1.0)
