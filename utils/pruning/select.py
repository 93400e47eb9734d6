"""Exact selection: the highest scores of a pool of layers, to the weight, ties broken by a seeded order.

Only live (surviving) weights compete, so whatever is chosen is a subset of what lived. Scores may be zero, negative or
infinite and -0.0 equals 0.0. Among weights of equal score those with the smallest `priority` stay: a hash of (seed,
layer name, flat index in C order), so the order is random but equal on every rank, machine and memory layout; should
two hashes agree, the earlier layer, then the lower index, stays.

A layer with a floor first keeps that many of its own best; the rest of the pool goes to the best of all that is left.
The scores kept then add up to the most that the floors allow: whatever meets them can be turned into this choice by
exchanging a weight for one that scores no less.

The threshold comes from `utils.pruning.kth`, or for scores on a GPU from `utils.pruning.select_on_device`; it is a
value of the scores themselves, so the result does not depend on the algorithm that found it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from utils.data.stateless import derive, uniform
from utils.masks import Masks, copied
from utils.pruning.kth import kth
from utils.pruning.select_on_device import best

Flat = np.ndarray | torch.Tensor
"""A mask of a layer, bool [size], where its scores are."""
Tied = tuple[Flat, np.ndarray, np.ndarray]
"""A layer's mask, flat indices of weights that tie with the threshold, their priorities."""
_CHUNK = 1 << 18
_BINS = 1 << 12


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable parameter in flat C order: what an allocation and the selection see of it.

    values: scores, float32 or float64 [size]; a tensor is selected from on its device; live: bool [size], the weights
    that may be kept; key: starts the tie order; floor: weights that must be kept, at most as many as live; ratio: kept
    weights in the file of `pruning.from_mask`; there: `live` on the device of a tensor of scores, if it is there.
    """

    name: str
    shape: tuple[int, ...]
    values: np.ndarray | torch.Tensor
    live: np.ndarray
    key: int = 0
    floor: int = 0
    ratio: int = 0
    there: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """All weights of the parameter, live or not."""
        return len(self.live)

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """The scores on the CPU."""
        return self.values if isinstance(self.values, np.ndarray) else self.values.cpu().numpy()

    @functools.cached_property
    def alive(self) -> int:
        """Live weights: the most that can be kept."""
        return int(np.count_nonzero(self.live))


@dataclass(frozen=True)
class Pool:
    """Layers whose weights compete with each other, and how many of them stay."""

    layers: tuple[Layer, ...]
    keep: int


def kept_count(density: float, weights: int) -> int:
    """Weights that `density` of `weights` means: floor(density * weights + 0.5)."""
    return math.floor(density * weights + 0.5)


def layers_of(scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], seed: int) -> list[Layer]:
    """Layers in the order of `masks`, in one dtype (float64 as soon as one score tensor is); scores stay on a GPU.

    Scores of other dtypes than float32 and float64 become float32.
    """
    wide = any(scores[name].dtype == torch.float64 for name in masks)
    dtype = torch.float64 if wide else torch.float32
    found = []
    for name, mask in masks.items():
        values = _flat(scores[name].detach().to(dtype).reshape(-1))
        there = None
        if isinstance(values, torch.Tensor) and isinstance(masks, Masks) and masks.kept < masks.total:
            there = masks.on(values.device)[name].reshape(-1)
        key = derive("ties", seed, name)
        found.append(Layer(name, tuple(mask.shape), values, mask.reshape(-1).numpy(), key, there=there))
    return found


def _flat(scores: torch.Tensor) -> np.ndarray | torch.Tensor:
    return scores if scores.device.type == "cuda" else scores.cpu().numpy()


def top(pool: Pool) -> dict[str, torch.Tensor]:
    """Bool masks, by name in the parameters' shapes, that keep exactly the `pool.keep` best live weights.

    They are on the device of the scores; not to be written to, for they may be the masks that the layers came with.
    Raises ValueError when the pool has fewer live weights than that, or more in its floors, and for NaN.
    """
    alive, floors = sum(layer.alive for layer in pool.layers), sum(layer.floor for layer in pool.layers)
    if not floors <= pool.keep <= alive:
        raise ValueError(f"cannot keep {pool.keep} of {alive} live weights{f' with floors of {floors}' * bool(floors)}")
    if floors and len(pool.layers) > 1 and pool.keep < alive:
        return _top_above_floors(pool, pool.keep - floors)
    if pool.keep == alive:
        chosen = _lives(pool.layers)
    elif pool.keep == 0:
        chosen = [live & False for live in _lives(pool.layers)]
    else:
        chosen = _best(pool, alive)
    masks = zip(pool.layers, chosen, strict=True)
    return {layer.name: torch.as_tensor(mask).reshape(layer.shape) for layer, mask in masks}


def _lives(layers: Sequence[Layer]) -> list[Flat]:
    """Which weights live, where the scores are; those that are not there yet are sent there in one copy."""
    if not _on_device(layers):
        return [layer.live for layer in layers]
    there = [layer.there for layer in layers if layer.there is not None]
    if len(there) < len(layers):
        lives = {layer.name: torch.from_numpy(layer.live) for layer in layers}
        there = list(copied(lives, torch.as_tensor(layers[0].values).device).values())
    return [*there]


def _on_device(layers: Sequence[Layer]) -> bool:
    return all(isinstance(layer.values, torch.Tensor) for layer in layers)


def _top_above_floors(pool: Pool, left: int) -> dict[str, torch.Tensor]:
    """Each layer's `floor` best weights, and the `left` best of all others."""
    first = {layer.name: top(Pool((replace(layer, floor=0),), layer.floor))[layer.name] for layer in pool.layers}
    others = tuple(_without(layer, first[layer.name].reshape(-1)) for layer in pool.layers)
    return {name: mask | first[name] for name, mask in top(Pool(others, left)).items()}


