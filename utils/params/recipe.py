"""Sections `recipe.soft`, `recipe.ghost`, `recipe.smoothing` and `recipe.rescale`: how a sparse network is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from utils.params.field import param
from utils.params.step import Step

SHAPES = ("linear", "cosine", "exponential")


@dataclass(frozen=True)
class Soft:
    """Soft activations in the place of ReLU, ReLU6 and Hardswish, annealed to them and then swapped for them."""

    kind: str | None = param(None, "activation training starts with", choices=("swish", "mish", "gelu"), empty="none")
    beta: float = param(1.0, "swish: x * sigmoid(beta * x) at first", above=0.0)
    beta_end: float = param(20.0, "swish: beta it is annealed to before ReLU takes over", above=0.0)
    hold: Step = param(Step(), "as at first until this step of a level")  # noqa: RUF009
    end: Step | None = param(None, "stock activations from this step on; auto: half of the level")  # noqa: RUF009
    shape: str = param("exponential", "way from hold to end; exponential: slow at first", choices=SHAPES)
    keep: bool = param(False, "as released: never annealed, soft in every level, score and evaluation")


@dataclass(frozen=True)
class Ghost:
    """Skip connections around the masked convolutions, faded out and then removed."""

    kind: str | None = param(None, "what a skip is", choices=("identity", "1x1"), empty="none")
    alpha: float = param(1.0, "weight of the skips at first", above=0.0)
    hold: Step = param(Step(), "as at first until this step of a level")  # noqa: RUF009
    end: Step | None = param(None, "weight 0, removed from this step on; auto: half of the level")  # noqa: RUF009
    shape: str = param("linear", "way from hold to end; exponential: fast at first", choices=SHAPES)
    exclude: tuple[str, ...] = param((), "globs over names of convolution weights that get no skip")


@dataclass(frozen=True)
class Smoothing:
    """Label smoothing that changes while a level trains."""

    schedule: str | None = param(
        None, "constant: amount; linear: from amount to final; step: amount, then final",
        choices=("constant", "linear", "step"), empty="none",
    )  # fmt: skip
    amount: float = param(0.1, "share of the target taken from the label's class at first", above=0.0, below=1.0)
    final: float = param(0.0, "linear, step: the share from `end` on", low=0.0, below=1.0)
    convention: str = param(
        "torch", "the share is spread over all classes (torch) or over the others alone", choices=("torch", "others")
    )
    hold: Step = param(Step(), "linear: `amount` until this step of a level")  # noqa: RUF009
    end: Step | None = param(None, "linear, step: where `final` is reached; auto: half of the level")  # noqa: RUF009


@dataclass(frozen=True)
class Rescale:
    """Initial weights with one learned scale per tensor (GradInit), before a level trains from them."""

    method: str | None = param(
        None, "optimizer whose first step is looked ahead", choices=("sgd", "adam"), empty="none"
    )
    iterations: int = param(390, "steps on the scales", low=1)
    lr: float = param(1e-3, "learning rate of the scales", above=0.0)
    eta: float = param(0.1, "learning rate of the step looked ahead", above=0.0)
    gamma: float | None = param(None, "bound of the gradient's norm (adam: 1-norm)", above=0.0, empty="none")
    normalize_grad: bool = param(False, "sgd: look ahead along the gradient divided by its norm")
    min_scale: float = param(0.01, "lower bound of a weight's scale (biases: 0)", low=0.0, high=1.0)
    clip: float | None = param(1.0, "bound of a scale's gradient either side", above=0.0, empty="none")
    overlap: bool = param(True, "the loss after the step sees half of the images the step was made on")
    batch_size: int = param(128, "images per batch; an iteration reads two or three", low=1)
    batches: int = param(32, "different batches, taken in turn", low=2)


@dataclass(frozen=True)
class Recipe:
    """The four parts of a recipe."""

    soft: Soft = dataclasses.field(default_factory=Soft)
    ghost: Ghost = dataclasses.field(default_factory=Ghost)
    smoothing: Smoothing = dataclasses.field(default_factory=Smoothing)
    rescale: Rescale = dataclasses.field(default_factory=Rescale)
