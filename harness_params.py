"""Command line and config files to `Params`: the sections of utils/params as fastargs sections, loaded strictly.

    params = load_or_exit()                              harness.py
    params, options = load_with({"out": "..."}, argv)    an entry point with options of its own

The command line wins over files, later files over earlier ones, files over defaults. Environment variables change
nothing, unless `run.array` asks for the number of a job array's task. Every mistake is one line; nothing here imports
torch or writes a file.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import fastargs
from fastargs.validation import Checker

from utils.params import Params, array
from utils.params.catalog import Key, assemble, keys, sections
from utils.params.checks import check
from utils.params.help import help_text
from utils.params.load import Given, flatten, known_key
from utils.params.parsing import allowed, did_you_mean, dump_value, parse
from utils.params.yaml_file import read_yaml
from utils.system.errors import EXIT_BAD_INPUT, ParamError, UserError


@dataclass
class Command:
    """A command line taken apart: config files in order, values by dotted key, and an entry point's own options."""

    files: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    help: bool = False


def load(argv: Sequence[str] | None = None) -> Params:
    """The parameters `argv` (default: the process's own arguments) asks for. `--help` prints and raises SystemExit(0).

    Raises ParamError, one line, for anything wrong.
    """
    return load_with({}, argv)[0]


def load_with(
    options: Mapping[str, str], argv: Sequence[str] | None = None, plan: bool = True, usage: str = ""
) -> tuple[Params, dict[str, str]]:
    """`load` for an entry point with options of its own (name to help line): the parameters, and the options given.

    `plan=False` leaves out the checks of the level plan, for tools that train nothing; `usage` is how the entry point
    is called, for `--help`. Raises ParamError.
    """
    command = _take_apart(sys.argv[1:] if argv is None else list(argv), options)
    if command.help:
        if _speaks():
            _print(help_text(usage, options))
        raise SystemExit(0)
    given: dict[str, Given] = {}
    for file in command.files:
        given.update(flatten(read_yaml(file), file))
    given.update(flatten(command.values))
    if plan and not given:
        raise ParamError("nothing to run; give --config FILE or --section.key=value, or see --help")
    params = assemble(_typed(given))
    check(params, plan=plan)
    return array.settle(params, os.environ) if plan else params, command.options


def load_or_exit(argv: Sequence[str] | None = None) -> Params:
    """`load` for an entry point: a mistake is one line on stderr (of local rank 0) and exit code 2."""
    return load_with_or_exit({}, argv)[0]


def load_with_or_exit(
    options: Mapping[str, str], argv: Sequence[str] | None = None, plan: bool = True, usage: str = ""
) -> tuple[Params, dict[str, str]]:
    """`load_with` for an entry point: a mistake is one line on stderr (of local rank 0) and exit code 2."""
    try:
        return load_with(options, argv, plan, usage)
    except UserError as error:
        refuse(error)


class Parsed(Checker):
    """fastargs checker that reads one key our way; its own would take "false" for true and 1.5 for an int."""

    def __init__(self, key: Key) -> None:
        self.key = key

    def check(self, value: Any) -> Any:
        """The typed value. Raises ParamError."""
        return parse(self.key, value)

    def help(self) -> str:
        """What the key accepts."""
        return allowed(self.key)


def declare(config: fastargs.Config) -> None:
    """Add every section of `Params` to `config`. fastargs' process-wide config is left alone."""
    for section, cls in sections().items():
        params = {
            key.name: fastargs.Param(Parsed(key), key.meta.help, default=dump_value(key, key.default))
            for key in keys().values()
            if key.section == section
        }
        fastargs.Section(section, cls.__doc__, config_descriptor=config).params(**params)


def _typed(given: Mapping[str, Given]) -> dict[str, Any]:
    """Typed values of all keys, the defaults among them. Raises ParamError for the first bad one."""
    # A fresh Config each time, and only `collect`: its own readers drop unknown keys, let environment variables win
    # over the command line, and end invalid input with exit code 0.
    config = fastargs.Config()
    declare(config)
    config.collect({dotted: one.value for dotted, one in given.items()})
    for path, error in (config.validate(mode="errordict") or {}).items():
        source = given[".".join(path)].source
        # fastargs raises its own empty error while handling ours.
        raise ParamError(f"{error.__context__}{f' ({source})' if source else ''}") from None
    return {dotted: config[dotted] for dotted in keys()}


def _take_apart(argv: list[str], options: Mapping[str, str]) -> Command:
    """Sort the arguments. Raises ParamError for an unknown option or a missing value."""
    command, rest = Command(), list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            command.help = True
            continue
        if not word.startswith("--") or word == "--":
            raise ParamError(_stray(word))
        name, equals, value = word[2:].partition("=")
        _known(name, options)
        if not equals:
            if not rest or rest[0].startswith("--"):
                example = "FILE" if name in ("config", "out", "json") else "VALUE"
                raise ParamError(f"--{name}: needs a value; write --{name}={example}")
            value = rest.pop(0)
        if name == "config":
            if not value:
                raise ParamError("--config: needs a file; write --config FILE")
            command.files.append(value)
        elif name in options:
            command.options[name] = value
        else:
            command.values[name] = value
    return command


def _known(name: str, options: Mapping[str, str]) -> None:
    if name in ("config", *options):
        return
    own = ["--config", "--help", *(f"--{option}" for option in options)]
    if "." not in name and (hint := did_you_mean(f"--{name}", own, cutoff=0.75)):
        raise ParamError(f"unknown option '--{name}'{hint}")
    known_key(name, prefix="--")


def _stray(word: str) -> str:
    name = word.lstrip("-").partition("=")[0]
    if name in keys() or name == "config":
        return f"unexpected argument {word!r}; write --{word.lstrip('-')}"
    if word.endswith((".yaml", ".yml")):
        return f"unexpected argument {word!r}; write --config {word}"
    return f"unexpected argument {word!r}; write --section.key=value or --config FILE"


def _speaks() -> bool:
    """Under torchrun only the first process of a node prints, so that a mistake is told once."""
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")


def refuse(error: UserError) -> NoReturn:
    """End the process for wrong input: one line on stderr (of local rank 0) and exit code 2."""
    if _speaks():
        print("sieve: " + " ".join(str(error).splitlines()), file=sys.stderr)
    raise SystemExit(EXIT_BAD_INPUT)


def _print(text: str) -> None:
    """Print a long text; a reader that closes the pipe early (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
