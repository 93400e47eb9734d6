"""status.json: who may write what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.params.load import build
from utils.record import fail, run_dir
from utils.system.atomic import write_json


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"state": "running"}, {"state": "failed", "reason": "disk full"}),
        ({"state": "done"}, {"state": "done"}),
        ({"state": "failed", "reason": "loss became nan"}, {"state": "failed", "reason": "loss became nan"}),
    ],
)
def test_a_failure_marks_running_runs_and_the_first_reason_stays(tmp_path: Path, before: dict, after: dict) -> None:
    params = build({"run.root": str(tmp_path), "levels.count": 1})
    write_json(run_dir(params).status, before)
    fail(params, "disk full")
    assert json.loads(run_dir(params).status.read_text()) == after


def test_a_run_that_never_began_gets_no_directory(tmp_path: Path) -> None:
    fail(build({"run.root": str(tmp_path), "levels.count": 1}), "bad input")
    assert list(tmp_path.iterdir()) == []
