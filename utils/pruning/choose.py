"""From scores to masks: fixed layers, floors, allocation and pattern, with the exact count.

Fixed layers come first: `pruning.first_layer` and `pruning.last_layer` set to dense keep all that lives of the first
and the last entry of the masks, then the entries of `pruning.layer_densities`. The allocation hands out the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from utils.masks import Masks
from utils.params import pattern as pattern_text
from utils.params.pruning import Pruning
from utils.pruning import fixed, patterns
from utils.pruning.allocations import allocation, fill
from utils.pruning.counts import Counts, FixedLayer, Ratio
from utils.pruning.groups import Groups, choose_groups, cost, grouped
from utils.pruning.patterns import Pattern, parse
from utils.pruning.select import Layer, Pool, covers, kept_count, layers_of, top
from utils.system.errors import UserError

Scores = Mapping[str, torch.Tensor]


def plan(section: Pruning, masks: Masks) -> Counts:
    """The counts of `masks` under `section`, from which any density can be checked without scores.

    Raises UserError for settings that cannot hold for these masks whatever the density.
    """
    pattern = parse(section.pattern)
    if pattern.kind == "nm":
        return _plan_ratio(section, pattern, masks)
    if section.allocation == "from_mask":
        _ratios(section, masks)
    layers = _fixed_layers(section, pattern, masks)
    names = {layer.name for layer in layers}
    free = [name for name in masks if name not in names]
    return Counts(
        masks.total,
        layers,
        sum(masks.counts[name] for name in free),
        floors=sum(_floor_cost(section.min_kept, pattern, masks[name], masks.counts[name]) for name in free),
        slack=_slack(pattern, *(masks[name].shape for name in free)),
    )


def choose(scores: Scores, masks: Masks, density: float, section: Pruning, seed: int) -> Masks:
    """Masks of `density` within `masks`, by `scores`; `masks` itself when there is nothing to prune.

    Single weights and N:M: exactly floor(density * total + 0.5) weights. Other patterns: the largest count that whole
    groups reach and that is not above it, as `utils.pruning.groups` says. seed: of the order of ties. Raises UserError
    for a density that cannot be reached.
    """
    counts = plan(section, masks)
    if counts.pruned(density) is counts:
        return masks
    keep, pattern = kept_count(density, masks.total), parse(section.pattern)
    layers = _layers(scores, masks, section, counts, seed)
    if pattern.kind == "nm":
        chosen = {layer.name: patterns.n_of_m(layer, pattern.first, pattern.second) for layer in layers}
    elif pattern.grouped:
        chosen = _whole_groups(layers, pattern, section, keep, counts.goals)
    else:
        chosen = {}
        for pool in _pools(section.allocation, layers, keep, counts.goals):
            chosen.update(top(pool))
    found = Masks({name: chosen[name] for name in masks})
    if found.kept > keep or (found.kept < keep and not pattern.grouped):
        raise RuntimeError(f"{found.kept} weights are kept instead of {keep}")
    return found


def layer_counts(masks: Masks, density: float, section: Pruning, seed: int) -> dict[str, int]:
    """The weights each layer keeps at `density` when no scores are there to compete: what layer graphs aim at.

    Layer-wise allocations as they are; a pool of several layers gives each the same density, as far as floors and live
    weights allow. Raises UserError for a density that cannot be reached and for patterns, which graphs replace.
    """
    if section.pattern != "weight":
        raise UserError(f"{pattern_text.KEY}={section.pattern}: layer graphs have their own pattern; set it to weight")
    counts = plan(section, masks)
    if counts.pruned(density) is counts:
        return dict(masks.counts)
    none = {name: torch.zeros(()).expand(mask.shape) for name, mask in masks.items()}
    layers = _layers(none, masks, section, counts, seed)
    found: dict[str, int] = {}
    for pool in _pools(section.allocation, layers, kept_count(density, masks.total), counts.goals):
        caps, floors = [layer.alive for layer in pool.layers], [layer.floor for layer in pool.layers]
        shared = fill(pool.keep, [layer.size for layer in pool.layers], caps, floors)
        found.update(zip((layer.name for layer in pool.layers), shared, strict=True))
    return {name: found[name] for name in masks}


def _plan_ratio(section: Pruning, pattern: Pattern, masks: Masks) -> Counts:
    other = {
        f"pruning.allocation={section.allocation}": section.allocation != "global",
        "pruning.layer_densities": bool(section.layer_densities),
        f"pruning.min_kept={section.min_kept}": section.min_kept > 0,
        f"pruning.first_layer={section.first_layer}": section.first_layer == "dense",
        f"pruning.last_layer={section.last_layer}": section.last_layer == "dense",
    }
    for key, given in other.items():
        if given:
            raise UserError(f"{key}: has no place with pruning.pattern={pattern}, which fixes every layer; drop it")
    left = patterns.outside(section.pattern, {name: tuple(mask.shape) for name, mask in masks.items()})
    if left:
        raise UserError(
            f"{pattern_text.KEY}={pattern}: the inputs of {left[0]!r} do not divide by {pattern.second}; "
            "add it to pruning.exclude"
        )
    ratio = Ratio(pattern.first, pattern.second, patterns.starved(pattern, masks))
    return Counts(masks.total, (), masks.kept, ratio=ratio)


def _fixed_layers(section: Pruning, pattern: Pattern, masks: Masks) -> tuple[FixedLayer, ...]:
    """Dense layers, then those of `pruning.layer_densities`, which must match others."""
    names = list(masks)
    dense: dict[str, str] = {}
    if names and section.first_layer == "dense":
        dense[names[0]] = "pruning.first_layer"
    if names and section.last_layer == "dense":
        dense.setdefault(names[-1], "pruning.last_layer")
    found = [FixedLayer(name, None, masks[name].numel(), masks.counts[name], key) for name, key in dense.items()]
    targets = fixed.assign(section.layer_densities, names, taken=dense) if masks.total else {}
    for name, density in targets.items():
        slack = _slack(pattern, masks[name].shape)
        found.append(FixedLayer(name, density, masks[name].numel(), masks.counts[name], slack=slack))
    return tuple(found)


def _slack(pattern: Pattern, *shapes: Sequence[int]) -> int:
    """By how much whole groups of layers of `shapes` may miss a count: one weight less than the largest group."""
    return max((patterns.largest(pattern, shape) for shape in shapes), default=1) - 1 if pattern.grouped else 0


def _floor_cost(min_kept: int, pattern: Pattern, mask: torch.Tensor, alive: int) -> int:
    floor = min(min_kept, alive)
    if not floor or not pattern.grouped:
        return floor
    group = patterns.labels(pattern, mask.shape)
    return cost(floor, np.bincount(group[mask.numpy().reshape(-1)]))


def _layers(scores: Scores, masks: Masks, section: Pruning, counts: Counts, seed: int) -> list[Layer]:
    """Layers with their floors (none for fixed layers) and, for allocation from_mask, the file's counts."""
    ratios = _ratios(section, masks) if section.allocation == "from_mask" else {}
    goals = counts.goals
    return [
        replace(
            layer,
            floor=0 if layer.name in goals else min(section.min_kept, masks.counts[layer.name]),
            ratio=ratios.get(layer.name, 0),
        )
        for layer in layers_of(scores, masks, seed)
    ]


