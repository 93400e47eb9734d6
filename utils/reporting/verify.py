"""`verify`: does a run directory hold what it says? Every file against every other, from the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.params import Params
from utils.params.identity import run_id
from utils.params.load import build
from utils.params.plan import Level, level_plan
from utils.params.yaml_file import read_yaml
from utils.reporting.level_checks import LevelChecks
from utils.reporting.rows import csv_text, read_rows
from utils.system.errors import UserError
from utils.system.json_file import read_json
from utils.system.rundir import RunDir, planted_links

ENVIRONMENT = {
    "versions": dict, "command": list, "host": str, "platform": str, "cpu": str, "device": str, "ranks": int,
    "threads": int, "seeds": dict, "starts": list, "inputs": dict, "auto": dict,
}  # fmt: skip
"""What environment.json must have, besides `revision`, which is null outside a git checkout."""

STATES = ("running", "preempted", "partial", "failed", "done")


def verify(run: RunDir) -> list[str]:
    """One line for every thing that does not hold: the file, what it says and what was expected. Empty: all holds.

    A level without row.json is not finished; of it only what is there already is looked at.
    """
    problems = [f"{path}: is a symbolic link; a run keeps its files itself" for path in planted_links(run)]
    if problems:
        return problems
    try:
        params: Params | None = build(read_yaml(run.config))
    except UserError as error:
        params = None
        problems.append(_named(run.config, error))
    plan: dict[int, Level] = {}
    if params is not None:
        plan = {level.number: level for level in level_plan(params)}
        if run_id(params) != run.path.resolve().name:
            problems.append(f"{run.config}: names the run {run_id(params)}, its directory is {run.path.resolve().name}")
    environment = _json(run.environment, problems)
    problems += _environment(run, environment, params)
    problems += _status(run, plan)
    for number in run.levels():
        problems += LevelChecks(run, number, params, plan.get(number), environment).problems()
    return problems + _levels_csv(run)


def _environment(run: RunDir, environment: dict[str, Any], params: Params | None) -> list[str]:
    path = run.environment
    if not environment:
        return []
    problems = [
        f"{path}: {name} is {_brief(environment.get(name))}, expected a value of type {kind.__name__}"
        for name, kind in ENVIRONMENT.items()
        if type(environment.get(name)) is not kind
    ]
    if "revision" not in environment:
        problems.append(f"{path}: revision is missing, expected a git revision or null")
    if problems:
        return problems
    problems += [
        f"{path}: versions.{name} is missing" for name in ("python", "torch") if name not in environment["versions"]
    ]
    needed = ["loader", "precision", "data train", "data test"]
    if params is not None:
        needed += ["mask file"] * (params.pruning.mask_file is not None)
        if environment["seeds"].get("run") != params.run.seed:
            found = _brief(environment["seeds"].get("run"))
            problems.append(f"{path}: seeds.run is {found}, expected {params.run.seed} of config.yaml")
    return problems + [f"{path}: inputs[{name!r}] is missing" for name in needed if name not in environment["inputs"]]


def _status(run: RunDir, plan: dict[int, Level]) -> list[str]:
    problems: list[str] = []
    status = _json(run.status, problems)
    if not status:
        return problems
    state = status.get("state")
    if state not in STATES:
        return [f"{run.status}: state is {_brief(state)}, expected one of {', '.join(STATES)}"]
    finished = {number for number in run.levels() if run.level(number).row.is_file()}
    said = set(plan) if state == "done" else set(status.get("levels") or []) if state == "partial" else set()
    missing = sorted(said - finished)
    return [f"{run.status}: says {state}, but {run.level(number).row} is missing" for number in missing]


def _levels_csv(run: RunDir) -> list[str]:
    try:
        expected = csv_text(read_rows(run))
        text = run.levels_csv.read_text(encoding="utf-8")
    except UserError:
        return []  # told with the level
    except (OSError, ValueError) as error:
        return [_named(run.levels_csv, error)]
    have, want = text.splitlines(), expected.splitlines()
    if text == expected:
        return []
    if len(have) != len(want):
        return [f"{run.levels_csv}: has {len(have)} lines, expected {len(want)} of the levels' rows"]
    for line, (one, other) in enumerate(zip(have, want, strict=True), start=1):
        if one != other:
            return [f"{run.levels_csv}: line {line} is {one!r:.100}, expected {_difference(one, other)} of row.json"]
    return [f"{run.levels_csv}: differs from the levels' rows in its line ends"]


def _difference(have: str, want: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), min(len(have), len(want)))
    return f"{want[max(0, place - 20) : place + 20]!r} around character {place + 1}"


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a JSON file; empty, with a problem noted, when there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        problems.append(_named(path, error))
        return {}
    if not isinstance(content, dict) or not content:
        problems.append(f"{path}: holds no object")
        return {}
    return content


def _named(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return reason if str(path) in reason else f"{path}: {reason}"


def _brief(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"
