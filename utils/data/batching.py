"""`Batching`: which samples each batch of a split holds on this rank, the part all loaders share."""

from __future__ import annotations

import numpy as np

from utils.data.order import Shard, epoch_order
from utils.data.stateless import epoch_key


class Batching:
    """Epochs, order and shards of one split; loaders derive from it and add the pixels.

    indices      the split's samples, as places in its source (int64); batches are given as positions in it
    shard        this rank's part
    training     shuffled global batches, the incomplete last one dropped; else every sample once, in order
    order_seed   seed of the order and of augmentation (training)
    eval_batch   images per evaluation batch
    """

    def __init__(self, indices: np.ndarray, shard: Shard, *, training: bool, order_seed: int, eval_batch: int) -> None:
        self.indices = np.asarray(indices, dtype=np.int64)
        self.shard = shard
        self.training = training
        self.order_seed = order_seed
        self.eval_batch = eval_batch
        self.level = self.epoch = self.start_batch = 0
        self.size: int | None = None
        self._mine = np.empty(0, dtype=np.int64) if training else shard.evaluate(len(self.indices))

    @property
    def samples(self) -> int:
        """Samples of one epoch over all ranks."""
        count = len(self.indices)
        return self.shard.steps(count) * self.shard.batch_size if self.training else count

    def __len__(self) -> int:
        if self.training:
            return self.shard.steps(len(self.indices)) * self.shard.accumulation
        return -(-len(self._mine) // self.eval_batch)

    def set_epoch(self, level: int, epoch: int, start_batch: int = 0, size: int | None = None) -> None:
        """Choose the order of the next iteration, the batch it starts at, and the image side of progressive resizing.

        In evaluation only `start_batch` counts. Raises ValueError when it lies outside the epoch.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch {start_batch} is outside an epoch of {len(self)} batches")
        self.level, self.epoch, self.start_batch, self.size = level, epoch, start_batch, size

    @property
    def key(self) -> int:
        """What the augmentation's random numbers of this epoch are keyed on."""
        return epoch_key(self.order_seed, self.level, self.epoch)

    def begin(self) -> list[np.ndarray]:
        """Positions in `indices` of each batch from `start_batch` on; `start_batch` is 0 again afterwards."""
        start, self.start_batch = self.start_batch, 0
        if self.training:
            order = epoch_order(self.order_seed, self.level, self.epoch, len(self.indices))
            return list(self.shard.train(order)[start:])
        return [self._mine[at : at + self.eval_batch] for at in range(0, len(self._mine), self.eval_batch)][start:]
