"""The pruning harness: rounds of score, normalise, select, check. It alone decides when a criterion runs, on what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.data.stateless import derive
from utils.masks import Masks, bare
from utils.params.graph import Graph
from utils.params.pruning import Pruning
from utils.pruning import controls, graphs, patterns
from utils.pruning.choose import choose, layer_counts, plan
from utils.pruning.counts import Counts
from utils.pruning.criteria import Batches, Loss, Scores, criterion, filled, options_of, read_options, traits_of
from utils.pruning.normalize import lamp
from utils.pruning.preserve import preserved, unchanged
from utils.pruning.rounds import Round, round_densities
from utils.system import distributed
from utils.system.errors import UserError

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Pruned:
    """The masks of a pruning, what each of its rounds did (one for one-shot methods), and lines for the reader."""

    masks: Masks
    rounds: tuple[Round, ...]
    notes: tuple[str, ...] = ()


class PruningHarness:
    """Prunes models as a `pruning` section says, or the layer graphs of a `graph` section.

    seed: of random scores, graphs and the order of ties; the same seed gives the same masks on every rank.
    loss: what gradient criteria differentiate, `(model, batch) -> scalar`; mean cross-entropy by default.
    input_shape: (channels, height, width) of the model's input, for criteria that make up their own.
    Raises UserError for unknown names and for options, patterns and layer densities that are malformed or do not go
    together.
    """

    def __init__(
        self,
        pruning: Pruning,
        graph: Graph | None = None,
        *,
        seed: int,
        loss: Loss | None = None,
        input_shape: Shape | None = None,
    ) -> None:
        self.pruning = pruning
        self.graph = graph or Graph()
        self.seed = seed
        self.loss: Loss = loss or cross_entropy
        self.input_shape = input_shape
        self.traits = traits_of(pruning.criterion)
        self.options = read_options(pruning.criterion, pruning.criterion_options)
        patterns.parse(pruning.pattern)
        if pruning.normalize == "lamp" and self.traits["signed"]:
            raise UserError(
                f"pruning.normalize=lamp: scores of {pruning.criterion!r} are signed, which it cannot rank; drop it"
            )

    @property
    def reads_data(self) -> bool:
        """Whether the criterion scores on training batches, which `prune` and `score` then need."""
        return self.graph.kind is None and bool(self.traits["reads"] == "train")

    @property
    def scoring(self) -> dict[str, Any]:
        """How much data to score on: `per_class`, `batches` (one of them None) and `batch_size`, settled."""
        section, traits = self.pruning, self.traits
        batches = section.batches if section.samples_per_class is None else None
        if batches is None and section.samples_per_class is None:
            batches = traits["batches"]
            if callable(batches):
                batches = batches(options_of(section.criterion) | self.options)
        per_class = None if batches is not None else section.samples_per_class or traits["samples_per_class"]
        return {"per_class": per_class, "batches": batches, "batch_size": section.batch_size}

    def start(self, model: nn.Module) -> Masks:
        """What a run prunes first: all prunable weights, or those of `pruning.mask_file`.

        Layers that the pattern cannot cover have no entry, as excluded ones. Raises UserError for a mask file that is
        another model's or prunes what is excluded here.
        """
        dense = Masks.dense(model, self.pruning.exclude)
        outside = self.outside(dense)
        dense = Masks({name: mask for name, mask in dense.items() if name not in outside})
        return dense if self.pruning.mask_file is None else _restrict(Path(self.pruning.mask_file), model, dense)

    def outside(self, masks: Masks) -> tuple[str, ...]:
        """Entries of `masks` that the pattern leaves whole and out of the density."""
        return patterns.outside(self.pruning.pattern, {name: tuple(mask.shape) for name, mask in masks.items()})

    def check(self, masks: Masks, densities: Sequence[float], iterative: bool) -> None:
        """Raise the UserError that pruning `masks` to `densities` would raise, without scoring anything.

        iterative: each density is pruned from the masks of the one before; else each from `masks`. Exact for single
        weights: what passes is pruned without complaint (NaN scores apart) and what works passes.
        """
        if self.graph.kind is not None:
            return
        start = counts = plan(self.pruning, masks)
        for density in densities:
            after = counts.pruned(density)
            counts = after if iterative else start

    def prune(self, model: nn.Module, masks: Masks | None, density: float | None, batches: Batches = ()) -> Pruned:
        """Masks of `density`, all of whose weights live in `masks` (None: what `start` gives).

        Exactly floor(density * total + 0.5) weights for single weights, the largest count whole groups reach for other
        patterns, what integer degrees give for graphs (where density is None in the form by degree). The model is left
        bitwise as it was: nothing is set to zero here. When `masks` already hold that many weights they are returned
        as they are. batches: this rank's share. Raises UserError for a density that cannot be reached and for NaN.
        """
        masks = self.start(model) if masks is None else masks.check(model)
        if self.graph.kind is not None:
            return self._graph(model, masks, density)
        assert density is not None
        pruned = self._in_rounds(model, masks, density, batches)
        if self.pruning.control == "shuffle":
            return replace(pruned, masks=controls.shuffle(pruned.masks, masks, self.seed))
        return pruned

    def _in_rounds(self, model: nn.Module, start: Masks, density: float, batches: Batches) -> Pruned:
        counts = plan(self.pruning, start)
        if counts.pruned(density) is counts:
            return Pruned(start, (Round(density, start.density),))
        batches = self._share(batches)
        masks, rounds, equal = start, [], 0
        with unchanged(bare(model)):
            for goal in self.densities(start.density, density):
                candidates = start if self.pruning.regrow else masks
                if not _feasible(plan(self.pruning, candidates), goal, masks, last=goal == density):
                    continue
                scores = self._score(model, masks, batches)
                equal += _all_equal(scores, candidates)
                masks = self.select(scores, candidates, goal)
                del scores  # the next round makes its own: two would be a copy of the weights too many
                rounds.append(Round(goal, masks.density))
        rounds[-1] = replace(rounds[-1], requested=density)  # what is left of rounds that came to the same count
        return Pruned(masks, tuple(rounds), self._told(equal, len(rounds)))

    def pick(self, scores: Scores, masks: Masks, density: float) -> Pruned:
        """`select` as a pruning of one round, with the note that `prune` gives when the scores decide nothing."""
        found = self.select(scores, masks, density)
        equal = found is not masks and _all_equal(scores, masks)
        return Pruned(found, (Round(density, found.density),), self._told(int(equal), 1))

    def _told(self, equal: int, rounds: int) -> tuple[str, ...]:
        """One line when the scores of `equal` of the `rounds` rounds were all the same."""
        if not equal:
            return ()
        where = f" in {equal} of {rounds} rounds" if rounds > 1 else ""
        return (
            f"all scores of pruning.criterion={self.pruning.criterion} were equal{where}: not they but the order of "
            "ties, drawn from run.seed, chose the weights (a last layer that starts at zero does that)",
        )

    @property
    def rounds(self) -> int:
        """Score-and-prune rounds of one pruning: those asked for, or the criterion's own."""
        return int(self.traits["rounds"] if self.pruning.rounds is None else self.pruning.rounds)

    def densities(self, start: float, target: float) -> list[float]:
        """The densities of the rounds of a pruning from `start` to `target`."""
        schedule = self.pruning.round_schedule or self.traits["schedule"]
        return round_densities(schedule, start, target, self.rounds)

    def score(self, model: nn.Module, masks: Masks, batches: Batches = ()) -> Scores:
        """The criterion's scores, checked: one tensor per entry of `masks`, of its shape, without NaN."""
        with unchanged(bare(model)):
            return self._score(model, masks, self._share(batches))

    def _score(self, model: nn.Module, masks: Masks, batches: Batches) -> Scores:
        name = self.pruning.criterion
        options = self.options | filled(name, input_shape=self.input_shape, everywhere=self.pruning.regrow)
        generator = torch.Generator().manual_seed(derive("criterion", self.seed))
        model = bare(model)
        device = next(model.parameters()).device
        with preserved(model, self._batchnorm), torch.autocast(device.type, enabled=False):
            scores = criterion[name](model, masks, batches, self.loss, generator=generator, **options)
        _check_scores(name, scores, masks)
        # What every rank computed for itself may differ in the last bits on GPUs: rank 0's scores are everyone's.
        return {key: distributed.broadcast(scores[key].detach().to(device)) for key in masks}

    @property
    def _batchnorm(self) -> str:
        """The criterion's BatchNorm mode; eval for channels: batch statistics undo any scale of a channel's weights."""
        mode: str = self.traits["batchnorm"]
        return "eval" if mode == "train" and self.pruning.pattern == "channel" else mode

    def select(self, scores: Scores, masks: Masks, density: float) -> Masks:
        """Masks of `density` from scores taken before; any number of densities can share one scoring."""
        section = self.pruning
        if section.normalize == "lamp":
            scores = lamp(scores, masks, squared=section.criterion == "magnitude")
        if section.control == "invert":
            scores = {name: -score for name, score in scores.items()}
        return choose(scores, masks, density, section, self.seed)

    def _share(self, batches: Batches) -> Batches:
        """This rank's batches as something that can be read again; none where the criterion reads none."""
        if not self.reads_data:
            return ()
        # Not by its truth: a rank's share may be empty.
        shared = batches if isinstance(batches, Sized) else list(batches)
        if not any(distributed.gather(len(shared))):
            raise UserError(f"pruning.criterion={self.pruning.criterion} reads training batches and was given none")
        return shared

    def _graph(self, model: nn.Module, masks: Masks, density: float | None) -> Pruned:
        counts = None
        if self.graph.degree is None:
            assert density is not None
            counts = layer_counts(masks, density, self.pruning, self.seed)
        drawn = graphs.build(model, masks, self.graph, counts, self.seed)
        requested = drawn.masks.density if density is None else density
        return Pruned(drawn.masks, (Round(requested, drawn.masks.density),), (drawn.summary(),))


