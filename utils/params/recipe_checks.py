"""Contradictions between the keys of recipes: each rule yields one line that names the key and the mend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from utils.params import Params
from utils.params.method_checks import Ignored, given
from utils.params.recipe import Ghost, Rescale, Smoothing, Soft
from utils.params.step import Step


def _rest(section: type, head: str, *switches: str) -> list[str]:
    return [f"{head}.{f.name}" for f in dataclasses.fields(section) if f.name not in switches]


IGNORED: Ignored = (
    *((name, "recipe.soft.kind", (None,), "swish, mish or gelu") for name in _rest(Soft, "recipe.soft", "kind")),
    *((name, "recipe.ghost.kind", (None,), "identity or 1x1") for name in _rest(Ghost, "recipe.ghost", "kind")),
    *(
        (name, "recipe.smoothing.schedule", (None,), "constant, linear or step")
        for name in _rest(Smoothing, "recipe.smoothing", "schedule")
    ),
    *((name, "recipe.rescale.method", (None,), "sgd or adam") for name in _rest(Rescale, "recipe.rescale", "method")),
    ("recipe.soft.beta", "recipe.soft.kind", ("mish", "gelu"), "swish"),
    ("recipe.soft.beta_end", "recipe.soft.kind", ("mish", "gelu"), "swish"),
    *((f"recipe.soft.{name}", "recipe.soft.keep", (True,), "false") for name in ("beta_end", "hold", "end", "shape")),
    ("recipe.smoothing.hold", "recipe.smoothing.schedule", ("constant", "step"), "linear"),
    ("recipe.smoothing.end", "recipe.smoothing.schedule", ("constant",), "linear or step"),
    ("recipe.smoothing.final", "recipe.smoothing.schedule", ("constant",), "linear or step"),
    ("recipe.rescale.normalize_grad", "recipe.rescale.method", ("adam",), "sgd"),
)
"""As in `checks`: (key, other key, values of the other key that ignore the first, values that use it)."""


def problems(params: Params) -> Iterator[str]:
    """One line per contradiction."""
    recipe = params.recipe
    soft, smoothing = recipe.soft, recipe.smoothing
    if soft.kind == "swish" and not soft.keep and soft.beta_end <= soft.beta:
        yield f"recipe.soft.beta_end={soft.beta_end:g}: must lie above recipe.soft.beta={soft.beta:g}; raise it"
    if smoothing.schedule is not None and params.training.label_smoothing:
        yield f"{given('training.label_smoothing', params)}: contradicts recipe.smoothing; drop one of them"
    if recipe.rescale.method is not None and params.model.pretrained:
        yield f"{given('recipe.rescale.method', params)}: rescales initial weights; drop it or model.pretrained"
    for name, section in (("soft", soft), ("ghost", recipe.ghost), ("smoothing", smoothing)):
        yield from _order(f"recipe.{name}", section.hold, section.end)


def _order(section: str, hold: Step, end: Step | None) -> Iterator[str]:
    """Steps are compared as far as they tell without the number of steps in an epoch."""
    if end is not None and hold.epochs >= end.epochs and hold.iterations >= end.iterations:
        yield f"{section}.end={end}: does not come after {section}.hold={hold}; choose a later step"
