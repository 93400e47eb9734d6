"""Layer-wise allocations: a count per layer that follows from the shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from utils.pruning.allocations import allocation, spread
from utils.pruning.select import Layer, Pool


@allocation("uniform")
def uniform(layers: Sequence[Layer], keep: int) -> Sequence[Pool]:
    """The same density in every layer."""
    return spread(layers, keep, [layer.size for layer in layers])


@allocation("erk")
def erk(layers: Sequence[Layer], keep: int) -> Sequence[Pool]:
    """Erdos-Renyi-Kernel: density in proportion to sum(shape) / prod(shape) (Evci et al. 2020, RigL, section 3).

    A layer whose density would pass 1 is dense and its excess goes to the others, as in the paper's released code. The
    count, density times prod(shape), is in proportion to sum(shape). Shapes are the weights': grouped convolutions
    count in_channels / groups inputs.
    """
    return spread(layers, keep, [sum(layer.shape) for layer in layers])


@allocation("er")
def er(layers: Sequence[Layer], keep: int) -> Sequence[Pool]:
    """Erdos-Renyi: density in proportion to (n_in + n_out) / (n_in * n_out), kernels left out (Mocanu et al. 2018).

    n_out and n_in are the first two sizes of the weight; the count is in proportion to (n_in + n_out) * kernel area.
    """
    return spread(layers, keep, [sum(layer.shape[:2]) * math.prod(layer.shape[2:]) for layer in layers])


@allocation("balanced")
def balanced(layers: Sequence[Layer], keep: int) -> Sequence[Pool]:
    """The same number of weights in every layer, min(n_l, c): layers smaller than c stay as they are."""
    return spread(layers, keep, [1] * len(layers))
