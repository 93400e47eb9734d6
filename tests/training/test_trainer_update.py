"""When the trainer takes the step with masks in one pass, and what is masked when it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.test_masked_update import updated
from tests.training.test_trainer import attached, half, network, plain_loop, rate, trainer
from utils import native
from utils.training.extension import Extension
from utils.training.gradient_norms import GradientNorms
from utils.training.masked_update import MaskedUpdate
from utils.training.trainer import Stage


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every step taken in one pass."""
    taken: list[int] = []
    step = MaskedUpdate.step

    def counted(update: MaskedUpdate) -> None:
        taken.append(1)
        step(update)

    monkeypatch.setattr(MaskedUpdate, "step", counted)
    return taken


def fitted(extensions: Callable[[nn.Module], list[Extension]] = lambda model: [], **keys: object) -> nn.Module:
    model = network()
    optimizer, held = attached(model)
    updated(optimizer, held)  # or skip: what follows counts steps in one pass
    trainer(model, **keys).fit(Stage(0, 2, rate), optimizer, held, extensions(model))
    assert held.violations() == []
    model[4](torch.ones(1, 96)).sum().backward()
    assert not model[4].weight.grad[~half(model)["4.weight"]].any(), "gradients are masked again after the last step"
    return model


def same(model: nn.Module, expected: nn.Module) -> None:
    for (name, mine), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_steps_in_one_pass_where_nothing_reads_gradients(steps: list[int], accumulation: int) -> None:
    model = fitted(accumulation=accumulation)
    assert len(steps) == 12 // accumulation
    same(model, plain_loop(2, accumulation)[0])


class Reading(Extension):
    """Looks at gradients at step 3 alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[int, bool] = {}

    def reads_gradients(self, step: int) -> bool:
        return step == 3

    def after_backward(self, step: int) -> None:
        pruned = ~half(self.model)["4.weight"]
        self.seen[step] = bool(self.model[4].weight.grad[pruned].any())


def test_gradients_are_masked_at_the_steps_that_read_them(steps: list[int]) -> None:
    reading: list[Reading] = []
    model = fitted(lambda m: [reading.append(Reading(m)) or reading[0]])  # type: ignore[func-returns-value,list-item]
    assert len(steps) == 11
    assert [step for step, dense in reading[0].seen.items() if not dense] == [3]
    same(model, plain_loop(2)[0])


class Replacing(Extension):
    """Takes the place of step 3 and asks for no dense gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pruned: list[bool] = []

    def replaces_step(self, step: int) -> bool:
        return step == 3

    def update(self, step: int) -> None:
        grad = self.model[4].weight.grad
        self.pruned.append(bool(grad[~half(self.model)["4.weight"]].any()))
        assert grad.any()


def test_an_update_in_the_steps_place_reads_masked_gradients_unless_it_asks(steps: list[int]) -> None:
    made: list[Replacing] = []
    fitted(lambda m: [made.append(Replacing(m)) or made[0]])  # type: ignore[func-returns-value,list-item]
    assert len(steps) == 11
    assert made[0].pruned == [False]


class Asking(Extension):
    """Reads gradients without a word on when."""

    def after_backward(self, step: int) -> None:
        pass


class Dense(Extension):
    def needs_dense_grad(self, step: int) -> bool:
        return True


@pytest.mark.parametrize("kind", [Asking, Dense])
def test_gradients_somebody_reads_are_left_to_hooks(steps: list[int], kind: type[Extension]) -> None:
    same(fitted(lambda model: [kind()]), plain_loop(2)[0])
    assert steps == []


def test_clipping_reads_gradients(steps: list[int]) -> None:
    same(fitted(clip=0.5), plain_loop(2, clip=0.5)[0])
    assert steps == []


def test_gradient_norms_are_those_of_masked_gradients(steps: list[int]) -> None:
    found: list[GradientNorms] = []

    def norms(model: nn.Module) -> list[Extension]:
        found.append(GradientNorms(model, 2, 0, lambda: 1.0, None))
        return [found[0]]

    fitted(norms)
    assert len(steps) == 10
    stepped, _ = plain_loop(0)
    images, labels = trainer(stepped).loaders.train.batches[0]
    half(stepped).apply_(stepped)
    nn.functional.cross_entropy(stepped(images), labels).backward()
    grad = stepped[4].weight.grad.masked_fill(~half(stepped)["4.weight"], 0.0)
    first = found[0].text().splitlines()
    column = first[0].split(",").index("4.weight")
    assert float(first[1].split(",")[column]) == pytest.approx(float(grad.norm()), rel=1e-5)


def test_without_the_library_one_line_tells_and_the_bits_are_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "UPDATE", tmp_path / "none.so")
    native.load_update.cache_clear()
    try:
        model = network()
        optimizer, held = attached(model)
        here = trainer(model)
        here.console.main = True
        here.fit(Stage(0, 2, rate), optimizer, held)
    finally:
        native.load_update.cache_clear()
    lines = [line for line in capsys.readouterr().out.splitlines() if "masks" in line]
    assert len(lines) == 1
    assert "not built" in lines[0]
    assert "make setup" in lines[0]
    same(model, plain_loop(2)[0])
