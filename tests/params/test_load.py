"""Mappings and YAML files to `Params`: nesting, precedence, and everything a config file can get wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.params import Params, Step
from utils.params.load import build, flatten
from utils.params.yaml_file import read_yaml
from utils.system.errors import ParamError

PLAN = {"levels": {"count": 3}}


def refused(*mappings: Any) -> str:
    with pytest.raises(ParamError) as caught:
        build([PLAN, *mappings])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nested_and_dotted_keys_mean_the_same() -> None:
    nested = build({"levels": {"count": 3, "rewind": "wr", "rewind_step": "5it"}, "optimizer": {"lr": "1e-3"}})
    dotted = build({"levels.count": 3, "levels.rewind": "wr", "levels": {"rewind_step": "5it"}, "optimizer.lr": 1e-3})
    assert nested == dotted
    assert nested.levels.rewind_step == Step(0, 5)
    assert nested.optimizer.lr == 0.001
    assert isinstance(nested, Params)


def test_later_mappings_win_key_by_key() -> None:
    params = build([PLAN, {"training": {"epochs": 5, "batch_size": 64}}, {"training.epochs": 7}])
    assert (params.training.epochs, params.training.batch_size, params.levels.count) == (7, 64, 3)
    params = build([PLAN, {"levels": {"count": None, "target": 0.5}}])
    assert (params.levels.count, params.levels.target) == (None, 0.5)


def test_an_empty_section_is_no_mistake_and_a_plan_needs_an_end() -> None:
    assert build([PLAN, {"training": None}, {"training": {}}]) == build(PLAN)
    with pytest.raises(ParamError, match="nothing says where the plan ends"):
        build({})
    assert build({}, plan=False) == Params()


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"training": {"epoch": 3}}, "'training.epochs'"),
        ({"trainning": {"epochs": 3}}, "'training.epochs'"),
        ({"training.epoch": 3}, "'training.epochs'"),
        ({"data": {"batch_size": 3}}, "'training.batch_size'"),
        ({"data": {"nme": "x"}}, "'data.name'"),
        ({"epochs": 3}, "'training.epochs' or 'levels.epochs'"),
        ({"batchsize": 3}, "'training.batch_size'"),
        ({"lr": 3}, "'optimizer.lr'"),
        ({"zzzzzz": {"qqqqqq": 3}}, "--help lists all keys"),
        ({"zzzzzz": None}, "--help lists all keys"),
        ({"training": {"epochs": {"a": 3}}}, "unknown key 'training.epochs.a'"),
        ({"training": 3}, "training: a section holds keys"),
        ({"training": [1]}, "training: a section holds keys"),
        ({"training": ""}, "training: a section holds keys"),
        ({"training": {3: 3}}, "training.3: a key must be text"),
        ({None: 3}, "None: a key must be text"),
        ({"training": {"epochs": None}}, "training.epochs: no value given"),
        ({"training": {"epochs": 3}, "training.epochs": 3}, "training.epochs: given twice"),
        ({"a.b.c": 3}, "unknown key 'a.b.c'"),
        ({"": 3}, "unknown key ''"),
        ({".": 3}, "unknown key '.'"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(mapping: Any, expected: str) -> None:
    assert expected in refused(mapping)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=12), st.none() | st.integers() | st.text(max_size=4), max_size=3))
def test_random_mappings_never_pass_and_never_crash(mapping: dict[str, Any]) -> None:
    harmless = all(key in ("run", "model", "data", "training") and value is None for key, value in mapping.items())
    if harmless:
        assert build([PLAN, mapping]) == build(PLAN)
    elif not {key.partition(".")[0] for key in mapping} & set(Params.__dataclass_fields__):
        assert "unknown key" in refused(mapping)


def test_a_file_is_named_in_its_mistakes() -> None:
    with pytest.raises(ParamError, match=r"'training.epoch' \(my.yaml\); did you mean 'training.epochs'\?$"):
        flatten({"training": {"epoch": 3}}, "my.yaml")


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_scalars_stay_text_so_that_the_field_decides(tmp_path: Path) -> None:
    text = "optimizer: {lr: 1e-4}\nrun:\n  name: 2024-01-01\n  deterministic: yes\n  seed: 010\ndata.subset: ~\n"
    content = read_yaml(write(tmp_path, text))
    assert content["optimizer"] == {"lr": "1e-4"}
    params = build([PLAN, content])
    assert params.optimizer.lr == 1e-4
    assert params.run.name == "2024-01-01"
    assert params.run.deterministic is True
    assert params.run.seed == 10
    assert params.data.subset is None


def test_on_and_off_are_no_booleans(tmp_path: Path) -> None:
    assert "run.deterministic: expected true or false, not 'on'" in refused(
        read_yaml(write(tmp_path, "run: {deterministic: on}"))
    )


def test_bom_and_crlf_are_no_mistake(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, b"\xef\xbb\xbfrun:\r\n  seed: 3\r\n")) == {"run": {"seed": "3"}}


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no keys"),
        ("# only a comment\n", "holds no keys"),
        ("---\n", "holds no keys"),
        ("- a\n- b\n", "a mapping of sections, not a list"),
        ("just text", "a mapping of sections, not a str"),
        ("run: {seed: 1", "not a valid config, line 1"),
        ("run:\n\tseed: 1\n", "line 2"),
        ("run: {seed: 1}\nrun: {name: x}\n", "line 2: 'run' is given twice"),
        ("run:\n  seed: 1\n  seed: 2\n", "line 3: 'seed' is given twice"),
        ("run: {seed: 1}\n---\nrun: {seed: 2}\n", "not a valid config"),
        (BOMB, "aliases (*name) are not allowed"),
        ("run: &r {seed: 1}\ndata: {<<: *r}\n", "aliases (*name) are not allowed"),
        ("run: !!python/object/apply:os.system ['true']\n", "are not allowed"),
        ("run: {seed: !!int 3}\n", "are not allowed"),
        ("run: ! x\n", "are not allowed"),
        ("run: " + "[" * 5000, "nested too deeply"),
        ("? [a, b]\n: c\n", "not a valid config"),
        (b"run: {name: \xff\xfe}\n", "not UTF-8"),
        (b"run: {name: \x00}\n", "not a valid config"),
        (b"# " + b"x" * (128 << 10), "larger than 128 KiB"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = write(tmp_path, content)
    begin = time.process_time()
    with pytest.raises(ParamError) as caught:
        read_yaml(path)
    assert time.process_time() - begin < 1.0
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    assert expected in message


def test_missing_files_and_directories(tmp_path: Path) -> None:
    write(tmp_path, "run: {seed: 1}")
    with pytest.raises(ParamError, match=r"confg.yaml: no such config file; did you mean 'config.yaml'\?"):
        read_yaml(tmp_path / "confg.yaml")
    with pytest.raises(ParamError, match=r"no such config file$"):
        read_yaml(tmp_path / "nowhere" / "zzz.yaml")
    with pytest.raises(ParamError, match="is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(ParamError, match="cannot be read"):
        read_yaml(tmp_path / "config.yaml" / "below")
    with pytest.raises(ParamError):
        read_yaml("a\0b")


def test_the_bomb_would_have_been_one() -> None:
    assert yaml.safe_load(BOMB)["c"] == [[["x", "x"]] * 2] * 2
