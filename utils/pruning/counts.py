"""Which densities can be reached, told from counts alone: all that can be refused before anything is scored.

Fixed layers leave a pruning with exactly their counts and the others together with exactly the rest, so the counts of
a whole plan are known in advance, whatever the scores and the allocation. Patterns of whole groups may reach fewer
weights than asked, which depends on the scores. So counts taken from such masks forgive a request that is out of reach
by less than one group (`slack`), and counts after a pruning are upper bounds: whatever falling densities pass here can
be pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from utils.params import pattern
from utils.pruning import fixed
from utils.pruning.select import kept_count
from utils.system.errors import UserError

FLOORS = "pruning.min_kept"


@dataclass(frozen=True)
class FixedLayer:
    """A layer whose count is fixed; `alive` of its `size` weights live.

    density: what `pruning.layer_densities` says; None for a dense layer, which keeps all that lives. key: the parameter
    that fixes it; slack: weights by which the pattern may have missed the goal.
    """

    name: str
    density: float | None
    size: int
    alive: int
    key: str = fixed.KEY
    slack: int = 0

    @property
    def goal(self) -> int:
        """The weights it keeps once pruned."""
        return self.alive if self.density is None else kept_count(self.density, self.size)


@dataclass(frozen=True)
class Ratio:
    """What an N:M pattern asks of masks; starved: the first layer with a group of fewer than N live weights."""

    n: int
    m: int
    starved: str | None = None

    def check(self, keep: int, total: int) -> None:
        """Raise UserError unless `keep` is N of every M of `total` weights and every group has N to keep."""
        text, share = f"{pattern.KEY}={self.n}:{self.m}", self.n / self.m
        if keep != total * Fraction(self.n, self.m):
            raise UserError(f"{text} keeps {share!r} of the weights; set pruning.density={share!r}")
        if self.starved is not None:
            raise UserError(
                f"{text}: {self.starved!r} has a group with fewer than {self.n} live weights; start from other masks "
                "or take a pattern that keeps fewer"
            )


@dataclass(frozen=True)
class Counts:
    """Masks as counts: `total` prunable weights, the fixed layers, and the live weights of all others together.

    floors: weights the other layers keep at least, together. slack: the weights by which whole groups may have missed
    what was asked of the other layers. ratio: set for N:M patterns.
    """

    total: int
    fixed: tuple[FixedLayer, ...]
    free: int
    floors: int = 0
    slack: int = 0
    ratio: Ratio | None = None

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
        if keep > kept + self.slack + sum(layer.slack for layer in self.fixed) or keep == self.total > kept:
            raise UserError(
                f"density {density!r} asks for {keep} weights but only {kept} of {self.total} survive; "
                f"the largest feasible density is {kept / self.total!r}"
            )
        # A density of 1 prunes nothing, so the dense level of a run stays dense in the fixed layers too.
        if keep == self.total:
            return self
        if self.ratio is not None:
            self.ratio.check(keep, self.total)
        if keep >= kept and all(0 <= layer.goal - layer.alive <= layer.slack for layer in self.fixed):
            return self
        for layer in self.fixed:
            _check_alive(layer)
        self._check_room(density, keep, taken)
        after = tuple(replace(layer, alive=layer.goal, slack=0) for layer in self.fixed)
        return replace(self, fixed=after, free=keep - taken, slack=0)

    def _asked(self, density: float) -> int:
        if not 0.0 <= density <= 1.0:
            raise UserError(f"pruning.density={density!r} is not between 0 and 1")
        if not self.total:
            raise UserError("the model has no prunable parameter left; check pruning.exclude and pruning.pattern")
        return kept_count(density, self.total)

    def _check_room(self, density: float, keep: int, taken: int) -> None:
        """Raise UserError unless the layers that are not fixed can hold what the fixed ones (`taken`) leave them."""
        keys = ", ".join(dict.fromkeys(layer.key for layer in self.fixed)) or fixed.KEY
        if taken > keep:
            raise UserError(
                f"{keys}: the fixed layers alone keep {taken} weights, more than the {keep} of density "
                f"{density!r}; the smallest feasible density is {taken / self.total!r}"
            )
        if taken + self.floors > keep:
            others = f" beside the {taken} of the fixed ones" if taken else ""
            raise UserError(
                f"{FLOORS}: the layers keep at least {self.floors} weights{others}, more than the {keep} of density "
                f"{density!r}; the smallest feasible density is {(taken + self.floors) / self.total!r}"
            )
        if keep - taken > self.free + self.slack:
            raise UserError(
                f"{keys}: the other layers have {self.free} live weights for the {keep - taken} that density "
                f"{density!r} leaves to them; the largest feasible density is {(taken + self.free) / self.total!r}"
            )


def _check_alive(layer: FixedLayer) -> None:
    if layer.goal > layer.alive + layer.slack:
        raise UserError(
            f"{fixed.KEY}: {layer.name!r} is fixed at {layer.density!r} but only {layer.alive} of its {layer.size} "
            f"weights survive; the largest feasible density is {layer.alive / layer.size!r}"
        )
