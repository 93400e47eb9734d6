"""Packed reduction against DDP's own: the same gradients, exact zeros, no more bytes than entries kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.test_ranks import harness, launch, table

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_packed_gradients_are_those_of_ddp(tmp_path: Path, ranks: int) -> None:
    done = launch(ranks, "tests/distributed/reduction_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for report in reports:
        assert report["same"] == 1, "weights differ between ranks"
        assert report["unlike"].startswith("distributed.reduction differ between ranks (rank 0: dense")
        layouts = [step["buckets"] for step in report["steps"]]
        assert layouts[0] != layouts[1], "DDP made no new buckets: the test shows less than it should"
        assert len(layouts[1]) >= 3
        for step in report["steps"]:
            # Two numbers have one sum; with three the order counts.
            assert step["worst"] <= (0.0 if ranks == 2 else 1e-6 * step["largest"]), step
            assert step["largest"] > 0.0
            assert step["names"], step
            assert step["strides"], step
            if step["name"] == "dense gradients asked for":
                assert step["sent"] == step["all"], step
                assert step["pruned"] > 0, step
            else:
                assert step["sent"] == step["kept"] + step["all"] - step["covered"], step
                assert step["pruned"] == 0, step
    assert [step["sent"] for step in reports[0]["steps"]] == [step["sent"] for step in reports[1]["steps"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ("--training.accumulation=2", "--training.clip=0.5"),
        ("--training.precision=float16", "--training.channels_last=false"),
        ("--dynamic.method=rigl", "--dynamic.every=2", "--training.precision=bfloat16"),
        ("--dynamic.method=gmp", "--dynamic.every=2", "--pruning.moment=init", "--pruning.density=0.2"),
        ("--training.compile=true",),
    ],
    ids=["accumulation", "float16", "rigl", "gmp", "compile"],
)
def test_runs_of_two_ranks_are_bit_for_bit_those_of_dense_reduction(tmp_path: Path, keys: tuple[str, ...]) -> None:
    plan = ("--levels.densities=",) if any("gmp" in key for key in keys) else ()
    rows = []
    for choice in ("dense", "packed"):
        done = harness(2, tmp_path / choice, *keys, *plan, f"--distributed.reduction={choice}")
        assert done.returncode == 0, done.stderr[-3000:]
        rows.append(table(tmp_path / choice))
    assert rows[0] == rows[1]
    assert all(row["weights_digest"] for row in rows[0])


@pytest.mark.slow
def test_a_packed_run_of_three_ranks_resumed_at_a_level_has_its_bits(tmp_path: Path) -> None:
    packed = "--distributed.reduction=packed"
    assert harness(3, tmp_path / "whole", packed).returncode == 0
    for only in range(3):
        done = harness(3, tmp_path / "parts", packed, f"--levels.only={only}")
        assert done.returncode == 0, done.stderr[-3000:]
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
