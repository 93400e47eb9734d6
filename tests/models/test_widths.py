"""Stock networks with other widths: built by the stock constructor, initialised as it does, saved without code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.pruning.structured_cases import channels, half
from utils import files, models
from utils.models.widths import WidthFile, Widths, widths_between
from utils.pruning.structured import shrink
from utils.pruning.structured.expand import widths_of
from utils.system.errors import UserError

NETWORKS = [
    ("cifar/resnet20", 32),
    ("cifar/resnet18", 32),
    ("torchvision/resnext50_32x4d", 64),
    ("timm/efficientnet_b0", 64),
    ("timm/vit_tiny_patch16_224", 32),
    ("torchvision/squeezenet1_1", 64),
]


@pytest.mark.parametrize(("name", "side"), NETWORKS)
def test_a_shrunk_network_is_rebuilt_from_its_width_file(name: str, side: int, tmp_path: Path) -> None:
    stock, found = channels(name, side)
    smaller = shrink(stock, found.groups, half(found))
    widths = widths_between(stock, smaller)
    WidthFile(name, 10, side, widths, {"macs": 5}).save(tmp_path / "w.json")
    files.save_weights(tmp_path / "w.safetensors", smaller)
    rebuilt = models.rebuild(tmp_path / "w.json", tmp_path / "w.safetensors")
    assert type(rebuilt) is type(stock)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images), smaller.eval()(images))
    assert str(rebuilt) == str(smaller)  # every module says the same about its widths
    assert WidthFile.load(tmp_path / "w.json").facts == {"macs": 5}
    # Two ways to the same numbers: read off the small network, and computed from the groups.
    assert widths_of(stock, found.groups, half(found).widths) == widths


def test_fresh_weights_are_drawn_for_the_smaller_layers() -> None:
    """He initialisation by fan-out of the layer as it is, not of the stock one."""
    stock, found = channels("cifar/resnet18", 32)
    widths = widths_of(stock, found.groups, {"layer1.0.conv1": 4})
    narrow = models.build("cifar/resnet18", 10, widths=widths)
    layer = narrow.layer1[0].conv1
    assert tuple(layer.weight.shape) == (4, 64, 3, 3)
    expected = (2.0 / (4 * 9)) ** 0.5
    assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.05)
    assert float(stock.layer1[0].conv1.weight.detach().std()) == pytest.approx((2.0 / (64 * 9)) ** 0.5, rel=0.05)


def test_fresh_weights_depend_on_seed_and_widths_alone() -> None:
    stock, found = channels("cifar/resnet20", 32)
    widths = widths_of(stock, found.groups, {"layer1.0.conv1": 5})
    torch.manual_seed(3)
    first = models.build("cifar/resnet20", 10, widths=widths)
    drawn = torch.rand(1)
    second = models.build("cifar/resnet20", 10, widths=widths)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert files.digest(files.state_of(first)) == files.digest(files.state_of(second))
    other = models.build("cifar/resnet20", 10, widths=widths, seed=1)
    assert files.digest(files.state_of(first)) != files.digest(files.state_of(other))
    same = models.build("cifar/resnet20", 10, widths=Widths())
    assert files.digest(files.state_of(same)) == files.digest(files.state_of(models.build("cifar/resnet20", 10)))


def test_constructors_are_left_as_they_were() -> None:
    before = nn.Linear.__init__, nn.modules.conv._ConvNd.__init__, nn.modules.batchnorm._NormBase.__init__
    with pytest.raises(UserError, match=r"widths: 'layer9.conv' is no module of this network"):
        models.build("cifar/resnet20", 10, widths=Widths({"layer9.conv": {"out_channels": 3}}))
    with pytest.raises(UserError, match="divisible"):
        models.build("torchvision/resnext50_32x4d", 10, widths=Widths({"layer1.0.conv2": {"in_channels": 5}}))
    assert (nn.Linear.__init__, nn.modules.conv._ConvNd.__init__, nn.modules.batchnorm._NormBase.__init__) == before
    assert nn.Conv2d(3, 4, 1).out_channels == 4


def test_wrong_width_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    with pytest.raises(UserError, match="no such file"):
        models.rebuild(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"w.json: not a width file of ours"):
        models.rebuild(path)
    WidthFile("cifar/resnet20", 10, 32, Widths({"conv1": {"num_features": 3}})).save(path)
    with pytest.raises(UserError, match="'conv1' has no num_features"):
        models.rebuild(path)
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "format": "other"}))
    with pytest.raises(UserError, match="not a width file of ours"):
        models.rebuild(path)
    with pytest.raises(UserError, match="starts fresh"):
        models.build("cifar/resnet20", 10, pretrained="a.pt", widths=Widths())
