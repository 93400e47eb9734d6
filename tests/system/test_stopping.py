"""Requests to stop: signals are noted whatever the main thread does, and a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.system.launcher import GRACE, Launcher
from utils.system.stopping import SAME_REQUEST, Never, Poll, Stopping

ROOT = Path(__file__).parents[2]

LISTENS = """
import sys, time
from utils.system.stopping import Stopping
stopping = Stopping()
stopping.install()
print("ready", flush=True)
while not stopping.poll().stop:
    time.sleep(0.01)
print(stopping.poll().stop, flush=True)
time.sleep(30)
"""


def started(code: str, **env: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **env}
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_a_second_one_ends_the_process(number: signal.Signals) -> None:
    with started(LISTENS) as child:
        child.send_signal(number)
        child.send_signal(number)  # of the same request: through the launcher as well
        assert child.stdout is not None
        assert child.stdout.readline() == f"{number.name}\n"
        time.sleep(SAME_REQUEST + 0.2)
        assert child.poll() is None
        child.send_signal(number)
        assert child.wait(timeout=10) == 128 + number


def test_a_child_of_the_process_is_not_heard() -> None:
    # A loader's worker that is ended must not stop the run, nor end at the signal to the whole group.
    code = LISTENS.replace(
        'print("ready", flush=True)',
        """
import os, signal
child = os.fork()
if child == 0:
    print("ready", flush=True)
    time.sleep(2)
    os._exit(7)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == 7 << 8
assert stopping.poll().stop is None
""",
    )
    with started(code) as child:
        time.sleep(2.5)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.stdout is not None
        assert child.stdout.readline() == "SIGTERM\n"
        child.kill()


def test_uninstalled_the_signals_are_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stopping = Stopping()
    stopping.install()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] != before
    os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 5
    while not stopping.poll().stop:
        assert time.monotonic() < deadline
    stopping.uninstall()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_first_reason_stays() -> None:
    stopping = Stopping()
    assert stopping.poll(due=True) == Poll(None, True)
    stopping.request("SIGUSR1")
    stopping.request("SIGTERM")
    assert stopping.poll() == Poll("SIGUSR1", False)
    with pytest.raises(ValueError, match="unknown reason"):
        stopping.request("boredom")
    assert Never().poll(due=True) == Poll(None, True)


ORPHAN = """
import sys, time
from utils.system.launcher import Launcher
launcher = Launcher()
launcher.watch()
{asks}
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("asks", ["", "launcher.on_loss(lambda: print('asked', flush=True))"])
def test_a_worker_whose_launcher_is_gone_ends_itself_within_ten_seconds(asks: str) -> None:
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {ORPHAN.format(asks=asks)!r}])
time.sleep(60)
"""
    with started(parent, TORCHELASTIC_RUN_ID="x") as launcher:
        worker = int(subprocess.check_output(["pgrep", "-P", str(launcher.pid)], text=True))
        begin = time.monotonic()
        launcher.kill()
        while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            assert time.monotonic() - begin < 10.0
            time.sleep(0.05)
        assert launcher.stdout is not None
        assert launcher.stdout.read() == ("asked\n" if asks else "")
        assert (time.monotonic() - begin > GRACE - 1) == bool(asks)


def test_without_torchrun_nobody_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    Launcher(parent=0).watch()  # would end this process
    assert Launcher(parent=0).gone
    assert not Launcher().gone
