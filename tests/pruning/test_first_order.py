"""SNIP and Taylor against finite differences of the loss in the mask, and on real architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from utils.masks import Masks
from utils.pruning.criteria import criterion
from utils.pruning.preserve import preserved

Batch = tuple[Tensor, Tensor]
MODES = {"taylor": "eval", "snip": "train", "fisher": "eval", "grasp": "train", "crop": "eval"}


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def net(norm: bool = True) -> nn.Module:
    """Convolutions, BatchNorm with statistics of its own, and a classifier, in float64."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.Softplus(), nn.Conv2d(4, 3, 2, groups=1)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(3 * 9, 3)).double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def data(*sizes: int, shape: tuple[int, ...] = (2, 6, 6), classes: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(sum(sizes)) % classes
    return [(x, y) for x, y in zip(images.split(sizes), labels.split(sizes), strict=True)]


def half(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(5)
    return Masks({n: torch.rand(m.shape, generator=generator) < 0.6 for n, m in Masks.dense(model).items()})


def score(name: str, model: nn.Module, masks: Masks, batches: list[Batch]) -> dict[str, Tensor]:
    entry = criterion.entry(name)
    with preserved(model, entry.traits["batchnorm"]):
        return entry.value(model, masks, batches, cross_entropy, generator=torch.Generator())


def by_differences(model: nn.Module, masks: Masks, batches: list[Batch], mode: str) -> dict[str, Tensor]:
    """|dL/dc| at c = mask of the loss with weights theta * c, by central differences; L is the mean over samples."""
    other = copy.deepcopy(model).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(mode == "train")
    named = dict(other.named_parameters())
    theta = {name: named[name].detach().clone() for name in masks}
    gates = {name: masks[name].double() for name in masks}
    step = 1e-4

    @torch.no_grad()
    def total() -> float:
        for name, gate in gates.items():
            named[name].copy_(theta[name] * gate)
        summed = sum(float(cross_entropy(other, batch)) * len(batch[1]) for batch in batches)
        return summed / sum(len(batch[1]) for batch in batches)

    found = {}
    for name, gate in gates.items():
        found[name] = torch.zeros_like(gate)
        for i in range(gate.numel()):
            ends = []
            for sign in (1, -1):
                gate.view(-1)[i] += sign * step
                ends.append(total())
                gate.view(-1)[i] -= sign * step
            found[name].view(-1)[i] = abs(ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("name", ["snip", "taylor"])
def test_scores_are_derivatives_in_the_mask(name: str) -> None:
    model, batches = net(), data(5, 2)
    masks = half(model)
    found = score(name, model, masks, batches)
    expected = by_differences(model, masks, batches, MODES[name])
    wrong = by_differences(model, masks, batches, {"train": "eval", "eval": "train"}[MODES[name]])
    for layer, score_ in found.items():
        torch.testing.assert_close(score_, expected[layer], rtol=1e-6, atol=1e-8)
        # Pruned places are scored too, with the weight they had.
        assert float(score_[~masks[layer]].max()) > 1e-4
        assert not torch.allclose(score_, wrong[layer], rtol=1e-3, atol=1e-6)


def test_the_absolute_value_is_taken_after_the_mean() -> None:
    # Two samples pull a weight to opposite sides: its mean gradient is 0, whatever the batches.
    model = nn.Linear(1, 2, bias=False).double()
    images, labels = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0, 1])
    nn.init.ones_(model.weight)
    for batches in ([(images, labels)], [(images[:1], labels[:1]), (images[1:], labels[1:])]):
        for name in ("snip", "taylor"):
            assert not score(name, model, Masks.dense(model), batches)["weight"].any()


def test_snip_and_taylor_agree_bitwise_without_batchnorm() -> None:
    model = net(norm=False).float()
    batches = [(x.float(), y) for x, y in data(6)]
    snip, taylor = (score(name, model, half(model), batches) for name in ("snip", "taylor"))
    assert all(torch.equal(snip[layer], taylor[layer]) for layer in snip)
    model = net().float()
    snip, taylor = (score(name, model, half(model), batches) for name in ("snip", "taylor"))
    assert not any(torch.allclose(snip[layer], taylor[layer]) for layer in snip)


