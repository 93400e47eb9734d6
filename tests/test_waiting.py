"""Waiting for the level before: at once, within the limit, at the limit, and stopped meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import levels_cases
from utils import waiting
from utils.params import Params
from utils.record import run_dir
from utils.system.distributed import World
from utils.system.errors import Preempted, UserError
from utils.waiting import wait_for_source


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "INTERVAL", 0.01)


def config(root: Path, **keys: object) -> Params:
    return levels_cases.config(root, 1, **{"levels__count": 3, "levels__only": 2, **keys})


def finish(params: Params, level: int) -> None:
    row = run_dir(params).level(level).row
    row.parent.mkdir(parents=True)
    row.write_text("{}")


def later(do: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        time.sleep(0.3)
        do()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_without_a_wait_a_missing_level_is_an_error_at_once(tmp_path: Path) -> None:
    params = config(tmp_path)
    with pytest.raises(UserError, match=r"levels\.only=2: level 1 it starts from is not done in .*; run it first, or"):
        wait_for_source(params, World())


def test_a_level_that_starts_from_none_waits_for_none(tmp_path: Path) -> None:
    wait_for_source(config(tmp_path, levels__only=0), World())
    wait_for_source(config(tmp_path, levels__only=1, pruning__moment="init", levels__densities=[0.5, 0.2],
                           levels__count="none"), World())  # fmt: skip


def test_a_level_that_is_done_is_not_waited_for(tmp_path: Path) -> None:
    params = config(tmp_path)
    finish(params, 1)
    wait_for_source(params, World())


def test_it_goes_on_once_the_level_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = config(tmp_path, levels__wait=1)
    thread = later(lambda: finish(params, 1))
    wait_for_source(params, World())
    thread.join()
    assert "waiting for it up to 1 minutes" in capsys.readouterr().out


def test_at_the_limit_it_says_what_it_waited_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"level 1 it starts from is not done in .* after 0\.001 minutes"):
        wait_for_source(config(tmp_path, levels__wait=0.001), World())


def test_a_stop_meanwhile_is_heeded(tmp_path: Path) -> None:
    thread = later(lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM while waiting for level 1; the same command waits again"):
        wait_for_source(config(tmp_path, levels__wait=1), World())
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
