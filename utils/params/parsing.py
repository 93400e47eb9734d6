"""Text and YAML values to a field's type and back, strictly; every refusal is one line that names the key."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from utils.params import Params
from utils.params.catalog import Key, keys
from utils.params.step import Step
from utils.system.errors import ParamError
from utils.system.registry import declared

EMPTY = frozenset({"", "auto", "none", "null"})
"""How None is spelled for an optional field; case does not matter."""

_TRUE, _FALSE = frozenset({"true", "yes", "1"}), frozenset({"false", "no", "0"})
_INT = re.compile(r"[+-]?[0-9]{1,19}")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INT_LIMIT = 2**63
_NOUNS: dict[type, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false words"),
    str: ("text", "texts"),
    Step: ("a step such as 500it, 3ep or 3ep50it", "steps such as 500it, 3ep or 3ep50it"),
}


def parse(key: Key, value: Any) -> Any:
    """The value of `key` that `value` (text, or what YAML made of it) stands for.

    Raises ParamError when it is of the wrong type, out of range, or not among the choices.
    """
    if key.sequence:
        return tuple(_element(key, part, value) for part in _split(key, value))
    if key.optional and (value is None or (isinstance(value, str) and value.strip().lower() in EMPTY)):
        return None
    return _element(key, value, value)


def dump_value(key: Key, value: Any) -> Any:
    """`value` in words YAML has: `parse(key, dump_value(key, value)) == value`."""
    if key.sequence:
        return [str(part) if key.type is Step else part for part in value]
    if value is None:
        return key.meta.empty
    return str(value) if key.type is Step else value


def dump(params: Params) -> dict[str, dict[str, Any]]:
    """All parameters as a nested dict for YAML; `load.build` turns it back into an equal `Params`."""
    nested: dict[str, dict[str, Any]] = {}
    for key in keys().values():
        nested.setdefault(key.section, {})[key.name] = dump_value(key, key.of(params))
    return nested


def show(key: Key, value: Any) -> str:
    """`value` as it would be typed on a command line."""
    dumped = dump_value(key, value)
    if isinstance(dumped, list):
        return ",".join(_word(part) for part in dumped)
    return _word(dumped)


def allowed(key: Key) -> str:
    """What `key` accepts, in words: type, range, choices, and how None is written."""
    text = _accepted(key, plural=key.sequence)
    if key.sequence:
        return f"a list of {text}" if key.type is not str else "a list of texts"
    return f"{key.meta.empty} or {text}" if key.optional else text


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` for the nearest of `known`; nothing when none is near."""
    close = nearest_of(name, known, cutoff)
    return f"; did you mean {close!r}?" if close else ""


def nearest_of(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` nearest to `name`, None when none is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def shown(value: Any) -> str:
    """`value` as an error names it: one line, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:45]}...{text[-10:]}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _accepted(key: Key, plural: bool = False) -> str:
    meta = key.meta
    if meta.choices:
        return "one of " + ", ".join(meta.choices)
    if meta.kind:
        return " or ".join([f"a known {meta.kind}", *(f"{prefix}<name>" for prefix in meta.prefixes)])
    bounds = [(meta.low, ">="), (meta.above, ">"), (meta.high, "<="), (meta.below, "<")]
    limits = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)
    noun = _NOUNS[key.type][plural]
    return f"{noun} {limits}" if limits else noun


def _split(key: Key, value: Any) -> list[Any]:
    """The elements of a tuple field: a list as it is, text at its commas, anything else alone."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        return [value]
    text = value.strip()
    if text == "[]":
        return []
    if key.type is not str and text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    return [part.strip() for part in text.split(",")] if text else []


def _element(key: Key, value: Any, whole: Any) -> Any:
    """One value of `key.type` within the key's limits; `whole` is what the user wrote."""
    try:
        typed = _READERS[key.type](value)
    except ValueError:
        raise _refusal(key, value, whole) from None
    meta = key.meta
    if key.type in (int, float) and not _within(key, typed):
        raise _refusal(key, value, whole)
    if key.sequence and typed == "":
        raise _refusal(key, value, whole)
    if meta.choices and typed not in meta.choices:
        raise _refusal(key, value, whole, did_you_mean(typed, meta.choices))
    if meta.kind and not _registered(key, typed):
        raise _refusal(key, value, whole, _known(typed, meta.kind))
    return typed


def _known(name: str, kind: str) -> str:
    names = declared(kind)
    hint = did_you_mean(name, names, cutoff=0.5)
    return hint or (f"; known: {', '.join(names)}" if names else "")


def _within(key: Key, number: float) -> bool:
    meta = key.meta
    return not (
        (meta.low is not None and number < meta.low)
        or (meta.high is not None and number > meta.high)
        or (meta.above is not None and number <= meta.above)
        or (meta.below is not None and number >= meta.below)
    )


def _registered(key: Key, name: str) -> bool:
    if any(name.startswith(prefix) and name != prefix for prefix in key.meta.prefixes):
        return True
    return name in declared(key.meta.kind)


def _refusal(key: Key, value: Any, whole: Any, hint: str = "") -> ParamError:
    where = "" if not key.sequence or value == whole else f" in {shown(whole)}"
    wanted = _accepted(key)
    if not key.sequence and key.optional:
        wanted = f"{key.meta.empty} or {wanted}"
    return ParamError(f"{key.dotted}: expected {wanted}, not {shown(value)}{where}{hint}")


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _read_int(value: Any) -> int:
    if isinstance(value, str) and _INT.fullmatch(value.strip()):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= _INT_LIMIT:
        raise ValueError
    return value


def _read_float(value: Any) -> float:
    if isinstance(value, str) and not _FLOAT.fullmatch(value.strip()):
        raise ValueError
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise ValueError
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError from error
    if not math.isfinite(number):
        raise ValueError
    return number + 0.0  # -0.0 becomes 0.0, which names the same run


def _read_str(value: Any) -> str:
    if not isinstance(value, str) or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise ValueError
    return value


def _read_step(value: Any) -> Step:
    return value if isinstance(value, Step) else Step.parse(_read_str(value))


_READERS: dict[type, Any] = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str, Step: _read_step}
