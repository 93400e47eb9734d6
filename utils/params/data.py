"""Section `data`: the images, their split, the loader and augmentation."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Data:
    """The images, their split, the loader and augmentation."""

    name: str = param("cifar10", "data set; `folder` is any folder of class folders", kind="dataset")
    root: str = param("data", "where the data sets lie: <root>/<name>/..., or the folder itself for `folder`")
    betons: str | None = param(None, "where .beton files lie or are written; auto: <root>/betons", hashed=False)
    loader: str = param(
        "ffcv", "ffcv, device (whole set on the device), torchvision", choices=("ffcv", "device", "torchvision")
    )
    download: bool = param(True, "download the data set when it is missing and torchvision can", hashed=False)
    val: float = param(0.1, "share of the training images held out, stratified; 0: none", low=0.0, below=1.0)
    subset: int | None = param(None, "train on this many training images, stratified", low=1, empty="none")
    split_seed: int = param(0, "seed of the val split and the subset", low=0)
    order_seed: int | None = param(None, "seed of sample order and augmentation; auto: run.seed", low=0)
    workers: int | None = param(
        None, "loader threads per process; auto: allowed CPUs over local ranks", low=1, hashed=False
    )
    image_size: int | None = param(None, "side of a training image in pixels; auto: the data set's", low=1)
    eval_size: int | None = param(None, "side of an evaluation image; auto: image_size", low=1)
    augment: str = param(
        "auto",
        "crop: padded random crop; rrc: random resized crop; auto: the data set's",
        choices=("auto", "none", "crop", "rrc"),
    )
    pad: int = param(4, "padding of the random crop, pixels each side", low=0)
    flip: bool | None = param(None, "random horizontal flip; auto: the data set's")
    cutout: int = param(0, "side of the square cut out of training images, pixels; 0: none", low=0)
    randaugment: int = param(0, "RandAugment operations per image; 0: none (torchvision loader)", low=0)
    randaugment_magnitude: int = param(9, "RandAugment magnitude, 0 to 30", low=0, high=30)
    mixup: float = param(0.0, "mixup alpha; 0: none", low=0.0)
    cutmix: float = param(0.0, "cutmix alpha; 0: none (with mixup too, each batch takes one of them)", low=0.0)
    resize: str = param(
        "ffcv",
        "ffcv: FFCV's own pixels; area: JPEGs scaled while decoded, then by areas; bilinear: the same, then bilinearly",
        choices=("ffcv", "area", "bilinear"),
    )
    progressive_size: int | None = param(
        None, "first training size of progressive resizing; none: fixed size", low=1, empty="none"
    )
    progressive_epochs: tuple[float, ...] = param(
        (0.0, 0.8), "share of training at which the size starts and stops growing", low=0.0, high=1.0
    )
    max_resolution: int | None = param(
        None, ".beton writer: longer sides are shrunk to this; auto: the data set's", low=1
    )
    jpeg_quality: int = param(90, ".beton writer: JPEG quality", low=1, high=100)
    write_mode: str = param(
        "auto", ".beton writer: auto takes raw up to 64 px, else jpg", choices=("auto", "raw", "jpg", "proportion")
    )
    compress_probability: float = param(0.5, ".beton writer: share of JPEG in proportion mode", low=0.0, high=1.0)
    os_cache: bool = param(True, "FFCV reads through the page cache (false: a cache of each process)", hashed=False)
