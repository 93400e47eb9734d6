"""Whole levels with recipes, and the commands that look into what they leave."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from tests.levels_cases import config, row, rows, run
from tests.test_levels_resume import Stops
from utils import files, levels
from utils.analysis.commands import _check_alike
from utils.estimate import describe
from utils.masks import Masks
from utils.params import Params
from utils.reporting.__main__ import main as report
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import Preempted, UserError
from utils.system.rundir import RunDir
from utils.system.stopping import Never
from utils.training.extension import Extension
from utils.training.trainer import Row, Trainer

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

    def rescaled(params: Params, stopping: Never | None = None) -> int:
        told.clear()
        with contextlib.suppress(Preempted):
            levels.Driver(params, World(), torch.device("cpu"), Listening(main=False), stopping).run()
        return sum(text.startswith("rescaled initial weights") for text in told)

    for epochs, rewind, times in ((1, "lrr", 1), (1, "imp", 2), (0, "imp", 0)):
        assert rescaled(config(tmp_path, epochs, levels__count=2, levels__rewind=rewind, **keys)) == times
    params = config(tmp_path, 2, levels__count=1, **keys)
    assert rescaled(params, Stops(4)) == 1
    assert rescaled(params) == 0
    assert any(text.startswith("resumed level 0 ") for text in told)


def test_a_trigger_measures_from_the_rescaled_weights(tmp_path: Path) -> None:
    keys = {name: value for name, value in ALL.items() if "rescale" in name} | {"recipe__rescale__lr": 0.1}
    early = {"pruning__moment": "early", "pruning__density": 0.2, "early__latest": "1ep", "early__threshold": 1e-9}
    directory = run(config(tmp_path, 2, optimizer__lr=1e-9, **early, **keys))
    assert float(rows(directory.level(0).epochs)[0]["distance"]) < 1e-6  # rescaling itself moves weights by a tenth


@pytest.mark.parametrize(("soft", "ghost"), [("11it", "6it"), ("6it", "11it")])
def test_the_best_epochs_are_among_those_of_the_stock_network(
    soft: str, ghost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs have five steps: the first has both in it, the second soft activations alone, or skips alone."""
    scripted = iter([(95.0, 96.0), (90.0, 91.0), (85.0, 82.0), (84.0, 83.0)])

    def evaluate(self: Trainer, extensions: Sequence[Extension] = ()) -> Row:
        val, test = next(scripted)
        return {"val_loss": 1.0, "val_acc": val, "test_loss": 1.0, "test_acc": test, "test_acc_top5": 100.0}

    monkeypatch.setattr(Trainer, "evaluate_all", evaluate)
    ramps = {"recipe__soft__kind": "mish", "recipe__soft__end": soft, "recipe__ghost__kind": "identity"}
    keys = {"data__val": 0.2, "data__subset": 200, "run__keep": "best", "recipe__ghost__end": ghost}
    directory = run(config(tmp_path, 4, **SPARSE, **ramps, **keys))
    kept = row(directory)
    assert [kept[name] for name in ("max_test_acc", "best_val_test_acc")] == ["83.0", "82.0"]
    assert files.load_metadata(directory.level(0).best)["epoch"] == "3"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"ghost__kind": "identity", "ghost__exclude": "foo"}, "recipe.ghost.exclude: 'foo' matches no prunable"),
        ({"ghost__kind": "1x1", "ghost__exclude": "layer*"}, "recipe.ghost.kind=1x1: the network has no masked conv"),
        (
            {"smoothing__schedule": "constant", "smoothing__amount": 0.95, "smoothing__convention": "others"},
            "recipe.smoothing.amount=0.95: leaves the label's class less",
        ),
        (
            {"smoothing__schedule": "linear", "smoothing__final": 0.95, "smoothing__convention": "others"},
            "recipe.smoothing.final=0.95: leaves the label's class less",
        ),
        ({"rescale__method": "sgd", "rescale__batch_size": 90}, "recipe.rescale.batch_size=90: an iteration needs two"),
    ],
)
def test_what_cannot_work_is_refused_before_the_dense_level_and_by_the_plan(
    tmp_path: Path, keys: dict[str, object], text: str
) -> None:
    params = config(tmp_path, 1, levels__count=2, **{f"recipe__{name}": value for name, value in keys.items()})
    with pytest.raises(UserError, match=re.escape(text)):
        run(params)
    with pytest.raises(UserError, match=re.escape(text)):
        describe(params, World())
    assert not list(tmp_path.iterdir())


