"""ProsPr against finite differences through training by torch's own optimizer, and two and three ranks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.masks import Masks
from utils.pruning.criteria.prospr import prospr
from utils.pruning.harness import cross_entropy
from utils.system.errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]
WORKER = Path(__file__).with_name("meta_worker.py")


def net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(4)
    middle: list[nn.Module] = [nn.BatchNorm2d(3)] if norm else []
    layers = [nn.Conv2d(2, 3, 3), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    sizes = [5 + i % 3 for i in range(count)]
    return [
        (
            torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def some_masks(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(2)
    return Masks({n: torch.rand(m.shape, generator=generator) < 0.7 for n, m in Masks.dense(model).items()})


def scores(model: nn.Module, masks: Masks, data: list[Batch], **options: object) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return prospr(model.train(), masks, data, cross_entropy, generator=generator, **options)  # type: ignore[arg-type]


class Training:
    """Loss after training from theta * m, m real: torch.optim.SGD on a copy; weights not in `masks` get no gradient."""

    def __init__(
        self, model: nn.Module, masks: Masks, data: list[Batch], steps: int, lr: float, momentum: float
    ) -> None:
        self.model, self.masks, self.data = model, masks, data
        self.steps, self.lr, self.momentum = steps, lr, momentum

    def trained(self, mask: dict[str, torch.Tensor]) -> nn.Module:
        model = copy.deepcopy(self.model).train()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in mask:
                parameters[name].mul_(mask[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        for step in range(self.steps):
            optimizer.zero_grad()
            self.loss(model, step).backward()
            for name, kept in self.masks.items():
                parameters[name].grad.mul_(kept)
            optimizer.step()
        return model

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        images, labels = self.data[step % len(self.data)]
        return functional.nll_loss(functional.log_softmax(model(images), 1), labels)

    def __call__(self, mask: dict[str, torch.Tensor]) -> float:
        return float(self.loss(self.trained(mask), self.steps).detach())


CASES = [
    (1, 0.5, 0.0, 2),
    (3, 0.2, 0.0, 4),
    (3, 0.2, 0.9, 4),
    (4, 0.3, 0.5, 2),  # two batches in turn
]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("steps", "lr", "momentum", "count"), CASES)
def test_meta_gradient_against_finite_differences(
    steps: int, lr: float, momentum: float, count: int, norm: bool
) -> None:
    model = net(norm)
    masks, data = some_masks(model), batches(count)
    found = scores(model, masks, data, steps=steps, lr=lr, momentum=momentum)
    after = Training(model, masks, data, steps, lr, momentum)
    generator = torch.Generator().manual_seed(9)
    pruned_and_scored = 0
    for name, mask in masks.items():
        for flat in torch.randperm(mask.numel(), generator=generator)[:15].tolist():
            ends = []
            for step in (1e-5, -1e-5):
                moved = {n: m.double() for n, m in masks.items()}
                moved[name].view(-1)[flat] += step
                ends.append(after(moved))
            expected = abs(ends[0] - ends[1]) / 2e-5
            assert float(found[name].view(-1)[flat]) == pytest.approx(expected, rel=1e-5, abs=1e-9)
            pruned_and_scored += not mask.view(-1)[flat] and expected > 1e-6
    assert pruned_and_scored


def test_first_order_takes_the_gradient_at_the_end() -> None:
    model = net()
    masks, data = some_masks(model), batches(4)
    found = scores(model, masks, data, first_order=True)
    training = Training(model, masks, data, 3, 0.1, 0.0)
    end = training.trained({n: m.double() for n, m in masks.items()})
    end.zero_grad()
    training.loss(end, 3).backward()
    full = scores(model, masks, data)
    for name, score in found.items():
        theta, gradient = dict(model.named_parameters())[name], dict(end.named_parameters())[name].grad
        assert torch.allclose(score, (theta * gradient).abs(), rtol=1e-10, atol=1e-14)
        assert not torch.allclose(score, full[name], rtol=1e-3)


def test_model_is_left_alone() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores(model, some_masks(model), batches(4), momentum=0.9)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_scores_are_in_the_weights_precision_and_repeat() -> None:
    model = net().float()
    data = [(images.float(), labels) for images, labels in batches(4)]
    first, second = (scores(model, Masks.dense(model), data) for _ in range(2))
    assert all(score.dtype == torch.float32 and torch.equal(score, second[name]) for name, score in first.items())


def test_frozen_parameters_do_not_train() -> None:
    model, masks, data = net(), Masks.dense(net()), batches(4)
    free = scores(model, masks, data)
    model[0].bias.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    assert not torch.allclose(free["4.weight"], scores(model, masks, data)["4.weight"], rtol=1e-6)


def test_wrong_requests_are_refused() -> None:
    model = net()
    for wrong in ({"steps": 0}, {"lr": -1.0}, {"momentum": 1.0}):
        with pytest.raises(UserError, match=r"pruning\.criterion_options"):
            scores(model, Masks.dense(model), batches(1), **wrong)
    with pytest.raises(ValueError, match="no scoring batches"):
        scores(model, Masks.dense(model), [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_16", "convnext_tiny", "mobilenet_v3_small", "resnext50_32x4d"])
def test_runs_on_large_networks(name: str) -> None:
    from utils import models

    model = models.build(f"torchvision/{name}", 4, image_size=32)
    data = [(torch.randn(2, 3, 32, 32), torch.tensor([i % 4, 1])) for i in range(2)]
    found = scores(model, Masks.dense(model), data, steps=1)
    assert all(bool(score.isfinite().all()) for score in found.values())
    assert any(bool(score.any()) for score in found.values())


def launched(ranks: int, out: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(WORKER), "prospr", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert all(row == rows[0] for row in rows)
    return dict(rows[0])


@pytest.mark.distributed
def test_ranks_take_the_same_steps(tmp_path: Path) -> None:
    """Five batches on one, two and three ranks: bit-equal scores, whoever holds which."""
    rows = []
    for ranks in (1, 2, 3):
        (tmp_path / str(ranks)).mkdir()
        rows.append(launched(ranks, tmp_path / str(ranks)))
    assert rows[0] == rows[1] == rows[2]
