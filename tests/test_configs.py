"""Every shipped config and every command its comments give is complete, valid and what it says it is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import OPTIONS
from harness_params import load, load_with
from utils.params import Params
from utils.params.help import help_text
from utils.params.identity import hashed_fields, run_id
from utils.params.load import build
from utils.params.parsing import dump
from utils.params.plan import level_plan

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
OVERLAYS = ("levels", "pruning", "structured", "dynamic", "early", "recipe", "training")

ALL = sorted(path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*.yaml"))
EXPERIMENTS = [path for path in ALL if path.split("/")[1] not in OVERLAYS]
OVERLAY_FILES = [path for path in ALL if path not in EXPERIMENTS]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def comment(path: str) -> str:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    return "\n".join(head)


def commands(text: str) -> list[list[str]]:
    """The arguments of every `harness.py --config ...` in `text`; a backslash at a line's end continues it."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        _, called, arguments = line.partition("harness.py ")
        if called and "--config configs/" in arguments and "<" not in arguments:
            found.append(shlex.split(arguments.partition("#")[0].partition("`")[0]))
    return found


COMMENTED = [(path, argv) for path in ALL for argv in commands(comment(path))]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]}
PAGES |= {"Makefile": (ROOT / "Makefile").read_text(encoding="utf-8"), "--help": help_text()}
WRITTEN = [(page, argv) for page, text in sorted(PAGES.items()) for argv in commands(text)]


def experiment(path: str, *more: str) -> Params:
    return load(["--config", path, *more])


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_an_experiment_is_complete_and_names_the_same_run_when_passed_back(path: str, tmp_path: Path) -> None:
    params = experiment(path)
    again = tmp_path / "config.yaml"
    again.write_text(yaml.safe_dump(dump(params), sort_keys=False))
    assert load(["--config", str(again)]) == params
    assert build(yaml.safe_load(again.read_text())) == params
    assert run_id(load(["--config", str(again)])) == run_id(params)
    assert level_plan(params)


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_an_experiment_says_what_it_needs_and_is_named_after_its_file(path: str) -> None:
    content = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    # What an experiment rests on is in the file, not in a default that may change.
    for section, names in {"run": ["name"], "model": ["name"], "data": ["name"], "training": ["epochs", "batch_size"],
                           "optimizer": ["name", "lr", "weight_decay"], "schedule": ["name"]}.items():  # fmt: skip
        assert set(names) <= set(content[section]), section
    assert "levels" in content
    expected = path.removeprefix("configs/").removesuffix(".yaml").replace("/", "_")
    assert content["run"]["name"] == expected
    assert [f"--config {path}"] == re.findall(rf"--config {re.escape(path)}", comment(path))[:1]
    if "/" in path.removeprefix("configs/"):
        assert content["data"]["name"] == path.split("/")[1]


def test_no_two_experiments_are_the_same_run() -> None:
    hashes = [str(sorted({**hashed_fields(experiment(path)), "run.name": ""}.items())) for path in EXPERIMENTS]
    lengths = [len(level_plan(experiment(path))) for path in EXPERIMENTS]
    # Where a geometric plan ends is no part of a run's hash: the dense run is level 0 of the iterative ones.
    assert len({(text, length > 1) for text, length in zip(hashes, lengths, strict=True)}) == len(EXPERIMENTS)


@pytest.mark.parametrize("path", OVERLAY_FILES)
def test_an_overlay_changes_something_and_shows_a_command_with_itself(path: str) -> None:
    shown = [argv for argv in commands(comment(path)) if path in argv]
    assert shown
    for argv in shown:
        until = argv[: argv.index(path) + 1]
        assert load(until) != load(until[:-2])


@pytest.mark.parametrize(("path", "argv"), COMMENTED)
def test_commands_in_comments_are_valid(path: str, argv: list[str]) -> None:
    assert path in argv
    assert level_plan(load_with(OPTIONS, argv)[0])


@pytest.mark.parametrize(("page", "argv"), WRITTEN)
def test_commands_on_pages_are_valid(page: str, argv: list[str]) -> None:
    assert level_plan(load_with(OPTIONS, argv)[0])


