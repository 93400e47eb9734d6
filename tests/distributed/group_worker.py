"""Run by torchrun on two ranks: what the process group promises, for test_ranks.py. Exits 0 when all of it holds."""

from __future__ import annotations

import torch

from utils.system import distributed
from utils.system.errors import UserError
from utils.training.batchnorm import average_statistics, averaged_statistics


class Awkward(Exception):
    """Neither its arguments nor its content can be pickled and put together again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"awkward {one} {two}")
        self.content = lambda: None


def fails(error: Exception) -> Exception:
    """What this rank gets when `from_main` raises `error` on rank 0."""

    def make() -> None:
        raise error

    try:
        distributed.from_main(make)
    except Exception as caught:
        return caught
    raise AssertionError("nothing was raised")


def check_errors(rank: int) -> None:
    awkward, mendable = fails(Awkward(1, 2)), fails(UserError("file.x: missing"))
    assert "awkward 1 2" in str(awkward), awkward
    assert isinstance(awkward, Awkward if rank == 0 else RuntimeError)
    assert isinstance(mendable, UserError)
    assert str(mendable) == "file.x: missing"
    distributed.agree("masks", "same")
    try:
        distributed.agree("masks", f"of rank {rank}")
    except RuntimeError as error:
        assert str(error) == "masks differ between ranks (rank 0: of rank 0, rank 1: of rank 1)"  # noqa: PT017
    else:
        raise AssertionError("different digests went unseen")


def check_statistics(rank: int) -> None:
    layer = torch.nn.BatchNorm2d(2)
    layer.running_mean.fill_(1.0 + rank)
    layer.running_var.copy_(torch.tensor([2.0, 4.0]) * (rank + 1))
    averaged = averaged_statistics(layer)
    assert layer.running_mean.tolist() == [1.0 + rank] * 2
    average_statistics(layer)
    assert layer.running_mean.tolist() == averaged["running_mean"].tolist() == [1.5, 1.5]
    assert layer.running_var.tolist() == averaged["running_var"].tolist() == [3.0, 6.0]


def main() -> None:
    place = distributed.world()
    distributed.start(place, torch.device("cpu"))
    assert distributed.gather(place.rank) == [0, 1]
    assert distributed.from_main(lambda: {"made": "once"}) == {"made": "once"}
    assert distributed.sum_over_ranks(torch.tensor([place.rank + 1.0])).item() == 3.0
    check_errors(place.rank)
    check_statistics(place.rank)
    distributed.stop()
    assert not distributed.active()


if __name__ == "__main__":
    main()
