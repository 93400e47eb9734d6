"""Section `early`: when an early pruning happens (pruning.moment=early)."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param
from utils.params.step import Step


@dataclass(frozen=True)
class Early:
    """The trigger of an early pruning, looked at after every epoch."""

    trigger: str = param("weight_distance", "what says that the network is ready", kind="trigger")
    threshold: float | None = param(None, "fire below this; auto: as the method says", above=0.0)
    window: int = param(5, "epochs the mask distance of early_bird looks back", low=1)
    latest: Step | None = param(None, "prune here at the latest; auto: after training.epochs epochs")  # noqa: RUF009
    length: str = param(
        "published",
        "published: training.epochs more after the pruning; configured: training.epochs in all",
        choices=("published", "configured"),
    )
