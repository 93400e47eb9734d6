"""Selection of whole groups: blocks, kernels and channels.

A group lives when any of its weights does; its size is the number of its live weights, its score their mean (or sum) in
float64. Infinite scores decide the group's: the more frequent sign wins, and equally many of both cancel.

Within a pool groups are taken from the best down while they fit what is asked; one that no longer fits is passed over
for later ones that do. So nothing that was left out would still fit, and where all groups have one size g,
floor(asked / g) of them stay. Ties in the score follow the seeded priority of (layer, group), as single weights' do. A
layer with a floor first takes its best groups, one after the other, until they hold as many weights.

What pools could not use is handed on (`choose_groups`): the pools, those furthest below their count first (ties in the
order of layers), take one more group each, their best that fits the rest, again and again until none fits. For groups
of one size that is largest-remainder rounding in groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.params.pattern import Pattern
from utils.pruning.kth import kth
from utils.pruning.patterns import labels
from utils.pruning.select import Layer, Pool, priority

Chosen = dict[str, np.ndarray]
"""Bool [groups] by layer name."""


@dataclass(frozen=True, eq=False)
class Groups(Layer):
    """A layer as groups: `scores` and `live` are those of the groups, `size` and `alive` count weights.

    weights: size of the parameter; sizes: int64 [groups], live weights of each; least: the floor as asked, while
    `floor` is what whole groups need for it at most (see `cost`).
    """

    weights: int = field(kw_only=True)
    sizes: np.ndarray = field(kw_only=True)
    least: int = field(kw_only=True, default=0)

    @property
    def size(self) -> int:
        """All weights of the parameter, live or not."""
        return self.weights

    @property
    def alive(self) -> int:
        """Live weights."""
        return int(self.sizes.sum())


def grouped(layer: Layer, pattern: Pattern, score: str) -> Groups:
    """`layer` as groups of `pattern`; score: mean or sum. `layer.floor` is the floor in weights."""
    group = labels(pattern, layer.shape)
    number = int(group[-1]) + 1 if len(group) else 0
    sizes = np.bincount(group[layer.live], minlength=number)
    scores = _scores(group, layer, number)
    if score == "mean":
        scores = scores / np.maximum(sizes, 1)
    return Groups(
        layer.name,
        layer.shape,
        scores,
        sizes > 0,
        layer.key,
        cost(layer.floor, sizes),
        layer.ratio,
        weights=layer.size,
        sizes=sizes,
        least=layer.floor,
    )


def _scores(group: np.ndarray, layer: Layer, number: int) -> np.ndarray:
    """Float64 sums over the live weights of each group; infinities as the module says."""
    scores = np.where(layer.live, layer.scores, 0).astype(np.float64)
    infinite = np.isinf(scores)
    if not infinite.any():
        return np.bincount(group, weights=scores, minlength=number)
    sums = np.bincount(group, weights=np.where(infinite, 0.0, scores), minlength=number)
    sign = np.bincount(group, weights=np.where(infinite, np.sign(scores), 0.0), minlength=number)
    return np.where(sign == 0, sums, np.copysign(np.inf, sign))


def cost(floor: int, sizes: np.ndarray) -> int:
    """The most weights that taking best groups until they hold `floor` can come to, for any scores."""
    sizes = sizes[sizes > 0]
    if not floor or not len(sizes):
        return 0
    if sizes.min() == sizes.max():
        return min(-(-floor // int(sizes[0])) * int(sizes[0]), int(sizes.sum()))
    return min(floor - 1 + int(sizes.max()), int(sizes.sum()))


def choose_groups(pools: Sequence[Pool], spare: int = 0) -> Chosen:
    """Whole groups of every pool, together no more weights than the pools ask for plus `spare`.

    All layers are `Groups`. spare: weights beyond the pools' counts that may be handed on to them.
    """
    found = [_fit(pool) for pool in pools]
    rests = [pool.keep - _held(pool, chosen) for pool, chosen in zip(pools, found, strict=True)]
    left = sum(rests) + spare
    order = sorted(range(len(pools)), key=lambda i: -rests[i])
    while left and order:
        order = [i for i in order if (took := _one_more(pools[i], found[i], left)) and (left := left - took) >= 0]
    return {name: chosen for part in found for name, chosen in part.items()}


def _held(pool: Pool, chosen: Mapping[str, np.ndarray]) -> int:
    return sum(int(layer.sizes[chosen[layer.name]].sum()) for layer in pool.layers if isinstance(layer, Groups))


def _one_more(pool: Pool, chosen: Chosen, room: int) -> int:
    """Add the pool's best group that fits in `room`; its size, 0 when none fits."""
    places = _Places(pool)
    taken = np.concatenate([chosen[layer.name] for layer in pool.layers])
    open_places = np.flatnonzero(~taken & (places.sizes > 0) & (places.sizes <= room))
    if not len(open_places):
        return 0
    scores = places.scores[open_places]
    best = places.by_priority(open_places[scores == scores.max()])[0]
    taken[best] = True
    chosen.update(places.split(taken))
    return int(places.sizes[best])


