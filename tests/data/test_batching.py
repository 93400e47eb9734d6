"""`Batching`: lengths, samples, resuming in the middle, and what set_epoch refuses."""

from __future__ import annotations

import numpy as np
import pytest

from utils.data.batching import Batching
from utils.data.order import Shard, epoch_order
from utils.data.stateless import epoch_key


def training(samples: int, shard: Shard) -> Batching:
    return Batching(np.arange(samples) * 3, shard, training=True, order_seed=5, eval_batch=4)


def evaluation(samples: int, shard: Shard) -> Batching:
    return Batching(np.arange(samples) * 3, shard, training=False, order_seed=5, eval_batch=4)


def test_training_lengths_count_whole_global_batches() -> None:
    one = training(50, Shard(1, 2, 12, 3))
    assert (one.samples, len(one)) == (48, 12)
    one.set_epoch(2, 7)
    batches = one.begin()
    assert len(batches) == 12
    assert all(len(batch) == 2 for batch in batches)
    assert batches[0].tolist() == epoch_order(5, 2, 7, 50)[2:4].tolist()  # rank 1 of the first micro-batch
    assert one.key == epoch_key(5, 2, 7)


def test_evaluation_lengths_count_every_sample() -> None:
    parts = [evaluation(11, Shard(rank, 2, 2)) for rank in range(2)]
    assert [part.samples for part in parts] == [11, 11]
    assert [len(part) for part in parts] == [2, 2]
    assert [batch.tolist() for batch in parts[0].begin()] == [[0, 2, 4, 6], [8, 10]]
    assert [batch.tolist() for batch in parts[1].begin()] == [[1, 3, 5, 7], [9]]
    assert len(evaluation(1, Shard(1, 2, 2))) == 0
    assert evaluation(1, Shard(1, 2, 2)).begin() == []


@pytest.mark.parametrize("make", [training, evaluation])
def test_an_iteration_starts_where_it_is_told_and_the_next_at_the_beginning(make: type) -> None:
    one = make(24, Shard(0, 1, 4))
    one.set_epoch(0, 1)
    whole = [batch.tolist() for batch in one.begin()]
    one.set_epoch(0, 1, start_batch=2)
    assert [batch.tolist() for batch in one.begin()] == whole[2:]
    assert one.start_batch == 0
    assert [batch.tolist() for batch in one.begin()] == whole
    one.set_epoch(0, 1, start_batch=len(one))
    assert one.begin() == []


def test_a_start_outside_the_epoch_is_refused() -> None:
    for start in (-1, 7):
        with pytest.raises(ValueError, match="outside an epoch of 6 batches"):
            training(24, Shard(0, 1, 4)).set_epoch(0, 0, start)
