"""The one way in which masks change while a model trains."""

from __future__ import annotations

from collections.abc import Sequence

from utils.masks import Masks
from utils.sparsity import Sparsity
from utils.system import distributed
from utils.training.extension import Extension


def change_masks(sparsity: Sparsity, masks: Masks, extensions: Sequence[Extension], what: str) -> None:
    """Train inside `masks` from here on; called on all ranks alike.

    Weights, gradients and optimizer state are projected: they are 0.0 wherever a weight is pruned now or was pruned
    before, so a weight that returns starts from 0.0 with fresh optimizer state. Every extension hears of the change.
    what: the masks in words, for the error. Raises RuntimeError, before anything changes, unless all ranks hold the
    same masks.
    """
    distributed.agree(what, masks.digest)
    sparsity.set(masks)
    for extension in extensions:
        extension.masks_changed(masks)
