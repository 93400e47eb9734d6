"""The quick start in short, as its command runs it: FFCV, two ranks, a table, a plot and the CSV."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.ffcv]


def quickstart(root: Path, name: str, *keys: str) -> tuple[str, list[dict[str, str]]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "harness.py"]
    config = ["--config", "configs/quickstart.yaml", f"--run.root={root / name}", f"--data.root={root / 'data'}"]
    done = subprocess.run(
        [*torchrun, *config, "--training.epochs=1", "--levels.count=3", *keys],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with open(next((root / name).iterdir()) / "levels.csv", encoding="utf-8") as handle:
        timing = ("images_per_second", "seconds")
        return done.stdout, [{k: v for k, v in row.items() if k not in timing} for row in csv.DictReader(handle)]


def test_the_run_ends_with_table_plot_and_csv_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed; set it up with make setup")
    printed, rows = quickstart(tmp_path, "one")
    run = next((tmp_path / "one").iterdir())
    assert f"plot:   {run / 'levels.png'}" in printed
    assert f"levels: {run / 'levels.csv'}" in printed
    assert (run / "levels.png").read_bytes().startswith(b"\x89PNG")
    assert [row["level"] for row in rows] == ["0", "1", "2"]
    assert {row["loader"] for row in rows} == {"ffcv"}
    assert len(list((tmp_path / "data" / "betons").glob("digits-*.beton"))) == 2
    # More loader threads change nothing: no pixel, no order, no bit of the result.
    assert quickstart(tmp_path, "two", "--data.workers=2")[1] == rows
