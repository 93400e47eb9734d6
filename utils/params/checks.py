"""Contradictions between keys: each rule yields one line that names the key and the mend.

Only what no single field can refuse is here; types, ranges and choices belong to the fields themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from utils.params import Params, method_checks, recipe_checks, structured_checks
from utils.params.catalog import Key, keys
from utils.params.parsing import show
from utils.params.plan import SINGLE, level_plan
from utils.params.step import Step
from utils.system.errors import ParamError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_IGNORED: method_checks.Ignored = (
    ("schedule.milestones", "schedule.name", ("constant", "cosine", "triangular", "trapezoidal", "onecycle"), "step"),
    ("schedule.gamma", "schedule.name", ("constant", "cosine", "triangular", "trapezoidal", "onecycle"), "step"),
    ("schedule.start", "schedule.name", ("constant", "step", "cosine", "trapezoidal"), "triangular or onecycle"),
    ("schedule.peak", "schedule.name", ("constant", "step", "cosine", "trapezoidal"), "triangular or onecycle"),
    ("schedule.cooldown", "schedule.name", ("constant", "step", "cosine", "triangular", "onecycle"), "trapezoidal"),
    ("schedule.final", "schedule.name", ("constant", "step"), "cosine, triangular, trapezoidal or onecycle"),
    ("optimizer.momentum", "optimizer.name", ("adam", "adamw"), "sgd"),
    ("optimizer.nesterov", "optimizer.name", ("adam", "adamw"), "sgd"),
    ("optimizer.betas", "optimizer.name", ("sgd",), "adam or adamw"),
    ("optimizer.eps", "optimizer.name", ("sgd",), "adam or adamw"),
    ("data.randaugment", "data.loader", ("ffcv", "device"), "torchvision"),
    ("data.progressive_size", "data.loader", ("device",), "ffcv or torchvision"),
    ("data.resize", "data.loader", ("device", "torchvision"), "ffcv"),
    ("data.pad", "data.augment", ("none", "rrc"), "crop"),
    ("data.jpeg_quality", "data.write_mode", ("raw",), "jpg or proportion"),
    ("data.compress_probability", "data.write_mode", ("auto", "raw", "jpg"), "proportion"),
    ("distributed.sync_batchnorm", "run.device", ("cpu",), "cuda"),
    ("distributed.packed_below", "distributed.reduction", ("dense",), "auto or packed"),
    *method_checks.IGNORED,
    *recipe_checks.IGNORED,
)
"""(key, other key, values of the other key that ignore the first, values that use it); for non-default values only."""

_PLAN_IGNORED: method_checks.Ignored = (
    ("pruning.density", "pruning.moment", ("levels",), "init, step, early or oneshot"),
    ("levels.rate", "pruning.moment", (*SINGLE, "oneshot"), "levels"),
    ("levels.target", "pruning.moment", (*SINGLE, "oneshot"), "levels"),
    ("levels.count", "pruning.moment", (*SINGLE, "oneshot"), "levels"),
    ("levels.spacing", "pruning.moment", (*SINGLE, "oneshot"), "levels"),
    ("levels.rate", "levels.spacing", ("linear",), "geometric"),
    ("levels.rewind_step", "levels.rewind", ("imp", "lrr", "none"), "wr"),
    ("levels.rewind_optimizer", "levels.rewind", ("imp", "lrr", "none"), "wr"),
    ("levels.rewind_schedule", "levels.rewind", ("imp", "lrr", "none"), "wr"),
    ("levels.finetune_lr", "levels.rewind", ("imp", "wr", "lrr"), "none"),
    ("data.write_mode", "data.loader", ("device", "torchvision"), "ffcv"),
    ("data.max_resolution", "data.loader", ("device", "torchvision"), "ffcv"),
    ("data.jpeg_quality", "data.loader", ("device", "torchvision"), "ffcv"),
    ("data.compress_probability", "data.loader", ("device", "torchvision"), "ffcv"),
    *method_checks.PLAN_IGNORED,
)
"""The same for runs alone: other tools prune to one density, or write .beton files whatever the run's loader is."""


