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
from utils.pruning.counts import Counts
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

    @property
    def reads_data(self) -> bool:
        """Whether the criterion scores on training batches, which `prune` and `score` then need."""
        return bool(self._criterion.traits["reads"] == "train")

    def check(self, masks: Masks, densities: Sequence[float], iterative: bool) -> None:
        """Raise the UserError that pruning `masks` to `densities` would raise, without scoring anything.

        iterative: each density is pruned from the masks of the one before; else each from `masks`. Exact: what passes
        is pruned without complaint (NaN scores apart) and what works passes. Layer densities that fix no layer are
        refused even when there is no density to prune to.
        """
        start = counts = self._counts(masks)
        for density in densities:
            after = counts.pruned(density)
            counts = after if iterative else start

    def prune(self, model: nn.Module, masks: Masks | None, density: float, batches: Batches = ()) -> Pruned:
        """Masks with exactly floor(density * total + 0.5) weights, all of them live in `masks` (None: all live).

        The model is left bitwise as it was: nothing is set to zero here. When `masks` already hold that many weights
        they are returned as they are. Raises UserError for a density that cannot be reached and for NaN scores.
        """
        masks = Masks.dense(model, self.pruning.exclude) if masks is None else masks.check(model)
        counts = self._counts(masks)
        if counts.pruned(density) is not counts:
            masks = self.select(self.score(model, masks, batches), masks, density)
        return Pruned(masks, (Round(density, masks.density),))

    def score(self, model: nn.Module, masks: Masks, batches: Batches = ()) -> Scores:
        """The criterion's scores, checked: one tensor per entry of `masks`, of its shape, without NaN."""
        name, traits = self._criterion.name, self._criterion.traits
        batches = list(batches) if self.reads_data else ()
        if self.reads_data and not batches:
            raise UserError(f"pruning.criterion={name} reads training batches and was given none")
        generator = torch.Generator().manual_seed(derive("criterion", self.seed))
        model = bare(model)
        with preserved(model, traits["batchnorm"]):
            scores = self._criterion.value(model, masks, batches, self.loss, generator=generator)
        _check_scores(name, scores, masks)
        return scores

    def select(self, scores: Scores, masks: Masks, density: float) -> Masks:
        """Masks of `density` from scores taken before; any number of densities can share one scoring."""
        counts = self._counts(masks)
        if counts.pruned(density) is counts:
            return masks
        keep = kept_count(density, masks.total)
        layers = layers_of(scores, masks, self.seed)
        pools = self._pools(layers, keep, counts.goals)
        if not covers(pools, layers) or sum(pool.keep for pool in pools) != keep:
            raise RuntimeError(f"allocation {self.pruning.allocation!r} does not hand out exactly {keep} live weights")
        chosen: dict[str, torch.Tensor] = {}
        for pool in pools:
            chosen.update(top(pool))
        found = Masks({name: chosen[name] for name in masks})
        if found.kept != keep:
            raise RuntimeError(f"{found.kept} weights are kept instead of {keep}")
        return found

    def _counts(self, masks: Masks) -> Counts:
        return Counts.of(masks, self.pruning.layer_densities)

    def _pools(self, layers: Sequence[Layer], keep: int, goals: Mapping[str, int]) -> list[Pool]:
        """The fixed layers' own pools, then the allocation's for the others with what is left."""
        pools = [Pool((layer,), goals[layer.name]) for layer in layers if layer.name in goals]
        free = [layer for layer in layers if layer.name not in goals]
        return pools + list(self._allocate(free, keep - sum(pool.keep for pool in pools)))


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of `model` on a batch of (images, labels)."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


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
