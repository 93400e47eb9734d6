"""Drop and grow: each layer trades its smallest live weights for as many others."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from utils.data.stateless import derive
from utils.masks import Masks
from utils.pruning.dynamic._base import MaskUpdates
from utils.pruning.select import Layer, Pool, top


class DropAndGrow(MaskUpdates):
    """At update step t every layer drops k = floor(f_t * live) of its weights, then grows k; its count stays.

    Dropped are the live weights of smallest |w|; grown are the places of highest `growth_scores` among all that are not
    kept after the drop, so a weight just dropped may return, with its value and optimizer state. All other grown
    weights are 0.0, and so is their optimizer state: both are 0.0 at every pruned place already. Layers that are fully
    dense are left alone. Ties go by a hash of (seed, level, step, layer, place). A method gives the scores.
    """

    def share_at(self, step: int) -> float:
        """f_t, the share of live weights exchanged, with T_end the end of updates (Evci et al. 2020, section 3).

        cosine: fraction / 2 * (1 + cos(pi t / T_end)); linear: fraction * (1 - t / T_end); constant: fraction.
        """
        fraction, point = self.section.fraction, step / self.steps.end
        if self.section.decay == "cosine":
            return fraction / 2 * (1 + math.cos(math.pi * point))
        return fraction * (1 - point) if self.section.decay == "linear" else fraction

    @abstractmethod
    def growth_scores(self, name: str, weight: nn.Parameter, step: int) -> Tensor:
        """Scores for all places of one layer, in its shape; higher is grown. The same on all ranks, never NaN."""

    def key(self, *parts: object) -> int:
        """A seed that depends on the run's seed, the level and `parts`; equal on all ranks."""
        return derive("dynamic", self.setting.seed, self.setting.level, *parts)

    @torch.no_grad()
    def next_masks(self, step: int, masks: Masks) -> Masks:
        """Every layer's mask after its exchange."""
        share = self.share_at(step)
        return Masks({name: self._exchange(name, mask, share, step) for name, mask in masks.items()})

    def _exchange(self, name: str, mask: Tensor, share: float, step: int) -> Tensor:
        live = int(mask.sum())
        count = math.floor(share * live)
        if count == 0 or live == mask.numel():
            return mask
        weight = self.weights[name]
        # A NaN weight would break the exact counts; the next look at the loss stops the run.
        sizes = weight.detach().abs().nan_to_num(nan=0.0)
        kept = _highest(name, sizes, mask, live - count, self.key("drop", step, name))
        scores = self.growth_scores(name, weight, step)
        return kept | _highest(name, scores, ~kept, count, self.key("grow", step, name))


def _highest(name: str, scores: Tensor, among: Tensor, keep: int, key: int) -> Tensor:
    """Bool mask of the `keep` places with the highest scores of those in `among`."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    flat: np.ndarray = scores.detach().to("cpu", wide).reshape(-1).numpy()
    layer = Layer(name, tuple(among.shape), flat, among.reshape(-1).numpy(), key)
    return top(Pool((layer,), keep))[name]
