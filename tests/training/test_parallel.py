"""Memory format and BatchNorm statistics in one process (tests/distributed has the rest)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils import models
from utils.training.batchnorm import averaged_statistics, running_statistics
from utils.training.parallel import to_channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cifar/resnet20", "torchvision/mobilenet_v3_small", "torchvision/resnext50_32x4d"])
def test_gradients_have_the_strides_of_their_weights(name: str, dtype: torch.dtype) -> None:
    """Else DDP copies each of them into its bucket, with a warning."""
    model = models.build(name, 10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    to_channels_last(model)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(images)
    out.float().sum().backward()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]), n
        assert p.grad.stride() == p.stride(), n


def test_running_statistics_are_those_of_norm_layers_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    model.register_buffer("table", torch.ones(3))
    assert list(running_statistics(model)) == ["1.running_mean", "1.running_var"]
    assert list(running_statistics(nn.BatchNorm1d(2))) == ["running_mean", "running_var"]
    copies = averaged_statistics(model)
    copies["1.running_mean"].fill_(7)
    assert model[1].running_mean.eq(0).all()
