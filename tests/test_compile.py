"""torch.compile end to end: masks hold, and no graph is compiled again when a level changes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils import files, levels
from utils.masks import Masks
from utils.params.load import build
from utils.system.console import Console
from utils.system.distributed import World


@pytest.mark.timeout(280)
def test_levels_share_their_compiled_graphs(tmp_path: Path, monkeypatch) -> None:
    params = build(
        {
            "run.root": str(tmp_path),
            "data.name": "digits",
            "data.loader": "device",
            "data.val": 0,
            "data.subset": 320,
            "model.name": "cifar/resnet20",
            "training.epochs": 1,
            "training.batch_size": 64,
            "training.precision": "float32",
            "training.compile": True,
            "levels.densities": [0.5, 0.2],
        }
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    real = levels.Driver._save

    def counted(self: levels.Driver, *arguments):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return real(self, *arguments)

    monkeypatch.setattr(levels.Driver, "_save", counted)
    directory = levels.Driver(params, World(), torch.device("cpu"), Console(main=False)).run()
    assert graphs[0] >= 2  # training and evaluation
    assert graphs == [graphs[0]] * 3
    for number in range(3):
        mask, weights = Masks.load(directory.level(number).mask), files.load_weights(directory.level(number).weights)
        assert not any(name.startswith("_orig_mod") for name in weights)
        assert all(weights[name][~bits].eq(0).all() for name, bits in mask.items())
