"""Structured first, then unstructured: single weights within smaller networks; averages; what is refused no longer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.levels_cases import rows
from tests.test_structured_levels import SHAPE, run, structured
from utils import files, models
from utils.masks import Masks
from utils.models.widths import WidthFile
from utils.params import Params
from utils.pruning.structured.cost import counted_macs
from utils.reporting.verify import verify
from utils.structured_levels import StructuredDriver
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import RunDir
from utils.training.evaluate import evaluate

KEYS = {
    "pruning__moment": "levels",
    "structured__keep": [0.7, 0.5],
    "pruning__density": 0.4,
    "training__ema": 0.5,
    "recipe__smoothing__schedule": "constant",
    "training__gradient_norms": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, RunDir]:
    params = structured(tmp_path_factory.mktemp("singles"), 1, **KEYS)
    return params, run(params)


def test_each_level_keeps_its_share_of_the_smaller_network(finished: tuple[Params, RunDir]) -> None:
    directory = finished[1]
    table = rows(directory.levels_csv)
    assert not directory.level(0).mask.exists()
    assert verify(directory) == []
    for number in (1, 2):
        place, row = directory.level(number), table[number]
        network = models.rebuild(place.widths, place.weights)
        masks = Masks.load(place.mask, network)
        assert masks.kept == int(0.4 * masks.total + 0.5) == int(row["kept_weights"])
        assert float(row["density"]) == masks.kept / int(row["prunable_weights"])
        assert row["mask_digest"] == masks.digest
        parameters = dict(network.named_parameters())
        assert all(not bool((parameters[name] != 0)[~mask].any()) for name, mask in masks.items())
        assert int(row["macs"]) < 0.6 * counted_macs(network, SHAPE)
        assert row["criterion"] == "l1, magnitude"
        layers = {layer["name"]: layer for layer in rows(place.layers)}
        assert int(layers["layer1.0.conv1.weight"]["kept"]) == masks.counts["layer1.0.conv1.weight"]


def test_masks_carry_over_to_the_next_level(tmp_path: Path) -> None:
    """Of one layer, by hand: what level 1 pruned among the channels that level 2 keeps stays pruned.

    At random, for by magnitude what is 0.0 already would go first whatever the mask says.
    """
    keys = {**KEYS, "pruning__criterion": "random", "training__gradient_norms": 0}
    directory = run(structured(tmp_path, 0, **keys))
    name, group, reads = "layer2.1.conv1.weight", "layer2.1.conv1", "layer2.0.conv2"
    whole = []
    for number in (1, 2):
        place = directory.level(number)
        channels = WidthFile.load(place.widths).facts["channels"]
        mask = Masks.load(place.mask, models.rebuild(place.widths))[name]
        full = torch.zeros(32, 32, 3, 3, dtype=torch.bool)
        for row, unit in enumerate(channels[group]):
            for column, other in enumerate(channels[reads]):
                full[unit, other] = mask[row, column]
        whole.append(full)
    assert int(whole[1].sum()) < int(whole[0].sum())
    assert not bool((whole[1] & ~whole[0]).any())


def test_averages_are_written_and_are_what_the_row_says(finished: tuple[Params, RunDir]) -> None:
    params, directory = finished
    for number in (0, 2):
        place = directory.level(number)
        raw, average = files.load_weights(place.weights), files.load_weights(place.average)
        assert {name: t.shape for name, t in raw.items()} == {name: t.shape for name, t in average.items()}
        assert not torch.equal(raw["conv1.weight"], average["conv1.weight"])
        found = evaluate(params, place, True, World(), torch.device("cpu"))
        assert found.agreement == "exact"
        assert place.gradients.is_file()


def test_weights_are_masked_before_the_network_is_first_evaluated(tmp_path: Path) -> None:
    params = structured(tmp_path, 0, pruning__density=0.3)
    driver = StructuredDriver(params, World(), torch.device("cpu"), Console(main=False))
    cut = driver.singles.prune(driver.channels.whole(), Console(main=False))
    driver.loaders.close()
    assert cut.masks is not None
    assert cut.masks.kept == int(0.3 * cut.masks.total + 0.5)
    for name, p in cut.model.named_parameters():
        assert name not in cut.masks or torch.equal(p != 0, cut.masks[name])


def test_effective_density_leaves_out_what_no_path_reaches(tmp_path: Path) -> None:
    """With one filter pruned whole, the weights that read its channel carry nothing."""
    params = structured(tmp_path, 0, pruning__density=0.3)
    driver = StructuredDriver(params, World(), torch.device("cpu"), Console(main=False))
    driver.loaders.close()
    cut = driver.channels.whole()
    tensors = {name: mask.clone() for name, mask in Masks.dense(cut.model).items()}
    tensors["layer1.0.conv1.weight"][0] = False
    cut = replace(cut, masks=Masks(tensors))
    whole = driver.singles.of_searched(cut)
    assert whole.total - whole.kept == 16 * 9
    assert driver.singles.effective(cut, whole) == (whole.total - 2 * 16 * 9) / whole.total


def copied(run_dir: RunDir, root: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(run_dir.path, root / run_dir.path.name)))


@pytest.mark.parametrize("fault", ["missing", "another one"])
def test_a_level_without_its_mask_is_found_and_not_gone_on_from(
    finished: tuple[Params, RunDir], tmp_path: Path, fault: str
) -> None:
    """As if all its weights lived, the level after it would be another."""
    directory = copied(finished[1], tmp_path)
    mask = directory.level(1).mask
    dense = {name: torch.ones_like(values) for name, values in Masks.load(mask).items()}
    mask.unlink()
    if fault == "another one":
        Masks(dense).save(mask)
    told = "missing, level 1 pruned single weights" if fault == "missing" else "mask_digest"
    assert any(told in problem for problem in verify(directory))
    directory.level(2).row.unlink()
    with pytest.raises(UserError, match=rf"level_01/mask\.safetensors: {fault}; level 1 was trained in"):
        run(replace(finished[0], run=replace(finished[0].run, root=str(tmp_path))))


def test_a_row_of_another_mask_is_found(finished: tuple[Params, RunDir], tmp_path: Path) -> None:
    directory = copied(finished[1], tmp_path)
    path = directory.level(1).row
    path.write_text(path.read_text().replace(json.loads(path.read_text())["mask_digest"], "0" * 64))
    assert [problem for problem in verify(directory) if f"{path}: mask_digest is 0000" in problem]


def test_a_missing_average_is_found(finished: tuple[Params, RunDir], tmp_path: Path) -> None:
    directory = copied(finished[1], tmp_path)
    for number in (0, 1):
        directory.level(number).average.unlink()
    assert [problem.rpartition(": ")[2] for problem in verify(directory)] == ["missing, training.ema is set"] * 2


def test_fresh_weights_are_pruned_too(tmp_path: Path) -> None:
    keys = {"structured__criterion": "random", "structured__fresh": True, "pruning__criterion": "snip"}
    directory = run(structured(tmp_path, 0, pruning__density=0.3, **keys))
    place = directory.level(0)
    fresh = models.rebuild(place.widths)
    masks = Masks.load(place.mask, fresh)
    assert masks.kept == int(0.3 * masks.total + 0.5)
    masks.apply_(fresh)
    assert files.digest(files.state_of(fresh)) == files.digest(files.load_weights(place.weights))