def check(params: Params, plan: bool = True) -> None:
    """Raise ParamError for the first contradiction. `plan=False` leaves out the rules of the level plan."""
    for line in _problems(params, plan):
        raise ParamError(line)
    if plan:
        level_plan(params)  # raises for what the plan itself refuses


def check_ranks(params: Params, ranks: int) -> None:
    """Raise ParamError unless the global batch divides by `ranks` x accumulation into usable micro-batches."""
    batch, accumulation = params.training.batch_size, params.training.accumulation
    parts = ranks * accumulation
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        near = f"{below} or {above}" if below else f"{above}"
        raise ParamError(
            f"training.batch_size={batch}: does not divide by {ranks} ranks x training.accumulation={accumulation}; "
            f"use {near}"
        )
    if (params.data.mixup or params.data.cutmix) and batch // parts < 2:
        raise ParamError(
            f"training.batch_size={batch}: {ranks} ranks x training.accumulation={accumulation} leave one image per "
            "backward pass, and data.mixup and data.cutmix need two; raise the batch size"
        )


def _problems(params: Params, plan: bool) -> Iterator[str]:
    yield from _names(params)
    yield from _ignored(params, _IGNORED)
    yield from _training(params)
    yield from _schedule(params)
    yield from _data(params)
    yield from _layer_densities(params)
    yield from _keep(params)
    yield from method_checks.problems(params, plan)
    yield from recipe_checks.problems(params)
    if plan:
        yield from _array(params)
        yield from structured_checks.problems(params)
        # Within structured runs pruning.density is about single weights of what is left, at every moment.
        own = params.structured.budget is not None
        yield from _ignored(params, tuple(e for e in _PLAN_IGNORED if not (own and e[0] == "pruning.density")))
        yield from _plan(params)
        yield from _rewind(params)
        yield from method_checks.plan_problems(params, level_plan(params))
        yield from _warmup(params)


def _changed(key: Key, params: Params) -> bool:
    return bool(key.of(params) != key.default)


def _ignored(params: Params, table: method_checks.Ignored) -> Iterator[str]:
    for name, other, ignoring, using in table:
        key, switch = keys()[name], keys()[other]
        if _changed(key, params) and switch.of(params) in ignoring:
            yield (
                f"{_given(key, params)}: has no effect with {_given(switch, params)}; "
                f"drop it (default {show(key, key.default) or 'empty'}) or set {other} to {using}"
            )


def _given(key: Key, params: Params) -> str:
    return f"{key.dotted}={show(key, key.of(params))}"


def _names(params: Params) -> Iterator[str]:
    name = params.run.name
    if not _NAME.fullmatch(name):
        yield (
            f"run.name: {name!r} is not usable as a folder name; start with a letter or digit and use at most 100 "
            "letters, digits, '.', '_' and '-'"
        )
    for key in ("run.root", "data.root"):
        if not keys()[key].of(params).strip():
            yield f"{key}: empty; name a folder ('.' is the current one)"


def _training(params: Params) -> Iterator[str]:
    training, optimizer = params.training, params.optimizer
    if training.batch_size % training.accumulation:
        yield (
            f"training.batch_size={training.batch_size}: does not divide by "
            f"training.accumulation={training.accumulation}; choose a multiple of it"
        )
    if len(optimizer.betas) != 2:
        yield f"optimizer.betas: {len(optimizer.betas)} numbers; give two, such as 0.9,0.999"
    if optimizer.nesterov and optimizer.momentum == 0.0:
        yield "optimizer.nesterov=true: needs momentum; set optimizer.momentum above 0 or drop it"
    if params.distributed.backend == "nccl" and params.run.device == "cpu":
        yield "distributed.backend=nccl: needs GPUs, but run.device=cpu; use gloo or auto"


