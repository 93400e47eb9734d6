"""GraSP: gradient signal preservation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.masks import Masks
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._gradients import gradient_products, inside, times_weights
from utils.pruning.criteria._temperature import tempered


@criterion("grasp", batchnorm="train", reads="train", samples_per_class=25, signed=True)
def grasp(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    temperature: float = 200.0,
) -> Scores:
    """theta (H g) of the loss at logits / temperature, the largest kept (Wang et al. 2020); reads training batches.

    The paper removes the weights with the largest -theta (H g) (its eq. 8): the first-order change of the gradient's
    squared norm, halved, when a weight is removed. g is the mean gradient over all samples of all ranks and H the
    Hessian of the same mean loss, both over the prunable weights alone, at theta * m. BatchNorm in training mode: its
    statistics are those of each micro-batch. Raises UserError for a temperature that is not above 0.
    """

    def cooled(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(tempered(net, temperature), batch)

    with inside(model, masks):
        products = gradient_products(model, masks, batches, cooled)
    return times_weights(model, masks, products)
