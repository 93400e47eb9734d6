"""Reading a config file: plain YAML mappings only, every scalar as text, so that the field's type decides.

YAML's own guesses (`1e-4` is text, `010` is eight, `on` is true, `2024-01-01` is a date) never reach a parameter.
Tags and aliases are refused: a config neither runs code nor expands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from utils.params.parsing import did_you_mean
from utils.system.errors import ParamError

SIZE_LIMIT = 128 << 10
"""Bytes a config file may have."""

DEPTH_LIMIT = 8
"""Nested lists and mappings a config file may have."""

_NULL = "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """SafeLoader without implicit types (null apart), tags, aliases, deep nesting and duplicate keys."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"tags ({event.tag}) are not allowed", problem_mark=event.start_mark)
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, form) for tag, form in forms if tag == _NULL]
    for letter, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`; scalars are str, or None for null.

    Raises ParamError, naming the file, when it is missing, a directory, too large, not UTF-8, or no mapping in YAML.
    """
    data = _read(Path(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParamError(f"{path}: not UTF-8 text (byte {error.start}); is it a YAML file?") from None
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ParamError(f"{path}: {_problem(error)}") from None
    except (ValueError, OverflowError):  # PyYAML of an escape such as \UFFFFFFFF
        raise ParamError(f"{path}: not a valid config: an escape that is no character") from None
    if content is None:
        raise ParamError(f"{path}: the file holds no keys; write section: {{key: value}} lines or drop it")
    if not isinstance(content, dict):
        raise ParamError(f"{path}: a config is a mapping of sections, not a {type(content).__name__}")
    return content


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ParamError(f"{path}: is a directory; --config needs one YAML file")
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise ParamError(f"{path}: no such config file{_neighbour(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ParamError(f"{str(path)!r}: cannot be read ({reason})") from None
    if len(data) > SIZE_LIMIT:
        raise ParamError(f"{path}: larger than {SIZE_LIMIT >> 10} KiB; is it a config file?")
    return data


def _neighbour(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    return did_you_mean(path.name, names)


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    line = f", line {mark.line + 1}" if mark is not None else ""
    return f"not a valid config{line}: {problem}"
