"""Run directory names, console lines, process group in one process, environment record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from utils.system import distributed, environment
from utils.system.atomic import sha256, write_json
from utils.system.console import Console, number
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import RunDir


def test_levels_are_found_by_number_and_nothing_else_is(tmp_path: Path) -> None:
    for name in ("level_00", "level_10", "level_02", "level_x", "levels", "level_3"):
        (tmp_path / name).mkdir()
    (tmp_path / "level_05").write_text("a file")
    run = RunDir(tmp_path)
    assert run.levels() == [0, 2, 10]
    assert run.level(2).row == tmp_path / "level_02" / "row.json"
    assert RunDir(tmp_path / "absent").levels() == []


def test_console_prints_headings_once_and_only_on_the_main_process(capsys) -> None:
    console = Console()
    for value in ("1", "22"):
        console.row([("epoch", value), ("loss", "0.5")])
    console.restart_table()
    console.row([("epoch", "3"), ("loss", "0.5")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["epoch", "loss"],
        ["1", "0.5"],
        ["22", "0.5"],
        ["epoch", "loss"],
        ["3", "0.5"],
    ]
    assert len({len(line) for line in lines}) == 1
    quiet = Console(main=False)
    quiet.line("x")
    quiet.warn("y")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_is_silent_off_a_terminal(capsys) -> None:
    assert list(Console().progress([1, 2], 2, "x")) == [1, 2]
    assert capsys.readouterr().out == ""


def test_numbers_of_a_table() -> None:
    assert [number(None), number(1.234), number(7)] == ["-", "1.23", "7"]


def test_world_is_read_from_torchruns_environment(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.world() == World()
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.world() == World(5, 8, 1, 4)
    assert not distributed.world().main


def test_one_process_needs_no_group() -> None:
    tensor = torch.ones(2)
    assert distributed.sum_over_ranks(tensor).tolist() == [1.0, 1.0]
    assert distributed.gather("a") == ["a"]
    assert distributed.from_main(lambda: 3) == 3
    distributed.agree("masks", "digest")
    distributed.barrier()
    assert not distributed.active()


def test_devices_that_are_not_there_are_refused(monkeypatch) -> None:
    assert distributed.choose_device("cpu", World()) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"run\.device=cuda: local rank 0 has no GPU"):
        distributed.choose_device("cuda", World())
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    distributed.start(World(), torch.device("cpu"))  # an address alone, as batch systems export it, starts no group
    assert not distributed.active()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"distributed\.backend=nccl needs GPUs"):
        distributed.start(World(size=2), torch.device("cpu"), "nccl")


def test_environment_can_be_written_as_json(tmp_path: Path) -> None:
    record = environment.describe(World(), torch.device("cpu"))
    write_json(tmp_path / "e.json", record)
    read = json.loads((tmp_path / "e.json").read_text())
    assert (
        read["versions"]["torch"] == torch.__version__.split("+")[0] or read["versions"]["torch"] == torch.__version__
    )
    assert read["ranks"] == 1


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
