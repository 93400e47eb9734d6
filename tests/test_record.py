"""status.json: who may write what."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from utils import data
from utils.data.order import Shard
from utils.params.load import build
from utils.record import Record, fail, run_dir
from utils.system.atomic import write_json
from utils.system.distributed import World
from utils.system.errors import UserError


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


def test_another_order_of_sums_is_refused_and_another_number_of_ranks_is_not(tmp_path: Path) -> None:
    params = build({"run.root": str(tmp_path), "levels.count": 1, "data.name": "digits", "data.loader": "device"})
    cpu = torch.device("cpu")
    loaders = data.build(params, Shard(batch_size=params.training.batch_size), cpu, False, 1)

    def begin(ranks: int, reduction: str) -> None:
        settled = replace(params, distributed=replace(params.distributed, reduction=reduction))
        Record(settled, loaders, torch.float32, World(0, ranks, 0, ranks), cpu).start()

    begin(3, "packed")
    begin(2, "dense")
    begin(3, "packed")
    with pytest.raises(UserError, match=r"distributed\.reduction was packed below 0\.5 when .* and is dense now"):
        begin(3, "dense")
