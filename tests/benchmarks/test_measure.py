"""Interleaved pairs, medians, targets, and the files a measurement leaves."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.measure import Pairs, Report, cheaper, faster, figure, interleave, median_and_spread, meets

STATED = ["measurement", "arm", "peer", "ratio", "spread", "target", "met", "hardware", "versions"]


def test_pairs_alternate_and_begin_with_each_side_in_turn() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> measure.Work:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    pairs = interleave(work("a", 1.0), work("b", 4.0), rounds=3, warm_up=2)
    assert "".join(order) == "abab" + "ab" + "ba" + "ab"
    assert pairs == Pairs((1.0,) * 3, (4.0,) * 3)
    assert pairs.costs == [0.25] * 3
    assert pairs.gains == [4.0] * 3


def test_work_without_a_cost_of_its_own_is_timed_by_the_clock() -> None:
    times = iter([10.0, 12.5])
    assert measure.cost(lambda: None, lambda: next(times)) == 2.5


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cost_that_means_nothing_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="give it more work"):
        measure.cost(lambda: seconds)


def test_the_ratio_is_the_median_of_the_pairs_ratios_not_a_ratio_of_medians() -> None:
    # A machine that is ten times slower in two of the pairs: each pair agrees, the medians of the sides do not.
    pairs = Pairs((1.0, 10.0, 10.0), (2.0, 2.0, 20.0))
    assert cheaper("m", "a", "b", pairs).ratio == 0.5
    assert faster("m", "a", "b", pairs).ratio == 2.0


def test_median_and_spread() -> None:
    assert median_and_spread([5.0]) == (5.0, 0.0)
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (">= 1.3", 1.3, True), (">= 1.3", 1.29, False), ("<= 1.00", 1.0, True), ("<= 1.00", 1.01, False),
        (">= 5,000 images/s", 4999, False), (">= 5,000 images/s", 5000, True), ("== 0", 0, True), ("< 1", 1, False),
        ("", 3.0, None),
    ],
)  # fmt: skip
def test_targets(target: str, value: float, met: bool | None) -> None:
    assert meets(target, value) is met


@pytest.mark.parametrize("target", ["1.3", "about 2", ">= fast"])
def test_a_target_that_compares_with_nothing_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="not a comparison"):
        meets(target, 1.0)


def test_values_are_medians_in_the_unit() -> None:
    pairs = Pairs((0.5, 0.25, 0.125), (1.0, 1.0, 1.0))
    row = faster("m", "a", "b", pairs, ">= 3", work=100)
    assert (row.arm_value, row.peer_value, row.ratio, row.spread, row.met) == (400.0, 100.0, 4.0, 1.5, True)
    row = cheaper("m", "a", "b", pairs, "<= 0.2", unit="ms")
    assert (row.arm_value, row.peer_value, row.met, row.pairs) == (250.0, 1000.0, False, 3)


def test_the_csv_has_the_columns_and_says_what_was_missed(tmp_path: Path) -> None:
    report = Report("some", packages=("pandas", "not-there-at-all"), out=tmp_path)
    report.gate("masks are exact", True, "0 off")
    report.add(cheaper("step", "fused", "dense", Pairs((1.0,), (2.0,)), "<= 0.4"))
    report.add(figure("bytes", "packed", 128.0, "bytes", "<= 200"))
    assert report.finish() == 0
    with open(tmp_path / "some.csv", newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
        assert list(reader.fieldnames or ())[: len(STATED)] == STATED
    assert [row["met"] for row in rows] == ["True", "False", "True"]
    assert [row["ratio"] for row in rows] == ["", "0.5", ""]
    assert {row["hardware"] for row in rows} == {measure.hardware()}
    assert "no not-there-at-all" in rows[0]["versions"]


def test_a_gate_that_fails_ends_with_exit_code_1_and_no_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("some", out=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report.gate("equal digests", False, "rank 1 differs")
    assert stopped.value.code == 1
    assert "gate failed: equal digests (rank 1 differs)" in capsys.readouterr().err
    assert not (tmp_path / "some.csv").exists()
