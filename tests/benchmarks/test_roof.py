"""The roof's arithmetic, the copies behind it, and the rows that the trainer's measurement makes of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import measure, roof, trainer
from benchmarks.measure import Report
from benchmarks.trainer_arms import Work

CPU = torch.device("cpu")


def test_the_roof_is_bandwidth_over_bytes() -> None:
    assert roof.roof(3.35e12, 335e6) == pytest.approx(10_000)
    found = {key: round(roof.roof(3e12, network.bytes)) for key, network in roof.NETWORKS.items()}
    assert found == {
        ("torchvision/resnet50", 224): 8955,
        ("torchvision/resnet18", 224): 40_000,
        ("cifar/resnet18", 32): 162_162,
    }


def test_copies_count_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = iter([1.0, 4.0, 2.0])

    def cost(work, clock) -> float:
        work()
        return next(costs)

    monkeypatch.setattr(measure, "cost", cost)
    assert roof.copy_bandwidth(CPU, size=1000, rounds=3) == pytest.approx(2 * 1000 * 8 / 2.0)


def test_a_copy_on_the_cpu_is_measured() -> None:
    # No memory moves less than a megabyte or more than a hundred terabytes a second.
    assert 1e6 < roof.copy_bandwidth(CPU, size=1 << 22, rounds=3) < 1e14


def test_rows_of_a_network(tmp_path: Path) -> None:
    report = Report("trainer", out=tmp_path)
    roof.add_rows(report, "r", "sieve", roof.Network(100e6, ">= 5,000"), speed=6000.0, bandwidth=1e12)
    speed, share = report.rows
    assert (speed.arm_value, speed.unit, speed.target, speed.met) == (6000.0, "images/s", ">= 5,000", True)
    assert share.arm_value == pytest.approx(0.6)
    assert "10,000 images/s" in share.measurement


def test_the_trainer_holds_its_level_against_the_roof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roof.NETWORKS, ("cifar/resnet20", 32), roof.Network(1e6, ">= 0.001"))
    work = Work("cifar/resnet20", 10, 32, 2, "float32", "cpu", steps=1)
    report = Report("trainer", out=tmp_path)
    trainer.compare(report, work, 1, "", bandwidth=1e9)
    level, (speed, share) = report.rows[-3], report.rows[-2:]
    assert speed.arm_value == level.arm_value
    assert speed.met is True
    assert share.arm_value == pytest.approx(speed.arm_value / 1000)


def test_the_gpu_plan_has_a_target_for_every_network() -> None:
    plan = trainer.plan(torch.device("cuda"), torch.bfloat16, None)
    assert {(work.model, work.size) for work, _ in plan} == set(roof.NETWORKS)
    assert {work.batch for work, _ in plan if work.size == 32} == {512}
