"""The criteria that read no data; traits and options of all."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.criteria import (
    DEFAULTS,
    criterion,
    filled,
    layer_generator,
    options_of,
    read_options,
    traits_of,
)
from utils.pruning.harness import PruningHarness
from utils.system.errors import UserError
from utils.system.registry import Entry, declared


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def scores(name: str, model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    return PruningHarness(Pruning(criterion=name), seed=seed).score(model, Masks.dense(model))


def add(monkeypatch: pytest.MonkeyPatch, function: Any, **traits: Any) -> None:
    """Register the criterion `mine` for one test."""
    criterion.load()
    monkeypatch.setitem(criterion._entries, "mine", Entry("mine", function, traits))


def test_every_criterion_is_declared_and_has_its_traits() -> None:
    assert list(declared("criterion")) == criterion.names()
    for name in criterion.names():
        traits = traits_of(name)
        assert traits["batchnorm"] in ("eval", "train", "none")
        assert traits["reads"] in ("nothing", "train")
        assert traits.keys() == DEFAULTS.keys() | {"batchnorm", "reads"}


def test_magnitude_is_the_absolute_value() -> None:
    model = net(7, 5, 3)
    for name, score in scores("magnitude", model).items():
        weight = dict(model.named_parameters())[name].detach().numpy()
        assert np.array_equal(score.numpy(), np.where(weight < 0, -weight, weight))


@pytest.mark.parametrize(
    ("given", "scored"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_magnitude_in_every_precision(given: torch.dtype, scored: torch.dtype) -> None:
    found = scores("magnitude", net(4, 4).to(given))
    assert found["0.weight"].dtype == scored


def test_random_depends_on_seed_and_name_only() -> None:
    torch.manual_seed(1)
    first = scores("random", net(6, 5, 4), seed=3)
    torch.manual_seed(2)
    longer = scores("random", net(6, 5, 4, 3), seed=3)
    other = scores("random", net(6, 5, 4), seed=4)
    for name, score in first.items():
        assert torch.equal(score, longer[name])
        assert not torch.equal(score, other[name])
    without = Masks.dense(net(6, 5, 4), exclude=["0.*"])
    alone = PruningHarness(Pruning(criterion="random"), seed=3).score(net(6, 5, 4), without)
    assert torch.equal(alone["1.weight"], first["1.weight"])
    square = scores("random", net(5, 5, 5), seed=3)
    assert not torch.equal(square["0.weight"], square["1.weight"])


def test_random_scores_are_uniform() -> None:
    score = scores("random", net(300, 300))["0.weight"]
    assert float(score.min()) >= 0.0
    assert float(score.max()) < 1.0
    assert float(score.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(score.var()) == pytest.approx(1 / 12, abs=0.005)


def test_layer_generator_leaves_its_source_alone() -> None:
    source = torch.Generator().manual_seed(9)
    before = source.get_state()
    a, b = (torch.rand(4, generator=layer_generator(source, "w")) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(source.get_state(), before)


GOOD = {"batchnorm": "eval", "reads": "train"}


@pytest.mark.parametrize("traits", [{}, {"batchnorm": "eval"}, {**GOOD, "batchnorm": "off"}, {**GOOD, "colour": "red"}])
def test_traits_must_be_complete_and_known(monkeypatch: pytest.MonkeyPatch, traits: dict[str, str]) -> None:
    add(monkeypatch, lambda *_, **__: {}, **traits)
    with pytest.raises(ValueError, match="has traits"):
        traits_of("mine")


def test_traits_left_out_are_those_of_a_one_shot_method(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, lambda *_, **__: {}, **GOOD, samples_per_class=7)
    rest = {"rounds": 1, "schedule": "exponential", "batches": None, "signed": False}
    assert traits_of("mine") == {**GOOD, "samples_per_class": 7, **rest}


PUBLISHED = {
    "synflow": {"reads": "nothing", "rounds": 100, "schedule": "exponential"},
    "ntk_sap": {"reads": "nothing", "rounds": 20, "schedule": "exponential"},
    "snip": {"reads": "train", "batchnorm": "train", "rounds": 1, "samples_per_class": 10},
    "grasp": {"reads": "train", "batchnorm": "train", "samples_per_class": 25, "signed": True},
    "crop": {"reads": "train", "batchnorm": "eval", "batches": 5},
    "taylor": {"reads": "train", "batchnorm": "eval"},
    "fisher": {"reads": "train", "batchnorm": "eval"},
    "prospr": {"reads": "train", "batchnorm": "train"},
    "magnitude": {"reads": "nothing"},
    "random": {"reads": "nothing"},
}


def test_the_traits_of_every_method_are_the_published_ones() -> None:
    assert criterion.names() == sorted(PUBLISHED)
    for name, expected in PUBLISHED.items():
        assert traits_of(name).items() >= expected.items()
    assert [name for name in criterion.names() if traits_of(name)["signed"]] == ["grasp"]


def with_options(
    *_: Any,
    generator: torch.Generator,
    input_shape: Any = None,
    whole: int = 3,
    real: float = 0.5,
    flag: bool = False,
    word: str = "a",
) -> dict[str, torch.Tensor]:
    return {}


def test_options_are_read_in_the_type_of_their_default(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, with_options, **GOOD)
    assert options_of("mine") == {"whole": 3, "real": 0.5, "flag": False, "word": "a"}
    assert filled("mine", input_shape=(1, 2, 3), everywhere=True) == {"input_shape": (1, 2, 3)}
    found = read_options("mine", ["whole=7", " real = 2e-3", "flag=True", "word=a=b"])
    assert found == {"whole": 7, "real": 2e-3, "flag": True, "word": "a=b"}
    assert [type(value) for value in found.values()] == [int, float, bool, str]
    assert read_options("mine", ["real=4"]) == {"real": 4.0}
    assert read_options("mine", []) == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["whle=7"], r"'whle=7' is not <option>=<value> of 'mine'; did you mean 'whole'\?"),
        (["whole"], "'whole' is not <option>=<value> of 'mine'"),
        (["generator=1"], "'generator=1' is not <option>=<value>"),
        (["input_shape=1"], "'input_shape=1' is not <option>=<value>"),
        (["whole=7", "real=1", "whole=7"], "'whole' is given twice; keep one of them"),
        (["whole=7.5"], "'whole=7.5': write a whole number"),
        (["real=much"], "'real=much': write a number"),
        (["real="], "'real=': write a number"),
        (["real=nan"], "'real=nan': write a number"),
        (["real=-inf"], "'real=-inf': write a number"),
        (["real=1e400"], "'real=1e400': write a number"),
        (["flag=1"], "'flag=1': write true or false"),
    ],
)
def test_wrong_options_are_refused(monkeypatch: pytest.MonkeyPatch, entries: list[str], message: str) -> None:
    add(monkeypatch, with_options, **GOOD)
    with pytest.raises(UserError, match=f"^pruning.criterion_options: {message}"):
        read_options("mine", entries)


def test_a_criterion_without_options_says_so() -> None:
    with pytest.raises(UserError, match="'temperature=1' is not <option>=<value> of 'snip'; it has none"):
        PruningHarness(Pruning(criterion="snip", criterion_options=("temperature=1",)), seed=0)


def test_options_reach_the_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def mine(model: Any, masks: Masks, *_: Any, generator: Any, input_shape: Any, power: float = 1.0) -> Any:
        seen.update(shape=input_shape, power=power)
        return {name: p.detach().abs() ** power for name, p in model.named_parameters() if name in masks}

    add(monkeypatch, mine, batchnorm="none", reads="nothing")
    section = Pruning(criterion="mine", criterion_options=("power=3",))
    PruningHarness(section, seed=0, input_shape=(1, 2, 3)).score(net(3, 2), Masks.dense(net(3, 2)))
    assert seen == {"shape": (1, 2, 3), "power": 3.0}
