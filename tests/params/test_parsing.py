"""Text and YAML values to typed values: what is taken, what is refused, and that nothing is lost on the way back."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.params import Params, Step
from utils.params.catalog import Key, assemble, keys
from utils.params.parsing import allowed, dump, dump_value, parse, show
from utils.system.errors import ParamError

WORDS = {"criterion": "magnitude", "allocation": "erk", "model": "cifar/resnet20", "dataset": "cifar10"}
WORDS |= {"optimizer": "adamw", "schedule": "cosine", "graph": "rreg", "trigger": "early_bird", "dynamic": "rigl"}
WORDS |= {"channel_criterion": "snap"}


def refused(dotted: str, value: object) -> str:
    with pytest.raises(ParamError) as caught:
        parse(keys()[dotted], value)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{dotted}: ")
    return message


@pytest.mark.parametrize(
    ("dotted", "raw", "value"),
    [
        ("training.epochs", "12", 12),
        ("training.epochs", 12, 12),
        ("training.epochs", " 010 ", 10),
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.lr", "1E-4", 1e-4),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", 1, 1.0),
        ("data.val", "-0.0", 0.0),
        ("run.deterministic", "YES", True),
        ("run.deterministic", "0", False),
        ("run.deterministic", 1, True),
        ("run.deterministic", False, False),
        ("data.flip", "auto", None),
        ("data.flip", "no", False),
        ("training.clip", "None", None),
        ("training.clip", "", None),
        ("training.clip", None, None),
        ("data.subset", "null", None),
        ("schedule.warmup", "3ep50it", Step(3, 50)),
        ("levels.rewind_step", "500it", Step(0, 500)),
        ("schedule.milestones", "70ep, 130ep", (Step(70), Step(130))),
        ("schedule.milestones", ["70ep", "130ep"], (Step(70), Step(130))),
        ("levels.densities", [1, "0.5", 1e-2], (1.0, 0.5, 0.01)),
        ("levels.densities", "[0.5,0.2]", (0.5, 0.2)),
        ("levels.densities", "", ()),
        ("levels.densities", "[]", ()),
        ("levels.densities", [], ()),
        ("levels.epochs", "3", (3,)),
        ("levels.epochs", 3, (3,)),
        ("pruning.exclude", "a.*, [bc]*", ("a.*", "[bc]*")),
        ("pruning.exclude", "[ab]", ("[ab]",)),
        ("model.name", "timm/anything", "timm/anything"),
        ("run.name", "1e-4", "1e-4"),
    ],
)
def test_taken(dotted: str, raw: object, value: object) -> None:
    result = parse(keys()[dotted], raw)
    assert result == value
    assert type(result) is type(value)
    if isinstance(result, float):
        assert math.copysign(1.0, result) == 1.0


@pytest.mark.parametrize(
    ("dotted", "raw"),
    [
        ("training.epochs", "1.5"),
        ("training.epochs", 1.0),
        ("training.epochs", True),
        ("training.epochs", "true"),
        ("training.epochs", "1e3"),
        ("training.epochs", "1_000"),
        ("training.epochs", "٣"),
        ("training.epochs", "-1"),
        ("training.epochs", "9" * 5000),
        ("training.epochs", 2**63),
        ("training.epochs", None),
        ("training.epochs", [1]),
        ("training.epochs", "none"),
        ("optimizer.lr", "nan"),
        ("optimizer.lr", math.nan),
        ("optimizer.lr", "inf"),
        ("optimizer.lr", math.inf),
        ("optimizer.lr", "1e999"),
        ("optimizer.lr", 10**400),
        ("optimizer.lr", "0"),
        ("optimizer.lr", True),
        ("optimizer.lr", "1,5"),
        ("optimizer.lr", "1_0"),
        ("optimizer.lr", "٣.٥"),
        ("optimizer.lr", {}),
        ("optimizer.momentum", "1"),
        ("levels.rate", 0),
        ("levels.rate", 1),
        ("levels.target", 1.0000001),
        ("run.deterministic", "on"),
        ("run.deterministic", "off"),
        ("run.deterministic", "t"),
        ("run.deterministic", ""),
        ("run.deterministic", 2),
        ("run.deterministic", 1.0),
        ("run.deterministic", "auto"),
        ("data.flip", "maybe"),
        ("run.name", 10),
        ("run.name", None),
        ("run.name", "a\nb"),
        ("run.name", "\udcff"),
        ("schedule.warmup", 500),
        ("schedule.warmup", ""),
        ("schedule.warmup", "500"),
        ("schedule.warmup", "50it3ep"),
        ("schedule.warmup", "-3ep"),
        ("schedule.warmup", "none"),
        ("schedule.warmup", "9" * 5000 + "it"),
        ("levels.densities", "0.5,,0.2"),
        ("levels.densities", "0.5,"),
        ("levels.densities", [0.5, [0.2]]),
        ("levels.densities", [0.5, None]),
        ("levels.densities", None),
        ("levels.densities", True),
        ("levels.epochs", [1.0]),
        ("pruning.exclude", [""]),
        ("levels.rewind", "LRR"),
        ("pruning.criterion", "magnitud"),
        ("model.name", "timm/"),
        ("model.name", "resnet18"),
        ("data.name", ""),
    ],
)
def test_refused(dotted: str, raw: object) -> None:
    refused(dotted, raw)


def test_messages_say_what_is_allowed_and_what_is_near() -> None:
    assert refused("training.epochs", "ten") == "training.epochs: expected a whole number >= 0, not 'ten'"
    assert "auto or a whole number >= 1" in refused("data.workers", "0")
    assert "one of imp, wr, lrr, none" in refused("levels.rewind", "lr")
    assert refused("levels.rewind", "lr").endswith("; did you mean 'lrr'?")
    assert refused("pruning.criterion", "magnitud").endswith("; did you mean 'magnitude'?")
    assert "'cifar/resnet18'" in refused("model.name", "resnet18")
    assert "magnitude" in refused("pruning.criterion", "zzzz")  # nothing near: the known ones are listed
    assert "not '1.5' in '0.5,1.5'" in refused("levels.densities", "0.5,1.5")
    assert "3ep50it" in refused("schedule.warmup", "x")
    assert len(refused("training.epochs", "x" * 10_000)) < 200


def test_registered_names_come_from_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.params.parsing.declared", lambda kind: {f"my_{kind}": "Mine."})
    assert parse(keys()["pruning.criterion"], "my_criterion") == "my_criterion"
    assert "'my_criterion'" in refused("pruning.criterion", "my_criterium")


def values_of(key: Key) -> st.SearchStrategy[object]:
    """Any legal value of `key`, drawn without the code under test."""
    meta = key.meta
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=20)
    if meta.choices:
        one: st.SearchStrategy[object] = st.sampled_from(meta.choices)
    elif meta.kind:
        one = st.sampled_from([WORDS[meta.kind], *(prefix + "x" for prefix in meta.prefixes)])
    elif key.type is bool:
        one = st.booleans()
    elif key.type is int:
        one = st.integers(int(meta.low or 0), int(meta.high if meta.high is not None else 2**63 - 1))
    elif key.type is float:
        low = meta.above if meta.above is not None else meta.low
        high = meta.below if meta.below is not None else meta.high
        one = st.floats(
            low, high, exclude_min=meta.above is not None, exclude_max=meta.below is not None, allow_nan=False,
            allow_infinity=False,
        )  # fmt: skip
    elif key.type is Step:
        one = st.builds(Step, st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1))
    else:
        one = text.filter(lambda word: not key.optional or word.strip().lower() not in ("", "auto", "none", "null"))
    if key.sequence:
        return st.lists(one, max_size=4).map(tuple)
    return st.none() | one if key.optional else one


ALL_VALUES = st.fixed_dictionaries({dotted: values_of(key) for dotted, key in keys().items()})


@settings(deadline=None, max_examples=50)
@given(ALL_VALUES)
def test_dump_through_yaml_and_back_is_the_identity(values: dict[str, object]) -> None:
    params = assemble(values)
    nested = yaml.safe_load(yaml.safe_dump(dump(params)))
    again = {dotted: parse(key, nested[key.section][key.name]) for dotted, key in keys().items()}
    assert again == values


@settings(deadline=None, max_examples=50)
@given(ALL_VALUES)
def test_shown_on_a_command_line_and_back_is_the_identity(values: dict[str, object]) -> None:
    for dotted, key in keys().items():
        if key.sequence and key.type is str:
            continue  # a comma inside a text cannot be typed; files have lists for that
        assert parse(key, show(key, values[dotted])) == values[dotted]


@settings(deadline=None)
@given(st.text(max_size=12) | st.floats() | st.integers() | st.none() | st.lists(st.text(max_size=3), max_size=3))
def test_nonsense_is_refused_in_one_line_or_taken(raw: object) -> None:
    for key in keys().values():
        try:
            value = parse(key, raw)
        except ParamError as error:
            lines = str(error).splitlines()
        else:
            assert parse(key, dump_value(key, value)) == value
            continue
        assert len(lines) == 1


def test_every_default_is_legal() -> None:
    for key in keys().values():
        assert parse(key, dump_value(key, key.default)) == key.default, key.dotted
        assert key.of(Params()) == key.default


def test_allowed_names_range_and_choices() -> None:
    assert allowed(keys()["levels.rate"]) == "a number > 0 and < 1"
    assert allowed(keys()["levels.count"]) == "none or a whole number >= 1 and <= 1000"
    assert allowed(keys()["levels.densities"]) == "a list of numbers >= 0 and <= 1"
    assert allowed(keys()["model.name"]) == "a known model or torchvision/<name> or timm/<name>"
    assert all("\n" not in allowed(key) and allowed(key) for key in keys().values())
