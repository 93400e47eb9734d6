"""Train a sparse network level by level.

torchrun harness.py --config configs/x.yaml [--config overlay.yaml ...] [--section.key=value ...]
"""

from __future__ import annotations

import contextlib
import os
import sys

import harness_params
from utils.params.identity import run_path
from utils.system.imports import uncollected
from utils.system.launcher import Launcher
from utils.system.rundir import RunDir


def main() -> None:
    """Read the config, then print its plan or run its levels."""
    launcher = Launcher()
    launcher.watch()
    params = harness_params.load_or_exit()
    if params.run.where:
        print(RunDir(run_path(params)).status_of(params.levels.only))
        return
    # torch is imported only once the config is known to be good: a typo is told in under a second.
    with uncollected():
        import harness_utils

    if params.run.plan:
        harness_utils.print_plan(params)
        return
    with uncollected():
        from utils import levels, reporting, structured_levels

    driver = levels.Driver if params.structured.budget is None else structured_levels.StructuredDriver
    with harness_utils.process(params, launcher=launcher) as here:
        run = driver(params, here.world, here.device, here.console, here.stopping).run()
        if here.world.main:
            rows = reporting.read_rows(run)
            here.console.line(f"\n{reporting.levels_table(rows)}\n")
            if any(row["density"] > 0 for row in rows):
                here.console.line(f"plot:   {reporting.plot_levels([run.path], run.plot)}")
            here.console.line(f"levels: {run.levels_csv}")
    harness_utils.leave()


if __name__ == "__main__":
    main()
    # At once: threads of native libraries have been seen to abort an interpreter that finalizes, after all its work.
    with contextlib.suppress(OSError):  # a reader that has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
