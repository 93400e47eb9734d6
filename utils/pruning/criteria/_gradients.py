"""What gradient criteria share: evaluating inside the masks, and gradients summed over micro-batches and ranks.

A rank sees its share of the scoring micro-batches, maybe none. Means are over all samples of all ranks; sums are taken
in float64 and rounded once, so that they hardly depend on how the samples are split over batches and ranks. Every rank
makes the same collective calls, whatever its share.

Copies of float32 weights at the peak, beside activations, the weights and their pruned values aside among them: about
a layer and 2 + density for a first-order mean at live places (its float64 sums are two), 4 - density for one at all
places; three more for a Hessian product, for its vector, the gradients of one micro-batch and products that are not
complete.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized

import torch
from torch import Tensor, nn

from utils.masks import Masks, filled
from utils.pruning.criteria import Batches, Loss
from utils.system.distributed import sum_over_ranks
from utils.training.double_backward import math_attention


def weights(model: nn.Module, masks: Masks) -> dict[str, nn.Parameter]:
    """The parameters of `model` that `masks` cover, by name, in the order of `masks`."""
    named = dict(model.named_parameters())
    return {name: named[name] for name in masks}


@contextlib.contextmanager
def inside(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Pruned weights are 0.0 in place within it and bitwise back afterwards; only their values are kept aside."""
    aside: dict[str, Tensor] = {}
    try:
        for name, weight in weights(model, masks).items():
            if masks.counts[name] < weight.numel():
                aside[name] = _take(weight.detach(), ~masks.on(weight.device)[name])
        yield
    finally:
        for name, weight in weights(model, masks).items():
            if name in aside:
                weight.detach().masked_scatter_(~masks.on(weight.device)[name], aside.pop(name))


def _take(weight: Tensor, pruned: Tensor) -> Tensor:
    """The values of `weight` at `pruned`, which are filled with 0.0."""
    values = weight.masked_select(pruned)
    weight.masked_fill_(pruned, 0.0)
    return values


