"""`resolve`: settle every `auto` of the `data` section from the data set's traits, and refuse what contradicts them."""

from __future__ import annotations

import math
from pathlib import Path

from utils import params
from utils.data.datasets import dataset
from utils.data.datasets.sources import class_names
from utils.data.spec import DataSpec
from utils.system.errors import ParamError

SMALL = 64
"""Images up to this side are stored raw, shown whole in evaluation, and augmented by a padded crop."""

LARGE_SIDE, LARGE_RESOLUTION, LARGE_EVAL_RATIO = 224, 500, 0.875


def directory_of(data: params.Data) -> Path:
    """Where the data set lies: <root>/<name>, or root itself for `folder`."""
    return Path(data.root) if data.name == "folder" else Path(data.root) / data.name


def resolve(data: params.Data) -> DataSpec:
    """The `DataSpec` of a `data` section; `folder` is scanned for its classes.

    Raises UserError for an unknown data set or a missing folder, ParamError for values that contradict each other.
    """
    traits = dataset.entry(data.name).traits
    directory = directory_of(data)
    size = data.image_size or traits["size"] or LARGE_SIDE
    eval_size = data.eval_size or size
    small = size <= SMALL
    eval_ratio = traits["eval_ratio"] or (1.0 if small else LARGE_EVAL_RATIO)
    resolution = data.max_resolution or _resolution(traits["max_resolution"], size, eval_size, eval_ratio)
    spec = DataSpec(
        name=data.name,
        directory=directory,
        betons=Path(data.betons) if data.betons else Path(data.root) / "betons",
        classes=traits["classes"] or len(class_names(directory)),
        image_size=size,
        eval_size=eval_size,
        max_resolution=resolution,
        write_mode=data.write_mode if data.write_mode != "auto" else ("raw" if resolution <= SMALL else "jpg"),
        augment=data.augment if data.augment != "auto" else traits["augment"] or ("crop" if small else "rrc"),
        flip=traits["flip"] if data.flip is None else data.flip,
        mean=traits["mean"],
        std=traits["std"],
        eval_ratio=eval_ratio,
        data=data,
    )
    _check(spec)
    return spec


def _resolution(trait: int | None, size: int, eval_size: int, eval_ratio: float) -> int:
    """The longest side worth storing: enough for training and, before its centre crop, for evaluation."""
    if trait is not None and trait <= SMALL:  # all images of the set have this side
        return trait
    needed = max(size, math.ceil(eval_size / eval_ratio))
    if trait is None:  # twice the side leaves oblong images a centre square of full size
        return max(SMALL, 2 * needed) if size <= SMALL else max(LARGE_RESOLUTION, needed)
    return max(trait, needed)


def _check(spec: DataSpec) -> None:
    data, size = spec.data, spec.image_size
    if data.progressive_size is not None and data.progressive_size > size:
        raise ParamError(f"data.progressive_size={data.progressive_size} is above the image size {size}; lower it")
    if len(data.progressive_epochs) != 2 or data.progressive_epochs[0] > data.progressive_epochs[1]:
        raise ParamError("data.progressive_epochs takes two shares of training, the smaller first, e.g. 0,0.8")
    if data.cutout >= 2 * size:
        raise ParamError(f"data.cutout={data.cutout} always covers the whole image of {size} px; lower it")
    if spec.augment == "crop" and data.pad >= size:
        raise ParamError(f"data.pad={data.pad} can crop nothing but padding from an image of {size} px; lower it")
    if data.randaugment and data.loader != "torchvision":
        raise ParamError(f"data.randaugment needs data.loader=torchvision (it is {data.loader}); set one of the two")
