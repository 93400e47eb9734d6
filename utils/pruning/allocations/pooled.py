"""All layers in one pool."""

from __future__ import annotations

from collections.abc import Sequence

from utils.pruning.allocations import allocation
from utils.pruning.select import Layer, Pool


@allocation("global")
def pooled(layers: Sequence[Layer], keep: int) -> Sequence[Pool]:
    """The highest scores of the whole network; layers get what their scores earn, which may be nothing."""
    return [Pool(tuple(layers), keep)] if layers else []
