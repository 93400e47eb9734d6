"""The pruning harness: criteria, allocations, exact selection and the per-layer report.

masks = prune(model, density=0.1, criterion="magnitude", allocation="erk")
masks = prune(model, density=0.05, criterion="synflow", input_shape=(3, 32, 32))
"""

from __future__ import annotations

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
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    **section: Any,
) -> Masks:
    """Masks that keep exactly floor(density * total + 0.5) prunable weights of `model`, which stays as it is.

    masks: the weights that still live (None: all prunable ones).
    batches, loss: what the criterion reads, where it reads data; under a process group this rank's share.
    input_shape: (channels, height, width) of an image, for criteria that read none; that of the batches by default.
    section: other keys of the section `pruning`, such as exclude, pattern, rounds, layer_densities or min_kept.
    Raises UserError for requests that cannot be met, TypeError for an unknown key.
    """
    from utils.params.pruning import Pruning
    from utils.pruning.harness import PruningHarness
    from utils.system import distributed

    if masks is not None and section.get("exclude"):
        raise ValueError("give masks or exclude, not both: masks already say what is prunable")
    kept = list(batches)
    if input_shape is None:
        # A rank without batches must know it too: it takes part in the scoring.
        own: tuple[int, int, int] | None = None
        if kept and kept[0][0].ndim == 4:
            _, *sides = kept[0][0].shape
            own = sides[0], sides[1], sides[2]
        input_shape = next((shape for shape in distributed.gather(own) if shape is not None), None)
    more: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
    keys = Pruning(criterion=criterion, allocation=allocation, density=density, **more)
    harness = PruningHarness(keys, seed=seed, loss=loss, input_shape=input_shape)
    return harness.prune(model, masks, density, kept).masks
