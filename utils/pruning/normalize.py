"""Rescaling of scores within each layer, so that layers compete on equal terms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from utils.data.stateless import derive
from utils.pruning.select import priority
from utils.system.errors import UserError


def lamp(
    scores: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], squared: bool
) -> dict[str, torch.Tensor]:
    """Layer-adaptive scores (Lee et al. 2021, eq. 4): s over the sum of all s' of the layer that do not rank below it.

    squared: s is the score's square, as the paper has it for magnitudes; else the score itself. Only live weights
    count; pruned ones and zeros get 0. Equal scores are ranked too, as by the paper's index map: by a hash of (layer
    name, flat index), so no position in the layer is favoured; the order needs no seed, it only decides between equals.
    So the best weight of every layer scores 1, tied or not, and stays as long as there is a weight to keep per layer.
    Infinite scores are what finite ones tend to: 1, 1/2, 1/3, ... and 0 for all others.

    Returns float64 CPU tensors (in float32 close scores would tie). Takes one layer's sort at a time. Raises UserError
    for negative scores, of which no share can be taken.
    """
    found = {}
    for name, mask in masks.items():
        flat = scores[name].detach().to("cpu", torch.float64).reshape(-1).numpy()
        live = mask.cpu().reshape(-1).numpy()
        values = flat[live]
        if values.size and values.min() < 0:
            raise UserError(
                f"pruning.normalize=lamp: {name!r} has negative scores, of which it takes no shares; drop it"
            )
        shares = np.zeros(len(flat))
        shares[live] = _shares(values, squared, derive("lamp", name), live)
        found[name] = torch.from_numpy(shares.reshape(mask.shape))
    return found


def _shares(values: np.ndarray, squared: bool, key: int, live: np.ndarray) -> np.ndarray:
    """The shares of the live `values` of one layer."""
    order = np.argsort(values)  # equal values are ordered below
    ordered = values[order]
    _order_ties(order, ordered, key, live)
    infinite = len(ordered) - int(np.searchsorted(ordered, np.inf))
    if infinite:
        ordered = np.isinf(ordered).astype(np.float64)
    largest = ordered[-1] if len(ordered) else 0.0
    if not largest:
        return np.zeros(len(values))
    # A power of two: changes no digit, and neither the square nor the sum can overflow.
    ordered = np.ldexp(ordered, -int(np.frexp(largest)[1]))
    if squared:
        ordered = np.square(ordered)
    above = np.cumsum(ordered[::-1])[::-1]
    shares = np.empty(len(values))
    shares[order] = ordered / above
    return shares


def _order_ties(order: np.ndarray, ordered: np.ndarray, key: int, live: np.ndarray) -> None:
    """Reorder runs of equal values above 0 in place: the smaller priority ranks higher."""
    same = (ordered[1:] == ordered[:-1]) & (ordered[1:] > 0)
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    if len(tied):
        index = np.flatnonzero(live)[order[tied]]
        order[tied] = order[tied][np.lexsort((-index, -priority(key, index), ordered[tied]))]
