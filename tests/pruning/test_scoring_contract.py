"""What the harness sees to while any criterion scores: ranks, precision and modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning.harness import PruningHarness

BATCHES = [(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def scores(model: nn.Module, **section: object) -> dict[str, torch.Tensor]:
    harness = PruningHarness(Pruning(**section), seed=0, input_shape=(3, 8, 8))  # type: ignore[arg-type]
    return harness.score(model, Masks.dense(model), BATCHES)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "taylor"])
def test_synchronised_batchnorm_scores_as_batchnorm_of_the_rank_alone(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: object) -> None:
        raise AssertionError("this would wait for ranks that may have no batch")

    # Without a process group it would not synchronise anyway, so that equal scores alone show nothing.
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", wait)
    plain = net()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    expected = scores(plain, criterion=criterion)
    for name, score in scores(synchronised, criterion=criterion).items():
        assert torch.equal(score, expected[name])
    assert all("forward" not in module.__dict__ for module in synchronised.modules())


def test_autocast_around_it_changes_nothing() -> None:
    expected = scores(net(), criterion="snip")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores(net(), criterion="snip")
    assert all(torch.equal(score, expected[name]) for name, score in found.items())


def test_channels_are_scored_with_batchnorm_in_eval_mode() -> None:
    # In train mode the loss does not change with the scale of a filter before BatchNorm: its sum of w g is 0.
    def filter_sums(pattern: str) -> torch.Tensor:
        model = net()
        section = Pruning(criterion="snip", pattern=pattern)
        found = PruningHarness(section, seed=0).score(model, Masks.dense(model), BATCHES)["0.weight"]
        weight = model[0].weight.detach()
        model.train(pattern != "channel")
        loss = nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1])
        (grad,) = torch.autograd.grad(loss, [model[0].weight])
        assert torch.allclose(found, (weight * grad).abs(), rtol=1e-4, atol=1e-8)
        return (weight * grad).sum((1, 2, 3)).abs()

    assert filter_sums("weight").max() < 1e-3 * filter_sums("channel").max()