class _Places:
    """The groups of a pool end to end, in the order of its layers."""

    def __init__(self, pool: Pool) -> None:
        self.layers = [layer for layer in pool.layers if isinstance(layer, Groups)]
        self.ends = np.cumsum([len(layer.sizes) for layer in self.layers])
        self.sizes = np.concatenate([layer.sizes for layer in self.layers])
        self.scores = np.concatenate([layer.scores for layer in self.layers])

    def by_priority(self, places: np.ndarray) -> np.ndarray:
        """Rising `places`, those that win ties first."""
        starts = np.concatenate([[0], np.searchsorted(places, self.ends)])
        order = [
            priority(layer.key, places[first:last] - (end - len(layer.sizes)))
            for layer, end, first, last in zip(self.layers, self.ends, starts, starts[1:], strict=False)
        ]
        return places[np.argsort(np.concatenate(order), kind="stable")]

    def split(self, taken: np.ndarray) -> Chosen:
        """Bool [all groups] as one array per layer."""
        parts = np.split(taken, self.ends[:-1])
        return {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}


def _fit(pool: Pool) -> Chosen:
    """Floors first, then the best groups that fit, as the module says."""
    places = _Places(pool)
    taken = np.zeros(len(places.sizes), dtype=bool)
    for layer, end in zip(places.layers, places.ends, strict=True):
        if layer.least:
            taken[_best(places, int(end) - len(layer.sizes), int(end), layer.least)] = True
    room = pool.keep - int(places.sizes[taken].sum())
    open_places = np.flatnonzero(~taken & (places.sizes > 0) & (places.sizes <= room))
    while len(open_places):
        scores, sizes = places.scores[open_places], places.sizes[open_places]
        if int(sizes.sum()) <= room:
            taken[open_places] = True
            break
        cut = _cut(scores, sizes, room)
        above = open_places[scores > cut]
        tied = places.by_priority(open_places[scores == cut])
        room -= int(places.sizes[above].sum())
        fitting = int(np.searchsorted(np.cumsum(places.sizes[tied]), room, side="right"))
        room -= int(places.sizes[tied[:fitting]].sum())
        taken[above] = taken[tied[:fitting]] = True
        # The group that did not fit is larger than the room, so each turn is rid of at least one size.
        open_places = open_places[~taken[open_places] & (sizes <= room)]
    return places.split(taken)


def _best(places: _Places, start: int, end: int, floor: int) -> np.ndarray:
    """The best groups of one layer, as few as hold `floor` weights."""
    live = start + np.flatnonzero(places.sizes[start:end])
    order = places.by_priority(live)
    order = order[np.argsort(-places.scores[order], kind="stable")]
    return order[: int(np.searchsorted(np.cumsum(places.sizes[order]), floor)) + 1]


def _cut(scores: np.ndarray, sizes: np.ndarray, room: int) -> np.floating:
    """The score t for which groups above t hold no more than `room`, and groups from t up hold more.

    A binary search by medians, linear in the number of groups. All groups together must hold more than `room`.
    """
    while True:
        middle = kth([(scores, None)], len(scores), len(scores) // 2)
        above = scores > middle
        held = int(sizes[above].sum())
        if held > room:
            scores, sizes = scores[above], sizes[above]
            continue
        upto = held + int(sizes[scores == middle].sum())
        if upto > room:
            return middle
        below = scores < middle
        scores, sizes, room = scores[below], sizes[below], room - upto