def _without(layer: Layer, taken: torch.Tensor) -> Layer:
    """`layer` without a floor, of whose live weights those `taken` do not compete any more."""
    there = None if layer.there is None else layer.there & ~taken
    return replace(layer, live=layer.live & ~taken.cpu().numpy(), there=there, floor=0)


def _best(pool: Pool, alive: int) -> list[Flat]:
    """Masks of the `pool.keep` best of the `alive` live weights; some stay and some go."""
    if _on_device(pool.layers):
        values = [torch.as_tensor(layer.values) for layer in pool.layers]
        full = alive == sum(layer.size for layer in pool.layers)
        lives = None if full else [torch.as_tensor(live) for live in _lives(pool.layers)]
        there, ties, excess = best(values, lives, alive, pool.keep)
        _drop_ties(excess, functools.partial(_tied_at, pool.layers, there, ties))
        return [*there]
    parts = [(layer.scores, None if layer.alive == layer.size else layer.live) for layer in pool.layers if layer.alive]
    threshold = kth(parts, alive, alive - pool.keep)
    chosen = [_at_least(layer, threshold) for layer in pool.layers]
    excess = sum(int(np.count_nonzero(mask)) for mask in chosen) - pool.keep
    _drop_ties(excess, functools.partial(_tied, pool, chosen, threshold))
    return [*chosen]


def _at_least(layer: Layer, threshold: np.floating) -> np.ndarray:
    mask: np.ndarray = layer.scores >= threshold
    return mask if layer.alive == layer.size else np.logical_and(mask, layer.live, out=mask)


def _drop_ties(excess: int, tied: Callable[[], Iterable[Tied]]) -> None:
    """Clear `excess` of the weights that `tied` tells, in place.

    Ties may be all weights there are, so their priorities are never held together: they are counted in bins, and only
    those of the bin with the cut are looked at one by one.
    """
    if not excess:
        return
    counts = np.zeros(_BINS, dtype=np.int64)
    for _, _, order in tied():
        counts += np.bincount(_bin(order), minlength=_BINS)
    ends = np.cumsum(counts)
    stay = int(ends[-1]) - excess
    found = int(np.searchsorted(ends, stay, side="right"))
    near = np.concatenate([order[_bin(order) == found] for _, _, order in tied()])
    rank = stay - int(ends[found] - counts[found])
    cut = np.partition(near, rank)[rank]
    equal = rank - int(np.count_nonzero(near < cut))
    for mask, index, order in tied():
        mask[index[order > cut]] = False
        level = index[order == cut]
        mask[level[equal:]] = False
        equal = max(0, equal - len(level))


def _tied(pool: Pool, chosen: list[np.ndarray], threshold: np.floating) -> Iterator[Tied]:
    """The chosen weights that score `threshold`, part by part."""
    for layer, mask in zip(pool.layers, chosen, strict=True):
        for start in range(0, layer.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            index = np.flatnonzero(mask[part] & (layer.scores[part] == threshold)) + start
            if len(index):
                yield mask, index, priority(layer.key, index)


def _tied_at(layers: Sequence[Layer], chosen: Sequence[Flat], ties: list[np.ndarray]) -> Iterator[Tied]:
    """The weights at the indices `ties` of each layer."""
    for layer, mask, index in zip(layers, chosen, ties, strict=True):
        for start in range(0, len(index), _CHUNK):
            part = index[start : start + _CHUNK]
            yield mask, part, priority(layer.key, part)


def _bin(order: np.ndarray) -> np.ndarray:
    return (order * _BINS).astype(np.int64)  # exact: a power of two


def priority(key: int, indices: np.ndarray) -> np.ndarray:
    """Place of flat `indices` in the tie order of the layer with `key`: float64 in [0, 1), smaller stays."""
    place = np.empty(len(indices), dtype=np.float64)
    for start in range(0, len(indices), _CHUNK):
        part = slice(start, start + _CHUNK)
        place[part] = uniform(key, indices[part], 0)
    return place


def covers(pools: Sequence[Pool], layers: Sequence[Layer]) -> bool:
    """True when every layer is in one pool and no pool asks for less than its floors or more than its live weights."""
    named = sorted(layer.name for pool in pools for layer in pool.layers)
    room = all(
        sum(layer.floor for layer in pool.layers) <= pool.keep <= sum(layer.alive for layer in pool.layers)
        for pool in pools
    )
    return room and named == sorted(layer.name for layer in layers)
