"""NTK-SAP against finite differences in the mask of an independent objective, its draws, and two and three ranks."""

from __future__ import annotations

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
from utils.pruning.criteria import criterion
from utils.pruning.criteria.ntk_sap import normal, ntk_sap
from utils.pruning.harness import PruningHarness
from utils.system.errors import UserError

SEED, SHAPE = 11, (2, 4, 4)
WORKER = Path(__file__).with_name("meta_worker.py")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.bn = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)
        self.bn.running_mean.fill_(7.0)  # neither is to be used
        self.bn.running_var.fill_(float("inf"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(functional.softplus(self.bn(self.conv(x))).mean((2, 3)))


def scores(model: nn.Module, masks: Masks, seed: int = SEED, **options: object) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = {"input_shape": SHAPE, **options}
    return ntk_sap(model.eval(), masks, (), lambda *_: torch.zeros(()), generator=generator, **options)  # type: ignore[arg-type]


def some_masks(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(2)
    return Masks({n: torch.rand(m.shape, generator=generator) < 0.7 for n, m in Masks.dense(model).items()})


class Draw:
    """The objective of one draw as a function of the mask, from its definition and plain tensor operations."""

    def __init__(self, model: Small, masks: Masks, index: int, samples: int, epsilon: float) -> None:
        key = (SEED, masks.digest, index)
        self.model = model
        self.theta, self.noise = {}, {}
        for name in masks:
            weight = dict(model.named_parameters())[name].detach()
            z = normal(key, f"weight {name}", tuple(weight.shape), weight)
            mean = weight.sum() / weight.numel()
            deviation = (((weight - mean) ** 2).sum() / weight.numel()) ** 0.5
            self.theta[name] = mean + deviation * z
            self.noise[name] = epsilon * normal(key, f"noise {name}", tuple(weight.shape), weight)
        self.x = normal(key, "images", (samples, *SHAPE), weight)
        mask = {name: m.double() for name, m in masks.items()}
        inner = self.convolved(self.theta, mask)
        self.mean = inner.mean((0, 2, 3), keepdim=True)
        self.var = ((inner - self.mean) ** 2).mean((0, 2, 3), keepdim=True)

    def convolved(self, weights: dict[str, torch.Tensor], mask: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.conv2d(self.x, weights["conv.weight"] * mask["conv.weight"], self.model.conv.bias, padding=1)

    def output(self, weights: dict[str, torch.Tensor], mask: dict[str, torch.Tensor]) -> torch.Tensor:
        bn = self.model.bn
        y = (self.convolved(weights, mask) - self.mean) / (self.var + bn.eps) ** 0.5
        y = torch.log1p(torch.exp(y * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1))).mean((2, 3))
        return y @ (weights["fc.weight"] * mask["fc.weight"]).T + self.model.fc.bias

    @torch.no_grad()
    def __call__(self, mask: dict[str, torch.Tensor]) -> float:
        other = {name: self.theta[name] + self.noise[name] for name in self.theta}
        return float(((self.output(self.theta, mask) - self.output(other, mask)) ** 2).sum(1).mean())


@pytest.mark.parametrize("samples", [6, 70])
def test_derivative_in_the_mask_against_finite_differences(samples: int) -> None:
    model = Small().double()
    masks, draws, epsilon = some_masks(model), 3, 0.05
    found = scores(model, masks, draws=draws, samples=samples, epsilon=epsilon)
    objectives = [Draw(model, masks, index, samples, epsilon) for index in range(draws)]
    checked = 0
    for name, mask in masks.items():
        for place in map(tuple, torch.ones_like(mask).nonzero().tolist()):
            if not mask[place]:
                assert float(found[name][place]) == 0.0
                continue
            ends = []
            for step in (1e-4, -1e-4):
                moved = {n: m.double() for n, m in masks.items()}
                moved[name][place] += step
                ends.append(sum(objective(moved) for objective in objectives) / draws)
            expected = abs(ends[0] - ends[1]) / 2e-4
            assert float(found[name][place]) == pytest.approx(expected, rel=1e-5, abs=1e-10)
            checked += expected > 1e-6
    assert checked > 20


def test_draws_have_the_tensors_own_mean_and_deviation_and_are_fresh() -> None:
    from utils.pruning.criteria.ntk_sap import networks

    model = nn.Linear(300, 200)
    with torch.no_grad():
        model.weight.normal_(0.3, 0.02)
    masks = Masks.dense(model)
    plain, perturbed = networks(model, masks, (0, "x", 0), 0.01)
    other, _ = networks(model, masks, (0, "x", 1), 0.01)
    theta, noise = plain["weight"], perturbed["weight"] - plain["weight"]
    assert float(theta.mean()) == pytest.approx(0.3, abs=5e-4)
    assert float(theta.std()) == pytest.approx(0.02, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=3e-4)
    assert float(noise.std()) == pytest.approx(0.01, rel=0.02)
    for a, b in [(theta, other["weight"]), (theta, noise), (theta, model.weight.detach())]:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02


def test_scores_depend_on_seed_and_masks_and_not_on_the_weights_order() -> None:
    model = Small()
    masks = Masks.dense(model)
    first = scores(model, masks)
    assert all(torch.equal(first[n], s) for n, s in scores(model, masks).items())
    assert not torch.equal(first["fc.weight"], scores(model, masks, seed=1)["fc.weight"])
    fewer = {**masks, "conv.weight": masks["conv.weight"].index_fill(0, torch.tensor([0]), False)}
    assert not torch.equal(first["fc.weight"], scores(model, Masks(fewer))["fc.weight"])
    with torch.no_grad():  # a permutation keeps mean and deviation, and weights count in no other way
        model.fc.weight.copy_(model.fc.weight.flip(1))
    assert torch.allclose(first["fc.weight"], scores(model, masks)["fc.weight"], rtol=1e-4)


def test_model_and_batchnorm_are_left_alone() -> None:
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores(model, some_masks(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.bn._forward_pre_hooks


def test_wrong_options_are_refused() -> None:
    model = Small()
    with pytest.raises(UserError, match="input_shape"):
        scores(model, Masks.dense(model), input_shape=None)
    for wrong in ({"epsilon": 0.0}, {"draws": 0}, {"samples": 0}):
        with pytest.raises(UserError, match=r"pruning\.criterion_options"):
            scores(model, Masks.dense(model), **wrong)


def test_published_rounds() -> None:
    traits = criterion.entry("ntk_sap").traits
    assert (traits["rounds"], traits["schedule"], traits["reads"]) == (20, "exponential", "nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vit_b_16", "convnext_tiny", "mobilenet_v3_small", "resnext50_32x4d"],
)
def test_runs_on_large_networks(name: str) -> None:
    from utils import models

    model = models.build(f"torchvision/{name}", 4, image_size=32)
    if name == "vit_b_16":  # its head starts at zero: every output would be the same
        nn.init.normal_(model.get_parameter("heads.head.weight"), std=0.02)
    found = scores(model, Masks.dense(model), input_shape=(3, 32, 32), draws=1, samples=2)
    assert all(bool(score.isfinite().all()) and bool(score.any()) for score in found.values())


def launched(ranks: int, case: str, out: Path) -> dict[str, list[object]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(WORKER), case, str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert all(row == rows[0] for row in rows)
    return rows[0]


@pytest.mark.distributed
def test_ranks_share_the_draws_and_agree(tmp_path: Path) -> None:
    rows = {}
    for ranks in (1, 2, 3):
        (tmp_path / str(ranks)).mkdir()
        rows[ranks] = launched(ranks, "ntk_sap", tmp_path / str(ranks))
    assert rows[1]["mask"] == rows[2]["mask"] == rows[3]["mask"]
    for ranks in (2, 3):
        assert rows[ranks]["scores"] == pytest.approx(rows[1]["scores"], rel=1e-5)


def test_through_the_harness() -> None:
    from utils.params.pruning import Pruning

    model = Small()
    harness = PruningHarness(Pruning(criterion="ntk_sap", rounds=3), seed=0, input_shape=SHAPE)
    pruned = harness.prune(model, None, 0.3)
    assert pruned.masks.kept == int(0.3 * pruned.masks.total + 0.5)
