"""GraSP and CroP against an explicit Hessian of finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from utils.masks import Masks
from utils.pruning.criteria import criterion
from utils.pruning.preserve import preserved
from utils.system.errors import UserError

Batch = tuple[Tensor, Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def net(norm: bool = True) -> nn.Sequential:
    """Smooth, in float64, with BatchNorm statistics unlike those of any batch."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 3), nn.Softplus(), nn.Conv2d(3, 3, 2), nn.Tanh()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(3))
        layers[1].running_mean.uniform_(-1, 1)  # type: ignore[operator]
        layers[1].running_var.uniform_(0.5, 2)  # type: ignore[operator]
        nn.init.uniform_(layers[1].weight, 0.5, 2)  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)).double()


def data(*sizes: int, shape: tuple[int, ...] = (2, 5, 5)) -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(sum(sizes)) % 3
    return [(x, y) for x, y in zip(images.split(sizes), labels.split(sizes), strict=True)]


def half(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(5)
    return Masks({n: torch.rand(m.shape, generator=generator) < 0.6 for n, m in Masks.dense(model).items()})


def score(name: str, model: nn.Module, masks: Masks, batches: list[Batch], **options: float) -> dict[str, Tensor]:
    entry = criterion.entry(name)
    with preserved(model, entry.traits["batchnorm"]):
        return entry.value(model, masks, batches, cross_entropy, generator=torch.Generator(), **options)


class Explicit:
    """Gradient and Hessian of the mean loss at logits / T over the masked weights as one vector, by differences."""

    def __init__(self, model: nn.Module, masks: Masks, batches: list[Batch], mode: str, temperature: float) -> None:
        self.model = copy.deepcopy(model).eval()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(mode == "train")
        named = dict(self.model.named_parameters())
        self.weights = [named[name] for name in masks]
        self.theta = torch.cat([w.detach().reshape(-1).clone() for w in self.weights])
        self.mask = torch.cat([mask.reshape(-1) for mask in masks.values()])
        self.batches, self.temperature = batches, temperature

    def gradient(self, vector: Tensor) -> Tensor:
        with torch.no_grad():
            for weight, part in zip(self.weights, vector.split([w.numel() for w in self.weights]), strict=True):
                weight.copy_(part.view_as(weight))
        total = torch.zeros_like(vector)
        for images, labels in self.batches:
            logits = self.model(images) / self.temperature
            summed = functional.cross_entropy(logits, labels, reduction="sum")
            total += torch.cat([g.reshape(-1) for g in torch.autograd.grad(summed, self.weights)])
        return total / sum(len(labels) for _, labels in self.batches)

    def hessian(self, at: Tensor) -> Tensor:
        step, columns = 1e-4, []
        for i in range(at.numel()):
            shift = torch.zeros_like(at)
            shift[i] = step
            columns.append((self.gradient(at + shift) - self.gradient(at - shift)) / (2 * step))
        return torch.stack(columns, 1)


def explicit(name: str, model: nn.Module, masks: Masks, batches: list[Batch], mode: str, t: float) -> dict[str, Tensor]:
    net_ = Explicit(model, masks, batches, mode, t)
    at = net_.theta * net_.mask
    g, h = net_.gradient(at), net_.hessian(at)
    torch.testing.assert_close(h, h.T, rtol=0, atol=1e-6 * float(h.abs().max()))
    flat = net_.theta * (h @ g) if name == "grasp" else (net_.theta * (h @ (g * net_.mask))).abs()
    parts = flat.split([mask.numel() for mask in masks.values()])
    return {key: part.view_as(mask) for (key, mask), part in zip(masks.items(), parts, strict=True)}


CASES = [("grasp", "train", 200.0), ("crop", "eval", 1.0)]


@pytest.mark.parametrize("sizes", [(7,), (5, 2)])
@pytest.mark.parametrize(("name", "mode", "temperature"), CASES)
def test_scores_against_an_explicit_hessian(name: str, mode: str, temperature: float, sizes: tuple[int, ...]) -> None:
    model, batches = net(), data(*sizes)
    masks = half(model)
    found = score(name, model, masks, batches)
    expected = explicit(name, model, masks, batches, mode, temperature)
    wrong = explicit(name, model, masks, batches, {"train": "eval", "eval": "train"}[mode], temperature)
    for layer, score_ in found.items():
        scale = float(expected[layer].abs().max())
        torch.testing.assert_close(score_, expected[layer], rtol=0, atol=1e-6 * scale)
        assert float((score_ - wrong[layer]).abs().max()) > 1e-2 * scale
        assert bool(score_[~masks[layer]].any())  # pruned places are scored with the weight they had


def test_temperature_is_an_option() -> None:
    model, batches = net(), data(5, 2)
    masks = half(model)
    for name, mode, _ in CASES:
        found = score(name, model, masks, batches, temperature=3.0)
        expected = explicit(name, model, masks, batches, mode, 3.0)
        for layer, score_ in found.items():
            atol = 1e-6 * float(expected[layer].abs().max())
            torch.testing.assert_close(score_, expected[layer], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["grasp", "crop"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(name: str, temperature: float) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"^pruning.criterion_options: temperature=.*; write temperature=200$"):
        score(name, model, half(model), data(3), temperature=temperature)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_grasp_keeps_what_the_gradient_norm_needs() -> None:
    # With w = a one-weight model and loss l(w), w (H g) > 0 exactly where shrinking w shrinks |g|; such weights stay.
    model = nn.Linear(1, 1, bias=False).double()
    batches = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1))]
    for weight in (-2.0, -0.5, 0.5, 2.0):
        nn.init.constant_(model.weight, weight)

        def bowl(net_: nn.Module, batch: Batch) -> Tensor:  # g = w, H = 1: score w^2
            return net_(batch[0]).square().sum() / 2

        def hill(net_: nn.Module, batch: Batch) -> Tensor:  # g = w^-2 / 2 > 0, H = -w^-3: score -w^-4 / 2
            return -1 / net_(batch[0]).sum() / 2

        for loss, expected in ((bowl, weight**2), (hill, -(weight**-4) / 2)):
            found = criterion.entry("grasp").value(
                model, Masks.dense(model), batches, loss, generator=torch.Generator(), temperature=1.0
            )
            assert float(found["weight"].detach()) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["grasp", "crop"])
