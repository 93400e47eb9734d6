"""Levels pruned before they train, by every kind of method, end to end on digits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import levels_cases
from tests.levels_cases import row, rows, run
from utils import files, models
from utils.masks import Masks
from utils.params import Params
from utils.system.errors import UserError
from utils.system.rundir import RunDir
from utils.training.trainer import Trainer

TOTAL = 270_896
"""Prunable weights of cifar/resnet20 for ten classes."""

INIT = {"pruning__moment": "init", "pruning__density": 0.2}
ITERATIVE = {"levels__count": 3, "levels__rate": 0.5}


def config(root: Path, **keys: object) -> Params:
    return levels_cases.config(root, 1, **keys)


def epochs(directory: RunDir, column: str, level: int = 0) -> list[float | None]:
    return [float(row[column]) if row[column] else None for row in rows(directory.level(level).epochs)]


def exact(density: float, total: int = TOTAL) -> int:
    return int(density * total + 0.5)


def kept(directory: RunDir) -> list[int]:
    return [int(line["kept_weights"]) for line in rows(directory.levels_csv)]


def mask(directory: RunDir, level: int = 0) -> Masks:
    return Masks.load(directory.level(level).mask)


def initial() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in models.build("cifar/resnet20", 10, seed=0).named_parameters()}


def flat(found: Masks) -> torch.Tensor:
    return torch.cat([bits.flatten() for bits in found.values()])


# Criteria and rounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {**INIT, "pruning__criterion": "snip", "pruning__samples_per_class": 1},
        {**INIT, "pruning__criterion": "grasp", "pruning__samples_per_class": 1},
        {**INIT, "pruning__criterion": "magnitude", "pruning__allocation": "erk", "training__ema": 0.9},
        {**ITERATIVE, "pruning__criterion": "taylor", "pruning__samples_per_class": 1, "levels__rewind": "imp"},
        {**INIT, "graph__kind": "rreg", "pruning__allocation": "erk"},
        {**INIT, "pruning__control": "shuffle"},
        {**INIT, "pruning__pattern": "kernel"},
    ],
)
def test_a_run_repeats_bit_for_bit_and_a_lost_row_comes_back(tmp_path: Path, keys: dict) -> None:
    first, second = run(config(tmp_path / "a", **keys)), run(config(tmp_path / "b", **keys))
    timing = ("seconds", "images_per_second")
    before = [{k: v for k, v in line.items() if k not in timing} for line in rows(first.levels_csv)]
    digests = [[(line["mask_digest"], line["weights_digest"]) for line in rows(d.levels_csv)] for d in (first, second)]
    assert digests[0] == digests[1]
    last = first.level(len(before) - 1).row
    stamp = last.stat().st_mtime_ns
    run(config(tmp_path / "a", **keys))
    assert last.stat().st_mtime_ns == stamp
    last.unlink()
    run(config(tmp_path / "a", **keys))
    assert [{k: v for k, v in line.items() if k not in timing} for line in rows(first.levels_csv)] == before


def test_a_criterion_that_reads_data_prunes_every_level(tmp_path: Path) -> None:
    directory = run(config(tmp_path, **ITERATIVE, pruning__criterion="taylor", pruning__samples_per_class=1))
    assert kept(directory) == [TOTAL, exact(0.5), exact(0.25)]
    assert mask(directory, 2) <= mask(directory, 1)
    found = rows(directory.levels_csv)
    assert [line["criterion"] for line in found] == ["", "taylor", "taylor"]
    assert [line["rounds"] for line in found] == ["", "1", "1"]
    assert [line["pattern"] for line in found] == ["", "weight", "weight"]


def test_rounds_are_on_record(tmp_path: Path) -> None:
    keys = {"pruning__criterion": "snip", "pruning__samples_per_class": 1, "pruning__rounds": 4}
    directory = run(config(tmp_path, **INIT, **keys, training__epochs=0))
    written = rows(directory.level(0).rounds)
    assert [line["round"] for line in written] == ["1", "2", "3", "4"]
    assert [float(line["requested"]) for line in written] == pytest.approx([0.2 ** (n / 4) for n in (1, 2, 3, 4)])
    assert [float(line["reached"]) for line in written] == [exact(float(line["requested"])) / TOTAL for line in written]
    assert row(directory)["rounds"] == "4"
    # The number is that of the masks' making, also when they are read back.
    directory.level(0).row.unlink()
    run(config(tmp_path, **INIT, **keys, training__epochs=0))
    assert row(directory)["rounds"] == "4"


def test_lamp_is_the_cumulative_share_of_squares(tmp_path: Path) -> None:
    directory = run(config(tmp_path, **INIT, pruning__normalize="lamp", training__epochs=0))
    weights, scores = initial(), []
    for name in mask(directory):
        squares = np.square(weights[name].numpy().astype(np.float64).reshape(-1))
        order = np.argsort(squares)
        above = np.cumsum(squares[order][::-1])[::-1]
        score = np.empty_like(squares)
        score[order] = squares[order] / above
        scores.append(score)
    best = np.argsort(np.concatenate(scores))[::-1][: exact(0.2)]
    chosen = np.zeros(TOTAL, dtype=bool)
    chosen[best] = True
    # Shares that agree to the last digits of float32 may change places at the cut.
    assert int((flat(mask(directory)).numpy() != chosen).sum()) <= 4
    assert kept(directory) == [exact(0.2)]


# Controls -------------------------------------------------------------------------------------------------------------


def test_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins: list[dict[str, torch.Tensor]] = []
    fit = Trainer.fit

    def spy(self: Trainer, *rest):
        begins.append({name: tensor.clone() for name, tensor in files.state_of(self.model).items()})
        return fit(self, *rest)

    monkeypatch.setattr(Trainer, "fit", spy)
    kinds = ("none", "shuffle", "reinitialise", "invert")
    found = {}
    for kind in kinds:
        keys = {**INIT, "pruning__density": 0.5, "pruning__allocation": "uniform", "training__epochs": 0}
        found[kind] = run(config(tmp_path / kind, **keys, pruning__control=kind))
    assert {kind: row(directory)["control"] for kind, directory in found.items()} == {
        "none": "",
        "shuffle": "shuffle",
        "reinitialise": "reinitialise",
        "invert": "invert",
    }
    masks = {kind: mask(directory) for kind, directory in found.items()}
    plain, states = masks["none"], dict(zip(kinds, begins, strict=True))
    weights = initial()
    assert masks["shuffle"].counts == plain.counts
    assert masks["shuffle"].digest != plain.digest
    assert masks["reinitialise"].digest == plain.digest
    for name, bits in plain.items():
        assert torch.equal(states["none"][name], weights[name] * bits)
        assert torch.equal(states["shuffle"][name], weights[name] * masks["shuffle"][name])
        assert not torch.equal(states["reinitialise"][name], states["none"][name])
        assert states["reinitialise"][name][~bits].eq(0).all()
        # The lowest magnitudes are those left over: half of every layer.
        low, high = weights[name][masks["invert"][name]].abs(), weights[name][~masks["invert"][name]].abs()
        assert low.max() <= high.min()


def test_reinitialised_weights_are_those_of_every_rewound_level(tmp_path: Path) -> None:
    keys = {**ITERATIVE, "levels__rewind": "imp", "pruning__control": "reinitialise"}
    control = run(config(tmp_path / "c", **keys))
    plain = run(config(tmp_path / "p", **{**keys, "pruning__control": "none"}))
    assert row(control, 0)["weights_digest"] == row(plain, 0)["weights_digest"]
    assert row(control, 1)["mask_digest"] == row(plain, 1)["mask_digest"]
    assert row(control, 1)["weights_digest"] != row(plain, 1)["weights_digest"]
    assert [row(control, level)["control"] for level in (0, 1)] == ["", "reinitialise"]
    unlike = run(config(tmp_path / "s", **{**keys, "levels__epochs": [1, 0, 0]}))
    start = files.load_weights(unlike.level(1).weights)
    found = mask(unlike, 1)
    for name, weight in initial().items():
        if name in found:
            assert start[name][~found[name]].eq(0).all()
            assert not torch.equal(start[name], weight * found[name])


# Patterns -------------------------------------------------------------------------------------------------------------


def test_two_of_four_along_the_inputs(tmp_path: Path) -> None:
    directory = run(config(tmp_path, pruning__moment="oneshot", pruning__density=0.5, pruning__pattern="2:4"))
    found = mask(directory, 1)
    assert "conv1.weight" not in found  # three inputs do not divide by four: whole, and outside the density
    assert found.total == TOTAL - 3 * 16 * 9
    assert found.kept * 2 == found.total
    before = files.load_weights(directory.level(0).weights)
    for name, bits in found.items():
        outputs, inputs = bits.shape[:2]
        groups = bits.view(outputs, inputs // 4, 4, -1)
        assert groups.sum(2).eq(2).all()
        sizes = before[name].abs().view(outputs, inputs // 4, 4, -1)
        least = sizes.masked_fill(~groups, torch.inf).amin(2)
        assert bool((least >= sizes.masked_fill(groups, -1.0).amax(2)).all())
    assert row(directory, 1)["pattern"] == "2:4"
    assert files.load_weights(directory.level(1).weights)["conv1.weight"].ne(0).all()


def test_two_of_four_has_one_density(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pruning\.pattern=2:4") as caught:
        run(config(tmp_path / "runs", pruning__moment="oneshot", pruning__density=0.3, pruning__pattern="2:4"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("pattern", "slack"),
    [("kernel", 9), ("block=4x4", 16), ("channel", 64 * 9)],
)
def test_whole_groups_over_levels(tmp_path: Path, pattern: str, slack: int) -> None:
    directory = run(config(tmp_path, **ITERATIVE, pruning__pattern=pattern))
    masks = [mask(directory, level) for level in range(3)]
    total = masks[0].total
    assert total == (TOTAL - 640 if pattern == "channel" else TOTAL)
    for level, (before, found) in enumerate(itertools.pairwise(masks), start=1):
        assert found <= before
        assert exact(0.5**level, total) - slack < found.kept <= exact(0.5**level, total)
        for bits in found.values():
            outputs, inputs = bits.shape[:2]
            if pattern == "kernel":
                groups = bits.view(outputs * inputs, -1)
            elif pattern == "channel":
                groups = bits.view(outputs, -1)
            else:
                if inputs < 4:
                    continue
                groups = bits[: outputs // 4 * 4, : inputs // 4 * 4].reshape(outputs // 4, 4, inputs // 4, 4, -1)
                groups = groups.permute(0, 2, 4, 1, 3).reshape(-1, 16)
            assert bool((groups.all(1) | ~groups.any(1)).all())
        line = row(directory, level)
        assert (line["pattern"], line["kept_weights"]) == (pattern, str(found.kept))
        assert float(line["target_density"]) == pytest.approx(0.5**level)


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "xnet", "rreg"])
def test_graphs_by_degree(tmp_path: Path, kind: str) -> None:
    keys = {"pruning__moment": "init", "graph__kind": kind, "graph__degree": 4, "pruning__exclude": ["conv1.weight"]}
    directory = run(config(tmp_path, **keys))
    found, line = mask(directory), row(directory)
    for bits in found.values():
        kernels = bits.flatten(2) if bits.dim() > 2 else bits[..., None]
        assert bool((kernels.all(2) == kernels.any(2)).all())
        edges = kernels.any(2)
        assert int(edges.sum()) >= 4 * max(edges.shape) if kind == "rreg" else bool(edges.any())
        if kind == "xnet":  # every input has the degree, or all outputs there are
            assert edges.sum(0).eq(min(4, len(edges))).all()
    assert line["density"] == line["target_density"] == str(found.kept / found.total)
    assert (line["pattern"], line["criterion"], line["allocation"]) == (f"graph {kind}", "", "")


@pytest.mark.parametrize("kind", ["random", "xnet", "rreg"])
def test_graphs_by_density(tmp_path: Path, kind: str) -> None:
    keys = {"graph__kind": kind, "pruning__allocation": "erk", "pruning__exclude": ["conv1.weight"]}
    line = row(run(config(tmp_path, **INIT, **keys)))
    assert float(line["target_density"]) == 0.2
    assert float(line["density"]) == pytest.approx(0.2, abs=0.03)
    assert (line["pattern"], line["criterion"], line["allocation"], line["dead_layers"]) == (
        f"graph {kind}",
        "",
        "erk",
        "0",
    )


# Collapse -------------------------------------------------------------------------------------------------------------


def test_a_mask_that_cuts_the_network_stops_before_training_unless_allowed(tmp_path: Path) -> None:
    keys = {"pruning__moment": "init", "pruning__density": 0.0005}
    with pytest.raises(UserError, match=r"no path is left from input to output \(emptied: ") as caught:
        run(config(tmp_path, **keys))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("epochs.csv"))
    assert not list(tmp_path.rglob("weights.safetensors"))
    line = row(run(config(tmp_path, **keys, pruning__allow_disconnected=True)))
    assert int(line["kept_weights"]) == exact(0.0005)
    assert int(line["dead_layers"]) > 0
    assert float(line["effective_density"]) == 0.0


def test_effective_density_leaves_out_what_is_on_no_path(tmp_path: Path) -> None:
    """All inputs of the classifier but one are cut off, so what feeds only the other channels is on no path."""
    model = models.build("cifar/resnet20", 10)
    masks = {name: bits.clone() for name, bits in Masks.dense(model).items()}
    last = list(masks)[-1]
    assert masks[last].shape == (10, 64)
    masks[last][:, 1:] = False
    Masks(masks).save(tmp_path / "m.safetensors")
    keys = {"pruning__moment": "init", "pruning__mask_file": str(tmp_path / "m.safetensors"), "training__epochs": 0}
    line = row(run(config(tmp_path / "runs", **keys)))
    second = list(masks)[-2]
    # The last convolution's other 63 outputs go; without its shortcut the block before would lose as many of its own.
    assert masks[second].shape == (64, 64, 3, 3)
    effective = float(line["effective_density"]) * TOTAL
    assert effective <= float(line["density"]) * TOTAL - 63 * 64 * 9
    assert effective >= TOTAL - 10 * 63 - 5 * 63 * 64 * 9
