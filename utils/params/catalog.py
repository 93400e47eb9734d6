"""Every key of a config as data: its section, type, default and `Meta`, read off the dataclasses once."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import Any

from utils.params import Params
from utils.params.field import Meta, meta_of


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
        return getattr(getattr(params, self.section), self.name)


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
    hints = typing.get_type_hints(Params)
    return {field.name: hints[field.name] for field in dataclasses.fields(Params)}


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
        section, _, name = dotted.partition(".")
        parts[section][name] = value
    return Params(**{section: cls(**parts[section]) for section, cls in sections().items()})
