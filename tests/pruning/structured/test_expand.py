"""Wider networks, as Pruning from Scratch searches them, against the MACs its released code counts (in millions)."""

from __future__ import annotations

import pytest

from tests.pruning.structured_cases import channels
from utils import models
from utils.pruning.structured import Channels
from utils.pruning.structured.cost import counted_macs
from utils.pruning.structured.expand import expanded_units, widths_of
from utils.system.errors import UserError

SMALL = [("cifar/vgg16_bn", 80, 1.0, 488.8), ("cifar/resnet20", 20, 1.25, 63.6), ("cifar/resnet32", 20, 1.25, 107.9)]

MOBILE = ("features.1.conv.1", "features.17.conv.2")
"""Block outputs of MobileNet-V2 that no residual sum runs through; published as part of the backbone."""

LARGE = [
    ("torchvision/resnet50", ("conv1",), None, 1.0, 4089),
    ("torchvision/resnet50", ("conv1",), 80, 1.0, 5570),
    ("torchvision/resnet50", ("conv1",), None, 1.25, 4762),
    ("torchvision/resnet50", ("conv1",), 80, 1.25, 6352),
    ("timm/mobilenetv1_100", (), None, 1.0, 568.8),
    ("timm/mobilenetv1_100", (), 40, 1.0, 879.6),
    ("torchvision/mobilenet_v2", MOBILE, None, 1.0, 300.8),
    ("torchvision/mobilenet_v2", MOBILE, 40, 1.0, 376.1),
    ("torchvision/mobilenet_v2", MOBILE, None, 1.25, 367.8),
    ("torchvision/mobilenet_v2", MOBILE, 40, 1.25, 459.8),
]


@pytest.mark.parametrize(("name", "first", "multiplier", "millions"), SMALL)
def test_published_macs_of_expanded_networks(name: str, first: int, multiplier: float, millions: float) -> None:
    stock, found = channels(name, 32)
    wide = models.build(
        name, 10, widths=widths_of(stock, found.groups, expanded_units(stock, found.groups, first, multiplier))
    )
    assert counted_macs(wide, (3, 32, 32)) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exclude", "first", "multiplier", "millions"), LARGE)
def test_published_macs_on_imagenet(
    name: str, exclude: tuple[str, ...], first: int | None, multiplier: float, millions: float
) -> None:
    stock = models.build(name, 1000, image_size=224)
    found = Channels.of(stock, (3, 224, 224), name=name, exclude=exclude, coupled=False)
    units = expanded_units(stock, found.groups, first, multiplier)
    wide = models.build(name, 1000, widths=widths_of(stock, found.groups, units))
    assert counted_macs(wide, (3, 224, 224)) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_wider_network_can_be_pruned_to_a_share_of_the_stock_one() -> None:
    stock, found = channels("cifar/resnet20", 32)
    units = expanded_units(stock, found.groups, 20, 1.25)
    wide = models.build("cifar/resnet20", 10, widths=widths_of(stock, found.groups, units))
    wider = Channels.of(wide, (3, 32, 32), coupled=False)  # one channel is up to 0.9 % of the MACs
    chosen = wider.prune(wide, "l1", budget="macs", keep=0.5, reference=found.cost.macs())
    assert 0.49 < chosen.reached / found.cost.macs() <= 0.5


def test_a_first_layer_is_never_made_narrower() -> None:
    stock, found = channels("cifar/resnet20", 32)
    with pytest.raises(UserError, match=r"structured.expansion=8: the first layer is 16 wide already"):
        expanded_units(stock, found.groups, 8, 1.0)
