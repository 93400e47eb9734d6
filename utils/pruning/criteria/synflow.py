"""SynFlow: synaptic flow through the positive network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.masks import Masks, bare, filled, pieces
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._flow import flow, is_bias, neutral, ones
from utils.system.errors import UserError

_SCALES = ((0, 0), (0, 512), (0, 960), (512, 512), (960, 960), (1020, 1020))
"""Powers of 1/2 that scale input and output, in the order tried."""


@criterion("synflow", batchnorm="none", reads="nothing", rounds=100, schedule="exponential")
def synflow(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    input_shape: tuple[int, int, int] | None = None,
) -> Scores:
    """Synaptic flow |w dR/dw| of the positive network (Tanaka et al. 2020), 100 rounds; reads no data.

    Their Algorithm 1. R is the sum of the outputs for one image of ones when every weight is |w| m, every other
    parameter its absolute value, biases are 0 and normalisation layers the identity (no batch statistics at all).
    Scores are sums over the paths through a weight, so their sum over every cut of a positively homogeneous network is
    R. Clipped ReLUs lose their clip, which a network without norms exceeds everywhere. Saturated gates (the hard
    sigmoids of squeeze-and-excitation) and attention are not homogeneous: their own weights may score 0.

    Computed and returned in float64 (R is about 1e27 on cifar/resnet18, 4e72 on ResNet-50); pruned places score 0.
    Where even that overflows, R is scaled by a power of two, which multiplies every score by the same constant; where R
    itself overflows the input is scaled too, which does so in positively homogeneous networks. Peak memory beside
    activations, in float32 copies of the weights: the weights, two for |w| m and two for the scores, which take the
    gradients' place layer by layer.

    Where nothing flows (a head that starts at zero, masks that disconnect) every score is 0.

    input_shape: (channels, height, width) of the images. Raises UserError without it, for networks that do not return
    one tensor, and when the flow is not finite at any scale.
    """
    model = bare(model)
    image = ones(model, input_shape, "pruning.criterion=synflow")
    with neutral(model):
        total = image.new_zeros(())
        for inner, outer in _SCALES:
            if inner or total.isfinite():
                scores, total, finite = _scores(model, masks, image * 2.0**-inner, 2.0**-outer)
                if finite:
                    return scores
    raise UserError(
        "pruning.criterion=synflow: the flow is not finite at any scale of float64; "
        "look for NaN or infinite weights, or choose another criterion"
    )


def _scores(model: nn.Module, masks: Masks, image: Tensor, scale: float) -> tuple[Scores, Tensor, bool]:
    """Scores times `scale`, R, and whether all of them are finite."""
    scores: Scores = {}
    sums: list[Tensor] = []

    def keep(name: str, value: Tensor, gradient: Tensor) -> None:
        scores[name] = gradient
        for score, weight in pieces(gradient, value):
            sums.append(score.mul_(weight).abs_().sum())

    with torch.no_grad():
        values = {name: _positive(name, p, masks) for name, p in model.named_parameters()}
    for name in masks:
        values[name].requires_grad_()
    total = flow(model, values, image, keep, scale)
    for name in masks:  # weights that the outputs do not depend on
        if name not in scores:
            scores[name] = torch.zeros_like(values[name], requires_grad=False)
    # No score is negative, so a finite sum means that all are finite.
    finite = bool(torch.stack([total, *sums]).isfinite().all())
    return {name: scores[name] for name in masks}, total, finite


def _positive(name: str, parameter: Tensor, masks: Masks) -> Tensor:
    """|parameter| in float64, 0 at pruned places; all 0 for a bias."""
    if is_bias(name):
        return torch.zeros_like(parameter, dtype=torch.float64)
    if name not in masks or masks.counts[name] == parameter.numel():
        return parameter.abs().double()  # exact in any precision, so the narrow one is the cheaper
    value = torch.empty_like(parameter, dtype=torch.float64)
    for positive, weight, kept in pieces(value, parameter, masks.on(parameter.device)[name]):
        positive.copy_(filled(weight.abs(), kept))
    return value
