"""The matrix of layouts, modes and ways to mask: its rule against a hand's computation, its gates, its cells."""

from __future__ import annotations

import csv
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import matrix, matrix_arms
from benchmarks.matrix_arms import COMPILED, DENSE, EAGER, FOREACH, PRODUCT, SIEVE, arms_of, compiled_pass, foreach
from benchmarks.measure import Report
from benchmarks.step import Arm, Setting, check, leaks

SETTING = Setting("cifar/resnet20", 10, 32, 2, 0.1, torch.device("cpu"), torch.bfloat16)
SMALL = ["--model", "cifar/resnet20", "--batch", "2", "--modes", "eager", "--steps", "1", "--rounds", "1"]


def test_the_rule_of_the_compiled_pass_by_hand() -> None:
    weight, bias = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.5])
    momenta = [torch.zeros(3), torch.zeros(1)]
    masks = [torch.tensor([True, False, True]), None]
    for grads in ([0.5, float("inf"), 1.0], [1.0, float("nan"), 0.0]):
        given = [torch.tensor(grads), torch.tensor([2.0])]
        matrix_arms.masked_sgd_([weight, bias], given, momenta, masks, torch.tensor(0.5), 0.5, 0.25)
    # step 1: m = g + w / 4 = [0.75, 0.5] and 2.125, w = [0.625, -2.25] and -0.5625
    # step 2: m = m / 2 + g + w / 4 = [0.375 + 1.15625, 0.25 - 0.5625] and 1.0625 + 1.859375
    assert momenta[0].tolist() == [1.53125, 0.0, -0.3125]
    assert momenta[1].tolist() == [2.921875]
    assert weight.tolist() == [0.625 - 1.53125 / 2, 0.0, -2.25 + 0.3125 / 2]
    assert bias.tolist() == [-0.5625 - 2.921875 / 2]
    assert not torch.signbit(momenta[0][1])


def test_the_ways_of_this_measurement_follow_the_product(tmp_path: Path) -> None:
    report = Report("matrix", out=tmp_path)
    check(report, SETTING, "SGD", lambda given, _: foreach(given, 0.1), FOREACH)
    plain = replace(SETTING, dtype=torch.float32)
    arm, peer = (compiled_pass(plain, 0.1, compiler=lambda rule: rule), foreach(plain, 0.1))
    losses = [(float(arm()), float(peer())) for _ in range(4)]
    assert losses[0][0] == losses[0][1]
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=1e-3)
    assert losses[-1][0] != losses[0][0]
    assert arm.held is not None
    assert leaks(arm, arm.held.masks) == 0


def test_momenta_agree_and_one_that_is_lost_shows() -> None:
    arms = arms_of(SETTING, EAGER)
    assert list(arms) == [DENSE, PRODUCT, FOREACH, SIEVE]
    arms[COMPILED] = compiled_pass(SETTING, compiler=lambda rule: rule)
    for arm in arms.values():
        for _ in range(3):
            arm()
    assert matrix_arms.momentum_apart(arms) < 0.01
    for name in (FOREACH, SIEVE, COMPILED):
        spoilt = dict(arms)
        spoilt[name] = foreach(SETTING)
        spoilt[name]()  # one step where the others made three
        assert matrix_arms.momentum_apart(spoilt) > matrix._APART


@pytest.mark.parametrize("name", [DENSE, SIEVE])
def test_momenta_that_are_nan_do_not_agree(name: str) -> None:
    arms = arms_of(SETTING, EAGER)
    for arm in arms.values():
        arm()
    spoilt = arms[name]
    spoilt.optimizer.state[spoilt.model.get_parameter("fc.bias")]["momentum_buffer"][3] = float("nan")
    assert not matrix_arms.momentum_apart(arms) <= matrix._APART


def test_steps_that_do_nothing_end_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = matrix.ready

    def idle(arms: dict[str, Arm], mode: str) -> dict[str, object]:
        return {name: lambda: None for name in prepare(arms, mode)}

    monkeypatch.setattr(matrix, "ready", idle)
    with pytest.raises(SystemExit) as stopped:
        matrix.main([*SMALL, "--layouts", "nhwc", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert "a step moves the momenta (their norm grew by 1)" in capsys.readouterr().err


def test_every_size_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[object]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.append([size for one in inputs if isinstance(one, torch.Tensor) for size in one.shape])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=record))
    work = matrix_arms.compiled(torch.nn.Linear(3, 2))
    for batch in (4, 8, 16):
        work(torch.ones(batch, 3))
    assert [max(sizes, key=str) if not all(type(size) is int for size in sizes) else 0 for sizes in seen] == [0] * 3


