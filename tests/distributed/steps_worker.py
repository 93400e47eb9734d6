"""Run by torchrun: trains 20 steps and writes what each rank saw, for test_ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from utils import data, files, sparsity
from utils.data.order import Shard
from utils.masks import Masks, prunable_parameters
from utils.params.load import build
from utils.system import distributed
from utils.system.console import Console
from utils.tasks.classification import ImageClassification
from utils.training.optimizers import build_optimizer
from utils.training.trainer import Stage, Trainer


class Recording(ImageClassification):
    """Keeps the mean loss of every optimizer step over all ranks."""

    losses: list[float]

    def loss(self, model, batch, key=None):
        loss, logits = super().loss(model, batch, key)
        if model.training and loss.requires_grad and hasattr(self, "losses"):
            self.losses.append(float(distributed.mean_over_ranks(loss.detach().double().clone())))
        return loss, logits


class Skipping(nn.Sequential):
    """Has a layer that its forward pass never calls."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for layer in list(self)[:-1]:
            images = layer(images)
        return images


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
    ]
    if kind == "norm":
        layers.insert(1, nn.BatchNorm2d(16))
    layers += [nn.Flatten(), nn.Linear(16 * 64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return Skipping(*layers, nn.Linear(3, 3)) if kind == "unused" else nn.Sequential(*layers)


def train(world: distributed.World, kind: str, accumulation: int) -> dict:
    """20 steps and more of a masked network on digits; what this rank saw."""
    device = torch.device("cpu")
    params = build(
        {
            "data.name": "digits",
            "data.loader": "device",
            "data.augment": "none",
            "training.batch_size": 48,
            "training.accumulation": accumulation,
            "training.precision": "float32",
            "training.epochs": 1,
            "levels.count": 1,
            "distributed.find_unused_parameters": kind == "unused",
        }
    )
    shard = Shard(world.rank, world.size, 48, accumulation)
    loaders = data.build(params, shard, device, channels_last=False, workers=1)
    model, task = network(kind), Recording(10)
    place = {"world": world, "device": device, "console": Console(False)}
    trainer = Trainer(model, task, loaders, params.training, params.distributed, seed=0, **place)
    task.losses = []
    generator = torch.Generator().manual_seed(1)
    masks = Masks({n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in prunable_parameters(model).items()})
    optimizer = build_optimizer(model, params.optimizer, device)
    held = sparsity.attach(model, optimizer, masks)
    rows = trainer.fit(Stage(0, 1, lambda step: 0.05), optimizer, held)
    loaders.close()
    return {
        "losses": task.losses,
        "weights": files.digest(files.state_of(model)),
        "masks": held.masks.digest,
        "violations": held.violations(),
        "row": {k: v for k, v in rows[0].items() if k not in ("seconds", "images_per_second", "data_wait")},
    }


def main() -> None:
    out, kind, accumulation = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    world = distributed.world()
    distributed.start(world, torch.device("cpu"))
    report = train(world, kind, accumulation)
    (out / f"rank{world.rank}.json").write_text(json.dumps(report))
    distributed.stop()


if __name__ == "__main__":
    main()
