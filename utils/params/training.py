"""Section `training`: how long, how many at once, in which precision."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Training:
    """How long, how many at once, in which precision."""

    epochs: int = param(10, "epochs per level (levels.epochs can differ)", low=0)
    batch_size: int = param(128, "images per optimizer step over all ranks", low=1)
    accumulation: int = param(1, "backward passes per optimizer step", low=1)
    eval_batch_size: int | None = param(
        None, "images per evaluation batch and rank; auto: 2 x the training batch of a rank", low=1
    )
    precision: str = param(
        "auto",
        "auto: bfloat16 where the hardware has it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    channels_last: bool = param(True, "NHWC memory layout")
    compile: bool = param(False, "torch.compile the model", hashed=False)
    clip: float | None = param(None, "clip the gradient norm to this", above=0.0, empty="none")
    label_smoothing: float = param(0.0, "share of the target spread over all classes", low=0.0, below=1.0)
    ema: float | None = param(
        None,
        "decay of the weight average per step; evaluation then uses the average",
        above=0.0,
        below=1.0,
        empty="none",
    )
    test_flip: bool = param(False, "average logits over the image and its mirror in evaluation")
    eval_every: int = param(1, "evaluate every so many epochs (always after the last)", low=1)
    gradient_norms: int = param(
        0, "write gradients.csv: norms per parameter over so many first steps", low=0, hashed=False
    )
    check_every: int = param(50, "steps between looks at the losses for NaN", low=1, hashed=False)
