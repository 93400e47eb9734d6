"""Train a sparse network level by level.

torchrun harness.py --config configs/x.yaml [--config overlay.yaml ...] [--section.key=value ...] [--export onnx]
"""

from __future__ import annotations

import contextlib
import os
import sys

import harness_params
from utils.params.identity import run_path
from utils.system.errors import ParamError, UserError
from utils.system.imports import uncollected
from utils.system.launcher import Launcher
from utils.system.optional import ONNX, require
from utils.system.rundir import RunDir

OPTIONS = {"export": "onnx: also write model.onnx of every level that is done, checked by onnxruntime against torch"}


def main() -> None:
    """Read the config, then print its plan or run its levels."""
    launcher = Launcher()
    launcher.watch()
    params, options = harness_params.load_with_or_exit(OPTIONS)
    exports = _exports(options.get("export"))
    if params.run.where:
        print(RunDir(run_path(params)).status_of(params.levels.only))
        return
    # torch is imported only once the config is known to be good: a typo is told in under a second.
    with uncollected(forever=True):
        import harness_utils

    if params.run.plan:
        harness_utils.print_plan(params)
        return
    with uncollected(forever=True):
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
            if exports:
                from utils.analysis.export import export_levels

                only = params.levels.only
                for line in export_levels(params, run, run.levels() if only is None else [only]):
                    here.console.line(f"onnx:   {line}")
    harness_utils.leave()


def _exports(asked: str | None) -> bool:
    """Whether ONNX files are wanted; ends the process where they cannot be written, before anything is trained."""
    if asked is None:
        return False
    try:
        if asked != "onnx":
            raise ParamError(f"--export={asked}: unknown format; write --export onnx")
        require("--export onnx", ONNX)
    except UserError as error:
        harness_params.refuse(error)
    return True


if __name__ == "__main__":
    main()
    # At once: threads of native libraries have been seen to abort an interpreter that finalizes, after all its work.
    with contextlib.suppress(OSError):  # a reader that has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
