"""levels.csv is rebuilt from the rows, and broken rows are named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from utils.reporting.rows import read_rows, rebuild
from utils.system.errors import UserError
from utils.system.rundir import RunDir


def put(folder: Path, number: int, /, **changes: Any) -> Path:
    density = 0.8**number
    row = {
        "run": folder.name, "seed": 3, "level": number, "target_density": density, "density": density,
        "sparsity": 1 - density, "kept_weights": 8, "prunable_weights": 10, "epochs": 2, "mask_digest": "ab",
        "final_test_acc": 90.0 + number / 300,
    }  # fmt: skip
    path = folder / f"level_{number:02d}" / "row.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**row, **changes}), encoding="utf-8")
    return path


def test_rebuild_sorts_levels_and_keeps_every_digit(tmp_path: Path) -> None:
    for level in (10, 2, 0, 1, 100):
        put(tmp_path, level)
    rebuild(RunDir(tmp_path))
    with open(tmp_path / "levels.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["level"] for row in rows] == ["0", "1", "2", "10", "100"]
    assert [float(row["density"]) for row in rows] == [0.8**k for k in (0, 1, 2, 10, 100)]
    assert [float(row["final_test_acc"]) for row in rows] == [90.0 + k / 300 for k in (0, 1, 2, 10, 100)]
    assert {row["val_acc"] for row in rows} == {""}
    assert b"\r" not in (tmp_path / "levels.csv").read_bytes()


def test_unfinished_levels_are_left_out_and_old_files_replaced(tmp_path: Path) -> None:
    put(tmp_path, 0)
    (tmp_path / "level_01").mkdir()
    (tmp_path / "levels.csv").write_text("stale\n")
    assert [row["level"] for row in rebuild(RunDir(tmp_path))] == [0]
    lines = (tmp_path / "levels.csv").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("run,seed,level,target_density,density,sparsity,kept_weights,prunable_weights,epochs,")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["level_00", "level_01", "levels.csv"]


def test_rebuild_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    put(tmp_path, 0, run='quoted "name", with comma')
    rebuild(RunDir(tmp_path))
    first = (tmp_path / "levels.csv").read_bytes()
    rebuild(RunDir(tmp_path))
    assert (tmp_path / "levels.csv").read_bytes() == first
    with open(tmp_path / "levels.csv", newline="") as handle:
        assert next(csv.DictReader(handle))["run"] == 'quoted "name", with comma'


@pytest.mark.parametrize("text", ["", '{"run": "a", ', "[1, 2]", "null", '{"run": NaN}', "\x00\x00\x00"])
def test_a_broken_row_is_named_and_the_csv_stays(tmp_path: Path, text: str) -> None:
    put(tmp_path, 0)
    rebuild(RunDir(tmp_path))
    before = (tmp_path / "levels.csv").read_bytes()
    broken = put(tmp_path, 1)
    broken.write_text(text)
    with pytest.raises(UserError) as caught:
        rebuild(RunDir(tmp_path))
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "delete" in str(caught.value)
    assert (tmp_path / "levels.csv").read_bytes() == before


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    broken = put(tmp_path, 0)
    broken.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"row\.json"):
        read_rows(RunDir(tmp_path))


def test_a_row_of_another_level_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 1, level=2)
    with pytest.raises(UserError, match="belongs to level 2, not 1"):
        read_rows(RunDir(tmp_path))
