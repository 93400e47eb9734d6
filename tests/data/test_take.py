"""`take`: a few batches of a loader, as a list that can be kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from utils.data import take


class Counting:
    """A loader that overwrites its one buffer, keeps its iterator, and notes whether that was ended."""

    ended = 0

    def __iter__(self) -> Iterator[Any]:
        self.iterator = self.batches()
        return self.iterator

    def batches(self) -> Iterator[Any]:
        buffer = torch.zeros(2)
        try:
            for number in range(5):
                yield buffer.fill_(number), buffer.long()
        finally:
            self.ended += 1


def test_take_copies_and_closes() -> None:
    loader: Any = Counting()
    assert [images.tolist() for images, _ in take(loader, 3)] == [[0, 0], [1, 1], [2, 2]]
    assert loader.ended == 1