def test_commands_are_found_where_they_are() -> None:
    assert len(COMMENTED) >= len(ALL)
    assert {"Makefile", "--help"} <= {page for page, _ in WRITTEN}
    text = "x\n  torchrun --n=2 harness.py --config configs/a.yaml \\\n    --run.seed=1  # why\nharness.py --help\n"
    assert commands(text) == [["--config", "configs/a.yaml", "--run.seed=1"]]


METHODS = ("dense", "lrr", "wr", "imp")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dataset", "model"),
    [("cifar10", "resnet18"), ("cifar100", "resnet18"), ("cifar10", "resnet20"), ("cifar100", "resnet20"),
     ("imagenet", "resnet18")],
)  # fmt: skip
def test_an_experiment_is_its_dense_config_and_the_overlay_of_its_method(dataset: str, model: str, method: str) -> None:
    base, overlay = f"configs/{dataset}/{model}_dense.yaml", f"configs/levels/{method}.yaml"
    whole = experiment(f"configs/{dataset}/{model}_{method}.yaml")
    more = [f"--run.name={whole.run.name}", f"--levels.count={whole.levels.count}"]
    if method == "wr":
        more.append(f"--levels.rewind_step={whole.levels.rewind_step}")
    assert experiment(base, "--config", overlay, *more) == whole


@pytest.mark.parametrize("allocation", ["erk", "balanced"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_random_pruning_differs_from_the_dense_config_in_its_pruning_alone(dataset: str, allocation: str) -> None:
    whole = experiment(f"configs/{dataset}/random_{allocation}.yaml")
    listed = ",".join(str(density) for density in whole.levels.densities)
    base = f"configs/{dataset}/resnet18_dense.yaml"
    overlay = f"configs/pruning/random_{allocation}.yaml"
    more = [f"--run.name={whole.run.name}", f"--levels.densities={listed}"]
    assert experiment(base, "--config", overlay, *more) == whole
    assert (whole.pruning.moment, whole.pruning.criterion, whole.pruning.allocation) == ("init", "random", allocation)
    assert len(level_plan(whole)) >= 4


PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar": {"batch": 256, "epochs": 150, "decay": 5e-4, "model": "cifar/resnet18", "milestones": [70, 130]},
    "imagenet": {"batch": 1024, "epochs": 90, "decay": 1e-4, "model": "torchvision/resnet18", "milestones": [40, 70]},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_published_settings(dataset: str, method: str) -> None:
    params, wanted = experiment(f"configs/{dataset}/resnet18_{method}.yaml"), PUBLISHED[dataset.rstrip("01")]
    assert params.model.name == wanted["model"]
    assert (params.training.batch_size, params.training.epochs) == (wanted["batch"], wanted["epochs"])
    assert (params.optimizer.lr, params.optimizer.momentum, params.optimizer.nesterov) == (0.1, 0.9, False)
    assert params.optimizer.weight_decay == wanted["decay"]
    assert params.data.val == 0
    assert (params.schedule.name, params.schedule.gamma, params.schedule.warmup.epochs) == ("step", 0.1, 10)
    assert [milestone.epochs for milestone in params.schedule.milestones] == wanted["milestones"]
    plan = level_plan(params)
    if method == "dense":
        assert len(plan) == 1
    else:
        assert (params.pruning.criterion, params.pruning.allocation) == ("magnitude", "global")
        assert params.levels.rewind == method
        assert len(plan) == 25
        assert plan[-1].density == pytest.approx(0.00472, abs=1e-5)
    if method == "wr":
        assert str(params.levels.rewind_step) == "10ep"


def test_the_quick_start_is_five_levels_on_digits_read_by_ffcv() -> None:
    params = experiment("configs/quickstart.yaml")
    assert (params.data.name, params.data.loader, params.data.val) == ("digits", "ffcv", 0.1)
    assert params.levels.rewind == "lrr"
    densities = [level.density for level in level_plan(params)]
    assert len(densities) == 5
    assert densities[-1] <= 0.2
    assert params.training.batch_size % 2 == 0  # the demo runs on two ranks


def test_every_data_set_has_an_experiment() -> None:
    names = {experiment(path).data.name for path in EXPERIMENTS}
    assert names == {
        "cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenette", "imagewoof", "imagenet", "folder", "digits",
    }  # fmt: skip
