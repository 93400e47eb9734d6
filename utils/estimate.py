"""What a config will do, before it does it: levels, steps, disk and memory."""

from __future__ import annotations

from torch import nn

from utils import data, pruning
from utils.data.resolve import resolve
from utils.feasibility import build_model, check_pruning, check_recipes, check_steps
from utils.masks import Masks
from utils.models.pretrained import local_file
from utils.params import Params
from utils.params.array import tasks
from utils.params.checks import check_ranks
from utils.params.plan import Level, level_plan
from utils.pruning.harness import with_start
from utils.pruning.structured import Channels
from utils.record import run_dir
from utils.system.distributed import World

STATES = {"sgd": 1, "adam": 2, "adamw": 2}
"""Weight-sized optimizer states per optimizer (sgd: its momentum)."""


def describe(params: Params, world: World) -> str:
    """The level table, optimizer steps, disk and memory of the run, as text. Reads data labels; writes nothing."""
    spec = resolve(params.data)
    plan = level_plan(params)
    check_ranks(params, world.size)
    images = data.count_training(params)
    per_epoch = None if images is None else images // params.training.batch_size
    if per_epoch is not None:
        check_steps(params, plan, per_epoch)
    local = params.model.pretrained if local_file(params.model.pretrained) else ""
    network = build_model(params, spec, local)
    if params.structured.budget is not None:
        check_recipes(params, plan, network, Masks({}), spec, images)
        return _describe_structured(params, plan, network, spec.image_size, per_epoch)
    start = _check(params, plan, network)
    check_recipes(params, plan, network, start, spec, images)
    weights = sum(p.numel() for p in network.parameters())
    buffers = sum(b.numel() for b in network.buffers())
    prunable = start.total
    lines = [
        f"run directory  {run_dir(params).path}",
        f"model          {params.model.name}: {weights:,} parameters, {prunable:,} prunable",
    ]
    lines += ["", *_level_table(plan, per_epoch, prunable), ""]
    if per_epoch is None:
        lines.append(f"steps          unknown until the data set is in {spec.directory}")
    else:
        total = per_epoch * sum(level.epochs for level in plan)
        lines.append(f"steps          {total:,} at most ({per_epoch:,} per epoch, {world.size} rank(s))")
    if params.run.array:
        lines.append(f"array          --array=0-{tasks(params) - 1}")
    copies = 1 + (params.training.ema is not None)
    rewind = 4 * (weights + buffers) * (1 + STATES.get(params.optimizer.name, 2)) if params.levels.rewind == "wr" else 0
    disk = len(plan) * (4 * copies * (weights + buffers) + prunable) + rewind
    state = 4 * (weights + buffers) + 4 * weights * (STATES.get(params.optimizer.name, 2) + copies - 1) + prunable
    lines.append(
        f"disk           {_megabytes(disk)} for weights and masks of {len(plan)} level(s), and up to "
        f"{_megabytes(3 * state)} for the checkpoints of the one that trains"
    )
    tensors = 2 + STATES.get(params.optimizer.name, 2) + (params.training.ema is not None)
    memory = 4 * weights * tensors + 4 * prunable + 4 * (weights + buffers)
    lines.append(
        f"memory         {_megabytes(memory)} per rank for weights, gradients, optimizer and masks, plus activations"
    )
    return "\n".join(lines)


def _describe_structured(
    params: Params, plan: list[Level], network: nn.Module, side: int, per_epoch: int | None
) -> str:
    """The levels of a structured run. Raises UserError for a network whose channels cannot be taken out."""
    section = params.structured
    channels = Channels.of(
        network, (3, side, side), name=params.model.name, exclude=section.exclude, coupled=section.coupled
    )
    if params.pruning.density is not None:
        harness = pruning.PruningHarness(params.pruning, seed=params.run.seed)
        harness.check(harness.start(network), [params.pruning.density], iterative=False)
    units = sum(group.size for group in channels.open)
    lines = [
        f"run directory  {run_dir(params).path}",
        f"model          {params.model.name}: {channels.cost.parameters():,} parameters, "
        f"{channels.cost.macs():,} MACs, {units:,} channels in {len(channels.open)} groups that may be pruned",
        "",
        f"{'level':>5}  {'share of ' + str(section.budget):>20}  {'epochs':>6}  {'steps':>9}  starts from",
    ]
    for level in plan:
        steps = "?" if per_epoch is None else f"{per_epoch * level.epochs:,}"
        source = _source(level, section.fresh)
        lines.append(f"{level.number:>5}  {level.density:>20.6f}  {level.epochs:>6}  {steps:>9}  {source}")
    return "\n".join(lines)


def _source(level: Level, fresh: bool) -> str:
    """What a level of a structured run starts from, and what trains where that is not its weights."""
    source = "initial weights" if level.source is None else f"level {level.source}"
    if fresh and level.work == "prune":
        return f"fresh weights, channels by {source}"
    more = {"gates": ", gates alone", "tick": ", gates alone", "tock": ", pruned; gates and weights"}
    return source + more.get(level.work, "")


def _check(params: Params, plan: list[Level], network: nn.Module) -> Masks:
    """The masks the run begins with. Raises UserError for a plan of pruning that cannot work."""
    harness = pruning.PruningHarness(params.pruning, params.graph, seed=params.run.seed)
    section = with_start(params.pruning, params.levels.start_criterion, params.levels.start_allocation)
    start = harness.start(network)
    starter = pruning.PruningHarness(section, params.graph, seed=params.run.seed)
    check_pruning(harness, params, plan, network, start, starter)
    return start


def _level_table(plan: list[Level], per_epoch: int | None, prunable: int) -> list[str]:
    heading = f"{'level':>5}  {'density':>10}  {'kept':>13}  {'epochs':>6}  {'steps':>9}  starts from"
    lines = [heading]
    for level in plan:
        kept = int(level.density * prunable + 0.5)
        steps = "?" if per_epoch is None else f"{per_epoch * level.epochs:,}"
        if level.begins != level.density:
            source = f"initial weights at density {level.begins:g}, pruned while training"
        elif level.rewind is None:
            source = "initial weights"
        else:
            source = f"level {level.source}, rewind {level.rewind}"
        lines.append(f"{level.number:>5}  {level.density:>10.6f}  {kept:>13,}  {level.epochs:>6}  {steps:>9}  {source}")
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
