"""Run names: golden hashes, what they depend on, and the defaults they rest on.

When a test here fails:
- a new field:        add its default to DEFAULTS. No hash may change, so VERSION stays.
- a changed default:  change it in DEFAULTS, raise VERSION, and write the new hashes into GOLDEN.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import yaml

from utils.params import Levels, Optimizer, Params, Step, Training
from utils.params.catalog import Key, assemble, keys
from utils.params.identity import VERSION, run_id
from utils.params.load import build
from utils.params.parsing import dump

GOLDEN_VERSION = 2

DEFAULTS = """
run: {root: runs, name: sieve, seed: 0, plan: false, device: auto, deterministic: false, threads: auto,
      checkpoint_epochs: none, checkpoint_minutes: 10.0, keep: last, array: false, seeds: [], where: false}
model: {name: cifar/resnet20, pretrained: ''}
data:
  {name: cifar10, root: data, betons: auto, loader: ffcv, download: true, val: 0.1, subset: none, split_seed: 0,
   order_seed: auto, workers: auto, image_size: auto, eval_size: auto, augment: auto, pad: 4, flip: auto, cutout: 0,
   randaugment: 0, randaugment_magnitude: 9, mixup: 0.0, cutmix: 0.0, resize: ffcv, progressive_size: none,
   progressive_epochs: [0.0, 0.8], max_resolution: auto, jpeg_quality: 90, write_mode: auto, compress_probability: 0.5,
   os_cache: true}
training:
  {epochs: 10, batch_size: 128, accumulation: 1, eval_batch_size: auto, precision: auto, channels_last: true,
   compile: false, clip: none, label_smoothing: 0.0, ema: none, test_flip: false, eval_every: 1, gradient_norms: 0,
   check_every: 50}
optimizer:
  {name: sgd, lr: 0.1, momentum: 0.9, nesterov: false, betas: [0.9, 0.999], eps: 1.0e-08, weight_decay: 0.0005,
   decay_norms_and_biases: true, decay_depthwise: true}
schedule:
  {name: cosine, warmup: 0it, warmup_start: 0.0, milestones: [], gamma: 0.1, start: 0.2, peak: 0.2, cooldown: 0.2,
   final: 0.0}
pruning:
  {criterion: magnitude, criterion_options: [], normalize: none, allocation: global, from_mask: none, density: none,
   pattern: weight, group_score: mean, rounds: auto, round_schedule: auto, regrow: false, moment: levels, step: none,
   exclude: [], layer_densities: [], first_layer: prune, last_layer: prune, min_kept: 0, mask_file: none,
   samples_per_class: auto, batches: none, batch_size: 128, control: none, allow_disconnected: false}
structured:
  {budget: none, keep: [], criterion: l1, scope: global, rounds: 1, exclude: [], coupled: true, min_width: 1,
   round_to: 1, fresh: false, scratch: e, expansion: none, multiplier: 1.0, gate_epochs: 10, gate_lr: 0.01,
   gate_target: 0.2, gate_penalty: 0.5, tock_epochs: 10, tock_penalty: 0.001}
graph: {kind: none, degree: none, side: in, form: simple, tries: 100}
early: {trigger: weight_distance, threshold: auto, window: 5, latest: auto, length: published}
dynamic:
  {method: none, every: 100, start: 0it, until: 0.75, fraction: 0.3, decay: cosine, initial_density: 1.0}
recipe.soft: {kind: none, beta: 1.0, beta_end: 20.0, hold: 0it, end: auto, shape: exponential, keep: false}
recipe.ghost: {kind: none, alpha: 1.0, hold: 0it, end: auto, shape: linear, exclude: []}
recipe.smoothing: {schedule: none, amount: 0.1, final: 0.0, convention: torch, hold: 0it, end: auto}
recipe.rescale:
  {method: none, iterations: 390, lr: 0.001, eta: 0.1, gamma: none, normalize_grad: false, min_scale: 0.01, clip: 1.0,
   overlap: true, batch_size: 128, batches: 32}
levels:
  {spacing: geometric, rate: 0.2, target: none, count: none, densities: [], start: none, start_criterion: none,
   start_allocation: none, rewind: lrr, rewind_step: none,
   rewind_optimizer: false, rewind_schedule: continue, epochs: [], finetune_lr: auto, wait: 0.0,
   only: none}
distributed:
  {backend: auto, timeout: 600.0, find_unused_parameters: false, sync_batchnorm: false, reduction: auto,
   packed_below: 0.5}