def _schedule(params: Params) -> Iterator[str]:
    schedule = params.schedule
    if schedule.name == "step" and not schedule.milestones:
        yield "schedule.milestones: empty, and schedule.name=step needs at least one, such as 30ep,60ep"
    for first, second in pairwise(schedule.milestones):
        if _not_before(first, second):
            yield f"schedule.milestones: {second} does not come after {first}; list them in rising order, each once"
    if schedule.warmup == Step() and _changed(keys()["schedule.warmup_start"], params):
        yield "schedule.warmup_start: has no effect without schedule.warmup; set both or drop it"


def _warmup(params: Params) -> Iterator[str]:
    """Warm-up and cool-down against the length of the levels, as far as whole epochs tell."""
    schedule, plan = params.schedule, level_plan(params)
    scheduled = [level.epochs for level in plan if level.epochs and level.rewind != "none"]
    shortest = min(scheduled, default=None)
    if shortest is None:
        return
    if schedule.warmup.epochs > shortest:
        yield f"schedule.warmup={schedule.warmup}: longer than a level of {shortest} epochs; shorten it"
    for milestone in schedule.milestones:
        if milestone != schedule.warmup and _not_before(schedule.warmup, milestone):
            yield f"schedule.milestones: {milestone} lies within schedule.warmup={schedule.warmup}; move one of them"
    cooling = schedule.cooldown * shortest if schedule.name == "trapezoidal" else 0.0
    if schedule.warmup.epochs + cooling > shortest * (1 + 1e-9):
        yield (
            f"schedule.cooldown={schedule.cooldown:g}: with schedule.warmup={schedule.warmup} longer than a level of "
            f"{shortest} epochs; shorten one of them"
        )


def _not_before(first: Step, second: Step) -> bool:
    """True when `first` cannot come before `second`, whatever the number of steps in an epoch."""
    return first.epochs >= second.epochs and first.iterations >= second.iterations


def _data(params: Params) -> Iterator[str]:
    data = params.data
    if data.subset is not None and data.subset < params.training.batch_size:
        yield (
            f"data.subset={data.subset}: fewer images than training.batch_size={params.training.batch_size}; "
            "raise it or lower the batch size"
        )
    if _changed(keys()["data.randaugment_magnitude"], params) and not data.randaugment:
        yield "data.randaugment_magnitude: has no effect without data.randaugment; set both or drop it"
    if data.image_size is not None and data.cutout >= 2 * data.image_size:
        yield (
            f"data.cutout={data.cutout}: always covers the whole image of data.image_size={data.image_size}; lower it"
        )
    if data.image_size is not None and data.augment == "crop" and data.pad >= data.image_size:
        yield (
            f"data.pad={data.pad}: can crop nothing but padding from an image of data.image_size={data.image_size}; "
            "lower it"
        )
    yield from _progressive(params)


def _array(params: Params) -> Iterator[str]:
    run, levels = params.run, params.levels
    if run.array and levels.only is not None:
        yield f"levels.only={levels.only}: run.array says which level runs; drop one of them"
    if run.seeds and not run.array:
        yield "run.seeds: has no effect without run.array; set run.array=true, or run.seed"
    if run.seeds and run.seed:
        yield f"run.seed={run.seed}: run.seeds lists the seeds; drop one of them"
    if len(set(run.seeds)) < len(run.seeds):
        yield "run.seeds: lists a seed twice; keep one of them"
    if levels.wait and levels.only is None and not run.array:
        yield "levels.wait: has no effect without levels.only or run.array; set one of them or drop it"


def _keep(params: Params) -> Iterator[str]:
    run = params.run
    if run.keep == "best" and not params.data.val:
        yield "run.keep=best: needs validation images, never the test set; set data.val, e.g. 0.1"
    if run.keep == "all" and run.checkpoint_epochs is None:
        yield "run.keep=all: keeps the states of run.checkpoint_epochs, which is not set; set it, e.g. to 1"


