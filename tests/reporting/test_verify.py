"""`verify`: a run that is whole holds; each kind of tampering is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import levels_cases
from utils.masks import Masks
from utils.reporting.__main__ import main
from utils.reporting.verify import verify
from utils.system.rundir import RunDir


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDir:
    """Three levels with every kind of file: wr keeps a rewind point, ema an average."""
    root = tmp_path_factory.mktemp("runs")
    keys = {"levels.rewind": "wr", "levels.rewind_step": "2it", "levels.densities": [1.0, 0.5, 0.2]}
    keys |= {"training.ema": 0.9, "data.val": 0.2, "data.subset": 120}
    return levels_cases.run(levels_cases.config(root, 2, **keys))


@pytest.fixture
def run(finished, tmp_path) -> RunDir:
    return RunDir(Path(shutil.copytree(finished.path, tmp_path / finished.path.name)))


def test_a_finished_run_holds(finished, capsys) -> None:
    assert verify(finished) == []
    assert main(["verify", str(finished.path)]) == 0
    assert capsys.readouterr().out == f"{finished.path}: all holds (3 finished levels)\n"
    assert {path.name for path in finished.level(0).path.iterdir()} >= {"rewind.safetensors", "average.safetensors"}


def test_a_partial_run_holds(run) -> None:
    (run.level(2).row).unlink()
    run.status.write_text('{"state": "running"}')
    lines = run.levels_csv.read_text().splitlines()
    run.levels_csv.write_text("\n".join(lines[:3]) + "\n")
    assert verify(run) == []


def test_wrong_input_is_told_from_a_run_that_does_not_hold(tmp_path, capsys) -> None:
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "not a run directory" in capsys.readouterr().err


def _tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata)


def _json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _alive(prefix: str, value: float) -> Callable[[Path, RunDir], None]:
    def spoil(path: Path, run: RunDir) -> None:
        mask = Masks.load(run.level(1).mask)["conv1.weight"]

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"{prefix}conv1.weight"][tuple(torch.nonzero(~mask)[0])] = value

        _tensors(path, change)

    return spoil


def _poke(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bn1.bias"][0] += 1


def _regrow(run: RunDir) -> None:
    """Level 2's masks, made anew with a weight that level 1 pruned."""
    old = Masks.load(run.level(2).mask)
    tensors = {name: mask.clone() for name, mask in old.items()}
    above = Masks.load(run.level(1).mask)["conv1.weight"]
    tensors["conv1.weight"][tuple(torch.nonzero(~above)[0])] = True
    Masks(tensors).save(run.level(2).mask, source=json.loads(run.level(1).row.read_text())["weights_digest"])


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _twice(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]))


