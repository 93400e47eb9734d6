"""Whether a plan can work: asked by `--run.plan` and by every run before it writes anything."""

from __future__ import annotations

import torch

from utils import models, pruning
from utils.data.spec import DataSpec
from utils.masks import Masks
from utils.params import Params
from utils.params.plan import Level
from utils.rewinding import check_rewind
from utils.system.errors import UserError
from utils.training.schedules import lr_at


def build_model(params: Params, spec: DataSpec, pretrained: str) -> torch.nn.Module:
    """The config's network for images of `spec`, tried on every size training and evaluation will show it."""
    others = {"data.eval_size": spec.eval_size}
    if (first := spec.size_at(0.0)) is not None:
        others["data.progressive_size"] = first
    return models.build(
        params.model.name,
        spec.classes,
        pretrained=pretrained,
        image_size=spec.image_size,
        other_sizes=others,
        seed=params.run.seed,
    )


def check_pruning(harness: pruning.PruningHarness, params: Params, plan: list[Level], dense: Masks) -> None:
    """Raise UserError for densities of the plan that no pruning can reach."""
    densities = [level.density for level in plan if level.density < 1.0]
    harness.check(dense, densities, iterative=params.pruning.moment == "levels")


def check_steps(params: Params, plan: list[Level], steps_per_epoch: int) -> None:
    """Raise UserError for a step that lies outside training, which only the number of steps per epoch shows."""
    for level in plan:
        if level.epochs:
            lr_at(0, params.schedule, params.optimizer.lr, level.epochs * steps_per_epoch, steps_per_epoch)
    check_rewind(params, plan, steps_per_epoch)
    if params.levels.finetune_lr is None and not plan[0].epochs and any(p.rewind == "none" and p.epochs for p in plan):
        raise UserError("levels.finetune_lr: level 0 trains 0 epochs and has no last learning rate; set one")
