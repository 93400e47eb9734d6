"""`param`: one field of a section, with its help, choices and range declared beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Meta:
    """What a field's declaration says beyond its type and default.

    help      one line for `--help`
    choices   the words allowed (strings only)
    kind      registry whose declared names are allowed; `prefixes` are allowed beside them
    low/high  inclusive bounds; `above`/`below` exclusive ones (each element, for tuples)
    empty     how None is written in files and on the command line (`auto` or `none`)
    hashed    whether the value is part of the run's identity
    """

    help: str
    choices: tuple[str, ...] = ()
    kind: str = ""
    prefixes: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    empty: str = "auto"
    hashed: bool = True


def param(default: Any, help: str, **meta: Any) -> Any:
    """Declare a section's field. Keywords are those of `Meta`."""
    return dataclasses.field(default=default, metadata={"meta": Meta(help, **meta)})


def meta_of(field: dataclasses.Field[Any]) -> Meta:
    """The `Meta` a field was declared with."""
    meta = field.metadata["meta"]
    assert isinstance(meta, Meta)
    return meta
