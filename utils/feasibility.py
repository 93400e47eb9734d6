"""Whether a plan can work: asked by `--run.plan` and by every run before it writes anything."""

from __future__ import annotations

import torch

from utils import models, pruning
from utils.data.spec import DataSpec
from utils.masks import Masks
from utils.params import Params
from utils.params.plan import Level, start_counts
from utils.pruning import triggers
from utils.pruning.dynamic import UpdateSteps
from utils.pruning.harness import with_start
from utils.rewinding import check_rewind, rewinds_to_step
from utils.system.errors import UserError
from utils.training.recipe.ghost import check_ghost
from utils.training.recipe.ramp import span
from utils.training.recipe.rescale import count_batches
from utils.training.recipe.smoothing import check_smoothing
from utils.training.recipe.soft import check_soft, soften
from utils.training.schedules import lr_at


def build_model(params: Params, spec: DataSpec, pretrained: str, seed: int | None = None) -> torch.nn.Module:
    """The config's network for images of `spec`, tried on every size training and evaluation will show it.

    seed: of its initial weights; run.seed by default.
    """
    others = {"data.eval_size": spec.eval_size}
    if (first := spec.size_at(0.0)) is not None:
        others["data.progressive_size"] = first
    network = models.build(
        params.model.name,
        spec.classes,
        pretrained=pretrained,
        image_size=spec.image_size,
        other_sizes=others,
        seed=params.run.seed if seed is None else seed,
    )
    check_soft(network, params.recipe)
    return soften(network, params.recipe)


def check_method(params: Params) -> None:
    """Raise UserError for a pruning section that cannot work whatever the model: before any data is fetched."""
    begin = with_start(params.pruning, params.levels.start_criterion, params.levels.start_allocation)
    for section in (params.pruning, begin):
        pruning.PruningHarness(section, params.graph, seed=params.run.seed)


def check_pruning(
    harness: pruning.PruningHarness,
    params: Params,
    plan: list[Level],
    model: torch.nn.Module,
    start: Masks,
    starter: pruning.PruningHarness,
) -> None:
    """Raise UserError for densities of the plan that no pruning can reach, and for a trigger that cannot watch `model`.

    start: the masks the run begins with; starter: prunes level 0 where `levels.start` asks for it.
    """
    if params.pruning.mask_file is not None and (start.kept, start.total) != start_counts(params):
        kept, total = start_counts(params)
        raise UserError(
            f"pruning.mask_file: {params.pruning.mask_file} keeps {kept:,} of {total:,} weights, which are "
            f"{start.kept:,} of {start.total:,} under pruning.exclude and pruning.pattern; set both as for the file"
        )
    if params.graph.degree is not None:
        return
    if params.pruning.moment == "early":
        triggers.build(params.early, model=model, density=plan[0].density)
    densities = [level.density for level in plan if level.density < start.density]
    if params.levels.start is not None:
        starter.check(start, densities[:1], iterative=False)
    if params.dynamic.method == "gmp" and plan[0].begins < start.density:
        harness.check(start, [plan[0].begins], iterative=False)
    harness.check(start, densities, iterative=params.pruning.moment == "levels")


def check_recipes(
    params: Params, plan: list[Level], model: torch.nn.Module, masks: Masks, spec: DataSpec, images: int | None
) -> None:
    """Raise UserError for a recipe that `model`, its data or its masks cannot have.

    masks: all the weights that may be pruned; images: training images, None where that is not known yet.
    """
    recipe = params.recipe
    if recipe.smoothing.schedule is not None:
        check_smoothing(recipe, spec.classes)
    if recipe.rescale.method is not None and images is not None:
        count_batches(recipe, images)
    if recipe.ghost.kind is not None and any(level.density < 1.0 and level.epochs for level in plan):
        check_ghost(model, recipe, masks, spec.image_size)


def check_steps(params: Params, plan: list[Level], steps_per_epoch: int) -> None:
    """Raise UserError for a step that lies outside training, which only the number of steps per epoch shows."""
    scheduled = [level for level in plan if level.work not in ("gates", "tick")]  # gates learn at a constant rate
    for level in scheduled:
        stretched = params.structured.scratch == "b" and level.density < 1.0
        epochs = params.training.epochs if stretched else level.epochs
        if level.epochs:
            lr_at(0, params.schedule, params.optimizer.lr, epochs * steps_per_epoch, steps_per_epoch)
    _check_ramps(params, scheduled, steps_per_epoch)
    check_rewind(params, plan, steps_per_epoch)
    _check_within(params, plan, steps_per_epoch)
    if params.levels.finetune_lr is None and not plan[0].epochs and any(p.rewind == "none" and p.epochs for p in plan):
        raise UserError("levels.finetune_lr: level 0 trains 0 epochs and has no last learning rate; set one")


def _check_ramps(params: Params, plan: list[Level], steps_per_epoch: int) -> None:
    """Ramps must lie within the shortest level that trains."""
    recipe, totals = params.recipe, [level.epochs * steps_per_epoch for level in plan if level.epochs]
    ramps = []
    if recipe.soft.kind is not None and not recipe.soft.keep:
        ramps.append(("recipe.soft", recipe.soft.hold, recipe.soft.end))
    if recipe.ghost.kind is not None:
        ramps.append(("recipe.ghost", recipe.ghost.hold, recipe.ghost.end))
    if recipe.smoothing.schedule in ("linear", "step"):
        ramps.append(("recipe.smoothing", recipe.smoothing.hold, recipe.smoothing.end))
    for key, hold, end in ramps:
        if totals:
            span(key, hold, end, min(totals), steps_per_epoch)


def _check_within(params: Params, plan: list[Level], steps_per_epoch: int) -> None:
    """Pruning during training must have a step to happen at."""
    watched = plan[:1] if params.structured.budget is not None else plan
    total = min(level.epochs for level in watched) * steps_per_epoch
    step = params.pruning.step
    if params.pruning.moment == "step" and step is not None and step.at(steps_per_epoch) >= total:
        raise UserError(f"pruning.step={step}: training has only {total} steps; choose an earlier step")
    latest = params.early.latest
    if params.pruning.moment == "early" and latest is not None and latest.at(steps_per_epoch) > total:
        raise UserError(f"early.latest={latest}: training has only {total} steps; choose an earlier step")
    if (
        params.pruning.moment == "early"
        and params.early.length == "configured"
        and latest is not None
        and latest.at(steps_per_epoch) >= total
    ):
        raise UserError(f"early.latest={latest}: leaves none of the {total} steps to train; choose an earlier step")
    dynamic = params.dynamic
    if dynamic.method is None:
        return
    last = UpdateSteps.of(dynamic, total, steps_per_epoch).last
    if last is None:
        raise UserError(
            f"dynamic.every={dynamic.every}: leaves no update from dynamic.start={dynamic.start} to "
            f"dynamic.until={dynamic.until:g} of {total} steps; lower it or train longer"
        )
    rewind = params.levels.rewind_step
    continues = rewinds_to_step(params) and params.levels.rewind_schedule == "continue" and len(plan) > 1
    if continues and rewind is not None and last < rewind.at(steps_per_epoch):
        raise UserError(
            f"levels.rewind_step={rewind}: levels continue after the last update of dynamic.method={dynamic.method} "
            f"at step {last}; choose an earlier step or raise dynamic.until"
        )
