"""Contradictions between keys: every rule fires on its case and names the key; neighbouring good cases pass."""

from __future__ import annotations

from typing import Any

import pytest

from utils.params.checks import check_ranks
from utils.params.load import build
from utils.system.errors import ParamError

PLAN: dict[str, Any] = {"levels.count": 3}
INIT: dict[str, Any] = {"pruning.moment": "init", "pruning.density": 0.1}
STEP: dict[str, Any] = {**PLAN, "schedule.name": "step"}

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "levels: nothing says where the plan ends"),
    ({**PLAN, "training.batch_size": 100, "training.accumulation": 3}, "training.batch_size=100"),
    # densities
    ({"levels.densities": [0.5], "levels.target": 0.1}, "levels.target=0.1: contradicts levels.densities"),
    ({"levels.densities": [0.5], "levels.count": 2}, "levels.count=2: contradicts levels.densities"),
    ({"levels.densities": [0.5], "levels.rate": 0.3}, "levels.rate=0.3: contradicts levels.densities"),
    ({"levels.densities": [0.5], "levels.spacing": "linear"}, "levels.spacing=linear: contradicts"),
    ({**INIT, "levels.densities": [0.5]}, "pruning.density=0.1: contradicts levels.densities"),
    ({"levels.densities": [0.5, 0.6]}, "levels.densities: 0.6 after 0.5"),
    ({"levels.densities": [0.5, 0.5]}, "levels.densities: 0.5 after 0.5"),
    ({"pruning.moment": "init", "levels.densities": [0.5, 0.2, 0.5]}, "levels.densities: 0.5 is listed twice"),
    # moments
    ({**PLAN, "pruning.density": 0.1}, "pruning.density=0.1: has no effect with pruning.moment=levels"),
    ({"pruning.moment": "init"}, "pruning.density: not set"),
    ({"pruning.moment": "oneshot"}, "pruning.density: not set"),
    ({**INIT, "levels.count": 3}, "levels.count=3: has no effect with pruning.moment=init"),
    ({**INIT, "levels.target": 0.1}, "levels.target=0.1: has no effect"),
    ({**INIT, "levels.rate": 0.3}, "levels.rate=0.3: has no effect"),
    ({**INIT, "levels.spacing": "linear"}, "levels.spacing=linear: has no effect"),
    ({**INIT, "levels.rewind": "wr", "levels.rewind_step": "1it"}, "levels.rewind=wr"),
    ({**INIT, "levels.rewind": "none"}, "levels.rewind=none"),
    # spacing
    ({"levels.spacing": "linear", "levels.count": 3}, "needs levels.target and levels.count"),
    ({"levels.spacing": "linear", "levels.target": 0.1}, "needs levels.target and levels.count"),
    ({"levels.spacing": "linear", "levels.target": 0.1, "levels.count": 1}, "levels.count=1"),
    (
        {"levels.spacing": "linear", "levels.target": 0.1, "levels.count": 4, "levels.rate": 0.3},
        "levels.rate=0.3: has no effect with levels.spacing=linear",
    ),
    ({"levels.rate": 1e-6, "levels.target": 0.1}, "levels.rate=1e-06"),
    ({**PLAN, "levels.epochs": [1, 2]}, "levels.epochs: 2 numbers for 3 levels"),
    ({**PLAN, "levels.only": 3}, "levels.only=3: the plan has levels 0 to 2"),
    # rewinding
    ({**PLAN, "levels.rewind": "wr"}, "levels.rewind_step: not set"),
    ({**PLAN, "levels.rewind_step": "1it"}, "levels.rewind_step=1it: has no effect with levels.rewind=lrr"),
    ({**PLAN, "levels.rewind": "imp", "levels.rewind_optimizer": True}, "levels.rewind_optimizer=true"),
    ({**PLAN, "levels.rewind_schedule": "restart"}, "levels.rewind_schedule=restart"),
    ({**PLAN, "levels.finetune_lr": 0.1}, "levels.finetune_lr=0.1: has no effect with levels.rewind=lrr"),
    ({**PLAN, "levels.rewind": "wr", "levels.rewind_step": "10ep"}, "levels.rewind_step=10ep"),
    ({**PLAN, "levels.rewind": "wr", "levels.rewind_step": "11ep3it"}, "levels.rewind_step=11ep3it"),
    (
        {**PLAN, "levels.rewind": "wr", "levels.rewind_step": "2ep", "levels.epochs": [9, 2, 9]},
        "levels.rewind_step=2ep: levels train 2 epochs",
    ),
    # schedule and optimizer
    ({**PLAN, "schedule.milestones": ["1ep"]}, "schedule.milestones=1ep: has no effect with schedule.name=cosine"),
    ({**PLAN, "schedule.gamma": 0.5}, "schedule.gamma=0.5: has no effect"),
    ({**PLAN, "schedule.start": 0.5}, "schedule.start=0.5: has no effect"),
    ({**PLAN, "schedule.peak": 0.5}, "schedule.peak=0.5: has no effect"),
    ({**PLAN, "schedule.cooldown": 0.5}, "schedule.cooldown=0.5: has no effect"),
    ({**PLAN, "schedule.name": "constant", "schedule.final": 0.5}, "schedule.final=0.5: has no effect"),
    ({**PLAN, "schedule.warmup_start": 0.1}, "schedule.warmup_start: has no effect without schedule.warmup"),
    (STEP, "schedule.milestones: empty"),
    ({**STEP, "schedule.milestones": ["3ep", "2ep"]}, "schedule.milestones: 2ep does not come after 3ep"),
    ({**STEP, "schedule.milestones": ["3ep", "3ep"]}, "schedule.milestones: 3ep does not come after 3ep"),
    ({**STEP, "schedule.milestones": ["2ep"], "schedule.warmup": "3ep"}, "2ep lies within schedule.warmup=3ep"),
    ({**PLAN, "schedule.warmup": "11ep"}, "schedule.warmup=11ep: longer than a level of 10 epochs"),
    ({**PLAN, "schedule.warmup": "3ep", "levels.epochs": [9, 2, 9]}, "schedule.warmup=3ep: longer than a level of 2"),
    (
        {**PLAN, "schedule.name": "trapezoidal", "schedule.warmup": "6ep", "schedule.cooldown": 0.5},
        "schedule.cooldown=0.5: with schedule.warmup=6ep",
    ),
    ({**PLAN, "optimizer.nesterov": True, "optimizer.momentum": 0}, "optimizer.nesterov=true: needs momentum"),
    ({**PLAN, "optimizer.nesterov": True, "optimizer.name": "adamw"}, "optimizer.nesterov=true: has no effect"),
    ({**PLAN, "optimizer.momentum": 0.5, "optimizer.name": "adam"}, "optimizer.momentum=0.5: has no effect"),
    ({**PLAN, "optimizer.momentum": 0, "optimizer.name": "adamw"}, "optimizer.momentum=0.0: has no effect"),
    ({**PLAN, "optimizer.betas": [0.5, 0.9]}, "optimizer.betas=0.5,0.9: has no effect with optimizer.name=sgd"),
    ({**PLAN, "optimizer.eps": 1e-6}, "optimizer.eps=1e-06: has no effect with optimizer.name=sgd"),
    ({**PLAN, "optimizer.name": "adamw", "optimizer.betas": [0.5]}, "optimizer.betas: 1 numbers"),
    ({**PLAN, "optimizer.name": "adamw", "optimizer.betas": [0.5, 0.5, 0.5]}, "optimizer.betas: 3 numbers"),
    ({**PLAN, "distributed.backend": "nccl", "run.device": "cpu"}, "distributed.backend=nccl"),
    ({**PLAN, "distributed.sync_batchnorm": True, "run.device": "cpu"}, "distributed.sync_batchnorm=true"),
    (
        {**PLAN, "distributed.reduction": "dense", "distributed.packed_below": 0.2},
        "distributed.packed_below=0.2: has no effect with distributed.reduction=dense",
    ),
    # data
    ({**PLAN, "data.randaugment": 2}, "data.randaugment=2: has no effect with data.loader=ffcv"),
    ({**PLAN, "data.randaugment_magnitude": 5}, "data.randaugment_magnitude"),
    ({**PLAN, "data.loader": "device", "data.resize": "area"}, "data.resize=area: has no effect with data.loader=devi"),
    ({**PLAN, "data.loader": "device", "data.progressive_size": 16}, "data.progressive_size=16: has no effect"),
    ({**PLAN, "data.progressive_size": 100}, "data.progressive_size=100"),
    ({**PLAN, "data.progressive_size": 160, "data.image_size": 128}, "data.progressive_size=160"),
    ({**PLAN, "data.progressive_epochs": [0, 0.5]}, "data.progressive_epochs: has no effect"),
    ({**PLAN, "data.progressive_size": 160, "data.progressive_epochs": [0.5]}, "data.progressive_epochs"),
    ({**PLAN, "data.progressive_size": 160, "data.progressive_epochs": [0.9, 0.1]}, "data.progressive_epochs"),
    ({**PLAN, "data.pad": 2, "data.augment": "none"}, "data.pad=2: has no effect with data.augment=none"),
    ({**PLAN, "data.pad": 2, "data.augment": "rrc"}, "data.pad=2: has no effect with data.augment=rrc"),
    ({**PLAN, "data.pad": 32, "data.augment": "crop", "data.image_size": 32}, "data.pad=32: can crop nothing but pad"),
    ({**PLAN, "data.augment": "crop", "data.image_size": 4}, "data.pad=4: can crop nothing but padding"),
    ({**PLAN, "data.cutout": 64, "data.image_size": 32}, "data.cutout=64: always covers the whole image"),
    (
        {**PLAN, "data.jpeg_quality": 80, "data.loader": "device"},
        "data.jpeg_quality=80: has no effect with data.loader",
    ),
    ({**PLAN, "data.write_mode": "jpg", "data.loader": "torchvision"}, "data.write_mode=jpg: has no effect with"),
    ({**PLAN, "data.max_resolution": 64, "data.loader": "device"}, "data.max_resolution=64: has no effect with"),
    (
        {**PLAN, "data.write_mode": "proportion", "data.compress_probability": 0.1, "data.loader": "device"},
        "data.write_mode=proportion: has no effect with data.loader=device",
    ),
    (
        {**PLAN, "data.jpeg_quality": 80, "data.write_mode": "raw"},
        "data.jpeg_quality=80: has no effect with data.write",
    ),
    (
        {**PLAN, "data.compress_probability": 0.1, "data.write_mode": "raw"},
        "data.compress_probability=0.1: has no effect with data.write_mode=raw; drop it (default 0.5) or set",
    ),
    ({**PLAN, "data.compress_probability": 0.1, "data.write_mode": "jpg"}, "data.compress_probability=0.1: has no eff"),
    (
        {**PLAN, "data.compress_probability": 0.1},
        "data.compress_probability=0.1: has no effect with data.write_mode=auto",
    ),
    ({**PLAN, "pruning.samples_per_class": 2}, "pruning.samples_per_class=2: has no effect with pruning.criterion=mag"),
    ({**PLAN, "data.subset": 100}, "data.subset=100: fewer images than training.batch_size=128"),
    ({**PLAN, "data.root": " "}, "data.root: empty"),
    # names
    ({**PLAN, "run.root": ""}, "run.root: empty"),
    ({**PLAN, "run.name": ""}, "run.name: ''"),
    ({**PLAN, "run.name": "a b"}, "run.name: 'a b'"),
    ({**PLAN, "run.name": "../up"}, "run.name: '../up'"),
    ({**PLAN, "run.name": ".."}, "run.name: '..'"),
    ({**PLAN, "run.name": "-x"}, "run.name: '-x'"),
    ({**PLAN, "run.name": "ä"}, "run.name: 'ä'"),
    ({**PLAN, "run.name": "x" * 101}, "run.name: "),
    # explicit layer densities
    ({**PLAN, "pruning.layer_densities": ["fc"]}, "pruning.layer_densities: 'fc'"),
    ({**PLAN, "pruning.layer_densities": ["=0.5"]}, "pruning.layer_densities: '=0.5'"),
    ({**PLAN, "pruning.layer_densities": ["fc=x"]}, "pruning.layer_densities: 'fc=x'"),
    ({**PLAN, "pruning.layer_densities": ["fc=1.1"]}, "pruning.layer_densities: 'fc=1.1'"),
    ({**PLAN, "pruning.layer_densities": ["fc=nan"]}, "pruning.layer_densities: 'fc=nan'"),
    ({**PLAN, "pruning.layer_densities": ["fc=0.5", "fc=0.4"]}, "pruning.layer_densities: 'fc' is given twice"),
]

