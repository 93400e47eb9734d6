"""Arms in processes of their own that answer when asked: lines of words in, lines of numbers out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]

_Self = TypeVar("_Self", bound="Process")


class Process:
    """`python -m MODULE WORDS` in another process; a context manager. Words may hold no tab and no line's end."""

    def __init__(
        self,
        module: str,
        *words: str,
        name: str = "",
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """name: of the arm, for errors; prefix: goes before the command; environment: beside this process's own."""
        self.name = name or module
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *words],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def tell(self, *words: str) -> None:
        """Hand over a line; `answer` waits for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()

    def answer(self) -> list[float]:
        """The next answer. Raises RuntimeError when the process has ended."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("answer "):
                return [float(word) for word in line.split()[1:]]
        raise RuntimeError(f"the {self.name} arm ended with exit code {self._process.wait()}; its message is above")

    def ask(self, *words: str) -> list[float]:
        """Numbers the process answers with. Raises RuntimeError when it has ended."""
        self.tell(*words)
        return self.answer()

    def cost(self, *words: str) -> float:
        """Seconds an image of one more run, asked for with `words` ("run" where there are none)."""
        seconds, images = self.ask(*(words or ("run",)))
        return seconds / images


def serve(reply: Callable[[list[str]], Iterable[float]]) -> None:
    """Answer the lines of this process's input until it ends."""
    for line in sys.stdin:
        print("answer", *reply(line.rstrip("\n").split("\t")), flush=True)


class Ranks:
    """Two processes of one process group, each asked the same; a context manager."""

    def __init__(
        self, module: str, *words: str, prefixes: Sequence[Sequence[str]], address: str, interfaces: Sequence[str]
    ) -> None:
        """prefixes: go before each rank's command; address: of rank 0; interfaces: each rank's, for gloo."""
        self.ranks: list[Process] = []
        several = prefixes[0] != prefixes[1]
        port = _free_port()
        try:
            for rank, (prefix, interface) in enumerate(zip(prefixes, interfaces, strict=True)):
                place = {
                    "RANK": f"{rank}",
                    "WORLD_SIZE": "2",
                    "LOCAL_RANK": "0" if several else f"{rank}",
                    "LOCAL_WORLD_SIZE": "1" if several else "2",
                    "MASTER_ADDR": address,
                    "MASTER_PORT": f"{port}",
                    "GLOO_SOCKET_IFNAME": interface,
                    "OMP_NUM_THREADS": "1",
                }
                name = f"rank {rank} of {module}"
                self.ranks.append(Process(module, *words, name=name, prefix=prefix, environment=place))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.ranks:
            process.__exit__(None, None, None)

    def ask(self, *words: str) -> list[list[float]]:
        """Every rank's answer, by rank; all begin before any is waited for."""
        for process in self.ranks:
            process.tell(*words)
        return [process.answer() for process in self.ranks]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
