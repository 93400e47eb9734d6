"""Tasks of a job array: levels and seeds from the task's number, the environment read only when asked."""

from __future__ import annotations

from typing import Any

import pytest

import harness_params
from utils.params import Params
from utils.params.array import VARIABLE, settle, tasks
from utils.params.identity import run_id
from utils.params.load import build
from utils.system.errors import ParamError


def params(**values: Any) -> Params:
    base = {"levels.densities": [0.5, 0.2, 0.1], "pruning.moment": "init", "run.array": True}
    return build({**base, **{key.replace("__", "."): value for key, value in values.items()}})


def test_levels_of_the_first_seed_come_first() -> None:
    given = params(run__seeds=[7, 3])
    assert tasks(given) == 6
    settled = [settle(given, {VARIABLE: str(index)}) for index in range(6)]
    assert [(each.run.seed, each.levels.only) for each in settled] == [(7, 0), (7, 1), (7, 2), (3, 0), (3, 1), (3, 2)]


def test_a_task_belongs_to_the_run_of_its_seed() -> None:
    task = settle(params(run__seeds=[7, 3]), {VARIABLE: "4"})
    plain = build({"levels.densities": [0.5, 0.2, 0.1], "pruning.moment": "init", "run.seed": 3})
    assert run_id(task) == run_id(plain)


def test_without_seeds_the_seed_of_the_run_stays() -> None:
    assert settle(params(run__seed=5), {VARIABLE: "2"}).run.seed == 5


def test_the_environment_changes_nothing_unless_it_is_asked_for() -> None:
    plain = params(run__array=False)
    assert settle(plain, {VARIABLE: "1"}) == plain
    planned = params(run__plan=True)
    assert settle(planned, {}) == planned


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "run.array=true: SLURM_ARRAY_TASK_ID is not set"),
        ("3", "SLURM_ARRAY_TASK_ID=3: the array has tasks 0 to 2; submit it with --array=0-2"),
        ("-1", "tasks 0 to 2"),
        ("1.0", "tasks 0 to 2"),
        ("²", "tasks 0 to 2"),
        ("", "tasks 0 to 2"),
    ],
)
def test_a_task_outside_the_array_is_told(text: str | None, words: str) -> None:
    with pytest.raises(ParamError) as error:
        settle(params(), {} if text is None else {VARIABLE: text})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"levels__only": 1}, "levels.only=1: run.array says which level runs"),
        ({"run__seeds": [1, 2], "run__array": False}, "run.seeds: has no effect without run.array"),
        ({"run__seeds": [1, 2], "run__seed": 3}, "run.seed=3: run.seeds lists the seeds"),
        ({"run__seeds": [1, 1]}, "run.seeds: lists a seed twice"),
        ({"levels__wait": 3, "run__array": False}, "levels.wait: has no effect without levels.only or run.array"),
    ],
)
def test_contradictions_are_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamError) as error:
        params(**values)
    assert words in str(error.value)


def test_the_command_line_reads_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2")
    words = ["--levels.densities=0.5,0.2,0.1", "--pruning.moment=init"]
    assert harness_params.load(words).levels.only is None
    assert harness_params.load([*words, "--run.array=true"]).levels.only == 2