GOOD: list[dict[str, Any]] = [
    PLAN,
    {"levels.target": 0.1},
    {**PLAN, "optimizer.momentum": 0, "run.device": "cpu", "schedule.warmup": "10ep"},
    {**PLAN, "optimizer.nesterov": True, "distributed.backend": "nccl"},
    {"levels.densities": [1.0, 0.5, 0.2], "levels.epochs": [3, 2, 1]},
    {"levels.densities": [0.5, 0.2], "levels.epochs": [3, 2, 1]},
    INIT,
    {**INIT, "levels.rewind": "imp"},
    {"pruning.moment": "init", "levels.densities": [0.1, 1.0, 0.5]},
    {"pruning.moment": "oneshot", "pruning.density": 0.1, "levels.rewind": "none", "levels.finetune_lr": 0.1},
    {"levels.spacing": "linear", "levels.target": 0.1, "levels.count": 4},
    {**PLAN, "levels.only": 2},
    {**PLAN, "levels.rewind": "wr", "levels.rewind_step": "9ep999it", "levels.rewind_schedule": "restart"},
    {**PLAN, "levels.rewind": "wr", "levels.rewind_step": "999999it", "levels.rewind_optimizer": True},
    {**STEP, "schedule.milestones": ["3ep", "999999it", "4ep"], "schedule.gamma": 0.5},
    {**STEP, "schedule.milestones": ["3ep"], "schedule.warmup": "3ep", "schedule.warmup_start": 0.1},
    {**PLAN, "schedule.name": "trapezoidal", "schedule.warmup": "5ep", "schedule.cooldown": 0.5},
    {**PLAN, "schedule.name": "triangular", "schedule.start": 0.1, "schedule.peak": 0.5, "schedule.final": 0.1},
    {**PLAN, "levels.rewind": "none", "levels.epochs": [10, 1, 1], "schedule.warmup": "5ep"},
    {**PLAN, "training.batch_size": 100, "training.accumulation": 4},
    {**PLAN, "optimizer.name": "adamw", "optimizer.betas": [0.5, 0.9], "optimizer.eps": 1e-6},
    {**PLAN, "optimizer.momentum": 0.5},
    {**PLAN, "optimizer.momentum": 0.9, "optimizer.name": "adamw"},
    {**PLAN, "training.epochs": 3, "levels.epochs": [9, 2, 9]},
    {**PLAN, "data.pad": 2, "data.augment": "crop", "data.image_size": 3},
    {**PLAN, "data.pad": 2},
    {**PLAN, "data.pad": 40, "data.image_size": 32},
    {**PLAN, "data.cutout": 63, "data.image_size": 32},
    {**PLAN, "data.cutout": 500},
    {**PLAN, "data.image_size": 4},
    {**PLAN, "data.jpeg_quality": 80, "data.max_resolution": 64, "data.write_mode": "jpg"},
    {**PLAN, "data.jpeg_quality": 80},
    {**PLAN, "data.jpeg_quality": 80, "data.write_mode": "proportion", "data.compress_probability": 0.1},
    {**PLAN, "data.loader": "torchvision", "data.randaugment": 2, "data.randaugment_magnitude": 5},
    {**PLAN, "data.progressive_size": 160, "data.progressive_epochs": [0.1, 0.1], "data.image_size": 160},
    {**PLAN, "pruning.layer_densities": ["fc.*=0", "layer[12]*=1", "a=b=0.5"]},
    {**PLAN, "run.name": "A-1_b.c", "data.subset": 128},
]