def _pools(kind: str, layers: Sequence[Layer], keep: int, goals: Mapping[str, int]) -> list[Pool]:
    """The fixed layers' own pools, then the allocation's for the others with what is left."""
    pools = [Pool((layer,), goals[layer.name]) for layer in layers if layer.name in goals]
    free = [layer for layer in layers if layer.name not in goals]
    pools += allocation[kind](free, keep - sum(pool.keep for pool in pools))
    if not covers(pools, layers) or sum(pool.keep for pool in pools) != keep:
        raise RuntimeError(f"allocation {kind!r} does not hand out exactly {keep} live weights")
    return pools


def _whole_groups(
    layers: Sequence[Layer], pattern: Pattern, section: Pruning, keep: int, goals: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Masks of whole groups: fixed layers first, then the others with what those really left."""
    groups = [grouped(layer, pattern, section.group_score) for layer in layers]
    chosen: dict[str, np.ndarray] = {}
    for layer in groups:
        if layer.name in goals:
            chosen.update(choose_groups([Pool((layer,), min(goals[layer.name], layer.alive))]))
    left = keep - sum(_held(layer, chosen) for layer in groups if layer.name in goals)
    free = [layer for layer in groups if layer.name not in goals]
    left = min(left, sum(layer.alive for layer in free))
    chosen.update(choose_groups(_pools(section.allocation, free, left, {})))
    return {layer.name: _weights(layer, pattern, whole.live, chosen[layer.name])
            for layer, whole in zip(groups, layers, strict=True)}  # fmt: skip


def _held(layer: Groups, chosen: Mapping[str, np.ndarray]) -> int:
    return int(layer.sizes[chosen[layer.name]].sum())


def _weights(layer: Groups, pattern: Pattern, live: np.ndarray, chosen: np.ndarray) -> torch.Tensor:
    """The live weights of the chosen groups, in the parameter's shape."""
    mask = np.logical_and(chosen[patterns.labels(pattern, layer.shape)], live)
    return torch.from_numpy(mask.reshape(layer.shape))


def _ratios(section: Pruning, masks: Masks) -> dict[str, int]:
    """Kept weights per layer in the file of `pruning.from_mask`. Raises UserError unless it has these layers."""
    if section.from_mask is None:
        raise UserError("pruning.from_mask: not set, and pruning.allocation=from_mask needs it; name a mask file")
    path = Path(section.from_mask)
    try:
        state = path.stat()
    except OSError:
        raise UserError(f"pruning.from_mask: no file {str(path)!r}") from None
    kept, shapes = _read(path, state.st_mtime_ns, state.st_size)
    # The file may hold the one layer that pattern channel leaves out of these masks.
    more = [name for name in shapes if name not in masks]
    whole = more if section.pattern.strip() == "channel" and len(more) == 1 else []
    for name in dict.fromkeys((*masks, *shapes)):
        mine, theirs = tuple(masks[name].shape) if name in masks else None, shapes.get(name)
        if mine != theirs and not (mine is None and name in whole):
            raise UserError(
                f"pruning.from_mask: {str(path)!r} has {_told(theirs)} for {name!r} where the model's masks have "
                f"{_told(mine)}; use a mask of this model made with the same pruning.exclude"
            )
    if not any(kept[name] for name in masks):
        raise UserError(f"pruning.from_mask: {str(path)!r} keeps no weight, so it has no ratios to copy")
    return kept


@functools.lru_cache(maxsize=2)
def _read(path: Path, _changed: int, _size: int) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Counts and shapes of a mask file, read once as long as it does not change."""
    masks = Masks.load(path)
    return dict(masks.counts), {name: tuple(mask.shape) for name, mask in masks.items()}


def _told(shape: tuple[int, ...] | None) -> str:
    return "no mask" if shape is None else f"shape {'x'.join(map(str, shape)) or 'scalar'}"
