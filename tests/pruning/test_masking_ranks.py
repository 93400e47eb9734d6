"""Two and three ranks with other data each: masks that change in training are the same on all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.masks import Masks

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed


def train(tmp_path: Path, ranks: int, kind: str) -> list[dict]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*torchrun, "tests/pruning/masking_worker.py", str(tmp_path), kind],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_rigl_updates_are_those_of_the_mean_gradient_on_every_rank(tmp_path: Path, ranks: int) -> None:
    first, *others = train(tmp_path, ranks, "rigl")
    assert all(other == first for other in others)
    assert first["violations"] == []
    assert first["updates"] == [2, 2]  # steps 4, 8 and 12, 16
    assert len(set(first["masks"])) == 5
    train(tmp_path, 1, "rigl")
    found, expected = (Masks.load(tmp_path / f"rigl-{n}-0.safetensors") for n in (ranks, 1))
    assert found.counts == expected.counts
    # Sums of gradients differ in their last bits, so of all weights hardly one may change places.
    differing = sum(int((found[name] ^ expected[name]).sum()) for name in found)
    assert differing <= 4


def test_a_pruning_within_an_epoch_scores_the_same_model_on_every_rank(tmp_path: Path) -> None:
    first, second = train(tmp_path, 2, "midrun")
    assert len(first["scored"]) == 1
    assert first == second
    assert first["violations"] == []
    assert first["masks"][15] == first["masks"][16] != first["masks"][17] == first["masks"][23]
    assert all(distance > 0 for distance in first["distances"])
