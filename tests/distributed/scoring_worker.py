"""Run by torchrun: every criterion on a fixed list of micro-batches dealt to the ranks, for test_scoring_ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import files
from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.criteria import criterion
from utils.pruning.harness import PruningHarness
from utils.system import distributed

SHAPE = (3, 6, 6)
SECTIONS = (
    {"density": 0.2},
    {"density": 0.1, "allocation": "erk", "rounds": 3},
    {"density": 0.2, "normalize": "lamp"},
    {"density": 0.15, "rounds": 2, "regrow": True, "pattern": "kernel"},
)


def network() -> nn.Module:
    """About 3,000 weights. Batch statistics are those of a micro-batch, which no split over ranks changes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 5),
    )  # fmt: skip


def micro_batches(world: distributed.World, count: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's of `count` micro-batches of 4 to 7 images; batch i is with rank i modulo the number of ranks."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for index in range(count):
        size = 4 + index % 4
        images = torch.randn(size, *SHAPE, generator=generator)
        batches.append((images, torch.randint(0, 5, (size,), generator=generator)))
    return batches[world.rank :: world.size]


def score(world: distributed.World, out: Path, count: int) -> dict[str, list[str]]:
    """Digests of each criterion's masks under all sections; rank 0 writes the scores of the dense network."""
    found: dict[str, list[str]] = {}
    for name in criterion.names():
        model, batches = network(), micro_batches(world, count)
        harness = PruningHarness(Pruning(criterion=name), seed=3, input_shape=SHAPE)
        scores = harness.score(model, Masks.dense(model), batches)
        if world.main:
            files.save_tensors(out / f"{name}-{count}.safetensors", scores, {})
        digests = []
        for more in SECTIONS:
            section = {key: value for key, value in more.items() if key != "density"}
            if name == "grasp" and "normalize" in section:
                continue
            harness = PruningHarness(Pruning(criterion=name, **section), seed=3, input_shape=SHAPE)
            digests.append(harness.prune(model, None, more["density"], batches).masks.digest)
        found[f"{name}-{count}"] = digests
    return found


def main() -> None:
    out = Path(sys.argv[1])
    world = distributed.world()
    distributed.start(world, torch.device("cpu"))
    # Two micro-batches leave the third rank none.
    report = {**score(world, out, 7), **score(world, out, 2)}
    (out / f"rank{world.rank}.json").write_text(json.dumps(report))
    distributed.stop()


if __name__ == "__main__":
    main()
