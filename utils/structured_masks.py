"""Single weights pruned in a network whose channels were taken out: structured first, then unstructured."""

from __future__ import annotations

from dataclasses import replace

import torch

from utils import pruning
from utils.data import Loaders
from utils.level_channels import Cut, LevelChannels
from utils.masks import Masks
from utils.params import Params
from utils.pruning import paths
from utils.pruning.select import kept_count
from utils.pruning.structured.cost import MaskedCost
from utils.pruning.structured.shrink import enlarge_masks
from utils.system import distributed
from utils.system.console import Console
from utils.system.distributed import World
from utils.tasks.classification import ImageClassification


class SingleWeights:
    """Prunes the networks of a run to `pruning.density` of their own weights; all ranks find the same masks."""

    def __init__(
        self,
        params: Params,
        loaders: Loaders,
        task: ImageClassification,
        channels: LevelChannels,
        world: World,
        device: torch.device,
    ) -> None:
        """Raises UserError for a pruning section that cannot work."""
        self.params, self.loaders, self.channels, self.world, self.device = params, loaders, channels, world, device
        self.harness = pruning.PruningHarness(
            params.pruning, seed=params.run.seed, loss=task.scoring_loss, input_shape=channels.input_shape
        )
        if params.pruning.density is not None:
            self.harness.check(self.harness.start(channels.stock), [params.pruning.density], iterative=False)

    def prune(self, cut: Cut, console: Console) -> Cut:
        """`cut` with masks; those the level before left of its weights are only made sparser. Weights are masked.

        Raises UserError for masks that cut the input off from the output.
        """
        density = self.params.pruning.density
        if density is None:
            return cut
        model = cut.model.to(self.device)
        live = self.harness.start(model) if cut.masks is None else cut.masks.check(model)
        if live.kept > kept_count(density, live.total):
            pruned = self._pruned(model, live, density)
            for note in pruned.notes:
                console.line(note)
            live = pruned.masks
        distributed.agree("masks of single weights", live.digest)
        paths.check_connected(paths.effective(model, live, self.channels.input_shape), live)
        live.apply_(model)
        console.line(f"single weights: {live.kept:,} of {live.total:,} kept in the network that is left")
        return replace(cut, masks=live)

    def _pruned(self, model: torch.nn.Module, live: Masks, density: float) -> pruning.Pruned:
        if not self.harness.reads_data:
            return self.harness.prune(model, live, density)
        batches = self.loaders.scoring(**self.harness.scoring, rank=self.world.rank, ranks=self.world.size)
        try:
            return self.harness.prune(model, live, density, batches)
        finally:
            batches.close()

    def of_searched(self, cut: Cut) -> Masks:
        """What `cut` keeps, as masks of the network that is pruned: channels and single weights."""
        channels = self.channels
        groups = channels.channels.groups
        whole = cut.kept.masks(channels.searched, groups)
        if cut.masks is None:
            return whole
        return enlarge_masks(cut.masks, cut.kept.keep(groups), whole)

    def costs(self, cut: Cut) -> dict[str, int]:
        """`macs` and `parameters` of what `cut` keeps."""
        cost, widths = self.channels.channels.cost, cut.kept.widths
        if cut.masks is None:
            return {"macs": cost.macs(widths), "parameters": cost.parameters(widths)}
        found = MaskedCost.of(cut.model, self.channels.input_shape).row(cut.masks)
        return {"macs": found["macs"], "parameters": found["parameters"]}

    def effective(self, cut: Cut, whole: Masks) -> float:
        """Share of the prunable weights of the network that is pruned that lie on a path through what is left."""
        if cut.masks is None:
            return whole.density
        found = paths.effective(cut.model, cut.masks, self.channels.input_shape)
        return sum(found.counts.values()) / whole.total if whole.total else 1.0