def with_start(pruning: Pruning, criterion: str | None, allocation: str | None) -> Pruning:
    """The section that prunes level 0 of an iterative run (`levels.start`)."""
    if criterion is None:
        return pruning if allocation is None else replace(pruning, allocation=allocation)
    return replace(pruning, criterion=criterion, criterion_options=(), allocation=allocation or pruning.allocation)


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of `model` on a batch of (images, labels)."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def _feasible(counts: Counts, goal: float, masks: Masks, last: bool) -> bool:
    """Whether a round to `goal` prunes anything. The last one must; a density on the way may be out of reach.

    Fixed layers go to their density at once, so the others cannot hold what an early round would leave to them.
    """
    if math.floor(goal * masks.total + 0.5) >= masks.kept and not last:
        return False
    try:
        return counts.pruned(goal) is not counts
    except UserError:
        if last:
            raise
        return False


def _all_equal(scores: Scores, masks: Masks) -> bool:
    """Whether all live weights, two at least, have the same score."""
    if masks.kept < 2:
        return False
    bounds: list[Tensor] = []
    for name in masks:
        if masks.counts[name]:
            bounds.append(_bounds(scores[name].detach(), masks, name))
            # The first layer tells almost always; if not, a GPU is waited for once more, when all layers are read.
            if len(bounds) == 1 and not _agree(bounds):
                return False
    return _agree(bounds)


