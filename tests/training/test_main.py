"""`python -m utils.training evaluate`: the numbers of row.json again, from checked files."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import levels_cases
from utils import files
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import RunDir
from utils.training.__main__ import main
from utils.training.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"data.val": 0.2, "data.subset": 120, "levels.densities": [1.0, 0.3]}


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """An entry point freezes what is alive when it has made its imports."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[RunDir, RunDir]:
    """A run, and one with averaged weights."""
    root = tmp_path_factory.mktemp("runs")
    plain = levels_cases.run(levels_cases.config(root, 1, **KEYS))
    return plain, levels_cases.run(levels_cases.config(root, 1, **KEYS, **{"training.ema": 0.5}))


def found(run: RunDir, level: int, average: bool = False):
    from harness_params import load

    params = load(["--config", str(run.config)])
    return evaluate(params, run.level(level), average, World(), torch.device("cpu"))


def test_a_level_gives_its_row_again(finished) -> None:
    for level in (0, 1):
        one = found(finished[0], level)
        row = json.loads(finished[0].level(level).row.read_text())
        assert one.agreement == "exact"
        assert one.measured["test_acc"] == row["final_test_acc"]
        assert one.measured["val_acc"] == row["val_acc"]
        assert one.measured["val_loss"] > 0
        assert one.density == row["density"]


def test_averages_are_what_the_row_of_their_run_holds(finished) -> None:
    averaged, raw = found(finished[1], 1, average=True), found(finished[1], 1)
    assert averaged.agreement == "exact"
    assert raw.agreement is None
    assert raw.measured["test_loss"] != averaged.measured["test_loss"]
    with pytest.raises(UserError, match=r"average\.safetensors: no such file"):
        found(finished[0], 1, average=True)


def copy(finished, tmp_path) -> RunDir:
    return RunDir(Path(shutil.copytree(finished[0].path, tmp_path / finished[0].path.name)))


def rewrite(run: RunDir, change, **metadata: str) -> None:
    path = run.level(1).weights
    tensors, old = files.load_tensors(path)
    change(tensors)
    files.save_tensors(path, tensors, {**old, **metadata})


def test_weights_that_do_not_belong_are_refused(finished, tmp_path) -> None:
    run = copy(finished, tmp_path)
    rewrite(run, lambda t: t["bn1.bias"].fill_(float("nan")))
    with pytest.raises(UserError, match=r"weights\.safetensors: 'bn1\.bias' holds NaN"):
        found(run, 1)
    rewrite(run, lambda t: t["bn1.bias"].fill_(0.0))
    assert found(run, 1).agreement == "differs"
    rewrite(run, lambda t: t["conv1.weight"].fill_(1.0))
    with pytest.raises(UserError, match=r"pruned weights of 'conv1\.weight' are not 0\.0"):
        found(run, 1)
    rewrite(run, lambda t: None, mask_digest="other")
    with pytest.raises(UserError, match="belongs to another mask"):
        found(run, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a run"),
        (["evaluate", "absent", "--level", "0"], "absent: not a run directory"),
        (["evaluate", "RUN"], "--level: names no level"),
        (["evaluate", "RUN", "--level", "-1"], "--level: names no level"),
        (["evaluate", "RUN", "--level", "7"], "has no level 7 (levels: 0, 1)"),
    ],
)
def test_wrong_input_is_one_line(finished, capsys, words, message) -> None:
    words = [str(finished[0].path) if word == "RUN" else word for word in words]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.distributed
def test_the_command_under_torchrun(finished, tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["utils.training", "evaluate", str(finished[0].path), "--level=1", f"--json={tmp_path / 'o.json'}"]
    before = {path: path.stat().st_mtime_ns for path in finished[0].path.rglob("*")}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["agreement"] in ("exact", "rounding")
    assert done.stdout.count("row.json: agrees") == 1
    assert before == {path: path.stat().st_mtime_ns for path in finished[0].path.rglob("*")}
