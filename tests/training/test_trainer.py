"""The trainer against a plain loop, and its promises about steps, marks, extensions and evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils import sparsity
from utils.masks import Masks, prunable_parameters
from utils.params.load import build
from utils.sparsity import Sparsity
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.tasks.classification import ImageClassification
from utils.training.extension import Extension
from utils.training.trainer import Stage, Trainer

BATCHES, BATCH = 6, 8


class Memory:
    """A loader of fixed batches, ordered by epoch, that remembers how it was asked."""

    def __init__(self, count: int = BATCHES, size: int = BATCH) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(size, 3, 4, 4, generator=generator), torch.randint(3, (size,), generator=generator))
            for _ in range(count)
        ]
        self.samples = count * size
        self.start_batch = 0
        self.epoch = 0
        self.asked: list[tuple[int, int, int]] = []
        self.sizes: list[int | None] = []

    def set_epoch(self, level: int, epoch: int, start_batch: int = 0, size: int | None = None) -> None:
        self.asked.append((level, epoch, start_batch))
        self.sizes.append(size)
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return len(self.batches)

    def order(self, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self.batches[epoch:] + self.batches[:epoch]

    def __iter__(self):
        start, self.start_batch = self.start_batch, 0
        return iter(self.order(self.epoch)[start:])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))


def half(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(4)
    return Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in prunable_parameters(model).items()})


def trainer(model: nn.Module, train: Memory | None = None, **keys: object) -> Trainer:
    base = {"precision": "float32", "batch_size": BATCH * int(str(keys.get("accumulation", 1)))}
    section = {f"training.{key}": value for key, value in (base | keys).items()}
    params = build({"levels.count": 1, **section})
    spec = SimpleNamespace(image_size=4, size_at=lambda progress: None)
    loaders = SimpleNamespace(train=train or Memory(), val=None, test=Memory(2), spec=spec)
    place = {"seed": 0, "world": World(), "device": torch.device("cpu"), "console": Console(False)}
    return Trainer(model, ImageClassification(3), loaders, params.training, params.distributed, **place)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)


def attached(model: nn.Module) -> tuple[torch.optim.SGD, Sparsity]:
    optimizer = sgd(model)
    return optimizer, sparsity.attach(model, optimizer, half(model))


def rate(step: int) -> float:
    return 0.1 / (1 + step)


def plain_loop(epochs: int, accumulation: int = 1, clip: float | None = None) -> tuple[nn.Module, list[float]]:
    """Sixty lines less: what the trainer must come to, written without it."""
    model, memory = network(), Memory()
    masks = half(model)
    masks.apply_(model)
    optimizer, step, means = sgd(model), 0, []
    for epoch in range(epochs):
        losses = []
        for number, (images, labels) in enumerate(memory.order(epoch)):
            loss = F.cross_entropy(model(images), labels)
            (loss / accumulation).backward()
            losses.append(loss.item())
            if (number + 1) % accumulation == 0:
                for name, p in model.named_parameters():
                    if name in masks:
                        p.grad[~masks[name]] = 0
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.param_groups[0]["lr"] = rate(step)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        means.append(sum(losses) / len(losses))
    return model, means


@pytest.mark.parametrize(("accumulation", "clip"), [(1, None), (2, None), (3, 0.5)])
def test_training_is_the_plain_loop_bit_for_bit(accumulation: int, clip: float | None) -> None:
    model = network()
    optimizer, held = attached(model)
    rows = trainer(model, accumulation=accumulation, clip=clip or "none").fit(Stage(0, 3, rate), optimizer, held)
    expected, losses = plain_loop(3, accumulation, clip)
    for (name, mine), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert [row["train_loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [row["step"] for row in rows] == [BATCHES // accumulation * (e + 1) for e in range(3)]
    assert [row["lr"] for row in rows] == [rate(BATCHES // accumulation * e) for e in range(3)]


def test_a_stage_that_starts_inside_an_epoch_skips_its_first_batches() -> None:
    model, memory = network(), Memory()
    optimizer, held = attached(model)
    rows = trainer(model, memory).fit(Stage(2, 2, rate, start=4), optimizer, held)
    assert memory.asked == [(2, 0, 4), (2, 1, 0)]
    assert [row["step"] for row in rows] == [6, 12]


def test_a_start_inside_an_epoch_counts_micro_batches() -> None:
    model, memory = network(), Memory()
    optimizer, held = attached(model)
    rows = trainer(model, memory, accumulation=2).fit(Stage(0, 2, rate, start=4), optimizer, held)
    assert memory.asked == [(0, 1, 2)]
    assert [row["step"] for row in rows] == [6]


def test_images_grow_with_the_share_of_training() -> None:
    model, memory = network(), Memory()
    optimizer, held = attached(model)
    here = trainer(model, memory)
    here.loaders.spec.size_at = lambda progress: int(100 * progress)
    here.fit(Stage(0, 4, rate), optimizer, held)
    assert memory.sizes == [0, 25, 50, 75]


def test_the_last_epoch_is_always_evaluated() -> None:
    model = network()
    optimizer, held = attached(model)
    rows = trainer(model, eval_every=2).fit(Stage(0, 3, rate), optimizer, held)
    assert ["test_acc" in row for row in rows] == [False, True, True]


def test_marks_are_called_once_at_their_step() -> None:
    model, seen = network(), {}
    optimizer, held = attached(model)
    marks = {step: (lambda step=step: seen.__setitem__(step, model[4].weight.detach().clone())) for step in (0, 5, 6)}
    start = model[4].weight.detach().clone()
    trainer(model).fit(Stage(0, 1, rate, marks=marks), optimizer, held)
    assert sorted(seen) == [0, 5, 6]
    assert torch.equal(seen[0], start * half(model)["4.weight"])
    assert torch.equal(seen[6], model[4].weight)
    assert not torch.equal(seen[5], seen[6])


def test_extensions_are_called_around_every_step_in_order() -> None:
    calls: list[tuple[str, int]] = []

    class Spy(Extension):
        def needs_dense_grad(self, step: int) -> bool:
            calls.append(("needs", step))
            return step == 1

        def before_step(self, step: int) -> None:
            calls.append(("before", step))

        def after_step(self, step: int) -> None:
            calls.append(("after", step))

        def epoch_end(self, epoch: int) -> dict[str, float]:
            calls.append(("end", epoch))
            return {"extra": 1.0}

    model = network()
    optimizer, held = attached(model)
    rows = trainer(model, accumulation=2).fit(Stage(0, 1, rate), optimizer, held, [Spy()])
    expected = [(word, step) for step in range(3) for word in ("needs", "before", "after")] + [("end", 0)]
    assert calls == expected
    assert rows[0]["extra"] == 1.0


class Replacing(Extension):
    """Takes the place of the steps given, and keeps what it saw there."""

    def __init__(self, model: nn.Module, steps: set[int], dense: bool = True) -> None:
        self.model, self.steps, self.dense = model, steps, dense
        self.grads: dict[int, dict[str, torch.Tensor]] = {}
        self.after: list[int] = []

    def needs_dense_grad(self, step: int) -> bool:
        return self.dense and step in self.steps

    def replaces_step(self, step: int) -> bool:
        return step in self.steps

    def update(self, step: int) -> None:
        self.grads[step] = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def after_step(self, step: int) -> None:
        self.after.append(step)


class Watching(Extension):
    """Copies weights and optimizer state after every step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.seen = model, optimizer, {}

    def after_step(self, step: int) -> None:
        state = [v.clone() for p in self.model.parameters() for v in self.optimizer.state[p].values()]
        self.seen[step] = [p.detach().clone() for p in self.model.parameters()] + state


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dense", [True, False])
def test_an_update_replaces_the_step_and_sees_the_whole_steps_gradient(accumulation: int, dense: bool) -> None:
    model = network()
    optimizer, held = attached(model)
    replacing, watching = Replacing(model, {1}, dense), Watching(model, optimizer)
    # A clip that would shrink every gradient: updates must see them unclipped.
    here = trainer(model, accumulation=accumulation, clip=1e-3)
    here.fit(Stage(0, 1, rate), optimizer, held, [replacing, watching])
    steps = BATCHES // accumulation
    assert sorted(watching.seen) == list(range(steps))
    assert replacing.after == [step for step in range(steps) if step != 1]
    same = [torch.equal(a, b) for a, b in zip(watching.seen[0], watching.seen[1], strict=True)]
    assert all(same)
    assert not torch.equal(watching.seen[1][0], watching.seen[2][0])
    again = network()
    with torch.no_grad():
        for p, value in zip(again.parameters(), watching.seen[0], strict=False):
            p.copy_(value)
    for images, labels in Memory().batches[accumulation : 2 * accumulation]:
        (F.cross_entropy(again(images), labels) / accumulation).backward()
    masks = half(model)
    for name, p in again.named_parameters():
        expected = p.grad.masked_fill(~masks[name], 0) if name in masks and not dense else p.grad
        torch.testing.assert_close(replacing.grads[1][name], expected, msg=name)
    pruned = replacing.grads[1]["4.weight"][~masks["4.weight"]]
    assert bool((pruned != 0).any()) == dense


