"""Controls: what a pruning method must beat (Frankle et al. 2021, "Pruning neural networks at initialization").

`shuffle` keeps each layer's count but not its places, `reinitialise` keeps the places but draws new weights, `invert`
keeps the weights with the lowest scores. A method that does as well with a control does not choose what it claims to.
"""

from __future__ import annotations

import torch

from utils.data.stateless import derive
from utils.masks import Masks
from utils.pruning.select import Pool, layers_of, top


def shuffle(masks: Masks, live: Masks, seed: int) -> Masks:
    """As many weights as `masks` keep in every layer, at places drawn from those that live in `live`."""
    scores = {
        name: torch.rand(mask.shape, generator=torch.Generator().manual_seed(derive("shuffle", seed, name)))
        for name, mask in masks.items()
    }
    chosen: dict[str, torch.Tensor] = {}
    for layer in layers_of(scores, live, seed):
        chosen.update(top(Pool((layer,), masks.counts[layer.name])))
    return Masks({name: chosen[name] for name in masks})


def fresh_seed(seed: int) -> int:
    """The seed of the weights that `reinitialise` trains instead of those of `seed`."""
    return derive("reinitialise", seed) % 2**31
