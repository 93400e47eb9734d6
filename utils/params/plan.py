"""The level plan: which levels a config asks for, at what density, and what each starts from."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params import Params
from utils.system.errors import ParamError

MAX_LEVELS = 1000


@dataclass(frozen=True)
class Level:
    """One level of a plan.

    density   target density
    source    level whose weights and masks it prunes; None: the initial weights, all weights live
    epochs    length of its schedule
    rewind    imp, wr, lrr or none; None where there is nothing to rewind (a dense level 0, pruning at initialisation)
    """

    number: int
    density: float
    source: int | None
    epochs: int
    rewind: str | None


def target_densities(params: Params) -> list[float]:
    """Target density of every level, level 0 first. Dense level 0 is included except for pruning at initialisation."""
    levels, pruning = params.levels, params.pruning
    if pruning.moment == "init":
        return list(levels.densities) or [_required(pruning.density)]
    if levels.densities:
        listed = list(levels.densities)
        return listed if listed[0] == 1.0 else [1.0, *listed]
    if pruning.moment == "oneshot":
        return [1.0, _required(pruning.density)]
    if levels.spacing == "linear":
        assert levels.target is not None
        assert levels.count is not None
        steps = max(levels.count - 1, 1)
        return [1.0 - k * (1.0 - levels.target) / steps for k in range(levels.count)]
    return _geometric(levels.rate, levels.target, levels.count)


def _required(density: float | None) -> float:
    if density is None:
        raise ParamError("pruning.density: not set; set it, or levels.densities")
    return density


def _geometric(rate: float, target: float | None, count: int | None) -> list[float]:
    densities: list[float] = []
    while len(densities) < (count or MAX_LEVELS):
        densities.append((1.0 - rate) ** len(densities))
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
    densities = target_densities(params)
    moment, rewind = params.pruning.moment, params.levels.rewind
    lengths = params.levels.epochs or (params.training.epochs,)
    if len(lengths) == 1:
        lengths = lengths * len(densities)
    if len(lengths) != len(densities):
        raise ParamError(
            f"levels.epochs: {len(lengths)} numbers for {len(densities)} levels; give one number, or one per level"
        )
    plan = []
    for number, (density, epochs) in enumerate(zip(densities, lengths, strict=True)):
        first = moment == "init" or number == 0
        source = None if first else (number - 1 if moment == "levels" else 0)
        plan.append(Level(number, density, source, epochs, None if first else rewind))
    return plan
