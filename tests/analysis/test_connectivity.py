"""The line between two networks: its ends exact, points by hand, statistics anew, children of one checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.analysis.connectivity import barrier, between, connectivity_rows, estimate_statistics, plot_connectivity
from utils.system.errors import UserError


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 32, 4, generator=generator)
    return [(image, image[:, :3].argmax(1)) for image in images]


def score(model: nn.Module) -> dict[str, float]:
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        logits = model(images)
    acc = float((logits.argmax(1) == labels).float().mean())
    return {"loss": float(functional.cross_entropy(logits, labels)), "acc": 100 * acc}


def train(model: nn.Module, order: list[int]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()
    for number in order:
        images, labels = batches()[number]
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def test_points_by_hand_and_ends_bit_for_bit() -> None:
    a, b = network(0).state_dict(), network(1).state_dict()
    middle = between(a, b, 0.25)
    torch.testing.assert_close(middle["0.weight"], 0.75 * a["0.weight"] + 0.25 * b["0.weight"])
    assert middle["1.num_batches_tracked"].dtype == torch.int64
    for share, end in ((0.0, a), (1.0, b)):
        found = between(a, b, share)
        assert all(torch.equal(found[name], end[name]) for name in a if end[name].is_floating_point())
    a["0.weight"][0, 0] = float("inf")
    assert between(a, b, 1.0)["0.weight"].isfinite().all()


def test_statistics_are_the_mean_of_the_batches_own() -> None:
    model = network(0).eval()
    model[1].running_mean.fill_(100.0)
    estimate_statistics(model, batches())
    with torch.no_grad():
        outs = [model[0](images) for images, _ in batches()]
    torch.testing.assert_close(model[1].running_mean, torch.stack([out.mean(0) for out in outs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([out.var(0) for out in outs]).mean(0))
    assert (model.training, model[1].training, model[1].momentum) == (False, False, 0.1)
    with pytest.raises(UserError, match="no training images"):
        estimate_statistics(model, [])


def test_children_of_one_checkpoint_with_different_orders_are_connected_and_strangers_are_not(tmp_path: Path) -> None:
    parent = network(0)
    train(parent, [0, 1, 2, 3] * 20)
    children = [copy.deepcopy(parent), copy.deepcopy(parent)]
    for child, order in zip(children, ([0, 1, 2, 3], [3, 1, 0, 2]), strict=True):
        train(child, order * 10)
    stranger = network(7)
    train(stranger, [0, 1, 2, 3] * 30)
    states = [model.state_dict() for model in (*children, stranger)]

    def rows(a: int, b: int) -> list[dict[str, float]]:
        return connectivity_rows(network(3), states[a], states[b], 5, batches, score, score)

    near, far = rows(0, 1), rows(0, 2)
    assert [row["share"] for row in near] == [0, 0.25, 0.5, 0.75, 1]
    assert all(row["error"] == pytest.approx(100 - row["acc"]) for row in near)
    assert barrier(near) < 3
    assert barrier(far, "loss") > 3 * max(barrier(near, "loss"), 0.01)
    assert plot_connectivity(near, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_ends_are_the_networks_with_their_statistics_estimated_anew() -> None:
    a, b = network(0), network(1)
    found = connectivity_rows(network(3), a.state_dict(), b.state_dict(), 2, batches, score, score)
    for row, model in zip(found, (a, b), strict=True):
        estimate_statistics(model, batches())
        assert row["loss"] == pytest.approx(score(model.eval())["loss"], rel=1e-6)


def test_barrier_by_hand() -> None:
    assert barrier([{"error": 10.0}, {"error": 25.0}, {"error": 14.0}]) == 13.0


def test_refusals() -> None:
    a = network(0).state_dict()
    with pytest.raises(UserError, match=r"'0.weight' differs in shape"):
        between(a, a | {"0.weight": torch.zeros(2)}, 0.5)
    with pytest.raises(UserError, match=r"--points=1"):
        connectivity_rows(network(0), a, a, 1, batches, score, score)
