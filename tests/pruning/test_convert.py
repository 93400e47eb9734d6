"""Masks read from files of other makers; files that want to run code."""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from utils import files
from utils.masks import Masks
from utils.pruning.convert import BOTH, BUFFERS, MASK_FILE, REPARAMETRIZED, ZEROS, convert
from utils.system.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.point = nn.Conv2d(3, 5, 1)
        self.attn = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(5, 4)


NAMES = ["conv.weight", "point.weight", "attn.in_proj_weight", "attn.out_proj.weight", "fc.weight"]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def wanted(net: Net) -> Masks:
    torch.manual_seed(1)
    weights = dict(net.named_parameters())
    return Masks({name: torch.rand(weights[name].shape) < 0.4 for name in NAMES})


def sparse_state(net: nn.Module, masks: Masks) -> dict[str, torch.Tensor]:
    return {name: t * masks[name] if name in masks else t.clone() for name, t in net.state_dict().items()}


def saved(path: Path, payload: Any, **how: Any) -> Path:
    torch.save(payload, path, **how)
    return path


WRAPS: list[Callable[[Any], Any]] = [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3, "acc": torch.tensor(91.5)},
    lambda state: {"model_state_dict": state, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}},
    lambda state: {"model": {"state_dict": state}, "args": ("a", 1)},
]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_zeros_of_a_state_dict(
    tmp_path: Path, net: Net, wanted: Masks, wrap: Callable[[Any], Any], prefix: str
) -> None:
    state = {prefix + name: tensor for name, tensor in sparse_state(net, wanted).items()}
    found = convert(saved(tmp_path / "w.pth.tar", wrap(state)), net)
    assert found.masks == wanted
    assert (found.form, found.whole, found.metadata) == (ZEROS, (), {})


def test_zeros_of_files_of_every_kind(tmp_path: Path, net: Net, wanted: Masks) -> None:
    state = sparse_state(net, wanted)
    save_file(state, str(tmp_path / "w.safetensors"))
    save_file(state, str(tmp_path / "w.bin"))  # known by its contents
    files.save_weights(tmp_path / "ours.safetensors", state)
    saved(tmp_path / "new.pt", state)
    saved(tmp_path / "old.ckpt", state, _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.iterdir()):
        assert convert(path, net).masks == wanted, path.name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_zeros_of_any_dtype(tmp_path: Path, net: Net, wanted: Masks, dtype: torch.dtype) -> None:
    state = {name: mask.to(dtype) for name, mask in wanted.items()}
    assert convert(saved(tmp_path / "w.pt", state), net).masks == wanted


def test_tiny_negative_zero_nan_and_sparse_weights(tmp_path: Path) -> None:
    weight = torch.tensor([[1e-45, -0.0, float("nan")], [0.0, 5e-324, float("inf")]], dtype=torch.float64)
    weight[0, 0] = 1e-300  # not 0 in float64, 0 in float32
    path = saved(tmp_path / "w.pt", {"fc.weight": weight})
    assert convert(path).masks["fc.weight"].tolist() == [[True, False, True], [False, True, True]]
    path = saved(tmp_path / "s.pt", {"fc.weight": torch.eye(3).to_sparse()})
    assert torch.equal(convert(path).masks["fc.weight"], torch.eye(3, dtype=torch.bool))


def test_zeros_without_a_model_are_those_of_matrices_named_weight(tmp_path: Path, net: Net, wanted: Masks) -> None:
    state = sparse_state(net, wanted)
    state["norm.weight"] = torch.zeros(3)
    state["table"] = torch.zeros(3, 3)
    found = convert(saved(tmp_path / "w.pt", state))
    assert found.form == ZEROS
    assert set(found.masks) == {*NAMES, "embed.weight"}  # an embedding looks like a linear layer
    assert found.masks["embed.weight"].all()
    assert all(torch.equal(found.masks[name], wanted[name]) for name in NAMES)


