"""Triggers: what says, after an epoch, that a network in training is ready to be pruned.

A trigger is built once, from the model as training starts, and looks at it after every epoch:

    ready = build(section, model=model, density=0.1)
    reading = ready.observe(model)          # fired, and the distance it looked at

A new trigger is one decorated class in a file of this package, `@trigger("name")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from utils.params.early import Early
from utils.system.registry import Registry

__all__ = ["Reading", "Trigger", "build", "trigger"]


@dataclass(frozen=True)
class Reading:
    """One look: whether the network is ready, and the trigger's distance (None before there is one)."""

    fired: bool
    value: float | None


class Trigger(ABC):
    """Base class. The epochs finished, t, are the calls of `observe` so far, the current one included."""

    def __init__(self, model: nn.Module, density: float, threshold: float | None, window: int) -> None:
        """model: with the weights training starts from. density: the share of weights the pruning is to keep.

        threshold: fire below it (None: the method's own). window: comparisons that count, where a method has several.
        Raises UserError for a model the method cannot watch.
        """
        self.density, self.threshold, self.window = density, threshold, window

    @abstractmethod
    def observe(self, model: nn.Module) -> Reading:
        """Look at the model after an epoch; the reading is equal on all ranks. Call it on all of them."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: CPU tensors by name, contiguous, sharing no memory with the live ones."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned. Raises UserError when it is another model's or another trigger's."""


trigger: Registry[type[Trigger]] = Registry("trigger")


def build(section: Early, *, model: nn.Module, density: float) -> Trigger:
    """The trigger of `section` for a pruning to `density`; see `Trigger` for `model` and what is raised."""
    return trigger[section.trigger](model, density, section.threshold, section.window)