TAMPERING: dict[str, tuple[Callable[[RunDir], object], str]] = {
    "a weight": (lambda r: _tensors(r.level(1).weights, _poke), "level_01/row.json: weights_digest"),
    "a pruned weight": (
        lambda r: _alive("", 1e-30)(r.level(1).weights, r),
        "level_01/weights.safetensors: 'conv1.weight' has 1 pruned weights that are not +0.0",
    ),
    "a minus zero": (
        lambda r: _alive("", -0.0)(r.level(1).weights, r),
        "level_01/weights.safetensors: 'conv1.weight' has 1 pruned weights that are not +0.0",
    ),
    "an average": (
        lambda r: _alive("", 1.0)(r.level(1).average, r),
        "level_01/average.safetensors: 'conv1.weight' has 1 pruned weights that are not +0.0",
    ),
    "no average": (lambda r: r.level(1).average.unlink(), "level_01/average.safetensors: missing"),
    "NaN": (
        lambda r: _tensors(r.level(0).rewind, lambda t: t["model.bn1.bias"].fill_(float("nan"))),
        "level_00/rewind.safetensors: 'model.bn1.bias' holds 16 NaN",
    ),
    "a mask bit": (
        lambda r: _tensors(r.level(2).mask, lambda t: t["conv1.weight"].view(-1)[0].bitwise_xor_(1)),
        "level_02/mask.safetensors: digest in its metadata",
    ),
    "a mask value": (
        lambda r: _tensors(r.level(2).mask, lambda t: t["conv1.weight"].view(-1)[0].fill_(2)),
        "level_02/mask.safetensors: 'conv1.weight' is not a 0/1 mask",
    ),
    "a regrown weight": (
        _regrow,
        "level_02/mask.safetensors: 'conv1.weight' keeps 1 weights that",
    ),
    "a truncated file": (
        lambda r: r.level(1).weights.write_bytes(r.level(1).weights.read_bytes()[:-9]),
        "level_01/weights.safetensors: not a whole safetensors file",
    ),
    "no weights": (lambda r: r.level(1).weights.unlink(), "level_01/weights.safetensors: no such file"),
    "no mask": (lambda r: r.level(1).mask.unlink(), "level_01/mask.safetensors: no such file"),
    "a density": (
        lambda r: _json(r.level(1).row, density=0.51),
        "level_01/row.json: density (mask.safetensors) is 0.51",
    ),
    "a count": (
        lambda r: _json(r.level(1).row, kept_weights=7),
        "level_01/row.json: kept_weights (mask.safetensors) is 7",
    ),
    "an accuracy": (lambda r: _json(r.level(1).row, final_test_acc=99.5), "expected 99.5"),
    "a best accuracy": (lambda r: _json(r.level(1).row, max_test_acc=99.5), "level_01/row.json: max_test_acc"),
    "a val accuracy": (lambda r: _json(r.level(1).row, best_val_test_acc=99.5), "level_01/row.json: best_val_test_acc"),
    "another level": (lambda r: _json(r.level(1).row, level=2), "level_01/row.json: level is 2, expected 1"),
    "another run": (lambda r: _json(r.level(1).row, run="x"), "level_01/row.json: run is x"),
    "another seed": (lambda r: _json(r.level(1).row, seed=9), "level_01/row.json: seed (config.yaml) is 9, expected 0"),
    "effective density": (
        lambda r: _json(r.level(1).row, effective_density=0.1),
        "row.json: effective_density (layers",
    ),
    "an epoch twice": (
        lambda r: _twice(r.level(1).epochs),
        "level_01/epochs.csv: the number of its epochs is 3, expected 2",
    ),
    "an epoch": (
        lambda r: _edit(r.level(1).epochs, "\n1,0,", "\n1,7,"),
        "level_01/epochs.csv: the column epoch is [7, 1]",
    ),
    "no epochs": (lambda r: r.level(1).epochs.unlink(), "level_01/epochs.csv: cannot be read"),
    "a layer": (
        lambda r: _edit(r.level(1).layers, "conv1.weight,16x3x3x3,True,432", "conv1.weight,16x3x3x3,True,433"),
        "level_01/layers.csv: numel of 'conv1.weight' is 433, expected 432",
    ),
    "no layer": (
        lambda r: _edit(r.level(1).layers, "conv1.weight", "conv9.weight"),
        "layers.csv: the list of prunable",
    ),
    "a line of levels.csv": (lambda r: _edit(r.levels_csv, "0.5", "0.4"), "/levels.csv: line "),
    "a level less": (lambda r: r.levels_csv.write_text(r.levels_csv.read_text().rpartition("\n2")[0]), "levels.csv: "),
    "another config": (lambda r: _edit(r.config, "lr: 0.05", "lr: 0.06"), "config.yaml: names the run sieve-"),
    "no config": (lambda r: r.config.unlink(), "config.yaml: no such config file"),
    "a done level gone": (lambda r: r.level(2).row.unlink(), "status.json: says done, but"),
    "a state": (lambda r: _json(r.status, state="well"), "status.json: state is 'well'"),
    "no versions": (lambda r: _json(r.environment, versions=None), "environment.json: versions is missing"),
    "other seeds": (lambda r: _json(r.environment, seeds={"run": 5}), "environment.json: seeds.run is 5, expected 0"),
    "no data digest": (lambda r: _json(r.environment, inputs={"loader": "device"}), "inputs['data train'] is missing"),
    "a link": (lambda r: (r.level(1).epochs.unlink(), r.level(1).epochs.symlink_to("/dev/null")), "is a symbolic link"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_is_found_and_named(run, capsys, kind) -> None:
    spoil, words = TAMPERING[kind]
    spoil(run)
    problems = verify(run)
    assert any(words in problem for problem in problems), problems
    assert all("\n" not in problem and str(run.path) in problem for problem in problems)
    assert main(["verify", str(run.path)]) == 1
    assert capsys.readouterr().out.splitlines() == problems
