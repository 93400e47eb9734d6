"""The gates of the step's and the trainer's measurements, and that their arms train the same masked network."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from benchmarks import published, step, trainer, trainer_arms
from benchmarks.measure import Report
from benchmarks.step import (
    Arm,
    Setting,
    check,
    dense,
    forward_product,
    leaks,
    masked_late,
    network,
    ours,
    pruned_by_torch,
)
from benchmarks.trainer_arms import LEVEL, PUBLISHED, Work
from utils.system import memory

SETTING = Setting("cifar/resnet20", 10, 32, 2, 0.1, torch.device("cpu"), torch.bfloat16)
WORK = Work("cifar/resnet20", 10, 32, 2, "float32", "cpu", steps=2)

HOOKS = functools.partial(ours, one_pass=False)


@pytest.mark.parametrize("kind", step.OPTIMIZERS)
def test_gates_hold(tmp_path: Path, kind: str) -> None:
    report = Report("step", out=tmp_path)
    check(report, SETTING, kind, HOOKS, "hooks")
    if step.fits(SETTING, kind):
        check(report, SETTING, kind, ours, "one pass")
    assert [row.met for row in report.rows] == [True] * len(report.rows)


def let_go(setting: Setting, kind: str) -> Arm:
    arm = HOOKS(setting, kind)
    assert arm.held is not None
    arm.held.detach()
    return arm


def another_rate(setting: Setting, kind: str) -> Arm:
    return HOOKS(setting, kind, 0.05)


def not_a_number(setting: Setting, kind: str) -> Arm:
    arm = HOOKS(setting, kind)
    step_of = arm.update

    def update() -> None:
        step_of()
        arm.model.fc.bias.data[0] = float("nan")

    arm.update = update
    return arm


@pytest.mark.parametrize(
    ("spoilt", "words"), [(let_go, "are 0.0"), (another_rate, "trajectory"), (not_a_number, "apart by inf")]
)
def test_a_gate_that_fails_ends_the_measurement(tmp_path: Path, capsys, spoilt, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        check(Report("step", out=tmp_path), SETTING, "SGD", spoilt, "spoilt")
    assert stopped.value.code == 1
    assert words in capsys.readouterr().err


def test_a_single_negative_zero_is_a_leak() -> None:
    model, masks = network(SETTING)
    arm = Arm(SETTING, model, torch.optim.SGD(model.parameters()))
    assert leaks(arm, masks) == 0
    place = (~masks["fc.weight"]).nonzero()[0].tolist()
    model.fc.weight.data[tuple(place)] = -0.0
    assert leaks(arm, masks) == 1


def test_arms_start_with_the_same_weights_and_as_many_zeros() -> None:
    _, masks = network(SETTING)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    arms = [HOOKS(SETTING, "SGD"), *(make(SETTING, "SGD") for make in (dense, forward_product, pruned_by_torch))]
    losses = [arm() for arm in arms]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    for make in (HOOKS, dense, forward_product, pruned_by_torch):
        arm = make(SETTING, "AdamW", 0.0)
        for _ in range(2):
            arm()
        # A rate of 0 leaves every arm at these weights, however often it is timed.
        assert sum(int((p == 0).sum()) for n, p in arm.model.named_parameters() if "bn" not in n) >= zeros


def test_the_published_step_is_that_of_masked_layers() -> None:
    plain = Setting("cifar/resnet20", 10, 32, 2, 0.1, torch.device("cpu"), torch.float32, channels_last=False)
    model, masks = network(plain)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)  # pruned weights are not 0.0 here: the layers must leave them out
    reference, _ = network(plain)
    reference.load_state_dict(model.state_dict())
    masks.apply_(reference)
    published.multiply_in_forward(model, masks, published.Conv1dMask)
    images, labels = step.batch_of(plain)
    model.eval()
    torch.testing.assert_close(model(images), reference.eval()(images))
    before = model.conv1.weight.detach().clone()
    fresh, _ = network(plain)
    run = published.harness_step(fresh, masks, (images, labels), torch.float32, 0.1)
    run()
    assert not torch.equal(fresh.conv1.weight, before)
    assert isinstance(fresh.fc, published.Conv1dMask)


def test_arms_of_the_trainer_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(memory, "keep_freed", lambda: kept.append(1))
    trainer_arms.start(PUBLISHED, WORK)()
    assert kept == []
    level = trainer_arms.start(LEVEL, WORK)
    assert kept == [1]
    level()
    assert len(level.waited) == 1
    assert 0.0 <= level.waited[0] <= 1.0
    assert leaks(Arm(WORK.setting, level.trainer.model, level.optimizer), level.sparsity.masks) == 0


def test_plans_name_targets() -> None:
    cpu = trainer.plan(torch.device("cpu"), torch.bfloat16, None)
    assert [(work.model, target, work.compile) for work, target in cpu] == [
        ("cifar/resnet20", ">= 1.4", False),
        ("cifar/resnet18", ">= 1.3", False),
        ("cifar/resnet20", ">= 1.4", True),
        ("cifar/resnet18", ">= 1.3", True),
    ]
    gpu = trainer.plan(torch.device("cuda"), torch.bfloat16, 3)
    assert ("torchvision/resnet50", 224, ">= 1.8") in [(work.model, work.size, target) for work, target in gpu]
    assert {work.steps for work, _ in gpu} == {3}


def test_gradients_masked_before_the_step_give_the_same_bits() -> None:
    """What stands for the harness on a GPU."""
    late, hooks = HOOKS(SETTING, "SGD", 0.05), HOOKS(SETTING, "SGD", 0.05)
    masked_late(late)
    for _ in range(3):
        late()
        hooks()
    assert late.held is not None
    assert leaks(late, late.held.masks) == 0
    theirs = dict(hooks.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in late.model.named_parameters())
