"""First-order Taylor importance."""

from __future__ import annotations

import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._gradients import inside, mean_gradients, times_weights


@criterion("taylor", batchnorm="eval", reads="train")
def taylor(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    everywhere: bool = True,
) -> Scores:
    """|w g|, g the mean gradient at the current weights, BatchNorm in eval mode (Evci 2018); reads training batches.

    The first-order change of the loss when a weight is set to 0. The absolute value is taken after the mean over all
    samples of all ranks. In training mode BatchNorm would make each filter's sum of w g zero, hence its eval mode; this
    mode, on trained weights, is what sets it apart from `snip`.
    """
    with inside(model, masks):
        grads = mean_gradients(model, masks, batches, loss, everywhere)
    return {name: score.abs_() for name, score in times_weights(model, masks, grads).items()}
