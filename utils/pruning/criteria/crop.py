"""CroP: gradient flow preservation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.masks import Masks
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._gradients import gradient_products, inside, times_weights
from utils.pruning.criteria._temperature import tempered


@criterion("crop", batchnorm="eval", reads="train", batches=5)
def crop(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Scores:
    """|theta (H (m g))|, the flow of the masked gradient (Rachwan et al. 2022, EarlyCroP); reads training batches.

    The size of the first-order change of the gradient flow when a weight is removed. g is the mean gradient over all
    samples of all ranks and H the Hessian of the same mean loss, both over the prunable weights alone, at theta * m.
    BatchNorm in eval mode. What sets it apart from `grasp` beside that mode: the absolute value, the mask on g and a
    temperature of 1. CroP-it is this criterion in rounds. Raises UserError for a temperature that is not above 0.
    """

    def cooled(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(tempered(net, temperature), batch)

    with inside(model, masks):
        products = gradient_products(model, masks, batches, cooled, live=True)
    return {name: score.abs_() for name, score in times_weights(model, masks, products).items()}
