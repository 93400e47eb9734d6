"""Which densities can be reached, told from counts alone: all that can be refused before anything is scored.

Fixed layers leave a pruning with exactly their counts and the others together with exactly the rest, so the counts of
a whole plan are known in advance, whatever the scores and the allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from utils.masks import Masks
from utils.pruning import fixed
from utils.pruning.select import kept_count
from utils.system.errors import UserError


@dataclass(frozen=True)
class FixedLayer:
    """A layer whose density `pruning.layer_densities` fixes; `alive` of its `size` weights live."""

    name: str
    density: float
    size: int
    alive: int

    @property
    def goal(self) -> int:
        """The weights it keeps once pruned."""
        return kept_count(self.density, self.size)


@dataclass(frozen=True)
class Counts:
    """Masks as counts: `total` prunable weights, the fixed layers, and the live weights of all others together."""

    total: int
    fixed: tuple[FixedLayer, ...]
    free: int

    @staticmethod
    def of(masks: Masks, entries: Sequence[str]) -> Counts:
        """The counts of `masks` when `entries` fix layers. Raises UserError for entries that fix none."""
        targets = fixed.assign(entries, list(masks)) if masks.total else {}
        layers = tuple(FixedLayer(name, d, masks[name].numel(), masks.counts[name]) for name, d in targets.items())
        return Counts(masks.total, layers, masks.kept - sum(layer.alive for layer in layers))

    @property
    def goals(self) -> dict[str, int]:
        """The weights each fixed layer keeps, by name."""
        return {layer.name: layer.goal for layer in self.fixed}

    def pruned(self, density: float) -> Counts:
        """The counts after a pruning to `density`; this very object when there is nothing to prune.

        Raises UserError when `density` cannot be reached.
        """
        keep, taken = self._asked(density), sum(layer.goal for layer in self.fixed)
        kept = self.free + sum(layer.alive for layer in self.fixed)
        if keep > kept:
            raise UserError(
                f"density {density!r} asks for {keep} weights but only {kept} of {self.total} survive; "
                f"the largest feasible density is {kept / self.total!r}"
            )
        at_goal = all(layer.alive == layer.goal for layer in self.fixed)
        # A density of 1 prunes nothing, so the dense level of a run stays dense in the fixed layers too.
        if keep == self.total or (keep == kept and at_goal):
            return self
        for layer in self.fixed:
            _check_alive(layer)
        self._check_room(density, keep, taken)
        return replace(self, fixed=tuple(replace(layer, alive=layer.goal) for layer in self.fixed), free=keep - taken)

    def _asked(self, density: float) -> int:
        if not 0.0 <= density <= 1.0:
            raise UserError(f"pruning.density={density!r} is not between 0 and 1")
        if not self.total:
            raise UserError("the model has no prunable parameter left; check pruning.exclude")
        return kept_count(density, self.total)

    def _check_room(self, density: float, keep: int, taken: int) -> None:
        """Raise UserError unless the layers that are not fixed can hold what the fixed ones (`taken`) leave them."""
        if taken > keep:
            raise UserError(
                f"{fixed.KEY}: the fixed layers alone keep {taken} weights, more than the {keep} of density "
                f"{density!r}; the smallest feasible density is {taken / self.total!r}"
            )
        if keep - taken > self.free:
            raise UserError(
                f"{fixed.KEY}: the other layers have {self.free} live weights for the {keep - taken} that density "
                f"{density!r} leaves to them; the largest feasible density is {(taken + self.free) / self.total!r}"
            )


def _check_alive(layer: FixedLayer) -> None:
    if layer.goal > layer.alive:
        raise UserError(
            f"{fixed.KEY}: {layer.name!r} is fixed at {layer.density!r} but only {layer.alive} of its {layer.size} "
            f"weights survive; the largest feasible density is {layer.alive / layer.size!r}"
        )
