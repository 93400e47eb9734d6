"""Spectral measures of a bipartite graph: singular values of its biadjacency, Ramanujan gaps, IMDB.

The eigenvalues of the adjacency are plus and minus the singular values of the biadjacency (and zeros), so its largest
in size is sigma1 and the third largest sigma2. The measures are those of Hoang et al. 2023: vertices without an edge
are left out, a gap is the bound minus sigma2 (a Ramanujan graph has none below 0), and gaps are undefined where either
side's mean degree is below 3. Such measures follow the density closely: read them beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

LEAST_DEGREE = 3
"""Mean degree on either side, and inputs of a regular sub-graph, from which gaps are defined."""

_EXACT = 1 << 18


def singular_values(edges: np.ndarray) -> tuple[float, float]:
    """The two largest singular values of a biadjacency, bool [outputs, inputs], in float64; 0.0 where there is none.

    Large ones come from the eigenvalues of the smaller Gram matrix, whose entries are whole numbers and so exact; the
    smaller value then has an absolute error of about sqrt(1e-16) * sigma1 at worst.
    """
    matrix = torch.from_numpy(live(edges)).double()
    if not matrix.numel():
        return 0.0, 0.0
    if matrix.numel() <= _EXACT:
        values = torch.linalg.svdvals(matrix)[:2].tolist()
    else:
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)[:2].tolist()
    return values[0], values[1] if len(values) > 1 else 0.0


def live(edges: np.ndarray) -> np.ndarray:
    """`edges` without the rows and columns that hold none."""
    return edges[edges.any(axis=1)][:, edges.any(axis=0)]


@dataclass(frozen=True)
class Gaps:
    """Ramanujan gaps, and the same divided by their bounds.

    s: 2 sqrt(sigma1 - 1) - sigma2; r: sqrt(d_in - 1) + sqrt(d_out - 1) - sigma2 with the mean degrees of both sides.
    """

    s: float
    r: float
    s_normalised: float
    r_normalised: float


def gaps(edges: np.ndarray, sigma: tuple[float, float] | None = None) -> Gaps | None:
    """Gaps of a graph, bool [outputs, inputs]; None where a mean degree of its live vertices is below 3.

    sigma: its singular values, where they are known.
    """
    count, (outputs, inputs) = int(np.count_nonzero(edges)), live(edges).shape
    if not count or count < LEAST_DEGREE * max(outputs, inputs):
        return None
    first, second = singular_values(edges) if sigma is None else sigma
    bound_s = 2.0 * math.sqrt(first - 1.0)
    bound_r = math.sqrt(count / inputs - 1.0) + math.sqrt(count / outputs - 1.0)
    s, r = bound_s - second, bound_r - second
    return Gaps(s, r, s / bound_s, r / bound_r)


def imdb(edges: np.ndarray) -> tuple[Gaps | None, int]:
    """Iterative mean difference of bound: the mean gaps over input-regular sub-graphs, and how many there are.

    Inputs of equal degree, three or more of them, form with all outputs a sub-graph; it is judged as any graph, so
    outputs it leaves without an edge do not count and one with a mean degree below 3 is left out. None without any.
    """
    degrees = edges.sum(axis=0)
    found = [gaps(edges[:, degrees == degree]) for degree in _common(degrees)]
    known = [each for each in found if each is not None]
    if not known:
        return None, 0
    columns = ([each.s, each.r, each.s_normalised, each.r_normalised] for each in known)
    return Gaps(*(float(mean) for mean in np.mean(list(columns), axis=0))), len(known)


def _common(degrees: np.ndarray) -> list[int]:
    values, count = np.unique(degrees, return_counts=True)
    return [int(v) for v, n in zip(values, count, strict=True) if n >= LEAST_DEGREE and v >= LEAST_DEGREE]
