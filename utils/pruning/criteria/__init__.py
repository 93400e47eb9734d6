"""Criteria: a score for every prunable weight; higher is kept.

A criterion is a function `(model, masks, batches, loss, *, generator, **options) -> Scores`:

    model       the bare model with its unmasked weights
    masks       the weights that live; it is the network with only these that is scored (`_gradients.inside`)
    batches     pairs (images, labels) of the training split: this rank's share of the scoring micro-batches, the same
                at each pass, possibly none. Means are over the samples of all ranks (`_gradients` reduces)
    loss        (model, batch) -> scalar with graph; mean cross-entropy unless the task has another
    generator   CPU generator; the same on every rank. Draw per layer from `layer_generator`, so that no layer's
                numbers depend on which other layers there are
    options     keyword-only parameters with int, float, bool or str defaults, set by `pruning.criterion_options`.
                Two are filled in by the harness: `input_shape`, (channels, height, width), and `everywhere`, whether
                scores of pruned places are looked at too

and returns one float32 or float64 tensor per entry of `masks`, of its shape, on any device, equal on all ranks.
Infinities are allowed, NaN stops the run. Scores of pruned places count only where rounds may bring weights back.
Traits, given to the decorator:

    batchnorm           `eval`, `train` (batch statistics; all other modules stay in eval mode), or `none`: the
                        criterion does not run the model, or sees to its modes itself
    reads               `nothing` or `train`: whether it needs batches
    rounds              score-and-prune rounds of the published method (1)
    schedule            densities of the rounds (exponential)
    samples_per_class   training images of each class it scores on (10)
    batches             number of scoring batches instead, or a function of the options that gives it (None)
    signed              whether low scores may be negative for a reason, as GraSP's are (False)

The harness runs it with gradients cleared and restores gradients, buffers, training flags and random states afterwards;
a criterion that changes a parameter stops the run. A new criterion is one decorated function in a file of this package.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.data.stateless import derive
from utils.system.errors import UserError
from utils.system.registry import Registry, nearest

Scores = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


class Loss(Protocol):
    """Mean loss of the model on one batch: 0-dim, with graph."""

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor], /) -> Tensor: ...


Criterion = Callable[..., Scores]
"""`(model, masks, batches, loss, *, generator, **options) -> scores`, as the module says."""

TRAITS = {"batchnorm": ("eval", "train", "none"), "reads": ("nothing", "train")}
"""What the decorator must be told, and the values allowed."""

DEFAULTS: dict[str, Any] = {
    "rounds": 1,
    "schedule": "exponential",
    "samples_per_class": 10,
    "batches": None,
    "signed": False,
}
"""What it may be told besides."""

FILLED = ("input_shape", "everywhere")
"""Options that are not the user's."""

criterion: Registry[Criterion] = Registry("criterion")


def traits_of(name: str) -> dict[str, Any]:
    """All traits of the criterion `name`. Raises UserError for an unknown one, ValueError for malformed traits."""
    entry = criterion.entry(name)
    required = entry.traits.keys() >= TRAITS.keys() and all(entry.traits[key] in good for key, good in TRAITS.items())
    if not required or not entry.traits.keys() <= TRAITS.keys() | DEFAULTS.keys():
        raise ValueError(
            f"criterion {name!r} has traits {entry.traits}; it needs each of {TRAITS} and may have {sorted(DEFAULTS)}"
        )
    return DEFAULTS | entry.traits


def options_of(name: str) -> dict[str, Any]:
    """The options of the criterion `name` with their defaults, those the harness fills in apart."""
    parameters = inspect.signature(criterion[name]).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("generator", *FILLED)]
    return {p.name: p.default for p in own}


def filled(name: str, **values: Any) -> dict[str, Any]:
    """Those of `values` (of FILLED) that the criterion `name` takes."""
    parameters = inspect.signature(criterion[name]).parameters
    return {option: value for option, value in values.items() if option in parameters}


def read_options(name: str, entries: Sequence[str]) -> dict[str, Any]:
    """`option=value` entries as keyword arguments of the criterion `name`. Raises UserError for one that is wrong."""
    known, found = options_of(name), {}
    for entry in entries:
        option, equals, text = (part.strip() for part in entry.partition("="))
        if not equals or option not in known:
            hint = nearest(option, known) if known else "; it has none"
            raise UserError(f"pruning.criterion_options: {entry!r} is not <option>=<value> of {name!r}{hint}")
        if option in found:
            raise UserError(f"pruning.criterion_options: {option!r} is given twice; keep one of them")
        found[option] = _typed(entry, text, type(known[option]))
    return found


def _typed(entry: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
        return value
    except (ValueError, KeyError):
        word = "true or false" if kind is bool else {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"pruning.criterion_options: {entry!r}: write {word}") from None


def layer_generator(generator: torch.Generator, name: str) -> torch.Generator:
    """A fresh CPU generator that depends only on the seed `generator` was given and the layer's name."""
    return torch.Generator().manual_seed(derive("layer", generator.initial_seed(), name))
