"""Layer-wise rescaled initialisation (GradInit, Zhu et al. 2021), inside the masks of a sparse network.

One scale per tensor, alpha, turns initial values p0 into alpha * p0, so that a first optimizer step lowers the loss as
far as it can while the gradient's norm stays at most gamma:

    g = masked gradient of the loss on images S0 at p = alpha * p0;  norm = |g|_2 (sgd) or |g|_1 (adam)
    norm > gamma    step on the norm, by double backward
    otherwise       step on L(p - eta * d) / eta on images S1; d = g, g / norm by option, or sign(g) for adam,
                    masked and held constant

Steps are Adam's, with first moments of their own for the two aims and one second moment. The published sparse use of
it looks ahead without the masks, at a denser network than the one that is trained; here d is 0.0 at pruned places.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils import params
from utils.data import Loaders
from utils.masks import Masks, bare
from utils.system.distributed import broadcast
from utils.system.errors import UserError
from utils.tasks import Batch
from utils.training.double_backward import math_attention

Loss = Callable[[Any, Batch], Tensor]

LAST = 20
"""Iterations at the end over which the norm that was reached is averaged."""

_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Rescaled:
    """What `rescale` did.

    scales: by parameter; norms: the gradient's norm at every iteration; losses: on S0 at every iteration.
    """

    scales: dict[str, float]
    norms: list[float]
    losses: list[float]

    @property
    def norm(self) -> float:
        """Mean of the last norms."""
        last = self.norms[-LAST:]
        return sum(last) / len(last)


def rescale(
    model: nn.Module,
    masks: Masks,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    method: str = "sgd",
    iterations: int = 390,
    lr: float = 1e-3,
    eta: float = 0.1,
    gamma: float | None = None,
    normalize_grad: bool = False,
    min_scale: float = 0.01,
    clip: float | None = 1.0,
    overlap: bool = True,
) -> Rescaled:
    """Scale the parameters of `model` in place; options as in section `recipe.rescale`.

    batches: taken in turn, as often as needed. loss: (model, batch) to the mean loss. Norms use the statistics of the
    batch; buffers, gradients, training flags stay as they are. Pruned weights are 0.0 throughout. Every rank passes the
    same batches, and all take the scales of rank 0. Raises UserError when a loss or norm is not finite.
    """
    ahead = LookAhead(model, masks, loss, method, eta, normalize_grad)
    adam = _ScaleAdam(ahead, lr, min_scale, clip)
    norms: list[float] = []
    losses: list[float] = []
    with batch_statistics(ahead.model), math_attention(), contextlib.closing(_in_turn(batches)) as turn:
        for _ in range(iterations):
            seen, more = next(turn), next(turn)
            first = ahead.first(adam.scales, _joined(seen, more), graph=gamma is not None)
            norm = float(first.norm.detach())
            norms.append(norm)
            losses.append(float(first.loss.detach()))
            if not math.isfinite(norm):
                raise UserError(f"recipe.rescale: the gradient's norm became {norm}; lower recipe.rescale.lr")
            if gamma is not None and norm > gamma:
                adam.step("constraint", ahead.constraint(first))
            else:
                half = seen if overlap else next(turn)
                adam.step("objective", ahead.objective(first, _joined(half, next(turn)))[1])
    scales = broadcast(adam.scales)
    ahead.fold(scales)
    return Rescaled(dict(zip(ahead.names, scales.tolist(), strict=True)), norms, losses)


@dataclass(frozen=True)
class First:
    """The network at some scales: values by name (leaves), masked gradients, their norm, and the loss."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]
    norm: Tensor
    loss: Tensor


