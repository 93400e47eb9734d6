"""Tasks of a SLURM job array: which level, and which seed, a task runs. A pure function of config and environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from utils.params import Params
from utils.params.plan import level_plan
from utils.system.errors import ParamError

VARIABLE = "SLURM_ARRAY_TASK_ID"


def tasks(params: Params) -> int:
    """How many tasks the array has: one per level, for every seed of `run.seeds`."""
    return len(level_plan(params)) * max(1, len(params.run.seeds))


def settle(params: Params, environment: Mapping[str, str]) -> Params:
    """The parameters of this task: `run.array` becomes `levels.only` and `run.seed`.

    Task i runs level i % levels with seed run.seeds[i // levels]: all levels of the first seed come first. The
    environment is read only where `run.array` asks for it, and not for a plan, which is the whole array's. Raises
    ParamError for a task outside the array, and where there is none.
    """
    run = params.run
    if not run.array or run.plan:
        return params
    text = environment.get(VARIABLE)
    if text is None:
        raise ParamError(
            f"run.array=true: {VARIABLE} is not set, this is no task of a job array; "
            "submit it with sbatch --array, or set levels.only and run.seed"
        )
    count, levels = tasks(params), len(level_plan(params))
    if not text.isascii() or not text.isdigit() or int(text) >= count:
        raise ParamError(
            f"{VARIABLE}={text}: the array has tasks 0 to {count - 1}; submit it with --array=0-{count - 1}"
        )
    index = int(text)
    seed = run.seeds[index // levels] if run.seeds else run.seed
    return replace(
        params,
        run=replace(run, array=False, seeds=(), seed=seed),
        levels=replace(params.levels, only=index % levels),
    )
