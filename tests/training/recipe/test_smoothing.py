"""Label smoothing: targets by hand in both conventions, and the share of every step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.training.recipe.recipe_cases import recipe
from utils.system.errors import UserError
from utils.tasks.classification import ImageClassification
from utils.training.recipe.smoothing import LabelSmoothing

LABELS = torch.tensor([0, 2, 1])
LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, 0.3, -3.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)


def task(mixup: float = 0.0) -> ImageClassification:
    return ImageClassification(4, mixup=mixup)


class Fixed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return LOGITS


def by_hand(targets: list[list[float]]) -> float:
    log = LOGITS - LOGITS.exp().sum(1, keepdim=True).log()
    return float(-(torch.tensor(targets, dtype=torch.float64) * log).sum(1).mean())


@pytest.mark.parametrize(("convention", "own", "other"), [("torch", 0.7 + 0.3 / 4, 0.3 / 4), ("others", 0.7, 0.1)])
def test_targets_by_hand(convention: str, own: float, other: float) -> None:
    one = task()
    keys = {"smoothing__schedule": "constant", "smoothing__amount": 0.3, "smoothing__convention": convention}
    LabelSmoothing(one, recipe(**keys), total=10, steps_per_epoch=5)
    targets = [[own if c == label else other for c in range(4)] for label in LABELS.tolist()]
    assert float(one.loss(Fixed(), (torch.zeros(3, 1), LABELS))[0]) == pytest.approx(by_hand(targets), rel=1e-12)
    assert float(one.scoring_loss(Fixed(), (torch.zeros(3, 1), LABELS))) == pytest.approx(
        by_hand([[float(c == label) for c in range(4)] for label in LABELS.tolist()]), rel=1e-12
    )


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.2, 0.2, 0.2, 0.15, 0.1, 0.05, 0.0]),
        ("step", [0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.0]),
    ],
)
def test_schedules_by_hand(schedule: str, shares: list[float]) -> None:
    one = task()
    keys = {"smoothing__schedule": schedule, "smoothing__amount": 0.2}
    keys |= {"smoothing__hold": "2it"} if schedule == "linear" else {}
    keys |= {"smoothing__end": "6it"} if schedule != "constant" else {}
    smoothing = LabelSmoothing(one, recipe(**keys), total=10, steps_per_epoch=5)
    for order in (range(7), [5, 2, 6, 0]):  # a function of the step alone
        for step in order:
            smoothing.before_step(step)
            assert one.label_smoothing == pytest.approx(shares[step], abs=1e-15)
            assert smoothing.epoch_end(0) == {"smoothing": one.label_smoothing}


def test_the_task_has_its_own_again_afterwards() -> None:
    one = task()
    smoothing = LabelSmoothing(one, recipe(smoothing__schedule="constant"), 10, 5)
    assert one.label_smoothing == 0.1
    smoothing.close()
    assert one.label_smoothing == 0.0


def test_too_much_is_refused() -> None:
    keys = {"smoothing__schedule": "constant", "smoothing__amount": 0.8, "smoothing__convention": "others"}
    with pytest.raises(UserError, match=r"recipe.smoothing.amount=0.8: .* of 4 classes; lower it"):
        LabelSmoothing(task(), recipe(**keys), 10, 5)
