"""SET: grow at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.pruning.dynamic import dynamic
from utils.pruning.dynamic._drop_grow import DropAndGrow


@dynamic("set")
class Set(DropAndGrow):
    """SET: drop the smallest |w|, grow as many places at random, layer by layer (Mocanu et al. 2018).

    The paper's share is constant (dynamic.decay=constant); new weights start at 0.
    """

    def growth_scores(self, name: str, weight: nn.Parameter, step: int) -> Tensor:
        """Uniform random numbers that depend on (seed, level, step, layer)."""
        generator = torch.Generator().manual_seed(self.key("random", step, name))
        return torch.rand(weight.shape, dtype=torch.float64, generator=generator)
