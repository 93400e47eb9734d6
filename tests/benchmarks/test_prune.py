"""The gates of the selection, pruning and level measurements, on small cases, and that they can fail."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import level, measure, prune, select
from benchmarks.measure import Report
from utils.masks import Masks, filled
from utils.system import memory


def test_the_selection_gates_hold_and_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("select", out=tmp_path)
    select.check(report, 20_000)
    assert len(report.rows) == 8
    monkeypatch.setattr(select.Case, "sorted_mask", lambda case: case.live)
    with pytest.raises(SystemExit):
        select.check(report, 20_000)


def test_a_small_selection_is_measured(tmp_path: Path) -> None:
    assert select.main(["--sizes", "30000", "--rounds", "1", "--sort-rounds", "1", "--out", str(tmp_path)]) == 0
    assert "k-th score" in (tmp_path / "select.csv").read_text(encoding="utf-8")


def test_scores_on_a_device_give_the_same_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    report = Report("select", out=tmp_path)
    select.check(report, 20_000, cpu)
    assert len(report.rows) == 8
    case = select.Case(20_000)
    made, named = case.masks(), select.DeviceCase(case, cpu).masks()
    assert made.keys() == named.keys()
    assert all(torch.equal(made[name], named[name]) for name in made)
    monkeypatch.setattr(select.DeviceCase, "masks", lambda case: case.live)
    with pytest.raises(SystemExit):
        select.check(report, 20_000, cpu)


def test_rows_of_scores_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("select", out=tmp_path)
    case = select.DeviceCase(select.Case(30_000), torch.device("cpu"))
    select.compare_device(report, "small", case, 1, first=True, limit="<= 1e6 ms")
    gate, *rows = report.rows
    assert gate.met is True
    assert [row.measurement for row in rows] == ["small, k-th score"] * 4 + ["small, masks"] * 2
    peers = ["torch.sort", "", "histogram of bits", "torch.kthvalue", "torch.sort, then >=", ""]
    assert [row.peer for row in rows] == peers
    assert [row.met for row in rows] == [None, True, None, None, None, None]
    assert rows[1].arm_value == rows[0].arm_value
    for way in ("sort", "histogram"):
        with monkeypatch.context() as spoilt:
            spoilt.setattr(select.DeviceCase, way, lambda case: -1.0)
            with pytest.raises(SystemExit):
                select.compare_device(report, "small", case, 1, first=False)


class Tiny(nn.Module):
    """A convolution, a norm and a linear layer, for images of SHAPE."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_synflow_of_the_harness_is_that_of_the_plain_loop() -> None:
    model = Tiny()
    found = prune.harness_masks(model, 7)
    assert found.kept == round(0.05 * found.total)
    for select_by in (prune.by_kthvalue, prune.by_sieve):
        assert prune.loop(model, 7, select_by, torch.float64) == found


def test_kthvalue_of_ties_is_filled_up_by_the_seeded_order() -> None:
    masks = Masks({"w": torch.ones(50, dtype=torch.bool)})
    scores = {"w": (torch.arange(50) // 10).float()}
    found = prune.by_kthvalue(scores, masks, 17)["w"]
    assert torch.equal(found, prune.by_sieve(scores, masks, 17)["w"])
    assert int(found.sum()) == 17


def test_seconds_stand_beside_a_comparison(tmp_path: Path) -> None:
    report = Report("prune", out=tmp_path)
    row = measure.quicker("x", "sieve", "peer", measure.Pairs((2.0, 2.2, 2.4), (4.0,) * 3), unit="s")
    prune.add_seconds(report, "x", "sieve", row, prune.SECONDS["torchvision/resnet50", 224, 100])
    (found,) = report.rows
    assert (found.arm_value, found.unit, found.met) == (pytest.approx(2.2), "s", True)


def test_masks_of_two_arms_are_told_apart() -> None:
    one = torch.arange(12) % 2 == 0
    other = one.clone()
    other[:3] = ~other[:3]
    assert prune.differing(Masks({"a": one, "b": one}), Masks({"a": other, "b": one})) == 3


def test_masks_that_differ_end_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "by_kthvalue", lambda scores, masks, keep: {n: ~masks[n] for n in scores})
    with pytest.raises(SystemExit):
        prune.compare_synflow(Report("prune", out=tmp_path), Tiny(), 2, 1)


def test_a_precision_that_the_flow_exceeds_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Tiny()
    with torch.no_grad():
        model.conv.weight.mul_(1e30)
        model.fc.weight.mul_(1e30)
    assert [prune.flows(model, dtype) for dtype in (torch.float32, torch.float64)] == [False, True]
    report = Report("prune", out=tmp_path)
    prune.compare_synflow(report, model, 3, 1)
    assert len(report.rows) == 2  # a gate and a ratio
    assert "float32 loop: left out" in capsys.readouterr().out


def test_another_network_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(memory, "keep_freed", lambda: kept.append(1))
    given = "--model cifar/resnet20 --size 24 --classes 12 --rounds 2 --pairs 1 --batch 2 --grasp-pairs 1"
    assert prune.main([*given.split(), "--out", str(tmp_path)]) == 0
    assert kept == [1]
    with open(tmp_path / "prune.csv", encoding="utf-8") as handle:
        measured = [row["measurement"] for row in csv.DictReader(handle)]
    synflow = [number for number, name in enumerate(measured) if "SynFlow" in name]
    grasp = [number for number, name in enumerate(measured) if "2 x 2 images" in name or "step of 4" in name]
    assert len(synflow) == 4
    assert len(grasp) == 3
    assert max(synflow) < min(grasp)


def test_products_agree_with_differences_of_the_gradient() -> None:
    assert prune.hessian_error(Tiny().double(), prune.images(4, 3)) < 1e-5


def test_memory_counts_what_lives_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(1000) + 1

    assert prune.peak_bytes(work) == 8000


def test_levels_compile_nothing_new_and_keep_exact_counts(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    watch, masks, alive = level.run_levels(tmp_path, "cifar/resnet20", 2)
    assert [one.kept for one in masks] == [270_896, 135_448]
    assert alive == 0
    assert watch.compiled[0] == watch.compiled[1]
    ((whole, parts),) = watch.changes()
    assert 0 < parts["selecting"] < whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_filled_clears_bits_where_a_product_would_not(dtype: torch.dtype) -> None:
    values = torch.tensor([[np.inf, -1.5, np.nan], [-0.0, 2.0, -np.inf]], dtype=dtype)
    mask = torch.tensor([[False, True, False], [False, True, True]])
    expected = torch.tensor([[0.0, -1.5, 0.0], [0.0, 2.0, -np.inf]], dtype=dtype)
    for given in (values, values.t().contiguous().t()):
        found = filled(given, mask)
        assert torch.equal(found, expected)
        assert not torch.signbit(found[~mask]).any()
    assert torch.isnan(values[0, 2])
