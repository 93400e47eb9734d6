"""`python -m utils.pruning --config FILE --out m.safetensors`: prune a network without training it.

Builds the network of `model` (its initial or pretrained weights) for the classes of `data`, prunes it to
pruning.density, writes the mask and beside it layers.csv, and prints the table. All other sections are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import harness_params
from utils.system.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from utils.params import Params

USAGE = "python -m utils.pruning --config FILE --out m.safetensors [--section.key=value ...]"
OPTIONS = {"out": "mask file to write (safetensors); layers.csv is written beside it"}


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
    """Write the mask and layers.csv; returns the text to print."""
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
    masks = PruningHarness(params.pruning, seed=params.run.seed).prune(model, live, density).masks
    layers = out.with_name("layers.csv")
    write_layers_csv(layers, model, masks)
    masks.save(out)
    return f"{layer_table(model, masks)}\n\nwrote {out} and {layers}; digest {masks.digest}"


if __name__ == "__main__":
    sys.exit(main())
