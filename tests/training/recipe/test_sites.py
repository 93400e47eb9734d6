"""Where skips go, in networks of several libraries, told by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils import models
from utils.masks import prunable_parameters
from utils.training.recipe.sites import find_sites


def sites(name: str, side: int = 32) -> dict[str, str]:
    """Convolution weight to the name of the module at whose output its skip is added."""
    model = models.build(name, 10)
    names = {id(module): found for found, module in model.named_modules()}
    return {s.name: names[id(s.exit)] for s in find_sites(model, prunable_parameters(model), side)}


def test_a_thin_resnet() -> None:
    found = sites("cifar/resnet20")
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert found == {f"{block}.conv{i}.weight": f"{block}.bn{i}" for block in blocks for i in (1, 2)}


def test_bottlenecks_keep_their_1x1_convolutions_and_lose_their_shortcuts() -> None:
    found = sites("cifar/resnet50")
    assert len(found) == 3 * 16
    assert found["layer1.0.conv1.weight"] == "layer1.0.bn1"  # reads what the shortcut reads too
    assert found["layer4.2.conv3.weight"] == "layer4.2.bn3"
    assert not [name for name in found if "downsample" in name]


def test_a_shortcut_behind_a_pooling_is_one_too() -> None:
    found = sites("timm/resnet26d", 64)
    assert len([name for name in found if ".conv" in name]) == 3 * 8  # the stem's are conv1.0, conv1.3 and conv1.6
    assert not [name for name in found if "downsample" in name]


def test_a_plain_network() -> None:
    found = sites("cifar/vgg16_bn")
    assert len(found) == 12  # all but the one that reads the image
    assert found["features.3.weight"] == "features.4"


def test_depthwise_convolutions_and_squeezes() -> None:
    found = sites("torchvision/mobilenet_v3_small", 64)
    assert found["features.1.block.0.0.weight"] == "features.1.block.0.1"
    assert not [name for name in found if ".fc1." in name or ".fc2." in name]  # they see one pixel


def test_a_norm_that_holds_its_activation_takes_the_skip_before_it() -> None:
    found = sites("timm/mobilenetv2_100", 64)
    assert found["blocks.1.0.conv_pw.weight"] == "blocks.1.0.bn1.drop"


def test_without_a_norm_the_convolution_takes_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    (site,) = find_sites(model, ["0.weight", "2.weight"], 16)
    assert (site.name, site.exit) == ("2.weight", model[2])


def test_finding_leaves_no_trace() -> None:
    model = models.build("cifar/resnet20", 10)
    model.layer1[0].bn1.eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    flags, seed = [m.training for m in model.modules()], torch.get_rng_state()
    find_sites(model, prunable_parameters(model), 32)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), seed)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("names", [[], ["conv1.weight"]])
def test_nothing_to_bridge(names: list[str]) -> None:
    assert find_sites(models.build("cifar/resnet20", 10), names, 32) == []
