"""All four recipes at once: stopping in the middle of any of their ramps and going on gives the bits of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.training.recipe.recipe_cases import batches, network, optimizer_of, random_masks, recipe, train
from utils import files, sparsity
from utils.tasks.classification import ImageClassification
from utils.training.extension import Extension
from utils.training.optimizers import load_optimizer_state, optimizer_state
from utils.training.recipe.ghost import GhostSkips
from utils.training.recipe.rescale import rescale_initial
from utils.training.recipe.smoothing import LabelSmoothing
from utils.training.recipe.soft import SoftActivations

TOTAL = 10
SECTION = {
    "soft__kind": "swish", "soft__hold": "1it", "soft__end": "6it",
    "ghost__kind": "1x1", "ghost__end": "8it",
    "smoothing__schedule": "linear", "smoothing__end": "7it",
    "rescale__method": "sgd", "rescale__iterations": 2, "rescale__lr": 0.05, "rescale__batch_size": 8,
}  # fmt: skip


class _Loaders:
    """What rescaling asks of the loaders."""

    class train:
        samples = 24

    class _Scoring(list):
        def close(self) -> None:
            pass

    def scoring(self, **_: object) -> _Scoring:
        return self._Scoring(batches(3))


class Level:
    """A level set up anew, as a process does that resumes it."""

    def __init__(self) -> None:
        self.model, self.task = network(), ImageClassification(10)
        masks, self.optimizer = random_masks(self.model), optimizer_of(self.model)
        self.held = sparsity.attach(self.model, self.optimizer, masks)
        section = recipe(**SECTION)
        ghost = {"side": 16, "seed": 0, "level": 0}
        loss, loaders = self.task.scoring_loss, _Loaders()
        self.extensions: list[Extension] = [
            SoftActivations(self.model, section, TOTAL, 5),
            GhostSkips(self.model, section, masks, self.optimizer, TOTAL, 5, **ghost),
            LabelSmoothing(self.task, section, TOTAL, 5),
        ]
        rescale_initial(self.model, section, masks, loaders, loss)  # type: ignore[arg-type]

    def train(self, steps: range) -> list[float]:
        def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return self.task.loss(model, batch)[0]

        return train(self.model, self.optimizer, self.held, self.extensions, steps, loss)

    def checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        weights = {name: value.clone() for name, value in files.state_of(self.model).items()}
        states = [extension.state() for extension in self.extensions]
        return weights, optimizer_state(self.model, self.optimizer), states


@pytest.fixture(scope="module")
def whole() -> tuple[list[float], str]:
    level = Level()
    losses = level.train(range(TOTAL))
    return losses, files.digest(files.state_of(level.model))


@pytest.mark.parametrize("at", [1, 3, 6, 7, 8, 9])
def test_a_resume_anywhere_has_the_bits_of_the_whole_run(whole: tuple[list[float], str], at: int) -> None:
    first = Level()
    assert first.train(range(at)) == whole[0][:at]
    weights, moments, states = first.checkpoint()
    assert set(weights) == set(network().state_dict())
    columns = [extension.epoch_end(0) for extension in first.extensions]
    first.model.eval()
    shown = first.model(batches(1)[0][0])
    second = Level()
    files.put_weights(second.model, weights)
    load_optimizer_state(second.model, second.optimizer, moments)
    for extension, state in zip(second.extensions, states, strict=True):
        extension.load_state(state)
    # Before it takes a step a resume may evaluate, or end the epoch.
    assert [extension.epoch_end(0) for extension in second.extensions] == columns
    assert torch.equal(second.model.eval()(batches(1)[0][0]), shown)
    second.model.train()
    assert second.train(range(at, TOTAL)) == whole[0][at:]
    assert files.digest(files.state_of(second.model)) == whole[1]
    assert second.held.violations() == []
