"""Two and three ranks stopped in mid-level by one of them: all stop after the same step and go on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_ranks import launch

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stop_of_one_rank_stops_all_and_nothing_is_lost(tmp_path: Path, ranks: int) -> None:
    done = launch(ranks, "tests/distributed/resume_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
