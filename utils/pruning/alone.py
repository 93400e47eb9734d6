"""The pruning harness without a training run: a network, its masks and a table of its layers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from utils import data, files, models
from utils.data.resolve import resolve
from utils.masks import Masks
from utils.params import Params
from utils.pruning import paths
from utils.pruning.criteria import Batches, Scores, options_of
from utils.pruning.harness import Pruned, PruningHarness
from utils.pruning.report import layer_table, rounds_table, write_layers_csv, write_rounds_csv
from utils.system import distributed
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.tasks.classification import ImageClassification
from utils.training.recipe.soft import soften

T = TypeVar("T")


def prepare(params: Params, world: World) -> None:
    """Before the process group starts: fetch the data set if the criterion reads it. Raises UserError as `prune`."""
    models.check_name(params.model.name)
    harness = PruningHarness(params.pruning, params.graph, seed=params.run.seed)
    if harness.reads_data:
        _checked(params, harness, build_model(params))  # before any data is fetched
        data.prepare(params)


def build_model(params: Params) -> nn.Module:
    """The network of `model` for the classes of `data`, with its initial or pretrained weights."""
    spec, section = resolve(params.data), params.model
    network = models.build(
        section.name,
        spec.classes,
        pretrained=section.pretrained,
        image_size=spec.image_size,
        seed=params.run.seed,
    )
    return soften(network, params.recipe)


def prune(params: Params, out: Path, scores: Path | None, world: World, device: torch.device) -> str:
    """Prune on all ranks; rank 0 writes the mask, its layers and rounds. Returns the text to print.

    scores: where scores are kept between calls, for other densities. Raises UserError for what cannot be pruned.
    """
    spec = resolve(params.data)
    shape = (3, spec.image_size, spec.image_size)
    model = build_model(params).to(device)
    loss = ImageClassification(spec.classes).scoring_loss
    harness = PruningHarness(params.pruning, params.graph, seed=params.run.seed, loss=loss, input_shape=shape)
    start, density = _checked(params, harness, model)
    pruned = _pruned(params, harness, model, start, density, scores, world, device)
    distributed.agree("masks", pruned.masks.digest)
    effective = paths.effective(model, pruned.masks, shape)
    if not params.pruning.allow_disconnected:
        paths.check_connected(effective, pruned.masks)
    _on_main(functools.partial(_write, out, model, pruned, effective))
    parts = [layer_table(model, pruned.masks, effective.counts)]
    if outside := harness.outside(Masks.dense(model, params.pruning.exclude)):
        parts.append(f"left whole by pattern {params.pruning.pattern}, out of the density: {', '.join(outside)}")
    if len(pruned.rounds) > 1:
        parts.append(rounds_table(pruned.rounds))
    parts += pruned.notes
    parts.append(f"wrote {out} and {_layers_of(out)}; digest {pruned.masks.digest}")
    return "\n\n".join(parts)


def _checked(params: Params, harness: PruningHarness, model: nn.Module) -> tuple[Masks, float | None]:
    """The masks to prune and the density asked for (None: by graph.degree), which can be reached. Else UserError."""
    start, density = harness.start(model), params.pruning.density
    if density is None and params.graph.degree is None:
        density = start.density
    if density is not None:
        harness.check(start, [density], iterative=False)
    return start, density


def _pruned(
    params: Params,
    harness: PruningHarness,
    model: nn.Module,
    start: Masks,
    density: float | None,
    scores: Path | None,
    world: World,
    device: torch.device,
) -> Pruned:
    if scores is None:
        return _with_data(params, harness, world, device, lambda batches: harness.prune(model, start, density, batches))
    if density is None or params.graph.kind is not None or harness.rounds > 1 or params.pruning.control == "shuffle":
        raise UserError("--scores: only for one round of a criterion, without shuffling; drop it")
    purpose = _purpose(params, harness, model, start)
    if distributed.exists(scores):
        found = _read_scores(scores, start, purpose)
    else:
        found = _with_data(params, harness, world, device, lambda batches: harness.score(model, start, batches))
        _on_main(functools.partial(files.save_tensors, scores, found, purpose))
    return harness.pick(found, start, density)


def _with_data(
    params: Params, harness: PruningHarness, world: World, device: torch.device, work: Callable[[Batches], T]
) -> T:
    """`work` on this rank's scoring batches; on none where the criterion reads none."""
    if not harness.reads_data:
        return work(())
    shard = data.Shard(batch_size=params.training.batch_size, accumulation=params.training.accumulation)
    workers = params.data.workers or data.default_workers(world.local_size)
    loaders = data.build(params, shard, device, channels_last=False, workers=workers)
    try:
        with contextlib.closing(loaders.scoring(**harness.scoring, rank=world.rank, ranks=world.size)) as batches:
            return work(batches)
    finally:
        loaders.close()


def _purpose(params: Params, harness: PruningHarness, model: nn.Module, start: Masks) -> dict[str, str]:
    """What scores depend on: written with them and compared when they are read.

    data: the images read (which, how many and how large), or their size alone where none are. masks: those the scores
    were taken at.
    """
    section, side = params.data, resolve(params.data).image_size
    options, read = options_of(params.pruning.criterion) | harness.options, {}
    if harness.reads_data:
        names = ("name", "root", "loader", "val", "subset", "split_seed", "order_seed", "eval_size")
        read = {name: getattr(section, name) for name in names} | harness.scoring
    return {
        "criterion": params.pruning.criterion,
        "options": " ".join(f"{name}={value}" for name, value in sorted(options.items())),
        "data": " ".join(f"{name}={value}" for name, value in (read | {"image_size": side}).items()),
        "seed": str(params.run.seed),
        "masks": start.digest,
        "weights": files.digest(files.state_of(model)),
    }


def _read_scores(path: Path, masks: Masks, purpose: dict[str, str]) -> Scores:
    scores, written = files.load_tensors(path)
    for key, value in purpose.items():
        if written.get(key) != value:
            raise UserError(f"{path}: scores of {key} {written.get(key)!r}, not {value!r}; name another --scores file")
    if missing := sorted(masks.keys() - scores.keys()):
        raise UserError(f"{path}: no scores of {missing[0]!r}; name another --scores file")
    return {name: scores[name] for name in masks}


def _on_main(write: Callable[[], None]) -> None:
    """`write` on rank 0. Raises UserError on all for a place that cannot be written."""

    def attempt() -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"{error.filename or 'file'}: {error.strerror}; name another place") from error

    distributed.from_main(attempt)


def _layers_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.layers.csv")


def _write(out: Path, model: nn.Module, pruned: Pruned, effective: paths.Effective) -> None:
    write_layers_csv(_layers_of(out), model, pruned.masks, effective.counts)
    if len(pruned.rounds) > 1:
        write_rounds_csv(out.with_name(f"{out.stem}.rounds.csv"), pruned.rounds)
    pruned.masks.save(out)