def test_a_replaced_step_leaves_no_gradient_to_the_next_one() -> None:
    model = network()
    optimizer, held = attached(model)
    trainer(model).fit(Stage(0, 1, rate), optimizer, held, [Replacing(model, {2, 5})])
    expected, memory = network(), Memory()
    theirs = sgd(expected)
    masks = half(expected)
    masks.apply_(expected)
    for step, (images, labels) in enumerate(memory.order(0)):
        loss = F.cross_entropy(expected(images), labels)
        if step in (2, 5):
            continue
        loss.backward()
        for name, p in expected.named_parameters():
            if name in masks:
                p.grad[~masks[name]] = 0
        theirs.param_groups[0]["lr"] = rate(step)
        theirs.step()
        theirs.zero_grad()
    for (name, mine), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    (model(memory.batches[0][0]).sum()).backward()
    assert not model[4].weight.grad[~masks["4.weight"]].any(), "the gate stayed open after the last step"


def test_dense_gradients_that_nothing_replaces_never_reach_the_optimizer() -> None:
    class Curious(Extension):
        def needs_dense_grad(self, step: int) -> bool:
            return step % 2 == 0

    model = network()
    optimizer, held = attached(model)
    trainer(model, clip=0.5).fit(Stage(0, 2, rate), optimizer, held, [Curious()])
    expected, _ = plain_loop(2, clip=0.5)
    for (name, mine), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert held.violations() == []


