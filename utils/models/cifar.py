"""Networks for images of about 32 px, made of torchvision's stock modules.

resnet20 to resnet110: the thin nets of He et al. 2016, section 4.2 (6n+2 layers; 16, 32, 64 channels), with a 1x1
convolution and BatchNorm where a block changes shape (option B), as pruning papers take them, since the zero-padded
identity (option A) of the original leaves nothing to prune there. Parameters with 10 classes: resnet20 272,474,
resnet32 466,906, resnet44 661,338, resnet56 855,770, resnet110 1,730,714 (option A: resnet20 269,722).

resnet18 to resnet152: torchvision's networks with a 3x3 stem of stride 1 and no max-pool; their state_dict keys.

vgg11_bn to vgg19_bn: torchvision's convolutions, average pooling to 1x1 and one linear layer 512 -> classes. They need
images of at least 32 px. With `_head512` the head is Linear(512, 512), ReLU, Dropout(0.5), Linear(512, classes).
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import cfgs, make_layers

from utils.models import model


def _initialise(network: nn.Module, linear_std: float | None = None) -> None:
    """He normal (fan out) convolutions, as torchvision's; linear layers as torch's, or normal with `linear_std`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
            nn.init.zeros_(module.bias)


class ThinResNet(nn.Module):
    """6n+2 layers: a 3x3 stem and three stages of n basic blocks with 16, 32 and 64 channels; torchvision's names."""

    def __init__(self, depth: int, num_classes: int) -> None:
        """depth: 6n+2 for a whole n."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] to logits [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarVGG(nn.Module):
    """VGG with BatchNorm and a head of one linear layer, or of two with dropout between them."""

    def __init__(self, config: str, num_classes: int, hidden: int | None = None) -> None:
        """config: torchvision's letter: A (11 layers), B (13), D (16), E (19); hidden: width of a second layer."""
        super().__init__()
        self.features = make_layers(cfgs[config], batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier: nn.Module = nn.Linear(512, num_classes)
        if hidden is not None:
            layers = (nn.Linear(512, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(hidden, num_classes))
            self.classifier = nn.Sequential(*layers)
        _initialise(self, linear_std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] to logits [B, classes]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _small_stem(block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int) -> ResNet:
    network = ResNet(block, layers, num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


@model("cifar/resnet20")
def resnet20(num_classes: int) -> nn.Module:
    """Thin ResNet for 32 px images, 20 layers, 0.27 M parameters."""
    return ThinResNet(20, num_classes)


@model("cifar/resnet32")
def resnet32(num_classes: int) -> nn.Module:
    """Thin ResNet for 32 px images, 32 layers, 0.47 M parameters."""
    return ThinResNet(32, num_classes)


@model("cifar/resnet44")
def resnet44(num_classes: int) -> nn.Module:
    """Thin ResNet for 32 px images, 44 layers, 0.66 M parameters."""
    return ThinResNet(44, num_classes)


@model("cifar/resnet56")
def resnet56(num_classes: int) -> nn.Module:
    """Thin ResNet for 32 px images, 56 layers, 0.86 M parameters."""
    return ThinResNet(56, num_classes)


@model("cifar/resnet110")
def resnet110(num_classes: int) -> nn.Module:
    """Thin ResNet for 32 px images, 110 layers, 1.73 M parameters."""
    return ThinResNet(110, num_classes)


@model("cifar/resnet18")
def resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max-pool, 11.2 M parameters."""
    return _small_stem(BasicBlock, [2, 2, 2, 2], num_classes)


@model("cifar/resnet34")
def resnet34(num_classes: int) -> nn.Module:
    """ResNet-34 with a 3x3 stem and no max-pool, 21.3 M parameters."""
    return _small_stem(BasicBlock, [3, 4, 6, 3], num_classes)


@model("cifar/resnet50")
def resnet50(num_classes: int) -> nn.Module:
    """ResNet-50 with a 3x3 stem and no max-pool, 23.5 M parameters."""
    return _small_stem(Bottleneck, [3, 4, 6, 3], num_classes)


@model("cifar/resnet101")
def resnet101(num_classes: int) -> nn.Module:
    """ResNet-101 with a 3x3 stem and no max-pool, 42.5 M parameters."""
    return _small_stem(Bottleneck, [3, 4, 23, 3], num_classes)


@model("cifar/resnet152")
def resnet152(num_classes: int) -> nn.Module:
    """ResNet-152 with a 3x3 stem and no max-pool, 58.2 M parameters."""
    return _small_stem(Bottleneck, [3, 8, 36, 3], num_classes)


@model("cifar/vgg11_bn")
def vgg11_bn(num_classes: int) -> nn.Module:
    """VGG-11 with BatchNorm and one linear layer, 9.2 M parameters."""
    return CifarVGG("A", num_classes)


@model("cifar/vgg13_bn")
def vgg13_bn(num_classes: int) -> nn.Module:
    """VGG-13 with BatchNorm and one linear layer, 9.4 M parameters."""
    return CifarVGG("B", num_classes)


@model("cifar/vgg16_bn")
def vgg16_bn(num_classes: int) -> nn.Module:
    """VGG-16 with BatchNorm and one linear layer, 14.7 M parameters."""
    return CifarVGG("D", num_classes)


@model("cifar/vgg19_bn")
def vgg19_bn(num_classes: int) -> nn.Module:
    """VGG-19 with BatchNorm and one linear layer, 20.0 M parameters."""
    return CifarVGG("E", num_classes)


@model("cifar/vgg11_bn_head512")
def vgg11_bn_head512(num_classes: int) -> nn.Module:
    """VGG-11 with BatchNorm and two linear layers, 512 wide and dropout between, 9.5 M parameters."""
    return CifarVGG("A", num_classes, hidden=512)


@model("cifar/vgg13_bn_head512")
def vgg13_bn_head512(num_classes: int) -> nn.Module:
    """VGG-13 with BatchNorm and two linear layers, 512 wide and dropout between, 9.7 M parameters."""
    return CifarVGG("B", num_classes, hidden=512)


@model("cifar/vgg16_bn_head512")
def vgg16_bn_head512(num_classes: int) -> nn.Module:
    """VGG-16 with BatchNorm and two linear layers, 512 wide and dropout between, 15.0 M parameters."""
    return CifarVGG("D", num_classes, hidden=512)


@model("cifar/vgg19_bn_head512")
def vgg19_bn_head512(num_classes: int) -> nn.Module:
    """VGG-19 with BatchNorm and two linear layers, 512 wide and dropout between, 20.3 M parameters."""
    return CifarVGG("E", num_classes, hidden=512)
