"""Run by torchrun: 13 steps with all four recipes, and what this rank saw, for test_recipes_ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from tests.distributed.steps_worker import Recording
from utils import data, files, sparsity
from utils.data.order import Shard
from utils.masks import Masks, prunable_parameters
from utils.params.load import build
from utils.system import distributed
from utils.system.console import Console
from utils.training.optimizers import build_optimizer
from utils.training.recipe.ghost import GhostSkips
from utils.training.recipe.rescale import rescale_initial
from utils.training.recipe.smoothing import LabelSmoothing
from utils.training.recipe.soft import SoftActivations
from utils.training.trainer import Stage, Trainer


class Frozen(nn.BatchNorm2d):
    """BatchNorm that stays in eval mode, so that ranks compute what one process does."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), Frozen(16), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(16, 16, 3, stride=2, padding=1), Frozen(16), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * 64, 10)]
    return nn.Sequential(*layers)


def train(world: distributed.World) -> dict:
    """One epoch and what came of it."""
    device = torch.device("cpu")
    params = build(
        {
            "data.name": "digits", "data.loader": "device", "data.augment": "none", "training.batch_size": 96,
            "training.precision": "float32", "training.epochs": 1, "levels.count": 1, "training.accumulation": 2,
            "recipe.soft.kind": "swish", "recipe.soft.end": "12it",
            "recipe.ghost.kind": "1x1", "recipe.ghost.end": "13it",
            "recipe.smoothing.schedule": "linear", "recipe.smoothing.end": "10it",
            "recipe.rescale.method": "sgd", "recipe.rescale.iterations": 3, "recipe.rescale.batch_size": 16,
            "recipe.rescale.lr": 0.05,
        }
    )  # fmt: skip
    loaders = data.build(params, Shard(world.rank, world.size, 96, 2), device, channels_last=False, workers=1)
    model, task, console = network(), Recording(10), Console(False)
    place = {"world": world, "device": device, "console": console}
    trainer = Trainer(model, task, loaders, params.training, params.distributed, seed=0, **place)
    task.losses = []
    generator = torch.Generator().manual_seed(1)
    masks = Masks({n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in prunable_parameters(model).items()})
    optimizer = build_optimizer(model, params.optimizer, device)
    held = sparsity.attach(model, optimizer, masks)
    recipe, per_epoch = params.recipe, trainer.steps_per_epoch
    soft = SoftActivations(model, recipe, per_epoch, per_epoch)
    ghost = GhostSkips(
        model, recipe, masks, optimizer, per_epoch, per_epoch, side=loaders.spec.image_size, seed=0, level=0
    )
    smoothing = LabelSmoothing(task, recipe, per_epoch, per_epoch)
    rescaled = rescale_initial(model, recipe, masks, loaders, task.scoring_loss, console.line)
    begin = {name: weight.detach().clone() for name, weight in ghost.weights.items()}
    trainer.fit(Stage(0, 1, lambda step: 0.05), optimizer, held, [soft, ghost, smoothing])
    loaders.close()
    return {
        "losses": task.losses,
        "weights": files.digest(files.state_of(model)),
        "ghosts": files.digest({name: weight.detach() for name, weight in ghost.weights.items()}),
        "moved": min(float((weight.detach() - begin[name]).abs().max()) for name, weight in ghost.weights.items()),
        "scales": rescaled.scales,
        "violations": held.violations(),
    }


def main() -> None:
    world = distributed.world()
    distributed.start(world, torch.device("cpu"))
    report = train(world)
    (Path(sys.argv[1]) / f"rank{world.rank}.json").write_text(json.dumps(report))
    distributed.stop()


if __name__ == "__main__":
    main()
