"""Section `pruning`: which weights stay."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Pruning:
    """Which weights stay, and when that is decided."""

    criterion: str = param("magnitude", "gives every prunable weight a score; higher is kept", kind="criterion")
    allocation: str = param("global", "how the density is spread over layers", kind="allocation")
    density: float | None = param(
        None, "share of prunable weights kept (moments init and oneshot)", low=0.0, high=1.0, empty="none"
    )
    moment: str = param(
        "levels",
        "init: before training, each density from the initial weights; oneshot: train dense, then "
        "prune once to each density; levels: iterative",
        choices=("init", "oneshot", "levels"),
    )
    exclude: tuple[str, ...] = param((), "globs of parameter names that are never pruned")
    layer_densities: tuple[str, ...] = param(
        (), "`glob=density` entries that fix single layers; the rest share what is left"
    )
    samples_per_class: int = param(10, "training images per class that data-reading criteria score on", low=1)
