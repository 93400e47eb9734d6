"""Waiting for the level before: tasks of an array may start before the task they build on has finished."""

from __future__ import annotations

import time

from utils.params import Params
from utils.params.plan import level_plan
from utils.record import run_dir
from utils.system.distributed import World
from utils.system.errors import Preempted, UserError
from utils.system.stopping import Stopping

INTERVAL = 2.0
"""Seconds between two looks at the shared disk."""


def wait_for_source(params: Params, world: World) -> None:
    """Return once the level that `levels.only` starts from is done; at once where it starts from none.

    Every rank looks itself, and no process group exists yet whose timeout could end the wait. Raises UserError when
    it is not done after `levels.wait` minutes, Preempted when a stop is asked for meanwhile.
    """
    only = params.levels.only
    source = None if only is None else level_plan(params)[only].source
    if source is None:
        return
    run, minutes = run_dir(params), params.levels.wait
    row = run.level(source).row
    if row.exists():
        return
    what = f"levels.only={only}: level {source} it starts from is not done in {run.path}"
    if not minutes:
        raise UserError(f"{what}; run it first, or set levels.wait")
    if world.main:
        print(f"{what}; waiting for it up to {minutes:g} minutes", flush=True)
    stopping = Stopping()
    stopping.install()
    try:
        deadline = time.monotonic() + 60.0 * minutes
        while not row.exists():
            if stopping.requested:
                reason = f"stopped by {stopping.requested} while waiting for level {source}"
                raise Preempted(f"{reason}; the same command waits again")
            if time.monotonic() > deadline:
                raise UserError(f"{what} after {minutes:g} minutes; see what became of it, or raise levels.wait")
            time.sleep(INTERVAL)
    finally:
        stopping.uninstall()
