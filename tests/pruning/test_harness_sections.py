"""What a `pruning` or `graph` section says, as the harness does it: data, starts, patterns, controls, layer graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.masks import Masks
from utils.params.graph import Graph
from utils.params.pruning import Pruning
from utils.pruning import controls, prune
from utils.pruning.harness import PruningHarness, Round, with_start
from utils.system.errors import UserError


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


def harness(**section: Any) -> PruningHarness:
    return PruningHarness(Pruning(**section), seed=2)


def images(seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 4)]


@pytest.mark.parametrize(
    ("section", "per_class", "batches"),
    [
        ({"criterion": "snip"}, 10, None),
        ({"criterion": "grasp"}, 25, None),
        ({"criterion": "crop"}, None, 5),
        ({"criterion": "snip", "samples_per_class": 3}, 3, None),
        ({"criterion": "snip", "batches": 2}, None, 2),
        ({"criterion": "crop", "samples_per_class": 3}, 3, None),
        ({"criterion": "crop", "batches": 2}, None, 2),
    ],
)
def test_how_much_data_is_scored_on(section: dict[str, Any], per_class: int | None, batches: int | None) -> None:
    assert harness(**section).scoring == {"per_class": per_class, "batches": batches, "batch_size": 128}
    assert harness(**section, batch_size=7).scoring["batch_size"] == 7
    assert harness(**section).reads_data


def test_who_reads_no_data() -> None:
    assert not any(harness(criterion=name).reads_data for name in ("magnitude", "random", "synflow", "ntk_sap"))
    assert not PruningHarness(Pruning(criterion="snip"), Graph("random", 2), seed=0).reads_data


@pytest.mark.parametrize("name", ["synflow", "ntk_sap"])
def test_criteria_that_run_the_network_need_its_input_shape(name: str) -> None:
    with pytest.raises(UserError, match=f"^pruning.criterion={name} .* needs input_shape="):
        harness(criterion=name).prune(net(), None, 0.5)
    assert prune(net(), density=0.5, criterion=name, batches=images(), rounds=1).density == pytest.approx(0.5, abs=1e-3)


def test_data_criteria_without_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"pruning\.criterion=snip reads training batches and was given none"):
        harness(criterion="snip").prune(net(), None, 0.5, [])


def test_scoring_batches_are_read_again_in_every_round_from_any_iterable() -> None:
    once = harness(criterion="snip", rounds=3).prune(net(), None, 0.2, iter(images()))
    assert once == harness(criterion="snip", rounds=3).prune(net(), None, 0.2, images())


def test_vectors_are_images_too() -> None:
    batch = (torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert prune(nn.Linear(5, 3), density=0.4, criterion="snip", batches=[batch]).kept == 6


def test_lamp_ranks_by_the_share_of_the_layer() -> None:
    """Weights 1, 2 and 10, 20: shares of squares are 1/5, 1 and 1/5, 1; by magnitude the second layer has all."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False))
    for layer, scale in zip(model, (1.0, 10.0), strict=True):
        layer.weight.data = torch.tensor([[1.0, -2.0]]) * scale
    found = prune(model, density=0.5, normalize="lamp")
    assert [mask.tolist() for mask in found.values()] == [[[False, True]], [[False, True]]]
    assert [mask.tolist() for mask in prune(model, density=0.5).values()] == [[[False, False]], [[True, True]]]


def test_lamp_is_refused_for_signed_scores_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"^pruning\.normalize=lamp: scores of 'grasp' are signed"):
        harness(criterion="grasp", normalize="lamp")


def test_lamp_in_rounds_counts_live_weights_alone() -> None:
    found = harness(criterion="snip", normalize="lamp", rounds=4).prune(net(), None, 0.1, images())
    assert found.masks.kept == math.floor(0.1 * found.masks.total + 0.5)
    assert min(found.masks.counts.values()) > 0


@pytest.mark.parametrize("normalize", ["none", "lamp"])
def test_invert_keeps_what_the_criterion_would_prune(normalize: str) -> None:
    model = net()
    total = Masks.dense(model).total
    keep = total // 4
    best = prune(model, density=(total - keep) / total, normalize=normalize)
    worst = prune(model, density=keep / total, normalize=normalize, control="invert")
    assert worst.kept == keep
    ties = 0 if normalize == "none" else 8  # best-of-layer shares are 1 in every layer
    assert sum(int((worst[name] & best[name]).sum()) for name in best) <= ties


