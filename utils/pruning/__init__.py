"""The pruning harness: criteria, allocations, exact selection and the per-layer report.

masks = prune(model, density=0.1, criterion="magnitude", allocation="erk")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from utils.masks import Masks
    from utils.pruning.criteria import Batches, Loss
    from utils.pruning.harness import Pruned, PruningHarness, Round

__all__ = ["Pruned", "PruningHarness", "Round", "prune"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the package itself must import without torch, so that a wrong config is refused at once.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from utils.pruning import harness

    return getattr(harness, name)


def prune(
    model: nn.Module,
    *,
    density: float,
    criterion: str = "magnitude",
    allocation: str = "global",
    masks: Masks | None = None,
    batches: Batches = (),
    loss: Loss | None = None,
    exclude: Sequence[str] = (),
    layer_densities: Sequence[str] = (),
    seed: int = 0,
) -> Masks:
    """Masks that keep exactly floor(density * total + 0.5) prunable weights of `model`, which stays as it is.

    masks: the weights that still live (None: all prunable parameters but those matching the globs in `exclude`).
    layer_densities: `glob=density` entries that fix layers; the first match holds, the rest share what is left.
    batches, loss: what the criterion reads, where it reads data. Raises UserError for requests that cannot be met.
    """
    from utils.params.pruning import Pruning
    from utils.pruning.harness import PruningHarness

    if masks is not None and exclude:
        raise ValueError("give masks or exclude, not both: masks already say what is prunable")
    section = Pruning(
        criterion=criterion,
        allocation=allocation,
        density=density,
        exclude=tuple(exclude),
        layer_densities=tuple(layer_densities),
    )
    return PruningHarness(section, seed=seed, loss=loss).prune(model, masks, density, batches).masks
