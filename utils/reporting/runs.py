"""Several runs as one table: rows with their config beside them, and which of them are seeds of one experiment."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from utils.params import catalog
from utils.params.yaml_file import read_yaml
from utils.reporting.columns import COLUMNS
from utils.reporting.rows import Row, read_rows
from utils.system.errors import UserError
from utils.system.rundir import RunDir

if TYPE_CHECKING:
    import pandas as pd


def find_runs(paths: Sequence[str | Path]) -> list[RunDir]:
    """Run directories for paths and globs, in the order given, each once; a levels.csv stands for its run.

    Raises UserError for a path that is no run, and for a glob that matches none (other matches are passed over).
    """
    found: dict[Path, RunDir] = {}
    for given in paths:
        text = str(given)
        if Path(text).exists() or not glob.has_magic(text):
            matches = [_as_run(Path(text))]
            if not _is_run(matches[0]):
                raise UserError(f"{text}: not a run directory (no config.yaml and no level folders in it)")
        else:
            matches = [run for run in map(_as_run, map(Path, sorted(glob.glob(text)))) if _is_run(run)]
            if not matches:
                raise UserError(f"{text}: matches no run directory")
        for run in matches:
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _as_run(path: Path) -> RunDir:
    return RunDir(path.parent) if path.is_file() and path == RunDir(path.parent).levels_csv else RunDir(path)


def _is_run(run: RunDir) -> bool:
    return run.path.is_dir() and (run.config.exists() or bool(run.levels()))


def read_config(run: RunDir) -> dict[str, Any]:
    """config.yaml as `section.key` to value, lists as text; empty when there is none. Raises UserError if broken."""
    if not run.config.exists():
        return {}
    read_yaml(run.config)  # within limits, and neither tags nor aliases: nothing below can expand
    try:
        content = yaml.safe_load(run.config.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{run.config}: not readable as YAML ({first})") from None
    if not isinstance(content, dict):
        raise UserError(f"{run.config}: holds no sections")
    flat: dict[str, Any] = {}
    for section, values in content.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            name = f"{section}.{key}" if key else str(section)
            flat[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def read_runs(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Rows of all runs that `find_runs` finds, one per finished level: the columns of levels.csv, then `section.key`.

    Raises UserError when no level is finished in any of them.
    """
    import pandas as pd

    records: list[Row] = []
    for run in find_runs(paths):
        config = read_config(run)
        records += [{**row, **config} for row in read_rows(run)]
    if not records:
        raise UserError(f"{', '.join(map(str, paths))}: no level is finished yet")
    frame = pd.DataFrame.from_records(records)
    kinds = {int: "Int64", float: "float64", str: "object"}
    return frame.astype({column.name: kinds[column.kind] for column in COLUMNS})


def experiments(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each experiment with its label, in order of appearance.

    Runs whose configs differ in seeds alone, or in parameters that are not part of a run's identity, are one
    experiment. The label is run.name, with the values that tell experiments of the same name apart.
    """
    ignored = {
        "run.seed",
        "data.order_seed",
        *(dotted for dotted, key in catalog.keys().items() if not key.meta.hashed),
    }
    keys = [name for name in frame.columns if "." in name and name not in ignored]
    groups: dict[tuple[str, ...], list[int]] = {}
    for position, (_, row) in enumerate(frame.iterrows()):
        groups.setdefault(_identity(row, keys), []).append(position)
    labels = _labels(list(groups), ["", *keys])
    return [(label, frame.iloc[rows]) for label, rows in zip(labels, groups.values(), strict=True)]


def _identity(row: pd.Series, keys: list[str]) -> tuple[str, ...]:
    """What the rows of one experiment share: the run's own name if it has no config, then the values of `keys`."""
    values = {key: "" if _absent(row[key]) else str(row[key]) for key in keys}
    if values.get("levels.spacing", "") in ("", "geometric"):
        # A geometric plan can be extended: its count and target are not part of what it is.
        values |= {key: "" for key in ("levels.count", "levels.target") if key in values}
    return ("" if any(values.values()) else str(row["run"]), *values.values())


def _absent(value: Any) -> bool:
    return value is None or value != value


def _labels(identities: list[tuple[str, ...]], keys: list[str]) -> list[str]:
    name = keys.index("run.name") if "run.name" in keys else 0
    names = [identity[name] or identity[0] or "run" for identity in identities]
    labels = []
    for label, identity in zip(names, identities, strict=True):
        same = [other for other, its in zip(identities, names, strict=True) if its == label]
        differing = [i for i in range(1, len(keys)) if len({other[i] for other in same}) > 1]
        parts = [f"{keys[i].partition('.')[2]}={identity[i] or 'default'}" for i in differing]
        labels.append(f"{label} ({', '.join(parts)})" if parts else label)
    return labels


def over_seeds(rows: pd.DataFrame, metric: str = "final_test_acc") -> pd.DataFrame:
    """Mean, sample standard deviation and number of runs of `metric` at each target density, densest first.

    Returns columns target_density, density (mean of those reached), mean, sd (NaN for one run), runs.
    Rows without a value are left out.
    """
    rows = rows[rows[metric].notna()]
    grouped = rows.groupby("target_density", sort=True)
    table = grouped.agg(
        density=("density", "mean"), mean=(metric, "mean"), sd=(metric, "std"), runs=("run", "nunique")
    ).reset_index()
    return table.iloc[::-1].reset_index(drop=True)
