"""ONNX files: any number of images, torch's scores, zeros that stay zeros, nothing left where something is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.pruning.structured_cases import SHAPE, Small, half, small
from utils.masks import Masks
from utils.models import onnx_file
from utils.models.onnx_file import read_facts, write_onnx
from utils.pruning.structured import Channels, shrink
from utils.system import optional
from utils.system.errors import UserError
from utils.system.optional import require


def scores(path: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["scores"], {"images": images.numpy()})[0]


def trained() -> Small:
    """With running statistics that are not the initial ones, so that a file in training mode would be noticed."""
    model = small()
    with torch.no_grad():
        for number in range(5):
            model.train()(torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(number)) * 2 + 1)
    return model


def test_a_shrunk_network_gives_torchs_scores_for_any_number_of_images(tmp_path: Path) -> None:
    model = trained()
    found = Channels.of(model, SHAPE)
    smaller = shrink(model, found.groups, half(found)).train()
    path = tmp_path / "m.onnx"
    difference = write_onnx(smaller, path, SHAPE[1], {"level": 3, "run": "a"})
    assert 0.0 <= difference <= 1e-5
    assert smaller.training
    assert read_facts(path) == {"level": "3", "run": "a"}
    for count in (1, 4, 7):
        images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = smaller.eval()(images).numpy()
        assert np.allclose(scores(path, images), expected, rtol=1e-4, atol=1e-5)
    shapes = {tuple(t.dims) for t in onnx.load(str(path)).graph.initializer}
    assert tuple(smaller.fc1.weight.shape) in shapes
    assert tuple(model.fc1.weight.shape) not in shapes


def test_a_masked_network_keeps_its_zeros(tmp_path: Path) -> None:
    model = trained()
    generator = torch.Generator().manual_seed(1)
    masks = Masks({n: torch.rand(m.shape, generator=generator) < 0.3 for n, m in Masks.dense(model).items()})
    masks.apply_(model)
    path = tmp_path / "m.onnx"
    write_onnx(model, path, SHAPE[1], {})
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer]
    for name in ("a.weight", "dw.weight", "fc1.weight"):
        shape = tuple(masks[name].shape)
        same = [t for t in stored if t.shape == shape or t.T.shape == shape]
        assert masks.counts[name] in {int(np.count_nonzero(t)) for t in same}


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    right = onnx_file._program

    def wrong(network: nn.Module, shape: tuple[int, int, int], name: str) -> object:
        return right(small(1).eval(), shape, name)

    monkeypatch.setattr(onnx_file, "_program", wrong)
    with pytest.raises(UserError, match=r"--export onnx: scores of net by onnxruntime differ by .* from torch's"):
        write_onnx(trained(), path, SHAPE[1], {}, "net")
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.fc1.bias[0] = float("nan")
    with pytest.raises(UserError, match="differ by nan from torch's"):
        write_onnx(model, tmp_path / "m.onnx", SHAPE[1], {})
    assert list(tmp_path.iterdir()) == []


class OneByOne(nn.Module):
    """What it does depends on the number of images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([image.mean() * torch.ones(3) for image in images]) * len([*images])


def test_a_network_that_is_made_for_one_number_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--export onnx: .*odd"):
        write_onnx(OneByOne(), tmp_path / "m.onnx", 8, {}, "odd")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    there = optional.importlib.util.find_spec
    monkeypatch.setattr(
        optional.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name)
    )
    with pytest.raises(UserError) as caught:
        require("--export onnx", optional.ONNX)
    assert str(caught.value) == "--export onnx: needs onnxscript, not installed here; run: pip install onnxscript"


def test_facts_of_what_is_no_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"something else entirely")
    assert read_facts(path) == {}
    assert read_facts(tmp_path / "missing.onnx") == {}
