"""CIFAR-style networks: sizes known from the literature, torchvision's keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils import models

COUNTS = {
    "cifar/resnet20": 272_474,
    "cifar/resnet32": 466_906,
    "cifar/resnet44": 661_338,
    "cifar/resnet56": 855_770,
    "cifar/resnet110": 1_730_714,
    "cifar/resnet18": 11_173_962,
    "cifar/resnet34": 21_282_122,
    "cifar/resnet50": 23_520_842,
    "cifar/resnet101": 42_512_970,
    "cifar/resnet152": 58_156_618,
    "cifar/vgg11_bn": 9_231_114,
    "cifar/vgg13_bn": 9_416_010,
    "cifar/vgg16_bn": 14_728_266,
    "cifar/vgg19_bn": 20_040_522,
    "cifar/vgg11_bn_head512": 9_493_770,
    "cifar/vgg13_bn_head512": 9_678_666,
    "cifar/vgg16_bn_head512": 14_990_922,
    "cifar/vgg19_bn_head512": 20_303_178,
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_parameter_counts(name: str) -> None:
    assert sum(p.numel() for p in models.build(name, 10).parameters()) == COUNTS[name]


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_thin_resnets_count_their_layers(depth: int) -> None:
    network = models.build(f"cifar/resnet{depth}", 10)
    main = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    assert len(main) == depth
    shortcuts = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "downsample" in n]
    assert shortcuts == ["layer2.0.downsample.0", "layer3.0.downsample.0"]


def test_thin_resnet_keeps_and_halves_resolution() -> None:
    network = models.build("cifar/resnet20", 10)
    sides: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "layer1", "layer2", "layer3"):
        module = network.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: sides.__setitem__(name, tuple(out.shape[1:])))
    network(torch.zeros(1, 3, 32, 32))
    assert sides == {"conv1": (16, 32, 32), "layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_wide_resnets_are_torchvisions_with_another_stem(depth: int) -> None:
    from torchvision.models import get_model

    network = models.build(f"cifar/resnet{depth}", 1000)
    with torch.device("meta"):
        stock = get_model(f"resnet{depth}")
    assert type(network) is type(stock)
    ours, theirs = network.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    assert [key for key in ours if ours[key].shape != theirs[key].shape] == ["conv1.weight"]
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)


def test_wide_resnet_stem_keeps_resolution() -> None:
    network = models.build("cifar/resnet18", 10)
    seen: list[tuple[int, ...]] = []
    network.get_submodule("layer1").register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))
    network(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 64, 32, 32)]


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_convolutions_are_torchvisions(depth: int) -> None:
    from torchvision.models import get_model

    with torch.device("meta"):
        stock = get_model(f"vgg{depth}_bn").features.state_dict()
    ours = models.build(f"cifar/vgg{depth}_bn", 10).state_dict()
    features = {key.removeprefix("features."): value for key, value in ours.items() if key.startswith("features.")}
    assert {key: value.shape for key, value in features.items()} == {key: value.shape for key, value in stock.items()}
    assert {key for key in ours if not key.startswith("features.")} == {"classifier.weight", "classifier.bias"}
    assert ours["classifier.weight"].shape == (10, 512)


def test_the_wide_head_is_two_linear_layers_with_dropout_between() -> None:
    plain, wide = models.build("cifar/vgg16_bn", 10), models.build("cifar/vgg16_bn_head512", 10)
    same = {key for key in plain.state_dict() if key.startswith("features.")}
    shapes = {key: tuple(value.shape) for key, value in wide.state_dict().items() if key not in same}
    assert shapes == {
        "classifier.0.weight": (512, 512), "classifier.0.bias": (512,),
        "classifier.3.weight": (10, 512), "classifier.3.bias": (10,),
    }  # fmt: skip
    head = wide.get_submodule("classifier")
    assert [type(module) for module in head.children()] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert wide.get_submodule("classifier.2").p == 0.5
    weight = wide.get_parameter("classifier.0.weight").detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.02)  # 5 standard errors
    assert sum(isinstance(module, nn.Conv2d) for module in wide.modules()) == 13
    assert sum(isinstance(module, nn.MaxPool2d) for module in wide.modules()) == 5
    assert wide.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["cifar/resnet20", "cifar/resnet18", "cifar/vgg11_bn"])
def test_convolutions_start_he_normal_by_fan_out(name: str) -> None:
    """Standard deviation sqrt(2 / (out_channels k k)); the sample's lies within 5 standard errors of it."""
    for module in models.build(name, 10).modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().double()
            wanted = (2.0 / (weight.shape[0] * weight.shape[2] * weight.shape[3])) ** 0.5
            assert float(weight.std()) == pytest.approx(wanted, rel=5 / (2 * weight.numel()) ** 0.5)
            assert abs(float(weight.mean())) < 5 * wanted / weight.numel() ** 0.5
