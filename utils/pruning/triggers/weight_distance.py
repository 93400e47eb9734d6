"""Early pruning once the weights' distance from where they started settles (EarlyCroP, Rachwan et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.masks import bare
from utils.pruning.triggers import Reading, Trigger, trigger
from utils.system.distributed import from_main
from utils.system.errors import UserError

_REFERENCE = "reference."


def published_fires(curve: Sequence[float], threshold: float) -> bool:
    """Whether |d_t - d_(t-1)| < threshold for the last two of d_0 = 0, d_1, ..., d_t; never for d_0 alone."""
    return len(curve) >= 2 and abs(curve[-1] - curve[-2]) < threshold


def released_fires(curve: Sequence[float], density: float, threshold: float | None = None) -> bool:
    """Whether |d_t - d_(t-1)| < tau for the last two of d_1 = 0, d_2, ..., d_t, t >= 3.

    tau is d_2 * density unless a `threshold` is given.
    """
    if len(curve) < 3:
        return False
    return abs(curve[-1] - curve[-2]) < (curve[1] * density if threshold is None else threshold)


class _WeightDistance(Trigger):
    """Keeps reference weights and the curve of relative distances ||w_t - reference|| / ||reference||.

    Over all parameters, weights, biases and norms, but no buffers; norms in float64. Rank 0's distance counts.
    """

    reference: dict[str, Tensor]
    curve: list[float]

    def _refer(self, model: nn.Module) -> None:
        """Take the model's weights as reference."""
        named = bare(model).named_parameters()
        self.reference = {name: torch.empty(p.shape, dtype=p.dtype).copy_(p.detach()) for name, p in named}

    def _distance(self, model: nn.Module) -> float:
        return from_main(lambda: relative_distance(model, self.reference))

    def state(self) -> dict[str, Tensor]:
        """The `curve` and the weights distances are taken from, as `reference.<parameter>`."""
        weights = {_REFERENCE + name: tensor.clone() for name, tensor in self.reference.items()}
        return {"curve": torch.tensor(self.curve, dtype=torch.float64), **weights}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        found = {name.removeprefix(_REFERENCE): t for name, t in state.items() if name.startswith(_REFERENCE)}
        mine = {name: t.shape for name, t in self.reference.items()}
        if "curve" not in state or {name: t.shape for name, t in found.items()} != mine:
            raise UserError("the early trigger's state is another model's or trigger's; remove the checkpoint")
        self.reference = {name: tensor.clone() for name, tensor in found.items()}
        self.curve = state["curve"].tolist()


@trigger("weight_distance")
class WeightDistance(_WeightDistance):
    """EarlyCroP's rule as published: the distance from the initial weights changes by less than the density.

    Fires after the first epoch t >= 1 with | ||w_t - w_0|| - ||w_(t-1) - w_0|| | / ||w_0|| < 1 - target sparsity,
    which is the target density. The value is d_t = ||w_t - w_0|| / ||w_0||.
    """

    def __init__(self, model: nn.Module, density: float, threshold: float | None = None, window: int = 5) -> None:
        super().__init__(model, density, threshold, window)
        self._refer(model)
        self.curve = [0.0]

    def observe(self, model: nn.Module) -> Reading:
        """The distance after this epoch."""
        self.curve.append(self._distance(model))
        threshold = self.density if self.threshold is None else self.threshold
        return Reading(published_fires(self.curve, threshold), self.curve[-1])


@trigger("weight_distance_released")
class WeightDistanceReleased(_WeightDistance):
    """EarlyCroP's rule as in its released code: distances from the weights after the first epoch.

    d_1 = 0 and d_t = ||w_t - w_1|| / ||w_1||. Fires after the first epoch t >= 3 with |d_t - d_(t-1)| < d_2 * (1 -
    target sparsity). (At t = 2 the change is d_2 itself, which is never below that.) The value is d_t.
    """

    def __init__(self, model: nn.Module, density: float, threshold: float | None = None, window: int = 5) -> None:
        super().__init__(model, density, threshold, window)
        self._refer(model)
        self.curve = []

    def observe(self, model: nn.Module) -> Reading:
        """The distance after this epoch; the first epoch's weights become the reference."""
        if not self.curve:
            self._refer(model)
        self.curve.append(self._distance(model) if self.curve else 0.0)
        return Reading(released_fires(self.curve, self.density, self.threshold), self.curve[-1])


@torch.no_grad()
def relative_distance(model: nn.Module, reference: dict[str, Tensor]) -> float:
    """||w - reference|| / ||reference|| over all parameters of the bare model, Euclidean norms in float64.

    Raises UserError when the reference is all zero.
    """
    moved, length = [], []
    for name, p in bare(model).named_parameters():
        start = reference[name].to(p.device).double()
        moved.append((p.double() - start).square().sum())
        length.append(start.square().sum())
    norm = math.sqrt(float(torch.stack(length).sum()))
    if norm == 0.0:
        raise UserError("early.trigger: all reference weights are 0, so distances mean nothing; initialise the model")
    return math.sqrt(float(torch.stack(moved).sum())) / norm
