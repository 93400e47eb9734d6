"""Criteria: a score for every prunable weight; higher is kept.

A criterion is a function `(model, masks, batches, loss, *, generator) -> Scores`:

    model       the bare model with its unmasked weights
    masks       the weights that still live; scores of pruned places are never looked at
    batches     pairs (images, labels) of the training split, each pass over it gives the same batches
    loss        (model, batch) -> scalar with graph; mean cross-entropy unless the task has another
    generator   CPU generator; the same on every rank. Draw per layer from `layer_generator`, so that no layer's
                numbers depend on which other layers there are

and returns one float32 or float64 tensor per entry of `masks`, of its shape, on any device. Infinities are allowed, NaN
stops the run. Traits, given to the decorator:

    batchnorm   `eval`, `train` (batch statistics; all other modules stay in eval mode) or `none`: the model is not run
    reads       `nothing` or `train`: whether it needs batches

The harness runs it with gradients cleared and restores gradients, buffers, training flags and random states afterwards;
a criterion that changes a parameter stops the run. A new criterion is one decorated function in a file of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.data.stateless import derive
from utils.masks import Masks
from utils.system.registry import Registry

Scores = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


class Loss(Protocol):
    """Mean loss of the model on one batch: 0-dim, with graph."""

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor], /) -> Tensor: ...


class Criterion(Protocol):
    """Scores for every entry of `masks`."""

    def __call__(
        self, model: nn.Module, masks: Masks, batches: Batches, loss: Loss, *, generator: torch.Generator
    ) -> Scores: ...


TRAITS = {"batchnorm": ("eval", "train", "none"), "reads": ("nothing", "train")}
"""What the decorator must be told, and the values allowed."""

criterion: Registry[Criterion] = Registry("criterion")


def check_traits(name: str, traits: Mapping[str, Any]) -> None:
    """Raise ValueError unless the criterion `name` was registered with exactly the traits of TRAITS."""
    good = traits.keys() == TRAITS.keys() and all(traits[key] in allowed for key, allowed in TRAITS.items())
    if not good:
        raise ValueError(f"criterion {name!r} has traits {dict(traits)}; it needs each of {TRAITS}")


def layer_generator(generator: torch.Generator, name: str) -> torch.Generator:
    """A fresh CPU generator that depends only on the seed `generator` was given and the layer's name."""
    return torch.Generator().manual_seed(derive("layer", generator.initial_seed(), name))
