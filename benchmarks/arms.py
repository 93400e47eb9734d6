"""An arm of a measurement in a process of its own, which answers questions with numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Process:
    """A module of this package started with `python -m`; a context manager.

    Its lines of input are questions, words apart by tabs; it answers each with a line "answer " and numbers.
    """

    def __init__(self, module: str, name: str, *words: str) -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", name, *words]
        self.name = name
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, *words: str) -> list[float]:
        """Numbers the process answers with. Raises RuntimeError when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("answer "):
                return [float(word) for word in line.split()[1:]]
        raise RuntimeError(f"the {self.name} arm ended with exit code {self._process.wait()}; its message is above")

    def cost(self) -> float:
        """Seconds an image of one more run, asked for with "run"."""
        seconds, images = self.ask("run")
        return seconds / images
