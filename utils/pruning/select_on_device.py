"""Exact selection where the scores lie: on a GPU, from which to copy them takes longer than to select there.

What `utils.pruning.kth` does, in torch's operations on all layers end to end: a sample brackets the threshold, one pass
counts what is below, what is inside is sorted. Only the places of ties come to the CPU, and every value read back makes
the host wait, so few are. (`torch.kthvalue` works with one block of threads, `torch.sort` orders all.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.pruning.kth import SAMPLE, bracket_ranks, nan_error, sample_places


def best(
    values: Sequence[Tensor], lives: Sequence[Tensor] | None, count: int, keep: int
) -> tuple[list[Tensor], list[np.ndarray], int]:
    """Bool masks per layer of what scores no less than the `keep`-th highest of the `count` scores that count, the flat
    indices of those that score just that, and how many of them are too many; no indices where none are.

    values: flat scores per layer, on one device and of one dtype; lives: which of them count, there too, bool per
    layer; None for all. The masks are there as well. 0 < keep < count. Raises ValueError for NaN.
    """
    scores, live = torch.cat(list(values)), None if lives is None else torch.cat(list(lives))
    highest = _kth(scores, live, _sample(values, scores, live), count, count - keep)
    chosen = scores >= highest
    if live is not None:
        chosen &= live
    ties = chosen.new_empty(0, dtype=torch.int64)
    if excess := int(chosen.count_nonzero()) - keep:
        ties = (chosen & (scores == highest)).nonzero().flatten()
    sizes = [len(one) for one in values]
    begins = np.cumsum([0, *sizes])
    index = ties.cpu().numpy()
    cuts = np.searchsorted(index, begins)
    return list(chosen.split(sizes)), [index[cuts[i] : cuts[i + 1]] - begins[i] for i in range(len(sizes))], excess


def threshold(values: Sequence[Tensor], rank: int) -> Tensor:
    """The score of `rank` (0 is the lowest) among all, without dimensions. Raises ValueError for NaN."""
    scores = torch.cat(list(values))
    return _kth(scores, None, _sample(values, scores, None), len(scores), rank)


def _sample(values: Sequence[Tensor], scores: Tensor, live: Tensor | None) -> Tensor:
    """Some of the scores that count, sorted."""
    begin, found = 0, []
    for one, place in zip(values, sample_places([len(one) for one in values], [None] * len(values)), strict=True):
        found.append(place + begin)
        begin += len(one)
    places = torch.from_numpy(np.concatenate(found)).to(scores.device)
    return scores[places if live is None else places[live[places]]].sort().values


def _kth(scores: Tensor, live: Tensor | None, sample: Tensor, count: int, rank: int) -> Tensor:
    """The score of `rank` (0 is the lowest), as a tensor without dimensions."""
    if count > 2 * SAMPLE and len(sample) > 1:
        first, last = bracket_ranks(len(sample), rank / count)
        under = scores < sample[first] if first >= 0 else torch.zeros_like(scores, dtype=torch.bool)
        other = under | (scores > sample[last]) if last < len(sample) else under.clone()
        if live is not None:
            under &= live
            other |= ~live
        inside = scores[~other].sort().values  # NaN too, which are last
        below = int(under.count_nonzero())
        if below <= rank < below + len(inside):
            return _without_nan(inside)[rank - below]
    return _without_nan((scores if live is None else scores[live]).sort().values)[rank]


def _without_nan(ordered: Tensor) -> Tensor:
    if bool(ordered[-1].isnan()):
        raise nan_error()
    return ordered