@pytest.mark.parametrize(("values", "expected"), BAD)
def test_contradictions_are_one_line_that_names_the_key(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ParamError) as caught:
        build(values)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("values", GOOD)
def test_what_does_not_contradict_passes(values: dict[str, Any]) -> None:
    build(values)


def test_a_schedule_of_ones_own_may_use_any_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("utils.params.parsing.declared", lambda kind: {"mine": "", "sgd": "", "cosine": ""})
    values = {**PLAN, "schedule.name": "mine", "schedule.gamma": 0.5, "schedule.milestones": ["1ep"]}
    assert build(values).schedule.name == "mine"


def test_a_criterion_that_reads_data_may_be_told_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.params.parsing.declared", lambda kind: {"mine": "", "sgd": "", "cosine": ""})
    values = {**PLAN, "pruning.criterion": "mine", "pruning.samples_per_class": 2}
    assert build(values).pruning.samples_per_class == 2


def test_the_writer_of_beton_files_may_be_told_how_whatever_the_loader_of_the_run() -> None:
    values = {"data.loader": "device", "data.write_mode": "jpg", "data.jpeg_quality": 80, "data.max_resolution": 64}
    assert build(values, plan=False).data.jpeg_quality == 80
    with pytest.raises(ParamError, match=r"data\.jpeg_quality=80: .*data\.write_mode=raw"):
        build({**values, "data.write_mode": "raw"}, plan=False)


def test_tools_that_train_nothing_skip_the_plan_but_not_the_rest() -> None:
    assert build({"pruning.density": 0.1}, plan=False).pruning.density == 0.1
    assert build({"data.name": "svhn"}, plan=False).data.name == "svhn"
    with pytest.raises(ParamError, match=r"run\.name"):
        build({"run.name": ""}, plan=False)


def test_the_global_batch_divides_by_ranks_and_accumulation() -> None:
    params = build({**PLAN, "training.batch_size": 96, "training.accumulation": 4})
    check_ranks(params, 1)
    check_ranks(params, 3)
    with pytest.raises(ParamError, match=r"training\.batch_size=96: .* 5 ranks .*=4; use 80 or 100"):
        check_ranks(params, 5)
    with pytest.raises(ParamError, match=r"use 128$"):
        check_ranks(params, 32)


def test_mixing_needs_two_images_in_a_backward_pass() -> None:
    for key in ("data.mixup", "data.cutmix"):
        params = build({**PLAN, "training.batch_size": 8, key: 0.5})
        check_ranks(params, 4)
        with pytest.raises(ParamError, match="need two"):
            check_ranks(params, 8)
    check_ranks(build({**PLAN, "training.batch_size": 8}), 8)
