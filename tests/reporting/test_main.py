"""`python -m utils.reporting`: four commands, one-line errors, exit code 2."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from utils.reporting.__main__ import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two finished levels."""
    path = tmp_path / "lrr-0a"
    for level, density in enumerate((1.0, 1 / 3)):
        row = {
            "run": "lrr-0a", "seed": 0, "level": level, "target_density": density, "density": density,
            "sparsity": 1 - density, "kept_weights": 8, "prunable_weights": 10, "epochs": 2, "mask_digest": "ab",
            "final_test_acc": 90.25 + level, "seconds": 12.0,
        }  # fmt: skip
        folder = path / f"level_{level:02d}"
        folder.mkdir(parents=True)
        (folder / "row.json").write_text(json.dumps(row))
    (path / "config.yaml").write_text("run:\n  name: lrr\noptimizer:\n  lr: 0.1\n")
    return path


def test_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].split() == ["1", "0.3333", "8", "2", "91.25", "12"]


def test_mean(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mean", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["lrr", "1", "1", "90.25", "-"]


def test_csv_joins_the_config(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "all.csv"
    assert main(["csv", str(run), "--out", str(out)]) == 0
    with open(out, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [float(row["density"]) for row in rows] == [1.0, 1 / 3]
    assert {row["optimizer.lr"] for row in rows} == {"0.1"}
    assert {row["val_acc"] for row in rows} == {""}


def test_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run), "--out", str(tmp_path / "x.png")]) == 0
    assert str(tmp_path / "x.png") in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize("command", [["table"], ["mean"], ["plot", "--out", "x.png"], ["csv", "--out", "x.csv"]])
def test_a_missing_run_is_one_line_and_exit_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command[0], "nowhere", *command[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "nowhere" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line_and_exit_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["csv", str(run), "--out", str(tmp_path / "file" / "x.csv")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_metric_that_is_none_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mean", str(run), "--metric", "run"]) == 2
    assert "--metric=run" in capsys.readouterr().err


def test_the_module_runs_as_a_program(run: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "utils.reporting", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    done = subprocess.run([sys.executable, "-m", "utils.reporting", "table", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