def test_parameters_the_file_lacks_are_kept_whole_and_listed(tmp_path: Path, net: Net, wanted: Masks) -> None:
    state = sparse_state(net, wanted)
    del state["point.weight"], state["fc.weight"]
    found = convert(saved(tmp_path / "w.pt", state), net)
    assert found.whole == ("point.weight", "fc.weight")
    assert list(found.masks) == NAMES
    assert found.masks["fc.weight"].all()
    assert found.masks["point.weight"].all()
    assert torch.equal(found.masks["conv.weight"], wanted["conv.weight"])


class Masked(nn.Module):
    """What masked layers of a harness look like on disk: a weight and a float buffer `mask` of the weight's shape."""

    def __init__(self, mask: torch.Tensor, as_convolution: bool) -> None:
        super().__init__()
        shape = (*mask.shape, 1) if as_convolution else mask.shape
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(mask.shape[0]))
        self.register_buffer("mask", mask.float().reshape(shape))


def masked_state(wanted: Masks) -> dict[str, torch.Tensor]:
    model = nn.ModuleDict(
        {
            "conv": Masked(wanted["conv.weight"], False),
            "norm": nn.BatchNorm2d(3),
            "point": Masked(wanted["point.weight"], False),
            "fc": Masked(wanted["fc.weight"], True),
        }
    )
    state = model.state_dict()
    state["point.weight"][0] = 0.0  # zeros do not count where there are masks
    return dict(state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_mask_buffers_beside_weights(tmp_path: Path, net: Net, wanted: Masks, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in masked_state(wanted).items()}
    path = saved(tmp_path / "model_level_3.pt", state)
    found = convert(path, net)
    assert found.form == BUFFERS
    assert found.whole == ("attn.in_proj_weight", "attn.out_proj.weight")
    for name in ("conv.weight", "point.weight", "fc.weight"):
        assert torch.equal(found.masks[name], wanted[name])
    assert all(found.masks[name].all() for name in found.whole)
    alone = convert(path)
    assert list(alone.masks) == ["conv.weight", "point.weight", "fc.weight"]
    assert all(torch.equal(mask, wanted[name]) for name, mask in alone.masks.items())  # fc as a matrix, point not


def test_mask_buffers_alone(tmp_path: Path, wanted: Masks) -> None:
    path = saved(tmp_path / "m.pt", {"conv.mask": wanted["conv.weight"].int(), "fc.mask": wanted["fc.weight"].double()})
    assert convert(path).masks == Masks({name: wanted[name] for name in ("conv.weight", "fc.weight")})


def pruned_by_torch(net: Net, wanted: Masks) -> dict[str, torch.Tensor]:
    for name, mask in wanted.items():
        layer, _, parameter = name.rpartition(".")
        prune.custom_from_mask(net.get_submodule(layer), parameter, mask)
    return dict(net.state_dict())


def test_masks_of_torch_prune(tmp_path: Path, net: Net, wanted: Masks) -> None:
    state = pruned_by_torch(net, wanted)
    state["fc.weight_orig"][:, 0] = 0.0  # a live weight that is 0
    path = saved(tmp_path / "w.pt", {"state_dict": state})
    found = convert(path, Net())
    assert (found.form, found.whole) == (REPARAMETRIZED, ())
    assert found.masks == wanted
    assert dict(convert(path).masks).keys() == set(NAMES)
    assert all(torch.equal(mask, wanted[name]) for name, mask in convert(path).masks.items())


def test_a_dict_of_masks_alone(tmp_path: Path, net: Net, wanted: Masks) -> None:
    path = saved(tmp_path / "1-mask.pt", {f"module.{name}_mask": mask.float() for name, mask in wanted.items()})
    assert convert(path, net).masks == wanted


def test_masks_of_biases_are_ignored_whole_and_refused_pruned(tmp_path: Path, net: Net, wanted: Masks) -> None:
    prune.identity(net.fc, "bias")
    prune.identity(net.norm, "weight")
    state = pruned_by_torch(net, wanted)
    assert {"fc.bias_mask", "norm.weight_mask"} <= state.keys()
    path = saved(tmp_path / "w.pt", state)
    assert convert(path, Net()).masks == wanted
    assert set(convert(path).masks) == set(NAMES)
    state["fc.bias_mask"][2] = 0.0
    saved(path, state)
    with pytest.raises(UserError, match=r"w.pt: 'fc.bias' is not a prunable parameter"):
        convert(path, Net())
    with pytest.raises(UserError, match=r"w.pt: prunes 'fc.bias', a bias or a norm"):
        convert(path)


def test_buffers_that_only_sound_like_masks(tmp_path: Path, net: Net, wanted: Masks) -> None:
    state = sparse_state(net, wanted)
    state |= {"blocks.0.attn_mask": torch.tensor([[0.0, -100.0]]), "tokens.mask": torch.tensor([2.0])}
    found = convert(saved(tmp_path / "swin.pt", state), net)
    assert found.form == ZEROS
    assert found.masks == wanted


def test_both_kinds_of_mask_entries(tmp_path: Path, net: Net, wanted: Masks) -> None:
    state = masked_state(wanted) | {"attn.in_proj_weight_mask": wanted["attn.in_proj_weight"]}
    found = convert(saved(tmp_path / "w.pt", state), net)
    assert found.form == BOTH
    assert found.whole == ("attn.out_proj.weight",)
    assert torch.equal(found.masks["attn.in_proj_weight"], wanted["attn.in_proj_weight"])
    path = saved(tmp_path / "w.pt", state | {"conv.weight_mask": ~wanted["conv.weight"]})
    with pytest.raises(UserError, match=r"two different masks for 'conv.weight'"):
        convert(path, net)


def test_our_own_file_comes_back_as_it_is(tmp_path: Path, net: Net, wanted: Masks) -> None:
    some = Masks({name: wanted[name] for name in NAMES[:3]})
    some.save(tmp_path / "m.safetensors", source="weights of level 2")
    for model, whole in [(None, ()), (net, tuple(NAMES[3:]))]:
        found = convert(tmp_path / "m.safetensors", model)
        assert found.masks.digest == some.digest
        assert list(found.masks) == (NAMES[:3] if model else sorted(NAMES[:3]))
        assert (found.form, found.whole) == (MASK_FILE, whole)
        assert found.metadata["source"] == "weights of level 2"
        assert found.metadata["digest"] == some.digest


def test_tied_weights_are_one_entry(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    model = Tied()
    mask = torch.rand(4, 4) < 0.5
    mask[0, 0] = False
    with torch.no_grad():
        model.first.weight.mul_(mask)
    state = model.state_dict()
    path = saved(tmp_path / "w.pt", state)
    assert convert(path, model).masks == Masks({"first.weight": mask})
    path = saved(tmp_path / "w.pt", {"second.weight": state["second.weight"]})
    assert convert(path, model).whole == ()
    assert convert(path, model).masks == Masks({"first.weight": mask})
    path = saved(tmp_path / "w.pt", {**state, "second.weight": torch.zeros(4, 4)})
    with pytest.raises(UserError, match=r"two different masks for 'first.weight'"):
        convert(path, model)


def test_a_model_may_have_a_part_called_module(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(3, 3), "last": nn.Linear(3, 3)})
    state = {**model.state_dict(), "module.weight": torch.eye(3)}
    found = convert(saved(tmp_path / "w.pt", state), model)
    assert found.whole == ()
    assert torch.equal(found.masks["module.weight"], torch.eye(3, dtype=torch.bool))


def test_values_that_are_no_mask(tmp_path: Path, net: Net, wanted: Masks) -> None:
    for value in (0.5, 2.0, -1.0, float("nan")):
        state = masked_state(wanted)
        state["point.mask"][1, 1] = value
        path = saved(tmp_path / "w.pt", state)
        for model in (None, net):
            with pytest.raises(UserError, match=r"w.pt: 'point.mask' holds values other than 0 and 1"):
                convert(path, model)


@pytest.mark.parametrize("key", ["fc.mask", "fc.weight_mask", "fc.weight"])
def test_shapes_and_names_are_the_models(tmp_path: Path, net: Net, key: str) -> None:
    mask = torch.zeros(4, 6)
    state = {key: mask, "fc.weight": mask} if key == "fc.mask" else {key: mask}
    with pytest.raises(UserError, match=r"w.pt: 'fc.weight' has shape 4x6, the model's is 4x5"):
        convert(saved(tmp_path / "w.pt", state), net)
    other = {name.replace("fc.", "head."): tensor for name, tensor in state.items()}
    if key == "fc.weight":
        message = r"w.pt: no mask found, nor a weight"
    else:
        message = r"w.pt: 'head.weight' is not a prunable parameter"
    with pytest.raises(UserError, match=message):
        convert(saved(tmp_path / "w.pt", other), net)


class Evil:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path: Path, net: Net, wanted: Masks, zipped: bool) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "w.pt"
    saved(path, {"state_dict": sparse_state(net, wanted), "more": Evil(mark)}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"w.pt: holds more than tensors \(posix.mkdir\), and nothing in it is executed"
    ) as told:
        convert(path, net)
    assert "\n" not in str(told.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.is_dir()  # it would have


def test_files_that_need_more_than_tensors_are_refused(tmp_path: Path, net: Net) -> None:
    for number, payload in enumerate([net, {"state_dict": defaultdict(list)}]):
        with pytest.raises(UserError, match=rf"{number}.pt: holds more than tensors .*save its state_dict alone"):
            convert(saved(tmp_path / f"{number}.pt", payload), net)
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match=r"script.pt: unpacks to .* which torch.save does not write; save it anew"):
        convert(tmp_path / "script.pt")


