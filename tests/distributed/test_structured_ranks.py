"""Structured runs on two ranks: the widths of one rank, by gates and by derivatives, and the same weights on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import files
from utils.models.widths import WidthFile
from utils.reporting.verify import verify
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed


def run(root: Path, ranks: int, *keys: str) -> RunDir:
    """The run, which compares masks, gates and weights of its ranks itself, and stops where they differ."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "harness.py",
    ]
    base = [
        f"--run.root={root}",
        "--data.name=digits",
        "--data.loader=device",
        "--data.subset=160",
        "--data.val=0",
        "--model.name=cifar/resnet20",
        "--training.epochs=1",
        "--training.batch_size=40",
        "--training.precision=float32",
        "--run.device=cpu",
        "--pruning.moment=init",
        "--structured.budget=macs",
        "--structured.keep=0.5",
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
    return RunDir(next(root.iterdir()))


@pytest.mark.parametrize("criterion", ["snap", "crop"])
def test_two_ranks_give_the_widths_of_one(criterion: str, tmp_path: Path) -> None:
    keys = [f"--structured.criterion={criterion}", "--pruning.samples_per_class=4", "--pruning.batch_size=10"]
    one, two = (run(tmp_path / str(ranks), ranks, *keys, "--training.epochs=0") for ranks in (1, 2))
    found = [WidthFile.load(directory.level(0).widths).facts for directory in (one, two)]
    assert found[0]["channels"] == found[1]["channels"]
    assert found[0]["macs"] == found[1]["macs"]


def test_ticks_and_tocks_and_masks_agree_over_ranks(tmp_path: Path) -> None:
    """The run compares gates, masks and weights of its ranks itself; here that it ends, and with what."""
    keys = ["--structured.criterion=gates", "--pruning.moment=ticktock", "--structured.gate_epochs=1"]
    turns = run(tmp_path / "a", 2, *keys, "--structured.tock_epochs=1")
    assert [turns.level(number).row.is_file() for number in range(4)] == [True] * 4
    then = run(tmp_path / "b", 2, "--pruning.density=0.4", "--pruning.criterion=snip", "--training.ema=0.9")
    masks = files.load_tensors(then.level(0).mask)[0]
    kept = sum(int((mask != 0).sum()) for mask in masks.values())
    assert kept == int(0.4 * sum(mask.numel() for mask in masks.values()) + 0.5)
    assert verify(turns) == verify(then) == []


def test_gates_are_the_same_on_both_ranks_and_a_rerun_gives_them_again(tmp_path: Path) -> None:
    keys = ["--structured.criterion=gates", "--structured.fresh=true", "--structured.coupled=false"]
    keys += ["--structured.gate_epochs=1", "--structured.gate_lr=0.1"]
    first, again = (run(tmp_path / name, 2, *keys) for name in ("a", "b"))
    gates = [files.digest(files.load_tensors(directory.level(0).gates)[0]) for directory in (first, again)]
    assert gates[0] == gates[1]
    assert first.level(1).widths.read_bytes() == again.level(1).widths.read_bytes()
    weights = [files.digest(files.load_weights(directory.level(1).weights)) for directory in (first, again)]
    assert weights[0] == weights[1]
