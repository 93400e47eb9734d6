"""Random pruning."""

from __future__ import annotations

import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.criteria import Batches, Loss, Scores, criterion, layer_generator


@criterion("random", batchnorm="none", reads="nothing")
def random(model: nn.Module, masks: Masks, batches: Batches, loss: Loss, *, generator: torch.Generator) -> Scores:
    """Uniform scores in [0, 1) that depend only on the seed, the layer's name and its shape; reads no data.

    The same seed gives the same scores at every level, so pruning in steps and at once leave the same weights when the
    allocation gives the same counts.
    """
    return {name: torch.rand(mask.shape, generator=layer_generator(generator, name)) for name, mask in masks.items()}