class LookAhead:
    """The two aims as functions of the scales, with their derivatives. The model itself stays as it is until `fold`."""

    def __init__(
        self, model: nn.Module, masks: Masks, loss: Loss, method: str, eta: float, normalize_grad: bool = False
    ) -> None:
        self.model, self._loss = bare(model), loss
        self._adam, self._eta, self._normalize = method == "adam", eta, normalize_grad
        self._live = {name: p for name, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}
        self._pruned = {name: ~masks[name].to(p.device) for name, p in self._live.items() if name in masks}
        self._initial = {name: p.detach().clone() for name, p in self._live.items()}
        for name, pruned in self._pruned.items():
            self._initial[name].masked_fill_(pruned, 0.0)
        self.names = [name for name, value in self._initial.items() if bool(value.count_nonzero())]
        """Tensors that have a scale: those of zeros alone have nothing to scale."""

    def ones(self) -> Tensor:
        """Scales [tensors] that change nothing."""
        return torch.ones(len(self.names), device=next(iter(self._initial.values())).device)

    def first(self, scales: Tensor, batch: Batch, graph: bool = True) -> First:
        """Loss and masked gradients at `scales`; `graph` keeps what `constraint` needs."""
        values = dict(self._initial)
        values |= {name: self._initial[name] * scale for name, scale in zip(self.names, scales, strict=True)}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        loss = self._at(leaves, batch)
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=graph, allow_unused=True)
        grads = {name: self._masked(name, grad) for name, grad in zip(leaves, found, strict=True) if grad is not None}
        if self._adam:
            norm = torch.stack([grad.abs().sum() for grad in grads.values()]).sum()
        else:
            norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        return First(leaves, grads, norm, loss)

    def constraint(self, first: First) -> Tensor:
        """Derivative [tensors] of the gradient's norm with respect to the scales."""
        return self._by_scale(first.norm, first.values)

    def objective(self, first: First, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss on `batch` after the step, divided by eta, and its derivative [tensors] with the step held constant."""
        ahead = {name: value.detach() for name, value in first.values.items()}
        for name, grad in first.grads.items():
            ahead[name] = ahead[name] - self._eta * self._direction(grad.detach(), first.norm.detach())
        leaves = {name: value.requires_grad_() for name, value in ahead.items()}
        loss = self._at(leaves, batch) / self._eta
        return loss.detach(), self._by_scale(loss, leaves)

    @torch.no_grad()
    def fold(self, scales: Tensor) -> None:
        """Write alpha * p0 into the model."""
        for name, scale in zip(self.names, scales, strict=True):
            self._live[name].copy_(self._initial[name] * scale)

    def _direction(self, grad: Tensor, norm: Tensor) -> Tensor:
        if self._adam:
            return grad.sign()
        return grad / norm.clamp_min(_EPS) if self._normalize else grad

    def _masked(self, name: str, grad: Tensor) -> Tensor:
        return grad.masked_fill(self._pruned[name], 0.0) if name in self._pruned else grad

    def _by_scale(self, value: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        wanted = [leaves[name] for name in self.names]
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        parts = [
            torch.zeros((), device=value.device) if grad is None else (grad * self._initial[name]).sum()
            for name, grad in zip(self.names, found, strict=True)
        ]
        return torch.stack([part.detach().float() for part in parts])

    def _at(self, values: dict[str, Tensor], batch: Batch) -> Tensor:
        def network(images: Tensor) -> Any:
            return functional_call(self.model, values, (images,))

        return self._loss(network, batch)


class _ScaleAdam:
    """Adam on the scales: first moments and their counts per aim, one second moment for both."""

    def __init__(self, ahead: LookAhead, lr: float, min_scale: float, clip: float | None) -> None:
        self.scales = ahead.ones()
        self._lr, self._clip = lr, clip
        lowest = [0.0 if name.endswith("bias") else min_scale for name in ahead.names]
        self._lowest = torch.tensor(lowest, device=self.scales.device)
        self._moments: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._square = torch.zeros_like(self.scales)

    def step(self, aim: str, grad: Tensor) -> None:
        if self._clip is not None:
            grad = grad.clamp(-self._clip, self._clip)
        first, second = _BETAS
        moment = self._moments.setdefault(aim, torch.zeros_like(grad))
        moment.mul_(first).add_(grad, alpha=1.0 - first)
        self._square.mul_(second).addcmul_(grad, grad, value=1.0 - second)
        self._counts[aim] = self._counts.get(aim, 0) + 1
        size = (self._square / (1.0 - second ** sum(self._counts.values()))).sqrt_().add_(_EPS)
        move = moment / (1.0 - first ** self._counts[aim]) / size
        self.scales = torch.maximum(self.scales - self._lr * move, self._lowest)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Eval mode, but BatchNorm uses the statistics of the batch (on this rank alone) and remembers none."""
    flags = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    aside = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, (mean, var) in zip(norms, aside, strict=True):
            norm.running_mean, norm.running_var = mean, var
        for module, training in flags:
            module.training = training


def rescale_initial(
    model: nn.Module,
    section: params.Recipe,
    masks: Masks,
    loaders: Loaders,
    loss: Loss,
    tell: Callable[[str], None] = lambda line: None,
) -> Rescaled:
    """What `recipe.rescale` asks for, on training images, before whatever else looks at a level's first weights.

    tell: gets a line that says how far the gradient's norm came. Call it on all ranks. Raises UserError when there are
    too few images.
    """
    options = {f.name: getattr(section.rescale, f.name) for f in dataclasses.fields(section.rescale)}
    size, batches = options.pop("batch_size"), options.pop("batches")
    batches = min(batches, count_batches(section, loaders.train.samples))
    scoring = loaders.scoring(per_class=None, batches=batches, batch_size=size, rank=0, ranks=1)
    with contextlib.closing(scoring):
        report = rescale(model, masks, scoring, loss, **options)
    bound = options["gamma"]
    over = "" if bound is None or report.norm <= 1.1 * bound else f", above gamma {bound:g}"
    tell(f"rescaled initial weights: gradient norm {report.norms[0]:.3g} to {report.norm:.3g}{over}")
    return report


def count_batches(section: params.Recipe, images: int) -> int:
    """Whole batches of `recipe.rescale.batch_size` in so many images. Raises UserError for fewer than two."""
    size = section.rescale.batch_size
    if images // size < 2:
        raise UserError(
            f"recipe.rescale.batch_size={size}: an iteration needs two batches of the {images} training images; "
            "lower it"
        )
    return images // size


def _joined(first: Batch, second: Batch) -> Batch:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _in_turn(batches: Iterable[Batch]) -> Generator[Batch, None, None]:
    found = True
    while found:
        found = False
        for batch in batches:
            found = True
            yield batch
    raise ValueError("there are no batches")
