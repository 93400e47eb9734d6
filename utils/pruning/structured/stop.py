"""Ends a level once its network is ready to be pruned (EarlyCroP, Early-Bird): the next level prunes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.pruning.triggers import Trigger
from utils.system.errors import UserError
from utils.training.extension import Extension
from utils.training.trainer import Stage


class StopAtTrigger(Extension):
    """Shortens `stage` to the first epoch after which the trigger fires, or that reaches the step `latest`."""

    def __init__(
        self, model: nn.Module, stage: Stage, trigger: Trigger, steps_per_epoch: int, latest: int | None = None
    ) -> None:
        """latest: optimizer steps after which the level ends whatever the trigger says (None: its own length)."""
        self.model, self.stage, self.trigger = model, stage, trigger
        self.steps_per_epoch, self.latest = steps_per_epoch, latest
        self.ended: int | None = None

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """Look at the trigger. Column: its `distance`."""
        reading = self.trigger.observe(self.model)
        late = self.latest is not None and (epoch + 1) * self.steps_per_epoch >= self.latest
        if reading.fired or late:
            self.ended = self.stage.epochs = epoch + 1
        return {"distance": reading.value}

    def state(self) -> dict[str, Tensor]:
        """The trigger's as `trigger.<name>`, and the epoch it `ended` the level after (-1: not yet)."""
        ended = torch.tensor(-1 if self.ended is None else self.ended)
        return {"ended": ended, **{f"trigger.{name}": value for name, value in self.trigger.state().items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned. Raises UserError when it is another extension's."""
        if "ended" not in state:
            raise UserError("the checkpoint is of another pruning.moment; remove it or set the moment it had")
        watched = {name.removeprefix("trigger."): t for name, t in state.items() if name.startswith("trigger.")}
        self.trigger.load_state(watched)
        if (ended := int(state["ended"])) >= 0:
            self.ended = self.stage.epochs = ended