def test_float16_updates_see_unscaled_gradients_and_training_goes_on() -> None:
    grads = {}
    for kind in ("float16", "float32"):
        model = network()
        optimizer, held = attached(model)
        replacing = Replacing(model, {0, 3, 5})
        here = trainer(model, precision=kind)
        here.fit(Stage(0, 2, lambda step: 0.01), optimizer, held, [replacing])
        assert held.violations() == []
        grads[kind] = replacing.grads[0]
    assert grads["float16"]["4.weight"].abs().max() > 0.01
    for name, grad in grads["float16"].items():
        torch.testing.assert_close(grad, grads["float32"][name], rtol=0.05, atol=5e-3, msg=name)


def test_a_stage_may_grow_and_change_its_rate_while_it_runs() -> None:
    class Longer(Extension):
        def epoch_end(self, epoch: int) -> dict[str, float | None]:
            if epoch == 1:
                stage.epochs, stage.lr = 5, lambda step: 1e-3 * step
            return {}

    model, memory = network(), Memory()
    optimizer, held = attached(model)
    stage = Stage(0, 2, rate)
    here = trainer(model, memory, eval_every=4)
    here.loaders.spec.size_at = lambda progress: round(100 * progress)
    rows = here.fit(stage, optimizer, held, [Longer()])
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["test_acc" in row for row in rows] == [False, False, False, True, True]
    assert [row["lr"] for row in rows] == pytest.approx([rate(0), rate(6), 0.012, 0.018, 0.024])
    assert optimizer.param_groups[0]["lr"] == 1e-3 * 29
    assert memory.sizes == [0, 50, 40, 60, 80]


def test_evaluation_counts_every_sample_once_and_leaves_the_model_training() -> None:
    model = network()
    here = trainer(model)
    uneven = Memory(2)
    uneven.batches.append((torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 2])))
    found = here.evaluate(uneven)
    model.eval()
    images, labels = (torch.cat(part) for part in zip(*uneven.batches, strict=True))
    with torch.no_grad():
        logits = model(images)
    assert found["acc"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    here.evaluate(uneven)
    assert model.training


def test_a_nan_is_found_at_the_next_look() -> None:
    model, memory = network(), Memory()
    memory.batches[2][0][0, 0, 0, 0] = float("nan")
    optimizer, held = attached(model)
    with pytest.raises(UserError, match=r"level 3, step 2, rank 0: the loss became nan at learning rate 0\.0333"):
        trainer(model, memory, check_every=2).fit(Stage(3, 1, rate), optimizer, held)


def test_a_loader_that_ends_early_is_not_silently_accepted() -> None:
    model = network()

    class Short(Memory):
        def __iter__(self):
            return iter(self.batches[:2])

    optimizer, held = attached(model)
    with pytest.raises(RuntimeError, match="ended after 2 of 6"):
        trainer(model, Short()).fit(Stage(0, 1, rate), optimizer, held)


def test_dropout_depends_on_the_place_in_training_not_on_history() -> None:
    def run(noise: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))
        optimizer = sgd(model)
        held = sparsity.attach(model, optimizer, Masks.dense(model))
        here = trainer(model)
        torch.rand(noise)
        here.fit(Stage(0, 2, rate), optimizer, held)
        return model[2].weight.detach()

    assert torch.equal(run(1), run(17))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_follows_float32_and_stays_inside(precision: str) -> None:
    losses = {}
    for kind in (precision, "float32"):
        model = network()
        optimizer, held = attached(model)
        # Clipping must see gradients without the scaler's factor, else hardly anything is learned.
        rows = trainer(model, precision=kind, clip=0.5).fit(Stage(0, 6, lambda step: 0.05), optimizer, held)
        losses[kind] = [row["train_loss"] for row in rows]
        assert held.violations() == []
        assert model[0].weight.dtype == torch.float32
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.1)
    assert losses[precision][-1] < 0.9 * losses[precision][0]
