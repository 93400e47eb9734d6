"""torchrun starts workers again that were killed; a run goes on with another number of ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.faults import jobs
from tests.faults.jobs import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NO_NORM = ("--model.name=timm/test_convnext", "--data.image_size=32", "--training.epochs=3", "--optimizer.lr=0.02",
           "--levels.densities=0.5", "--run.checkpoint_minutes=none")  # fmt: skip
"""A network without BatchNorm, whose statistics are each rank's own: every number of ranks computes the same."""


def test_torchrun_starts_killed_workers_again(tmp_path: Path, whole: dict[str, Any]) -> None:
    job = Job(tmp_path / "runs", 2, launcher=("--standalone", "--max-restarts=3"))
    for number, victim, text in ((0, 1, " 2/4"), (1, 0, "level 1: density")):
        job.wait_for(lambda output, text=text: text in output.rpartition("resumed")[2])
        job.wait_for(lambda _, number=number: job.run.level(number).checkpoint.exists())
        os.kill(job.workers()[victim], signal.SIGKILL)
    assert job.finish().count("resumed level") == 2
    assert jobs.differences(jobs.everything(job.run), whole) == []


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_goes_on_with_the_same_batches(tmp_path: Path, before: int, after: int) -> None:
    base = (*jobs.TINY, *NO_NORM)
    plain = Job(tmp_path / "whole", before, base=base)
    plain.finish()
    job = Job(tmp_path / "moved", before, base=base)
    try:
        job.wait_for("1/3")
        time.sleep(0.3)
        os.kill(job.agent.pid, signal.SIGTERM)
        job.wait(60.0)
    finally:
        job.end()
    moved = Job(tmp_path / "moved", after, base=base)
    stored = f"(stored by {before} rank{'s'[: before > 1]}: not bit for bit on {after} rank{'s'[: after > 1]})"
    assert stored in moved.finish()
    difference, size = 0.0, 0.0
    for level in range(2):
        one, other = (load_file(each.run.level(level).weights) for each in (plain, moved))
        for name, values in one.items():
            difference = max(difference, float(abs(values - other[name]).max()))
            size = max(size, float(abs(values).max()))
        ours, theirs = (jobs.table(each.run.level(level).epochs) for each in (plain, moved))
        for mine, its in zip(ours, theirs, strict=True):
            assert float(its["train_loss"]) == pytest.approx(float(mine["train_loss"]), rel=1e-3)
    print(f"{before} to {after} ranks: weights differ by {difference:.1e} at most, of {size:.1f}")
    assert difference < 1e-3
