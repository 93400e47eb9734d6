"""Ends a level once its network is ready to be pruned (EarlyCroP, Early-Bird): the next level prunes it."""

from __future__ import annotations

from torch import Tensor, nn

from utils.pruning.triggers import Trigger
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

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """Look at the trigger. Column: its `distance`."""
        reading = self.trigger.observe(self.model)
        late = self.latest is not None and (epoch + 1) * self.steps_per_epoch >= self.latest
        if reading.fired or late:
            self.stage.epochs = epoch + 1
        return {"distance": reading.value}

    def state(self) -> dict[str, Tensor]:
        """The trigger's."""
        return self.trigger.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        self.trigger.load_state(state)
