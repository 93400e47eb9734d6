"""Early pruning once the channels that BatchNorm would prune stay the same (Early-Bird tickets, You et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.data.stateless import derive
from utils.masks import bare
from utils.pruning.select import Layer, Pool, kept_count, top
from utils.pruning.triggers import Reading, Trigger, trigger
from utils.system.distributed import from_main
from utils.system.errors import UserError

DISTANCE = 0.1
"""The paper's threshold."""


def early_bird_fires(distances: Sequence[float], threshold: float, window: int) -> bool:
    """Whether the last `window` mask distances of consecutive epochs, if there are that many, are below `threshold`."""
    return len(distances) >= window and max(distances[-window:]) < threshold


@trigger("early_bird")
class EarlyBird(Trigger):
    """Early-Bird: the masks of BatchNorm channels hardly change from epoch to epoch (You et al. 2020, algorithm 1).

    An epoch's mask keeps the channels of largest |gamma|, floor(density * channels + 0.5) of all BatchNorm layers
    together. The distance of two epochs is the share of channels on which their masks differ. Fires once it was
    below 0.1 for the last `window` pairs of consecutive epochs, so after epoch window + 1 at the earliest. The value is
    the last distance. Two masks of one density differ in at most 2 min(density, 1 - density) of the channels: at
    densities up to 0.05 or from 0.95 on 0.1 says nothing, and early.threshold should be lowered.
    """

    def __init__(self, model: nn.Module, density: float, threshold: float | None = None, window: int = 5) -> None:
        super().__init__(model, density, threshold, window)
        if not _gammas(model):
            raise UserError("early.trigger=early_bird: the model has no BatchNorm with weights; use weight_distance")
        self.mask: Tensor | None = None
        self.distances: list[float] = []

    def observe(self, model: nn.Module) -> Reading:
        """The distance of this epoch's channel mask from the last one's; None after the first epoch."""
        mask, last = channel_mask(model, self.density), self.mask
        self.mask = mask
        if last is None:
            return Reading(False, None)
        self.distances.append(from_main(lambda: float((mask != last).double().mean())))
        threshold = DISTANCE if self.threshold is None else self.threshold
        return Reading(early_bird_fires(self.distances, threshold, self.window), self.distances[-1])

    def state(self) -> dict[str, Tensor]:
        """The last `mask` (empty before the first epoch) and the `distances`."""
        mask = torch.empty(0, dtype=torch.bool) if self.mask is None else self.mask.clone()
        return {"mask": mask, "distances": torch.tensor(self.distances, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        if state.keys() != {"mask", "distances"}:
            raise UserError("the early trigger's state is another trigger's; remove the checkpoint")
        self.mask = state["mask"].clone() if state["mask"].numel() else None
        self.distances = state["distances"].tolist()


def channel_mask(model: nn.Module, density: float) -> Tensor:
    """Bool [channels of all BatchNorm layers, in the model's order]: True for the share of largest |gamma|."""
    gammas = _gammas(model)
    flat: np.ndarray = torch.cat([g.detach().abs().to("cpu", torch.float32) for g in gammas]).nan_to_num(0.0).numpy()
    layer = Layer("gamma", flat.shape, flat, np.ones(len(flat), dtype=bool), derive("early bird"))
    return top(Pool((layer,), kept_count(density, len(flat))))["gamma"]


def _gammas(model: nn.Module) -> list[Tensor]:
    found = (m.weight for m in bare(model).modules() if isinstance(m, _BatchNorm))
    return [weight for weight in found if weight is not None]
