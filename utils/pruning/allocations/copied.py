"""The layer ratios of another mask."""

from __future__ import annotations

from collections.abc import Sequence

from utils.pruning.allocations import allocation, spread
from utils.pruning.select import Layer, Pool


@allocation("from_mask")
def from_mask(layers: Sequence[Layer], keep: int) -> Sequence[Pool]:
    """Counts in proportion to those of the mask file pruning.from_mask; scores decide which weights.

    `Layer.ratio` holds the file's kept counts. Layers the file empties stay empty (or at their floor) until all others
    are full; what is left then goes to them by size.
    """
    room = sum(layer.alive if layer.ratio else layer.floor for layer in layers)
    if keep <= room:
        return spread(layers, keep, [layer.ratio for layer in layers])
    empty = [layer for layer in layers if not layer.ratio]
    left = keep - sum(layer.alive for layer in layers if layer.ratio)
    late = {pool.layers[0].name: pool for pool in spread(empty, left, [layer.size for layer in empty])}
    return [late.get(layer.name) or Pool((layer,), layer.alive) for layer in layers]
