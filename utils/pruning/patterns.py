"""Patterns: which weights are kept or pruned together.

Weights are seen as [outputs, inputs, positions]: the first two sizes of a parameter and its kernel; a parameter of one
dimension has one input. Grouped convolutions count in_channels / groups inputs, transposed ones have inputs and
outputs exchanged, as their weights do.

- weight: every weight for itself.
- N:M: of M consecutive inputs at one output and kernel position exactly N stay, those with the highest scores; ties by
  the seeded order of single weights. Layers whose inputs do not divide by M stay whole and outside the density.
- block=HxW: H outputs x W inputs at one kernel position, smaller at the edges.
- kernel: all positions of one output and input.
- channel: all weights of one output. The last layer stays whole and outside the density: its outputs are the classes.

Blocks, kernels and channels are selected as `utils.pruning.groups` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from utils.params.pattern import Pattern, check_text, parse
from utils.pruning.select import Layer, priority

__all__ = ["Pattern", "check_text", "labels", "largest", "n_of_m", "outside", "parse", "sides", "starved"]


def sides(shape: Sequence[int]) -> tuple[int, int, int]:
    """(outputs, inputs, kernel positions) of a weight of `shape`."""
    outputs, inputs = (*shape[:2], 1, 1)[:2]
    return outputs, inputs, math.prod(shape[2:])


def outside(text: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Names of the parameters that pattern `text` leaves whole and out of the total; `shapes` in model order."""
    pattern = parse(text)
    if pattern.kind == "nm":
        return tuple(name for name, shape in shapes.items() if sides(shape)[1] % pattern.second)
    return tuple(shapes)[-1:] if pattern.kind == "channel" else ()


def labels(pattern: Pattern, shape: Sequence[int]) -> np.ndarray:
    """The group of every weight of a parameter of `shape`: int32 [weights] in C order, groups numbered from 0."""
    outputs, inputs, positions = sides(shape)
    out, into, place = (axis.astype(np.int32) for axis in np.ogrid[:outputs, :inputs, :positions])
    if pattern.kind == "weight":
        group = (out * inputs + into) * positions + place
    elif pattern.kind == "kernel":
        group = out * inputs + into + 0 * place
    elif pattern.kind == "channel":
        group = out + 0 * into + 0 * place
    else:
        height, width = (1, pattern.second) if pattern.kind == "nm" else (pattern.first, pattern.second)
        group = (out // height * -(-inputs // width) + into // width) * positions + place
    return group.astype(np.int32, copy=False).reshape(-1)


def largest(pattern: Pattern, shape: Sequence[int]) -> int:
    """Weights of the largest group in a parameter of `shape`."""
    outputs, inputs, positions = sides(shape)
    if pattern.kind == "block":
        return min(pattern.first, outputs) * min(pattern.second, inputs)
    if pattern.kind == "nm":
        return min(pattern.second, inputs)
    return {"weight": 1, "kernel": positions, "channel": inputs * positions}[pattern.kind]


def starved(pattern: Pattern, masks: Mapping[str, torch.Tensor]) -> str | None:
    """The first layer with a group of fewer than N live weights, None when there is none."""
    for name, mask in masks.items():
        live = _rows(mask.numpy().reshape(-1), mask.shape, pattern.second)
        if len(live) and int(live.sum(axis=1).min()) < pattern.first:
            return name
    return None


def n_of_m(layer: Layer, n: int, m: int) -> torch.Tensor:
    """Bool mask of the parameter's shape: exactly n of every m consecutive inputs, the best live ones.

    Raises ValueError when the inputs do not divide by m or a group has fewer than n live weights.
    """
    scores, live = (_rows(flat, layer.shape, m) for flat in (layer.scores, layer.live))
    if layer.alive < layer.size:
        scores = np.where(live, scores, -np.inf)
    cut = np.partition(scores, m - n, axis=1)[:, m - n, None]
    kept = (scores >= cut) & live
    counts = np.count_nonzero(kept, axis=1)
    if counts.size and counts.min() < n:
        raise ValueError(f"{layer.name!r} has a group with fewer than {n} live weights")
    tied = np.flatnonzero(counts > n)
    if len(tied):
        # Best first: higher score, then smaller priority, then lower index; dead weights are behind all others.
        index = _rows(np.arange(layer.size), layer.shape, m)[tied]
        place = priority(layer.key, index.reshape(-1)).reshape(index.shape)
        order = np.lexsort((place, -scores[tied], ~live[tied]), axis=1)
        kept[tied] = False
        kept[tied[:, None], order[:, :n]] = True
    outputs, inputs, positions = sides(layer.shape)
    back = kept.reshape(outputs, inputs // m, positions, m).transpose(0, 1, 3, 2)
    return torch.from_numpy(np.ascontiguousarray(back).reshape(layer.shape))


def _rows(flat: np.ndarray, shape: Sequence[int], m: int) -> np.ndarray:
    """[groups, m]: the groups of an N:M pattern as rows, in the order of their labels."""
    outputs, inputs, positions = sides(shape)
    if inputs % m:
        raise ValueError(f"{inputs} inputs do not divide by {m}")
    return flat.reshape(outputs, inputs // m, m, positions).transpose(0, 1, 3, 2).reshape(-1, m)
