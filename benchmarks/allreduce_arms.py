"""The two ranks of `benchmarks.allreduce`: gradients that cost nothing to compute, reduced as asked.

Answers `check DENSITY` with what is wrong, and `step ARM DENSITY` with the seconds of one backward pass.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import processes
from utils import files, models, params, sparsity
from utils.masks import Masks, prunable_parameters
from utils.system import distributed
from utils.training import reduction
from utils.training.parallel import warm, wrap

CPU = torch.device("cpu")
MODEL = "cifar/resnet18"


class Given(torch.autograd.Function):
    """A loss whose gradients are there already, so that backward does nothing but hand them to DDP."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


class Holder(nn.Module):
    """The weights of a network; its forward pass is the loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, gradients: list[Tensor]) -> Tensor:
        loss: Tensor = Given.apply(gradients, *self.network.parameters())
        return loss


class Arm:
    """One way to reduce: `dense` is DDP as it is, `packed` packs whatever has anything pruned, `none` sends nothing."""

    def __init__(self, choice: str, place: distributed.World) -> None:
        torch.manual_seed(0)
        self.network = models.build(MODEL, 10)
        holder = Holder(self.network)
        section = params.Distributed(reduction="packed" if choice == "packed" else "dense", packed_below=1.0)
        self.wrapped = wrap(holder, section, CPU)
        self.packing = reduction.install(self.wrapped, section, place, CPU)
        if choice == "none":
            self.wrapped.register_comm_hook(None, lambda state, bucket: at_once(bucket.buffer()))
        self.held = sparsity.attach(self.network, None, masks_at(self.network, 1.0))
        generator = torch.Generator().manual_seed(1 + place.rank)
        self.gradients = [torch.randn(p.shape, generator=generator) for p in self.network.parameters()]
        self.density = 1.0
        warm(self.wrapped, holder, lambda wrapped: wrapped(self.gradients).backward(), place)
        if self.packing is not None:
            self.packing.follow(self.held)

    def backward(self, density: float) -> None:
        """One backward pass inside random masks of `density`, begun by both ranks together."""
        if density != self.density:
            self.held.set(masks_at(self.network, density))
            self.density = density
        for p in self.network.parameters():
            p.grad = None
        loss = self.wrapped(self.gradients)
        dist.barrier()
        begin = time.perf_counter()
        loss.backward()
        self.seconds = time.perf_counter() - begin

    def reduced(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.network.named_parameters()}
        assert all(gradient is not None for gradient in found.values())
        return {name: gradient.contiguous() for name, gradient in found.items() if gradient is not None}


def masks_at(model: nn.Module, density: float) -> Masks:
    """Random masks, those of every rank."""
    generator = torch.Generator().manual_seed(7)
    return Masks({n: torch.rand(p.shape, generator=generator) < density for n, p in prunable_parameters(model).items()})


def at_once(buffer: Tensor) -> torch.futures.Future[Tensor]:
    """A reduction that has ended, of this rank's own gradients."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


def check(arms: dict[str, Arm], density: float) -> tuple[float, ...]:
    """Entries that differ between the arms, pruned ones that are not +0.0, entries too many, digests beyond one."""
    packed = arms["packed"]
    assert packed.packing is not None
    before = packed.packing.sent
    for choice in ("dense", "packed"):
        arms[choice].backward(density)
    ours, theirs = packed.reduced(), arms["dense"].reduced()
    differ = sum(int((ours[name] != theirs[name]).sum()) for name in theirs)
    masks = packed.held.masks
    alive = sum(int((ours[name][~mask].view(torch.int32) != 0).sum()) for name, mask in masks.items())
    uncovered = sum(gradient.numel() for gradient in ours.values()) - masks.total
    more = packed.packing.sent - before - masks.kept - uncovered
    return differ, alive, more, len(set(distributed.gather(files.digest(ours)))) - 1


def main() -> None:
    """Answer until the input ends."""
    place = distributed.world()
    distributed.start(place, CPU)
    arms = {choice: Arm(choice, place) for choice in ("dense", "packed", "none")}

    def reply(words: list[str]) -> tuple[float, ...]:
        if words[0] == "check":
            return check(arms, float(words[1]))
        arm = arms[words[1]]
        arm.backward(float(words[2]))
        return (arm.seconds,)

    processes.serve(reply)
    arms.clear()  # DDP goes before its group does
    distributed.stop()


if __name__ == "__main__":
    main()
