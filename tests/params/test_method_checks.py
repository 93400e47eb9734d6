"""Contradictions between the keys of pruning methods: each rule refuses its case, and the neighbouring one passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from utils.masks import Masks
from utils.params import method_checks
from utils.params.load import build
from utils.pruning.criteria import traits_of
from utils.system.errors import ParamError
from utils.system.registry import declared

PLAN: dict[str, Any] = {"levels.count": 3}
INIT: dict[str, Any] = {"pruning.moment": "init", "pruning.density": 0.1}
STEP: dict[str, Any] = {**INIT, "pruning.moment": "step", "pruning.step": "5it"}
EARLY: dict[str, Any] = {**INIT, "pruning.moment": "early"}
SNIP: dict[str, Any] = {**INIT, "pruning.criterion": "snip"}
RREG: dict[str, Any] = {**INIT, "graph.kind": "rreg", "pruning.allocation": "erk"}
DEGREE: dict[str, Any] = {"pruning.moment": "init", "graph.kind": "rreg", "graph.degree": 3}
GMP: dict[str, Any] = {**INIT, "dynamic.method": "gmp"}
RIGL: dict[str, Any] = {**INIT, "dynamic.method": "rigl"}
NM: dict[str, Any] = {**INIT, "pruning.density": 0.5, "pruning.pattern": "2:4"}

RULES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    # what criteria read
    (
        {**INIT, "pruning.samples_per_class": 2},
        "pruning.samples_per_class=2: has no effect with pruning.criterion=magnitude",
        {**SNIP, "pruning.samples_per_class": 2},
    ),
    ({**INIT, "pruning.batches": 2}, "pruning.batches=2: has no effect", {**SNIP, "pruning.batches": 2}),
    ({**INIT, "pruning.batch_size": 2}, "pruning.batch_size=2: has no effect", {**SNIP, "pruning.batch_size": 2}),
    (
        {**PLAN, "levels.start": 0.5, "levels.start_criterion": "synflow", "pruning.samples_per_class": 2},
        "pruning.samples_per_class=2: has no effect",
        {**PLAN, "levels.start": 0.5, "levels.start_criterion": "snip", "pruning.samples_per_class": 2},
    ),
    (
        {**SNIP, "pruning.batches": 2, "pruning.samples_per_class": 2},
        "pruning.batches=2: contradicts pruning.samples_per_class=2",
        {**SNIP, "pruning.batches": 2},
    ),
    # rounds
    ({**INIT, "pruning.rounds": 3}, "pruning.rounds=3: has no effect with pruning.criterion=magnitude", SNIP),
    (
        {**INIT, "pruning.criterion": "random", "pruning.rounds": 3},
        "pruning.rounds=3: has no effect with pruning.criterion=random",
        {**SNIP, "pruning.rounds": 3},
    ),
    (
        {**SNIP, "pruning.round_schedule": "linear"},
        "pruning.round_schedule=linear: has no effect with pruning.criterion=snip",
        {**INIT, "pruning.criterion": "synflow", "pruning.round_schedule": "linear"},
    ),
    (
        {**SNIP, "pruning.rounds": 1, "pruning.round_schedule": "linear"},
        "pruning.round_schedule=linear: has no effect with pruning.rounds=1",
        {**SNIP, "pruning.rounds": 2, "pruning.round_schedule": "linear"},
    ),
    (
        {**SNIP, "pruning.regrow": True},
        "pruning.regrow=true: needs several rounds",
        {**SNIP, "pruning.regrow": True, "pruning.rounds": 2},
    ),
    # allocations and patterns
    (
        {**INIT, "pruning.allocation": "erk", "pruning.normalize": "lamp"},
        "pruning.normalize=lamp: has no effect with pruning.allocation=erk",
        {**INIT, "pruning.normalize": "lamp"},
    ),
    (
        {**INIT, "pruning.allocation": "from_mask"},
        "pruning.from_mask: not set",
        {**INIT, "pruning.allocation": "from_mask", "pruning.from_mask": "m.safetensors"},
    ),
    (
        {**INIT, "pruning.from_mask": "m.safetensors"},
        "pruning.from_mask=m.safetensors: has no effect without pruning.allocation=from_mask",
        {**INIT, "pruning.allocation": "from_mask", "pruning.from_mask": "m.safetensors"},
    ),
    ({**INIT, "pruning.pattern": "4:2"}, "pruning.pattern: ", NM),
    (
        {**INIT, "pruning.group_score": "sum"},
        "pruning.group_score=sum: has no effect with pruning.pattern=weight",
        {**INIT, "pruning.group_score": "sum", "pruning.pattern": "kernel"},
    ),
    ({**NM, "pruning.group_score": "sum"}, "pruning.group_score=sum: has no effect with pruning.pattern=2:4", NM),
    ({**NM, "pruning.normalize": "lamp"}, "pruning.normalize=lamp: has no effect with pruning.pattern=2:4", NM),
    (
        {**NM, "pruning.criterion": "snip", "pruning.rounds": 3},
        "pruning.rounds=3: has no effect with pruning.pattern=2:4",
        {**NM, "pruning.criterion": "snip"},
    ),
    (
        {**NM, "pruning.criterion": "synflow", "pruning.round_schedule": "linear"},
        "pruning.round_schedule=linear: has no effect with pruning.pattern=2:4",
        {**NM, "pruning.criterion": "synflow"},
    ),
    # controls
    (
        {**INIT, "pruning.pattern": "kernel", "pruning.control": "shuffle"},
        "pruning.control=shuffle: moves single weights",
        {**INIT, "pruning.pattern": "kernel", "pruning.control": "invert"},
    ),
    (
        {**PLAN, "pruning.control": "reinitialise"},
        "pruning.control=reinitialise: only where training starts from initial weights",
        {**PLAN, "pruning.control": "reinitialise", "levels.rewind": "imp"},
    ),
    (
        {**STEP, "pruning.control": "reinitialise"},
        "pruning.control=reinitialise: only where",
        {**INIT, "pruning.control": "reinitialise"},
    ),
    # graphs
    ({**RREG, "pruning.criterion": "snip"}, "pruning.criterion=snip: has no effect with graph.kind=rreg", RREG),
    ({**RREG, "pruning.min_kept": 3}, "pruning.min_kept=3: has no effect with graph.kind=rreg", RREG),
    ({**RREG, "pruning.pattern": "kernel"}, "pruning.pattern=kernel: has no effect with graph.kind=rreg", RREG),
    (
        {**RREG, "pruning.control": "invert"},
        "pruning.control=invert: has no effect with graph.kind=rreg",
        {**RREG, "pruning.control": "reinitialise"},
    ),
    ({**RREG, "pruning.allocation": "global"}, "pruning.allocation=global: needs scores", RREG),
    (
        {**DEGREE, "pruning.density": 0.1},
        "pruning.density=0.1: has no effect with graph.degree=3",
        DEGREE,
    ),
    ({**DEGREE, "pruning.allocation": "erk"}, "pruning.allocation=erk: has no effect with graph.degree=3", DEGREE),
    (
        {**DEGREE, "levels.densities": [0.5]},
        "graph.degree=3: contradicts levels.densities",
        {"pruning.moment": "init", "graph.kind": "rreg", "pruning.allocation": "erk", "levels.densities": [0.5]},
    ),
    ({**INIT, "graph.degree": 3}, "graph.degree=3: has no effect with graph.kind=none", DEGREE),
    (
        {**RREG, "graph.side": "out"},
        "graph.side=out: has no effect with graph.kind=rreg",
        {**RREG, "graph.kind": "xnet", "graph.side": "out"},
    ),
    (
        {**RREG, "graph.kind": "xnet", "graph.form": "paper"},
        "graph.form=paper: has no effect with graph.kind=xnet",
        {**RREG, "graph.form": "paper"},
    ),
    (
        {**RREG, "graph.tries": 3},
        "graph.tries=3: has no effect with graph.form=simple",
        {**RREG, "graph.form": "paper", "graph.tries": 3},
    ),
    ({**STEP, "graph.kind": "rreg", "pruning.allocation": "erk"}, "graph.kind=rreg: is drawn before training", RREG),
    ({**PLAN, "graph.kind": "rreg", "pruning.allocation": "erk"}, "graph.kind=rreg: is drawn before training", RREG),
    # moments
    ({**INIT, "pruning.moment": "step"}, "pruning.step: not set", STEP),
    ({**INIT, "pruning.step": "5it"}, "pruning.step=5it: has no effect with pruning.moment=init", STEP),
    ({**STEP, "pruning.step": "10ep"}, "pruning.step=10ep: levels train 10 epochs", {**STEP, "pruning.step": "9ep"}),
    ({**STEP, "pruning.density": 1.0}, "pruning.moment=step: prunes nothing at density 1", STEP),
    (
        {"pruning.moment": "step", "pruning.step": "5it", "levels.densities": [1.0]},
        "pruning.moment=step: prunes nothing",
        {"pruning.moment": "step", "pruning.step": "5it", "levels.densities": [1.0, 0.5]},
    ),
    ({**EARLY, "pruning.density": 1.0}, "pruning.moment=early: prunes nothing at density 1", EARLY),
    ({**EARLY, "training.epochs": 0}, "pruning.moment=early: level 0 trains 0 epochs", {**EARLY, "training.epochs": 1}),
    (
        {**INIT, "early.threshold": 0.5},
        "early.threshold=0.5: has no effect with pruning.moment=init",
        {**EARLY, "early.threshold": 0.5},
    ),
    (
        {**STEP, "early.length": "configured"},
        "early.length=configured: has no effect",
        {**EARLY, "early.length": "configured", "early.latest": "1ep"},
    ),
    (
        {**EARLY, "early.length": "configured"},
        "early.latest: not set, and with early.length=configured nothing would be left to train",
        {**EARLY, "early.length": "configured", "early.latest": "1ep"},
    ),
    (
        {**SNIP, "pruning.criterion": "synflow", "pruning.regrow": True},
        "pruning.regrow=true: 'synflow' never scores a pruned weight anew",
        {**SNIP, "pruning.regrow": True, "pruning.rounds": 2},
    ),
    (
        {**SNIP, "pruning.criterion": "grasp", "pruning.normalize": "lamp"},
        "pruning.normalize=lamp: scores of 'grasp' are signed",
        {**SNIP, "pruning.normalize": "lamp"},
    ),
    (
        {**SNIP, "pruning.pattern": "channel", "pruning.last_layer": "dense"},
        "pruning.last_layer=dense: pruning.pattern=channel leaves the last layer whole already",
        {**SNIP, "pruning.pattern": "channel"},
    ),
    ({**PLAN, "early.latest": "1ep"}, "early.latest=1ep: has no effect", {**EARLY, "early.latest": "1ep"}),
    (
        {**PLAN, "early.trigger": "early_bird"},
        "early.trigger=early_bird: has no effect",
        {**EARLY, "early.trigger": "early_bird"},
    ),
    (
        {**EARLY, "early.window": 3},
        "early.window=3: has no effect with early.trigger=weight_distance",
        {**EARLY, "early.window": 3, "early.trigger": "early_bird"},
    ),
    (
        {**STEP, "levels.rewind": "wr", "levels.rewind_step": "1it"},
        "levels.rewind=wr: pruning.moment=step starts from",
        STEP,
    ),
    ({**EARLY, "levels.rewind": "none"}, "levels.rewind=none: pruning.moment=early starts from initial weights", EARLY),
    (
        {"pruning.moment": "oneshot", "pruning.density": 1.0},
        "pruning.density: 1 is not below 1, which level 0 holds",
        {"pruning.moment": "oneshot", "pruning.density": 0.9},
    ),
    # starting sparse
    (
        {**INIT, "levels.start": 0.5},
        "levels.start=0.5: has no effect with pruning.moment=init",
        {**PLAN, "levels.start": 0.5},
    ),
    (
        {**PLAN, "levels.start_criterion": "snip"},
        "levels.start_criterion=snip: has no effect with levels.start=none",
        {**PLAN, "levels.start": 0.5, "levels.start_criterion": "snip"},
    ),
    (
        {**PLAN, "levels.start_allocation": "erk"},
        "levels.start_allocation=erk: has no effect with levels.start=none",
        {**PLAN, "levels.start": 0.5, "levels.start_allocation": "erk"},
    ),
    (
        {"pruning.moment": "oneshot", "pruning.density": 0.5, "levels.start": 0.3},
        "pruning.density: 0.5 is above 0.3, which level 0 starts at",
        {"pruning.moment": "oneshot", "pruning.density": 0.2, "levels.start": 0.3},
    ),
    (
        {"levels.densities": [0.5, 0.2], "levels.start": 0.3},
        "levels.densities: 0.5 is above 0.3",
        {"levels.densities": [0.3, 0.2], "levels.start": 0.3},
    ),
    (
        {"pruning.moment": "oneshot", "levels.densities": [0.2, 0.5], "levels.start": 0.3},
        "levels.densities: 0.5 is above 0.3",
        {"pruning.moment": "oneshot", "levels.densities": [0.2, 0.1], "levels.start": 0.3},
    ),
    # masks that change while training
    ({**STEP, "dynamic.method": "rigl"}, "dynamic.method=rigl: contradicts pruning.moment=step", RIGL),
    ({**EARLY, "dynamic.method": "gmp"}, "dynamic.method=gmp: contradicts pruning.moment=early", GMP),
    (
        {**PLAN, "dynamic.method": "gmp"},
        "dynamic.method=gmp: prunes while the network trains",
        {**PLAN, "dynamic.method": "set"},
    ),
    (
        {**RREG, "dynamic.method": "gmp"},
        "dynamic.method=gmp: contradicts graph.kind=rreg",
        {**RREG, "dynamic.method": "set"},
    ),
    (
        {**GMP, "pruning.control": "shuffle"},
        "pruning.control=shuffle: contradicts dynamic.method=gmp",
        {**RIGL, "pruning.control": "shuffle"},
    ),
    (
        {**RIGL, "pruning.pattern": "kernel"},
        "dynamic.method=rigl: moves single weights",
        {**GMP, "pruning.pattern": "kernel"},
    ),
    ({**RIGL, "pruning.density": 1.0}, "dynamic.method=rigl: no level is sparse", RIGL),
    (
        {"levels.count": 1, "dynamic.method": "set"},
        "dynamic.method=set: no level is sparse",
        {**PLAN, "dynamic.method": "set"},
    ),
    ({**GMP, "pruning.density": 1.0}, "dynamic.method=gmp: density 1 is not below 1", GMP),
    (
        {**GMP, "dynamic.initial_density": 0.05},
        "dynamic.method=gmp: density 0.1 is not below 0.05",
        {**GMP, "dynamic.initial_density": 0.5},
    ),
    (
        {**GMP, "dynamic.fraction": 0.2},
        "dynamic.fraction=0.2: has no effect with dynamic.method=gmp",
        {**RIGL, "dynamic.fraction": 0.2},
    ),
    ({**GMP, "dynamic.decay": "linear"}, "dynamic.decay=linear: has no effect", {**RIGL, "dynamic.decay": "linear"}),
    (
        {**RIGL, "dynamic.initial_density": 0.5},
        "dynamic.initial_density=0.5: has no effect with dynamic.method=rigl",
        RIGL,
    ),
    (
        {**INIT, "dynamic.every": 5},
        "dynamic.every=5: has no effect with dynamic.method=none",
        {**GMP, "dynamic.every": 5},
    ),
    ({**INIT, "dynamic.until": 0.5}, "dynamic.until=0.5: has no effect", {**RIGL, "dynamic.until": 0.5}),
    ({**INIT, "dynamic.start": "1ep"}, "dynamic.start=1ep: has no effect", {**RIGL, "dynamic.start": "1ep"}),
]


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ParamError) as caught:
        build(values)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(("bad", "expected", "good"), RULES, ids=[rule[1].partition(":")[0] for rule in RULES])
def test_a_rule_refuses_its_case_and_lets_the_neighbour_pass(
    bad: dict[str, Any], expected: str, good: dict[str, Any]
) -> None:
    assert refused(bad).startswith(expected)
    build(good)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A mask file that keeps 3 of 7 weights."""
    path = tmp_path_factory.mktemp("half") / "m.safetensors"
    Masks({"w": torch.tensor([1, 1, 1, 0, 0, 0, 0]).bool()}).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("bad", "expected", "good"),
    [
        ({**RREG}, "pruning.mask_file=", {"pruning.moment": "init"}),
        ({**PLAN, "levels.start": 0.2}, "pruning.mask_file=", PLAN),
        (
            {**INIT, "pruning.density": 0.6},
            "pruning.density: 0.6 is above 0.428571",
            {**INIT, "pruning.density": 0.42858},
        ),
        (
            {"levels.densities": [0.6, 0.1]},
            "levels.densities: 0.6 is above 0.428571",
            {"levels.densities": [0.4286, 0.1]},
        ),
        (
            {"pruning.moment": "oneshot", "pruning.density": 0.4286},
            "pruning.density: 0.4286 is not below 0.428571",
            {"pruning.moment": "oneshot", "pruning.density": 0.1},
        ),
        ({"pruning.moment": "init", "pruning.criterion": "snip"}, "pruning.criterion=snip: has no effect", SNIP),
        ({"pruning.moment": "init", "pruning.allocation": "erk"}, "pruning.allocation=erk: has no effect", INIT),
        (
            {"pruning.moment": "init", "pruning.control": "invert"},
            "pruning.control=invert: has no effect",
            {"pruning.moment": "init", "pruning.control": "reinitialise"},
        ),
        ({"pruning.moment": "early"}, "pruning.moment=early: prunes nothing at density 0.428571", EARLY),
        ({"pruning.moment": "init", "dynamic.method": "gmp"}, "dynamic.method=gmp: density 0.428571 is not", GMP),
        (
            {**GMP, "pruning.density": 0.6},
            "pruning.density: 0.6 is above",
            {"pruning.moment": "init", "dynamic.method": "set"},
        ),
    ],
)
def test_rules_about_a_mask_file(bad: dict[str, Any], expected: str, good: dict[str, Any], half: str) -> None:
    assert refused({**bad, "pruning.mask_file": half}).startswith(expected)
    build({**good, "pruning.mask_file": half})


def test_lists_of_criteria_agree_with_the_criteria() -> None:
    """The rules name criteria by what these are declared to do, for they are made without importing them."""
    known = declared("criterion")
    traits = {name: traits_of(name) for name in known}
    assert set(method_checks.DATA_FREE) == {name for name, t in traits.items() if t["reads"] == "nothing"}
    assert set(method_checks.ONE_ROUND) == {name for name, t in traits.items() if t["rounds"] == 1}
    assert set(method_checks.ONE_SCORING) <= set(method_checks.ONE_ROUND)


def test_tools_that_train_nothing_are_not_told_of_levels() -> None:
    build({"pruning.density": 0.5, "dynamic.method": "rigl", "pruning.moment": "step"}, plan=False)
    with pytest.raises(ParamError, match=r"pruning\.rounds=3: has no effect"):
        build({"pruning.density": 0.5, "pruning.rounds": 3}, plan=False)
    # The criterion of level 0 is no concern of theirs.
    with pytest.raises(ParamError, match=r"pruning\.batches=2: has no effect"):
        build({"levels.start": 0.5, "levels.start_criterion": "snip", "pruning.batches": 2}, plan=False)
