"""Weight files: read without running code, matched key by key, heads replaced."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from utils import models
from utils.masks import Masks
from utils.models import pretrained
from utils.system.errors import UserError

NAME = "cifar/resnet20"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A trained network's state: every tensor differs from a fresh network's."""
    generator = torch.Generator().manual_seed(9)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 17
        for key, value in models.build(NAME, 10).state_dict().items()
    }


def loaded(path: Path, num_classes: int = 10, **options: Any) -> dict[str, torch.Tensor]:
    return dict(models.build(NAME, num_classes, pretrained=str(path), **options).state_dict())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def refusal(path: Path, num_classes: int = 10) -> str:
    with pytest.raises(UserError) as caught:
        loaded(path, num_classes)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def test_safetensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert same(loaded(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar", ".bin"])
def test_torch_files(suffix: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / f"w{suffix}")
    assert same(loaded(tmp_path / f"w{suffix}"), state)


def test_old_torch_format_and_a_name_without_suffix(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights", _use_new_zipfile_serialization=False)
    assert same(loaded(tmp_path / "weights"), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
        lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {f"module.module.{key}": value for key, value in state.items()},
        lambda state: {key.replace("layer1.", "layer1._orig_mod."): value for key, value in state.items()},
        lambda state: {"state_dict": collections.OrderedDict((f"module.{key}", value) for key, value in state.items())},
    ],
)
def test_containers_and_prefixes(wrap: Any, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(wrap(state), tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth"), state)


def test_only_a_prefix_of_every_key_is_dropped(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    odd = {f"module.{key}" if key.startswith("fc.") else key: value for key, value in state.items()}
    torch.save(odd, tmp_path / "w.pth")
    assert "module.fc.weight" in refusal(tmp_path / "w.pth")


def test_real_checkpoint_of_an_optimizer_and_a_wrapped_model(tmp_path: Path) -> None:
    network = models.build(NAME, 10, seed=5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.zeros(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    parallel = torch.nn.DataParallel(network)
    torch.save(
        {"epoch": 1, "state_dict": parallel.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.tar"
    )
    assert same(loaded(tmp_path / "c.tar"), dict(network.state_dict()))


def test_head_of_other_classes_starts_fresh_with_one_line(
    state: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    own = loaded(tmp_path / "w.safetensors", num_classes=100, seed=6)
    fresh = models.build(NAME, 100, seed=6).state_dict()
    for key, value in own.items():
        assert torch.equal(value, fresh[key] if key in ("fc.weight", "fc.bias") else state[key])
    (record,) = caplog.records
    message = record.getMessage()
    assert "10 classes" in message
    assert "100 classes" in message
    assert "w.safetensors" in message
    assert "\n" not in message


def test_head_of_equal_classes_is_kept_silently(
    state: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state, tmp_path / "w.pth")
    assert torch.equal(loaded(tmp_path / "w.pth")["fc.weight"], state["fc.weight"])
    assert not caplog.records


@pytest.mark.parametrize("classes", [10, 100])
def test_head_of_other_features_is_refused(classes: int, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state["fc.weight"] = torch.zeros(classes, 128)
    torch.save(state, tmp_path / "w.pth")
    assert f"fc.weight ({classes}x128 float32, the model's is 10x64 float32)" in refusal(tmp_path / "w.pth")


def test_missing_keys_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for key in ["bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "layer3.2.bn2.weight"]:
        del state[key]
    torch.save(state, tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth")
    assert "bn1.running_mean, layer1.0.conv1.weight" in text
    assert "and 1 more are missing" in text


def test_a_missing_head_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    del state["fc.weight"], state["fc.bias"]
    torch.save(state, tmp_path / "w.pth")
    assert "fc.weight, fc.bias are missing" in refusal(tmp_path / "w.pth")


def test_unknown_keys_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state["aux1.fc.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    assert "aux1.fc.weight are not in this model" in refusal(tmp_path / "w.pth")


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save(models.build("cifar/resnet32", 10).state_dict(), tmp_path / "w.pth")
    assert "layer1.3.conv1.weight" in refusal(tmp_path / "w.pth")
    torch.save(models.build("cifar/vgg11_bn", 10).state_dict(), tmp_path / "v.pth")
    assert "features.0.weight" in refusal(tmp_path / "v.pth")


def test_a_refused_file_changes_nothing(state: dict[str, torch.Tensor]) -> None:
    network = models.build(NAME, 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state["layer3.2.bn2.weight"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"layer3\.2\.bn2\.weight"):
        pretrained.put(network, state, "here")
    assert same(dict(network.state_dict()), before)


def test_batchnorm_counters_may_be_missing(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "w.pth")
    own = loaded(tmp_path / "w.pth")
    assert own["bn1.num_batches_tracked"] == 0
    assert all(torch.equal(own[key], kept[key]) for key in kept)


def test_half_precision_files_become_float32(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    safetensors.torch.save_file(half, tmp_path / "w.safetensors")
    own = loaded(tmp_path / "w.safetensors")
    assert own["conv1.weight"].dtype == torch.float32
    assert torch.equal(own["conv1.weight"], half["conv1.weight"].float())


def test_a_mask_file_is_not_weights(tmp_path: Path) -> None:
    network = models.build("timm/test_nfnet", 10)
    Masks.dense(network).save(tmp_path / "mask.safetensors")
    with pytest.raises(UserError, match=r"mask\.safetensors"):
        models.build("timm/test_nfnet", 10, pretrained=str(tmp_path / "mask.safetensors"))
    plain = torch.nn.Linear(3, 3, bias=False)
    with pytest.raises(UserError, match=r"weight \(3x3 uint8, the model's is 3x3 float32\)"):
        pretrained.put(plain, {"weight": torch.ones(3, 3, dtype=torch.uint8)}, "mask")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_code_in_a_file_never_runs(kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    fired, path = tmp_path / "fired", tmp_path / "evil.pth"
    content = {"state_dict": state, "extra": Bomb(fired)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    text = refusal(path)
    assert not fired.exists()
    assert "state_dict alone" in text
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert fired.exists(), "the file is harmless: the test shows nothing"


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "state_dict alone" in refusal(tmp_path / "module.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["half", "short", "empty", "text", "garbage"])
def test_damaged_files_are_refused(suffix: str, damage: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"damaged{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "short": whole[:-1],
            "empty": b"",
            "text": b"not weights\n" * 50,
            "garbage": bytes(range(256)) * 40,
        }[damage]
    )
    refusal(path)


@pytest.mark.parametrize(
    "content", [{}, [torch.zeros(2)], torch.zeros(2), {"epoch": 3}, {"state_dict": {"conv1.weight": 1.0}}]
)
def test_torch_files_without_weights_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert "state_dict" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_missing_files_and_folders_are_refused(suffix: str, tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / f"absent{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    assert "no such file" in refusal(tmp_path / f"folder{suffix}")


def test_what_counts_as_a_file() -> None:
    for text in ("w.safetensors", "runs/x/weights", "./w", "W.PTH", "~/w.pt"):
        assert pretrained.local_file(text) is not None
    for text in ("", "default", "IMAGENET1K_V1", "a1_in1k", "ResNet18_Weights.IMAGENET1K_V1"):
        assert pretrained.local_file(text) is None
    assert pretrained.local_file("~/w.pt") == Path.home() / "w.pt"