def test_a_dense_plan_needs_nothing_to_bridge(tmp_path: Path) -> None:
    keys = {"recipe__ghost__kind": "1x1", "recipe__ghost__exclude": "layer*"}
    assert "starts from" in describe(config(tmp_path, 1, levels__count=1, **keys), World())


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
    found = []
    for number, ends in enumerate([(plain, everything), (everything, plain)]):
        out = tmp_path / f"{number}.csv"
        runs = [str(end.path) for end in ends]
        assert report(["connectivity", *runs, "--level", "0", "--points", "3", "--out", str(out)]) == 0
        found.append(rows(out))
        assert [float(one["share"]) for one in found[-1]] == [0.0, 0.5, 1.0]
    there, back = ([float(one["loss"]) for one in lines] for lines in found)
    assert there == pytest.approx(back[::-1], rel=1e-5)
    assert abs(there[0] - there[2]) > 1e-3


def test_masks_of_runs(plain: RunDir, everything: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "m.csv"
    assert report(["masks", str(plain.path), str(everything.path), "--out", str(out)]) == 0
    assert {one["jaccard"] for one in rows(out)} == {"1.0"}  # paired: the same seed draws the same masks


def test_norms_that_a_logarithm_cannot_show_take_the_ends_of_the_scale(
    everything: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDir(Path(shutil.copytree(everything.path, tmp_path / everything.path.name)))
    directory.level(0).gradients.write_text("step,a,b\n0,0.0,2.0\n1,inf,0.5\n")
    shown: list[np.ndarray] = []
    draw = Axes.imshow

    def seen(axes: Axes, values: np.ndarray, **options: object) -> object:
        shown.append(np.asarray(values))
        return draw(axes, values, **options)

    monkeypatch.setattr(Axes, "imshow", seen)
    assert report(["gradients", str(directory.path), "--level", "0", "--out", str(tmp_path / "g.png")]) == 0
    assert shown[0].tolist() == [[0.5, 2.0], [2.0, 0.5]]


def test_damaged_gradient_norms_are_one_line(
    everything: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = everything.level(0).gradients
    before, words = (
        path.read_text(),
        ["gradients", str(everything.path), "--level", "0", "--out", str(tmp_path / "g.png")],
    )
    try:
        for text, told in (
            ("", "not what training.gradient_norms writes"),
            ("step,a\n0,x\n", "not what training.gradient_norms writes"),
            ("step,a\n", "no gradient in it is above 0"),
            ("step,a\n0,0.0\n1,nan\n", "no gradient in it is above 0"),
        ):
            path.write_text(text)
            assert report(words) == 2
            assert told in capsys.readouterr().err
    finally:
        path.write_text(before)


def test_runs_of_another_network_are_not_connected(
    plain: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = run(config(tmp_path, 0, model__name="cifar/resnet32", levels__count=1))
    words = ["connectivity", str(plain.path), str(other.path), "--level", "0", "--out", str(tmp_path / "c.csv")]
    assert report(words) == 2
    assert "model.name is cifar/resnet20 in" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"keep": False}, {"kind": "gelu"}, {"beta": 2.0}])
def test_networks_of_other_activations_are_not_connected(tmp_path: Path, changed: dict[str, object]) -> None:
    soft = {"kind": "swish", "keep": True}
    one, same, other = (
        config(tmp_path, 1, **SPARSE, **{f"recipe__soft__{name}": value for name, value in keys.items()})
        for keys in (soft, soft, {**soft, **changed})
    )
    _check_alike(one, same, ("a", "b"))
    with pytest.raises(UserError, match=rf"connectivity: recipe\.soft\.{next(iter(changed))} is .* in a and .* in b"):
        _check_alike(one, other, ("a", "b"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["activations", "RUN", "--level", "7", "--out", "a.csv"], "names a level that is not finished"),
        (["activations", "RUN", "--level", "0", "--split", "val", "--out", "a.csv"], "holds no images out"),
        (["activations", "RUN", "--level", "0", "--out", "a.txt"], "end the name in .csv"),
        (["gradients", "RUN", "--level", "0", "--out", "a.png"], "--training.gradient_norms=STEPS"),
        (["gradients", "RUN", "--level", "0", "--out", "a.txt"], "end the name in .png"),
        (["masks", "nowhere.safetensors", "RUN", "--out", "a.csv"], "nowhere.safetensors: no such file"),
        (["activations", "RUN", "--level", "0", "--near", "nan", "--out", "a.csv"], "--near=nan: not a size"),
        (["connectivity", "RUN", "nowhere", "--level", "0", "--out", "a.csv"], "nowhere: not a run directory"),
        (["connectivity", "RUN", "RUN", "--level", "7", "--out", "a.csv"], "--level names a level that is not fin"),
        (
            ["connectivity", "RUN", "RUN", "--level", "0", "--second-level", "7", "--out", "a.csv"],
            "--second-level names a level that is not finished",
        ),
    ],
)
def test_mistakes_are_one_line(plain: RunDir, words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(plain.path) if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
