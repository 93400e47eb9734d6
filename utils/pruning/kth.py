"""The score of a given rank among many, exactly, from one reading of the scores and without a copy of them.

A sample brackets the score between two of its values. One pass, in pieces that stay in the CPU's cache, counts what
is below the bracket and takes out the little that is inside, where numpy's partition finds the score (the sampled
bounds of Floyd and Rivest 1975). Several times faster than a partition of all, which moves every score a few times.

The sample decides the time alone: should the rank lie outside the bracket, everything is partitioned. The result is a
value of the scores themselves, so it does not depend on how it was found.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

Part = tuple[np.ndarray, np.ndarray | None]
"""Scores [n] of a layer, all parts in one dtype, and which of them count, bool [n]; None for all."""

_PIECE = 1 << 15
SAMPLE = 1 << 16
_DEVIATIONS = 6.0
"""Half the width of the bracket, in standard deviations of a sample's rank."""


def kth(parts: Sequence[Part], count: int, rank: int) -> np.floating:
    """The score of `rank` (0 is the lowest) among the `count` scores of `parts` that count.

    -0.0 equals 0.0, infinities are scores like others. Raises ValueError for NaN, and for a rank that is none.
    """
    if not 0 <= rank < count:
        raise ValueError(f"no rank {rank} among {count} scores")
    if count > 2 * SAMPLE and (bracket := _bracket(parts, count, rank)) is not None:
        low, high = bracket
        if low == high:  # a score that many share: to count is enough
            below, upto = _counts(parts, count, low)
            if below <= rank < upto:
                return low
        else:
            below, inside = _within(parts, low, high)
            if below <= rank < below + len(inside):
                return _partitioned(inside, rank - below)
    return _partitioned(np.concatenate([scores if live is None else scores[live] for scores, live in parts]), rank)


def _partitioned(scores: np.ndarray, rank: int) -> np.floating:
    """The score of `rank`; reorders `scores`. NaN are last in numpy's order, so the highest tells of them."""
    scores.partition(rank)
    if np.isnan(scores[rank:].max()):
        raise nan_error()
    value: np.floating = scores[rank]
    return value


def _bracket(parts: Sequence[Part], count: int, rank: int) -> tuple[np.floating, np.floating] | None:
    """Two scores between which that of `rank` almost surely lies; None where too little of a sample counts."""
    sample = _sample(parts)
    if len(sample) < 2 or np.isnan(sample[-1]):
        return None
    low, high = bracket_ranks(len(sample), rank / count)
    infinity = sample.dtype.type(np.inf)
    return sample[low] if low >= 0 else -infinity, sample[high] if high < len(sample) else infinity


def bracket_ranks(size: int, share: float) -> tuple[int, int]:
    """Ranks in a sorted sample of `size` between which almost surely lies what has `share` of all scores below it.

    They may lie outside the sample: nothing bounds the score there.
    """
    middle = share * size
    half = _DEVIATIONS * math.sqrt(size * share * (1 - share)) + _DEVIATIONS
    return math.floor(middle - half), math.ceil(middle + half)


def _sample(parts: Sequence[Part]) -> np.ndarray:
    """About `SAMPLE` of the scores, sorted."""
    places = sample_places([len(scores) for scores, _ in parts], [live for _, live in parts])
    sample = np.concatenate([scores[place] for (scores, _), place in zip(parts, places, strict=True)])
    sample.sort()
    return sample


def sample_places(sizes: Sequence[int], lives: Sequence[np.ndarray | None]) -> Iterator[np.ndarray]:
    """Per layer, indices of scores that count, about `SAMPLE` in all: one from each of as many equal stretches.

    Drawn at random from its stretch, not every n-th: weights repeat with the size of their kernels.
    """
    for place, live in zip(_places(tuple(sizes), max(1, sum(sizes) // SAMPLE)), lives, strict=True):
        yield place if live is None else place[live[place]]


@functools.lru_cache(maxsize=4)
def _places(sizes: tuple[int, ...], stretch: int) -> tuple[np.ndarray, ...]:
    """One index from each stretch of each layer, the same whenever it is asked for: a pruning asks in every round."""
    rng = np.random.default_rng(0)
    found = []
    for size in sizes:
        start = np.arange(0, size - stretch + 1, stretch)
        found.append(start + rng.integers(stretch, size=len(start)))
        found[-1].setflags(write=False)
    return tuple(found)


def _within(parts: Sequence[Part], low: np.floating, high: np.floating) -> tuple[int, np.ndarray]:
    """How many scores are below `low`, and those from `low` to `high`; NaN count as these."""
    below, inside = 0, []
    under, over = np.empty(_PIECE, dtype=bool), np.empty(_PIECE, dtype=bool)
    for scores, live in _pieces(parts):
        less, other = under[: len(scores)], over[: len(scores)]
        np.less(scores, low, out=less)
        np.greater(scores, high, out=other)
        np.logical_or(less, other, out=other)
        if live is not None:
            np.logical_and(less, live, out=less)
            np.greater(live, other, out=other)
        else:
            np.logical_not(other, out=other)
        below += int(np.count_nonzero(less))
        inside.append(scores[other])
    return below, np.concatenate(inside)


def _counts(parts: Sequence[Part], count: int, value: np.floating) -> tuple[int, int]:
    """How many of `count` scores are below `value`, and how many are not above it. Raises ValueError for NaN."""
    found = [0, 0, 0]
    space = np.empty(_PIECE, dtype=bool)
    for scores, live in _pieces(parts):
        for place, compare in enumerate((np.less, np.equal, np.greater)):
            holds = compare(scores, value, out=space[: len(scores)])
            if live is not None:
                np.logical_and(holds, live, out=holds)
            found[place] += int(np.count_nonzero(holds))
    below, equal, above = found
    if below + equal + above != count:
        raise nan_error()
    return below, below + equal


def _pieces(parts: Sequence[Part]) -> Iterator[Part]:
    for scores, live in parts:
        for start in range(0, len(scores), _PIECE):
            piece = slice(start, start + _PIECE)
            yield scores[piece], None if live is None else live[piece]


def nan_error() -> ValueError:
    """What tells that there is no k-th score."""
    return ValueError("NaN among the scores: they have no order")
