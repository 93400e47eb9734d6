"""Section `model`."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Model:
    """The network and where its weights come from."""

    name: str = param(
        "cifar/resnet20",
        "torchvision/<name>, timm/<name> or a CIFAR-style model",
        kind="model",
        prefixes=("torchvision/", "timm/"),
    )
    pretrained: str = param(
        "", "torchvision weights name, `default`, or a safetensors or torch file; empty: fresh weights"
    )
