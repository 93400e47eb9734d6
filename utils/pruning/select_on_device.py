"""Exact selection where the scores lie: on a GPU, from which to copy them takes longer than to select there.

What `utils.pruning.kth` does, in torch's operations on all layers end to end: a sample brackets the threshold, one pass
counts what is below, what is inside is sorted. Only masks and the places of ties come to the CPU, and every value read
back makes the host wait, so few are. (`torch.kthvalue` works with one block of threads, `torch.sort` orders all.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.pruning.kth import SAMPLE, bracket_ranks, nan_error, sample_places

Lives = Sequence[np.ndarray | None]
"""Per layer which of its scores count, bool [size]; None for all."""


def best(values: Sequence[Tensor], lives: Lives, count: int, keep: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Bool masks per layer of what scores no less than the `keep`-th highest of the `count` scores that count, and the
    flat indices of those that score just that; no indices where the masks keep no more than `keep`.

    values: flat scores per layer, on one device and of one dtype. 0 < keep < count. Raises ValueError for NaN.
    """
    scores, live = torch.cat(list(values)), _together(values, lives)
    highest = _kth(scores, live, _sample(values, lives, scores), count, count - keep)
    chosen = scores >= highest
    if live is not None:
        chosen &= live
    ties = chosen.new_empty(0, dtype=torch.int64)
    if int(chosen.count_nonzero()) > keep:
        ties = (chosen & (scores == highest)).nonzero().flatten()
    sizes = [len(one) for one in values]
    masks = [mask.numpy() for mask in chosen.cpu().split(sizes)]
    begins = np.cumsum([0, *sizes])
    index = ties.cpu().numpy()
    cuts = np.searchsorted(index, begins)
    return masks, [index[cuts[i] : cuts[i + 1]] - begins[i] for i in range(len(sizes))]


def threshold(values: Sequence[Tensor], rank: int) -> Tensor:
    """The score of `rank` (0 is the lowest) among all, without dimensions. Raises ValueError for NaN."""
    scores = torch.cat(list(values))
    return _kth(scores, None, _sample(values, [None] * len(values), scores), len(scores), rank)


def _together(values: Sequence[Tensor], lives: Lives) -> Tensor | None:
    """Which of all scores count, on their device; None where all do."""
    if all(live is None for live in lives):
        return None
    whole = [np.ones(len(one), dtype=bool) if live is None else live for one, live in zip(values, lives, strict=True)]
    return torch.from_numpy(np.concatenate(whole)).to(values[0].device)


def _sample(values: Sequence[Tensor], lives: Lives, scores: Tensor) -> Tensor:
    """Some of the scores that count, sorted."""
    begin, places = 0, []
    for one, place in zip(values, sample_places([len(one) for one in values], lives), strict=True):
        places.append(place + begin)
        begin += len(one)
    return scores[torch.from_numpy(np.concatenate(places)).to(scores.device)].sort().values


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
