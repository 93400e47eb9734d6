"""Run by torchrun: scores of ProsPr or NTK-SAP on this rank's share, written to OUT/<rank>.json. CASE OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from utils.masks import Masks
from utils.pruning.criteria.ntk_sap import ntk_sap
from utils.pruning.criteria.prospr import prospr
from utils.pruning.harness import cross_entropy
from utils.system import distributed


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers)


def main(case: str, out: Path) -> None:
    place = distributed.world()
    distributed.start(place, torch.device("cpu"))
    model = net()
    masks, generator = Masks.dense(model), torch.Generator().manual_seed(3)
    if case == "prospr":
        source = torch.Generator().manual_seed(1)
        data = [(torch.randn(4 + i, 2, 4, 4, generator=source), torch.arange(4 + i) % 3) for i in range(5)]
        data[1] = (data[1][0].contiguous(memory_format=torch.channels_last), data[1][1])
        scores = prospr(
            model.train(), masks, data[place.rank :: place.size], cross_entropy, generator=generator, steps=3
        )
    else:
        shape = (2, 4, 4)
        scores = ntk_sap(
            model.eval(), masks, (), cross_entropy, generator=generator, input_shape=shape, draws=4, samples=8
        )
    flat = torch.cat([score.flatten() for score in scores.values()])
    row = {"scores": flat.tolist(), "mask": flat.argsort(descending=True)[: len(flat) // 3].sort().values.tolist()}
    (out / f"{place.rank}.json").write_text(json.dumps(row))
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
