"""A level that ends once its network is ready to be pruned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from utils.pruning.structured.stop import StopAtTrigger
from utils.pruning.triggers import Reading, Trigger
from utils.system.errors import UserError
from utils.training.trainer import Stage


class Fires(Trigger):
    """Fires after so many epochs; its distance is one over the epochs seen."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def observe(self, model: nn.Module) -> Reading:
        self.seen += 1
        return Reading(self.seen >= self.after, 1.0 / self.seen)

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.seen = int(state["seen"])


def train(stage: Stage, stop: StopAtTrigger, first: int = 0) -> list[float | None]:
    """The epochs a trainer would do: it reads the length anew after each."""
    read, epoch = [], first
    while epoch < stage.epochs:
        read.append(stop.epoch_end(epoch)["distance"])
        epoch += 1
    return read


def stage(epochs: int = 9) -> Stage:
    return Stage(0, epochs, lambda step: 0.1)


def test_the_level_ends_with_the_epoch_the_trigger_fires_after() -> None:
    own = stage()
    stop = StopAtTrigger(nn.Linear(2, 2), own, Fires(4), steps_per_epoch=10)
    assert train(own, stop) == [1.0, 0.5, 1 / 3, 0.25]
    assert stop.ended == own.epochs == 4


def test_without_a_trigger_it_goes_on_to_its_length_or_to_the_latest_step() -> None:
    own = stage()
    assert len(train(own, StopAtTrigger(nn.Linear(2, 2), own, Fires(99), 10))) == own.epochs == 9
    for latest, epochs in ((50, 5), (51, 6), (1, 1)):  # the first epoch that reaches the step
        own = stage()
        stop = StopAtTrigger(nn.Linear(2, 2), own, Fires(99), 10, latest)
        assert len(train(own, stop)) == own.epochs == stop.ended == epochs


def test_a_resumed_level_ends_where_the_other_would_have() -> None:
    first = stage()
    before = StopAtTrigger(nn.Linear(2, 2), first, Fires(4), 10)
    for epoch in range(2):
        before.epoch_end(epoch)
    own = stage()
    again = StopAtTrigger(nn.Linear(2, 2), own, Fires(4), 10)
    again.load_state(before.state())
    assert again.ended is None
    assert train(own, again, first=2) == [1 / 3, 0.25]
    # One stored after it fired does not train on.
    late = stage()
    over = StopAtTrigger(nn.Linear(2, 2), late, Fires(4), 10)
    over.load_state(again.state())
    assert (over.ended, late.epochs) == (4, 4)
    with pytest.raises(UserError, match=r"another pruning.moment"):
        over.load_state({"trigger.seen": torch.tensor(1)})
