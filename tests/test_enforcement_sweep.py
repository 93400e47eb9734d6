"""Masks hold on every family of torchvision and timm classifiers: random masks at 30 %, two optimizer steps, all exact.

Each family takes part with its smallest network and, where the network allows, 32 px images.
"""

from __future__ import annotations

import zlib

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

from utils import models, sparsity
from utils.masks import Masks, prunable_parameters

TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
]

TIMM = {
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_distilled_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_v3": "inception_v3",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_maxvit",
    "metaformer": "poolformer_s12",
    "mlp_mixer": "resmlp_12_224",
    "mobilenetv3": "lcnet_035",
    "mobilevit": "mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnext26_32x4d",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p16_224",
}
"""timm's module to its smallest network. Left out for weight (more than 40 M parameters): vgg, inception_v4,
inception_resnet_v2, nasnet, pnasnet, beit, deepseek_vit, mobilenetv5, naflexvit, qwen3_vit, gemma4_vit and SAM."""

TIMM_LISTED = Version("1.0.31")
"""The timm that has every network of TIMM; with an older one, those that it lacks take no part."""

SIZES = {
    "torchvision/alexnet": 64,
    "torchvision/inception_v3": 96,
    "torchvision/maxvit_t": 224,
    "timm/crossvit_tiny_240": 240,
    "timm/csatv2": 64,
    "timm/efficientformer_l1": 224,
    "timm/halonet_h1": 256,
    "timm/inception_v3": 96,
}
"""Image sides other than 32 px, for networks that need more."""

NAMES = [f"torchvision/{name}" for name in TORCHVISION] + [f"timm/{name}" for name in TIMM.values()]

WITH_ADAMW = NAMES[1::3]
"""Trained with AdamW; the others with SGD, momentum and weight decay."""

INSTALLED = [name for name in NAMES if not name.startswith("timm/") or timm.is_model(name.removeprefix("timm/"))]


def stock_model(name: str) -> nn.Module:
    """The library's own network; without storage, save where its constructor reads numbers off a tensor."""
    try:
        with torch.device("meta"):
            return library_model(name)
    except RuntimeError:
        return library_model(name)


def library_model(name: str) -> nn.Module:
    library, _, short = name.partition("/")
    if library == "timm":
        return timm.create_model(short, num_classes=10)
    from torchvision.models import get_model

    aux = {"aux_logits": False, "init_weights": False} if short in ("googlenet", "inception_v3") else {}
    return get_model(short, num_classes=10, **aux)


def weights_to_prune(network: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions, linear layers and packed attention projections, found module by module."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in network.named_modules():
        names = []
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
            names = ["weight"]
        elif isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight"]
        for name in names:
            parameter = getattr(module, name)
            if all(parameter is not seen for seen in found.values()):
                found[f"{prefix}.{name}" if prefix else name] = parameter
    return found


def random_mask(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Bool tensor with floor(0.3 n + 0.5) ones; the pattern repeats after a million places, to be drawn quickly."""
    total = shape.numel()

    def drawn(places: int, kept: int) -> torch.Tensor:
        mask = torch.zeros(places, dtype=torch.bool)
        mask[torch.randperm(places, generator=generator)[:kept]] = True
        return mask

    period = 1_000_000
    tail = total % period
    parts = [drawn(period, 300_000)] * (total // period) + [drawn(tail, (3 * tail + 5) // 10)]
    return torch.cat(parts).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.dtype == torch.float32
    return tensor.detach().contiguous().view(torch.int32)


def train_two_steps(network: nn.Module, optimizer: torch.optim.Optimizer, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        images = torch.randn(2, 3, size, size, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network(images), torch.tensor([3, 7])).backward()
        optimizer.step()


@pytest.mark.parametrize("name", INSTALLED)
def test_masks_hold(name: str) -> None:
    size, seed = SIZES.get(name, 32), zlib.crc32(name.encode())
    network = models.build(name, 10, image_size=size)
    prunable = weights_to_prune(network)
    assert list(prunable_parameters(network)) == [n for n, _ in network.named_parameters() if n in prunable]
    generator = torch.Generator().manual_seed(seed)
    masks = Masks({n: random_mask(p.shape, generator) for n, p in prunable.items()})
    assert masks.kept == sum((3 * p.numel() + 5) // 10 for p in prunable.values())

    optimizer: torch.optim.Optimizer
    if name in WITH_ADAMW:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    held = sparsity.attach(network, optimizer, masks)
    start = {n: p.detach().clone() for n, p in prunable.items() if p.numel() <= 1_000_000}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train_two_steps(network, optimizer, size, seed)

    live = 0
    for n, p in prunable.items():
        values = {"weight": p, "gradient": p.grad, **optimizer.state[p]}
        assert optimizer.state[p], f"{n} was never stepped"
        for what, value in values.items():
            if value is not None and value.shape == p.shape:
                assert not bits(value).masked_fill(masks[n], 0).any(), f"{n}: the {what} of a pruned weight is not +0.0"
        live += int(torch.count_nonzero(p))
    assert 0.99 * masks.kept < live <= masks.kept
    still = sum(int(((prunable[n] == before) & masks[n]).sum()) for n, before in start.items())
    assert still < 0.01 * sum(masks.counts[n] for n in start), "the kept weights did not move"
    assert held.masks is masks
    assert held.violations() == []
    stock = stock_model(name)
    assert type(network) is type(stock)
    assert list(network.state_dict()) == list(stock.state_dict())


def test_every_torchvision_family_takes_part() -> None:
    """A family is the module a network is defined in; with its variants that are other networks in all but name."""
    from torchvision import models as library

    def family(name: str) -> str:
        module = library.get_model_builder(name).__module__
        prefix = name.split("_")[0].rstrip("0123456789")
        version = "v2" if "_v2" in name else ""
        return f"{module} {prefix} {version}"

    everything = {family(name) for name in library.list_models(module=library)}
    assert everything == {family(name) for name in TORCHVISION}


def test_timm_families_are_as_listed() -> None:
    taking_part = {module: name for module, name in TIMM.items() if f"timm/{name}" in INSTALLED}
    assert len(taking_part) >= 30
    for module, name in taking_part.items():
        assert name in timm.list_models(module=module)
    if Version(timm.__version__) >= TIMM_LISTED:
        assert taking_part == TIMM