def _bounds(score: Tensor, masks: Masks, name: str) -> Tensor:
    """The lowest and the highest score of the layer's live weights, in float64 (exact) [2]."""
    if masks.counts[name] == score.numel():
        found = torch.aminmax(score)
        return torch.stack([found.min, found.max]).double()
    live = masks.on(score.device)[name]  # not score[live]: to know its size a GPU is waited for
    low = torch.where(live, score, math.inf).amin()
    return torch.stack([low, torch.where(live, score, -math.inf).amax()]).double()


def _agree(bounds: Sequence[Tensor]) -> bool:
    whole = torch.stack(list(bounds))
    return bool(whole[:, 0].amin() == whole[:, 1].amax())


def _restrict(path: Path, model: nn.Module, dense: Masks) -> Masks:
    given = Masks.load(path, model)
    for name, mask in given.items():
        if name not in dense and not bool(mask.all()):
            raise UserError(f"{path}: prunes {name!r}, which pruning.exclude or the pattern leaves whole; change one")
    return Masks({name: given.get(name, mask) for name, mask in dense.items()})


def _check_scores(name: str, scores: Mapping[str, torch.Tensor], masks: Masks) -> None:
    if odd := sorted(scores.keys() ^ masks.keys()):
        raise RuntimeError(f"criterion {name!r} must score the entries of the masks; first difference: {odd[0]!r}")
    for key, mask in masks.items():
        score = scores[key]
        if score.shape != mask.shape or not score.dtype.is_floating_point:
            raise RuntimeError(f"criterion {name!r} gave {key!r} scores of shape {tuple(score.shape)}, {score.dtype}")
    # A finite sum has no NaN in it, and is read in half the time of a minimum. One look at all: a GPU is waited for.
    sums = [scores[key].detach().sum() for key in masks]
    if sums and bool(torch.stack(sums).isfinite().all()):
        return
    for key in masks:
        if scores[key].numel() and bool(torch.isnan(scores[key].detach().min())):
            raise UserError(
                f"pruning.criterion={name}: NaN among the scores of {key!r}; its weights or gradients are not finite"
            )
