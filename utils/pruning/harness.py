"""The pruning harness: score, allocate, select, check. It alone decides when a criterion runs and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from utils.data.stateless import derive
from utils.masks import Masks, bare
from utils.params.pruning import Pruning
from utils.pruning import fixed
from utils.pruning.allocations import allocation
from utils.pruning.criteria import Batches, Loss, Scores, check_traits, criterion
from utils.pruning.preserve import preserved
from utils.pruning.select import Layer, Pool, covers, kept_count, layers_of, top
from utils.system.errors import UserError


@dataclass(frozen=True)
class Round:
    """One score-and-prune step: the density asked for and the exact one reached."""

    requested: float
    reached: float


@dataclass(frozen=True)
class Pruned:
    """The masks of a pruning and what each of its rounds did (one round for one-shot methods)."""

    masks: Masks
    rounds: tuple[Round, ...]


class PruningHarness:
    """Prunes models as a `pruning` section says.

    seed: of random scores and of the order of ties; the same seed gives the same masks on every rank.
    loss: what gradient criteria differentiate, `(model, batch) -> scalar`; mean cross-entropy by default.
    Raises UserError for an unknown criterion or allocation and for malformed layer densities.
    """

    def __init__(self, pruning: Pruning, *, seed: int, loss: Loss | None = None) -> None:
        self.pruning = pruning
        self.seed = seed
        self.loss: Loss = loss or cross_entropy
        self._criterion = criterion.entry(pruning.criterion)
        check_traits(self._criterion.name, self._criterion.traits)
        self._allocate = allocation[pruning.allocation]
        fixed.parse(pruning.layer_densities)

    def prune(self, model: nn.Module, masks: Masks | None, density: float, batches: Batches = ()) -> Pruned:
        """Masks with exactly floor(density * total + 0.5) weights, all of them live in `masks` (None: all live).

        The model is left bitwise as it was: nothing is set to zero here. When `masks` already hold that many weights
        they are returned as they are. Raises UserError for a density that cannot be reached and for NaN scores.
        """
        masks = Masks.dense(model, self.pruning.exclude) if masks is None else masks.check(model)
        if not self._settled(masks, density):
            masks = self.select(self.score(model, masks, batches), masks, density)
        return Pruned(masks, (Round(density, masks.density),))

    def score(self, model: nn.Module, masks: Masks, batches: Batches = ()) -> Scores:
        """The criterion's scores, checked: one tensor per entry of `masks`, of its shape, without NaN."""
        name, traits = self._criterion.name, self._criterion.traits
        batches = list(batches) if traits["reads"] == "train" else ()
        if traits["reads"] == "train" and not batches:
            raise UserError(f"pruning.criterion={name} reads training batches and was given none")
        generator = torch.Generator().manual_seed(derive("criterion", self.seed))
        model = bare(model)
        with preserved(model, traits["batchnorm"]):
            scores = self._criterion.value(model, masks, batches, self.loss, generator=generator)
        _check_scores(name, scores, masks)
        return scores

    def select(self, scores: Scores, masks: Masks, density: float) -> Masks:
        """Masks of `density` from scores taken before; any number of densities can share one scoring."""
        if self._settled(masks, density):
            return masks
        keep = kept_count(density, masks.total)
        layers = layers_of(scores, masks, self.seed)
        pools = self._pools(layers, keep)
        if not covers(pools, layers) or sum(pool.keep for pool in pools) != keep:
            raise RuntimeError(f"allocation {self.pruning.allocation!r} does not hand out exactly {keep} live weights")
        chosen: dict[str, torch.Tensor] = {}
        for pool in pools:
            chosen.update(top(pool))
        found = Masks({name: chosen[name] for name in masks})
        if found.kept != keep:
            raise RuntimeError(f"{found.kept} weights are kept instead of {keep}")
        return found

    def _settled(self, masks: Masks, density: float) -> bool:
        """True when there is nothing to prune. Raises UserError when `density` cannot be reached."""
        if not 0.0 <= density <= 1.0:
            raise UserError(f"pruning.density={density!r} is not between 0 and 1")
        if not masks.total:
            raise UserError("the model has no prunable parameter left; check pruning.exclude")
        keep = kept_count(density, masks.total)
        if keep > masks.kept:
            raise UserError(
                f"density {density!r} asks for {keep} weights but only {masks.kept} of {masks.total} survive; "
                f"the largest feasible density is {masks.density!r}"
            )
        targets = fixed.assign(self.pruning.layer_densities, list(masks))
        at_target = all(masks.counts[n] == kept_count(d, masks[n].numel()) for n, d in targets.items())
        # A density of 1 prunes nothing, so the dense level of a run stays dense in the fixed layers too.
        return keep == masks.total or (keep == masks.kept and at_target)

    def _pools(self, layers: Sequence[Layer], keep: int) -> list[Pool]:
        """The fixed layers' own pools, then the allocation's for the others with what is left."""
        targets = fixed.assign(self.pruning.layer_densities, [layer.name for layer in layers])
        pools = [_fixed_pool(layer, targets[layer.name]) for layer in layers if layer.name in targets]
        free = [layer for layer in layers if layer.name not in targets]
        taken = sum(pool.keep for pool in pools)
        _check_room(keep, taken, sum(layer.alive for layer in free), sum(layer.size for layer in layers))
        return pools + list(self._allocate(free, keep - taken))


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of `model` on a batch of (images, labels)."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def _fixed_pool(layer: Layer, density: float) -> Pool:
    keep = kept_count(density, layer.size)
    if keep > layer.alive:
        raise UserError(
            f"{fixed.KEY}: {layer.name!r} is fixed at {density!r} but only {layer.alive} of its {layer.size} weights "
            f"survive; the largest feasible density is {layer.alive / layer.size!r}"
        )
    return Pool((layer,), keep)


def _check_room(keep: int, taken: int, room: int, total: int) -> None:
    """Raise UserError unless layers with `room` live weights can hold what the fixed ones (`taken`) leave of `keep`."""
    if taken > keep:
        raise UserError(
            f"{fixed.KEY}: the fixed layers alone keep {taken} weights, more than the {keep} asked for; "
            f"the smallest feasible density is {taken / total!r}"
        )
    if keep - taken > room:
        raise UserError(
            f"{fixed.KEY}: the other layers have {room} live weights for the {keep - taken} left to them; "
            f"the largest feasible density is {(taken + room) / total!r}"
        )


def _check_scores(name: str, scores: Mapping[str, torch.Tensor], masks: Masks) -> None:
    if odd := sorted(scores.keys() ^ masks.keys()):
        raise RuntimeError(f"criterion {name!r} must score the entries of the masks; first difference: {odd[0]!r}")
    for key, mask in masks.items():
        score = scores[key]
        if score.shape != mask.shape or not score.dtype.is_floating_point:
            raise RuntimeError(f"criterion {name!r} gave {key!r} scores of shape {tuple(score.shape)}, {score.dtype}")
        if score.numel() and bool(torch.isnan(score.detach().min())):
            raise UserError(
                f"pruning.criterion={name}: NaN among the scores of {key!r}; its weights or gradients are not finite"
            )
