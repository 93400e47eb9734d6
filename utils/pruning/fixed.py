"""Explicit densities: `glob=density` entries that fix single layers while the others share what is left."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from utils.system.errors import UserError
from utils.system.registry import nearest

KEY = "pruning.layer_densities"


def parse(entries: Sequence[str]) -> list[tuple[str, float]]:
    """(glob, density) of each `glob=density`. Raises UserError for another form or a density outside 0 to 1."""
    return [_entry(text) for text in entries]


def _entry(text: str) -> tuple[str, float]:
    glob, equals, number = text.rpartition("=")
    glob = glob.strip()
    try:
        density = float(number)
    except ValueError:
        density = -1.0
    if not equals or not glob or not 0.0 <= density <= 1.0:
        raise UserError(f"{KEY}: {text!r} is not glob=density with a density from 0 to 1, e.g. 'fc.*=0.5'")
    return glob, density


def assign(entries: Sequence[str], names: Sequence[str], taken: Mapping[str, str] | None = None) -> dict[str, float]:
    """The density of each fixed layer; of several entries that match a layer the first one holds.

    names: the prunable parameters. taken: layers that other keys fix already, with those keys. Raises UserError for an
    entry that matches no layer, or only layers that earlier entries or other keys took.
    """
    taken = taken or {}
    fixed: dict[str, float] = {}
    for glob, density in parse(entries):
        matched = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        fresh = [name for name in matched if name not in fixed and name not in taken]
        if not matched:
            raise UserError(f"{KEY}: {glob!r} matches no prunable parameter{nearest(glob, names)}")
        whole = [name for name in matched if name in taken]
        if not fresh and whole:
            raise UserError(
                f"{KEY}: {glob!r} is never used, {taken[whole[0]]}=dense keeps {whole[0]!r} whole; drop one of them"
            )
        if not fresh:
            raise UserError(f"{KEY}: {glob!r} is never used, earlier entries fix every layer it matches; put it first")
        fixed.update(dict.fromkeys(fresh, density))
    return fixed
