"""Label smoothing that changes while a level trains, in both conventions.

Of `a` taken from the label's class, torch spreads a / C over all C classes, so that the label keeps 1 - a + a / C
(Szegedy et al. 2016); the other convention gives a / (C - 1) to each other class and leaves 1 - a (Jaiswal et al.
2022). The second at `a` is the first at a * C / (C - 1).
"""

from __future__ import annotations

from torch import Tensor

from utils import params
from utils.system.errors import UserError
from utils.tasks.classification import ImageClassification
from utils.training.extension import Extension
from utils.training.recipe import at_step, step_of
from utils.training.recipe.ramp import Ramp, span


def as_torch(amount: float, convention: str, classes: int, key: str = "amount") -> float:
    """The share in torch's convention. Raises UserError naming `recipe.smoothing.<key>` for more than it has."""
    share = amount if convention == "torch" else amount * classes / max(classes - 1, 1)
    if share > 1.0:
        raise UserError(
            f"recipe.smoothing.{key}={amount:g}: leaves the label's class less than the others have of {classes} "
            "classes; lower it"
        )
    return share


def check_smoothing(section: params.Recipe, classes: int) -> None:
    """Raise UserError for an amount that is too large for so many classes."""
    smoothing = section.smoothing
    as_torch(smoothing.amount, smoothing.convention, classes)
    if smoothing.schedule != "constant":
        as_torch(smoothing.final, smoothing.convention, classes, "final")


class LabelSmoothing(Extension):
    """Sets the task's label smoothing before every step."""

    def __init__(
        self, task: ImageClassification, section: params.Recipe, total: int, steps_per_epoch: int, start: int = 0
    ) -> None:
        """total: steps of the level. Raises UserError for an amount that is too large or steps outside the level."""
        smoothing = section.smoothing
        self._task, self._before = task, task.label_smoothing
        first = as_torch(smoothing.amount, smoothing.convention, task.classes)
        if smoothing.schedule == "constant":
            self.ramp = Ramp(first, first, 0, 1)
        else:
            last = as_torch(smoothing.final, smoothing.convention, task.classes, "final")
            hold, end = span("recipe.smoothing", smoothing.hold, smoothing.end, total, steps_per_epoch)
            self.ramp = Ramp(first, last, hold if smoothing.schedule == "linear" else end, end)
        self.before_step(start)

    def before_step(self, step: int) -> None:
        """Set the share of this step."""
        self._step = step
        self._task.label_smoothing = self.ramp.at(step)

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """The share of the last step, in torch's convention."""
        return {"smoothing": self._task.label_smoothing}

    def state(self) -> dict[str, Tensor]:
        """The step."""
        return at_step(self._step)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The share of that step."""
        self.before_step(step_of(state))

    def close(self) -> None:
        """The task's own smoothing again."""
        self._task.label_smoothing = self._before
