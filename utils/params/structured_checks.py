"""Contradictions between the keys of structured pruning: each rule yields one line that names the key and the mend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from utils.params import Params, Structured
from utils.params.catalog import keys
from utils.params.parsing import show

OTHERS = [field.name for field in dataclasses.fields(Structured) if field.name != "budget"]

_GATES = ("gate_epochs", "gate_lr", "gate_target", "gate_penalty", "tock_epochs", "tock_penalty")

_WITHOUT_EFFECT = (
    "pruning.from_mask", "pruning.step", "pruning.mask_file", "pruning.control", "pruning.allow_disconnected",
    "graph.kind", "dynamic.method", "levels.rate", "levels.target", "levels.count", "levels.spacing",
    "levels.densities", "levels.start", "levels.start_criterion", "levels.start_allocation",
    "recipe.soft.kind", "recipe.ghost.kind", "recipe.rescale.method",
)  # fmt: skip
"""What networks that change their shape do without."""

_SINGLE_WEIGHTS = (
    "pruning.criterion", "pruning.criterion_options", "pruning.normalize", "pruning.allocation", "pruning.pattern",
    "pruning.group_score", "pruning.rounds", "pruning.round_schedule", "pruning.regrow", "pruning.exclude",
    "pruning.layer_densities", "pruning.first_layer", "pruning.last_layer", "pruning.min_kept",
)  # fmt: skip
"""How single weights of a smaller network are pruned: only where pruning.density asks for it."""


def problems(params: Params) -> Iterator[str]:
    """One line per contradiction."""
    section = params.structured
    if section.budget is None:
        for name in OTHERS:
            if _changed(f"structured.{name}", params):
                yield (
                    f"{_given(f'structured.{name}', params)}: has no effect with structured.budget=none; drop it or "
                    "set structured.budget to channels, parameters or macs"
                )
        if params.pruning.moment == "ticktock":
            yield "pruning.moment=ticktock: takes channels out; set structured.budget, or another moment"
        return
    for name in _WITHOUT_EFFECT:
        if _changed(name, params):
            yield f"{_given(name, params)}: has no effect with {_given('structured.budget', params)}; drop one of them"
    if params.pruning.density is None:
        for name in _SINGLE_WEIGHTS:
            if _changed(name, params):
                yield (
                    f"{_given(name, params)}: has no effect with {_given('structured.budget', params)} unless "
                    "pruning.density says how many single weights stay; set it or drop the key"
                )
    if params.pruning.density == 0.0:
        yield "pruning.density=0: leaves no weight in what is left of the network; raise it or drop it"
    if not section.keep:
        yield "structured.keep: not set, and structured.budget needs it; set it, such as 0.5"
    if params.pruning.moment == "step":
        yield "pruning.moment=step: contradicts structured.budget; use init, early, oneshot, levels or ticktock"
    moment = params.pruning.moment
    if moment in ("levels", "ticktock") and list(section.keep) != sorted(set(section.keep), reverse=True):
        yield f"structured.keep: each level prunes the one before (pruning.moment={moment}); list falling shares"
    if len(set(section.keep)) != len(section.keep):
        yield "structured.keep: a share is listed twice; keep one of them"
    yield from _gates(params)
    yield from _training(params)


def _gates(params: Params) -> Iterator[str]:
    section, moment = params.structured, params.pruning.moment
    if section.criterion == "gates":
        if moment not in ("init", "ticktock"):
            yield "structured.criterion=gates: learns on frozen weights; set pruning.moment=init or ticktock"
        for name in ("gate_target", "gate_penalty") if moment == "ticktock" else ("tock_epochs", "tock_penalty"):
            if _changed(f"structured.{name}", params):
                given = _given(f"structured.{name}", params)
                yield f"{given}: has no effect with pruning.moment={moment}; drop it"
        if section.rounds > 1:
            yield f"structured.rounds={section.rounds}: gates are learned once; drop it"
    else:
        if moment == "ticktock":
            yield "pruning.moment=ticktock: ranks channels by what their gates tell; set structured.criterion=gates"
        for name in _GATES:
            if _changed(f"structured.{name}", params):
                given = _given(f"structured.{name}", params)
                yield f"{given}: has no effect without structured.criterion=gates; drop it"
    if section.criterion == "random" and section.rounds > 1:
        yield f"structured.rounds={section.rounds}: random scores do not change from round to round; drop it"


def _training(params: Params) -> Iterator[str]:
    section, moment = params.structured, params.pruning.moment
    if params.levels.rewind in ("wr", "imp") and moment not in ("init", "early"):
        yield (
            f"levels.rewind={params.levels.rewind}: structured pruning keeps weights (lrr, none) or starts anew "
            "(structured.fresh=true); drop it"
        )
    if section.fresh and params.levels.rewind == "none":
        yield "structured.fresh=true: fresh weights cannot be fine-tuned at the final rate; drop levels.rewind=none"
    for name in ("pruning.density", "training.ema", "recipe.smoothing.schedule") if moment == "ticktock" else ():
        if _changed(name, params):
            yield f"{_given(name, params)}: contradicts pruning.moment=ticktock; drop it"
    if moment == "ticktock" and (section.fresh or section.scratch == "b"):
        name = "structured.fresh" if section.fresh else "structured.scratch"
        yield f"{_given(name, params)}: contradicts pruning.moment=ticktock, which trains weights on; drop it"
    if section.scratch == "b" and section.budget != "macs":
        yield "structured.scratch=b: epochs follow from the MACs kept; set structured.budget=macs"
    if (section.expansion is not None or section.multiplier != 1.0) and params.model.pretrained:
        yield "model.pretrained: published weights have the stock widths; drop structured.expansion and multiplier"
    if params.early.length == "configured" and moment == "early":
        yield "early.length=configured: a structured pruning is followed by training.epochs epochs; drop it"


def _changed(name: str, params: Params) -> bool:
    return bool(keys()[name].of(params) != keys()[name].default)


def _given(name: str, params: Params) -> str:
    return f"{name}={show(keys()[name], keys()[name].of(params))}"
