"""Gates and weights that train in turns: levels of a run, what a tick measures, and gates folded into norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.levels_cases import rows
from tests.pruning.structured_cases import SHAPE, Small, batch, small
from tests.test_structured_levels import run, structured
from utils import files, models, structured_stages
from utils.models.widths import WidthFile
from utils.params.plan import level_plan
from utils.pruning.structured import Channels
from utils.pruning.structured.learn import GatedModel
from utils.pruning.structured.ticktock import GateImportance, TockTask, check_foldable, fold_gates
from utils.reporting.verify import verify
from utils.system.errors import UserError
from utils.system.rundir import RunDir

KEYS = {
    "pruning__moment": "ticktock",
    "structured__criterion": "gates",
    "structured__gate_epochs": 1,
    "structured__tock_epochs": 2,
    "structured__keep": [0.7, 0.5],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run(structured(tmp_path_factory.mktemp("ticktock"), 1, **KEYS))


def test_the_plan_goes_tick_tock_and_trains_on_at_the_end() -> None:
    plan = level_plan(structured(Path("r"), 7, **KEYS))
    assert [level.work for level in plan] == ["train", "tick", "tock", "tick", "tock", "train"]
    assert [level.epochs for level in plan] == [7, 1, 2, 1, 2, 7]
    assert [level.density for level in plan] == [1.0, 1.0, 0.7, 0.7, 0.5, 0.5]
    assert [level.source for level in plan] == [None, 0, 1, 2, 3, 4]


def test_channels_go_after_every_tick(finished: RunDir) -> None:
    table = rows(finished.levels_csv)
    macs = [int(row["macs"]) for row in table]
    dense = int(table[0]["macs_dense"])
    assert macs[0] == macs[1] == dense
    assert macs[2] == macs[3] <= 0.7 * dense
    assert macs[4] == macs[5] <= 0.5 * dense
    assert macs[4] > 0.48 * dense
    assert {row["moment"] for row in table} == {"ticktock"}
    assert verify(finished) == []
    place = finished.level(5)
    network = models.rebuild(place.widths, place.weights)
    assert files.digest(files.state_of(network)) == table[5]["weights_digest"]


def test_a_tick_leaves_convolutions_alone_and_a_tock_does_not(finished: RunDir) -> None:
    before, tick, tock = (files.load_weights(finished.level(n).weights) for n in (0, 1, 2))
    convolutions = [name for name in before if "conv" in name or name.startswith("fc")]
    assert convolutions
    assert all(torch.equal(before[name], tick[name]) for name in convolutions)
    assert not torch.equal(before["layer1.0.bn1.weight"], tick["layer1.0.bn1.weight"])  # its gates are folded in
    units = WidthFile.load(finished.level(2).widths).facts["channels"]["layer3.0.conv1"]
    assert not torch.equal(tock["layer3.0.bn1.weight"], tick["layer3.0.bn1.weight"][units])
    assert not torch.equal(tock["fc.bias"], tick["fc.bias"])


def test_a_tick_has_a_rate_of_its_own_and_no_decay_and_a_tock_has_its_penalty(tmp_path: Path) -> None:
    """Of untrained weights, so that levels before the tick do not differ."""
    keys = {**KEYS, "structured__keep": [0.5], "levels__epochs": [0, 2, 1, 0]}
    one = run(structured(tmp_path / "one", 1, **keys, structured__tock_penalty=0.0))
    other = {"optimizer__lr": 0.01, "optimizer__weight_decay": 0.3, "structured__tock_penalty": 0.0}
    settings = [files.load_tensors(run(structured(tmp_path / "other", 1, **keys, **other)).level(1).gates)[0]]
    settings.append(files.load_tensors(one.level(1).gates)[0])
    assert files.digest(settings[0]) == files.digest(settings[1])
    faster = run(structured(tmp_path / "faster", 1, **keys, structured__gate_lr=0.5))
    assert files.digest(files.load_tensors(faster.level(1).gates)[0]) != files.digest(settings[1])
    pulled = run(structured(tmp_path / "pulled", 1, **keys, structured__tock_penalty=0.1))
    means = [float(rows(directory.level(2).epochs)[-1]["gates_mean"]) for directory in (one, pulled)]
    assert means[1] < means[0] - 0.005


def test_units_of_most_importance_stay(finished: RunDir) -> None:
    scores = files.load_tensors(finished.level(1).gates)[0]
    kept = WidthFile.load(finished.level(2).widths).facts["channels"]
    assert all(float(score.min()) >= 0.0 for score in scores.values())
    live = torch.cat([score[kept[name]] for name, score in scores.items() if len(kept[name]) > 1])
    dead = torch.cat([s[[u for u in range(len(s)) if u not in kept[name]]] for name, s in scores.items()])
    assert len(dead)
    assert float(live.min()) >= float(dead.max())


def gated_small(frozen: bool = True) -> GatedModel:
    model = small().double()
    return GatedModel(model, Channels.of(small(), SHAPE).open, SHAPE, frozen)


def test_importance_is_the_derivative_by_the_logarithm_of_a_gate() -> None:
    """A gate g behind a norm is the norm with g gamma and g beta, so g dL/dg is gamma dL/dgamma + beta dL/dbeta."""
    gated = gated_small().train()
    importance = GateImportance(gated, lambda: 8.0)
    with torch.no_grad():
        gated.gates["a"].copy_(torch.tensor([0.3, -0.5, 1.0, 1.2, 0.7, 0.9]))
    folded = copy.deepcopy(gated.model)
    for hooked in folded.modules():
        hooked._forward_hooks.clear()
    folded.requires_grad_(True)
    with torch.no_grad():
        folded.bn.weight.mul_(gated.gates["a"])
        folded.bn.bias.mul_(gated.gates["a"])
    expected = torch.zeros(6, dtype=torch.float64)
    for step in range(3):
        images, labels = batch(SHAPE, 3, 8, step)
        gated.zero_grad()
        (8.0 * functional.cross_entropy(gated(images.double()), labels)).backward()  # as if losses were scaled
        importance.after_backward(step)
        folded.zero_grad()
        functional.cross_entropy(folded.train()(images.double()), labels).backward()
        norm = folded.bn
        expected += (norm.weight.detach() * norm.weight.grad + norm.bias.detach() * norm.bias.grad).abs()
    assert torch.allclose(importance.sums["a"], expected, rtol=1e-5)
    assert float(expected.min()) > 0.0
    before = {name: total.clone() for name, total in importance.sums.items()}
    gated.gates["a"].grad[0] = float("inf")  # type: ignore[index]
    importance.after_backward(3)
    assert all(torch.equal(total, before[name]) for name, total in importance.sums.items())
    again = GateImportance(gated, lambda: 1.0)
    again.load_state(importance.state())
    assert torch.equal(again.sums["b"], importance.sums["b"])
    with pytest.raises(UserError, match=r"another pruning.moment"):
        again.load_state({})


def test_the_penalty_is_the_sum_of_gates_and_pulls_at_them() -> None:
    gated = gated_small(frozen=False).float().eval()
    images = batch(SHAPE, 3, 8)
    grads = []
    for penalty in (0.0, 0.25):
        gated.zero_grad()
        loss, logits = TockTask(gated, penalty, classes=3).loss(gated, images)
        count = len(gated.all())
        assert float(loss.detach()) == pytest.approx(
            float(functional.cross_entropy(logits.detach(), images[1])) + penalty * count, rel=1e-5
        )
        loss.backward()
        grads.append(gated.gates["a"].grad.clone())
        assert gated.model.a.weight.grad is not None
    assert torch.allclose(grads[1] - grads[0], torch.full((6,), 0.25), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_folded_gates_compute_the_same(training: bool) -> None:
    gated = gated_small().train(training)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in gated.values:
            value.copy_(torch.rand(value.shape, generator=generator) * 2 - 0.5)
        images = batch(SHAPE, 3)[0].double()
        expected = gated(images)
        model = fold_gates(gated)
        assert torch.allclose(model.train(training)(images), expected, atol=1e-10)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_is_refused_before_it_trains_where_gates_do_not_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: nn.Module, gated: Callable[[nn.Module], GatedModel], shape: tuple[int, ...]) -> None:
        raise UserError(f"asked of {shape}")

    monkeypatch.setattr(structured_stages, "check_foldable", refuse)
    with pytest.raises(UserError, match=r"asked of \(3, 16, 16\)"):
        run(structured(tmp_path, 1, **KEYS))
    assert not list(tmp_path.iterdir())


class NormWithActivation(nn.BatchNorm2d):
    """As timm has them; a gate behind the activation is no gate on the norm, where the gate may be negative."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(6)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(super().forward(x))


@pytest.mark.parametrize("activation", [functional.silu, functional.relu])
def test_gates_that_do_not_fold_are_refused(activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def gated(model: nn.Module) -> GatedModel:
        return GatedModel(model, Channels.of(Small(), SHAPE).open, SHAPE)

    check_foldable(small(), gated, SHAPE)
    odd = small()
    odd.bn = NormWithActivation(activation)
    with pytest.raises(UserError, match=r"ticktock: gates of this network do not fold into its norms"):
        check_foldable(odd, gated, SHAPE)
