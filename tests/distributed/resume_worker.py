"""Run by torchrun on any number of ranks: runs stopped again and again by one rank, for test_resume_ranks.py.

Usage: resume_worker.py ROOT. Exits 0 when each leaves what the run does that is never stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.levels_cases import config, everything
from utils import levels
from utils.params import Params
from utils.system import distributed
from utils.system.console import Console
from utils.system.errors import Preempted
from utils.system.rundir import RunDir
from utils.system.stopping import Never, Poll, Stopping

CASES: dict[str, dict[str, object]] = {
    # BatchNorm statistics differ between ranks in mid-epoch; the average is of all.
    "lrr": {"levels__count": 2, "levels__rate": 0.5, "training__ema": 0.9},
    "rigl": {
        "pruning__moment": "init", "pruning__density": 0.2, "pruning__criterion": "random", "dynamic__method": "rigl",
        "dynamic__every": 2,
    },
}  # fmt: skip


class OneRankAsks(Stopping):
    """The last rank alone asks for a stop, after so many questions."""

    def __init__(self, group: torch.distributed.ProcessGroup | None, late: bool, after: int, rank: int) -> None:
        super().__init__(group, late)
        self.after, self.rank = after, rank

    def poll(self, due: bool = False) -> Poll:
        """As `Stopping`, whose request comes in time."""
        self.after -= 1
        if self.after < 0 and self.rank == torch.distributed.get_world_size() - 1:
            self.request("SIGUSR1")
        return super().poll(due)


def drive(params: Params, stopping: Never) -> RunDir:
    return levels.Driver(params, distributed.world(), torch.device("cpu"), Console(main=False), stopping).run()


def main() -> None:
    root = Path(sys.argv[1])
    place = distributed.world()
    distributed.start(place, torch.device("cpu"))
    group = distributed.side_group()
    for name, keys in CASES.items():
        keys = {"training__batch_size": 48, "training__eval_batch_size": 1000, "data__subset": 192, **keys}
        whole = drive(config(root / name / "whole", 2, **keys), Never())
        for late in (False, True):
            params = config(root / name / f"late-{late}", 2, **keys)
            stops: list[str] = []
            for _ in range(60):
                try:
                    stopped = drive(params, OneRankAsks(group, late, 4, place.rank))
                    break
                except Preempted as stop:
                    stops.append(str(stop))
            else:
                raise AssertionError("never done")
            assert stops
            # The same words on all ranks: the same step.
            assert len({tuple(each) for each in distributed.gather(stops)}) == 1
            assert distributed.from_main(lambda: everything(stopped) == everything(whole)), (name, late)  # noqa: B023
    distributed.stop()


if __name__ == "__main__":
    main()
