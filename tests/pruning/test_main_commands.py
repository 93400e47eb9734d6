"""`python -m utils.pruning`: criteria and saved scores on digits, the commands on mask files, and wrong input."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import harness_utils
from utils import models
from utils.masks import Masks
from utils.pruning import prune
from utils.pruning.__main__ import main
from utils.pruning.alone import build_model

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ["--data.name=digits", "--data.loader=device", "--model.name=cifar/resnet20", "--pruning.allocation=erk"]


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside the process group ends the process at once; here it ends the call."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    # Not os._exit itself, which ends the worker processes of others.
    monkeypatch.setattr(harness_utils, "os", SimpleNamespace(**{**vars(os), "_exit": leave}))


def run(*words: str | Path) -> int:
    """`main` as a process: its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *words: str | Path) -> str:
    """What `main` says on the one line with which it refuses `words`, having written nothing into `folder`."""
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert run(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("sieve: ")
    assert sorted(folder.iterdir()) == before
    return line


def network() -> torch.nn.Module:
    return models.build("cifar/resnet20", 10, seed=0, image_size=16)


@pytest.mark.parametrize("name", ["synflow", "snip"])
def test_prunes_and_reports(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.safetensors"
    rounds = {"synflow": 3, "snip": 1}[name]
    words = [*DIGITS, f"--pruning.criterion={name}", f"--pruning.rounds={rounds}", "--pruning.samples_per_class=2"]
    words = words[:-1] if name == "synflow" else words
    assert run(*words, "--pruning.density=0.1", "--out", out) == 0
    said = capsys.readouterr().out
    model = network()
    masks = Masks.load(out, model)
    assert masks.kept == int(0.1 * masks.total + 0.5)
    assert masks.digest in said
    assert (f"{tmp_path / 'm.layers.csv'}" in said) == (tmp_path / "m.layers.csv").exists()
    files = {"m.safetensors", "m.layers.csv"} | ({"m.rounds.csv"} if rounds > 1 else set())
    assert {path.name for path in tmp_path.iterdir()} == files
    if name == "synflow":
        options: dict[str, Any] = {"criterion": name, "allocation": "erk", "rounds": 3, "input_shape": (3, 16, 16)}
        assert masks == prune(model, density=0.1, **options)
        rows = list(csv.DictReader((tmp_path / "m.rounds.csv").open()))
        assert len(rows) == 3
        assert "0.464159" in said  # 0.1 to the power of 1/3


def scored(tmp_path: Path, out: str, density: float, *more: str) -> int:
    words = [*DIGITS, "--pruning.criterion=snip", "--pruning.samples_per_class=2", f"--pruning.density={density}"]
    return run(*words, *more, "--scores", tmp_path / "s.safetensors", "--out", tmp_path / f"{out}.safetensors")


def test_one_scoring_serves_two_densities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored(tmp_path, "half", 0.5) == 0
    scores = load_file(tmp_path / "s.safetensors")
    before = (tmp_path / "s.safetensors").read_bytes()
    # From here on no data is opened at all.
    monkeypatch.setattr("utils.data.build", lambda *_, **__: pytest.fail("the data is read again"))
    assert scored(tmp_path, "tenth", 0.1) == 0
    assert (tmp_path / "s.safetensors").read_bytes() == before
    half, tenth = (Masks.load(tmp_path / f"{name}.safetensors", network()) for name in ("half", "tenth"))
    for masks, density in ((half, 0.5), (tenth, 0.1)):
        assert masks.kept == int(density * masks.total + 0.5)
        for name, mask in masks.items():
            if 0 < masks.counts[name] < mask.numel():
                assert scores[name][mask].min() >= scores[name][~mask].max()
    assert tenth <= half
    # Other selections of the same scores are allowed too.
    assert scored(tmp_path, "worst", 0.1, "--pruning.control=invert") == 0
    assert not Masks.load(tmp_path / "worst.safetensors") <= half


def test_scores_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(tmp_path, "half", 0.5) == 0
    words = [
        *DIGITS,
        "--pruning.density=0.1",
        "--scores",
        tmp_path / "s.safetensors",
        "--out",
        tmp_path / "m.safetensors",
    ]
    snip = ["--pruning.criterion=snip", "--pruning.samples_per_class=2"]
    for more, what in (
        (["--pruning.criterion=taylor", "--pruning.samples_per_class=2"], "criterion 'snip', not 'taylor'"),
        ([*snip, "--run.seed=1"], "seed '0', not '1'"),
        ([*snip, "--model.name=cifar/resnet32"], "masks "),
        ([*snip, "--data.image_size=8"], "data "),
        (["--pruning.criterion=snip", "--pruning.samples_per_class=3"], "data "),
        ([*snip, "--data.subset=500"], "data "),
        ([*snip, "--data.split_seed=7"], "data "),
        ([*snip, "--pruning.exclude=conv1.*"], "masks "),
        ([*snip, f"--pruning.mask_file={tmp_path / 'half.safetensors'}"], "masks "),
    ):
        line = refused(capsys, tmp_path, *words, *more)
        assert f"s.safetensors: scores of {what}" in line, line
        assert "name another --scores file" in line
    for more, what in (
        ([*snip, "--pruning.rounds=2"], "--scores: only for one round"),
        ([*snip, "--pruning.control=shuffle"], "--scores: only for one round"),
    ):
        assert what in refused(capsys, tmp_path, *words, *more)
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "half.safetensors").read_bytes())
    assert "s.safetensors: scores of criterion None, not 'snip'" in refused(capsys, tmp_path, *words, *snip)