@pytest.mark.parametrize("name", ["snip", "taylor"])
@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5), (1,) * 7])
def test_scores_do_not_depend_on_the_split_into_batches(name: str, sizes: tuple[int, ...]) -> None:
    model = net(norm=False).float()
    one, many = ([(x.float(), y) for x, y in data(*split)] for split in ((7,), sizes))
    whole, parts = (score(name, model, half(model), batches) for batches in (one, many))
    for layer, score_ in whole.items():
        torch.testing.assert_close(score_, parts[layer], rtol=0, atol=1e-6 * float(score_.max()))


def test_conv_weights_in_any_memory_format_score_alike() -> None:
    model = net()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for name in MODES:
        found, expected = (score(name, which, half(model), data(5, 2)) for which in (other, model))
        for layer, score_ in expected.items():
            torch.testing.assert_close(found[layer], score_, rtol=1e-9, atol=1e-15)


# Architectures


def vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # its own are 0: no gradient would pass
    return model


def tiny_timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=24, num_classes=3, pretrained=False
    )


BIG: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "convnext": (lambda: torchvision.models.convnext_tiny(num_classes=3), 32),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), 48),
    "resnext": (lambda: torchvision.models.resnext50_32x4d(num_classes=3), 32),
    "vit": (vit, 16),
    "timm vit": (tiny_timm_vit, 16),
}
SMALL = ("vit", "timm vit")


def settle(model: nn.Module, images: Tensor) -> None:
    """Running statistics of `images`: with those of a fresh BatchNorm signals vanish on the way through deep nets."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)


@pytest.mark.parametrize("model_name", [pytest.param(n, marks=[] if n in SMALL else pytest.mark.slow) for n in BIG])
@pytest.mark.parametrize("name", list(MODES))
def test_architectures(name: str, model_name: str) -> None:
    make, size = BIG[model_name]
    torch.manual_seed(0)
    model = make().train()
    batches = [(x.float(), y) for x, y in data(2, 2, shape=(3, size, size))]
    settle(model, batches[0][0])
    masks = half(model)
    found = score(name, model, masks, batches)
    assert list(found) == list(masks)
    for layer, score_ in found.items():
        assert score_.shape == masks[layer].shape
        assert score_.dtype == torch.float32
        assert bool(torch.isfinite(score_).all())
    assert sum(bool(score_.any()) for score_ in found.values()) >= 0.9 * len(found)  # some gates are shut


@pytest.mark.parametrize("make", [vit, tiny_timm_vit])
def test_attention_scores_are_those_of_plain_autograd(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    batch = data(4, shape=(3, 16, 16))[0]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    found = score("taylor", model, Masks.dense(model), [batch])
    cross_entropy(model, batch).backward()
    named = dict(model.named_parameters())
    attention = [layer for layer in found if "in_proj_weight" in layer or "qkv" in layer]
    assert len(attention) == 2
    for layer, score_ in found.items():
        torch.testing.assert_close(score_, (named[layer] * named[layer].grad).abs())  # type: ignore[operator]


@pytest.mark.parametrize("name", list(MODES))
def test_the_model_is_bitwise_as_it_was(name: str) -> None:
    model = net().float().train()
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    cross_entropy(model, (torch.randn(4, 2, 6, 6), torch.arange(4) % 3)).backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {key: (id(p.grad), None if p.grad is None else p.grad.clone()) for key, p in model.named_parameters()}
    rng = torch.get_rng_state()
    score(name, model, half(model), [(x.float(), y) for x, y in data(5, 2)])
    for key, value in model.state_dict().items():
        assert value.numpy().tobytes() == before[key].numpy().tobytes(), key
    for key, p in model.named_parameters():
        assert id(p.grad) == grads[key][0]
        assert p.grad is None or torch.equal(p.grad, grads[key][1])  # type: ignore[arg-type]
        assert p.requires_grad == (key != "0.bias")
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