@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5), (1,) * 7])
def test_scores_do_not_depend_on_the_split_into_batches(name: str, sizes: tuple[int, ...]) -> None:
    model = net(norm=False).float()
    one, many = ([(x.float(), y) for x, y in data(*split)] for split in ((7,), sizes))
    whole, parts = (score(name, model, half(model), batches) for batches in (one, many))
    for layer, score_ in whole.items():
        torch.testing.assert_close(score_, parts[layer], rtol=0, atol=2e-6 * float(score_.abs().max()))


# Architectures: sum of theta (H g) over a layer is the derivative of |g|^2 / 2 as that layer is scaled


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)


def timm_vit() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)


BIG: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (vit, 16),
    "timm vit": (timm_vit, 16),
    "convnext": (lambda: torchvision.models.convnext_tiny(num_classes=3), 32),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), 64),
    "resnext": (lambda: torchvision.models.resnext50_32x4d(num_classes=3), 64),
}
SMALL = ("vit", "timm vit")


@pytest.mark.parametrize("model_name", [pytest.param(n, marks=[] if n in SMALL else pytest.mark.slow) for n in BIG])
def test_layer_sums_of_grasp_on_architectures(model_name: str) -> None:
    make, size = BIG[model_name]
    torch.manual_seed(0)
    model = make().double()
    if model_name in SMALL:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    batches = data(*((2, 4) if model_name in SMALL else (8,)), shape=(3, size, size))
    masks = Masks.dense(model)
    found = score("grasp", model, masks, batches, temperature=1.0)
    oracle = Explicit(model, masks, batches, "train", 1.0)
    sizes = [score_.numel() for score_ in found.values()]
    sums = torch.stack([score_.sum() for score_ in found.values()])
    for i in [int(i) for i in sums.abs().argsort(descending=True)[[0, 3]]]:
        ends = []
        for sign in (1, -1):
            scales = [1 + sign * 1e-6 if k == i else 1.0 for k in range(len(sizes))]
            moved = torch.cat([s * p for s, p in zip(scales, oracle.theta.split(sizes), strict=True)])
            ends.append(float(oracle.gradient(moved).square().sum()) / 2)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(sums[i]), rel=1e-3), list(found)[i]


def test_crop_is_the_size_of_grasp_where_nothing_is_pruned() -> None:
    model, batches = net(norm=False), data(4, 3)
    grasp = score("grasp", model, Masks.dense(model), batches, temperature=1.0)
    for layer, score_ in score("crop", model, Masks.dense(model), batches).items():
        assert torch.equal(score_, grasp[layer].abs())
