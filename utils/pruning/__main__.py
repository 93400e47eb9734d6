"""`python -m utils.pruning`: prune a network without training it, and look at mask files.

--config FILE --out m.safetensors   prune the network of `model` (initial or pretrained weights) for the classes of
                                    `data`; write the mask and beside it m.layers.csv, and print the table
inspect M.safetensors ...           print the table of mask files
convert SOURCE --out m.safetensors  read the masks of a checkpoint made elsewhere; code in it is never run
compare A.safetensors B.safetensors what two masks have in common, layer by layer
quality M.safetensors --config FILE how well connected the layers of a mask are, as graphs; also --out q.csv

Pruning reads the sections model, data, pruning, graph and run and ignores the plan of levels. Under torchrun the
scoring data is dealt to the ranks and scores are reduced; rank 0 writes. convert takes --model.name and --data.name
too, and then checks names and shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import harness_params
from utils.system.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from torch import nn

    from utils.params import Params

USAGE = "python -m utils.pruning --config FILE --out m.safetensors [--section.key=value ...]"
OPTIONS = {
    "out": "mask file to write (safetensors), m.safetensors; m.layers.csv is written beside it",
    "scores": "file of scores: written where it is missing, else read, so that one scoring serves many densities",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what `argv` says; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "inspect": _inspect,
        "convert": _convert,
        "compare": _compare,
        "quality": _quality,
    }
    try:
        if words and words[0] in commands:
            return commands[words[0]](words[1:])
        return _prune(words)
    except UserError as error:
        print(f"sieve: {error}", file=sys.stderr)
    except OSError as error:
        print(f"sieve: {error.filename or 'file'}: {error.strerror}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _prune(words: list[str]) -> int:
    params, options = harness_params.load_with_or_exit(OPTIONS, words, plan=False, usage=USAGE)
    out = _target(options)
    if params.pruning.density is None and params.graph.degree is None and params.pruning.mask_file is None:
        raise UserError("pruning.density: not set; write --pruning.density=0.1")
    scores = Path(options["scores"]) if "scores" in options else None
    # torch is imported only once the request is known to be complete.
    import harness_utils
    from utils.pruning import alone

    with harness_utils.process(params, alone.prepare) as here:
        text = alone.prune(params, out, scores, here.world, here.device)
        if here.world.main:
            print(text)
    harness_utils.leave()
    return 0


def _inspect(words: list[str]) -> int:
    from utils.pruning.report import inspect_text

    if not words or any(word.startswith("-") for word in words):
        raise UserError("inspect: name mask files; python -m utils.pruning inspect M.safetensors")
    print("\n\n".join(inspect_text(Path(word)) for word in words))
    return 0


def _convert(words: list[str]) -> int:
    source, rest = _first(words, "convert", "SOURCE --out m.safetensors")
    usage = "python -m utils.pruning convert SOURCE --out m.safetensors [--model.name=... --data.name=...]"
    params, options = harness_params.load_with_or_exit({"out": OPTIONS["out"]}, rest, plan=False, usage=usage)
    out = _target(options)
    from utils.pruning.convert import convert
    from utils.pruning.report import mask_table

    named = any(word.startswith(("--model.", "--data.", "--config")) for word in rest)
    converted = convert(source, _model(params) if named else None)
    converted.masks.save(out, source=source.name, form=converted.form)
    print(mask_table(converted.masks))
    if converted.whole:
        print(f"\nkept whole, not in the file: {', '.join(converted.whole)}")
    print(f"\nread {source} as {converted.form}; wrote {out}; digest {converted.masks.digest}")
    return 0


def _compare(words: list[str]) -> int:
    if len(words) != 2:
        raise UserError("compare: name two mask files; python -m utils.pruning compare A.safetensors B.safetensors")
    from utils.masks import Masks
    from utils.pruning.compare import compare, compare_table

    print(compare_table(compare(*(Masks.load(Path(word)) for word in words))))
    return 0


def _quality(words: list[str]) -> int:
    path, rest = _first(words, "quality", "M.safetensors --config FILE")
    usage = "python -m utils.pruning quality M.safetensors --config FILE [--out q.csv]"
    params, options = harness_params.load_with_or_exit({"out": "CSV to write"}, rest, plan=False, usage=usage)
    from utils.masks import Masks
    from utils.pruning import graph_quality

    model = _model(params)
    rows = graph_quality.rows(model, Masks.load(path, model))
    print(graph_quality.quality_table(rows))
    if "out" in options:
        graph_quality.write_quality_csv(Path(options["out"]), rows)
        print(f"\nwrote {options['out']}")
    return 0


def _target(options: dict[str, str]) -> Path:
    out = Path(options.get("out", ""))
    if out.suffix != ".safetensors":
        raise UserError("--out: names no mask file; write --out m.safetensors")
    return out


def _first(words: list[str], command: str, example: str) -> tuple[Path, list[str]]:
    if not words or words[0].startswith("-"):
        raise UserError(f"{command}: names no file; python -m utils.pruning {command} {example}")
    return Path(words[0]), words[1:]


def _model(params: Params) -> nn.Module:
    from utils.pruning.alone import build_model

    return build_model(params)


if __name__ == "__main__":
    sys.exit(main())
