"""A pruning in the middle of training: at a given step, or early, once a trigger says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils.masks import Masks
from utils.pruning.triggers import Trigger
from utils.sparsity import Sparsity
from utils.system.errors import UserError
from utils.training.batchnorm import average_statistics
from utils.training.extension import Extension
from utils.training.masking import change_masks

_TRIGGER = "trigger."
_PENDING = -1


class MidRunPruning(Extension):
    """Prunes once. Training goes on from the weights, the optimizer state and the BatchNorm statistics of that moment.

    It happens when `at` optimizer steps are done: within an epoch right before the next step, at the end of an epoch
    after its last one, before the evaluation. With a trigger it happens at the end of the first epoch after which the
    trigger fires, and `at` is the latest step (None: never without the trigger).

    pruned_at_step: the number of optimizer steps done before the pruning; None as long as it is to come.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        extensions: Sequence[Extension],
        prune: Callable[[], Masks],
        *,
        steps_per_epoch: int,
        at: int | None = None,
        trigger: Trigger | None = None,
        on_pruned: Callable[[int], None] = lambda step: None,
    ) -> None:
        """prune: scores the model as it is and returns the new masks, equal on all ranks. on_pruned: told the step.

        extensions: the list the trainer gets, which this one is to be appended to; all of them hear of new masks.
        """
        if at is None and trigger is None:
            raise ValueError("neither a step nor a trigger: this would never prune")
        self.model, self.sparsity, self.extensions = model, sparsity, extensions
        self.prune, self.on_pruned = prune, on_pruned
        self.steps_per_epoch, self.at, self.trigger = steps_per_epoch, at, trigger
        self.pruned_at_step: int | None = None

    def before_step(self, step: int) -> None:
        """Prune here where the moment lies within an epoch or at the start of training."""
        if self._due(step):
            self._prune(step)

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """Look at the trigger and prune here if it is time. Columns: `density`, and the trigger's `distance`.

        The distance is taken before the pruning, and goes on being logged after it.
        """
        step = (epoch + 1) * self.steps_per_epoch
        columns: dict[str, float | None] = {}
        fired = False
        if self.trigger is not None:
            reading = self.trigger.observe(self.model)
            columns["distance"] = reading.value
            fired = reading.fired and self.pruned_at_step is None
        if fired or self._due(step):
            self._prune(step)
        return {"density": self.sparsity.masks.density, **columns}

    def state(self) -> dict[str, Tensor]:
        """`pruned_at_step` (-1: not yet) and the trigger's state as `trigger.<name>`."""
        done = _PENDING if self.pruned_at_step is None else self.pruned_at_step
        watched = self.trigger.state() if self.trigger is not None else {}
        return {"pruned_at_step": torch.tensor(done), **{_TRIGGER + name: t for name, t in watched.items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned; `on_pruned` is told of a pruning that has happened."""
        watched = {name.removeprefix(_TRIGGER): t for name, t in state.items() if name.startswith(_TRIGGER)}
        if "pruned_at_step" not in state or bool(watched) != (self.trigger is not None):
            raise UserError("the checkpoint is of another pruning.moment; remove it or set the moment it had")
        done = int(state["pruned_at_step"])
        self.pruned_at_step = None if done == _PENDING else done
        if self.trigger is not None:
            self.trigger.load_state(watched)
        if self.pruned_at_step is not None:
            self.on_pruned(self.pruned_at_step)

    def _due(self, step: int) -> bool:
        return self.pruned_at_step is None and self.at is not None and step >= self.at

    def _prune(self, step: int) -> None:
        # Within an epoch every rank has BatchNorm statistics of its own, and scores must not depend on the rank.
        average_statistics(self.model)
        self.sparsity.dense_gradients(True)  # a criterion may score pruned places
        try:
            masks = self.prune()
        finally:
            self.sparsity.dense_gradients(False)
        change_masks(self.sparsity, masks, self.extensions, f"masks of the pruning at step {step}")
        self.pruned_at_step = step
        self.on_pruned(step)