def test_shuffle_keeps_every_layers_count_at_other_live_places() -> None:
    model = net()
    start = prune(model, density=0.6)
    plain = prune(model, density=0.2, masks=start)
    shuffled = prune(model, density=0.2, masks=start, control="shuffle", seed=1)
    assert shuffled.counts == plain.counts
    assert shuffled != plain
    assert shuffled <= start
    assert shuffled == controls.shuffle(plain, start, 1)
    assert shuffled != controls.shuffle(plain, start, 2)


def test_shuffled_places_are_uniform_over_the_live_ones() -> None:
    """Each of 60 live places of 100 is kept 30 times of 60 in the mean; a bound of 6 deviations over 400 seeds."""
    live = Masks({"w": (torch.arange(100) < 60).reshape(10, 10)})
    kept = Masks({"w": (torch.arange(100) < 30).reshape(10, 10)})
    seen = sum(controls.shuffle(kept, live, seed)["w"].flatten().int() for seed in range(400))
    assert isinstance(seen, Tensor)
    assert int(seen[60:].sum()) == 0
    assert int(seen.sum()) == 400 * 30
    assert float((seen[:60] - 200.0).abs().max()) < 6 * math.sqrt(400 * 0.25)


def test_the_reinitialising_seed_is_another_one_that_torch_takes() -> None:
    seeds = [controls.fresh_seed(seed) for seed in range(50)]
    assert len(set(seeds)) == 50
    assert not {*seeds} & {*range(50)}
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_mask_file_is_what_pruning_starts_from(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "m.safetensors"
    start = prune(model, density=0.5, criterion="random")
    start.save(path)
    assert harness(mask_file=str(path)).start(model) == start
    pruned = harness(mask_file=str(path)).prune(model, None, 0.2)
    assert pruned.masks <= start
    assert pruned.masks == prune(model, density=0.2, masks=start, seed=2)
    with pytest.raises(UserError, match=r"largest feasible density is 0\.5"):
        harness(mask_file=str(path)).prune(model, None, 0.7)


def test_a_mask_file_and_exclude(tmp_path: Path) -> None:
    """A file may leave excluded layers whole or out; it may not prune them. Layers it lacks are dense."""
    model, path = net(), tmp_path / "m.safetensors"
    start = prune(model, density=0.5, exclude=["8.*"])
    start.save(path)
    assert harness(mask_file=str(path), exclude=("8.*",)).start(model) == start
    wider = harness(mask_file=str(path)).start(model)
    assert list(wider) == list(Masks.dense(model))
    assert wider.counts == {**start.counts, "8.weight": 48}
    with pytest.raises(UserError, match=r"m\.safetensors: prunes '0\.weight', which pruning\.exclude .* change one"):
        harness(mask_file=str(path), exclude=("0.*",)).start(model)


def test_mask_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=r"m\.safetensors"):
        harness(mask_file=str(path)).start(model)
    prune(nn.Linear(3, 3), density=0.5).save(path)
    with pytest.raises(UserError, match="weight"):
        harness(mask_file=str(path)).start(model)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"m\.safetensors"):
        harness(mask_file=str(path)).start(model)


def test_layers_a_pattern_cannot_cover_stay_out() -> None:
    model = net()  # inputs: 3, 8, 16, 12
    two_four = harness(pattern="2:4")
    start = two_four.start(model)
    assert list(start) == ["2.weight", "6.weight", "8.weight"]
    assert two_four.outside(Masks.dense(model)) == ("0.weight",)
    found = two_four.prune(model, None, 0.5).masks
    for name, mask in found.items():
        groups = mask.reshape(mask.shape[0], -1, 4, *mask.shape[2:]).sum(2)
        assert groups.unique().tolist() == [2], name
    assert found.kept * 2 == found.total
    with pytest.raises(UserError, match=r"2:4 keeps 0\.5 of the weights; set pruning\.density=0\.5"):
        two_four.prune(model, None, 0.4)
    with pytest.raises(UserError, match=r"inputs of '0\.weight' do not divide by 4"):
        two_four.prune(model, Masks.dense(model), 0.5)


