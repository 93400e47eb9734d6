"""From mappings to `Params`: sections or dotted keys, later mappings win, nothing unknown passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from utils.params import Params
from utils.params.catalog import Key, assemble, keys, sections
from utils.params.checks import check
from utils.params.parsing import nearest_of, parse, shown
from utils.system.errors import ParamError


@dataclass(frozen=True)
class Given:
    """A raw value as the user gave it, and the file it came from (empty: the command line or Python)."""

    value: Any
    source: str = ""


def build(mappings: Mapping[str, Any] | Sequence[Mapping[str, Any]], plan: bool = True) -> Params:
    """`Params` from one nested mapping or several (later wins); keys may be nested or dotted.

    `plan=False` leaves out the checks of the level plan, for tools that train nothing. Raises ParamError.
    """
    layers = [mappings] if isinstance(mappings, Mapping) else list(mappings)
    given: dict[str, Given] = {}
    for layer in layers:
        given.update(flatten(layer))
    params = assemble({dotted: parse(keys()[dotted], one.value) for dotted, one in given.items()})
    check(params, plan=plan)
    return params


def flatten(mapping: Mapping[str, Any], source: str = "") -> dict[str, Given]:
    """Raw values by dotted name. Raises ParamError for a key that is unknown or given twice, naming `source`."""
    place = f" ({source})" if source else ""
    flat: dict[str, Given] = {}
    for dotted, value in _walk(mapping, place):
        key = known_key(dotted, place)
        if dotted in flat:
            raise ParamError(f"{dotted}: given twice{place}; keep one of them")
        flat[dotted] = Given(_settled(key, value, place), source)
    return flat


def known_key(dotted: str, place: str = "", prefix: str = "") -> Key:
    """The key called `dotted`. Raises ParamError with the nearest known one; `prefix` is put before both names."""
    if dotted not in keys():
        raise ParamError(f"unknown key {prefix + dotted!r}{place}{_nearest_key(dotted, prefix)}")
    return keys()[dotted]


def _walk(mapping: Mapping[str, Any], place: str, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise ParamError(f"{above + shown(name)}: a key must be text{place}")
        dotted = above + name
        if isinstance(value, Mapping):
            yield from _walk(value, place, dotted + ".")
        elif dotted in sections():
            if value is not None:
                raise ParamError(f"{dotted}: a section holds keys, not {shown(value)}{place}")
        else:
            yield dotted, value


def _settled(key: Key, value: Any, place: str) -> Any:
    """None as the field's own word for it, refused where the field has none."""
    if value is not None:
        return value
    if not key.optional:
        raise ParamError(f"{key.dotted}: no value given{place}; drop the key to keep its default")
    return key.meta.empty


def _nearest_key(dotted: str, prefix: str) -> str:
    """A hint: the same name in other sections, else the nearest dotted name, else the nearest bare one."""
    section, _, name = dotted.rpartition(".")
    homes: dict[str, list[str]] = {}
    for key in keys().values():
        homes.setdefault(key.name, []).append(key.dotted)
    # A name that a section at the top has is meant there: `lr` is optimizer.lr, not recipe.rescale.lr.
    homes = {name: [home for home in found if home.count(".") == 1] or found for name, found in homes.items()}
    siblings = [known for known in keys() if known.startswith(section + ".")]
    near = nearest_of(dotted, keys(), 0.8) or nearest_of(dotted, siblings)
    if name in homes and section not in sections() and not (near and near.endswith(f".{name}")):
        found = homes[name]
    elif name in homes:
        found = [max(homes[name], key=lambda home: SequenceMatcher(None, home, dotted).ratio())]
    elif near or (near := nearest_of(dotted, keys(), 0.7)):
        found = [near]
    else:
        found = homes.get(nearest_of(name, homes, 0.7) or "", [])
    words = " or ".join(repr(prefix + known) for known in found)
    return f"; did you mean {words}?" if words else "; --help lists all keys"
