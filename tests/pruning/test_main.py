"""`python -m utils.pruning`: a mask file without training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import harness_utils
from utils import models
from utils.masks import Masks
from utils.pruning import prune
from utils.pruning.__main__ import main
from utils.pruning.criteria import criterion
from utils.system.registry import Entry, declared

COMMON = ["--data.name=cifar10", "--model.name=cifar/resnet20", "--pruning.allocation=erk", "--run.seed=3"]


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside the process group ends the process at once; here it ends the call."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    # Not os._exit itself, which ends the worker processes of others.
    monkeypatch.setattr(harness_utils, "os", SimpleNamespace(**{**vars(os), "_exit": leave}))


def run(*words: str) -> int:
    """`main` as a process: its exit code."""
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def test_writes_the_mask_and_the_layers_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    assert run(*COMMON, "--pruning.density=0.1", "--out", str(out)) == 0
    model = models.build("cifar/resnet20", 10, seed=3)
    masks = Masks.load(out, model)
    assert masks == prune(model, density=0.1, allocation="erk", seed=3)
    table = pd.read_csv(tmp_path / "m.layers.csv")
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
    assert run(*COMMON, *words) == 2
    assert capsys.readouterr().err == message + "\n"


def test_an_unreachable_request_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--pruning.density=0.001",
        "--pruning.layer_densities=conv1.weight=1",
        "--out",
        str(tmp_path / "m.safetensors"),
    ]
    assert run(*COMMON, *words) == 2
    assert "smallest feasible density is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_masks_in_one_folder_keep_their_tables(tmp_path: Path) -> None:
    for name, density in (("a", 0.5), ("b.2", 0.1)):
        assert run(*COMMON, f"--pruning.density={density}", "--out", str(tmp_path / f"{name}.safetensors")) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.safetensors", "a.layers.csv", "b.2.safetensors", "b.2.layers.csv"}
    kept = [pd.read_csv(tmp_path / f"{n}.layers.csv").query("prunable").kept.sum() for n in ("a", "b.2")]
    assert kept[0] > 4 * kept[1]


def reading(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Register the criterion `mine`, |w dL/dw| on training batches; returns the batches it is given."""
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def mine(model: Any, masks: Masks, batches: Any, loss: Any, *, generator: Any) -> dict[str, torch.Tensor]:
        seen.append(list(batches))
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(sum(loss(model, batch) for batch in batches), [parameters[n] for n in masks])
        return {n: (g * parameters[n]).detach().abs() for n, g in zip(masks, grads, strict=True)}

    criterion.load()
    monkeypatch.setitem(criterion._entries, "mine", Entry("mine", mine, {"batchnorm": "eval", "reads": "train"}))
    known = declared("criterion") | {"mine": ""}
    monkeypatch.setattr("utils.params.parsing.declared", lambda kind: known if kind == "criterion" else declared(kind))
    return seen


DIGITS = [
    "--data.name=digits", "--data.loader=device", "--model.name=cifar/resnet20",
    "--pruning.criterion=mine", "--pruning.samples_per_class=3", "--pruning.batch_size=8", "--run.threads=1",
]  # fmt: skip


def test_a_criterion_that_reads_data_is_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, out = reading(monkeypatch), tmp_path / "m.safetensors"
    assert run(*DIGITS, "--pruning.density=0.2", "--out", str(out)) == 0
    assert [len(images) for images, _ in seen[0]] == [8, 8, 7, 7]
    assert torch.cat([labels for _, labels in seen[0]]).bincount().tolist() == [3] * 10
    model = models.build("cifar/resnet20", 10, seed=0, image_size=16)
    assert Masks.load(out, model) == prune(model, density=0.2, criterion="mine", batches=seen[0])


def test_an_unreachable_request_is_refused_before_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = reading(monkeypatch)
    words = [*DIGITS, "--data.loader=ffcv", f"--data.betons={tmp_path / 'b'}", "--pruning.density=0.001"]
    assert run(*words, "--pruning.layer_densities=conv1.weight=1", "--out", str(tmp_path / "m.safetensors")) == 2
    assert "smallest feasible density is" in capsys.readouterr().err
    assert not seen
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(*COMMON, "--pruning.density=0.1", "--out", str(tmp_path / "file" / "m.safetensors")) == 2
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