def test_equal_scores_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head of zeros, as torchvision's vision transformers start with."""
    zeros = network()
    torch.nn.init.zeros_(zeros.get_parameter("fc.weight"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.pruning.alone.build_model", lambda params: zeros)
        assert scored(tmp_path, "m", 0.5) == 0
        fresh = capsys.readouterr().out
        assert scored(tmp_path, "again", 0.4) == 0
        again = capsys.readouterr().out
    for text in (fresh, again):
        (line,) = [line for line in text.splitlines() if line.startswith("all scores of ")]
        assert "pruning.criterion=snip were equal" in line


def test_a_cut_network_is_refused_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *DIGITS,
        "--pruning.layer_densities=conv1.weight=0",
        "--pruning.density=0.5",
        "--out",
        tmp_path / "m.safetensors",
    ]
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no path is left from input to output (emptied: conv1.weight)" in line
    assert not list(tmp_path.glob("m.*"))
    assert run(*words, "--pruning.allow_disconnected=true") == 0
    assert Masks.load(tmp_path / "m.safetensors").counts["conv1.weight"] == 0


@pytest.fixture
def masks(tmp_path: Path) -> tuple[Path, Masks]:
    found = prune(network(), density=0.3, criterion="random")
    found.save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors", found


def test_inspect(masks: tuple[Path, Masks], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = masks
    other = prune(network(), density=0.7)
    other.save(tmp_path / "n.safetensors")
    assert run("inspect", path, tmp_path / "n.safetensors") == 0
    said = capsys.readouterr().out
    assert f"{found.kept:,}" in said
    assert f"{other.kept:,}" in said
    assert found.digest in said
    assert other.digest in said
    assert said.count("layer1.0.conv1.weight") == 2


@pytest.mark.parametrize("form", ["zeros", "buffers", "reparametrized"])
def test_convert(form: str, masks: tuple[Path, Masks], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = masks
    state = dict(network().state_dict())
    for name, mask in found.items():
        if form == "zeros":
            state[name] = state[name] * mask
        elif form == "buffers":
            state[name.removesuffix("weight") + "mask"] = mask.float()
        else:
            state[f"{name}_orig"] = state.pop(name)
            state[f"{name}_mask"] = mask.float()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "other.pt")
    out = tmp_path / "c.safetensors"
    assert run("convert", tmp_path / "other.pt", "--out", out, "--model.name=cifar/resnet20", "--data.name=digits") == 0
    assert Masks.load(out, network()) == found
    assert found.digest in capsys.readouterr().out
    assert run("convert", tmp_path / "other.pt", "--out", tmp_path / "d.safetensors") == 0
    assert Masks.load(tmp_path / "d.safetensors", network()) == found


def test_compare(masks: tuple[Path, Masks], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = masks
    assert run("compare", path, path) == 0
    same = capsys.readouterr().out
    other = prune(network(), density=0.3, criterion="random", seed=1)
    other.save(tmp_path / "n.safetensors")
    assert run("compare", path, tmp_path / "n.safetensors") == 0
    common = sum(int((found[name] & other[name]).sum()) for name in found)
    said = capsys.readouterr().out
    assert f"{common:,}" in said
    assert said != same


def test_quality(masks: tuple[Path, Masks], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = masks
    words = ["quality", path, "--model.name=cifar/resnet20", "--data.name=digits"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "conv1.weight" in said
    assert run(*words, "--out", tmp_path / "q.csv") == 0
    rows = list(csv.DictReader((tmp_path / "q.csv").open()))
    assert len(rows) == len(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "inspect: name mask files"),
        (["inspect", "--all"], "inspect: name mask files"),
        (["inspect", "{}/none.safetensors"], "none.safetensors"),
        (["inspect", "{}/text.safetensors"], "text.safetensors"),
        (["inspect", "{}/plain.safetensors"], "plain.safetensors"),
        (["convert"], "convert: names no file"),
        (["convert", "{}/m.safetensors"], "--out: names no mask file"),
        (["convert", "{}/none.pt", "--out={}/c.safetensors"], "none.pt"),
        (["convert", "{}/text.safetensors", "--out={}/c.safetensors"], "text.safetensors"),
        (["convert", "{}/m.safetensors", "--out={}/c.safetensors", "--model.nam=x"], "model.name"),
        (["convert", "{}/m.safetensors", "--out={}/c.safetensors", "--model.name=cifar/resnet18"], "m.safetensors"),
        (["compare", "{}/m.safetensors"], "compare: name two mask files"),
        (["compare", "{}/m.safetensors", "{}/none.safetensors"], "none.safetensors"),
        (["quality"], "quality: names no file"),
        (["quality", "{}/none.safetensors", "--model.name=cifar/resnet20", "--data.name=digits"], "none.safetensors"),
        (["quality", "{}/m.safetensors", "--model.name=cifar/resnet18", "--data.name=digits"], "m.safetensors"),
        (["prune", "{}/m.safetensors"], "prune"),
        (["--pruning.criterion=snop"], "did you mean 'snip'"),
        (["--pruning.density=1.1"], "pruning.density"),
        (["--model.name=cifar/resnet21"], "cifar/resnet2"),
        (["--pruning.pattern=4:2"], "pruning.pattern"),
        (["--pruning.mask_file={}/none"], "none"),
        (["--pruning.criterion=grasp", "--pruning.criterion_options=temperature=nan"], "temperature=nan"),
        (["--pruning.criterion=grasp", "--pruning.criterion_options=temperature=0"], "temperature=0"),
        (["--pruning.criterion=grasp", "--pruning.allocation=global", "--pruning.normalize=lamp"], "normalize=lamp"),
        (["--pruning.criterion=crop", "--pruning.batches=99"], "pruning.batches=99"),
        (["--pruning.exclude=*"], "pruning.exclude"),
        (["--pruning.layer_densities=conv9.*=1"], "conv9"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    words: list[str], message: str, masks: tuple[Path, Masks], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors here")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "plain.safetensors")
    if words[0].startswith("--"):
        words = [*DIGITS, "--pruning.density=0.1", "--out={}/a.safetensors", *words]
    assert message in refused(capsys, tmp_path, *(word.format(tmp_path) for word in words))


def test_wrong_input_ends_a_process_with_code_two(tmp_path: Path) -> None:
    """The real exit, which the other tests replace."""
    words = [*DIGITS, "--pruning.criterion=snip", "--pruning.density=0.0001", "--pruning.layer_densities=fc.weight=1"]
    done = subprocess.run(
        [sys.executable, "-m", "utils.pruning", *words, "--out", str(tmp_path / "m.safetensors")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("sieve: pruning.layer_densities: ")
    assert not list(tmp_path.iterdir())


def test_the_network_is_that_of_the_config(tmp_path: Path) -> None:
    import harness_params

    params, _ = harness_params.load_with({}, DIGITS, plan=False)
    mine, state = build_model(params).state_dict(), network().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mine.items())
