"""Section `run`: where a run lives, its seed and its device."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Run:
    """Where a run lives, its seed and its device."""

    root: str = param("runs", "folder that holds all runs", hashed=False)
    name: str = param("sieve", "readable prefix of the run directory: letters, digits, '.', '_' and '-'")
    seed: int = param(0, "seed of initial weights, random scores and, unless set apart, data order", low=0)
    seeds: tuple[int, ...] = param(
        (), "seeds of a job array, with run.array: all levels of the first, then of the second", low=0, hashed=False
    )
    array: bool = param(
        False, "SLURM_ARRAY_TASK_ID says which level, and which of run.seeds, this process runs", hashed=False
    )
    where: bool = param(False, "print the path of the status.json this command writes, then end", hashed=False)
    plan: bool = param(False, "print levels, densities, steps, disk and memory estimate, then end", hashed=False)
    device: str = param(
        "auto", "auto takes the GPU of the local rank when there is one", choices=("auto", "cpu", "cuda")
    )
    deterministic: bool = param(False, "deterministic GPU kernels (slower; CPU runs always are)")
    threads: int | None = param(None, "torch threads per process; auto keeps OMP_NUM_THREADS or torch's own", low=1)
    checkpoint_epochs: int | None = param(
        None, "store the state inside a level every so many epochs", low=1, empty="none", hashed=False
    )
    checkpoint_minutes: float | None = param(
        10.0, "store the state inside a level every so many minutes", above=0.0, empty="none", hashed=False
    )
    keep: str = param(
        "last",
        "checkpoints to keep; last: the newest two until their level is done; best: also the weights of the epoch with "
        "the best validation accuracy; all: also the state after every epoch that stores one",
        choices=("last", "best", "all"),
        hashed=False,
    )
