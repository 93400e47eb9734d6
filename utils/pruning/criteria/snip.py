"""SNIP: connection sensitivity."""

from __future__ import annotations

import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._gradients import inside, mean_gradients, times_weights


@criterion("snip", batchnorm="train", reads="train", samples_per_class=10)
def snip(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    everywhere: bool = True,
) -> Scores:
    """|dL/dm| = |theta dL/d(theta m)|, BatchNorm in training mode (Lee et al. 2019, eq. 5); reads training batches.

    The gradient is the mean over all samples of all ranks, taken at theta * m. Pruned places are scored with their
    weight of before the pruning, |theta_0 dL/d(theta_0 m)|, so that FORCE (de Jorge et al. 2021) can bring them back;
    who keeps the masks nested looks at the live ones alone (iterative SNIP, SNIP-it). The published division by the
    sum of all scores is left out: it changes no ranking.
    """
    with inside(model, masks):
        grads = mean_gradients(model, masks, batches, loss, everywhere)
    return {name: score.abs_() for name, score in times_weights(model, masks, grads).items()}
