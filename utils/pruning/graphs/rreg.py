"""Randomly regular graphs: both sides have (nearly) equal degrees, so no channel is dead.

The channels of the larger side have `degree` edges each, those of the smaller side floor or ceil of
degree * larger / smaller; sides of equal size have `degree` both.
"""

from __future__ import annotations

import numpy as np

from utils.params.graph import Graph
from utils.pruning.graph_quality.expansion import Expansion
from utils.pruning.graphs import Sides, graph
from utils.pruning.graphs._draw import even

_ROUNDS = 500


@graph("rreg")
def rreg(sides: Sides, degree: int, exact: bool, rng: np.random.Generator, section: Graph) -> np.ndarray:
    """Random graph with equal degrees on each side: exactly (graph.form simple) or before collapse (paper).

    simple: stub matching, then random switches until no edge is double. paper: stub matching with double edges
    collapsed into one, so degrees are lower where sides are small; the best of graph.tries by average expansion. By
    density the paper form puts as many random missing edges as were collapsed; the simple form already has exactly
    degree * max(inputs, outputs). A simple graph whose degree reaches the smaller side is dense.
    """
    found = _paper(sides, degree, exact, rng, section.tries) if section.form == "paper" else _simple(sides, degree, rng)
    return found if sides.outputs >= sides.inputs else np.ascontiguousarray(found.T)


def _paper(sides: Sides, degree: int, exact: bool, rng: np.random.Generator, tries: int) -> np.ndarray:
    """Bool [larger, smaller]: of `tries` matchings the one that expands most, the first of equals."""
    larger, smaller = sides.larger, sides.smaller
    expansion = Expansion(smaller, larger, rng) if tries > 1 else None
    left, right = np.repeat(np.arange(larger), degree), np.repeat(np.arange(smaller), even(degree * larger, smaller))
    best, most = np.empty(0, dtype=np.int64), -1.0
    for _ in range(tries):
        codes = np.unique(left * smaller + rng.permutation(right))
        if exact and len(codes) < degree * larger:
            codes = _filled(codes, degree * larger, larger * smaller, rng)
        estimate = expansion.of_edges(*np.divmod(codes, smaller)) if expansion else 0.0
        if estimate > most:
            best, most = codes, estimate
    return _table(best, larger, smaller)


def _filled(codes: np.ndarray, edges: int, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """`codes` and so many of the other pairs, at random, that there are `edges` of them; sorted."""
    absent = np.ones(pairs, dtype=bool)
    absent[codes] = False
    more = rng.choice(np.flatnonzero(absent), edges - len(codes), replace=False)
    return np.sort(np.concatenate([codes, more]))


def _simple(sides: Sides, degree: int, rng: np.random.Generator) -> np.ndarray:
    """Bool [larger, smaller] with exact degrees. Above half the pairs the missing edges are drawn: they are fewer."""
    larger, smaller = sides.larger, sides.smaller
    if degree >= smaller:
        return np.ones((larger, smaller), dtype=bool)
    if 2 * degree > smaller:
        return ~_simple(sides, smaller - degree, rng)
    left = np.repeat(np.arange(larger), degree)
    right = rng.permutation(np.repeat(np.arange(smaller), even(degree * larger, smaller, rng)))
    if not _switch(left, right, larger, smaller, rng):
        right = _cyclic(larger, smaller, degree, rng)
    return _table(left * smaller + right, larger, smaller)


def _switch(left: np.ndarray, right: np.ndarray, larger: int, smaller: int, rng: np.random.Generator) -> bool:
    """Exchange right ends of edges, in place, until no edge is double; False when `_ROUNDS` rounds did not do.

    Every round offers each double edge (a, b) a random partner (c, d) and makes them (a, d) and (c, b) where neither
    exists and no other offer of the round touches the same edges or pairs. Degrees never change.
    """
    copies = np.bincount(left * smaller + right, minlength=larger * smaller)
    codes = left * smaller + right
    order = np.argsort(codes, kind="stable")
    bad = order[1:][codes[order[1:]] == codes[order[:-1]]]
    for _ in range(_ROUNDS):
        bad = bad[copies[left[bad] * smaller + right[bad]] > 1]
        if not len(bad):
            return True
        partner = rng.integers(len(left), size=len(bad))
        first, second = left[bad] * smaller + right[partner], left[partner] * smaller + right[bad]
        ok = (copies[first] == 0) & (copies[second] == 0) & _alone(bad, partner) & _alone(first, second)
        bad_, partner_ = bad[ok], partner[ok]
        np.subtract.at(copies, left[bad_] * smaller + right[bad_], 1)
        np.subtract.at(copies, left[partner_] * smaller + right[partner_], 1)
        right[bad_], right[partner_] = right[partner_], right[bad_]
        copies[first[ok]] += 1
        copies[second[ok]] += 1
    return False


def _alone(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bool [n]: where neither of the two numbers occurs a second time in both arrays together."""
    _, place, count = np.unique(np.concatenate([first, second]), return_inverse=True, return_counts=True)
    once = count[place] == 1
    return once[: len(first)] & once[len(first) :]


def _cyclic(larger: int, smaller: int, degree: int, rng: np.random.Generator) -> np.ndarray:
    """Right ends of a biregular graph that always exists: consecutive stubs go round the (shuffled) smaller side."""
    rows = rng.permutation(larger)[:, None] * degree + np.arange(degree)
    return rng.permutation(smaller)[rows.reshape(-1) % smaller]


def _table(codes: np.ndarray, larger: int, smaller: int) -> np.ndarray:
    kept = np.zeros(larger * smaller, dtype=bool)
    kept[codes] = True
    return kept.reshape(larger, smaller)
