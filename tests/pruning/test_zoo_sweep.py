"""Every criterion on a torchvision ViT, ConvNeXt, MobileNetV3 and ResNeXt: exact counts, an unchanged model, paths."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from utils import models
from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning import PruningHarness, paths
from utils.pruning.criteria import criterion, traits_of

pytestmark = pytest.mark.slow

SHAPE = (3, 32, 32)
DENSITY = 0.2
OPTIONS = {"ntk_sap": ("draws=1", "samples=2"), "prospr": ("steps=2",)}
NETWORKS = ("torchvision/mobilenet_v3_small", "torchvision/resnext50_32x4d", "torchvision/convnext_tiny",
            "torchvision/vit_b_16", "torchvision/vit_b_16, random head")  # fmt: skip


@cache
def network(name: str) -> nn.Module:
    """torchvision's ViT starts with a head of zeros; `random head` draws it."""
    stock, comma, _ = name.partition(",")
    model = models.build(stock, 10, image_size=32)
    if comma:
        head = model.get_parameter("heads.head.weight")
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) / 50)
    return model


def harness(name: str, **more: object) -> PruningHarness:
    rounds = min(3, traits_of(name)["rounds"])
    section = Pruning(criterion=name, density=DENSITY, rounds=rounds, criterion_options=OPTIONS.get(name, ()), **more)  # type: ignore[arg-type]
    return PruningHarness(section, seed=0, input_shape=SHAPE)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(3, *SHAPE, generator=generator), torch.randint(10, (3,), generator=generator)) for _ in range(2)
    ]


@pytest.mark.parametrize("score", criterion.names())
@pytest.mark.parametrize("name", NETWORKS)
def test_every_criterion_prunes_it(name: str, score: str) -> None:
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    pruned = harness(score).prune(model, None, DENSITY, batches())
    masks = pruned.masks
    assert masks.kept == int(DENSITY * masks.total + 0.5)
    assert {n: tuple(m.shape) for n, m in masks.items()} == {n: tuple(m.shape) for n, m in Masks.dense(model).items()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(-1), before[key].view(-1)), key
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    found = paths.effective(model, masks, SHAPE)
    if not found.connected:
        _check_cut_is_the_scores(model, score, masks, found.dead)


def _check_cut_is_the_scores(model: nn.Module, name: str, masks: Masks, dead: tuple[str, ...]) -> None:
    """A cut is the criterion's will: layers are empty, and none of their weights scored above one that stayed."""
    assert dead
    if traits_of(name)["rounds"] > 1:
        return
    scores = harness(name).score(model, Masks.dense(model), batches())
    lowest = min(float(score[masks[key]].min()) for key, score in scores.items() if masks[key].any())
    assert all(float(scores[key].max()) <= lowest for key in dead)


@pytest.mark.parametrize("score", ["snip", "taylor", "fisher", "synflow"])
def test_a_head_of_zeros_gives_first_order_criteria_nothing_to_go_by(score: str) -> None:
    # Nothing before the head changes the loss to first order, and the head's own weights are 0.
    model = network("torchvision/vit_b_16")
    section = harness(score)
    scores = section.score(model, Masks.dense(model), batches())
    assert all(not value.any() for value in scores.values())
    assert any("equal" in note for note in section.prune(model, None, DENSITY, batches()).notes)


@pytest.mark.parametrize("score", ["grasp", "crop"])
def test_second_order_criteria_see_past_a_head_of_zeros_and_empty_it(score: str) -> None:
    model = network("torchvision/vit_b_16")
    pruned = harness(score).prune(model, None, DENSITY, batches())
    found = paths.effective(model, pruned.masks, SHAPE)
    assert found.dead == ("heads.head.weight",)
    assert not found.connected
    assert not pruned.notes
    kept = harness(score, last_layer="dense").prune(model, None, DENSITY, batches()).masks
    assert bool(kept["heads.head.weight"].all())
    assert paths.effective(model, kept, SHAPE).connected
