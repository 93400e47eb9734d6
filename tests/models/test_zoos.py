"""torchvision's and timm's networks: heads, keys, auxiliary heads, published weights without a network connection."""

from __future__ import annotations

import logging
import urllib.error
from pathlib import Path

import pytest
import torch
from torchvision import models as tv

from utils import models
from utils.models.pretrained import head_names
from utils.system.errors import UserError

TORCHVISION_COUNTS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "googlenet": 6_624_904,
    "densenet121": 7_978_856,
    "squeezenet1_1": 1_235_496,
}


@pytest.mark.parametrize("name", sorted(TORCHVISION_COUNTS))
def test_torchvision_sizes_with_imagenets_classes(name: str) -> None:
    assert sum(p.numel() for p in models.build(f"torchvision/{name}", 1000).parameters()) == TORCHVISION_COUNTS[name]


def test_timm_size_with_imagenets_classes() -> None:
    assert sum(p.numel() for p in models.build("timm/deit_tiny_patch16_224", 1000).parameters()) == 5_717_416


HEADS = {
    "torchvision/densenet121": ["classifier.weight", "classifier.bias"],
    "torchvision/efficientnet_b0": ["classifier.1.weight", "classifier.1.bias"],
    "torchvision/googlenet": ["fc.weight", "fc.bias"],
    "torchvision/mobilenet_v3_small": ["classifier.3.weight", "classifier.3.bias"],
    "torchvision/regnet_y_400mf": ["fc.weight", "fc.bias"],
    "torchvision/shufflenet_v2_x0_5": ["fc.weight", "fc.bias"],
    "torchvision/squeezenet1_1": ["classifier.1.weight", "classifier.1.bias"],
    "torchvision/swin_t": ["head.weight", "head.bias"],
    "torchvision/vit_b_32": ["heads.head.weight", "heads.head.bias"],
    "timm/test_vit": ["head.weight", "head.bias"],
    "timm/test_convnext": ["head.fc.weight", "head.fc.bias"],
    "timm/deit_tiny_distilled_patch16_224": ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"],
    "cifar/resnet20": ["fc.weight", "fc.bias"],
    "cifar/vgg11_bn": ["classifier.weight", "classifier.bias"],
}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_head_has_the_data_sets_classes(name: str) -> None:
    network = models.build(name, 7, image_size=32)
    assert head_names(network) == HEADS[name]
    own = network.state_dict()
    assert {own[key].shape[0] for key in HEADS[name]} == {7}


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
def test_auxiliary_heads_are_off(name: str, size: int) -> None:
    network = models.build(f"torchvision/{name}", 10)
    logits = network(torch.zeros(2, 3, size, size))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 10)
    assert not [key for key in network.state_dict() if "aux" in key.lower()]
    assert network.transform_input is False


def published(name: str, **options: object) -> dict[str, torch.Tensor]:
    """A state dict such as torchvision publishes for `name`, with recognisable values."""
    state = tv.get_model(name, **options).state_dict()
    generator = torch.Generator().manual_seed(5)
    return {k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v + 3 for k, v in state.items()}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """torchvision's downloads answer with `served["state"]`, or raise `served["error"]`; `served["url"]` is noted."""
    box: dict[str, object] = {}

    def download(url: str, **options: object) -> object:
        box["url"] = url
        if "error" in box:
            raise box["error"]  # type: ignore[misc]
        return box["state"]

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    return box


def test_torchvision_weights_by_name(served: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    state = published("resnet18")
    served["state"] = state
    network = models.build("torchvision/resnet18", 1000, pretrained="IMAGENET1K_V1")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not caplog.records
    small = models.build("torchvision/resnet18", 10, pretrained="default", seed=2)
    fresh = models.build("torchvision/resnet18", 10, seed=2).state_dict()
    for key, value in small.state_dict().items():
        assert torch.equal(value, fresh[key] if key.startswith("fc.") else state[key])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for word in ("torchvision/resnet18", "1000", "10"):
        assert word in record.getMessage()


def test_torchvision_default_is_the_libraries(served: dict[str, object]) -> None:
    served["error"] = urllib.error.URLError("nobody there")
    with pytest.raises(UserError) as caught:
        models.build("torchvision/resnet50", 10, pretrained="default")
    assert served["url"] == tv.ResNet50_Weights.IMAGENET1K_V2.url
    text = str(caught.value)
    assert "\n" not in text
    for word in ("model.pretrained", "torchvision/resnet50", "nobody there", "file", str(served["url"])):
        assert word in text
    with pytest.raises(UserError):
        models.build("torchvision/resnet50", 10, pretrained="IMAGENET1K_V1")
    assert served["url"] == tv.ResNet50_Weights.IMAGENET1K_V1.url


def test_unknown_torchvision_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.pretrained.*'IMAGENET1K_V3'.*IMAGENET1K_V1, IMAGENET1K_V2"):
        models.build("torchvision/resnet50", 10, pretrained="IMAGENET1K_V3")


@pytest.mark.parametrize(("name", "auxiliary"), [("googlenet", "aux1."), ("inception_v3", "AuxLogits.")])
def test_published_auxiliary_heads_are_dropped(name: str, auxiliary: str, served: dict[str, object]) -> None:
    state = published(name, aux_logits=True, init_weights=False)
    assert any(key.startswith(auxiliary) for key in state)
    served["state"] = state
    network = models.build(f"torchvision/{name}", 10, pretrained="default")
    own = network.state_dict()
    assert network.aux_logits is False
    assert network.transform_input is True
    assert not [key for key in own if "aux" in key.lower()]
    assert all(torch.equal(own[key], state[key]) for key in own if not key.startswith("fc."))


def test_published_files_are_known_by_name(tmp_path: Path) -> None:
    """GoogLeNet's published weights expect another range of pixels, wherever the file came from."""
    state = published("googlenet", aux_logits=True, init_weights=False)
    official = tmp_path / tv.GoogLeNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    for path, expected in ((official, True), (tmp_path / "mine.pth", False)):
        torch.save(state, path)
        assert models.build("torchvision/googlenet", 10, pretrained=str(path)).transform_input is expected


def test_old_densenet_keys_are_read(served: dict[str, object]) -> None:
    """The published files say `norm.1` and `conv.2` where the modules are called `norm1` and `conv2`."""
    state = published("densenet121")
    renamed = {}
    for key, value in state.items():
        for layer in ("norm", "conv"):
            for digit in "12":
                if "denselayer" in key:
                    key = key.replace(f".{layer}{digit}.", f".{layer}.{digit}.")
        renamed[key] = value
    assert renamed.keys() != state.keys()
    served["state"] = renamed
    own = models.build("torchvision/densenet121", 1000, pretrained="default").state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own)


