"""ProsPr: pruning by the loss after the first steps of training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from utils.masks import Masks, bare
from utils.pruning.criteria import Batches, Loss, Scores, criterion
from utils.pruning.criteria._gradients import precision, weights
from utils.system import distributed
from utils.system.errors import UserError
from utils.training.double_backward import math_attention

Pair = tuple[Tensor, Tensor]


@criterion("prospr", batchnorm="train", reads="train", batches=lambda options: options["steps"] + 1)
def prospr(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
    steps: int = 3,
    lr: float = 0.1,
    momentum: float = 0.0,
    first_order: bool = False,
) -> Scores:
    """|dL(theta_K)/dm| through K steps of SGD (ProsPr, Alizadeh et al. 2022); reads K+1 training batches.

    theta_0 = m * theta; theta_{k+1} follows SGD (lr, momentum, as torch's, no weight decay) on the loss of batch k, for
    every parameter that trains, pruned weights staying 0; L is the loss of batch K. The mask enters at theta_0 alone,
    so the score is |theta * dL(theta_K)/dtheta_0|, at pruned places too. first_order: the steps' gradients count as
    constants. With fewer than K+1 batches they are used in turn (pruning.batches sets how many there are). BatchNorm in
    train mode, on copies of its running statistics.

    Ranks: one meta-gradient has one sequence of steps, so every rank gets the first K+1 batches of all, in the global
    order (batch i is with rank i modulo the number of ranks), and computes the same; micro-batches are the steps'
    batches. Peak memory, in copies of the weights: about K + 4, and all activations of the K+1 batches at once, kept
    for the second derivative; with first_order about 5, and the activations of one batch; momentum adds 1.

    Raises UserError for options out of range, ValueError without batches.
    """
    if not (steps >= 1 and lr >= 0 and 0 <= momentum < 1):
        raise UserError("pruning.criterion_options: prospr needs steps >= 1, lr >= 0 and 0 <= momentum < 1")
    model = bare(model)
    found = weights(model, masks)
    data = gathered(batches, steps + 1, next(model.parameters()).device)
    if not data:
        raise ValueError("there are no scoring batches")
    with math_attention(), torch.enable_grad():
        start = _start(model, masks)
        end = _train(model, masks, loss, start, data, steps, lr, momentum, first_order)
        value = _loss(model, loss, end, data[steps % len(data)])
        leaves = [start[name] for name in masks]
        grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    scores: Scores = {}
    with torch.no_grad():
        for (name, weight), grad in zip(found.items(), grads, strict=True):
            score = torch.zeros_like(weight) if grad is None else grad.mul(weight).abs_()
            scores[name] = score.detach().to(precision(weight))
    return scores


def _start(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """theta_0: every parameter that trains, masked, as a leaf of its own."""
    start: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in masks:
            pruned = ~masks.on(parameter.device)[name]
            start[name] = parameter.detach().masked_fill(pruned, 0.0).requires_grad_()
        elif parameter.requires_grad:
            start[name] = parameter.detach().clone().requires_grad_()
    return start


def _train(
    model: nn.Module,
    masks: Masks,
    loss: Loss,
    start: dict[str, Tensor],
    data: list[Pair],
    steps: int,
    lr: float,
    momentum: float,
    first_order: bool,
) -> dict[str, Tensor]:
    """theta_K, with the graph back to `start`."""
    theta = dict(start)
    velocity: dict[str, Tensor] = {}
    kept = {name: masks.on(start[name].device)[name] for name in masks if masks.counts[name] < masks[name].numel()}
    for step in range(steps):
        value = _loss(model, loss, theta, data[step % len(data)])
        grads = torch.autograd.grad(value, list(theta.values()), create_graph=not first_order, allow_unused=True)
        for name, grad in zip(list(theta), grads, strict=True):
            if grad is None:
                continue
            grad = grad * kept[name] if name in kept else grad
            if momentum:
                grad = velocity[name] = grad + momentum * velocity[name] if name in velocity else grad
            theta[name] = theta[name] - lr * grad
    return theta


class _Stateless(nn.Module):
    """`model` with other tensors in the place of its parameters and buffers."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.tensors = model, tensors

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return functional_call(self.model, self.tensors, inputs, options)


def _loss(model: nn.Module, loss: Loss, theta: dict[str, Tensor], batch: Pair) -> Tensor:
    # Running statistics move in copies: they are not read, and the graph must not see them change.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return loss(_Stateless(model, {**buffers, **theta}), batch)


def gathered(batches: Batches, count: int, device: torch.device) -> list[Pair]:
    """The first `count` batches of all ranks in the global order, on every rank; this rank's own without a group."""
    mine = list(batches)
    if not distributed.active():
        return mine[:count]
    layouts = distributed.gather([[_layout(tensor) for tensor in batch] for batch in mine])
    size = len(layouts)
    total = sum(map(len, layouts))
    if any(len(found) != (total - rank + size - 1) // size for rank, found in enumerate(layouts)):
        raise ValueError("batch i must be with rank i modulo the number of ranks")
    found: list[Pair] = []
    for index in range(min(count, total)):
        owner, place = index % size, index // size
        own = mine[place] if owner == dist.get_rank() else None
        images, labels = (
            _sent(own[part] if own else None, layout, owner, device)
            for part, layout in enumerate(layouts[owner][place])
        )
        found.append((images, labels))
    return found


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, bool]:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tuple(tensor.shape), tensor.dtype, last and not tensor.is_contiguous()


def _sent(
    tensor: Tensor | None, layout: tuple[tuple[int, ...], torch.dtype, bool], owner: int, device: torch.device
) -> Tensor:
    """The owner's tensor on every rank, in the owner's memory format, so that all run the same kernels."""
    shape, dtype, channels_last = layout
    sent = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    dist.broadcast(sent, src=owner)
    return sent.contiguous(memory_format=torch.channels_last) if channels_last else sent
