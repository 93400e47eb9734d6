"""Section `structured`: channels taken out for good."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Structured:
    """Channels taken out, so that a smaller dense network trains; on when structured.budget is set."""

    budget: str | None = param(
        None,
        "what structured.keep is a share of, relative to the stock network; none: no structured pruning",
        choices=("channels", "parameters", "macs"),
        empty="none",
    )
    keep: tuple[float, ...] = param((), "share of the budget that stays, a level for each", above=0.0, high=1.0)
    criterion: str = param("l1", "scores of channels; gates: learned by level 0", kind="channel_criterion")
    scope: str = param("global", "rank channels over all layers, or thin all layers alike", choices=("global", "layer"))
    rounds: int = param(1, "score-and-prune rounds of one pruning, at geometrically falling budgets", low=1)
    exclude: tuple[str, ...] = param((), "globs of layer names whose output channels stay")
    coupled: bool = param(True, "also prune channels that several layers write (residual streams)")
    min_width: int = param(1, "channels a group keeps at least", low=1)
    round_to: int = param(1, "widths are multiples of this, or whole", low=1)
    fresh: bool = param(False, "train the smaller network from fresh initial weights of its own")
    scratch: str = param(
        "e", "e: training.epochs for every level; b: training.epochs / keep (equal MACs)", choices=("e", "b")
    )
    expansion: int | None = param(
        None,
        "width of the first layer of the network that is pruned; what one layer alone writes grows alike; none: stock",
        low=1,
        empty="none",
    )
    multiplier: float = param(1.0, "factor of the widths of residual streams and of structured.exclude", above=0.0)
    gate_epochs: int = param(10, "epochs gates learn for while the weights are frozen", low=1)
    gate_lr: float = param(0.01, "constant rate of gates on frozen weights (Adam; ticks: optimizer.name)", above=0.0)
    gate_target: float = param(0.2, "mean gate the penalty pulls to", low=0.0, high=1.0)
    gate_penalty: float = param(0.5, "weight of the squared distance to gate_target in the loss", low=0.0)
    tock_epochs: int = param(10, "ticktock: epochs weights and gates train together after each pruning", low=1)
    tock_penalty: float = param(1e-3, "ticktock: weight of the sum of |gates| in the loss of these epochs", low=0.0)
