"""What only a GPU can show: enforcement, scoring, loaders and whole runs on CUDA. Skipped where there is none."""

from __future__ import annotations

import copy
import csv
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils import masks as masks_module
from utils import models
from utils.files import load_weights
from utils.masks import Masks, prunable_parameters
from utils.params.pruning import Pruning
from utils.pruning import prune, select
from utils.pruning.choose import choose
from utils.pruning.harness import _all_equal
from utils.sparsity import attach

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, fused=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-1, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-1, foreach=True),
}

SHAPES = {"stem": (64, 3, 3, 3), "conv": (256, 256, 3, 3), "fc": (1000, 512)}
CHOICES = [Pruning(), Pruning(allocation="erk"), Pruning(min_kept=5), Pruning(pattern="channel")]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every process of the harness starts: convolutions in float32, not in TF32's 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("cifar/resnet20", num_classes=10).cuda().to(memory_format=torch.channels_last)


def random_masks(model: nn.Module, density: float = 0.2) -> Masks:
    generator = torch.Generator().manual_seed(1)
    return Masks({n: torch.rand(p.shape, generator=generator) < density for n, p in prunable_parameters(model).items()})


def batch(number: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images.cuda().to(memory_format=torch.channels_last), torch.randint(10, (size,), generator=generator).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_state_stay_zero(name: str, dtype: torch.dtype) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    masks = random_masks(model)
    held = attach(model, optimizer, Masks.dense(model))
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    parameters = dict(model.named_parameters())
    before = {key: p.detach().clone() for key, p in parameters.items()}
    for step in range(6):
        if step == 2:
            held.set(masks)
        images, labels = batch(step)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for key, mask in masks.items():
        p, pruned = parameters[key], ~mask.cuda()
        state = [v for v in optimizer.state[p].values() if torch.is_tensor(v) and v.shape == p.shape]
        assert state
        for tensor in [p.detach(), *state]:
            assert tensor[pruned].eq(0).all(), key
            assert not torch.signbit(tensor[pruned]).any(), key
        assert not torch.equal(p[~pruned], before[key][~pruned]), key


def test_the_trajectory_is_that_of_a_masked_forward() -> None:
    model = network().eval()  # BatchNorm in train mode magnifies the order of sums
    reference = copy.deepcopy(model)
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    attach(model, optimizer, masks)
    plain = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    on_device = {key: mask.cuda().float() for key, mask in masks.items()}
    own = dict(reference.named_parameters())
    for step in range(5):
        images, labels = batch(step)
        F.cross_entropy(model(images), labels).backward()
        masked = {key: p * on_device[key] if key in on_device else p for key, p in own.items()}
        F.cross_entropy(torch.func.functional_call(reference, masked, (images,)), labels).backward()
        for one in (optimizer, plain):
            one.step()
            one.zero_grad()
    for key, p in model.named_parameters():
        expected = own[key] * on_device[key] if key in on_device else own[key]
        assert float((p.detach() - expected.detach()).norm()) <= 1e-5 * float(expected.detach().norm()) + 1e-7, key


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "grasp", "synflow", "random", "crop"])
def test_scoring_agrees_with_the_cpu_and_leaves_the_model_alone(criterion: str) -> None:
    model = network().to(memory_format=torch.contiguous_format)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = [tuple(t.contiguous() for t in batch(number, 50)) for number in range(2)]
    masks = prune(model, density=0.1, criterion=criterion, batches=data, input_shape=(3, 32, 32))
    total = sum(p.numel() for p in prunable_parameters(model).values())
    assert masks.kept == int(0.1 * total + 0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    on_cpu = prune(
        model.cpu(), density=0.1, criterion=criterion, batches=[(x.cpu(), y.cpu()) for x, y in data],
        input_shape=(3, 32, 32),
    )  # fmt: skip
    assert (masks & on_cpu).kept >= 0.98 * masks.kept
    if criterion in ("magnitude", "random"):
        assert masks.digest == on_cpu.digest


@pytest.mark.parametrize("section", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 4])
def test_chooses_on_the_gpu_what_the_cpu_does(section: Pruning, dtype: torch.dtype, steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    masks = Masks({name: torch.rand(shape, generator=generator) < 0.7 for name, shape in SHAPES.items()})
    scores = {name: torch.rand(mask.shape, generator=generator, dtype=dtype) for name, mask in masks.items()}
    scores = {name: (score * steps).floor() if steps else score for name, score in scores.items()}
    there = choose({name: score.cuda() for name, score in scores.items()}, masks, 0.2, section, seed=0)
    assert there == choose(scores, masks, 0.2, section, seed=0)


@pytest.mark.parametrize("section", CHOICES, ids=str)
def test_chosen_masks_stay_on_the_gpu(section: Pruning, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pool and no floors they never go there from the CPU."""
    generator, gpu = torch.Generator().manual_seed(3), torch.device("cuda", torch.cuda.current_device())
    scores = {name: torch.rand(shape, generator=generator).to(gpu) for name, shape in SHAPES.items()}
    copies = count_copies(monkeypatch)
    masks = Masks({name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()})
    for density in (0.7, 0.5, 0.2):
        masks = choose(scores, masks, density, section, seed=0)
        there = masks.on(gpu)
        assert masks.on(gpu) is there
        for name, mask in masks.items():
            assert mask.device.type == "cpu"
            assert there[name].device == gpu
            assert torch.equal(there[name].cpu(), mask)
            assert there[name].shape == mask.shape == SHAPES[name]
    if section == Pruning():
        assert ("cpu", "cuda") not in copies


def test_synflow_sends_no_masks_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = count_copies(monkeypatch)
    prune(network(), density=0.1, criterion="synflow", rounds=5, input_shape=(3, 32, 32))
    assert copies.count(("cuda", "cpu")) == 5
    assert ("cpu", "cuda") not in copies


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """From where to where masks are copied together from now on."""
    copies: list[tuple[str, str]] = []
    copied = masks_module.copied

    def counted(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        copies.append((next(iter(tensors.values())).device.type, device.type))
        return copied(tensors, device)

    for module in (masks_module, select):
        monkeypatch.setattr(module, "copied", counted)
    return copies


def test_masks_of_gpu_tensors_are_copies() -> None:
    tensors = {name: mask.cuda() for name, mask in random_masks(network()).items()}
    before = {name: tensor.cpu() for name, tensor in tensors.items()}
    masks = Masks(tensors)
    gpu = next(iter(tensors.values())).device
    for tensor in tensors.values():
        tensor.logical_not_()
    assert all(torch.equal(masks[name], mask) and torch.equal(masks.on(gpu)[name].cpu(), mask)
               for name, mask in before.items())  # fmt: skip
    assert masks == Masks(before)
    assert masks.digest == Masks(before).digest
    again = pickle.loads(pickle.dumps(masks))
    assert again == masks == copy.deepcopy(masks)
    assert again._there == {}
    first, *others = before
    mixed = Masks({first: before[first].cuda(), **{name: before[name] for name in others}})
    assert mixed == masks
    model = network()
    masks.apply_(model)
    pruned = dict(model.named_parameters())
    assert all(pruned[name].detach().cpu()[~mask].eq(0).all() for name, mask in before.items())


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_equal_live_scores_are_seen_on_the_gpu(density: float) -> None:
    masks = random_masks(network(), density)
    scores = {name: torch.where(mask, -0.0, 1.0).double().cuda() for name, mask in masks.items()}
    scores[next(iter(scores))].abs_()
    assert _all_equal(scores, masks)
    last = list(scores)[-1]
    scores[last].view(-1)[masks[last].view(-1).nonzero()[0].cuda()] = 1e-300
    assert not _all_equal(scores, masks)


def digits(tmp_path: Path, *more: str, config: str = "configs/quickstart.yaml") -> list[str]:
    return [
        sys.executable, "harness.py", "--config", config, f"--run.root={tmp_path}",
        "--run.device=cuda", f"--data.betons={tmp_path}/betons", *more,
    ]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(tmp_path: Path) -> list[dict[str, str]]:
    (table,) = tmp_path.glob("*/levels.csv")
    return list(csv.DictReader(table.open()))


LEVELS = ("--training.epochs=3", "--levels.count=2")
RUNS = {
    "device": (*LEVELS, "--data.loader=device"),
    "torchvision-fp16": (*LEVELS, "--data.loader=torchvision", "--training.precision=float16"),
    "ffcv-synflow": (*LEVELS, "--data.loader=ffcv", "--pruning.criterion=synflow"),
    "compile-adamw": (*LEVELS, "--data.loader=device", "--training.compile=true", "--optimizer.name=adamw",
                      "--optimizer.lr=0.01"),
    "recipes": (*LEVELS, "--data.loader=device", "--config", "configs/recipe/all.yaml",
                "--recipe.rescale.iterations=10"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*RUNS, "structured"])
def test_a_run_is_done_and_verified(tmp_path: Path, name: str) -> None:
    if name == "structured":
        words = digits(tmp_path, "--data.loader=device", config="configs/quickstart_scratch.yaml")
    else:
        words = digits(tmp_path, *RUNS[name])
    process = start(words)
    text = process.communicate(timeout=280)[0]
    assert process.returncode == 0, text[-3000:]
    assert float(rows(tmp_path)[-1]["final_test_acc"]) > 20
    (run,) = (path.parent for path in tmp_path.glob("*/levels.csv"))
    checked = start([sys.executable, "-m", "utils.reporting", "verify", str(run)])
    text = checked.communicate(timeout=100)[0]
    assert checked.returncode == 0, text[-3000:]


def test_a_deterministic_run_that_was_stopped_ends_as_one_left_alone(tmp_path: Path) -> None:
    more = ("--data.loader=device", "--run.deterministic=true", "--training.epochs=20", "--levels.count=2")
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    left = subprocess.run(digits(alone, *more), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert left.returncode == 0, left.stderr[-3000:]
    process = subprocess.Popen(digits(stopped, *more), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(stopped.glob("*/level_00/epochs.csv")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert not list(stopped.glob("*/level_01/row.json"))
    again = subprocess.run(digits(stopped, *more), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr[-3000:]
    (one,), (other,) = (list(place.glob("*/level_01/weights.safetensors")) for place in (alone, stopped))
    weights, expected = load_weights(other), load_weights(one)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())
