"""Section `pruning`: which weights stay."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param
from utils.params.step import Step


@dataclass(frozen=True)
class Pruning:
    """Which weights stay, and when that is decided."""

    criterion: str = param("magnitude", "gives every prunable weight a score; higher is kept", kind="criterion")
    criterion_options: tuple[str, ...] = param((), "`name=value` options of the criterion, e.g. temperature=200")
    normalize: str = param("none", "rescales scores within each layer; lamp: Lee et al. 2021", choices=("none", "lamp"))
    allocation: str = param("global", "how the density is spread over layers", kind="allocation")
    from_mask: str | None = param(None, "mask file whose layer ratios allocation from_mask copies", empty="none")
    density: float | None = param(
        None,
        "share of prunable weights kept (every moment but levels)",
        low=0.0,
        high=1.0,
        empty="none",
    )
    pattern: str = param(
        "weight", "granularity of the masks: weight, N:M (such as 2:4), block=HxW, kernel or channel (output channels)"
    )
    group_score: str = param("mean", "score of a group of weights (blocks, kernels, channels)", choices=("mean", "sum"))
    rounds: int | None = param(None, "score-and-prune rounds of one pruning; auto: the criterion's own", low=1)
    round_schedule: str | None = param(
        None,
        "densities of the rounds; auto: the criterion's own",
        choices=("exponential", "linear", "snipit"),
    )
    regrow: bool = param(False, "later rounds may bring pruned weights back (FORCE)")
    moment: str = param(
        "levels",
        "init: before training, each density from the initial weights; step: at pruning.step; early: once "
        "early.trigger says so; oneshot: train dense, then prune once to each density; levels: iterative; ticktock: "
        "channels, by gates and weights that train in turns (structured.criterion=gates)",
        choices=("init", "step", "early", "oneshot", "levels", "ticktock"),
    )
    step: Step | None = param(None, "when moment step prunes, e.g. 500it or 2ep", empty="none")  # noqa: RUF009
    exclude: tuple[str, ...] = param((), "globs of parameter names that are never pruned")
    layer_densities: tuple[str, ...] = param(
        (), "`glob=density` entries that fix single layers; the rest share what is left"
    )
    first_layer: str = param("prune", "dense: the first prunable layer stays whole", choices=("prune", "dense"))
    last_layer: str = param("prune", "dense: the last prunable layer stays whole", choices=("prune", "dense"))
    min_kept: int = param(0, "weights every layer keeps at least (layers of layer_densities apart)", low=0)
    mask_file: str | None = param(None, "masks the run starts from instead of the dense network", empty="none")
    samples_per_class: int | None = param(
        None, "training images per class that data-reading criteria score on; auto: the criterion's own", low=1
    )
    batches: int | None = param(None, "scoring batches, instead of samples_per_class", low=1, empty="none")
    batch_size: int = param(128, "largest number of images of one scoring batch", low=1)
    control: str = param(
        "none",
        "sanity checks: shuffle the kept places within layers, reinitialise the weights, invert the scores",
        choices=("none", "shuffle", "reinitialise", "invert"),
    )
    allow_disconnected: bool = param(False, "train even when no path is left from input to output")
