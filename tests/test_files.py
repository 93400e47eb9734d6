"""Weight files: stock keys, whole or absent, read without executing anything."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from utils import files
from utils.system import atomic
from utils.system.errors import UserError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight


def test_round_trip_keeps_bits_and_the_layout_of_the_model(tmp_path) -> None:
    model = Tied()
    model.norm.running_mean.normal_()
    files.save_weights(tmp_path / "w.safetensors", model)
    stored = files.load_weights(tmp_path / "w.safetensors")
    assert "two.weight" not in stored
    assert set(stored) | {"two.weight"} == set(model.state_dict())
    other = Tied()
    address, strides = other.conv.weight.data_ptr(), other.conv.weight.stride()
    files.put_weights(other, stored)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert (other.conv.weight.data_ptr(), other.conv.weight.stride()) == (address, strides)
    assert files.digest(files.state_of(other)) == files.digest(files.state_of(model)) == files.digest(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("one.bias"), r"f: 'one\.bias' is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), r"f: 'extra' is not a tensor of this model"),
        (lambda s: s.update({"one.bias": torch.zeros(5)}), r"f: 'one\.bias' has shape \(5,\), the model's is \(4,\)"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(change, message) -> None:
    model = Tied()
    before = files.digest(files.state_of(model))
    state = {name: t + 1 for name, t in files.state_of(model).items()}
    change(state)
    with pytest.raises(UserError, match=message):
        files.put_weights(model, state, "f")
    assert files.digest(files.state_of(model)) == before


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with contextlib.suppress(RuntimeError), atomic.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_digest_tells_dtype_shape_and_value_apart() -> None:
    tensors = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.tensor([0.0, 0.0, 0.0, -0.0]),
    ]
    assert len({files.digest({"a": t}) for t in tensors}) == 4
