"""JSON that others wrote, read within limits: size, depth, digits; every key once, no NaN or Infinity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

SIZE_LIMIT = 1 << 20
"""Bytes a JSON file may have."""

DIGITS = 19
"""Digits a whole number may have: those of 64 bits."""


def read_json(path: str | Path, limit: int = SIZE_LIMIT) -> Any:
    """The value in a JSON file. Raises OSError when it cannot be read, else ValueError with a one-line reason."""
    with open(path, "rb") as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit >> 10} KiB")
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """The value in JSON text (UTF-8). Raises ValueError with a one-line reason."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_once, parse_int=_whole, parse_constant=_not_a_number)
        if "\\ud" in text.lower():  # half a surrogate pair is text no file or terminal takes
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.60} is given twice")
    return found


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")
