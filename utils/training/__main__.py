"""`python -m utils.training evaluate RUN --level N`: evaluate a finished level again, under torchrun too.

--average     the averaged weights (training.ema) in place of the last raw ones
--json FILE   write the numbers there as well
Parameters are those of RUN/config.yaml; --section.key=value changes one. Nothing in RUN is written. Exit code 1 when
row.json says otherwise and no parameter was changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import harness_params
from utils.system.errors import EXIT_BAD_INPUT, UserError
from utils.system.rundir import RunDir

USAGE = "python -m utils.training evaluate RUN --level N [--average] [--json FILE] [--section.key=value ...]"
OPTIONS = {"level": "number of the level", "json": "file the numbers are written to"}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what `argv` says; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    try:
        return _evaluate(words)
    except UserError as error:
        print(f"sieve: {error}", file=sys.stderr)
    except OSError as error:
        print(f"sieve: {error.filename or 'file'}: {error.strerror}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _evaluate(words: list[str]) -> int:
    if len(words) < 2 or words[0] != "evaluate" or words[1].startswith("-"):
        raise UserError(f"name a run; {USAGE}")
    run, rest = RunDir(Path(words[1])), words[2:]
    if not run.config.is_file():
        raise UserError(f"{run.path}: not a run directory (no config.yaml in it)")
    average = "--average" in rest
    rest = [word for word in rest if word != "--average"]
    params, options = harness_params.load_with_or_exit(OPTIONS, ["--config", str(run.config), *rest], usage=USAGE)
    number = options.get("level", "")
    if not (number.isascii() and number.isdecimal() and len(number) < 6):
        raise UserError("--level: names no level; write --level=0")
    place = run.level(int(number))
    if not place.path.is_dir():
        raise UserError(f"{run.path}: has no level {number} (levels: {', '.join(map(str, run.levels())) or 'none'})")
    changed = any("." in word.partition("=")[0] for word in rest if word.startswith("--"))
    # torch is imported only once the request is known to be complete.
    import harness_utils
    from utils.system.atomic import write_json
    from utils.training.evaluate import as_json, describe, evaluate

    with harness_utils.process(params, own=False) as here:
        found = evaluate(params, place, average, here.world, here.device)
        if here.world.main:
            print(describe(found), flush=True)
            if "json" in options:
                write_json(options["json"], as_json(found))
    if found.agreement == "differs" and not changed and here.world.main:
        return 1
    harness_utils.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
