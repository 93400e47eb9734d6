"""Recipes: how a sparse network is trained. Each is an extension that is gone from the network when it is over.

soft        soft activations annealed to the stock ones
ghost       skip connections around masked convolutions, faded out
smoothing   label smoothing by a schedule
rescale     one learned scale per tensor of the initial weights (GradInit)

What changes with time is a pure function of the optimizer step; the network's own parameters, names and saved weights
are those of the stock network throughout.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from utils.system.errors import UserError
from utils.training.extension import Extension


def at_step(step: int) -> dict[str, Tensor]:
    """The state of an extension whose doings are a function of the step: the one it was called for last.

    A resume may evaluate or end an epoch before it takes a step, so the step itself belongs to the state.
    """
    return {"step": torch.tensor(step)}


def step_of(state: dict[str, Tensor]) -> int:
    """What `at_step` stored. Raises UserError where it stored nothing."""
    if "step" not in state:
        raise UserError("a recipe's state holds no step; remove the checkpoint")
    return int(state["step"])


class Inserted(Extension, ABC):
    """An extension that puts something into the network, which it can also take out for a while."""

    @abstractmethod
    def insert(self) -> None:
        """Put it in; nothing to do when it is in or over."""

    @abstractmethod
    def remove(self) -> None:
        """Take it out: the network is the stock one; nothing to do when it is out."""


@contextlib.contextmanager
def stock(extensions: Sequence[Extension]) -> Iterator[None]:
    """Within it the network is the stock one, whatever `extensions` have put into it: for scores and paths."""
    inserted = [extension for extension in extensions if isinstance(extension, Inserted)]
    for extension in reversed(inserted):
        extension.remove()
    try:
        yield
    finally:
        for extension in inserted:
            extension.insert()
