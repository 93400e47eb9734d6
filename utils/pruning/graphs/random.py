"""Random graphs: the baseline in which channel pairs do not know of each other."""

from __future__ import annotations

import numpy as np

from utils.params.graph import Graph
from utils.pruning.graphs import Sides, graph
from utils.pruning.graphs._draw import choose

_CHUNK = 1 << 22


@graph("random")
def random(sides: Sides, degree: int, exact: bool, rng: np.random.Generator, section: Graph) -> np.ndarray:
    """Random pairs of channels; channels may be left without an edge.

    By degree: every pair independently with probability min(1, degree / outputs), so an input has `degree` edges on
    average. By density: degree * max(inputs, outputs) pairs, every such set equally likely.
    """
    inputs, outputs = sides.inputs, sides.outputs
    if exact:
        # How many of the pairs fall to each output, then which; without a list of all pairs.
        pool = np.full(outputs, inputs, dtype=np.int64)
        return choose(rng.multivariate_hypergeometric(pool, degree * sides.larger, method="marginals"), inputs, rng)
    kept = np.empty((outputs, inputs), dtype=bool)
    rows = max(1, _CHUNK // inputs)
    for start in range(0, outputs, rows):
        part = kept[start : start + rows]
        part[:] = rng.random(part.shape) < degree / outputs
    return kept
