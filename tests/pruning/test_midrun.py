"""One pruning in the middle of training: when it happens, what it sees, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils import sparsity
from utils.masks import Masks, prunable_parameters
from utils.params.early import Early
from utils.params.load import build as parameters
from utils.pruning.midrun import MidRunPruning
from utils.pruning.triggers import Reading, Trigger, build
from utils.sparsity import Sparsity
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.tasks.classification import ImageClassification
from utils.training.averaging import ExponentialAverage
from utils.training.extension import Extension
from utils.training.trainer import Row, Stage, Trainer

STEPS = 4  # per epoch


class Batches:
    """A loader of fixed batches."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(6, 3, 4, 4, generator=generator), torch.randint(3, (6,), generator=generator))
            for _ in range(count)
        ]
        self.start = 0

    def set_epoch(self, level: int, epoch: int, start_batch: int = 0, size: int | None = None) -> None:
        self.start = start_batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches[self.start :])


class Recorded(Trigger):
    """Fires at the epochs given; its distances are the epochs' numbers."""

    def __init__(self, *epochs: int) -> None:
        self.epochs, self.seen = epochs, 0

    def observe(self, model: nn.Module) -> Reading:
        self.seen += 1
        return Reading(self.seen in self.epochs, float(self.seen))

    def state(self) -> dict[str, torch.Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = int(state["seen"])


class Watching(Extension):
    """Masks, weights, and whether anything pruned is alive, after every step."""

    def __init__(self, model: nn.Module, held: Sparsity) -> None:
        self.model, self.held = model, held
        self.densities: list[float] = []
        self.heard: list[Masks] = []
        self.weights: list[torch.Tensor] = []

    def after_step(self, step: int) -> None:
        assert self.held.violations() == []
        self.densities.append(self.held.masks.density)
        self.weights.append(self.model[4].weight.detach().clone())

    def masks_changed(self, masks: Masks) -> None:
        self.heard.append(masks)


class Run:
    """A tiny training with a pruning in it that keeps every other weight."""

    def __init__(self, epochs: int = 3, momentum: float = 0.9, **when: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=momentum)
        dense = Masks.dense(self.model)
        self.held = sparsity.attach(self.model, self.optimizer, dense)
        self.stage = Stage(0, epochs, lambda step: 0.05)
        self.scored: list[torch.Tensor] = []
        self.gradients: list[bool] = []
        self.told: list[int] = []
        self.on_pruned: Callable[[int], None] = lambda step: None
        self.extensions: list[Extension] = []
        self.pruning = MidRunPruning(
            self.model,
            self.held,
            self.extensions,
            self.prune,
            steps_per_epoch=STEPS,
            on_pruned=self.pruned,
            **when,
        )
        self.watching = Watching(self.model, self.held)
        self.extensions += [self.pruning, self.watching]

    def prune(self) -> Masks:
        self.scored.append(self.model[4].weight.detach().clone())
        self.gradients.append(any(p.grad is not None for p in self.model.parameters()))
        found = {}
        for name, p in prunable_parameters(self.model).items():
            found[name] = torch.arange(p.numel()).view(p.shape) % 2 == 0
        return Masks(found)

    def pruned(self, step: int) -> None:
        self.told.append(step)
        self.on_pruned(step)

    def fit(self) -> list[Row]:
        keys = {"training.precision": "float32", "training.batch_size": 6, "training.eval_every": 100}
        params = parameters({"levels.count": 1, **keys})
        spec = SimpleNamespace(image_size=4, size_at=lambda progress: None)
        loaders = SimpleNamespace(train=Batches(STEPS), val=None, test=Batches(1), spec=spec)
        place = {"seed": 0, "world": World(), "device": torch.device("cpu"), "console": Console(False)}
        trainer = Trainer(self.model, ImageClassification(3), loaders, params.training, params.distributed, **place)
        return trainer.fit(self.stage, self.optimizer, self.held, self.extensions)


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6, 8, 11])
def test_a_pruning_at_a_step_comes_after_exactly_so_many_steps(at: int) -> None:
    run = Run(at=at)
    rows = run.fit()
    assert run.told == [at]
    assert run.pruning.pruned_at_step == at
    assert run.watching.densities == [1.0] * at + [0.5] * (12 - at)
    assert [row["density"] for row in rows] == [0.5 if at <= STEPS * (e + 1) else 1.0 for e in range(3)]
    assert "distance" not in rows[0]
    assert run.watching.heard == [run.held.masks]
    assert run.gradients == [False]
    if at:
        assert torch.equal(run.scored[0], run.watching.weights[at - 1]), "scored on other weights than the current ones"


