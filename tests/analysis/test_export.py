"""`--export onnx` on the command line: of a run as it ends, and of a level afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.levels_cases import rows
from utils import models
from utils.masks import Masks
from utils.models.onnx_file import read_facts
from utils.reporting.__main__ import main
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]


def harness(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    keys = {
        "run.root": root, "run.device": "cpu", "data.name": "digits", "data.loader": "device", "data.subset": 80,
        "data.val": 0, "model.name": "cifar/resnet20", "training.epochs": 0, "training.batch_size": 40,
        "structured.budget": "macs", "structured.keep": 0.5, "pruning.moment": "init", "pruning.density": 0.5,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "harness.py", *(f"--{key}={value}" for key, value in keys.items()), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_a_run_writes_its_levels_and_a_finished_one_can_be_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = harness(tmp_path / "runs", "--export", "onnx")
    assert done.returncode == 0, done.stderr[-2000:]
    run = RunDir(next((tmp_path / "runs").iterdir()))
    place = run.level(0)
    assert f"onnx:   {place.onnx}: " in done.stdout
    row = rows(run.levels_csv)[0]
    facts = read_facts(place.onnx)
    assert (facts["weights_digest"], facts["level"], facts["model"]) == (row["weights_digest"], "0", "cifar/resnet20")
    network = models.rebuild(place.widths, place.weights).eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(place.onnx), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert np.allclose(session.run(None, {"images": images.numpy()})[0], network(images).numpy(), atol=1e-4)
    masks = Masks.load(place.mask, network)
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(place.onnx)).graph.initializer]
    weights = [t for t in stored if t.shape == tuple(masks["layer2.0.conv1.weight"].shape)]
    assert masks.counts["layer2.0.conv1.weight"] in {int(np.count_nonzero(t)) for t in weights}

    out = tmp_path / "deep" / "m.onnx"
    written = place.onnx.stat().st_mtime_ns
    assert main(["export", str(run.path), "--level", "0", "--export", "onnx", "--out", str(out)]) == 0
    assert f"{out}: {int(row['kept_weights']):,} weights, onnxruntime within" in capsys.readouterr().out
    assert main(["export", str(run.path), "--level", "0", "--out", str(place.onnx)]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert place.onnx.stat().st_mtime_ns == written
    assert main(["export", str(run.path), "--level", "3", "--out", str(out)]) == 2
    assert "level 3 is not finished (finished: 0)" in capsys.readouterr().err
    assert main(["export", str(run.path), "--level", "0", "--average", "--out", str(out)]) == 2
    assert "average.safetensors: missing" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--level", "0", "--out", str(out)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_another_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = harness(tmp_path / "runs", "--export=tflite")
    assert (done.returncode, done.stderr) == (2, "sieve: --export=tflite: unknown format; write --export onnx\n")
    assert harness(tmp_path / "runs", "--export").stderr.startswith("sieve: --export: needs a value")
    assert not (tmp_path / "runs").exists()
