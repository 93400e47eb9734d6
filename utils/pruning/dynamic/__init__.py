"""Masks that change while a network trains: gradual pruning and drop-and-grow methods.

A method is a class of extension. At its update steps, a pure function of the step (see `UpdateSteps`), it makes new
masks of the current ones, and this update takes the place of the optimizer's step. After the last one the masks stay.

A new method is one decorated class in a file of this package:

    @dynamic("set")
    class Set(DropAndGrow):
        def growth_scores(self, name, weight, step): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from utils.masks import Masks
from utils.params.dynamic import Dynamic
from utils.pruning.dynamic._base import MaskUpdates, Setting, UpdateSteps
from utils.sparsity import Sparsity
from utils.system.errors import UserError
from utils.system.registry import Registry
from utils.training.extension import Extension

__all__ = ["MaskUpdates", "Setting", "UpdateSteps", "build", "dynamic"]

dynamic: Registry[type[MaskUpdates]] = Registry("dynamic")


def build(
    section: Dynamic,
    *,
    total_steps: int,
    steps_per_epoch: int,
    model: nn.Module,
    sparsity: Sparsity,
    extensions: Sequence[Extension],
    seed: int,
    level: int = 0,
    density: float | None = None,
    prune: Callable[[float, Masks], Masks] | None = None,
) -> MaskUpdates:
    """The extension of `section.method` for one level's training of `total_steps`.

    extensions: the list the trainer gets, which the result is to be appended to; all of them hear of new masks.
    sparsity: holds the masks training starts from. seed, level: of ties and random growth, equal on all ranks.
    density, prune: the target of a gradual pruning, and (density, masks) -> the masks of exactly that density within
    the ones given, equal on all ranks. Drop-and-grow methods need neither.
    Raises UserError when the section allows no update at all or contradicts the density.
    """
    if section.method is None:
        raise ValueError("dynamic.method is none: there is nothing to build")
    method = dynamic[section.method]
    steps = UpdateSteps.of(section, total_steps, steps_per_epoch)
    if steps.last is None:
        raise UserError(
            f"dynamic.every={section.every}: no update step from dynamic.start={section.start} to {section.until:g} of "
            f"{total_steps} training steps; lower dynamic.every or train longer"
        )
    return method(Setting(section, steps, model, sparsity, extensions, seed, level, density, prune))
