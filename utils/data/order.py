"""Which samples an epoch visits, in what order, and which of them a rank sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.data.stateless import derive


def epoch_order(seed: int, level: int, epoch: int, samples: int) -> np.ndarray:
    """Permutation of `range(samples)`, int64, that depends only on (seed, level, epoch, samples)."""
    return np.random.Generator(np.random.Philox(derive("order", seed, level, epoch))).permutation(samples)


@dataclass(frozen=True)
class Shard:
    """One rank's part of every global batch.

    batch_size is global: it holds `accumulation` micro-batches of every rank. Raises ValueError if it does not divide.
    """

    rank: int = 0
    ranks: int = 1
    batch_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.ranks * self.accumulation):
            raise ValueError(f"batch size {self.batch_size} does not divide by {self.ranks} x {self.accumulation}")

    @property
    def micro_batch(self) -> int:
        """Images of one backward pass on one rank."""
        return self.batch_size // (self.ranks * self.accumulation)

    def steps(self, samples: int) -> int:
        """Optimizer steps of an epoch; the incomplete last global batch is dropped."""
        return samples // self.batch_size

    def train(self, order: np.ndarray) -> np.ndarray:
        """This rank's positions of `order`, shape [steps * accumulation, micro_batch]."""
        steps = self.steps(len(order))
        blocks = order[: steps * self.batch_size].reshape(steps, self.accumulation, self.ranks, self.micro_batch)
        return blocks[:, :, self.rank].reshape(-1, self.micro_batch)

    def evaluate(self, samples: int) -> np.ndarray:
        """This rank's sample positions in evaluation: every sample once over all ranks, in order, none padded."""
        return np.arange(self.rank, samples, self.ranks)
