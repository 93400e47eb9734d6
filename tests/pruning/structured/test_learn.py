"""Learning gates: where they act, what they change, and that nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.pruning.structured_cases import SHAPE, batch, channels, small
from utils.pruning.structured import Channels
from utils.pruning.structured.gates import gate_places
from utils.pruning.structured.learn import ClampGates, GatedModel, GateTask, checked_gates
from utils.system.errors import UserError


def test_gates_follow_the_norm_that_takes_the_layer_and_else_the_layer() -> None:
    found = Channels.of(small(), SHAPE)
    places = {
        name: [group for group, _ in entries]
        for name, entries in gate_places(small(), found.open, "norm", SHAPE).items()
    }
    assert places == {"bn": ["a"], "b": ["b"], "c": ["b"], "fc1": ["fc1"]}
    model, thin = channels("cifar/resnet20", 32)
    singles = [group for group in thin.open if group.single]
    assert set(gate_places(model, singles, "norm", (3, 32, 32))) == {
        f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in range(3)
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_gate_scales_its_channel_behind_the_norm() -> None:
    """A gate g behind a norm is the norm with gamma and beta times g."""
    model = small().eval()
    by_norm = copy.deepcopy(model)
    gated = GatedModel(model, [g for g in Channels.of(small(), SHAPE).open if g.name == "a"], SHAPE).eval()
    with torch.no_grad():
        gated.gates["a"].copy_(torch.tensor([0.0, 0.5, 1.0, 0.2, 0.0, 0.9]))
        by_norm.bn.weight.mul_(gated.gates["a"])
        by_norm.bn.bias.mul_(gated.gates["a"])
        images = batch(SHAPE, 3)[0]
        assert torch.allclose(gated(images), by_norm(images), atol=1e-6)


def test_only_gates_learn_and_they_stay_between_0_and_1() -> None:
    model = small()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    means = model.bn.running_mean.clone()
    gated = GatedModel(model, Channels.of(model, SHAPE).open, SHAPE).train()
    assert [name for name, p in gated.named_parameters() if p.requires_grad] == ["values.0", "values.1", "values.2"]
    task = GateTask(gated, target=0.2, penalty=5.0, classes=3)
    optimizer, clamp = torch.optim.Adam(gated.values, lr=0.3), ClampGates(gated)
    values = []
    for step in range(12):
        optimizer.zero_grad()
        loss, logits = task.loss(gated, batch(SHAPE, 3, 8, step))
        cross = nn.functional.cross_entropy(logits, batch(SHAPE, 3, 8, step)[1])
        mean = torch.cat([value.detach() for value in gated.values]).mean()
        assert float(loss.detach() - cross.detach()) == pytest.approx(5.0 * float((mean - 0.2) ** 2), abs=1e-5)
        loss.backward()
        optimizer.step()
        clamp.after_step(step)
        values.append(gated.all().detach().clone())
    assert all(0.0 <= float(v.min()) <= float(v.max()) <= 1.0 for v in values)
    assert float(values[-1].mean()) < 0.6
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
    assert not torch.equal(model.bn.running_mean, means)
    row = clamp.epoch_end(0)
    assert row["gates_mean"] == pytest.approx(float(values[-1].mean()))
    assert row["gates_open"] == pytest.approx(float((values[-1] > 0).float().mean()))


def test_gates_of_another_network_are_refused() -> None:
    found = Channels.of(small(), SHAPE)
    good = {group.name: torch.rand(group.size) for group in found.open}
    assert set(checked_gates(good, found.open, "g.safetensors")) == {"a", "b", "fc1"}
    with pytest.raises(UserError, match=r"g.safetensors: has no gates for 6 channels of 'a'"):
        checked_gates({**good, "a": torch.rand(7)}, found.open, "g.safetensors")
