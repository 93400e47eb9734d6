"""Run by torchrun: mask updates and a pruning within an epoch, other data on each rank; see test_masking_ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from utils import files, sparsity
from utils.masks import Masks, prunable_parameters
from utils.params.dynamic import Dynamic
from utils.params.early import Early
from utils.params.load import build as parameters
from utils.pruning import dynamic, triggers
from utils.pruning.midrun import MidRunPruning
from utils.system import distributed
from utils.system.console import Console
from utils.tasks.classification import ImageClassification
from utils.training.extension import Extension
from utils.training.trainer import Stage, Trainer

STEPS, EACH, ACCUMULATION = 12, 6, 2


class Share:
    """This rank's part of fixed batches of 12 images: another part on every rank."""

    def __init__(self, world: distributed.World, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = 2 * EACH // world.size
        part = slice(world.rank * size, (world.rank + 1) * size)
        self.batches = []
        for _ in range(count):
            images = torch.randn(2 * EACH, 3, 4, 4, generator=generator)
            labels = torch.randint(3, (2 * EACH,), generator=generator)
            self.batches.append((images[part], labels[part]))

    def set_epoch(self, level: int, epoch: int, start_batch: int = 0, size: int | None = None) -> None:
        pass

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Recording(Extension):
    """Digests of the masks after every step."""

    def __init__(self, held: sparsity.Sparsity) -> None:
        self.held, self.masks = held, []

    def after_step(self, step: int) -> None:
        self.masks.append(self.held.masks.digest)


def train(world: distributed.World, kind: str, out: Path) -> dict:
    """Two epochs of 12 steps; what this rank saw."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)]
    if kind == "midrun":
        layers.insert(1, nn.BatchNorm2d(8))
    model = nn.Sequential(*layers)
    keys = {"precision": "float32", "batch_size": 24, "accumulation": ACCUMULATION}
    params = parameters({"levels.count": 1, **{f"training.{key}": value for key, value in keys.items()}})
    spec = SimpleNamespace(image_size=4, size_at=lambda progress: None)
    loaders = SimpleNamespace(train=Share(world, STEPS * ACCUMULATION), val=None, test=Share(world, 1), spec=spec)
    place = {"seed": 0, "world": world, "device": torch.device("cpu"), "console": Console(False)}
    trainer = Trainer(model, ImageClassification(3), loaders, params.training, params.distributed, **place)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    half = Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in prunable_parameters(model).items()})
    held = sparsity.attach(model, optimizer, Masks.dense(model) if kind == "midrun" else half)
    extensions: list[Extension] = []
    scored: list[str] = []

    def prune() -> Masks:
        scored.append(files.digest(files.state_of(model)))
        return half

    if kind == "midrun":
        # The latest step lies within an epoch, where every rank has BatchNorm statistics of its own.
        watch = triggers.build(Early(threshold=1e-9), model=model, density=0.5)
        when = {"steps_per_epoch": STEPS, "at": 17, "trigger": watch}
        extensions.append(MidRunPruning(model, held, extensions, prune, **when))
    else:
        section = Dynamic(method=kind, every=4)
        where = {"total_steps": 2 * STEPS, "steps_per_epoch": STEPS, "seed": 3}
        extensions.append(
            dynamic.build(section, model=model, sparsity=held, extensions=extensions, **where),
        )
    recording = Recording(held)
    extensions.append(recording)
    rows = trainer.fit(Stage(0, 2, lambda step: 0.05), optimizer, held, extensions)
    held.masks.save(out / f"{kind}-{world.size}-{world.rank}.safetensors")
    return {
        "masks": recording.masks,
        "weights": files.digest(files.state_of(model)),
        "violations": held.violations(),
        "scored": scored,
        "updates": [row.get("mask_updates") for row in rows],
        "distances": [row.get("distance") for row in rows],
    }


def main() -> None:
    out, kind = Path(sys.argv[1]), sys.argv[2]
    world = distributed.world()
    distributed.start(world, torch.device("cpu"))
    report = train(world, kind, out)
    (out / f"rank{world.rank}.json").write_text(json.dumps(report))
    distributed.stop()


if __name__ == "__main__":
    main()
