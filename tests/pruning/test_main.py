"""`python -m utils.pruning`: a mask file without training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from utils import models
from utils.masks import Masks
from utils.pruning import prune
from utils.pruning.__main__ import main

COMMON = ["--data.name=cifar10", "--model.name=cifar/resnet20", "--pruning.allocation=erk", "--run.seed=3"]


def test_writes_the_mask_and_the_layers_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    assert main([*COMMON, "--pruning.density=0.1", "--out", str(out)]) == 0
    model = models.build("cifar/resnet20", 10, seed=3)
    masks = Masks.load(out, model)
    assert masks == prune(model, density=0.1, allocation="erk", seed=3)
    table = pd.read_csv(tmp_path / "layers.csv")
    assert table[table.prunable].kept.sum() == masks.kept == int(0.1 * masks.total + 0.5)
    printed = capsys.readouterr().out
    assert f"{masks.kept:,}" in printed
    assert masks.digest in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pruning.density=0.1"], "sieve: --out: names no mask file; write --out m.safetensors"),
        (["--pruning.density=0.1", "--out", "m.pt"], "sieve: --out: names no mask file; write --out m.safetensors"),
        (["--out=m.safetensors"], "sieve: pruning.density: not set; write --pruning.density=0.1"),
    ],
)
def test_an_incomplete_request_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMON, *words]) == 2
    assert capsys.readouterr().err == message + "\n"


def test_an_unreachable_request_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--pruning.density=0.001",
        "--pruning.layer_densities=conv1.weight=1",
        "--out",
        str(tmp_path / "m.safetensors"),
    ]
    assert main([*COMMON, *words]) == 2
    assert "smallest feasible density is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([*COMMON, "--pruning.density=0.1", "--out", str(tmp_path / "file" / "m.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sieve: ")
    assert str(tmp_path / "file") in line


def test_a_mistyped_key_is_refused_before_torch_is_imported() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['x', '--pruning.densty=0.1']\n"
        "try: runpy.run_module('utils.pruning', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == "False\n"
    assert "pruning.density" in done.stderr
    assert len(done.stderr.splitlines()) == 1
