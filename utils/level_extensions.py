"""What acts while a level trains: recipes, averaging, mask updates, pruning in mid-training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from utils.level_masks import LevelMasks
from utils.masks import Masks
from utils.params import Params
from utils.params.plan import Level
from utils.pruning import dynamic, triggers
from utils.pruning.midrun import MidRunPruning
from utils.training.averaging import ExponentialAverage
from utils.training.extension import Extension
from utils.training.gradient_norms import GradientNorms
from utils.training.recipe import stock
from utils.training.recipe.ghost import GhostSkips
from utils.training.recipe.rescale import rescale_initial
from utils.training.recipe.smoothing import LabelSmoothing
from utils.training.recipe.soft import SoftActivations
from utils.training.schedules import lr_at
from utils.training.trainer import Stage, Trainer

Rate = Callable[[int], float]


@dataclass
class LevelExtensions:
    """The extensions of one level, in the order they act in."""

    all: list[Extension] = field(default_factory=list)
    average: ExponentialAverage | None = None
    midrun: MidRunPruning | None = None

    @property
    def pruned_at_step(self) -> int | None:
        """Optimizer step of a pruning in mid-training; None where none happened."""
        return self.midrun.pruned_at_step if self.midrun is not None else None

    def close(self) -> None:
        """The level has trained: the model and the task are left as without extensions."""
        for extension in reversed(self.all):
            extension.close()


def assemble(
    params: Params,
    level: Level,
    stage: Stage,
    trainer: Trainer,
    masks_of: LevelMasks,
    masks: Masks,
    optimizer: torch.optim.Optimizer,
    fresh: bool,
) -> LevelExtensions:
    """The extensions a config asks for. `stage` is the level's training, which an early pruning may prolong.

    masks: those training begins with, already attached, with the weights of that moment in the model. fresh: no stored
    state takes their place.
    """
    found = LevelExtensions()
    found.all += _recipes(params, level, stage, trainer, masks, optimizer)
    _rescale(params, level, stage, trainer, masks, fresh)  # before any other extension looks at the weights
    if params.training.gradient_norms:
        out = masks_of.run.level(level.number).gradients if trainer.world.main else None
        steps = params.training.gradient_norms
        found.all.append(GradientNorms(trainer.model, steps, stage.start, lambda: trainer.scaler.get_scale(), out))
    if params.training.ema is not None:
        found.average = ExponentialAverage(trainer.model, params.training.ema)
        found.average.masks_changed(masks)
        found.all.append(found.average)
    if params.dynamic.method is not None:
        found.all.append(_dynamic(params, level, trainer, masks_of, found.all))
    if params.pruning.moment in ("step", "early"):
        found.midrun = _midrun(params, level, stage, trainer, masks_of, found.all)
        found.all.append(found.midrun)
    return found


def _recipes(
    params: Params, level: Level, stage: Stage, trainer: Trainer, masks: Masks, optimizer: torch.optim.Optimizer
) -> list[Extension]:
    """First of all, so that whatever acts after them at a step sees the network as it trains there."""
    recipe, per_epoch, start = params.recipe, trainer.steps_per_epoch, stage.start
    total, found = level.epochs * per_epoch, list[Extension]()
    if not total:
        return found
    if recipe.soft.kind is not None and not recipe.soft.keep:
        found.append(SoftActivations(trainer.model, recipe, total, per_epoch, start))
    if recipe.ghost.kind is not None and level.density == 1.0:
        trainer.console.line("ghost skips: none, for nothing is masked in this level")
    elif recipe.ghost.kind is not None:
        place = {"side": trainer.loaders.spec.image_size, "seed": params.run.seed, "level": level.number}
        ghost = GhostSkips(trainer.model, recipe, masks, optimizer, total, per_epoch, **place, start=start)
        trainer.console.line(f"ghost skips: {len(ghost.sites)}, with {ghost.parameters:,} weights of their own")
        found.append(ghost)
    if recipe.smoothing.schedule is not None:
        found.append(LabelSmoothing(trainer.task, recipe, total, per_epoch, start))
    return found


def _rescale(params: Params, level: Level, stage: Stage, trainer: Trainer, masks: Masks, fresh: bool) -> None:
    """Rescale the weights of a level that starts from initial ones; a checkpoint holds rescaled ones."""
    initial = level.source is None or level.rewind == "imp"
    if params.recipe.rescale.method is not None and initial and level.epochs and fresh:
        rescale_initial(
            trainer.model, params.recipe, masks, trainer.loaders, trainer.task.scoring_loss, trainer.console.line
        )


def _dynamic(
    params: Params, level: Level, trainer: Trainer, masks_of: LevelMasks, extensions: list[Extension]
) -> Extension:
    def prune(density: float, live: Masks) -> Masks:
        with stock(extensions):
            return masks_of.prune_connected(live, density)

    return dynamic.build(
        params.dynamic,
        total_steps=level.epochs * trainer.steps_per_epoch,
        steps_per_epoch=trainer.steps_per_epoch,
        model=trainer.model,
        sparsity=masks_of.sparsity,
        extensions=extensions,
        seed=params.run.seed,
        level=level.number,
        density=level.density,
        prune=prune,
    )


def _midrun(
    params: Params,
    level: Level,
    stage: Stage,
    trainer: Trainer,
    masks_of: LevelMasks,
    extensions: list[Extension],
) -> MidRunPruning:
    per_epoch, early = trainer.steps_per_epoch, params.early
    on_pruned: Callable[[int], None] = lambda step: None  # noqa: E731
    if params.pruning.moment == "step":
        assert params.pruning.step is not None
        at, trigger = params.pruning.step.at(per_epoch), None
    else:
        at = early.latest.at(per_epoch) if early.latest is not None else level.epochs * per_epoch
        trigger = triggers.build(early, model=trainer.model, density=level.density)
        if early.length == "published":
            on_pruned = _prolong(params, stage, level.epochs, per_epoch)

    def prune() -> Masks:
        with stock(extensions):
            return masks_of.prune_connected(masks_of.sparsity.masks, level.density)

    return MidRunPruning(
        trainer.model,
        masks_of.sparsity,
        extensions,
        prune,
        steps_per_epoch=per_epoch,
        at=at,
        trigger=trigger,
        on_pruned=on_pruned,
    )


def _prolong(params: Params, stage: Stage, epochs: int, per_epoch: int) -> Callable[[int], None]:
    """As published: after the pruning come `epochs` more, with a schedule of their own."""

    def on_pruned(step: int) -> None:
        done = -(-step // per_epoch)
        stage.epochs = done + epochs
        total = stage.epochs * per_epoch - step
        stage.lr = lambda now: lr_at(now - step, params.schedule, params.optimizer.lr, total, per_epoch)

    return on_pruned
