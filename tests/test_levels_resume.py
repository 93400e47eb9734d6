"""Levels stopped anywhere and run again: the bits of the run that was never stopped, whatever acts in training."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from tests import levels_cases
from tests.levels_cases import everything, rows, run
from utils import files, levels
from utils.params import Params
from utils.reporting.verify import verify
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import Preempted, UserError
from utils.system.rundir import RunDir
from utils.system.stopping import Never, Poll
from utils.training import snapshot

TWO = {"levels__count": 2, "levels__rate": 0.5}
INIT = {"pruning__moment": "init", "pruning__density": 0.2}
EARLY = {"pruning__moment": "early", "pruning__density": 0.2}

METHODS: dict[str, dict[str, object]] = {
    "lrr, average, half the batch twice, validation": {
        **TWO, "training__ema": 0.9, "training__accumulation": 2, "data__val": 0.3, "data__subset": 240,
    },
    "wr, adamw, clipping": {
        **TWO, "levels__rewind": "wr", "levels__rewind_step": "3it", "levels__rewind_optimizer": True,
        "optimizer__name": "adamw", "optimizer__lr": 0.002, "training__clip": 0.5,
    },
    "imp, mixup, cutout": {**TWO, "levels__rewind": "imp", "data__mixup": 0.2, "data__cutout": 4},
    "fine-tuning": {**TWO, "levels__rewind": "none"},
    "gmp": {"pruning__moment": "init", "pruning__density": 0.1, "dynamic__method": "gmp", "dynamic__every": 2},
    "rigl": {**INIT, "pruning__criterion": "random", "dynamic__method": "rigl", "dynamic__every": 2},
    "set": {**INIT, "pruning__criterion": "random", "dynamic__method": "set", "dynamic__every": 2},
    "pruned at a step": {"pruning__moment": "step", "pruning__density": 0.2, "pruning__step": "1ep2it"},
    "synflow at a step, rounds": {
        "pruning__moment": "step", "pruning__density": 0.2, "pruning__step": "3it", "pruning__criterion": "synflow",
        "pruning__rounds": 3,
    },
    "early, as published": {
        **EARLY, "early__trigger": "weight_distance", "early__latest": "1ep", "pruning__criterion": "crop",
        "pruning__samples_per_class": 1,
    },
    "early bird": {**EARLY, "early__trigger": "early_bird", "early__window": 1, "early__latest": "1ep2it",
                   "early__length": "configured"},
    "all recipes": {
        **INIT, "pruning__criterion": "random", "pruning__allocation": "erk", "training__gradient_norms": 6,
        "recipe__soft__kind": "swish", "recipe__soft__end": "7it", "recipe__ghost__kind": "1x1",
        "recipe__ghost__end": "6it", "recipe__smoothing__schedule": "linear", "recipe__smoothing__end": "8it",
        "recipe__rescale__method": "sgd", "recipe__rescale__iterations": 2, "recipe__rescale__batch_size": 8,
    },
    "float16": {**INIT, "training__precision": "float16", "data__subset": 80},
}  # fmt: skip


class Stops(Never):
    """Asks for a stop after so many questions; the same on all ranks, for there is one."""

    def __init__(self, after: int) -> None:
        self.left = after

    def poll(self, due: bool = False) -> Poll:
        self.left -= 1
        return Poll("SIGTERM" if self.left < 0 else None, due)


def config(root: Path, **keys: object) -> Params:
    # One batch an evaluation, for one that is stopped begins again.
    plan = {} if "pruning__moment" in keys else {"levels__count": 1}
    return levels_cases.config(root, 2, **{"training__eval_batch_size": 1000, **plan, **keys})


def drive(params: Params, stopping: Never) -> RunDir:
    return levels.Driver(params, World(), torch.device("cpu"), Console(main=False), stopping).run()


def until_done(params: Params, after: int) -> tuple[RunDir, int]:
    """Stop every run after `after` questions and start it again, until one is done. Returns the stops too."""
    for stops in range(100):
        with contextlib.suppress(Preempted):
            return drive(params, Stops(after)), stops
    raise AssertionError("never done")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_again_and_again_leaves_the_bits_of_the_whole_run(name: str, tmp_path: Path) -> None:
    keys = METHODS[name]
    whole = run(config(tmp_path / "whole", **keys))
    # Three questions, one of them before training: the steps of an epoch fall on all sides of the stops. Two more for
    # a level that also evaluates on validation images and after its pruning.
    stopped, stops = until_done(config(tmp_path / "stopped", **keys), 5 if "data__val" in keys else 3)
    assert stops >= 2
    assert everything(stopped) == everything(whole)
    assert verify(stopped) == []
    assert not stopped.level(0).checkpoint.exists()
    assert not stopped.level(0).previous.exists()


def test_stopping_at_every_single_question(tmp_path: Path) -> None:
    keys = {"training__ema": 0.5, **EARLY, "early__latest": "1ep", "early__length": "configured"}
    whole = everything(run(config(tmp_path / "whole", **keys)))
    for after in range(2, 12):
        stopped, _ = until_done(config(tmp_path / str(after), **keys), after)
        assert everything(stopped) == whole, after


def test_the_console_says_where_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = config(tmp_path)
    with pytest.raises(Preempted, match="stopped by SIGTERM; the same command goes on from level 0 epoch 1 step 6"):
        drive(params, Stops(7))  # before training, four steps, one evaluation, a step; the stop comes with the next
    levels.Driver(params, World(), torch.device("cpu"), Console()).run()
    assert "resumed level 0 epoch 1 step 6" in capsys.readouterr().out


def test_rows_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    whole = run(config(tmp_path / "whole"))
    params = config(tmp_path / "cut")
    with pytest.raises(Preempted):
        drive(params, Stops(8))
    table = levels.run_dir(params).level(0).epochs
    with open(table, "a", encoding="utf-8") as handle:
        handle.write("0,1,8,0.0\n0,1,")  # what a later, unsaved end of an epoch would have left, and half a row
    cut = run(params)
    assert [row["epoch"] for row in rows(table)] == ["0", "1"]
    assert everything(cut) == everything(whole)


def broken(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "a flipped bit":
        content[-5000] ^= 16
    else:
        content = bytearray(b"")
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "a flipped bit", "empty"])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(kind: str, tmp_path: Path, capsys) -> None:
    whole = run(config(tmp_path / "whole"))
    params = config(tmp_path / "broken", run__checkpoint_epochs=1)
    with pytest.raises(Preempted):
        drive(params, Stops(8))
    place = levels.run_dir(params).level(0)
    assert snapshot.read(place.previous).facts["step"] == 4
    broken(place.checkpoint, kind)
    levels.Driver(params, World(), torch.device("cpu"), Console()).run()
    told = capsys.readouterr()
    assert f"{place.checkpoint}: " in told.err
    assert "set aside as checkpoint.broken-1.safetensors" in told.err
    assert "resumed level 0 epoch 1 step 4" in told.out
    aside = place.path / "checkpoint.broken-1.safetensors"
    aside.unlink()
    assert everything(levels.run_dir(params)) == everything(whole)


def test_without_a_whole_checkpoint_the_level_begins_again(tmp_path: Path, capsys) -> None:
    whole = run(config(tmp_path / "whole"))
    params = config(tmp_path / "broken", run__checkpoint_epochs=1)
    with pytest.raises(Preempted):
        drive(params, Stops(8))
    place = levels.run_dir(params).level(0)
    for path in (place.checkpoint, place.previous):
        broken(path, "truncated")
    run(params)
    assert "resumed" not in capsys.readouterr().out
    for aside in place.path.glob("*.broken-*"):
        aside.unlink()
    assert everything(levels.run_dir(params)) == everything(whole)


def test_a_checkpoint_of_other_weights_is_not_used(tmp_path: Path) -> None:
    other, params = config(tmp_path / "other", run__seed=1), config(tmp_path / "own")
    for each in (other, params):
        with pytest.raises(Preempted):
            drive(each, Stops(8))
    foreign, own = (levels.run_dir(each).level(0).checkpoint for each in (other, params))
    own.write_bytes(foreign.read_bytes())
    run(params)
    assert files.load_weights(levels.run_dir(params).level(0).weights).keys()
    (own.parent / "checkpoint.broken-1.safetensors").unlink()
    assert everything(levels.run_dir(params)) == everything(run(config(tmp_path / "whole")))


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    params = config(tmp_path)
    with pytest.raises(Preempted):
        drive(params, Stops(8))
    place = levels.run_dir(params).level(0)
    found = snapshot.read(place.checkpoint)
    snapshot.write(place.checkpoint, place.previous, found.tensors, {**found.facts, "extensions": ["RigL"]})
    with pytest.raises(UserError, match=r"made with \['RigL'\], this run has \[\]; remove it"):
        run(params)


def test_weights_that_are_not_finite_are_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.training.trainer import Trainer

    end_step = Trainer._end_step

    def spoil(self: Trainer, step, *rest):
        end_step(self, step, *rest)
        if step == 4:
            next(self.model.parameters()).data[0, 0, 0, 0] = float("inf")

    monkeypatch.setattr(Trainer, "_end_step", spoil)
    params = config(tmp_path, run__checkpoint_epochs=1)
    with pytest.raises(UserError, match=r"step 5: 'conv1\.weight' is not finite; the last checkpoint is of level"):
        drive(params, Stops(6))
    assert snapshot.read(levels.run_dir(params).level(0).checkpoint).facts["step"] == 4


def test_keep_all_keeps_the_state_after_every_epoch(tmp_path: Path) -> None:
    directory = run(config(tmp_path, run__checkpoint_epochs=1, run__keep="all"))
    place = directory.level(0)
    assert [snapshot.read(place.checkpoint_of(epoch)).facts["step"] for epoch in (1, 2)] == [4, 8]
    assert place.checkpoint.exists()


def test_keep_best_keeps_the_weights_of_the_best_validation_epoch(tmp_path: Path) -> None:
    keys = {"data__val": 0.3, "data__subset": 240, "training__epochs": 4}
    directory = run(config(tmp_path, run__keep="best", **keys))
    place = directory.level(0)
    scores = [float(row["val_acc"]) for row in rows(place.epochs)]
    best = scores.index(max(scores)) + 1
    assert files.load_metadata(place.best)["epoch"] == str(best)
    every = run(config(tmp_path / "all", run__keep="all", run__checkpoint_epochs=1, **keys))
    stored = snapshot.read(every.level(0).checkpoint_of(best)).part("model.")
    assert files.digest(stored) == files.digest(files.load_weights(place.best))


def test_keep_best_wants_validation_images(tmp_path: Path) -> None:
    from utils.params.checks import check

    with pytest.raises(UserError, match=r"run\.keep=best: needs validation images"):
        check(config(tmp_path, run__keep="best", levels__count=1))


def test_a_task_of_one_level_tells_its_own_state(tmp_path: Path) -> None:
    import json

    from utils import record

    params = config(tmp_path, **TWO, levels__only=0)
    with pytest.raises(Preempted):
        drive(params, Stops(3))
    record.write_status(params, "preempted", reason="a test")
    directory = levels.run_dir(params)
    record.write_status(config(tmp_path, **TWO, levels__only=1), "running")
    assert json.loads(directory.level(0).status.read_text())["state"] == "preempted"
    assert json.loads(directory.status.read_text())["state"] == "running"
