"""What all methods that change masks during training share: when they act, and how new masks take effect."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from utils.masks import Masks, bare
from utils.params.dynamic import Dynamic
from utils.sparsity import Sparsity
from utils.system.errors import UserError
from utils.training.extension import Extension
from utils.training.masking import change_masks


@dataclass(frozen=True)
class UpdateSteps:
    """The steps at which masks change: `start`, `start + every`, ... below `end`, without step 0.

    end: floor(until * total steps), `until` taken as the decimal number that was written.
    """

    start: int
    every: int
    end: int

    @staticmethod
    def of(section: Dynamic, total_steps: int, steps_per_epoch: int) -> UpdateSteps:
        """The update steps of a training of `total_steps`."""
        end = math.floor(Fraction(repr(section.until)) * total_steps)
        return UpdateSteps(section.start.at(steps_per_epoch), section.every, end)

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and max(self.start, 1) <= step < self.end and not (step - self.start) % self.every

    @property
    def last(self) -> int | None:
        """The last update step; None when there is none."""
        step = self.start + (self.end - 1 - self.start) // self.every * self.every
        return step if step in self else None


@dataclass(frozen=True)
class Setting:
    """What a method is built from; see `build` for the meaning of each."""

    section: Dynamic
    steps: UpdateSteps
    model: nn.Module
    sparsity: Sparsity
    extensions: Sequence[Extension]
    seed: int
    level: int = 0
    density: float | None = None
    prune: Callable[[float, Masks], Masks] | None = None


class MaskUpdates(Extension, ABC):
    """Changes the masks at its update steps, in place of the optimizer's step. A method overrides `next_masks`."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.section, self.steps, self.sparsity = setting.section, setting.steps, setting.sparsity
        named = dict(bare(setting.model).named_parameters())
        self.weights: dict[str, nn.Parameter] = {name: named[name] for name in setting.sparsity.masks}
        self._updates, self._regrown = 0, 0

    @abstractmethod
    def next_masks(self, step: int, masks: Masks) -> Masks:
        """The masks after the update of `step`, of the current ones; the same on all ranks.

        Called with autograd on, for a pruning may differentiate.
        """

    def needs_dense_grad(self, step: int) -> bool:
        """True at update steps."""
        return step in self.steps

    def replaces_step(self, step: int) -> bool:
        """True at update steps."""
        return step in self.steps

    def update(self, step: int) -> None:
        """Change the masks."""
        masks = self.sparsity.masks
        changed = self.next_masks(step, masks)
        change_masks(self.sparsity, changed, self.setting.extensions, f"masks of the update at step {step}")
        self._updates += 1
        self._regrown += sum(int((changed[name] & ~mask).sum()) for name, mask in masks.items())

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """`density` now; `mask_updates` and `regrown` weights (pruned before, alive after an update) of the epoch."""
        columns = {"mask_updates": self._updates, "regrown": self._regrown}
        self._updates, self._regrown = 0, 0
        return {"density": self.sparsity.masks.density, **columns}

    def state(self) -> dict[str, Tensor]:
        """The counts of the epoch so far; masks are saved with the model, update steps follow from the step."""
        return {"mask_updates": torch.tensor(self._updates), "regrown": torch.tensor(self._regrown)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        if state.keys() != self.state().keys():
            raise UserError("the checkpoint is of another dynamic.method; remove it or set the method it had")
        self._updates, self._regrown = int(state["mask_updates"]), int(state["regrown"])
