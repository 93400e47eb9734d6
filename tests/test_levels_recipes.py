"""Whole levels with recipes, and the commands that look into what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.levels_cases import config, row, rows, run
from utils import files, levels
from utils.masks import Masks
from utils.reporting.__main__ import main as report
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import RunDir

SPARSE = {
    "pruning__moment": "init",
    "pruning__criterion": "random",
    "pruning__allocation": "erk",
    "pruning__density": 0.2,
}
ALL = {
    "recipe__soft__kind": "swish",
    "recipe__soft__end": "7it",
    "recipe__ghost__kind": "1x1",
    "recipe__ghost__end": "6it",
    "recipe__smoothing__schedule": "linear",
    "recipe__smoothing__end": "8it",
    "recipe__rescale__method": "sgd",
    "recipe__rescale__iterations": 2,
    "recipe__rescale__batch_size": 8,
    "recipe__rescale__lr": 0.01,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run(config(tmp_path_factory.mktemp("plain"), 2, **SPARSE))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run(config(tmp_path_factory.mktemp("all"), 2, training__gradient_norms=3, **SPARSE, **ALL))


def test_all_four_leave_the_stock_network_and_the_columns_say_what_was_on(plain: RunDir, everything: RunDir) -> None:
    first, second = (files.load_weights(one.level(0).weights) for one in (plain, everything))
    assert list(first) == list(second)
    masks = Masks.load(everything.level(0).mask)
    assert masks == Masks.load(plain.level(0).mask)
    assert all(bool((second[name][~mask] == 0).all()) for name, mask in masks.items())
    assert row(everything)["density"] == row(plain)["density"]
    assert row(everything)["prunable_weights"] == row(plain)["prunable_weights"]
    one, other = rows(everything.level(0).epochs)
    assert 1.0 < float(one["soft"]) < 20.0
    assert float(one["ghost"]) == pytest.approx(0.5)
    assert float(one["ghost_weights"]) == 2 * 16 * 16 * 3 + 16 * 32 + 32 * 32 * 5 + 32 * 64 + 64 * 64 * 5
    assert float(one["smoothing"]) == pytest.approx(0.1 * 5 / 8)
    assert (other["soft"], other["ghost"], other["ghost_weights"]) == ("", "", "")
    assert {one[name] for one in rows(plain.level(0).epochs) for name in ("soft", "ghost", "smoothing")} == {""}


def test_the_model_and_the_task_are_as_before_a_level(tmp_path: Path) -> None:
    params = config(tmp_path, 1, **SPARSE, recipe__soft__kind="mish", recipe__smoothing__schedule="constant")
    driver = levels.Driver(params, World(), torch.device("cpu"), Console(main=False))
    kinds = [type(module) for module in driver.model.modules()]
    driver.run()
    assert [type(module) for module in driver.model.modules()] == kinds
    assert driver.task.label_smoothing == 0.0


def test_masks_found_in_mid_training_are_those_of_the_stock_network(tmp_path: Path) -> None:
    """Skips must not keep a cut network connected: SynFlow's paths and the search see the network that is left."""
    keys = {"pruning__moment": "step", "pruning__step": "2it", "pruning__criterion": "synflow"}
    keys |= {"pruning__density": 0.1, "recipe__ghost__kind": "identity", "recipe__ghost__end": "7it"}
    done = run(config(tmp_path, 2, **keys))
    assert row(done)["pruned_at_step"] == "2"
    assert float(row(done)["effective_density"]) > 0.09


def test_soft_for_good_is_soft_in_every_evaluation(tmp_path: Path) -> None:
    params = config(tmp_path, 0, **SPARSE, recipe__soft__kind="swish", recipe__soft__keep=True)
    driver = levels.Driver(params, World(), torch.device("cpu"), Console(main=False))
    assert not any(isinstance(module, torch.nn.ReLU) for module in driver.model.modules())
    assert list(files.state_of(driver.model)) == list(driver.initial)
    driver.loaders.close()


def test_a_network_with_nothing_to_soften_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    keys = {"model__name": "timm/vit_tiny_patch16_224", "data__image_size": 32, "recipe__soft__kind": "mish"}
    with pytest.raises(UserError, match=r"recipe.soft.kind=mish: VisionTransformer has no ReLU"):
        run(config(tmp_path, 1, **SPARSE, **keys))
    assert not list(tmp_path.iterdir())


def test_a_ramp_beyond_the_level_is_refused_before_training(tmp_path: Path) -> None:
    params = config(tmp_path, 2, **SPARSE, recipe__ghost__kind="1x1", recipe__ghost__end="9it")
    with pytest.raises(UserError, match=r"recipe.ghost.end=9it: training has only 8 steps"):
        run(params)
    assert not list(tmp_path.iterdir())


def test_rescaling_happens_where_a_level_starts_from_initial_weights(tmp_path: Path) -> None:
    keys = {name: value for name, value in ALL.items() if "rescale" in name}
    told: list[str] = []

    class Listening(Console):
        def line(self, text: str = "") -> None:
            told.append(text)

    for rewind, times in (("lrr", 1), ("imp", 2)):
        told.clear()
        params = config(tmp_path / rewind, 1, levels__count=2, levels__rewind=rewind, **keys)
        levels.Driver(params, World(), torch.device("cpu"), Listening(main=False)).run()
        assert sum(text.startswith("rescaled initial weights") for text in told) == times


def test_gradient_norms_of_the_first_steps(everything: RunDir, tmp_path: Path) -> None:
    found = rows(everything.level(0).gradients)
    assert [one["step"] for one in found] == ["0", "1", "2"]
    assert len(found[0]) == 1 + 65
    assert all(float(one["conv1.weight"]) > 0 for one in found)
    out = tmp_path / "g.png"
    assert report(["gradients", str(everything.path), "--level", "0", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_activations_of_a_level(plain: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    assert report(["activations", str(plain.path), "--level", "0", "--out", str(out)]) == 0
    found = rows(out)
    assert [(one["layer"], one["call"]) for one in found][:3] == [
        ("relu", "0"), ("layer1.0.relu", "0"), ("layer1.0.relu", "1"),
    ]  # fmt: skip
    assert len(found) == 1 + 2 * 9
    assert all(0 <= float(one["near_zero"]) <= 1 for one in found)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_line_between_two_runs(plain: RunDir, everything: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "c.csv"
    words = ["connectivity", str(plain.path), str(everything.path), "--level", "0", "--points", "3", "--out", str(out)]
    assert report(words) == 0
    assert [float(one["share"]) for one in rows(out)] == [0.0, 0.5, 1.0]


def test_masks_of_runs(plain: RunDir, everything: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "m.csv"
    assert report(["masks", str(plain.path), str(everything.path), "--out", str(out)]) == 0
    assert {one["jaccard"] for one in rows(out)} == {"1.0"}  # paired: the same seed draws the same masks


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["activations", "RUN", "--level", "7", "--out", "a.csv"], "names a level that is not finished"),
        (["activations", "RUN", "--level", "0", "--split", "val", "--out", "a.csv"], "holds no images out"),
        (["activations", "RUN", "--level", "0", "--out", "a.txt"], "end the name in .csv"),
        (["gradients", "RUN", "--level", "0", "--out", "a.png"], "--training.gradient_norms=STEPS"),
        (["gradients", "RUN", "--level", "0", "--out", "a.txt"], "end the name in .png"),
        (["masks", "nowhere.safetensors", "RUN", "--out", "a.csv"], "nowhere.safetensors: no such file"),
    ],
)
def test_mistakes_are_one_line(plain: RunDir, words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(plain.path) if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
