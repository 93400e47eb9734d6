"""Run by torchrun: reduces the same gradients with DDP as it is and packed, for test_reduction_ranks.py."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import params, sparsity
from utils.masks import Masks, prunable_parameters
from utils.system import distributed
from utils.training import reduction
from utils.training.parallel import to_channels_last

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 24, 3, stride=2, padding=1, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip
    to_channels_last(model)
    return model


def masks_of(model: nn.Module, density: float, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(p.shape, generator=generator) < density for n, p in prunable_parameters(model).items()})


class Arm:
    """A network in DDP with buckets of a few thousand entries, and its masks."""

    def __init__(self, world: distributed.World, choice: str) -> None:
        self.model = network()
        self.wrapped = nn.parallel.DistributedDataParallel(
            self.model, bucket_cap_mb=0.01, gradient_as_bucket_view=True, init_sync=False
        )
        section = params.Distributed(reduction=choice, packed_below=1.0)
        self.reduction = reduction.install(self.wrapped, section, world, CPU)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.held = sparsity.attach(self.model, self.optimizer, masks_of(self.model, 0.3, 0))

    def backward(self, images: torch.Tensor, dtype: torch.dtype, micro_batches: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(images.chunk(micro_batches)):
            last = number + 1 == micro_batches
            with contextlib.nullcontext() if last else self.wrapped.no_sync():
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = self.wrapped(part).float().square().mean()
                loss.backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


STEPS: list[tuple[str, torch.dtype, int, float | None, bool]] = [
    ("first, before DDP makes its buckets anew", torch.float32, 1, None, False),
    ("second", torch.float32, 1, None, False),
    ("masks changed", torch.float32, 1, 0.1, False),
    ("bfloat16", torch.bfloat16, 1, None, False),
    ("two micro-batches", torch.float32, 2, None, False),
    ("dense gradients asked for", torch.float32, 1, None, True),
    ("denser masks", torch.bfloat16, 2, 0.6, False),
    ("dense masks", torch.float32, 1, 1.0, False),
    ("no hooks", torch.float32, 1, 0.2, False),
]
"""Name, precision, micro-batches, density of new masks, whether gradients are left dense."""


def unlike(world: distributed.World) -> str:
    """What is said where each rank is told another way to reduce."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    section = params.Distributed(reduction="packed" if world.rank else "dense")
    try:
        reduction.install(wrapped, section, world, CPU)
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    world = distributed.world()
    distributed.start(world, CPU)
    refused = unlike(world)
    layouts: list[list[int]] = []
    plain_reduce = reduction.PackedReduction.reduce

    def watched(self: reduction.PackedReduction, bucket: Any) -> Any:
        layouts[-1].append(len(bucket.parameters()))
        return plain_reduce(self, bucket)

    reduction.PackedReduction.reduce = watched  # type: ignore[method-assign]
    plain, packed = Arm(world, "dense"), Arm(world, "packed")
    assert plain.reduction is None
    assert packed.reduction is not None
    packed.reduction.follow(packed.held)
    report = []
    for number, (name, dtype, micro_batches, density, dense) in enumerate(STEPS):
        torch.manual_seed(100 * number + world.rank)
        images = torch.randn(8, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        layouts.append([])
        sent = packed.reduction.sent
        for arm in (plain, packed):
            if density is not None:
                arm.held.set(masks_of(arm.model, density, number))
            arm.held.dense_gradients(dense)
            if name == "no hooks":  # what is pruned then goes nowhere all the same
                arm.held.detach()
            arm.backward(images, dtype, micro_batches)
        ours, theirs, masks = packed.gradients(), plain.gradients(), packed.held.masks
        if name == "no hooks":
            assert any(bool(theirs[key][~mask].any()) for key, mask in masks.items())
            for key in masks:
                packed.held.zero_pruned(key, theirs[key])
        pruned = torch.cat([ours[key][~mask] for key, mask in masks.items()])
        report.append(
            {
                "name": name,
                "worst": max(float((ours[key] - theirs[key]).abs().max()) for key in theirs),
                "largest": max(float(value.abs().max()) for value in theirs.values()),
                "names": sorted(ours) == sorted(theirs),
                "pruned": int((pruned.view(torch.int32) != 0).sum()),
                "strides": all(p.grad.stride() == p.stride() for p in packed.model.parameters()),
                "sent": packed.reduction.sent - sent,
                "kept": masks.kept,
                "covered": masks.total,
                "all": sum(p.numel() for p in packed.model.parameters()),
                "buckets": layouts[-1],
            }
        )
        for arm in (plain, packed):
            arm.held.dense_gradients(False)
            arm.held.project()
            arm.optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in packed.model.parameters()])
    same = distributed.gather(weights.numpy().tobytes())
    found = {"steps": report, "same": len(set(same)), "unlike": refused}
    Path(sys.argv[1], f"rank{world.rank}.json").write_text(json.dumps(found))
    del plain, packed, arm
    distributed.stop()


if __name__ == "__main__":
    main()
