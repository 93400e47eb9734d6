"""X-Net graphs: the channels of one side have a fixed degree, those of the other what chance gives them."""

from __future__ import annotations

import numpy as np

from utils.params.graph import Graph
from utils.pruning.graphs import Sides, graph
from utils.pruning.graphs._draw import choose, even


@graph("xnet")
def xnet(sides: Sides, degree: int, exact: bool, rng: np.random.Generator, section: Graph) -> np.ndarray:
    """Every channel of graph.side picks `degree` others (Prabhu et al. 2018); the other side may have dead channels.

    By degree: min(degree, other side) distinct others each. The side `in` is that of expander pruning, `smaller` that
    of the original X-Net (inputs where both are equal). By density: degrees as equal as possible that add up to
    degree * max(inputs, outputs).
    """
    by_input = section.side == "in" or (section.side == "smaller" and sides.inputs <= sides.outputs)
    side, other = (sides.inputs, sides.outputs) if by_input else (sides.outputs, sides.inputs)
    total = degree * sides.larger if exact else min(degree, other) * side
    chosen = choose(even(total, side, rng), other, rng)
    return np.ascontiguousarray(chosen.T) if by_input else chosen
