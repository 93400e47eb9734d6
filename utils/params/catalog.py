"""Every key of a config as data: its section, type, default and `Meta`, read off the dataclasses once."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.params import Params
from utils.params.field import Meta, meta_of

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """One field of one section.

    type      int, float, bool, str or Step: the type of the value, or of each element of a tuple
    optional  None is a value too
    sequence  the field is a tuple of `type`
    """

    section: str
    name: str
    type: type
    optional: bool
    sequence: bool
    default: Any
    meta: Meta

    @property
    def dotted(self) -> str:
        """`section.name`, as written on the command line."""
        return f"{self.section}.{self.name}"

    def of(self, params: Params) -> Any:
        """The value this key has in `params`."""
        return operator.attrgetter(self.dotted)(params)


def _shape(annotation: Any) -> tuple[type, bool, bool]:
    """(type, optional, sequence) of a field's annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return inner, True, False
    if origin is tuple:
        return arguments[0], False, True
    return annotation, False, False


@functools.cache
def sections() -> dict[str, type]:
    """The dataclass of every section, by the section's name, in the order of `Params`."""
    return dict(_sections(Params))


def _sections(cls: type, above: str = "") -> Iterator[tuple[str, type]]:
    """Name and dataclass of the sections in `cls`; those within a section are called `outer.inner`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        if any("meta" in part.metadata for part in dataclasses.fields(inner)):
            yield above + field.name, inner
        else:
            yield from _sections(inner, f"{above}{field.name}.")


@functools.cache
def keys() -> dict[str, Key]:
    """Every key by its dotted name, in declaration order."""
    found: dict[str, Key] = {}
    for section, cls in sections().items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kind, optional, sequence = _shape(hints[field.name])
            key = Key(section, field.name, kind, optional, sequence, field.default, meta_of(field))
            found[key.dotted] = key
    return found


def assemble(values: dict[str, Any]) -> Params:
    """`Params` from typed values by dotted name; a key that is left out takes its default."""
    parts: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for dotted, value in values.items():
        section, _, name = dotted.rpartition(".")
        parts[section][name] = value
    return _assembled(Params, parts)


def _assembled(cls: type[T], parts: dict[str, dict[str, Any]], above: str = "") -> T:
    """`cls` with its sections, and the sections within them, made of `parts`."""
    hints = typing.get_type_hints(cls)
    made = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = above + field.name
        inner = hints[field.name]
        made[field.name] = inner(**parts[name]) if name in parts else _assembled(inner, parts, f"{name}.")
    return cls(**made)
