"""Magnitude pruning."""

from __future__ import annotations

import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.criteria import Batches, Loss, Scores, criterion


@criterion("magnitude", batchnorm="none", reads="nothing")
def magnitude(model: nn.Module, masks: Masks, batches: Batches, loss: Loss, *, generator: torch.Generator) -> Scores:
    """|w| of the current weights (Han et al. 2015, section 3); reads no data and does not run the model."""
    weights = dict(model.named_parameters())
    return {name: _wide(weights[name].detach()).abs() for name in masks}


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
