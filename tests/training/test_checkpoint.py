"""A stage stopped between any two steps: weights, optimizer, random state and loss scale go on bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.test_trainer import BATCHES, Memory, half, rate, trainer
from utils import files, params, sparsity
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import Preempted
from utils.system.rundir import LevelDir
from utils.system.stopping import Never, Poll
from utils.training import snapshot
from utils.training.checkpoint import Checkpoints
from utils.training.extension import Extension
from utils.training.optimizers import optimizer_state
from utils.training.trainer import Stage

EPOCHS = 3


class Counts(Extension):
    """State that is neither the model's nor a function of the step: how many steps were seen, resumes included."""

    def __init__(self) -> None:
        self.seen = 0

    def after_step(self, step: int) -> None:
        self.seen += 1

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        return {"density": float(self.seen)}

    def state(self) -> dict[str, torch.Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = int(state["seen"])


class StopsAt(Never):
    """Asks for a stop at the nth question."""

    def __init__(self, question: int) -> None:
        self.left = question

    def poll(self, due: bool = False) -> Poll:
        self.left -= 1
        return Poll("SIGTERM" if self.left == 0 else None, due)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(96, 3)
    )


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {
        "sgd": torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-3),
        "adamw": torch.optim.AdamW(model.parameters(), lr=1.0),
        "plain": torch.optim.SGD(model.parameters(), lr=1.0),
    }


def train(folder: Path, optimizer: str, stop: int = 0, memory: Memory | None = None, **keys: object) -> dict[str, Any]:
    """Train as a new process would, from the checkpoint in `folder` if there is one."""
    model = network()
    chosen = optimizers(model)[optimizer]
    held = sparsity.attach(model, chosen, half(model))
    here = trainer(model, memory, **keys)
    here.stopping = StopsAt(stop)
    section = dataclasses.replace(params.Run(), checkpoint_minutes=None)
    keeper = Checkpoints(LevelDir(folder), section, model, level=2, key="k", world=World(), console=Console(False))
    keeper.find()
    torch.manual_seed(99)  # whatever a process did before
    rows = here.fit(Stage(2, EPOCHS, lambda step: rate(step) / 3), chosen, held, [Counts()], keeper=keeper)
    return {
        "weights": files.digest(files.state_of(model)),
        "optimizer": files.digest(optimizer_state(model, chosen)),
        "scaler": here.scaler.state_dict(),
        "rows": [
            {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait", "seconds")} for row in rows
        ],
        "violations": held.violations(),
    }


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("sgd", {}),
        ("adamw", {"clip": 0.5}),
        ("plain", {"accumulation": 2}),
        ("sgd", {"precision": "float16"}),
        ("adamw", {"precision": "bfloat16", "eval_every": 2}),
    ],
)
def test_stopped_at_every_question_it_goes_on_bit_for_bit(optimizer: str, keys: dict, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", optimizer, **keys)
    assert whole["violations"] == []
    steps = EPOCHS * BATCHES // int(keys.get("accumulation", 1))
    for question in range(1, steps + 2 * EPOCHS + 1):
        folder = tmp_path / str(question)
        try:
            found = train(folder, optimizer, stop=question, **keys)
        except Preempted:
            found = train(folder, optimizer, **keys)
        assert found == whole, question


def test_a_scale_that_has_grown_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The scale grows every 4 finite steps here: the stop falls between two growths.
    scaler = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda *rest, **keys: scaler(*rest, **keys, growth_interval=4))
    whole = train(tmp_path / "whole", "sgd", precision="float16")
    assert whole["scaler"]["scale"] > 65536.0
    with pytest.raises(Preempted):
        train(tmp_path / "cut", "sgd", stop=6, precision="float16")
    assert train(tmp_path / "cut", "sgd", precision="float16") == whole


def test_float16_skips_a_step_whose_loss_is_not_finite(tmp_path: Path) -> None:
    memory = Memory()
    memory.batches[2][0][:] = float("inf")
    found = train(tmp_path, "sgd", memory=memory, precision="float16")
    assert all(0.0 < row["train_loss"] < 10.0 for row in found["rows"])
    assert found["scaler"]["scale"] == 65536.0 / 2**EPOCHS


def test_the_clock_alone_asks_for_a_checkpoint(tmp_path: Path) -> None:
    model = network()
    place = LevelDir(tmp_path)
    section = dataclasses.replace(params.Run(), checkpoint_minutes=1e-6)
    keeper = Checkpoints(place, section, model, level=0, key="k", world=World(), console=Console(False))
    chosen = optimizers(model)["sgd"]
    held = sparsity.attach(model, chosen, half(model))
    trainer(model).fit(Stage(0, 1, rate), chosen, held, keeper=keeper)
    assert snapshot.read(place.checkpoint).facts["step"] == BATCHES
    assert snapshot.read(place.previous).facts["step"] == BATCHES - 1
    assert keeper.last() == f"the last checkpoint is of level 0 epoch 0 step {BATCHES}"


def test_a_channels_last_model_keeps_its_strides(tmp_path: Path) -> None:
    def strides(model: nn.Module) -> list[tuple[int, ...]]:
        return [p.stride() for p in model.parameters()]

    model = network().to(memory_format=torch.channels_last)
    place, section = LevelDir(tmp_path), params.Run()
    for _ in range(2):
        chosen = optimizers(model)["sgd"]
        held = sparsity.attach(model, chosen, half(model))
        here = trainer(model)
        here.stopping = StopsAt(4)
        keeper = Checkpoints(place, section, model, level=0, key="k", world=World(), console=Console(False))
        keeper.find()
        before = strides(model)
        with pytest.raises(Preempted):
            here.fit(Stage(0, 3, rate), chosen, held, keeper=keeper)
        assert strides(model) == before
        assert all(chosen.state[p]["momentum_buffer"].stride() == p.stride() for p in model.parameters())
        held.detach()
