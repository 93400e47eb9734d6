"""Rounds: the densities a pruning passes through when it scores and prunes several times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One score-and-prune step: the density asked for and the exact one reached."""

    requested: float
    reached: float


def round_densities(schedule: str, start: float, target: float, rounds: int) -> list[float]:
    """Densities after each of `rounds` rounds that lead from `start` down to `target`; the last is `target` itself.

    exponential   start * (target / start)^(i / rounds), i = 1..rounds (SynFlow, Tanaka et al. 2020)
    linear        equal steps
    snipit        sparsities rho - (rho - 1/2) / 2^i, i = 0..rounds-2, then rho = 1 - target (SNIP-it, Verdenius et al.
                  2020, as CroP-it uses it); for rho <= 1/2 they begin at rho / 2, so that none exceeds the target

    No density is above `start`. Raises ValueError for another schedule or no round.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds")
    if schedule not in _SCHEDULES:
        raise ValueError(f"unknown schedule of rounds {schedule!r}; known: {', '.join(_SCHEDULES)}")
    way = [_SCHEDULES[schedule](start, target, i, rounds) for i in range(1, rounds)]
    return [min(start, max(target, density)) for density in way] + [target]


def _exponential(start: float, target: float, i: int, rounds: int) -> float:
    return start * (target / start) ** (i / rounds) if start else 0.0


def _linear(start: float, target: float, i: int, rounds: int) -> float:
    return start - (start - target) * i / rounds


def _snipit(start: float, target: float, i: int, rounds: int) -> float:
    rho = 1.0 - target
    first = 0.5 if rho > 0.5 else rho / 2
    return 1.0 - (rho - (rho - first) * 0.5 ** (i - 1))


_SCHEDULES: dict[str, Callable[[float, float, int, int], float]] = {
    "exponential": _exponential,
    "linear": _linear,
    "snipit": _snipit,
}
