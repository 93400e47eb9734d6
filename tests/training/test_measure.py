"""Time and memory of a network: of the right size, and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils import models
from utils.training.measure import measure


def test_memory_is_that_of_weights_gradients_state_and_saved_activations() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5, bias=False))
    found = measure(net, (3, 4, 4), batch_size=10, dtype=torch.float32, optimizer_states=1)
    weights = 4 * (3 * 8 + 8 * 16 * 5)
    images, hidden, scores = 4 * 10 * 3 * 16, 4 * 10 * 8 * 16, 4 * 10 * 5
    # Saved: the images, what ReLU made (once, for itself and the linear layer), the log-softmax, labels and a scalar.
    low = images + hidden + scores + 3 * weights
    assert low <= found["peak_memory_mb"] * 1e6 <= low + 8 * 10 + 64
    assert found["seconds_per_image"] > 0
    assert found["train_seconds_per_image"] > found["seconds_per_image"]


def test_a_wider_network_takes_more_of_everything_and_is_left_as_it_was() -> None:
    net = models.build("cifar/resnet20", 10).eval()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(1)
    small = measure(net, (3, 16, 16), 4, torch.float32)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert not net.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    large = measure(net, (3, 32, 32), 4, torch.float32)
    assert large["peak_memory_mb"] > 1.5 * small["peak_memory_mb"]
    assert large["peak_memory_mb"] == pytest.approx(measure(net, (3, 32, 32), 4, torch.float32)["peak_memory_mb"])
