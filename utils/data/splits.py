"""Which training images are held out and which are used: stratified, seeded, exact in number.

The images of a class are taken in the order of a hash of (seed, index), so a larger share contains a smaller one and
nothing depends on the version of a random number library.
"""

from __future__ import annotations

import numpy as np

from utils.data.stateless import derive, uniform
from utils.system.errors import UserError


def split(labels: np.ndarray, val: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val) of a stratified split, sorted, int64; each index is in exactly one of them.

    val holds floor(val * n + 0.5) of the n images, shared over the classes by largest remainders (ties: lower class).
    """
    count = int(np.floor(val * len(labels) + 0.5))
    held_out = _choose(np.arange(len(labels)), labels, count, derive("split", seed))
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[held_out] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def subset(train_idx: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of `train_idx`, stratified by `labels` (of the whole training split), sorted, int64.

    Raises UserError when there are fewer than `count`.
    """
    if count > len(train_idx):
        raise UserError(f"data.subset={count} is more than the {len(train_idx)} training images there are; lower it")
    return _choose(np.asarray(train_idx, dtype=np.int64), labels, count, derive("subset", seed))


def balanced(indices: np.ndarray, labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """`per_class` of `indices` of every class (all of a class that has fewer), the classes taking turns, int64."""
    own = np.asarray(labels)[indices]
    draws = uniform(derive("scoring", seed), indices, 0)
    turns = np.empty(len(indices), dtype=np.int64)
    for label in np.unique(own):
        members = np.flatnonzero(own == label)
        turns[members[np.argsort(draws[members], kind="stable")]] = np.arange(len(members))
    order = np.lexsort((own, turns))
    return np.asarray(indices, dtype=np.int64)[order[turns[order] < per_class]]


def _choose(indices: np.ndarray, labels: np.ndarray, count: int, key: int) -> np.ndarray:
    """`count` of `indices`, shared over their classes in proportion, sorted."""
    own = np.asarray(labels)[indices]
    classes, counts = np.unique(own, return_counts=True)
    draws = uniform(key, indices, 0)
    parts = [np.empty(0, dtype=np.int64)]
    for label, share in zip(classes, _apportion(count, counts), strict=True):
        members = np.flatnonzero(own == label)
        parts.append(indices[members[np.argsort(draws[members], kind="stable")[:share]]])
    return np.sort(np.concatenate(parts))


def _apportion(total: int, counts: np.ndarray) -> np.ndarray:
    """Share `total` over classes in proportion to `counts` by largest remainders, in whole numbers throughout."""
    quotas = total * counts.astype(np.int64)
    shares, remainders = np.divmod(quotas, max(1, int(counts.sum())))
    order = np.argsort(-remainders, kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return shares