def test_files_that_are_not_whole(tmp_path: Path, net: Net, wanted: Masks) -> None:
    state = sparse_state(net, wanted)
    whole = {
        "zip.pt": saved(tmp_path / "whole.pt", state).read_bytes(),
        "old.pt": saved(tmp_path / "whole.pt", state, _use_new_zipfile_serialization=False).read_bytes(),
    }
    wanted.save(tmp_path / "whole.safetensors")
    whole["m.safetensors"] = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in whole.items():
        for share in (0.02, 0.5, 0.97):
            (tmp_path / name).write_bytes(content[: int(share * len(content))])
            with pytest.raises(UserError, match=rf"{name}: not a whole .*anew"):
                convert(tmp_path / name, net)
    for content in (b"these are no weights at all", b"\x80\x04 nor these", pickle.dumps([1.5], 4), b"PK\x03\x04"):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"w.pt: not a whole file|w.pt: holds list"):
            convert(tmp_path / "w.pt")


def test_files_without_masks(tmp_path: Path, net: Net) -> None:
    path = tmp_path / "w.pt"
    with pytest.raises(UserError, match=r"w.pt: no such file"):
        convert(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"w.pt: the file is empty"):
        convert(path)
    empty: list[Any] = [{}, {"epoch": 3}, {"state_dict": {}}, {"fc.bias": torch.zeros(4)}]
    for payload in empty:
        with pytest.raises(UserError, match=r"w.pt: no mask found, nor a weight that could hold zeros"):
            convert(saved(path, payload), net)
        with pytest.raises(UserError, match=r"w.pt: no mask found, nor a weight that could hold zeros"):
            convert(path)
    for other in ([torch.ones(2)], torch.ones(2)):
        with pytest.raises(UserError, match=r"w.pt: holds (list|Tensor), not a dict of tensors"):
            convert(saved(path, other))
    dense = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError, match=r"w.pt: no mask found: .* is it dense\?"):
        convert(saved(path, dense), net)


def test_a_mask_of_all_ones_is_a_mask(tmp_path: Path, net: Net, wanted: Masks) -> None:
    path = saved(tmp_path / "m.pt", {f"{name}_mask": torch.ones(mask.shape) for name, mask in wanted.items()})
    assert convert(path, net).masks == Masks.dense(net)