def test_n_of_m_with_a_mask_file_that_prunes_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    prune(net(), density=0.9, layer_densities=["0.*=0.5"]).save(path)
    with pytest.raises(UserError, match=r"prunes '0\.weight', which pruning\.exclude or the pattern leaves whole"):
        harness(pattern="2:4", mask_file=str(path)).start(net())


@pytest.mark.parametrize("pattern", ["3:2", "block=0x1", "rows", "2;4"])
def test_malformed_patterns_are_refused_when_the_harness_is_made(pattern: str) -> None:
    with pytest.raises((UserError, ValueError), match=r"pattern"):
        harness(pattern=pattern)


def test_graphs_by_degree() -> None:
    model = net()
    drawn = PruningHarness(Pruning(), Graph("xnet", 2, side="out"), seed=3).prune(model, None, None)
    for name, mask in drawn.masks.items():
        edges = mask.flatten(2).any(2) if mask.ndim == 4 else mask
        assert edges.sum(1).tolist() == [2] * len(edges), name
        if mask.ndim == 4:
            assert torch.equal(mask.flatten(2).all(2), edges)
    assert drawn.rounds == (Round(drawn.masks.density, drawn.masks.density),)
    assert len(drawn.notes) == 1


@pytest.mark.parametrize("kind", ["random", "xnet", "rreg"])
def test_graphs_by_density(kind: str) -> None:
    model = net()
    section, seeds = Pruning(allocation="uniform"), (3, 3, 4)
    first, again, other = (PruningHarness(section, Graph(kind), seed=s).prune(model, None, 0.5) for s in seeds)
    assert first == again
    assert first.masks != other.masks
    assert first.rounds == (Round(0.5, first.masks.density),)
    assert "asked for" in first.notes[0]
    for name, mask in first.masks.items():
        largest = max(mask.shape[:2]) * math.prod(mask.shape[2:])
        assert abs(int(mask.sum()) - 0.5 * mask.numel()) <= largest, name


def test_graphs_need_whole_layers() -> None:
    half = prune(net(), density=0.5)
    with pytest.raises(UserError, match="graphs are drawn on whole layers"):
        PruningHarness(Pruning(allocation="erk"), Graph("random"), seed=0).prune(net(), half, 0.3)


def test_check_foretells_what_pruning_does() -> None:
    model = net()
    bounded = harness(layer_densities=("0.*=1",))
    start = bounded.start(model)
    smallest = 216 / start.total
    bounded.check(start, [0.9, 0.5, smallest], iterative=True)
    with pytest.raises(UserError, match="smallest feasible density is") as told:
        bounded.check(start, [0.9, smallest / 2], iterative=True)
    with pytest.raises(UserError) as met:
        bounded.prune(model, start, smallest / 2)
    assert str(told.value) == str(met.value)
    with pytest.raises(UserError, match=r"largest feasible density is 0\.5"):
        harness().check(start, [0.5, 0.9], iterative=True)
    harness().check(start, [0.5, 0.9], iterative=False)
    PruningHarness(Pruning(), Graph("random", 2), seed=0).check(start, [7.0], iterative=False)


def test_level_zero_may_have_a_criterion_and_an_allocation_of_its_own() -> None:
    section = Pruning(criterion="snip", criterion_options=("a=b",), allocation="erk", pattern="kernel")
    assert with_start(section, None, None) is section
    assert with_start(section, None, "uniform") == Pruning("snip", ("a=b",), allocation="uniform", pattern="kernel")
    assert with_start(section, "grasp", None) == Pruning("grasp", allocation="erk", pattern="kernel")
    assert with_start(section, "grasp", "er") == Pruning("grasp", allocation="er", pattern="kernel")


def test_two_names_of_one_method_agree() -> None:
    """On one batch |mean of w g| is |w| times |mean g|."""
    options: dict[str, Any] = {"density": 0.1, "batches": images()}
    assert prune(net(), criterion="snip", **options) == prune(net(), criterion="taylor", **options)
