"""The criteria that read no data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.criteria import check_traits, criterion, layer_generator
from utils.pruning.harness import PruningHarness
from utils.system.registry import declared


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def scores(name: str, model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    return PruningHarness(Pruning(criterion=name), seed=seed).score(model, Masks.dense(model))


def test_every_criterion_is_declared_and_has_its_traits() -> None:
    assert list(declared("criterion")) == criterion.names()
    for name in criterion.names():
        check_traits(name, criterion.entry(name).traits)


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


@pytest.mark.parametrize("traits", [{}, {"batchnorm": "eval"}, {"batchnorm": "off", "reads": "train"}])
def test_traits_must_be_complete_and_known(traits: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="has traits"):
        check_traits("mine", traits)