@contextlib.contextmanager
def only(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within it just the parameters called `names` require gradients."""
    wanted = set(names)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def reduced(tensors: Mapping[str, Tensor]) -> None:
    """Sum every tensor in place over the ranks, in the mapping's order, which must be the same on all."""
    for tensor in tensors.values():
        sum_over_ranks(tensor)


class Sums:
    """float64 sums over samples, one tensor per weight, and how many samples they hold."""

    def __init__(self, found: Mapping[str, nn.Parameter], only: Masks | None = None) -> None:
        """only: places to sum at; means are 0 elsewhere. It saves memory where many weights are pruned."""
        self._weights = found
        self._places: dict[str, Tensor] = {}
        if only is not None:
            pruned = [name for name, weight in found.items() if only.counts[name] < weight.numel()]
            self._places = {name: only.on(found[name].device)[name] for name in pruned}
        # Flat or contiguous whatever the weight's strides: collectives need the same dense layout on every rank.
        self._sums = {n: torch.zeros(self._shape(n), dtype=torch.float64, device=w.device) for n, w in found.items()}
        self._samples = 0

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._places:
            return (int(self._places[name].count_nonzero()),)
        return tuple(self._weights[name].shape)

    @contextlib.contextmanager
    def collecting(self, samples: int, square: bool = False) -> Iterator[None]:
        """Take `samples` times the gradients (or their squares) of one backward pass; nothing is left in `.grad`.

        A weight's gradient is added when it is complete and freed at once, so that one layer's is alive at a time.
        """
        aside = [(weight, weight.grad) for weight in self._weights.values()]
        handles = []
        for name, weight in self._weights.items():
            weight.grad = None
            # Taken before it is accumulated: hooks that mask what accumulates must not hide pruned places.
            handles.append(weight.register_hook(self._adder(name, samples, square)))
            handles.append(weight.register_post_accumulate_grad_hook(_free))
        try:
            yield
            self._samples += samples
        finally:
            for handle in handles:
                handle.remove()
            for weight, grad in aside:
                weight.grad = grad

    def _adder(self, name: str, samples: int, square: bool) -> Callable[[Tensor], None]:
        total, place = self._sums[name], self._places.get(name)

        def add(grad: Tensor) -> None:
            grad = grad.detach() if place is None else grad.detach()[place]
            if square:
                total.addcmul_(grad, grad, value=samples)  # squared in float64, as the result's precision asks
            else:
                total.add_(grad, alpha=samples)

        return add

    def add(self, samples: int, grads: Mapping[str, Tensor]) -> None:
        """Add `samples` times these gradients, by name."""
        for name, grad in grads.items():
            self._adder(name, samples, square=False)(grad)
        self._samples += samples

    def means(self, rounded: bool = True) -> dict[str, Tensor]:
        """Means over all samples of all ranks, in the precision of scores or else in float64. Ends these sums.

        Raises ValueError when no rank added anything.
        """
        if not self._sums:
            return {}
        samples = torch.full((1,), self._samples, dtype=torch.float64, device=next(iter(self._sums.values())).device)
        reduced({**self._sums, "": samples})
        if not samples.item():
            raise ValueError("there are no scoring batches")
        for total in self._sums.values():
            total.div_(samples)
        return {n: self._spread(n, precision(w) if rounded else torch.float64) for n, w in self._weights.items()}

    def _spread(self, name: str, dtype: torch.dtype) -> Tensor:
        total, place = self._sums.pop(name).to(dtype), self._places.pop(name, None)
        return (
            total
            if place is None
            else torch.zeros(place.shape, dtype=dtype, device=place.device).masked_scatter_(place, total)
        )


def precision(weight: Tensor) -> torch.dtype:
    """What the weight's scores are computed in: float64 for float64 weights, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def mean_gradients(
    model: nn.Module, masks: Masks, batches: Batches, loss: Loss, everywhere: bool = True
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all samples of all ranks at the current weights; 0 where nothing depends on one.

    batches: this rank's share. everywhere: at pruned places too; else 0 there, in less memory. Raises ValueError when
    no rank has a batch.
    """
    sums = Sums(weights(model, masks), None if everywhere else masks)
    with only(model, masks):
        for batch in batches:
            value = loss(model, batch)
            with sums.collecting(len(batch[0])):
                if value.requires_grad:
                    value.backward()
    return sums.means()


@torch.no_grad()
def times_weights(model: nn.Module, masks: Masks, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` multiplied in place by the weights as they are now; outside `inside` these are the unmasked ones."""
    for name, weight in weights(model, masks).items():
        tensors[name].mul_(weight)
    return tensors


def hessian_products(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    vectors: Mapping[str, Tensor],
    first: tuple[int, dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Hessian of the mean loss times `vectors`, both over the prunable weights alone, at the current weights.

    Taken micro-batch by micro-batch as the gradient of <vector, grad L_b>, whose graph is freed before the next.
    batches: this rank's share. first: samples of a micro-batch that is not among them and its gradients with graph,
    which are taken out. Raises ValueError when no rank has a batch.
    """
    found = weights(model, masks)
    sums, (samples, grads) = Sums(found), first or (0, {})
    with only(model, masks), math_attention():
        _add_products(sums, samples, grads, vectors)
        grads.clear()  # and the graph with it, before the next
        for batch in batches:
            _add_products(sums, len(batch[0]), _gradient_graph(loss(model, batch), found), vectors)
    return sums.means()


def gradient_products(
    model: nn.Module, masks: Masks, batches: Batches, loss: Loss, live: bool = False
) -> dict[str, Tensor]:
    """`hessian_products` with the mean gradient of the same batches as the vectors: H g, or H (m g) with `live`.

    The graph of this rank's last micro-batch is kept from the first pass to the second, which begins with it: one
    forward and one backward pass less, in no more memory. Raises ValueError when no rank has a batch.
    """
    found = weights(model, masks)
    shared = batches if isinstance(batches, Sized) else list(batches)
    sums, last, kept = Sums(found), len(shared) - 1, (0, dict[str, Tensor]())
    with only(model, masks), math_attention():  # g by the kernels that H has, so that the two belong to one function
        for number, batch in enumerate(shared):
            value, samples = loss(model, batch), len(batch[0])
            if number == last:
                kept = samples, _gradient_graph(value, found)
                sums.add(samples, kept[1])
            else:
                with sums.collecting(samples):
                    if value.requires_grad:
                        value.backward()
            del value
        vectors = sums.means()
        if live:
            vectors = {name: filled(vector, masks.on(vector.device)[name]) for name, vector in vectors.items()}
        return hessian_products(model, masks, itertools.islice(shared, max(0, last)), loss, vectors, kept)


def _add_products(sums: Sums, samples: int, grads: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
    """Add `samples` times the gradient of <vectors, grads> to `sums`. Ends the graph of `grads`."""
    curved = {name: grad for name, grad in grads.items() if grad.requires_grad}  # those that depend on the weights
    with sums.collecting(samples):
        if curved:
            # The vectors go in as outer gradients: no product as large as the weights is formed.
            torch.autograd.backward(list(curved.values()), [vectors[name].to(g) for name, g in curved.items()])


def _gradient_graph(value: Tensor, found: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients of `value` with graph, of those weights that it depends on."""
    if not value.requires_grad or not found:
        return {}
    grads = torch.autograd.grad(value, list(found.values()), create_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(found, grads, strict=True) if grad is not None}


def _free(weight: Tensor) -> None:
    weight.grad = None
