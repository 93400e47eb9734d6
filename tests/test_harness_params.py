"""The command line: precedence, strictness, one-line mistakes, help, and nothing left behind."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import fastargs.state
import pytest
import yaml

import harness_params
from harness_params import load, load_or_exit, load_with, load_with_or_exit
from utils.params import Step
from utils.params.catalog import keys, sections
from utils.params.load import build
from utils.params.parsing import dump
from utils.system.errors import ParamError
from utils.system.registry import HOMES, declared

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("run: {seed: 1, name: first}\ntraining: {epochs: 20}\nlevels: {count: 3}\n")
    second.write_text("run.seed: 2\ntraining:\n  batch_size: 64\n")
    return str(first), str(second)


def refused(*argv: str) -> str:
    with pytest.raises(ParamError) as caught:
        load(argv)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_later_files_win_and_the_command_line_wins_over_files(files: tuple[str, str]) -> None:
    first, second = files
    params = load(["--config", first, f"--config={second}"])
    assert (params.run.seed, params.run.name, params.training.epochs, params.training.batch_size) == (
        2,
        "first",
        20,
        64,
    )
    assert load(["--config", second, "--config", first]).run.seed == 1
    # Its place on the command line does not matter: the command line wins over every file.
    assert load(["--run.seed=3", "--config", first, "--config", second]).run.seed == 3
    assert load(["--config", first, "--run.seed", "3", "--config", second]).run.seed == 3
    assert load(["--config", first]).optimizer.lr == 0.1


def test_values_are_typed_as_build_types_them(files: tuple[str, str]) -> None:
    argv = ["--levels.densities=0.5,0.2", "--levels.rewind=wr", "--levels.rewind_step", "1ep5it", "--data.flip=no"]
    params = load(argv)
    assert params.levels.densities == (0.5, 0.2)
    assert params.levels.rewind_step == Step(1, 5)
    assert params.data.flip is False
    assert params == build(dict(word[2:].split("=") for word in argv if "=" in word) | {"levels.rewind_step": "1ep5it"})


def test_every_default_and_every_dumped_value_survives_fastargs(tmp_path: Path) -> None:
    assert load(["--levels.count=2"]) == build({"levels.count": 2})
    config = tmp_path / "all.yaml"
    params = build({"levels.densities": [1.0, 0.3], "data.flip": "no", "training.clip": "1e-1", "data.subset": 500})
    config.write_text(yaml.safe_dump(dump(params)))
    assert load(["--config", str(config)]) == params


def test_a_value_may_be_set_back_to_none(files: tuple[str, str]) -> None:
    params = load(["--config", files[0], "--levels.count=none", "--levels.target=0.5", "--training.clip="])
    assert (params.levels.count, params.training.clip) == (None, None)


def test_a_repeated_key_takes_the_last_value() -> None:
    assert load(["--levels.count=2", "--run.seed=1", "--run.seed", "2", "--run.seed=3"]).run.seed == 3


def test_negative_and_odd_values_are_values() -> None:
    assert "levels.count: expected" in refused("--levels.count", "-1")
    assert load(["--levels.count=2", "--data.root", "-x=y"]).data.root == "-x=y"
    assert load(["--levels.count=2", "--data.root=--x"]).data.root == "--x"


def test_environment_variables_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run.seed", "run", "RUN.SEED", "training.epochs", "config", "config_file"):
        monkeypatch.setenv(name, "77")
    params = load(["--levels.count=2", "--training.epochs=5"])
    assert (params.run.seed, params.training.epochs) == (0, 5)


def test_calls_share_no_state(files: tuple[str, str]) -> None:
    before = fastargs.state.STATE["config"]
    load(["--config", files[0], "--run.seed=9", "--optimizer.lr=0.5"])
    assert refused("--run.seed=x", "--levels.count=1").startswith("run.seed: ")
    assert load(["--levels.count=2"]) == build({"levels.count": 2})
    assert fastargs.state.STATE["config"] is before


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--conf", "x.yaml"], "unknown option '--conf'; did you mean '--config'?"),
        (["--config-file", "x.yaml"], "unknown option '--config-file'; did you mean '--config'?"),
        (["--hlp"], "unknown option '--hlp'; did you mean '--help'?"),
        (["--run.see=1"], "unknown key '--run.see'; did you mean '--run.seed'?"),
        (["--run.sede", "1"], "unknown key '--run.sede'; did you mean '--run.seed'?"),
        (["--RUN.SEED=1"], "unknown key '--RUN.SEED'"),
        (["--lr=1"], "unknown key '--lr'; did you mean '--optimizer.lr'?"),
        (["--epochs=1"], "did you mean '--training.epochs' or '--levels.epochs'?"),
        (["--run=1"], "unknown key '--run'"),
        (["--=1"], "unknown key '--'"),
        (["-C", "x.yaml"], "unexpected argument '-C'"),
        (["--"], "unexpected argument '--'"),
        (["run.seed=1"], "unexpected argument 'run.seed=1'; write --run.seed=1"),
        (["-run.seed=1"], "unexpected argument '-run.seed=1'; write --run.seed=1"),
        (["a.yaml"], "unexpected argument 'a.yaml'; write --config a.yaml"),
        (["stray\nline"], "unexpected argument 'stray\\nline'"),
        (["--run.seed"], "--run.seed: needs a value"),
        (["--run.seed", "--run.name=x"], "--run.seed: needs a value"),
        (["--run.plan"], "--run.plan: needs a value"),
        (["--config"], "--config: needs a value"),
        (["--config="], "--config: needs a file"),
        (["--config", "/nowhere/x.yaml"], "/nowhere/x.yaml: no such config file"),
        ([], "nothing to run; give --config FILE"),
        (["--levels.count=2", "--training.epochs=1.5"], "training.epochs: expected a whole number >= 0, not '1.5'"),
        (["--levels.count=2", "--run.deterministic=on"], "run.deterministic: expected true or false, not 'on'"),
        (["--levels.count=2", "--training.clip=1", "--levels.rate=2"], "levels.rate: expected a number > 0 and < 1"),
        (["--levels.count=2", "--levels.target=0.5", "--levels.densities=0.5"], "contradicts levels.densities"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], expected: str) -> None:
    assert expected in refused(*argv)


def test_a_bad_value_names_its_file_unless_the_command_line_mends_it(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("training: {epochs: ten}\nlevels: {count: 2}\n")
    assert refused("--config", str(config)) == f"training.epochs: expected a whole number >= 0, not 'ten' ({config})"
    assert "(" not in refused("--config", str(config), "--training.epochs=nine")
    assert load(["--config", str(config), "--training.epochs=9"]).training.epochs == 9


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("optimizer: {learning_rate: 1}\n")
    assert f"unknown key 'optimizer.learning_rate' ({config})" in refused("--config", str(config))


def test_entry_points_may_have_options_of_their_own() -> None:
    options = {"out": "file the masks are written to"}
    params, given = load_with(options, ["--out", "m.safetensors", "--pruning.density=0.1"], plan=False)
    assert given == {"out": "m.safetensors"}
    assert params.pruning.density == 0.1
    assert load_with(options, [], plan=False)[1] == {}
    with pytest.raises(ParamError, match=r"unknown option '--ou'; did you mean '--out'\?"):
        load_with(options, ["--ou=x"], plan=False)
    assert "'--out'" not in refused("--out=x", "--levels.count=1").partition(";")[2]


def test_exit_code_2_and_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        load_or_exit(["--run.see=1"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sieve: unknown key '--run.see'; did you mean '--run.seed'?\n"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("3", 0), ("", 1)])
def test_only_the_first_process_of_a_node_speaks(
    rank: str, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as caught:
        load_with_or_exit({}, ["--nonsense"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == lines
    with pytest.raises(SystemExit) as caught:
        load_or_exit(["--help"])
    assert caught.value.code == 0
    assert bool(capsys.readouterr().out) == bool(lines)


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **more: str) -> str:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        load_with({"out": "where it goes"} if more else {}, ["--levels.count=x", "--help"], usage=more.get("usage", ""))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_key_and_every_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch)
    flat = re.sub(r"\s+", " ", text)
    for section in sections():
        assert re.search(rf"^{section}: \w", text, re.MULTILINE)
    for key in keys().values():
        assert f"  --{key.dotted}=" in text
        assert re.sub(r"\s+", " ", key.meta.help) in flat
    for kind in HOMES:
        names = declared(kind)
        assert names
        for name, summary in names.items():
            assert re.search(rf"^  {re.escape(name)}\s", text, re.MULTILINE)
            assert summary
            assert summary in flat
    assert "--training.epochs=10 " in text
    assert "--config FILE" in text
    assert "number > 0 and < 1" in text


def test_help_of_another_entry_point_names_it_and_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, usage="python -m utils.pruning --out FILE")
    assert text.startswith("usage: python -m utils.pruning --out FILE\n")
    assert re.search(r"--out VALUE +where it goes", text)


def test_every_section_is_a_fastargs_section_with_our_checker() -> None:
    config = fastargs.Config()
    harness_params.declare(config)
    assert {".".join(path) for path in config.entries} == set(keys())
    assert all(isinstance(param.checker, harness_params.Parsed) for param in config.entries.values())
    assert config.entries[("levels", "rate")].checker.help() == "a number > 0 and < 1"


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        code, shell=True, executable="/bin/bash", cwd=folder, capture_output=True, text=True, timeout=120,
        env={**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip


def test_a_mistake_ends_the_real_program_early_without_torch_and_without_a_trace(tmp_path: Path) -> None:
    code = (
        "import sys, harness\n"
        "try:\n    harness.main()\n"
        "finally:\n    print(sorted({'torch', 'numpy', 'pandas', 'ffcv'} & set(sys.modules)))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(f'{sys.executable} -c "{code}" --levels.count=2 --training.epoch=3', tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr == "sieve: unknown key '--training.epoch'; did you mean '--training.epochs'?\n"
    assert list(tmp_path.iterdir()) == []
    # Processor time: what a clock shows depends on who else is at work.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = run(f"set -o pipefail; {sys.executable} {ROOT}/harness.py --help | true", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
