"""NTK-SAP: pruning by the spectrum of the neural tangent kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from utils.data.stateless import derive
from utils.masks import Masks, bare
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._gradients import precision, reduced, weights
from utils.system import distributed
from utils.system.errors import UserError

_CHUNK = 32
"""Images of one forward and backward pass."""


@criterion("ntk_sap", batchnorm="eval", reads="nothing", rounds=20, schedule="exponential")
def ntk_sap(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    input_shape: tuple[int, int, int] | None = None,
    epsilon: float = 0.01,
    draws: int = 5,
    samples: int = 100,
) -> Scores:
    """Influence of a weight on the kernel's spectrum (NTK-SAP, Wang et al. 2023), 20 rounds; reads no data.

    Their Algorithm 1: |d/dm E ||f(x; theta*m) - f(x; (theta+e)*m)||^2|, where the mean over `draws` fresh
    initialisations theta, each with its own perturbation e ~ epsilon N(0, I) and its own batch of `samples` images
    x ~ N(0, 1), estimates the trace of the tangent kernel, hence the sum of its eigenvalues. A fresh initialisation
    draws every prunable tensor from the normal distribution of that tensor's own mean and standard deviation; all other
    parameters keep their values and are not perturbed. BatchNorm is in eval mode on the statistics of that batch under
    theta*m, for both networks. The derivative is summed before its absolute value is taken; pruned places score 0.

    Every draw is a function of (seed, masks, index, parameter), so each round sees new ones and every rank can make
    any; ranks share the draws out and sum derivatives in float64. Peak memory beside activations, in float32 copies of
    the weights: the weights, theta*m, (theta+e)*m, two for the float64 sums and one for what is returned.

    input_shape: (channels, height, width) of the images. Raises UserError without it or for options out of range.
    """
    if input_shape is None:
        raise UserError("pruning.criterion=ntk_sap runs the network and needs input_shape=(channels, height, width)")
    if not (epsilon > 0 and draws >= 1 and samples >= 1):
        raise UserError("pruning.criterion_options: ntk_sap needs epsilon > 0, draws >= 1 and samples >= 1")
    model = bare(model)
    found = weights(model, masks)
    sums = {
        name: torch.zeros(w.shape, dtype=torch.float64, device=w.device)  # contiguous, as collectives need
        for name, w in found.items()
    }
    place = distributed.world() if distributed.active() else distributed.World()
    for index in range(place.rank, draws, place.size):
        key = (generator.initial_seed(), masks.digest, index)
        _add_derivatives(model, masks, key, (samples, *input_shape), epsilon, sums)
    reduced(sums)
    return {n: sums.pop(n).abs_().div_(draws * samples).to(precision(w)) for n, w in found.items()}


def normal(key: tuple[object, ...], kind: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """N(0, 1) drawn in float32 on the CPU as a function of (key, kind), on the device and in the dtype of `like`."""
    generator = torch.Generator().manual_seed(derive("ntk_sap", *key, kind))
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


@torch.no_grad()
def networks(
    model: nn.Module, masks: Masks, key: tuple[object, ...], epsilon: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """theta*m and (theta+e)*m of one draw, by name; theta has each tensor's own mean and deviation."""
    plain: dict[str, Tensor] = {}
    perturbed: dict[str, Tensor] = {}
    for name, weight in weights(model, masks).items():
        mask = masks.on(weight.device)[name]
        theta = normal(key, f"weight {name}", tuple(weight.shape), weight)
        theta = theta.mul_(weight.std(correction=0)).add_(weight.mean())
        noise = normal(key, f"noise {name}", tuple(weight.shape), weight)
        perturbed[name] = noise.mul_(epsilon).add_(theta).mul_(mask)
        plain[name] = theta.mul_(mask)
    return plain, perturbed


def _add_derivatives(
    model: nn.Module,
    masks: Masks,
    key: tuple[object, ...],
    shape: tuple[int, ...],
    epsilon: float,
    sums: Mapping[str, Tensor],
) -> None:
    """Add the derivative in the mask, summed over the images of one draw, to `sums`."""
    pair = networks(model, masks, key, epsilon)
    images = normal(key, "images", shape, next(model.parameters()))
    others = {n: p.detach() for n, p in model.named_parameters() if n not in masks}
    others.update((name, buffer.clone()) for name, buffer in model.named_buffers())
    with _statistics(model), torch.no_grad():
        functional_call(model, {**others, **pair[0]}, (images,))
    for parameters in pair:
        for name, value in parameters.items():
            value.requires_grad_().register_post_accumulate_grad_hook(_adder(sums[name]))
    with torch.enable_grad():
        for part in images.split(_CHUNK):
            plain, perturbed = (functional_call(model, {**others, **parameters}, (part,)) for parameters in pair)
            distance = (plain - perturbed).square().sum()
            if distance.requires_grad:
                distance.backward()


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(value: Tensor) -> None:
        # d/dm at the kept places: the derivative in theta*m times theta, which is theta*m there; 0 elsewhere.
        assert value.grad is not None
        total.addcmul_(value.grad.double(), value.detach().double())
        value.grad = None

    return add


@contextlib.contextmanager
def _statistics(model: nn.Module) -> Iterator[None]:
    """Within it every BatchNorm takes the statistics of its input as its running ones, and then uses them.

    By hooks in eval mode rather than in train mode with momentum 1: a synchronised BatchNorm would wait for other
    ranks, which work on other draws.
    """
    handles = [m.register_forward_pre_hook(_take) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(module, _BatchNorm)
    if module.running_mean is not None and module.running_var is not None:
        x = inputs[0]
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)
