"""A network as an ONNX file for any number of images, checked by onnxruntime against torch before it is kept."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.masks import bare
from utils.system.atomic import replacing
from utils.system.errors import UserError
from utils.system.optional import ONNX, require

TOLERANCE = 1e-4
"""Of float32 scores by onnxruntime and by torch, as a share of the largest; other kernels round otherwise."""

CHECKED = (1, 2, 5)
"""Numbers of images the file is checked with. It is traced with 3."""


def write_onnx(
    model: nn.Module, path: str | Path, image_size: int, facts: Mapping[str, Any], name: str = "the model"
) -> float:
    """Write `model` in eval mode: input `images` float32 [n, 3, side, side], output `scores` [n, classes], n free.

    facts: told by the file as its metadata, each as text. The model stays as it is. Returns the largest difference
    between onnxruntime and torch as a share of the largest score. Raises UserError when a package is missing, when the
    network cannot be written, or when its file computes something else; no file is then left.
    """
    require("--export onnx", ONNX)
    network = copy.deepcopy(bare(model)).cpu().float().eval().requires_grad_(False)
    shape = (3, image_size, image_size)
    program = _program(network, shape, name)
    for key, value in facts.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    with replacing(path) as temporary:
        program.save(str(temporary), external_data=False)
        return _checked(network, temporary, shape, name)


def read_facts(path: str | Path) -> dict[str, str]:
    """The metadata of an ONNX file; empty when it is not one. Runs nothing of it."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    except (OSError, DecodeError):
        return {}


def _program(network: nn.Module, shape: tuple[int, int, int], name: str) -> torch.onnx.ONNXProgram:
    images = _images(3, shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
    except torch.onnx.OnnxExporterError as error:
        reason = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
        raise UserError(f"--export onnx: torch.onnx cannot write {name} for any number of images ({reason})") from error
    assert program is not None
    return program


@torch.no_grad()
def _checked(network: nn.Module, path: Path, shape: tuple[int, int, int], name: str) -> float:
    """The largest relative difference. Raises UserError above the tolerance."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
        run = _session(path)
    except Exception as error:  # those of onnx and onnxruntime share no base class of their own
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--export onnx: {name} does not make a sound ONNX file ({reason})") from error
    largest = 0.0
    for count in CHECKED:
        images = _images(count, shape)
        expected = network(images)
        try:
            found = torch.from_numpy(run(images.numpy()))
        except Exception as error:  # those of onnxruntime share no base class of their own
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"--export onnx: onnxruntime cannot run {name} on {count} images ({reason})") from error
        if found.shape != expected.shape:
            raise UserError(f"--export onnx: {name} gives {tuple(found.shape)} scores, not {tuple(expected.shape)}")
        difference = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
        # Written so that NaN fails too.
        if not difference <= TOLERANCE:
            raise UserError(f"--export onnx: scores of {name} by onnxruntime differ by {difference:.1e} from torch's")
        largest = max(largest, difference)
    return largest


def _session(path: Path) -> Callable[[Any], Any]:
    """What gives the scores of images as numpy arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is told once, by us
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _images(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