def _progressive(params: Params) -> Iterator[str]:
    data = params.data
    if len(data.progressive_epochs) != 2 or data.progressive_epochs[0] > data.progressive_epochs[1]:
        yield "data.progressive_epochs: give two shares of training in rising order, such as 0,0.8"
    if data.progressive_size is None:
        if _changed(keys()["data.progressive_epochs"], params):
            yield "data.progressive_epochs: has no effect without data.progressive_size; set both or drop it"
        return
    if data.progressive_size % 16:
        yield f"data.progressive_size={data.progressive_size}: sizes grow in steps of 16 pixels; use a multiple of 16"
    if data.image_size is not None and data.progressive_size > data.image_size:
        yield f"data.progressive_size={data.progressive_size}: larger than the final data.image_size={data.image_size}"


def _layer_densities(params: Params) -> Iterator[str]:
    seen: set[str] = set()
    for entry in params.pruning.layer_densities:
        glob, _, text = entry.rpartition("=")
        try:
            density = float(text)
        except ValueError:
            density = -1.0
        if not glob.strip() or not 0.0 <= density <= 1.0:
            yield f"pruning.layer_densities: {entry!r} is not <glob>=<density from 0 to 1>, such as layer1.*=0.5"
        if glob in seen:
            yield f"pruning.layer_densities: {glob!r} is given twice; keep one of them"
        seen.add(glob)


def _plan(params: Params) -> Iterator[str]:
    levels, moment = params.levels, params.pruning.moment
    if params.structured.budget is not None:
        return  # structured.keep lists the levels
    if levels.densities:
        for name in ("levels.rate", "levels.target", "levels.count", "levels.spacing", "pruning.density"):
            if _changed(keys()[name], params):
                yield (
                    f"{_given(keys()[name], params)}: contradicts levels.densities, which lists every level; "
                    f"drop one of them (default {show(keys()[name], keys()[name].default)})"
                )
        yield from _listed(levels.densities, iterative=moment == "levels")
        return
    if moment != "levels":
        settled = moment in SINGLE and (params.pruning.mask_file is not None or params.graph.degree is not None)
        if params.pruning.density is None and not settled:
            yield f"pruning.density: not set, and pruning.moment={moment} needs it; set it, or list levels.densities"
    elif levels.spacing == "linear":
        if levels.target is None or levels.count is None:
            yield "levels.spacing=linear: needs levels.target and levels.count"
        elif levels.count == 1:
            yield "levels.count=1: is the dense level alone; levels.spacing=linear needs two or more"
    elif levels.target is None and levels.count is None:
        yield (
            "levels: nothing says where the plan ends; set levels.count, levels.target or levels.densities "
            "(levels.count=1 trains the dense network alone)"
        )


def _listed(densities: tuple[float, ...], iterative: bool) -> Iterator[str]:
    if iterative:
        for first, second in pairwise(densities):
            if second >= first:
                yield (
                    f"levels.densities: {second:g} after {first:g}, but levels only remove weights; "
                    "list falling densities, or set pruning.moment to init or oneshot"
                )
    for density in densities:
        if densities.count(density) > 1:
            yield f"levels.densities: {density:g} is listed twice; keep one of them"


def _rewind(params: Params) -> Iterator[str]:
    levels, moment = params.levels, params.pruning.moment
    if moment in SINGLE and levels.rewind in ("wr", "none"):
        yield f"levels.rewind={levels.rewind}: pruning.moment={moment} starts from initial weights; drop it"
    plan = level_plan(params)
    if moment == "step" and params.pruning.step is not None:
        shortest = min(level.epochs for level in plan)
        if params.pruning.step.epochs >= max(shortest, 1):
            yield f"pruning.step={params.pruning.step}: levels train {shortest} epochs; choose an earlier step"
    if levels.only is not None and levels.only >= len(plan):
        yield f"levels.only={levels.only}: the plan has levels 0 to {len(plan) - 1}"
    if levels.rewind != "wr":
        return
    if levels.rewind_step is None:
        yield "levels.rewind_step: not set, and levels.rewind=wr needs it, such as 500it or 10ep"
    else:
        # Iterations are compared with the length of training once the number of steps per epoch is known.
        shortest = min(level.epochs for level in plan)
        if levels.rewind_step.epochs >= shortest:
            yield f"levels.rewind_step={levels.rewind_step}: levels train {shortest} epochs; choose an earlier step"
