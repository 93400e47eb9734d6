"""Masks that change in training, through the trainer: enforced after every step, and RigL's growth worked out apart."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils import sparsity
from utils.masks import Masks, prunable_parameters
from utils.params.dynamic import Dynamic
from utils.params.load import build as parameters
from utils.pruning.dynamic import MaskUpdates, build
from utils.sparsity import Sparsity
from utils.system.console import Console
from utils.system.distributed import World
from utils.tasks.classification import ImageClassification
from utils.training.averaging import ExponentialAverage
from utils.training.extension import Extension
from utils.training.trainer import Stage, Trainer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 7), nn.Linear(7, 3)
    )


def random_masks(model: nn.Module, seed: int = 1) -> Masks:
    """Another density in every layer; the last layer is dense."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in prunable_parameters(model).items():
        share = float(torch.rand((), generator=generator)) * 0.6 + 0.2
        found[name] = torch.rand(p.shape, generator=generator) < share
    found["5.weight"] = torch.ones(3, 7, dtype=torch.bool)
    return Masks(found)


def made(
    method: str,
    model: nn.Module,
    masks: Masks,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    total: int,
    prune: object = None,
    density: float | None = None,
    **section: object,
) -> tuple[MaskUpdates, Sparsity, list[Extension]]:
    held = sparsity.attach(model, optimizer, masks)
    extensions: list[Extension] = []
    values = {"method": method, "every": 10, **section}
    built = build(
        Dynamic(**values),
        total_steps=total,
        steps_per_epoch=10,
        model=model,
        sparsity=held,
        extensions=extensions,
        seed=0,
        density=density,
        prune=prune,
    )
    extensions.append(built)
    return built, held, extensions


def by_magnitude(model: nn.Module, asked: list[float]):
    """Keeps the largest weights of the whole network, by one sort."""

    def prune(density: float, masks: Masks) -> Masks:
        assert torch.is_grad_enabled(), "criteria differentiate"
        asked.append(density)
        keep = math.floor(density * masks.total + 0.5)
        named = prunable_parameters(model)
        flat = torch.cat([named[n].detach().abs().masked_fill(~masks[n], -1.0).flatten() for n in masks])
        order = flat.argsort(descending=True)[:keep]
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[order] = True
        parts = chosen.split([masks[n].numel() for n in masks])
        return Masks({n: part.view(masks[n].shape) for n, part in zip(masks, parts, strict=True)})

    return prune


