"""The name of a run: a function of its parameters alone, so that the same command finds its own run again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from utils.params import Params
from utils.params.catalog import Key, keys
from utils.params.parsing import dump_value, parse

VERSION = 2
"""Part of every hash. Raise it whenever the default of a hashed field changes: old names then stay old runs'.

A new field needs no raise: while it has its default it is not part of the hash.
"""

_DIGITS = 10


def run_id(params: Params) -> str:
    """`<run.name>-<10 hex digits>`: the run directory's name."""
    text = json.dumps({"version": VERSION, "fields": hashed_fields(params)}, sort_keys=True, separators=(",", ":"))
    return f"{params.run.name}-{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"


def run_path(params: Params) -> Path:
    """The directory of the run this config names."""
    return Path(params.run.root) / run_id(params)


def hashed_fields(params: Params) -> dict[str, Any]:
    """What the hash is taken over: the non-default values of hashed fields, by dotted name, in words JSON has."""
    left_out = _growing(params)
    fields: dict[str, Any] = {}
    for key in keys().values():
        if not key.meta.hashed or key.dotted in left_out:
            continue
        value = _canonical(key, key.of(params))
        if value != _canonical(key, key.default):
            fields[key.dotted] = value
    return fields


def _growing(params: Params) -> frozenset[str]:
    """Keys that only say where a geometric plan ends: leaving them out lets a run be extended."""
    levels = params.levels
    if params.pruning.moment == "levels" and levels.spacing == "geometric" and not levels.densities:
        return frozenset({"levels.count", "levels.target"})
    return frozenset()


def _canonical(key: Key, value: Any) -> Any:
    """One spelling per value: a float field's 1 is 1.0, as it would be when read from a file."""
    return dump_value(key, parse(key, dump_value(key, value)))
