"""Fisher pruning."""

from __future__ import annotations

import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._gradients import Sums, inside, only, precision, times_weights, weights


@criterion("fisher", batchnorm="eval", reads="train")
def fisher(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    everywhere: bool = True,
) -> Scores:
    """1/2 w^2 mean_i g_i^2, g_i of single samples and their labels (Theis et al. 2018); reads training batches.

    The second-order change of the loss when a weight is set to 0, its Hessian approximated by the diagonal of the
    empirical Fisher information at the current weights. The mean runs over all samples of all ranks. BatchNorm in eval
    mode, for a sample alone has no batch statistics. One backward pass per sample, so that one gradient is held.
    """
    sums = Sums(weights(model, masks), None if everywhere else masks)
    with inside(model, masks):
        _sum_squares(sums, model, masks, batches, loss)
    means = sums.means(rounded=False)
    # In float64 to the end: squares of small gradients are below float32, their product with w^2 need not be.
    times_weights(model, masks, times_weights(model, masks, means))
    return {name: means.pop(name).mul_(0.5).to(precision(w)) for name, w in weights(model, masks).items()}


def _sum_squares(sums: Sums, model: nn.Module, masks: Masks, batches: Batches, loss: Loss) -> None:
    with only(model, masks):
        for images, labels in batches:
            for image, label in zip(images.split(1), labels.split(1), strict=True):
                value = loss(model, (image, label))
                with sums.collecting(1, square=True):
                    if value.requires_grad:
                        value.backward()