class Batches:
    """A loader of fixed batches."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(6, 3, 4, 4, generator=generator), torch.randint(3, (6,), generator=generator))
            for _ in range(count)
        ]

    def set_epoch(self, level: int, epoch: int, start_batch: int = 0, size: int | None = None) -> None:
        self.start = start_batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches[getattr(self, "start", 0) :])


class Checking(Extension):
    """After every step: nothing pruned is alive, in weights, optimizer state or average; keeps masks and weights."""

    def __init__(self, model: nn.Module, held: Sparsity, average: ExponentialAverage) -> None:
        self.model, self.held, self.average = model, held, average
        self.masks: list[Masks] = []
        self.weights: list[torch.Tensor] = []

    def after_step(self, step: int) -> None:
        assert self.held.violations() == []
        averaged = self.average.state()
        for name, mask in self.held.masks.items():
            assert not averaged[f"average.{name}"][~mask].any()
        self.masks.append(self.held.masks)
        self.weights.append(self.model[4].weight.detach().clone())


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1e-2)


def trainer_of(model: nn.Module, accumulation: int, clip: str, precision: str = "float32") -> Trainer:
    batches = Batches(20 * accumulation)
    keys = {"precision": precision, "batch_size": 6 * accumulation, "accumulation": accumulation, "clip": clip}
    params = parameters({"levels.count": 1, **{f"training.{key}": value for key, value in keys.items()}})
    spec = SimpleNamespace(image_size=4, size_at=lambda progress: None)
    loaders = SimpleNamespace(train=batches, val=None, test=Batches(1), spec=spec)
    place = {"seed": 0, "world": World(), "device": torch.device("cpu"), "console": Console(False)}
    return Trainer(model, ImageClassification(3), loaders, params.training, params.distributed, **place)


@pytest.mark.parametrize("method", ["gmp", "rigl", "set"])
@pytest.mark.parametrize(
    ("kind", "accumulation", "clip", "precision"),
    [("sgd", 1, "none", "float32"), ("adamw", 2, "0.1", "float32"), ("sgd", 2, "0.5", "float16")],
)
def test_masks_hold_after_every_step_of_a_training(
    method: str, kind: str, accumulation: int, clip: str, precision: str
) -> None:
    model = network()
    optimizer = optimizer_of(kind, model)
    masks = Masks.dense(model) if method == "gmp" else random_masks(model)
    options = {"total": 40, "every": 5, "density": 0.2, "prune": by_magnitude(model, [])}
    _, held, extensions = made(method, model, masks, optimizer, **options)
    average = ExponentialAverage(model, 0.9)
    average.masks_changed(masks)
    checking = Checking(model, held, average)
    extensions += [average, checking]
    here = trainer_of(model, accumulation, clip, precision)
    rows = here.fit(Stage(0, 2, lambda step: 0.05), optimizer, held, extensions)
    changes = [s for s in range(1, 40) if checking.masks[s] != checking.masks[s - 1]]
    assert set(changes) <= {5, 10, 15, 20, 25}
    assert {5, 10, 15} <= set(changes)
    assert [row["mask_updates"] for row in rows] == [3, 2]
    if method == "gmp":
        assert held.masks.kept == math.floor(0.2 * masks.total + 0.5)
        assert [row["density"] for row in rows] == [checking.masks[19].density, checking.masks[39].density]
    else:
        assert all(m.counts == masks.counts for m in checking.masks)
        regrown = [sum(int((b[n] & ~a[n]).sum()) for n in b) for a, b in zip(checking.masks, checking.masks[1:])]  # noqa: B905
        assert [row["regrown"] for row in rows] == [sum(regrown[:19]), sum(regrown[19:])]
    for step in (5, 10, 15, 20, 25):  # an update moves no weight that stays
        stayed = checking.masks[step]["4.weight"] & checking.masks[step - 1]["4.weight"]
        assert torch.equal(checking.weights[step][stayed], checking.weights[step - 1][stayed])


def test_rigl_grows_by_the_gradient_of_the_batch_in_a_training() -> None:
    """The first update by hand: ten plain masked steps, one plain gradient, two sorts."""
    model, twin = network(), network()
    masks = random_masks(model)
    optimizer = optimizer_of("sgd", model)
    _, held, extensions = made("rigl", model, masks, optimizer, total=20, every=10, fraction=0.4)
    trainer_of(model, 1, "none").fit(Stage(0, 1, lambda step: 0.05), optimizer, held, extensions)
    plain = optimizer_of("sgd", twin)
    masks.apply_(twin)
    batches = Batches(20).batches
    for step, (images, labels) in enumerate(batches[:11]):
        plain.zero_grad()
        nn.functional.cross_entropy(twin(images), labels).backward()
        if step == 10:
            break
        for name, mask in masks.items():
            twin.get_parameter(name).grad[~mask] = 0
        plain.param_groups[0]["lr"] = 0.05
        plain.step()
    for name in ("0.weight", "4.weight"):
        p = twin.get_parameter(name)
        live = masks[name].flatten().nonzero().flatten().tolist()
        count = int(0.2 * (1 + math.cos(math.pi * 10 / 15)) * len(live))
        sizes, slopes = p.detach().abs().flatten().tolist(), p.grad.abs().flatten().tolist()
        kept = sorted(live, key=lambda i: sizes[i])[count:]
        free = sorted(set(range(p.numel())) - set(kept), key=lambda i: -slopes[i])
        assert sorted(kept + free[:count]) == held.masks[name].flatten().nonzero().flatten().tolist()
        assert count > 1
