"""The run of all measurements on a GPU: its commands are taken by their parsers, and failures do not stop it."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Part
from utils.system.cpus import allowed_cpus


def test_a_dry_run_prints_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    modules = [line.split(" -m ")[1].split()[0].removeprefix("benchmarks.") for line in lines]
    assert modules == ["matrix", "step", "step", "select", "prune", "trainer", "loader"]
    assert all("--device cuda" in line and f"--out {tmp_path}" in line and "# at most" in line for line in lines)
    assert f"--workers {min(16, allowed_cpus())} " in lines[-1]
    assert not any(tmp_path.iterdir())
    assert gpu.main(["--dry-run", "--only", "prune"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_every_command_is_one_its_parser_takes(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, words: list[str]) -> None:
        raise Parsed(parse(parser, words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    _, _, name, *words = gpu.command(part, tmp_path)
    with pytest.raises(Parsed) as found:
        importlib.import_module(name).main(words)
    given = found.value.args[0]
    assert (given.device, given.out) == ("cuda", tmp_path / part.name)


def test_what_fails_or_takes_too_long_does_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "fails": "raise SystemExit(3)",
        "hangs": "import time; time.sleep(600)",
        "runs": f"open({str(tmp_path / 'ran')!r}, 'w')",
    }
    monkeypatch.setattr(gpu, "command", lambda part, out: [sys.executable, "-c", texts[part.name]])
    limits = {"fails": 60, "hangs": 1, "runs": 60}
    assert gpu.run_all([Part(name, "", limits[name]) for name in texts], tmp_path) == 1
    assert (tmp_path / "ran").exists()
    end = capsys.readouterr().out.split("did not run to the end:")[1]
    assert end.split("\n")[1:3] == ["fails: exit code 3", "hangs: took more than 1 s"]
    assert "runs" not in end
    assert gpu.run_all([Part("runs", "", 60)], tmp_path) == 0


def test_the_arms_of_a_killed_command_end_with_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run([sys.executable, "-c", parent], 3.0) == "took more than 3 s"
    pid = told.read_text(encoding="utf-8")
    for _ in range(100):  # whoever adopts an orphan needs a moment to bury it
        if not _alive(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} lives on")


def _alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z"
