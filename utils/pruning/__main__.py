"""`python -m utils.pruning --config FILE --out m.safetensors`: prune a network without training it.

Builds the network of `model` (its initial or pretrained weights) for the classes of `data`, prunes it to
pruning.density, writes the mask and beside it m.layers.csv, and prints the table. A criterion that reads data scores on
`pruning.samples_per_class` training images of each class, on the CPU, in batches of one backward pass
(training.batch_size / training.accumulation). All other sections are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import harness_params
from utils.system.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from utils.data.protocol import Batch
    from utils.params import Params

USAGE = "python -m utils.pruning --config FILE --out m.safetensors [--section.key=value ...]"
OPTIONS = {"out": "mask file to write (safetensors), m.safetensors; m.layers.csv is written beside it"}


def main(argv: Sequence[str] | None = None) -> int:
    """Prune as `argv` says; returns the exit code. Under torchrun rank 0 works and the others end at once."""
    params, options = harness_params.load_with_or_exit(OPTIONS, argv, plan=False, usage=USAGE)
    try:
        out = _target(options, params)
        # torch is imported only once the request is known to be complete.
        from utils.system.distributed import world

        if world().main:
            print(_prune(params, out))
    except UserError as error:
        print(f"sieve: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"sieve: {error.filename or options.get('out')}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _target(options: dict[str, str], params: Params) -> Path:
    """The file to write. Raises UserError when it or the density is not given."""
    out = Path(options.get("out", ""))
    if out.suffix != ".safetensors":
        raise UserError("--out: names no mask file; write --out m.safetensors")
    if params.pruning.density is None:
        raise UserError("pruning.density: not set; write --pruning.density=0.1")
    return out


def _prune(params: Params, out: Path) -> str:
    """Write the mask and its table of layers; returns the text to print."""
    from utils import models
    from utils.data.resolve import resolve
    from utils.masks import Masks
    from utils.pruning.harness import PruningHarness
    from utils.pruning.report import layer_table, write_layers_csv

    spec, section, density = resolve(params.data), params.model, params.pruning.density
    assert density is not None
    model = models.build(
        section.name,
        spec.classes,
        pretrained=section.pretrained,
        image_size=spec.image_size,
        seed=params.run.seed,
    )
    live = Masks.dense(model, params.pruning.exclude)
    harness = PruningHarness(params.pruning, seed=params.run.seed)
    harness.check(live, [density], iterative=False)  # before any data is fetched
    batches = _scoring_batches(params) if harness.reads_data else []
    masks = harness.prune(model, live, density, batches).masks
    layers = out.with_name(f"{out.stem}.layers.csv")
    write_layers_csv(layers, model, masks)
    masks.save(out)
    return f"{layer_table(model, masks)}\n\nwrote {out} and {layers}; digest {masks.digest}"


def _scoring_batches(params: Params) -> list[Batch]:
    """Unaugmented training images to score on; the data set is fetched and its .beton files written where missing."""
    import torch

    from utils import data

    data.prepare(params)
    shard = data.Shard(batch_size=params.training.batch_size, accumulation=params.training.accumulation)
    workers = params.data.workers or data.default_workers(1)
    loaders = data.build(params, shard, torch.device("cpu"), channels_last=False, workers=workers)
    try:
        return loaders.scoring(params.pruning.samples_per_class, shard.micro_batch)
    finally:
        loaders.close()


if __name__ == "__main__":
    sys.exit(main())