"""

UNHASHED = {
    "run.root", "run.plan", "data.betons", "data.download", "data.workers", "data.os_cache", "training.compile",
    "training.check_every", "training.gradient_norms", "levels.only", "run.checkpoint_epochs",
    "run.checkpoint_minutes", "run.keep", "run.array", "run.seeds", "run.where",
    "levels.wait", "distributed.backend", "distributed.timeout", "distributed.reduction", "distributed.packed_below",
}  # fmt: skip

GOLDEN: list[tuple[dict[str, Any], str]] = [
    ({"levels.count": 1}, "sieve-ff24e4d6f8"),
    ({"levels.count": 25, "run.name": "lrr"}, "lrr-319479f8e6"),
    ({"levels.target": 0.1, "run.seed": 1}, "sieve-e62ebc0539"),
    ({"levels.count": 5, "optimizer.lr": 0.2}, "sieve-3f85b9da8b"),
    ({"levels.densities": [0.5, 0.2]}, "sieve-1edcb0ed20"),
    ({"levels.count": 5, "levels.spacing": "linear", "levels.target": 0.1}, "sieve-a25bc1d5bd"),
    (
        {"pruning.moment": "init", "pruning.density": 0.05, "pruning.criterion": "random", "pruning.allocation": "erk"},
        "sieve-d522191daf",
    ),
    ({"levels.count": 5, "levels.rewind": "wr", "levels.rewind_step": "2ep50it"}, "sieve-7a928c42c2"),
    ({"levels.count": 5, "schedule.name": "step", "schedule.milestones": ["3ep", "500it"]}, "sieve-60d56bd41f"),
    ({"levels.count": 5, "pruning.exclude": ["conv1.*", "fc.*"], "training.clip": 1}, "sieve-45d410d688"),
    (
        {
            "levels.count": 5,
            "data.val": 0,
            "data.flip": "no",
            "data.subset": 1000,
            "model.name": "timm/deit_tiny_patch16_224",
        },
        "sieve-cbf9d0ce1e",
    ),
]


def named(**values: Any) -> str:
    return run_id(build([{"levels.count": 5}, {key.replace("__", "."): value for key, value in values.items()}]))


def test_defaults_change_only_with_the_version() -> None:
    assert VERSION == GOLDEN_VERSION
    assert dump(Params()) == yaml.safe_load(DEFAULTS)


def test_only_these_keys_leave_the_name_alone() -> None:
    assert {dotted for dotted, key in keys().items() if not key.meta.hashed} == UNHASHED


@pytest.mark.parametrize(("values", "name"), GOLDEN)
def test_golden_names(values: dict[str, Any], name: str) -> None:
    assert run_id(build(values)) == name


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"levels.count": 7}, '{"fields":{},"version":2}'),
        (
            {"levels.densities": ["1", "0.25"], "optimizer.lr": "2e-1", "levels.rewind": "imp"},
            '{"fields":{"levels.densities":[1.0,0.25],"levels.rewind":"imp","optimizer.lr":0.2},"version":2}',
        ),
        (
            {"levels.count": 3, "schedule.warmup": "1ep2it", "data.flip": "no", "training.ema": 0.5},
            '{"fields":{"data.flip":false,"schedule.warmup":"1ep2it","training.ema":0.5},"version":2}',
        ),
    ],
)
def test_the_hash_is_sha256_of_canonical_json(values: dict[str, Any], text: str) -> None:
    assert run_id(build(values)) == "sieve-" + hashlib.sha256(text.encode()).hexdigest()[:10]


def test_one_spelling_per_value() -> None:
    assert named(optimizer__lr="2e-1") == named(optimizer__lr="0.20") == named(optimizer__lr=0.2)
    assert named(optimizer__lr="1e-1") == named(optimizer__lr=0.1) == named()
    assert named(training__clip=1) == named(training__clip="1.0")
    assert named(data__val="-0.0") == named(data__val=0)
    assert named(data__flip="auto") == named(data__flip=None) == named()
    assert named(data__flip="false") != named()
    assert named(levels__rewind="wr", levels__rewind_step="0ep5it") == named(
        levels__rewind="wr", levels__rewind_step="5it"
    )
    # Built in Python, without the parser: an int in a float field is the same number.
    direct = Params(optimizer=Optimizer(lr=1), training=Training(clip=1), levels=Levels(count=5))
    assert run_id(direct) == named(optimizer__lr=1.0, training__clip=1.0)


def test_what_is_not_hashed_leaves_the_name_alone() -> None:
    changed = {
        "run.root": "/elsewhere",
        "data.workers": 3,
        "training.compile": True,
        "levels.only": 2,
        "run.plan": True,
    }
    assert run_id(build([{"levels.count": 5}, changed])) == named()


def test_a_geometric_plan_can_be_extended() -> None:
    assert named(levels__count=9) == named() == named(levels__target=0.1)
    assert named(levels__rate=0.3) != named()


def test_other_plans_cannot() -> None:
    linear = {"levels.spacing": "linear", "levels.target": 0.1}
    assert run_id(build({**linear, "levels.count": 3})) != run_id(build({**linear, "levels.count": 4}))
    assert run_id(build({"levels.densities": [0.5]})) != run_id(build({"levels.densities": [0.5, 0.2]}))
    init = {"pruning.moment": "init"}
    assert run_id(build({**init, "pruning.density": 0.1})) != run_id(build({**init, "pruning.density": 0.2}))


def another(key: Key) -> Any:
    """A legal value of `key` that is not its default."""
    kinds = {"criterion": "random", "allocation": "erk", "model": "timm/x", "dataset": "svhn", "optimizer": "adamw"}
    if key.meta.choices:
        value: Any = next(choice for choice in key.meta.choices if choice != key.default)
    elif key.meta.kind:
        more = {
            "schedule": "constant",
            "channel_criterion": "snap",
            "graph": "rreg",
            "trigger": "early_bird",
            "dynamic": "rigl",
        }
        value = {**kinds, **more}[key.meta.kind]
    elif key.type is bool:
        value = not key.default
    else:
        value = {int: 7, float: 0.123, str: "other", Step: Step(3)}[key.type]
    return (value,) if key.sequence else value


def test_every_hashed_key_changes_the_name() -> None:
    extended = UNHASHED | {"levels.count", "levels.target"}
    hashed = [dotted for dotted in keys() if dotted not in extended]
    names = {dotted: run_id(assemble({dotted: another(keys()[dotted])})).rpartition("-")[2] for dotted in hashed}
    plain = run_id(Params()).rpartition("-")[2]
    assert plain not in names.values()
    assert len(set(names.values())) == len(hashed)
    for dotted in extended:
        assert run_id(assemble({dotted: another(keys()[dotted])})) == run_id(Params())
