"""Micro-batches to score on: what they hold, whose they are, and how often they are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.data import scoring
from utils.data.protocol import Batch
from utils.data.scoring import ScoringBatches, micro_batches
from utils.system.errors import UserError

LABELS = np.repeat(np.arange(10), 60)
TRAIN = np.flatnonzero(np.arange(600) % 6 != 5)  # 50 of every class


class Counting:
    """A loader of channels-last images, all of image i being i; it counts what it reads and whether it was ended."""

    def __init__(self, samples: np.ndarray, size: int) -> None:
        self.indices, self.samples, self.size = samples, len(samples), size
        self.start_batch = self.passes = self.closed = self.ended = 0

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def set_epoch(self, level: int, epoch: int, start_batch: int = 0, size: int | None = None) -> None:
        raise AssertionError("no epochs in evaluation")

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        return self._read()

    def _read(self) -> Iterator[Batch]:
        try:
            for start in range(0, self.samples, self.size):
                part = torch.from_numpy(self.indices[start : start + self.size])
                images = part.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
                yield images.contiguous(memory_format=torch.channels_last), part.clone()
        finally:
            self.ended += 1

    def close(self) -> None:
        self.closed += 1


class Opener:
    """Opens `Counting` loaders and remembers them."""

    def __init__(self) -> None:
        self.opened: list[Counting] = []

    def __call__(self, samples: np.ndarray, size: int) -> Counting:
        self.opened.append(Counting(samples, size))
        return self.opened[-1]


def by_class(per_class: int, batch_size: int, seed: int = 0, labels: np.ndarray = LABELS) -> list[np.ndarray]:
    return micro_batches(TRAIN, labels, seed, per_class=per_class, batches=None, batch_size=batch_size)


def by_number(batches: int, batch_size: int, seed: int = 0) -> list[np.ndarray]:
    return micro_batches(TRAIN, LABELS, seed, per_class=None, batches=batches, batch_size=batch_size)


def shown(batches: ScoringBatches) -> list[list[int]]:
    """Sample numbers of one pass."""
    found = []
    for images, labels in batches:
        assert images[:, 2, 1, 1].long().tolist() == labels.tolist()
        assert images.shape[1:] == (3, 2, 2)
        assert images.is_contiguous(memory_format=torch.channels_last)
        found.append(labels.tolist())
    return found


@pytest.mark.parametrize(
    ("per_class", "batch_size", "sizes"),
    [
        (25, 128, [125, 125]),
        (10, 128, [100]),
        (10, 30, [25] * 4),
        (10, 32, [25] * 4),
        (10, 33, [25] * 4),
        (5, 16, [13, 13, 12, 12]),
    ],
)
def test_sizes_are_nearly_equal(per_class: int, batch_size: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in by_class(per_class, batch_size)] == sizes


@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 3))
def test_each_class_gives_its_images_once(per_class: int, batch_size: int, seed: int) -> None:
    batches = by_class(per_class, batch_size, seed)
    together = np.concatenate(batches)
    assert len(set(together.tolist())) == len(together)
    assert set(together.tolist()) <= set(TRAIN.tolist())
    assert np.bincount(LABELS[together]).tolist() == [min(per_class, 50)] * 10
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-len(together) // batch_size)


def test_classes_take_turns_in_an_order_of_the_seed() -> None:
    orders = []
    for seed in range(5):
        turns = LABELS[np.concatenate(by_class(3, 7, seed))].reshape(3, 10)
        assert sorted(turns[0]) == list(range(10))
        assert (turns == turns[0]).all()
        orders.append(tuple(turns[0]))
    assert len(set(orders)) == 5
    assert tuple(range(10)) not in orders
    assert [b.tolist() for b in by_class(3, 7, 1)] == [b.tolist() for b in by_class(3, 7, 1)]


def test_more_images_of_a_class_hold_the_fewer() -> None:
    few, many = (set(np.concatenate(by_class(count, 64)).tolist()) for count in (3, 9))
    assert few < many


def test_a_class_that_has_too_few_gives_all() -> None:
    labels = np.where(np.arange(600) < 3, 0, 1)
    found = np.concatenate(by_class(20, 64, labels=labels))
    assert np.bincount(labels[found]).tolist() == [3, 20]


def test_a_number_of_micro_batches_is_balanced_as_far_as_it_goes() -> None:
    batches = by_number(5, 13)
    assert [len(batch) for batch in batches] == [13] * 5
    counts = np.bincount(LABELS[np.concatenate(batches)], minlength=10)
    assert counts.max() - counts.min() == 1  # 65 images of 10 classes
    assert len(np.concatenate(by_number(1, 500))) == 500
    with pytest.raises(
        UserError, match=r"^pruning.batches=4 of pruning.batch_size=126 is 504 images and there are 500 "
    ):
        by_number(4, 126)


@pytest.mark.parametrize("given_", [{"per_class": None, "batches": None}, {"per_class": 1, "batches": 1}])
def test_exactly_one_way_to_choose(given_: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match="either"):
        micro_batches(TRAIN, LABELS, 0, batch_size=4, **given_)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ranks_share_the_same_micro_batches_in_turn(ranks: int) -> None:
    batches = by_class(5, 16)  # 13, 13, 12, 12
    for rank in range(ranks):
        share = ScoringBatches(batches, Opener(), rank, ranks)
        assert (share.count, share.samples) == (4, 50)
        expected = [batch.tolist() for number, batch in enumerate(batches) if number % ranks == rank]
        assert len(share) == len(expected)
        assert shown(share) == expected
        assert shown(share) == expected


def test_a_rank_without_micro_batches_opens_nothing() -> None:
    opener = Opener()
    share = ScoringBatches(by_class(1, 10), opener, 1, 2)
    assert (shown(share), len(share), share.count) == ([], 0, 1)
    share.close()
    assert opener.opened == []


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        ScoringBatches([], Opener(), rank, ranks)


def test_nothing_is_opened_before_the_first_pass_and_small_sets_are_read_once() -> None:
    opener = Opener()
    share = ScoringBatches(by_class(5, 16), opener)
    assert opener.opened == []
    passes = [shown(share) for _ in range(5)]
    assert all(one == passes[0] for one in passes)
    (loader,) = opener.opened
    assert (loader.passes, loader.ended, loader.closed) == (1, 1, 1)


def test_kept_batches_are_the_tensors_of_the_first_pass() -> None:
    share = ScoringBatches(by_class(5, 16), Opener())
    first, again = list(share), list(share)
    assert all(a[0] is b[0] and a[1] is b[1] for a, b in zip(first, again, strict=True))
    share.close()
    assert [labels.tolist() for _, labels in share] == [labels.tolist() for _, labels in first]


def test_large_sets_are_read_at_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = by_class(5, 16)
    needed = 50 * (12 * 4 + 8)  # float32 pixels and an int64 label
    for room, passes in [(needed, 1), (needed - 1, 3)]:
        monkeypatch.setattr(scoring, "KEPT_BYTES", room)
        opener = Opener()
        share = ScoringBatches(batches, opener)
        for _ in range(3):
            assert shown(share) == [batch.tolist() for batch in batches]
        assert [loader.passes for loader in opener.opened] == [passes]
        share.close()
        assert opener.opened[0].closed == 1


def test_a_pass_that_is_broken_off_is_ended_and_keeps_nothing() -> None:
    opener = Opener()
    share = ScoringBatches(by_class(5, 16), opener)
    iterator = iter(share)
    next(iterator)
    (loader,) = opener.opened
    assert loader.ended == 0
    del iterator
    assert (loader.passes, loader.ended) == (1, 1)
    assert [len(one) for one in shown(share)] == [13, 13, 12, 12]
    assert loader.passes == 2


def test_a_loader_that_ends_early_is_told() -> None:
    share = ScoringBatches([np.arange(4), np.arange(4, 8)], lambda samples, size: Counting(samples[:-1], size))
    with pytest.raises(RuntimeError, match="3 images where 4"):
        list(share)
