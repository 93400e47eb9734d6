"""The measurement of gradient reduction: its gates, what it subtracts, where packing stops paying."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import allreduce, hosts, scaling
from benchmarks.allreduce import pays_up_to
from benchmarks.measure import Report


class Ranks:
    """Two ranks that answer from a table, by the first two words asked."""

    def __init__(self, **answers: list[list[float]]) -> None:
        self.answers, self.asked = answers, list[str]()

    def ask(self, *words: str) -> list[list[float]]:
        self.asked.append(" ".join(words))
        return self.answers["_".join(words[:2]) if words[0] == "step" else words[0]]


@pytest.mark.parametrize(
    ("ratios", "density"),
    [
        ([(0.1, 0.2), (0.5, 0.8), (0.7, 1.2)], 0.6),
        ([(0.1, 0.2), (0.5, 1.0)], 0.5),
        ([(0.1, 1.1), (0.5, 0.9)], 0.0),
        ([(0.1, 0.2), (0.9, 0.99)], 0.9),
        ([], 0.0),
    ],
)
def test_where_packing_stops_paying(ratios: list[tuple[float, float]], density: float) -> None:
    assert pays_up_to(ratios) == pytest.approx(density)


def test_communication_is_what_a_pass_that_sends_nothing_does_not_take() -> None:
    ranks = Ranks(step_none=[[0.5], [1.0]], step_packed=[[1.5], [1.25]], step_dense=[[2.0], [3.0]])
    pairs = allreduce.communication(cast(Any, ranks), 0.1, 3)
    assert pairs.arm == (0.5,) * 3
    assert pairs.peer == (2.0,) * 3
    assert set(ranks.asked) == {"step none 0.1", "step packed 0.1", "step dense 0.1"}


@pytest.mark.parametrize("wrong", range(4))
def test_a_gate_that_fails_ends_it_with_1(wrong: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("allreduce", out=tmp_path)
    allreduce.check(report, cast(Any, Ranks(check=[[0.0] * 4] * 2)))
    bad = [0.0] * 4
    bad[wrong] = 1.0
    with pytest.raises(SystemExit) as ended:
        allreduce.check(report, cast(Any, Ranks(check=[[0.0] * 4, bad])))
    assert ended.value.code == 1
    assert "gate failed: density 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", range(4))
def test_a_gate_of_scaling_that_fails_ends_it_with_1(wrong: int, tmp_path: Path) -> None:
    report = Report("scaling", out=tmp_path)
    assert scaling.check(report, cast(Any, Ranks(check=[[0.0, 0.0, 0.0, 1e-7, 44.0]] * 2))) == 44.0
    bad = [0.0, 0.0, 0.0, 0.0, 44.0]
    bad[wrong] = 1.0
    with pytest.raises(SystemExit) as ended:
        scaling.check(report, cast(Any, Ranks(check=[[0.0] * 5, bad])))
    assert ended.value.code == 1


def test_without_namespaces_loopback_alone_is_measured_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Group(Ranks):
        def __init__(self, *words: Any, **place: Any) -> None:
            assert place["address"] == "127.0.0.1"
            super().__init__(check=[[0.0] * 4] * 2, step_none=[[1.0]], step_packed=[[2.0]], step_dense=[[3.0]])

        def __enter__(self) -> Group:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(hosts.shutil, "which", lambda name: name)
    monkeypatch.setattr(allreduce, "Ranks", Group)
    assert allreduce.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "no cable is measured, loopback alone: network namespaces need root\n" in text
    assert "gbit" not in (tmp_path / "allreduce.csv").read_text()
    assert text.count("loopback, density") >= 7
