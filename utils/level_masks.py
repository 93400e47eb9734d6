"""The masks a level begins with: computed by every rank, written by rank 0, read back when they are there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import files, pruning, sparsity
from utils.data import Loaders
from utils.masks import Masks
from utils.params import Params
from utils.params.plan import Level
from utils.pruning import paths
from utils.pruning.harness import Pruned, with_start
from utils.pruning.report import write_layers_csv, write_rounds_csv
from utils.pruning.rounds import Round
from utils.pruning.select import kept_count
from utils.pruning.structured.cost import MaskedCost
from utils.system import distributed
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import LevelDir, RunDir
from utils.tasks.classification import ImageClassification

Weights = Mapping[str, torch.Tensor]


def changes_masks(params: Params) -> bool:
    """Whether masks change while a level trains."""
    return params.dynamic.method is not None or params.pruning.moment in ("step", "early")


class LevelMasks:
    """Prunes the model for every level of a run, and says what a mask leaves of it."""

    def __init__(
        self,
        params: Params,
        model: nn.Module,
        task: ImageClassification,
        loaders: Loaders,
        run: RunDir,
        world: World,
        console: Console,
    ) -> None:
        """`model` is on its device. Raises UserError for a pruning section that cannot work."""
        self.params, self.model, self.loaders, self.run = params, model, loaders, run
        self.world, self.console = world, console
        side = loaders.spec.image_size
        self.input_shape = (3, side, side)
        build = functools.partial(
            pruning.PruningHarness,
            graph=params.graph,
            seed=params.run.seed,
            loss=task.scoring_loss,
            input_shape=self.input_shape,
        )
        self.harness = build(params.pruning)
        begin = with_start(params.pruning, params.levels.start_criterion, params.levels.start_allocation)
        self.starter = self.harness if begin == params.pruning else build(begin)
        self.start = self.harness.start(model)
        self.sparsity = sparsity.attach(model, None, _whole(self.start))
        self.rounds: int | None = None
        """Score-and-prune rounds of the pruning made last; None where nothing was scored."""
        self.source_digest = ""
        """Digest of the weights the masks of the level at work were made from."""
        self._history: tuple[Round, ...] = ()
        self._told: list[str] = []
        self._effective: tuple[str, paths.Effective] | None = None
        self._cost: MaskedCost | None = None

    def begin(self, level: Level, place: LevelDir, source: Weights) -> Masks:
        """The masks `level` begins with, from the weights `source` of the level it prunes. Leaves these in the model.

        Raises UserError for masks that cut the input off from the output, unless pruning.allow_disconnected is set.
        """
        # Scores see every gradient: the masks of the level before are still attached.
        self.sparsity.watch(None)
        self.sparsity.set(_whole(self.start))
        files.put_weights(self.model, source)
        live = self.start if level.source is None else Masks.load(self.run.level(level.source).mask, self.model)
        digest = self.source_digest = files.digest(source)
        path = place.start_mask if changes_masks(self.params) else place.mask
        if distributed.from_main(lambda: path.exists() and source_of(path) == digest):
            masks = Masks.load(path, self.model)
            self.rounds = _rounds_of(path)
        else:
            pruned = self._prune(level, live)
            masks, self.rounds = pruned.masks, len(pruned.rounds) or None
            self._tell(pruned)
            distributed.from_main(functools.partial(self._save, place, path, pruned, digest))
        if not masks <= live:
            raise UserError(f"{path}: keeps weights that level {level.source} pruned; delete it and run again")
        distributed.agree(f"masks of level {level.number}", masks.digest)
        self.check_connected(masks)
        return masks

    def _prune(self, level: Level, live: Masks) -> Pruned:
        harness = self.starter if level.number == 0 and self.params.levels.start is not None else self.harness
        if self.params.graph.degree is not None:
            return harness.prune(self.model, live, None)
        if live.kept <= kept_count(level.begins, live.total) and self.params.graph.kind is None:
            return Pruned(live, ())
        return self.prune(live, level.begins, harness)

    def prune(self, live: Masks, density: float, harness: pruning.PruningHarness | None = None) -> Pruned:
        """Prune the model as it is now to `density`. Gradients are left unmasked meanwhile."""
        harness = harness or self.harness
        if not harness.reads_data:
            return self._dense(harness, live, density, ())
        batches = self.loaders.scoring(**harness.scoring, rank=self.world.rank, ranks=self.world.size)
        try:
            return self._dense(harness, live, density, batches)
        finally:
            batches.close()

    def _dense(self, harness: pruning.PruningHarness, live: Masks, density: float, batches: pruning.Batches) -> Pruned:
        self.sparsity.dense_gradients(True)
        try:
            pruned = harness.prune(self.model, live, density, batches)
        finally:
            self.sparsity.dense_gradients(False)
        self.rounds, self._history = len(pruned.rounds), pruned.rounds
        return pruned

    def prune_connected(self, live: Masks, density: float) -> Masks:
        """The masks of a pruning in mid-training. Raises UserError as `check_connected` does."""
        pruned = self.prune(live, density)
        self._tell(pruned)
        self.check_connected(pruned.masks)
        return pruned.masks

    def _tell(self, pruned: Pruned) -> None:
        for note in pruned.notes:
            self.console.line(note)

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps of the pruning made last, as JSON."""
        return {"rounds": self.rounds, "history": [[r.requested, r.reached] for r in self._history]}

    def load_notes(self, notes: Mapping[str, Any]) -> None:
        """Take back what `notes` returned."""
        self.rounds = notes["rounds"]
        self._history = tuple(Round(requested, reached) for requested, reached in notes["history"])

    def write_rounds(self, place: LevelDir) -> None:
        """Write rounds.csv of the pruning made last."""
        write_rounds_csv(place.rounds, self._history)

    def _save(self, place: LevelDir, path: Path, pruned: Pruned, source: str) -> None:
        # The mask file last: its presence says that the stage is done.
        if pruned.rounds:
            write_rounds_csv(place.rounds, pruned.rounds)
        self.write_layers(place, pruned.masks)
        pruned.masks.save(path, source=source, rounds=str(len(pruned.rounds)))

    def write_layers(self, place: LevelDir, masks: Masks) -> None:
        """Write layers.csv of `masks`."""
        write_layers_csv(place.layers, self.model, masks, self.effective(masks).counts)

    def effective(self, masks: Masks) -> paths.Effective:
        """Which kept weights lie on a path from input to output."""
        if self._effective is None or self._effective[0] != masks.digest:
            self._effective = masks.digest, paths.effective(self.model, masks, self.input_shape)
        return self._effective[1]

    def costs(self, masks: Masks) -> dict[str, int]:
        """`macs_dense`, `macs` and `parameters` of the model inside `masks`."""
        if self._cost is None:
            self._cost = MaskedCost.of(self.model, self.input_shape)
        return self._cost.row(masks)

    def check_connected(self, masks: Masks) -> None:
        """Raise UserError when no path leads through the network, unless that is allowed; tell of dead layers."""
        found = self.effective(masks)
        dead = [name for name, count in masks.counts.items() if not count and masks[name].numel()]
        if dead and dead != self._told:
            more = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
            self.console.line(f"layers without a weight: {dead[0]}{more}")
        self._told = dead
        if not self.params.pruning.allow_disconnected:
            paths.check_connected(found, masks)


def source_of(mask: Path) -> str | None:
    """Digest of the weights the mask file was made from."""
    return files.load_metadata(mask).get("source")


def _rounds_of(mask: Path) -> int | None:
    return int(files.load_metadata(mask).get("rounds", "0")) or None


def _whole(masks: Masks) -> Masks:
    return Masks({name: torch.ones_like(mask) for name, mask in masks.items()})
