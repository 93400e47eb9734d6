"""The level plan: which levels a config asks for, at what density, and what each starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from utils.params import Params
from utils.system.errors import ParamError

MAX_LEVELS = 1000


SINGLE = ("init", "step", "early")
"""Moments of which each density is a level of its own that starts from the initial weights."""


@dataclass(frozen=True)
class Level:
    """One level of a plan.

    density   target density, of the masks it ends with
    begins    density of the masks its training begins with: another one where it prunes while it trains
    source    level whose weights and masks it prunes; None: the initial weights, all weights live (or a mask file's)
    epochs    length of its schedule
    rewind    imp, wr, lrr or none; None where there is nothing to rewind (level 0, densities of single-shot moments)
    work      prune (and train); of structured runs also: train (channels as they are), gates (learn them on frozen
              random weights), tick (learn them on the source's weights), tock (prune, train gates and weights)
    """

    number: int
    density: float
    begins: float
    source: int | None
    epochs: int
    rewind: str | None
    work: str = "prune"


def start_density(params: Params) -> float:
    """Density of the masks a run begins with: 1.0, or that of pruning.mask_file. Raises UserError when unreadable."""
    kept, total = start_counts(params)
    return kept / total if total else 1.0


def start_counts(params: Params) -> tuple[int, int]:
    """Kept and all weights of pruning.mask_file; (1, 1) without one. Raises UserError when it is unreadable."""
    return (1, 1) if params.pruning.mask_file is None else _mask_counts(Path(params.pruning.mask_file))


def prunes_start(params: Params, density: float) -> bool:
    """Whether a pruning to `density` takes weights from the masks the run begins with."""
    kept, total = start_counts(params)
    if params.pruning.mask_file is None:
        return density < 1.0
    return math.floor(density * total + 0.5) < kept


def target_densities(params: Params) -> list[float]:
    """Target density of every level, level 0 first: dense (or as it starts) but for single-shot moments."""
    levels, pruning = params.levels, params.pruning
    start = start_density(params)
    if pruning.moment in SINGLE:
        single = list(levels.densities) or [_single(params, start)]
        return _not_above(params, "levels.densities" if levels.densities else "pruning.density", single, start)
    first = start if levels.start is None else levels.start
    if levels.densities:
        listed = _not_above(params, "levels.densities", list(levels.densities), first)
        same = listed[0] == first or (levels.start is None and not prunes_start(params, listed[0]))
        return listed if same else [first, *listed]
    if pruning.moment == "oneshot":
        density = _not_above(params, "pruning.density", [_required(pruning.density)], first)[0]
        if density == first or (levels.start is None and not prunes_start(params, density)):
            raise ParamError(f"pruning.density: {density:g} is not below {first:g}, which level 0 holds; lower it")
        return [first, density]
    if levels.spacing == "linear":
        assert levels.target is not None
        assert levels.count is not None
        steps = max(levels.count - 1, 1)
        return [first - k * (first - levels.target) / steps for k in range(levels.count)]
    return _geometric(first, levels.rate, levels.target, levels.count)


def _not_above(params: Params, key: str, densities: list[float], first: float) -> list[float]:
    """The densities, none of them above `first`, that of level 0."""
    kept, total = start_counts(params)
    for density in densities:
        more = density > first if params.levels.start is not None else math.floor(density * total + 0.5) > kept
        if more:
            raise ParamError(f"{key}: {density:g} is above {first:g}, which level 0 starts at; lower it")
    return densities


def _single(params: Params, start: float) -> float:
    """The one density of a single-shot moment: a graph's degree decides it itself, a mask file may."""
    if params.pruning.density is not None:
        return params.pruning.density
    if params.graph.degree is not None or params.pruning.mask_file is not None:
        return start
    return _required(None)


def _mask_counts(path: Path) -> tuple[int, int]:
    from safetensors import SafetensorError, safe_open

    mend = "give a mask file of ours, or make one with `python -m utils.pruning convert`"
    if not path.is_file():
        raise ParamError(f"pruning.mask_file: {path}: no such file")
    try:
        with safe_open(str(path), "np") as handle:
            counts = handle.metadata() or {}
        kept, total = int(counts["kept"]), int(counts["total"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ParamError(f"pruning.mask_file: {path}: not a whole mask file; {mend}") from error
    return kept, total


def _required(density: float | None) -> float:
    if density is None:
        raise ParamError("pruning.density: not set; set it, or levels.densities")
    return density


def _geometric(first: float, rate: float, target: float | None, count: int | None) -> list[float]:
    densities: list[float] = []
    while len(densities) < (count or MAX_LEVELS):
        densities.append(first * (1.0 - rate) ** len(densities))
        # The formula may end a hair above a target that is exactly one of its values.
        if target is not None and densities[-1] <= target * (1.0 + 1e-12):
            return densities
    if count is None:
        raise ParamError(
            f"levels.rate={rate:g}: {MAX_LEVELS} levels do not reach levels.target={target}; raise the rate"
        )
    return densities


def level_plan(params: Params) -> list[Level]:
    """All levels of the config. Raises ParamError when the plan is contradictory."""
    if params.structured.budget is not None:
        return _structured_plan(params)
    densities = target_densities(params)
    moment, rewind = params.pruning.moment, params.levels.rewind
    lengths = _lengths(params, [params.training.epochs] * len(densities))
    plan = []
    for number, (density, epochs) in enumerate(zip(densities, lengths, strict=True)):
        first = moment in SINGLE or number == 0
        source = None if first else (number - 1 if moment == "levels" else 0)
        begins = _begins(params, density)
        plan.append(Level(number, density, begins, source, epochs, None if first else rewind))
    return plan


def _structured_plan(params: Params) -> list[Level]:
    """Levels of structured pruning; `density` is the share of the budget that stays.

    Level 0 learns gates, or trains the whole network, unless channels are scored at initialisation. Then comes a level
    for each share, from level 0 or (moment levels) from the level before; of moment ticktock two, a tick and a tock,
    and at the end one that trains on.
    """
    section, moment = params.structured, params.pruning.moment
    gates, before = section.criterion == "gates" and moment == "init", moment != "init"
    steps = [("prune", share, _epochs_of(params, share)) for share in section.keep]
    if moment == "ticktock":
        steps, last = [], 1.0
        for share in section.keep:
            steps += [("tick", last, section.gate_epochs), ("tock", share, section.tock_epochs)]
            last = share
        steps.append(("train", last, params.training.epochs))
    if gates:
        steps.insert(0, ("gates", 1.0, section.gate_epochs))
    elif before:
        steps.insert(0, ("train", 1.0, params.training.epochs))
    lengths = _lengths(params, [epochs for _, _, epochs in steps])
    plan = []
    for number, ((work, share, _), epochs) in enumerate(zip(steps, lengths, strict=True)):
        chained = moment in ("levels", "ticktock")
        source = None if number == 0 or not (gates or before) else (number - 1 if chained else 0)
        rewind = params.levels.rewind if source is not None and not gates and work != "tick" else None
        plan.append(Level(number, share, share, source, epochs, rewind, work))
    return plan


def _lengths(params: Params, own: list[int]) -> list[int]:
    """`levels.epochs` where it is given, else the levels' `own`."""
    given = params.levels.epochs
    if not given:
        return own
    if len(given) not in (1, len(own)):
        raise ParamError(
            f"levels.epochs: {len(given)} numbers for {len(own)} levels; give one number, or one per level"
        )
    return list(given) if len(given) > 1 else list(given) * len(own)


def _epochs_of(params: Params, share: float) -> int:
    """Scratch-B: as many epochs as cost the MACs of training the whole network for training.epochs."""
    return int(params.training.epochs / share) if params.structured.scratch == "b" else params.training.epochs


def _begins(params: Params, density: float) -> float:
    if params.pruning.moment in ("step", "early"):
        return start_density(params)
    if params.dynamic.method == "gmp":
        return min(params.dynamic.initial_density, start_density(params))
    return density