def test_a_pruning_at_the_last_step_still_happens_and_is_evaluated() -> None:
    run = Run(at=12)
    rows = run.fit()
    assert run.told == [12]
    assert rows[-1]["density"] == 0.5
    images, labels = Batches(1).batches[0]
    run.model.eval()
    with torch.no_grad():
        right = (run.model(images).argmax(1) == labels).double().mean()
        loss = nn.functional.cross_entropy(run.model(images), labels)
    assert rows[-1]["test_acc"] == pytest.approx(100 * float(right))
    assert rows[-1]["test_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_step_beyond_the_training_is_never_reached() -> None:
    run = Run(at=13)
    run.fit()
    assert run.told == []
    assert run.pruning.pruned_at_step is None


@pytest.mark.parametrize(
    ("fires", "latest", "expected"),
    [
        ((2,), None, 8),
        ((1, 2, 3), None, 4),
        ((), None, None),
        ((), 6, 6),
        ((), 8, 8),
        ((2,), 6, 6),
        ((2,), 9, 8),
        ((2,), 8, 8),
        ((3,), 0, 0),
    ],
)
def test_an_early_pruning_follows_its_trigger_or_the_latest_step(
    fires: tuple[int, ...], latest: int | None, expected: int | None
) -> None:
    run = Run(trigger=Recorded(*fires), at=latest)
    rows = run.fit()
    assert run.told == ([] if expected is None else [expected])
    assert run.pruning.pruned_at_step == expected
    assert [row["distance"] for row in rows] == [1.0, 2.0, 3.0]
    after = 12 if expected is None else expected
    assert run.watching.densities == [1.0] * after + [0.5] * (12 - after)


def test_training_may_be_made_longer_by_the_pruning_even_at_its_very_end() -> None:
    for fires, longer in ((2, 5), (3, 6)):
        run = Run(trigger=Recorded(fires))

        def extend(step: int, run: Run = run) -> None:
            run.stage.epochs = step // STEPS + 3
            run.stage.lr = lambda at: 0.01 * (at - step + 1)

        run.on_pruned = extend
        rows = run.fit()
        assert len(rows) == longer
        assert [row["lr"] for row in rows] == pytest.approx([0.05] * fires + [0.01, 0.05, 0.09])
        assert ["test_acc" in row for row in rows] == [False] * (longer - 1) + [True]


def test_the_distance_is_logged_before_the_weights_are_pruned() -> None:
    run = Run(trigger=Recorded(99), at=8)
    run.pruning.trigger = build(Early(threshold=1e-12), model=run.model, density=0.5)
    start = torch.cat([p.detach().flatten() for p in run.model.parameters()]).double()
    rows = run.fit()
    assert run.told == [8]

    class Stop(Extension):
        def epoch_end(self, epoch: int) -> dict[str, float | None]:
            now = torch.cat([p.detach().flatten() for p in other.model.parameters()]).double()
            seen.append(float((now - start).norm() / start.norm()))
            return {}

    other, seen = Run(at=100), []
    other.extensions.append(Stop())
    other.fit()
    assert [row["distance"] for row in rows[:2]] == pytest.approx(seen[:2], rel=1e-9)
    assert rows[2]["distance"] != pytest.approx(seen[2], rel=1e-3)


def test_momentum_and_averages_go_on_inside_the_masks() -> None:
    run = Run(at=5)
    average = ExponentialAverage(run.model, 0.9)
    run.extensions.append(average)
    run.fit()
    for name, mask in run.held.masks.items():
        averaged = average.state()[f"average.{name}"]
        assert not averaged[~mask].any()
        assert averaged[mask].any()
        momentum = run.optimizer.state[run.model.get_parameter(name)]["momentum_buffer"]
        assert not momentum[~mask].any()
        assert momentum[mask].any()


def test_scoring_sees_dense_gradients_and_training_masked_ones_afterwards() -> None:
    run = Run(at=2)
    quarter = {n: torch.arange(p.numel()).view(p.shape) % 4 == 0 for n, p in prunable_parameters(run.model).items()}
    run.held.set(Masks(quarter))
    seen = []

    def prune() -> Masks:
        images, labels = Batches(1).batches[0]
        nn.functional.cross_entropy(run.model(images), labels).backward()
        seen.append(run.model[4].weight.grad.clone())
        run.optimizer.zero_grad()
        return Masks(quarter)

    run.pruning.prune = prune
    run.fit()
    assert seen[0][~quarter["4.weight"]].any()
    assert run.held.violations() == []
    momentum = run.optimizer.state[run.model[4].weight]["momentum_buffer"]
    assert not momentum[~quarter["4.weight"]].any()


def test_a_restart_knows_whether_it_has_pruned() -> None:
    for epochs_before in (0, 1, 2):
        first, second = Run(trigger=Recorded(2)), Run(trigger=Recorded(2))
        for epoch in range(epochs_before):
            first.pruning.epoch_end(epoch)
        second.pruning.load_state(first.pruning.state())
        assert second.pruning.pruned_at_step == first.pruning.pruned_at_step == (8 if epochs_before == 2 else None)
        for epoch in range(epochs_before, 3):
            second.pruning.epoch_end(epoch)
        # What a pruning changes of the schedule is done again, whether it happened before the restart or after it.
        assert second.told == [8]


def test_a_state_of_another_moment_is_refused() -> None:
    with_trigger, without = Run(trigger=Recorded(2)).pruning, Run(at=3).pruning
    for mine, other in ((with_trigger, without), (without, with_trigger)):
        with pytest.raises(UserError, match=r"another pruning\.moment"):
            mine.load_state(other.state())
    with pytest.raises(ValueError, match="neither a step nor a trigger"):
        Run()


def test_a_pruning_that_fails_leaves_gradients_masked() -> None:
    run = Run(at=1)

    def fail() -> Masks:
        raise UserError("no such density")

    run.pruning.prune = fail
    with pytest.raises(UserError, match="no such density"):
        run.fit()
    assert run.pruning.pruned_at_step is None
    assert run.held.masks.density == 1.0
    half = Masks({n: torch.arange(p.numel()).view(p.shape) % 2 == 0 for n, p in prunable_parameters(run.model).items()})
    run.held.set(half)
    run.model(Batches(1).batches[0][0]).square().sum().backward()
    assert not run.model[4].weight.grad[~half["4.weight"]].any()
    assert math.isfinite(float(run.model[4].weight.grad.sum()))
