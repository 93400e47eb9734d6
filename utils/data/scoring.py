"""Scoring data: fixed micro-batches of training images, read lazily, the same however many ranks share them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from utils.data.protocol import Batch, Loader
from utils.data.splits import balanced
from utils.data.stateless import derive, uniform
from utils.system.errors import UserError

KEPT_BYTES = 64 * 2**20
"""Micro-batches of a rank that take no more than this are kept after the first pass."""

OpenLoader = Callable[[np.ndarray, int], Loader]
"""(samples in order, images per batch) -> a loader that shows just these, in that order, as in evaluation."""


def micro_batches(
    train: np.ndarray,
    labels: np.ndarray,
    seed: int,
    *,
    per_class: int | None,
    batches: int | None,
    batch_size: int,
) -> list[np.ndarray]:
    """Sample indices (int64) of every micro-batch, chosen by `seed` from `train`; `labels` are the whole split's.

    per_class: that many images of every class (all of a class that has fewer), or `batches` times `batch_size` images,
    of every class equally many as far as there are. Classes take turns, in an order drawn by the seed, so that
    a batch smaller than the number of classes shows any of them. Sizes differ by at most one and are at most
    `batch_size`. Raises UserError when `batches` wants more images than there are, ValueError unless exactly one of
    `per_class` and `batches` is given.
    """
    if (per_class is None) == (batches is None):
        raise ValueError("give either images per class or a number of micro-batches")
    turns = _shuffled_classes(labels, seed)
    if per_class is not None:
        chosen = balanced(train, turns, per_class, seed)
        return np.array_split(chosen, -(-len(chosen) // batch_size))
    assert batches is not None
    wanted = batches * batch_size
    if wanted > len(train):
        raise UserError(
            f"pruning.batches={batches} of pruning.batch_size={batch_size} is {wanted} images and there are "
            f"{len(train)} to train on; lower one of the two"
        )
    return np.array_split(balanced(train, turns, len(train), seed)[:wanted], batches)


def _shuffled_classes(labels: np.ndarray, seed: int) -> np.ndarray:
    """`labels` renumbered, so that their numeric order is one drawn by `seed`."""
    classes, own = np.unique(labels, return_inverse=True)
    ranks = np.argsort(np.argsort(uniform(derive("scoring classes", seed), classes, 0), kind="stable"), kind="stable")
    return ranks[own.reshape(-1)]


class ScoringBatches:
    """This rank's share of the micro-batches: number i belongs to rank i % ranks. Every pass shows the same ones.

    Images are read during the pass; the last loader is closed when a pass ends with all of them kept (`KEPT_BYTES`).
    `len` is this rank's number and may be 0; `count` and `samples` are those of all ranks. Call `close` when done.
    Two passes at a time are not for every loader. Raises what the loader raises.
    """

    def __init__(self, batches: Sequence[np.ndarray], open_loader: OpenLoader, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} is not one of {ranks}")
        self.count = len(batches)
        self.samples = sum(len(batch) for batch in batches)
        self._mine = list(batches[rank::ranks])
        self._open_loader = open_loader
        self._loader: Loader | None = None
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._kept) if self._kept is not None else self._read()

    def close(self) -> None:
        """Stop the loader and let go of what is kept; another pass would read anew."""
        self._kept = None
        self._close_loader()

    def _close_loader(self) -> None:
        loader, self._loader = self._loader, None
        if loader is not None:
            loader.close()

    def _read(self) -> Iterator[Batch]:
        if not self._mine:
            return
        if self._loader is None:
            largest = max(len(batch) for batch in self._mine)
            self._loader = self._open_loader(np.concatenate(self._mine), largest)
        kept: list[Batch] = []
        room = KEPT_BYTES
        for batch in _recut(self._loader, [len(batch) for batch in self._mine]):
            room -= sum(tensor.nbytes for tensor in batch)
            if room >= 0:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        if room >= 0:
            self._kept = kept
            self._close_loader()


def _recut(loader: Loader, sizes: Sequence[int]) -> Iterator[Batch]:
    """The loader's images in their order, in batches of exactly `sizes`; what was begun is ended properly."""
    with contextlib.ExitStack() as stack:
        source = iter(loader)
        if hasattr(source, "close"):
            stack.callback(source.close)
        parts: list[Batch] = []
        for size in sizes:
            while (have := sum(len(labels) for _, labels in parts)) < size:
                more = next(source, None)
                if more is None:
                    raise RuntimeError(f"the loader showed {have} images where {size} were left")
                parts.append(more)
            # One part stays what the loader made: no copy, and cat would lose the memory format beside an empty one.
            images, labels = (
                parts[0] if len(parts) == 1 else (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            )
            yield images[:size], labels[:size]
            parts = [(images[size:], labels[size:])] if len(labels) > size else []
