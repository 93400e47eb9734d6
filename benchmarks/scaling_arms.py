"""The two ranks of `benchmarks.scaling`: the same training step dense, in masks, and as the published harness masks.

Answers `check` with what is wrong after some steps, and `step ARM COUNT` with the seconds of so many steps; for
`benchmarks.cost_check` `solo COUNT` with those of steps that no rank waits for, `forward COUNT` with those of
evaluating so many batches, and `reduce` with those of averaging one gradient.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import processes
from utils import files, models, params, sparsity
from utils.masks import Masks, prunable_parameters
from utils.system import distributed
from utils.training import precision
from utils.training.masked_update import MaskedUpdate, Unfit
from utils.training.optimizers import build_optimizer
from utils.training.parallel import to_channels_last, warm, wrap

CPU = torch.device("cpu")
DENSITY = 0.1
CLASSES, SIDE = 10, 32


def masks_of(network: nn.Module) -> Masks:
    """Random masks, those of every rank and arm."""
    generator = torch.Generator().manual_seed(7)
    prunable = prunable_parameters(network).items()
    return Masks({n: torch.rand(p.shape, generator=generator) < DENSITY for n, p in prunable})


def multiply_masks(network: nn.Module, masks: Masks) -> None:
    """The published harness's way: every layer has its mask as a float32 buffer, and its forward pass multiplies."""
    layers = dict(network.named_modules())
    for name in masks:
        layer: Any = layers[name.rpartition(".")[0]]
        if layer.weight[0, 0].numel() == 1:  # else DDP would copy the gradient of the product, with other strides
            layer.weight.data = torch.empty(layer.weight.shape).copy_(layer.weight.data)
        mask = masks[name].to(torch.float32)
        layer.register_buffer("mask", torch.empty_like(layer.weight).copy_(mask))
        layer.forward = _multiplied(layer)


def _multiplied(layer: Any) -> Any:
    if isinstance(layer, nn.Conv2d):
        return lambda x: layer._conv_forward(x, layer.weight * layer.mask, layer.bias)
    return lambda x: functional.linear(x, layer.weight * layer.mask, layer.bias)


class Arm:
    """One way to train: `dense` (the same weights are zero, none is masked), `masked` or `published`."""

    def __init__(self, name: str, model: str, batch: int, place: distributed.World) -> None:
        self.network = models.build(model, CLASSES, image_size=SIDE)
        to_channels_last(self.network)
        masks = masks_of(self.network)
        masks.apply_(self.network)
        self.rank, self.batch = place.rank, batch
        if name == "solo":
            self.wrapped: nn.Module = self.network
        elif name == "published":
            multiply_masks(self.network, masks)
            self.wrapped = nn.parallel.DistributedDataParallel(self.network)
        else:
            self.wrapped = wrap(self.network, params.Distributed(), CPU)
        if name != "solo":
            warm(self.wrapped, self.network, lambda wrapped: wrapped(self.images(2)).sum().backward(), place)
        self.optimizer = build_optimizer(self.network, params.Optimizer(lr=0.05), CPU)
        self.held = sparsity.attach(self.network, self.optimizer, masks) if name == "masked" else None
        self.step: Callable[[], object] = self.optimizer.step
        if self.held is not None:
            try:
                self.step = MaskedUpdate(self.optimizer, self.held).step
                self.held.late_gradients(True)
            except Unfit as unfit:  # then gradients are masked by hooks, and weights after the step
                print(f"rank {self.rank}: masks take passes of their own, slower: {unfit}", file=sys.stderr, flush=True)

    def images(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.rank)
        found = torch.randn(count, 3, SIDE, SIDE, generator=generator)
        return found.contiguous(memory_format=torch.channels_last)

    def train(self, steps: int, lr: float, together: bool = True) -> float:
        """Seconds of `steps` training steps; together: begun by both ranks at once."""
        images = self.images(self.batch)
        labels = torch.arange(self.batch) % CLASSES
        self.optimizer.param_groups[0]["lr"] = lr
        if together:
            dist.barrier()
        begin = time.perf_counter()
        for _ in range(steps):
            with precision.autocast(CPU, torch.bfloat16):
                loss = functional.cross_entropy(self.wrapped(images).float(), labels)
            loss.backward()
            self.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    @torch.no_grad()
    def evaluate(self, batches: int) -> float:
        """Seconds of so many forward passes of twice the batch, as an evaluation has."""
        images = self.images(2 * self.batch)
        self.network.eval()
        begin = time.perf_counter()
        for _ in range(batches):
            with precision.autocast(CPU, torch.bfloat16):
                self.network(images)
        seconds = time.perf_counter() - begin
        self.network.train()
        return seconds

    def digests(self) -> int:
        """Different digests of the weights among the ranks, beyond one."""
        weights = {name: p.detach() for name, p in self.network.named_parameters()}
        return len(set(distributed.gather(files.digest(weights)))) - 1


def check(arms: dict[str, Arm]) -> tuple[float, ...]:
    """Digests beyond one (masked, published), violations, and how far both kinds of masking lie apart after 3 steps."""
    for name in ("masked", "published"):
        arms[name].train(3, 0.05)
    held = arms["masked"].held
    assert held is not None
    ours, theirs = (dict(arms[name].network.named_parameters()) for name in ("masked", "published"))
    apart = max(float((ours[n][mask] - theirs[n][mask]).detach().abs().max()) for n, mask in held.masks.items())
    return arms["masked"].digests(), arms["published"].digests(), len(held.violations()), apart


def mask_bytes(arms: dict[str, Arm]) -> float:
    """What the masks weigh as float32."""
    held = arms["masked"].held
    assert held is not None
    return 4.0 * held.masks.total


def reduce_once(entries: int) -> float:
    """Seconds in which a gradient of so many entries is averaged, with nothing beside it."""
    gradient = torch.ones(entries)
    dist.barrier()
    begin = time.perf_counter()
    dist.all_reduce(gradient)
    return time.perf_counter() - begin


def main(model: str, batch: int) -> None:
    """Answer until the input ends. Weights move in `check` alone, so that all arms stay equally sparse."""
    place = distributed.world()
    distributed.start(place, CPU)
    arms = {name: Arm(name, model, batch, place) for name in ("solo", "dense", "masked", "published")}
    entries = sum(p.numel() for p in arms["solo"].network.parameters())

    def reply(words: list[str]) -> tuple[float, ...]:
        if words[0] == "check":
            return (*check(arms), mask_bytes(arms))
        if words[0] == "solo":
            return (arms["solo"].train(int(words[1]), 0.0, together=False),)
        if words[0] == "forward":
            return (arms["solo"].evaluate(int(words[1])),)
        if words[0] == "reduce":
            return reduce_once(entries), entries
        return (arms[words[1]].train(int(words[2]), 0.0),)

    processes.serve(reply)
    arms.clear()  # DDP goes before its group does
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
