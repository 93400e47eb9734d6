"""Section `levels`: the densities and what each level starts from."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param
from utils.params.step import Step


@dataclass(frozen=True)
class Levels:
    """The densities of the levels and what each of them starts from."""

    spacing: str = param(
        "geometric", "geometric: (1-rate)^k; linear: equal steps down to target", choices=("geometric", "linear")
    )
    rate: float = param(0.2, "share of the remaining weights removed per level (geometric)", above=0.0, below=1.0)
    target: float | None = param(
        None,
        "density that ends the plan: the last level is the first at or below it",
        above=0.0,
        high=1.0,
        empty="none",
    )
    count: int | None = param(None, "number of levels, the dense level 0 included", low=1, high=1000, empty="none")
    densities: tuple[float, ...] = param((), "explicit densities instead of rate, target and count", low=0.0, high=1.0)
    start: float | None = param(
        None,
        "density level 0 is pruned to before it trains, by start_criterion; the plan goes down from there; none: dense",
        above=0.0,
        high=1.0,
        empty="none",
    )
    start_criterion: str | None = param(
        None, "criterion of levels.start; none: pruning.criterion", kind="criterion", empty="none"
    )
    start_allocation: str | None = param(
        None, "allocation of levels.start; none: pruning.allocation", kind="allocation", empty="none"
    )
    rewind: str = param(
        "lrr",
        "imp: initial weights; wr: weights of rewind_step; lrr: keep weights, restart the learning rate; "
        "none: keep weights, fine-tune at the final rate",
        choices=("imp", "wr", "lrr", "none"),
    )
    rewind_step: Step | None = param(None, "step whose weights `wr` returns to, e.g. 500it or 2ep", empty="none")  # noqa: RUF009
    rewind_optimizer: bool = param(False, "`wr` also restores the optimizer state of that step")
    rewind_schedule: str = param(
        "continue",
        "`wr`: continue the schedule from that step (as published) or restart it",
        choices=("continue", "restart"),
    )
    epochs: tuple[int, ...] = param(
        (), "epochs per level: one number for all, or one per level; empty: training.epochs", low=0
    )
    finetune_lr: float | None = param(None, "learning rate of rewind `none`; auto: the schedule's last", above=0.0)
    wait: float = param(
        0.0, "minutes levels.only waits for the level it starts from; 0: an error at once", low=0.0, hashed=False
    )
    only: int | None = param(
        None, "run this level alone; the levels it needs must be there", low=0, empty="none", hashed=False
    )
