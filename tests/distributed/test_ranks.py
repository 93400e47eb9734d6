"""One, two and three ranks: the same losses, the same bits on every rank, errors that stop all."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed


def launch(ranks: int, *command: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run `command` under torchrun with one thread per rank."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*torchrun, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def steps(tmp_path: Path, ranks: int, norm: str, accumulation: int = 1) -> list[dict]:
    out = tmp_path / f"{ranks}-{norm}-{accumulation}"
    out.mkdir()
    done = launch(ranks, "tests/distributed/steps_worker.py", str(out), norm, str(accumulation))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def harness(ranks: int, root: Path, *keys: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    base = [
        f"--run.root={root}",
        "--data.name=digits",
        "--data.loader=device",
        "--data.subset=240",
        "--model.name=cifar/resnet20",
        "--training.epochs=1",
        "--training.batch_size=48",
        "--training.precision=float32",
        "--levels.densities=0.5,0.2",
    ]
    return launch(ranks, "harness.py", *base, *keys, timeout=timeout)


def table(root: Path) -> list[dict[str, str]]:
    timing = ("images_per_second", "seconds")
    with open(next(root.iterdir()) / "levels.csv", encoding="utf-8") as handle:
        return [{k: v for k, v in row.items() if k not in timing} for row in csv.DictReader(handle)]


def test_two_and_three_ranks_follow_one(tmp_path: Path) -> None:
    one = steps(tmp_path, 1, "plain")[0]
    assert len(one["losses"]) >= 20
    for ranks in (2, 3):
        many = steps(tmp_path, ranks, "plain")
        for rank in many:
            assert rank["losses"][:20] == pytest.approx(one["losses"][:20], rel=1e-4)
            assert rank["violations"] == []
        assert len({rank["weights"] for rank in many}) == 1
        assert len({rank["masks"] for rank in many}) == 1
        assert many[0]["masks"] == one["masks"]
        assert many[0]["row"]["test_acc"] == pytest.approx(one["row"]["test_acc"], abs=1.0)
        assert many[0]["row"] == many[1]["row"]


def test_accumulation_is_the_same_step(tmp_path: Path) -> None:
    plain, accumulated = steps(tmp_path, 2, "plain")[0], steps(tmp_path, 2, "plain", 2)[0]
    pairs = zip(accumulated["losses"][0::2], accumulated["losses"][1::2], strict=True)
    assert [(a + b) / 2 for a, b in pairs][:20] == pytest.approx(plain["losses"][:20], rel=1e-4)


def test_batchnorm_ranks_end_an_epoch_bit_equal(tmp_path: Path) -> None:
    ranks = steps(tmp_path, 3, "norm")
    assert len({rank["weights"] for rank in ranks}) == 1  # buffers are part of the digest


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_resumed_at_a_level_has_the_bits_of_the_whole_run(tmp_path: Path, ranks: int) -> None:
    assert harness(ranks, tmp_path / "whole").returncode == 0
    for only in range(3):
        done = harness(ranks, tmp_path / "parts", f"--levels.only={only}")
        assert done.returncode == 0, done.stderr[-3000:]
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    assert [row["ranks"] for row in table(tmp_path / "whole")] == [str(ranks)] * 3


def test_the_process_group_keeps_its_promises() -> None:
    done = launch(2, "tests/distributed/group_worker.py")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "keys",
    [
        ("--optimizer.name=adamw", "--optimizer.lr=0.002", "--training.precision=bfloat16"),
        ("--optimizer.lr=0.02", "--training.precision=float16"),
    ],
    ids=["adamw-bfloat16", "sgd-float16"],
)
def test_masks_hold_on_two_ranks_with_everything_on(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Clipping, accumulation, averaging, mixing and a mid-epoch rewind with its optimizer state, all at once."""
    more = ["--training.clip=0.5", "--training.accumulation=2", "--training.ema=0.9", "--data.mixup=0.2"]
    rewind = ["--levels.rewind=wr", "--levels.rewind_step=2it", "--levels.rewind_optimizer=true"]
    done = harness(2, tmp_path / "runs", *more, *rewind, *keys)
    assert done.returncode == 0, done.stderr[-3000:]
    for number, row in enumerate(table(tmp_path / "runs")):
        level = next((tmp_path / "runs").iterdir()) / f"level_{number:02d}"
        mask = load_file(level / "mask.safetensors")
        assert sum(int(bits.sum()) for bits in mask.values()) == int(row["kept_weights"])
        for name in ("weights", "average"):
            weights = load_file(level / f"{name}.safetensors")
            assert all(weights[key][bits == 0].eq(0).all() for key, bits in mask.items()), name


def test_parameters_that_a_forward_pass_skips(tmp_path: Path) -> None:
    ranks = steps(tmp_path, 2, "unused")
    assert len({rank["weights"] for rank in ranks}) == 1


def test_wrong_input_under_torchrun_is_told_once_and_writes_nothing(tmp_path: Path) -> None:
    done = harness(2, tmp_path / "runs", "--optimizer.lrr=0.1")
    assert done.returncode == 1  # torchrun's own code for any failed worker
    assert done.stderr.count("sieve: ") == 1
    assert "optimizer.lr" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_dies_stops_all_within_a_minute(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, time, torch\n"
        "import harness_params, harness_utils\n"
        "from utils.system import distributed\n"
        "params = harness_params.load(['--data.name=digits', '--data.loader=device', '--levels.count=1'])\n"
        "with harness_utils.process(params) as here:\n"
        "    if here.world.rank == 1:\n"
        "        raise RuntimeError('rank one is broken')\n"
        "    distributed.barrier()\n"
    )
    begin = time.monotonic()
    done = launch(2, str(worker))
    assert done.returncode != 0
    assert time.monotonic() - begin < 60
    assert "rank one is broken" in done.stderr


def test_all_ranks_step_in_one_way_where_one_lacks_the_native_update(tmp_path: Path) -> None:
    """Gradients that only some ranks mask as they come would be averaged into pruned places."""
    sparse = [
        "--config",
        "configs/quickstart.yaml",
        "--levels.rate=0.2",
        "--levels.count=none",
        "--pruning.moment=init",
    ]
    short = ["--pruning.density=0.2", "--training.epochs=1", "--data.subset=256", "--data.loader=device"]
    done = launch(2, "tests/distributed/unlike_worker.py", *sparse, *short, f"--run.root={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "masks take passes of their own, slower: of the native update, it is not built" in done.stdout + done.stderr
