"""Runs on two ranks whose masks change while they train: every rank holds the same masks, and the run ends well."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.masks import Masks
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed

TOTAL = 270_896
"""Prunable weights of cifar/resnet20 for ten classes."""


def run(root: Path, *keys: str) -> tuple[RunDir, list[dict[str, str]]]:
    """The run and its rows. It compares the masks and weights of its ranks itself, and stops where they differ."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "harness.py"]
    base = [
        f"--run.root={root}",
        "--data.name=digits",
        "--data.loader=device",
        "--data.subset=160",
        "--data.val=0",
        "--model.name=cifar/resnet20",
        "--training.epochs=2",
        "--training.batch_size=40",
        "--training.precision=float32",
        "--run.device=cpu",
        "--pruning.density=0.2",
    ]
    done = subprocess.run(
        [*torchrun, *base, *keys],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    directory = RunDir(next(root.iterdir()))
    with open(directory.levels_csv, encoding="utf-8") as handle:
        return directory, list(csv.DictReader(handle))


def test_rigl_keeps_its_counts_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    keys = ["--pruning.moment=init", "--pruning.criterion=random", "--pruning.allocation=erk"]
    keys += ["--dynamic.method=rigl", "--dynamic.every=2", "--training.accumulation=2", "--training.clip=1"]
    directory, rows = run(tmp_path / "a", *keys)
    begin, end = Masks.load(directory.level(0).start_mask), Masks.load(directory.level(0).mask)
    assert begin.counts == end.counts
    assert begin.digest != end.digest
    assert (rows[0]["ranks"], rows[0]["dynamic"]) == ("2", "rigl")
    _, again = run(tmp_path / "b", *keys)
    digests = ("mask_digest", "weights_digest")
    assert [rows[0][name] for name in digests] == [again[0][name] for name in digests]


def test_an_early_pruning_by_data_is_decided_alike(tmp_path: Path) -> None:
    keys = ["--pruning.moment=early", "--early.threshold=100", "--pruning.criterion=snip"]
    keys += ["--pruning.samples_per_class=1", "--pruning.rounds=2", "--training.ema=0.9"]
    directory, rows = run(tmp_path / "a", *keys)
    assert (rows[0]["pruned_at_step"], rows[0]["epochs"], rows[0]["rounds"]) == ("4", "3", "2")
    assert int(rows[0]["kept_weights"]) == int(0.2 * TOTAL + 0.5)
    assert Masks.load(directory.level(0).start_mask).kept == TOTAL


def test_a_step_within_an_epoch_prunes_alike_with_statistics_that_differ_by_rank(tmp_path: Path) -> None:
    keys = ["--pruning.moment=step", "--pruning.step=3it", "--pruning.criterion=taylor", "--pruning.batches=1"]
    _, rows = run(tmp_path / "a", *keys)
    assert (rows[0]["pruned_at_step"], rows[0]["kept_weights"]) == ("3", str(int(0.2 * TOTAL + 0.5)))
