"""RigL: grow where the dense gradient is largest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.pruning.dynamic import dynamic
from utils.pruning.dynamic._drop_grow import DropAndGrow


@dynamic("rigl")
class RigL(DropAndGrow):
    """RigL: drop the smallest |w|, grow the largest |dense gradient|, layer by layer (Evci et al. 2020)."""

    def growth_scores(self, name: str, weight: nn.Parameter, step: int) -> Tensor:
        """|gradient| of the step's loss; NaN (overflow in half precision) counts as 0, a missing gradient is 0."""
        if weight.grad is None:
            return torch.zeros_like(weight)
        return weight.grad.abs().nan_to_num(nan=0.0, posinf=torch.inf)