def test_a_lost_mask_ends_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unmasked(setting: Setting) -> Arm:
        arm = foreach(setting)
        arm.update = arm.optimizer.step  # momenta take the gradients as they are
        return arm

    monkeypatch.setattr(matrix_arms, "foreach", unmasked)
    with pytest.raises(SystemExit) as stopped:
        matrix.main([*SMALL, "--layouts", "nhwc", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert f"NHWC, eager, {FOREACH}: pruned weights and momenta are 0.0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_cell_has_its_rows(tmp_path: Path) -> None:
    assert matrix.main([*SMALL, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "matrix.csv", encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if not row["measurement"].startswith("gate: ")]
    label = "cifar/resnet20, 32 px, batch 2, bfloat16, {}, eager"
    found = [(row["measurement"], row["arm"], row["peer"]) for row in rows[:-1]]
    names = (PRODUCT, FOREACH, SIEVE)
    assert found == [(label.format(layout), name, DENSE) for layout in ("NHWC", "NCHW") for name in names]
    ours = {row["measurement"]: float(row["arm_value"]) for row in rows[:-1] if row["arm"] == SIEVE}
    best = max(ours, key=ours.__getitem__)
    assert rows[-1]["measurement"] == f"fastest: {best}"
    assert float(rows[-1]["arm_value"]) == ours[best]


def test_cells_without_time_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main([*SMALL, "--limit", "0", "--out", str(tmp_path)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not measured, 0 s were over: ")]
    assert [line.split(", ")[-2:] for line in told] == [["NHWC", "eager"], ["NCHW", "eager"]]


def test_a_cell_that_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = matrix.compare

    def compare(report: Report, cell: matrix.Cell, steps: int, rounds: int) -> float:
        if cell.setting.channels_last:
            raise torch.OutOfMemoryError("too large")
        return whole(report, cell, steps, rounds)

    monkeypatch.setattr(matrix, "compare", compare)
    assert matrix.main([*SMALL, "--out", str(tmp_path)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not measured, ")]
    assert told == ["not measured, cpu has too little memory: cifar/resnet20, 32 px, batch 2, bfloat16, NHWC, eager"]
    assert "NCHW, eager" in (tmp_path / "matrix.csv").read_text(encoding="utf-8")


def test_a_cell_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = matrix.compare

    def compare(report: Report, cell: matrix.Cell, steps: int, rounds: int) -> float:
        if not cell.setting.channels_last:
            assert "NHWC, eager" in (tmp_path / "matrix.csv").read_text(encoding="utf-8")
            raise RuntimeError("no such kernel\nand a trace")
        return whole(report, cell, steps, rounds)

    monkeypatch.setattr(matrix, "compare", compare)
    assert matrix.main([*SMALL, "--out", str(tmp_path)]) == 1
    label = "cifar/resnet20, 32 px, batch 2, bfloat16, NCHW, eager"
    assert capsys.readouterr().err == f"failed, {label}: RuntimeError: no such kernel\n"


def test_graphs_need_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        matrix.main(["--modes", "graph", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "CUDA graphs need --device cuda" in capsys.readouterr().err


def test_every_round_begins_with_another_arm() -> None:
    ran: list[str] = []
    # A run must take some of the clock's time.
    steps = {name: lambda name=name: (ran.append(name), sum(range(20_000))) for name in "abc"}
    costs = matrix_arms.in_turn(steps, 2, 3, torch.device("cpu"))
    assert "".join(ran) == "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: len(values) for name, values in costs.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cells_on_a_gpu(tmp_path: Path) -> None:
    words = ["--device", "cuda", "--model", "cifar/resnet20", "--batch", "16", "--rounds", "2", "--out", str(tmp_path)]
    assert matrix.main(words) == 0
    with open(tmp_path / "matrix.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert sum(row["arm"] == COMPILED and row["ratio"] != "" for row in rows) == 6
