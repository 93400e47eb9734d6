"""What the kinds of graphs share: rows of a table in which so many places are chosen."""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 22


def choose(counts: np.ndarray, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Bool [rows, columns] with exactly counts[i] True in row i, every such set equally likely.

    counts: int [rows], 0 to columns. Memory beside the result: that of about 4 million places.
    """
    chosen = np.zeros((len(counts), columns), dtype=bool)
    rows = max(1, _CHUNK // max(1, columns))
    for start in range(0, len(counts), rows):
        part = counts[start : start + rows]
        order = np.argsort(rng.random((len(part), columns)), axis=1)
        np.put_along_axis(chosen[start : start + rows], order, np.arange(columns) < part[:, None], axis=1)
    return chosen


def even(total: int, vertices: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """`total` spread over int [vertices] as floor or ceil of the mean.

    Which vertices get one more is random; without `rng` it is the first ones.
    """
    base, extra = divmod(total, vertices)
    degrees = np.full(vertices, base, dtype=np.int64)
    degrees[:extra] += 1
    return degrees if rng is None else rng.permutation(degrees)
