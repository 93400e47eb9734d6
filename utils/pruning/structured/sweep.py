"""Does a network of torchvision or timm shrink exactly? Half of its channels out, then everything is compared."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from utils import files, models
from utils.models.widths import WidthFile, widths_between
from utils.pruning.structured import ChannelMask, Channels, shrink
from utils.pruning.structured.shrink import selected
from utils.pruning.structured.verify import randomised
from utils.system.errors import UserError

TOLERANCE = 1e-5
"""Of outputs and gradients of the shrunk model, as a share of the largest; both are computed in float64."""

TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnet50", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg16_bn",
    "vit_b_16", "wide_resnet50_2",
)  # fmt: skip

TIMM = (
    "beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coat_tiny", "convformer_s18", "convnext_atto",
    "convnextv2_atto", "crossvit_tiny_240", "cspresnet50", "darknet53", "deit_tiny_patch16_224", "densenet121", "dla34",
    "dpn68", "ecaresnet50d", "edgenext_xx_small", "efficientformer_l1", "efficientnet_b0", "efficientnetv2_rw_t",
    "fastvit_t8", "ghostnet_100", "hgnet_tiny", "hrnet_w18_small", "inception_next_tiny", "legacy_xception",
    "levit_128s", "mixer_s32_224", "mnasnet_100", "mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mobilevit_xs", "nfnet_f0", "poolformer_s12", "pvt_v2_b0", "regnetx_004", "regnety_004",
    "repvgg_a0", "res2net50_26w_4s", "resmlp_12_224", "resnest14d", "resnet18", "resnet50", "resnetv2_50",
    "resnext50_32x4d", "rexnet_100", "seresnet50", "skresnet18", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "tiny_vit_5m_224", "twins_svt_small", "vgg16_bn", "vit_tiny_patch16_224", "vovnet39a",
    "wide_resnet50_2", "xcit_nano_12_p16_224",
)  # fmt: skip

CIFAR = ("cifar/resnet20", "cifar/resnet18", "cifar/vgg16_bn")

FAMILIES = (*CIFAR, *(f"torchvision/{name}" for name in TORCHVISION), *(f"timm/{name}" for name in TIMM))
"""One network of every family the table is about."""

SIDES = (64, 96, 224, 240, 256)
"""Image sizes tried, smallest first: what is shown does not depend on it, the time does."""


@dataclass(frozen=True)
class Finding:
    """What came out for one network.

    groups, whole: groups of channels, and those of them that stay whole. macs, parameters: share left with half of the
    units of every other group. output, gradient: largest differences between the shrunk and the masked model, as
    shares of the largest value.
    """

    groups: int
    whole: int
    macs: float
    parameters: float
    output: float
    gradient: float


def examine(name: str, classes: int = 10) -> Finding:
    """Shrink the network `name`, compare, train two steps, save, rebuild from the width file, load, compare again.

    Raises UserError with the reason for a network that is refused, RuntimeError for one that was wrongly accepted.
    """
    model, side = _built(name, classes)
    shape = (3, side, side)
    channels = Channels.of(model, shape, name=name)
    mask = half(channels)
    exact = without_chance(randomised(model, torch.Generator().manual_seed(1)).requires_grad_(True))
    held, smaller = copy.deepcopy(exact), shrink(exact, channels.groups, mask)
    mask.apply_(held, channels.groups)
    channels.check_cost(shrink(model, channels.groups, mask), mask)
    # Five: where maps end as one pixel, norms of two images are all signs, and gradients behind them nothing but noise.
    images = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        output = apart(smaller.eval()(images), held.eval()(images))
    gradient = _gradients_apart(smaller, held, images, channels, mask)
    for what, size in (("outputs", output), ("gradients", gradient)):
        if not size <= TOLERANCE:
            raise RuntimeError(f"{name}: {what} of the shrunk model differ by {size:.1e} of their size")
    _train_and_rebuild(name, model, classes, side, channels, mask)
    return Finding(
        len(channels.groups),
        len(channels.groups) - len(channels.open),
        channels.cost.macs(mask.widths) / channels.cost.macs(),
        channels.cost.parameters(mask.widths) / channels.cost.parameters(),
        output,
        gradient,
    )


def _built(name: str, classes: int) -> tuple[nn.Module, int]:
    for side in SIDES:
        try:
            return models.build(name, classes, image_size=side), side
        except UserError as error:
            last = error
    raise last


def half(channels: Channels) -> ChannelMask:
    """A random half of the units of every group that may be pruned, rounded up but at least one less than all."""
    generator, units = torch.Generator().manual_seed(0), {}
    for group in channels.groups:
        units[group.name] = torch.ones(group.size, dtype=torch.bool)
        if group.protected is None:
            kept = min((group.size + 1) // 2, group.size - 1)
            units[group.name][torch.randperm(group.size, generator=generator)[kept:]] = False
    return ChannelMask(units)


def without_chance(model: nn.Module) -> nn.Module:
    """`model` with every dropout and stochastic depth off: their draws depend on shapes."""
    for module in model.modules():
        for attribute in ("p", "drop_prob", "drop_rate", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((found - expected).detach().abs().max()) / max(float(expected.detach().abs().max()), 1e-30)


def _gradients_apart(
    smaller: nn.Module, held: nn.Module, images: torch.Tensor, channels: Channels, mask: ChannelMask
) -> float:
    """In training mode, over all parameters that are left, relative to the largest gradient of any."""
    labels = torch.arange(len(images))
    for net in (smaller.train(), held.train()):
        functional.cross_entropy(net(images), labels).backward()
    keep, whole = mask.keep(channels.groups), dict(held.named_parameters())
    largest, difference = 1e-30, 0.0
    for name, p in smaller.named_parameters():
        if p.grad is not None:
            expected = selected(whole[name].grad, keep.get(name, {}))  # type: ignore[arg-type]
            difference = max(difference, float((p.grad - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return difference / largest


def _train_and_rebuild(
    name: str, model: nn.Module, classes: int, side: int, channels: Channels, mask: ChannelMask
) -> None:
    smaller = without_chance(shrink(model, channels.groups, mask)).train()
    optimizer = torch.optim.SGD(smaller.parameters(), lr=1e-4, momentum=0.9)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(smaller(images), torch.arange(2)).backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        widths, weights = Path(folder) / "widths.json", Path(folder) / "weights.safetensors"
        WidthFile(name, classes, side, widths_between(model, smaller)).save(widths)
        files.save_weights(weights, smaller)
        rebuilt = models.rebuild(widths, weights)
    with torch.no_grad():
        if not torch.allclose(rebuilt.eval()(images), smaller.eval()(images), rtol=0.0, atol=0.0, equal_nan=True):
            raise RuntimeError(f"{name}: the network rebuilt from its width file computes something else")
