"""Where the training of a stage stands, and what is kept of it while it lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from utils.sparsity import Sparsity
from utils.training.extension import Extension
from utils.training.masked_update import MaskedUpdate

Row = dict[str, Any]


@dataclass
class Stage:
    """One level's training. Extensions may change `epochs` and `lr` while it runs; both are read anew every time.

    epochs      length of the schedule; training ends at its last step. May change up to the end of the last epoch;
                images that grow with training then follow the new length
    start       optimizer step training begins at (`wr` continues the schedule of the rewind step)
    lr          learning rate at a step
    marks       step -> called once the step's predecessors are done and before the step itself (rewind points)
    """

    level: int
    epochs: int
    lr: Callable[[int], float]
    start: int = 0
    marks: dict[int, Callable[[], None]] = field(default_factory=dict)


@dataclass
class Progress:
    """How far a stage has come. All of it goes into a checkpoint.

    epoch, step        the epoch at work, and optimizer steps done
    rows               one per finished epoch
    row                of the epoch at work: None until its steps are done and its extensions have heard of it, then
                       what was measured; only its evaluation is left
    lr, size           learning rate and image side (None: the data's) the epoch began with; both may depend on what an
                       extension did to the stage since
    totals             sums of loss and accuracies of the epoch so far, this rank's
    images, seconds, waited   images trained on in this epoch over all ranks; time spent and time waited for data
    """

    epoch: int
    step: int
    rows: list[Row] = field(default_factory=list)
    row: Row | None = None
    lr: float | None = None
    size: int | None = None
    totals: torch.Tensor | None = None
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def next_epoch(self) -> None:
        """Close the epoch at work."""
        assert self.row is not None
        self.rows.append(self.row)
        self.epoch += 1
        self.row = self.lr = self.size = self.totals = None
        self.images, self.seconds, self.waited = 0, 0.0, 0.0


def of_stock_network(row: Row) -> bool:
    """Whether the epoch of this row was evaluated with the stock network, not one a recipe had changed."""
    return row.get("soft") is None and row.get("ghost") is None


@dataclass
class Live:
    """Everything that changes while a stage trains, apart from the model itself.

    update: steps the optimizer with masks in one pass, where nothing reads the gradients before; None: never
    """

    stage: Stage
    optimizer: torch.optim.Optimizer
    sparsity: Sparsity
    extensions: Sequence[Extension]
    scaler: torch.amp.GradScaler
    progress: Progress
    update: MaskedUpdate | None = None


class Keeper:
    """Stores the state of training and puts it back. This base class stores nothing; see `checkpoint.Checkpoints`.

    Every call is made on all ranks alike.
    """

    def restore(self, live: Live) -> bool:
        """Put a stored state into the model and `live`. False where there is none: training starts afresh."""
        return False

    def due(self) -> bool:
        """Whether this rank's clock asks for a checkpoint; the ranks agree on it before one is made."""
        return False

    def save(self, live: Live) -> str:
        """Store the state as it is now, between two steps. Returns where training would go on, in words."""
        return "not stored"

    def epoch_done(self, live: Live) -> None:
        """Called after every epoch, its evaluation included; the last of `live.progress.rows` is its row."""

    def last(self) -> str:
        """The last state stored, in words."""
        return "no checkpoint"
