"""Contradictions of recipe keys: each is one line that names the key and the mend, and goes away with the mend."""

from __future__ import annotations

from typing import Any

import pytest

from utils.params.load import build
from utils.params.recipe import Recipe
from utils.system.errors import ParamError

PLAN = {"levels.count": 1}

RULES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"recipe.soft.beta": 2},
        "recipe.soft.beta=2.0: has no effect with recipe.soft.kind=none",
        {"recipe.soft.kind": "swish"},
    ),
    (
        {"recipe.soft.beta": 2, "recipe.soft.kind": "mish"},
        "recipe.soft.beta=2.0: has no effect with recipe.soft.kind=mish",
        {"recipe.soft.kind": "swish"},
    ),
    (
        {"recipe.soft.kind": "swish", "recipe.soft.keep": "true", "recipe.soft.end": "3ep"},
        "recipe.soft.end=3ep: has no effect with recipe.soft.keep=true",
        {"recipe.soft.keep": "false"},
    ),
    (
        {"recipe.rescale.method": "sgd", "model.pretrained": "x.safetensors"},
        "recipe.rescale.method=sgd: rescales initial weights",
        {"model.pretrained": ""},
    ),
    (
        {"recipe.soft.kind": "swish", "recipe.soft.beta": 30},
        "recipe.soft.beta_end=20: must lie above recipe.soft.beta=30",
        {"recipe.soft.beta_end": 40},
    ),
    (
        {"recipe.ghost.exclude": "fc.*"},
        "recipe.ghost.exclude=fc.*: has no effect with recipe.ghost.kind=none",
        {"recipe.ghost.kind": "1x1"},
    ),
    (
        {"recipe.ghost.kind": "identity", "recipe.ghost.hold": "3ep", "recipe.ghost.end": "2ep"},
        "recipe.ghost.end=2ep: does not come after recipe.ghost.hold=3ep",
        {"recipe.ghost.end": "4ep"},
    ),
    (
        {"recipe.smoothing.schedule": "constant", "recipe.smoothing.end": "2ep"},
        "recipe.smoothing.end=2ep: has no effect with recipe.smoothing.schedule=constant",
        {"recipe.smoothing.schedule": "step"},
    ),
    (
        {"recipe.smoothing.schedule": "constant", "training.label_smoothing": 0.1},
        "training.label_smoothing=0.1: contradicts recipe.smoothing",
        {"training.label_smoothing": 0},
    ),
    (
        {"recipe.rescale.method": "adam", "recipe.rescale.normalize_grad": "true"},
        "recipe.rescale.normalize_grad=true: has no effect with recipe.rescale.method=adam",
        {"recipe.rescale.method": "sgd"},
    ),
    (
        {"recipe.rescale.gamma": 1},
        "recipe.rescale.gamma=1.0: has no effect with recipe.rescale.method=none",
        {"recipe.rescale.method": "sgd"},
    ),
]


@pytest.mark.parametrize(("bad", "text", "mend"), RULES, ids=[rule[1].partition(":")[0] for rule in RULES])
def test_a_contradiction_is_one_line_and_can_be_mended(bad: dict[str, Any], text: str, mend: dict[str, Any]) -> None:
    with pytest.raises(ParamError) as caught:
        build([PLAN, bad])
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)
    build([PLAN, bad, mend])


def test_keys_may_be_nested_or_dotted() -> None:
    nested = build([PLAN, {"recipe": {"soft": {"kind": "gelu"}, "ghost": {"kind": "1x1"}}}])
    assert nested == build([PLAN, {"recipe.soft": {"kind": "gelu"}, "recipe.ghost.kind": "1x1"}])
    assert (nested.recipe.soft.kind, nested.recipe.ghost.kind) == ("gelu", "1x1")
    assert build(PLAN).recipe == Recipe()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"recipe.soft.knd": "gelu"}, "did you mean 'recipe.soft.kind'"),
        ({"recipe": {"sofft": {"kind": "gelu"}}}, "unknown key 'recipe.sofft.kind'"),
        ({"recipe.soft": 3}, "recipe.soft: a section holds keys"),
        ({"recipe": 3}, "unknown key 'recipe'"),
        ({"recipe.soft.kind": "relu"}, "recipe.soft.kind"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ParamError) as caught:
        build([PLAN, given])
    assert text in str(caught.value)
