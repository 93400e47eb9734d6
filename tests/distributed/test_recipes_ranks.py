"""Recipes on two ranks follow one, skips' own weights included, and leave the same bits on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed


def steps(tmp_path: Path, ranks: int) -> list[dict]:
    out = tmp_path / str(ranks)
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "tests/distributed/recipes_worker.py", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def of_steps(losses: list[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(losses[0::2], losses[1::2], strict=True)]


def test_two_ranks_follow_one(tmp_path: Path) -> None:
    (one,), two = steps(tmp_path, 1), steps(tmp_path, 2)
    assert len(one["losses"]) == 2 * 13  # two micro-batches a step
    for rank in two:
        assert of_steps(rank["losses"]) == pytest.approx(of_steps(one["losses"]), rel=1e-4)
        assert rank["scales"] == pytest.approx(one["scales"], rel=1e-6)
        assert rank["moved"] > 1e-3
        assert rank["violations"] == []
    assert two[0]["weights"] == two[1]["weights"]
    assert two[0]["ghosts"] == two[1]["ghosts"]
    assert two[0]["scales"] == two[1]["scales"]
    assert any(abs(scale - 1.0) > 0.01 for scale in one["scales"].values())
