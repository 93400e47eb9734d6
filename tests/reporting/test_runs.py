"""Several runs as one table, grouped into experiments, averaged over seeds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from utils.reporting.runs import experiments, find_runs, over_seeds, read_runs
from utils.system.errors import UserError


def make_run(path: Path, accuracies: dict[float, float], **config: Any) -> Path:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(sections))
    for level, (density, accuracy) in enumerate(accuracies.items()):
        row = {
            "run": path.name, "seed": sections.get("run", {}).get("seed", 0), "level": level,
            "target_density": density, "density": density, "sparsity": 1 - density, "kept_weights": 8,
            "prunable_weights": 10, "epochs": 2, "mask_digest": "ab", "final_test_acc": accuracy,
        }  # fmt: skip
        folder = path / f"level_{level:02d}"
        folder.mkdir()
        (folder / "row.json").write_text(json.dumps(row))
    return path


def test_rows_carry_their_config(tmp_path: Path) -> None:
    make_run(tmp_path / "a", {1.0: 90.0, 0.5: 80.0}, run__seed=4, levels__densities=[1.0, 0.5])
    make_run(tmp_path / "b", {1.0: 70.0}, pruning__criterion="random")
    frame = read_runs([str(tmp_path / "*")])
    assert list(frame["run"]) == ["a", "a", "b"]
    assert list(frame["final_test_acc"]) == [90.0, 80.0, 70.0]
    assert list(frame["levels.densities"][:2]) == ["1.0, 0.5", "1.0, 0.5"]
    assert frame["pruning.criterion"].iloc[2] == "random"
    assert frame["val_acc"].isna().all()
    assert frame["seed"].iloc[0] == 4


def test_runs_come_in_the_order_given_and_once(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", {1.0: 90.0}), make_run(tmp_path / "b", {1.0: 70.0})
    (b / "levels.csv").write_text("")
    found = find_runs([b / "levels.csv", a, tmp_path / "*"])
    assert [run.path.name for run in found] == ["b", "a"]


def test_a_glob_passes_over_what_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a", {1.0: 90.0})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert [run.path.name for run in find_runs([tmp_path / "*"])] == ["a"]


def test_a_run_directory_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a[1]", {1.0: 90.0})
    assert [found.path for found in find_runs([run])] == [run]


@pytest.mark.parametrize("given", ["missing", "empty", "file.txt", "none*"])
def test_what_is_no_run_is_named(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError) as caught:
        find_runs([tmp_path / given])
    assert str(tmp_path / given) in str(caught.value)


def test_runs_without_a_finished_level_say_so(tmp_path: Path) -> None:
    make_run(tmp_path / "a", {})
    with pytest.raises(UserError, match="no level is finished yet"):
        read_runs([tmp_path / "a"])


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", {1.0: 90.0})
    (run / "config.yaml").write_text("run: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_runs([run])


def test_seeds_and_unhashed_parameters_do_not_part_an_experiment(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(
            tmp_path / f"lrr-{seed}", {1.0: 90.0 + seed, 0.5: 80.0 + 2 * seed},
            run__name="lrr", run__seed=seed, data__order_seed=seed, data__workers=seed + 1, levels__count=seed + 2,
        )  # fmt: skip
    make_run(tmp_path / "imp", {1.0: 60.0}, run__name="imp")
    groups = experiments(read_runs([tmp_path / "lrr-*", tmp_path / "imp"]))
    assert [(label, len(rows)) for label, rows in groups] == [("lrr", 6), ("imp", 1)]
    table = over_seeds(groups[0][1])
    assert list(table["target_density"]) == [1.0, 0.5]
    assert list(table["mean"]) == [91.0, 82.0]
    assert list(table["sd"]) == pytest.approx([1.0, 2.0])
    assert list(table["runs"]) == [3, 3]
    assert math.isnan(over_seeds(groups[1][1])["sd"].iloc[0])


def test_experiments_of_one_name_are_labelled_by_what_differs(tmp_path: Path) -> None:
    for criterion in ("magnitude", "random"):
        for seed in (0, 1):
            make_run(
                tmp_path / f"{criterion}{seed}", {0.5: 80.0},
                run__name="cmp", run__seed=seed, pruning__criterion=criterion, optimizer__lr=0.1,
            )  # fmt: skip
    labels = [label for label, _ in experiments(read_runs([tmp_path / "*"]))]
    assert labels == ["cmp (criterion=magnitude)", "cmp (criterion=random)"]


def test_a_key_only_one_of_them_sets_is_shown_as_default_in_the_other(tmp_path: Path) -> None:
    make_run(tmp_path / "a", {0.5: 80.0}, run__name="x", optimizer__lr=0.3)
    make_run(tmp_path / "b", {0.5: 80.0}, run__name="x")
    labels = [label for label, _ in experiments(read_runs([tmp_path / "*"]))]
    assert labels == ["x (lr=0.3)", "x (lr=default)"]


def test_linear_plans_of_other_lengths_are_other_experiments(tmp_path: Path) -> None:
    for count in (3, 5):
        make_run(tmp_path / f"a{count}", {0.5: 80.0}, run__name="x", levels__spacing="linear", levels__count=count)
    labels = [label for label, _ in experiments(read_runs([tmp_path / "*"]))]
    assert labels == ["x (count=3)", "x (count=5)"]


def test_runs_without_a_config_stand_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (make_run(tmp_path / name, {1.0: 90.0}) / "config.yaml").unlink()
    assert [label for label, _ in experiments(read_runs([tmp_path / "*"]))] == ["a", "b"]


def test_importing_reporting_loads_neither_torch_nor_pandas_nor_matplotlib() -> None:
    code = "import sys, utils.reporting; print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