def test_position_of_another_size_is_refused(served: dict[str, object]) -> None:
    served["state"] = published("vit_b_32")
    with pytest.raises(UserError, match=r"encoder\.pos_embedding \(1x50x768 float32, the model's is 1x5x768 float32\)"):
        models.build("torchvision/vit_b_32", 1000, pretrained="default", image_size=64)


@pytest.fixture
def timm_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    """timm finds the weights of test_vit in a local file instead of on the hub."""
    import timm

    create = timm.create_model
    state = {k: v * 0.5 + 0.25 for k, v in create("test_vit").state_dict().items()}
    torch.save(state, tmp_path / "hub.pth")

    def local(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        overlay = {"file": str(tmp_path / "hub.pth")} if pretrained else None
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", local)
    return state


@pytest.mark.parametrize(
    ("name", "tag"), [("test_vit", "default"), ("test_vit", "r160_in1k"), ("test_vit.r160_in1k", "default")]
)
def test_timm_weights_by_name(
    name: str, tag: str, timm_file: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    own = models.build(f"timm/{name}", 10, pretrained=tag, seed=4).state_dict()
    fresh = models.build(f"timm/{name}", 10, seed=4).state_dict()
    for key, value in own.items():
        assert torch.equal(value, fresh[key] if key.startswith("head.") else timm_file[key])
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("utils.")]
    assert len(messages) == 1
    assert "1000" in messages[0]
    full = models.build(f"timm/{name}", 1000, pretrained=tag).state_dict()
    assert torch.equal(full["head.weight"], timm_file["head.weight"])
    assert len([r for r in caplog.records if r.name.startswith("utils.")]) == 1


def test_timm_fits_positions_to_the_image_size(timm_file: dict[str, torch.Tensor]) -> None:
    own = models.build("timm/test_vit", 10, pretrained="default", image_size=64).state_dict()
    assert own["pos_embed"].shape[1] < timm_file["pos_embed"].shape[1]
    assert torch.equal(own["patch_embed.proj.weight"], timm_file["patch_embed.proj.weight"])


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [
        ("test_vit", "zz", ["'zz'", "r160_in1k"]),
        ("resnet18.a1_in1k", "a2_in1k", ["timm/resnet18.a1_in1k", "'a2_in1k'"]),
        ("convmixer_768_32", "nothing", ["'nothing'", "in1k"]),
    ],
)
def test_unknown_timm_tags_are_refused(name: str, tag: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        models.build(f"timm/{name}", 10, pretrained=tag)
    for word in ["model.pretrained", *words]:
        assert word in str(caught.value)


def test_a_failed_timm_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def fail(*_: object, **__: object) -> None:
        raise OSError("hub unreachable\nand a long story")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"^model\.pretrained: cannot load 'default' of timm/test_vit \(hub unreachable\); [^\n]*$"
    ):
        models.build("timm/test_vit", 10, pretrained="default")


def test_timm_errors_that_are_not_the_users_stay_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        models.build("timm/test_vit", 10)


def test_cifar_networks_have_no_published_weights() -> None:
    with pytest.raises(UserError, match=r"model\.pretrained: cifar/resnet20 has no published weights 'default'"):
        models.build("cifar/resnet20", 10, pretrained="default")


def test_libraries_are_imported_only_when_asked_for() -> None:
    import subprocess
    import sys

    code = "import sys; from utils import models; assert not {'timm', 'torchvision'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
