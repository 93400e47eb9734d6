"""Gradual magnitude pruning, or gradual pruning by any criterion."""

from __future__ import annotations

from utils.masks import Masks
from utils.pruning.dynamic import dynamic
from utils.pruning.dynamic._base import MaskUpdates, Setting
from utils.pruning.select import kept_count
from utils.system.errors import UserError


@dynamic("gmp")
class GradualPruning(MaskUpdates):
    """Gradual pruning to pruning.density along a cubic schedule (Zhu and Gupta 2017, equation 1).

    Sparsity at step t: s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3, with t0 = dynamic.start and t1 the last update
    step, so that the last update reaches the target exactly; s_i is that of dynamic.initial_density. Weights never
    return. Which weights go is said by `prune`, given at building.
    """

    def __init__(self, setting: Setting) -> None:
        """Raises UserError when there is no target or training starts below it."""
        super().__init__(setting)
        if setting.density is None:
            raise UserError("dynamic.method=gmp needs pruning.density, the density it ends at")
        if setting.prune is None or self.steps.last is None:
            raise ValueError("gradual pruning needs a function that prunes, and an update step")
        self.target, self.prune, self.final_step = setting.density, setting.prune, self.steps.last
        masks = self.sparsity.masks
        for what, density in (
            ("dynamic.initial_density", self.section.initial_density),
            ("the density of the first masks", masks.density),
        ):
            if kept_count(density, masks.total) < kept_count(self.target, masks.total):
                raise UserError(f"pruning.density={self.target!r} is above {what}, {density!r}; lower pruning.density")

    def density_at(self, step: int) -> float:
        """The density after the update of `step`: the schedule above with densities for sparsities, an identity."""
        if step >= self.final_step:
            return self.target
        left = 1 - (step - self.steps.start) / (self.final_step - self.steps.start)
        return self.target + (self.section.initial_density - self.target) * left**3

    def next_masks(self, step: int, masks: Masks) -> Masks:
        """The masks of the step's density; the current ones where those hold no more than that."""
        density = self.density_at(step)
        if kept_count(density, masks.total) >= masks.kept:
            return masks
        pruned = self.prune(density, masks)
        if not pruned <= masks:
            raise RuntimeError(f"the pruning at step {step} brought weights back")
        return pruned
