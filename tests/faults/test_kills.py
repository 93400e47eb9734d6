"""SIGKILL at any moment loses nothing: the run that was killed again and again leaves the bits of the one that was not.

The long form, with its table of what was hit, is `python -m benchmarks.kills`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults import jobs, kills
from tests.faults.kills import Shot

pytestmark = pytest.mark.distributed

SHOTS = (
    Shot(0, "checkpoint written", "rank 0", 3, 0.003),
    Shot(1, "epochs.csv row", "everything", 2, 0.0),
    Shot(2, "pruning", "last rank", 1, 0.2),
    Shot(3, "training", "launcher", 2, 0.1),
    Shot(4, "row.json", "everything", 1, 0.0),
)


def test_a_run_killed_five_times_has_the_bits_of_the_whole_run(tmp_path: Path, whole: dict[str, Any]) -> None:
    for shot in SHOTS:
        assert kills.fire(shot, tmp_path / "killed", 2), shot
    killed = jobs.Job(tmp_path / "killed", 2)
    assert "resumed level" in killed.finish() or shot.aim == "row.json"
    assert jobs.differences(jobs.everything(killed.run), whole) == []
