"""Masks: what is prunable, set algebra, digests, files."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from utils import masks as module
from utils.masks import Masks, bare, copied, prunable_parameters
from utils.system.errors import UserError


class Small(nn.Module):
    """A grouped conv, a norm, attention, an embedding and a head tied to a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 3)
        self.again = nn.Linear(8, 3)
        self.again.weight = self.head.weight


def random_masks(model: nn.Module, seed: int = 0, density: float = 0.5) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    found = prunable_parameters(model)
    return Masks({n: torch.rand(p.shape, generator=generator) < density for n, p in found.items()})


def test_prunable_parameters_are_conv_linear_and_attention_weights_once() -> None:
    expected = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert list(prunable_parameters(Small())) == expected


def test_attention_with_separate_projections_is_prunable() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert list(prunable_parameters(model)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def test_exclude_takes_globs_and_refuses_one_that_matches_nothing() -> None:
    assert "conv.weight" not in prunable_parameters(Small(), ["conv*"])
    with pytest.raises(UserError, match=r"pruning\.exclude: 'cnov\.weight'.*did you mean 'conv\.weight'"):
        prunable_parameters(Small(), ["cnov.weight"])


def test_names_are_the_bare_models_through_compile() -> None:
    model = Small()
    compiled = torch.compile(model)
    assert bare(compiled) is model
    assert list(Masks.dense(compiled)) == list(Masks.dense(model))


def test_counts_and_density() -> None:
    masks = Masks({"a": torch.tensor([True, False, True]), "b": torch.zeros(5, dtype=torch.bool)})
    assert (masks.kept, masks.total, masks.density) == (2, 8, 0.25)
    assert masks.counts == {"a": 2, "b": 0}


def test_a_mask_that_is_not_bool_is_refused() -> None:
    with pytest.raises(ValueError, match="not bool"):
        Masks({"a": torch.ones(3)})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_set_algebra_laws(one: int, two: int) -> None:
    model = nn.Linear(7, 5)
    a, b = random_masks(model, one), random_masks(model, two)
    assert (a & b) <= a
    assert a <= (a | b)
    assert (a & b).kept + (a | b).kept == a.kept + b.kept
    assert (a == b) == (a.digest == b.digest)
    assert (a <= b) == all(
        x <= y for x, y in zip(a["weight"].flatten().tolist(), b["weight"].flatten().tolist(), strict=True)
    )


def test_masks_of_other_parameters_do_not_mix() -> None:
    with pytest.raises(ValueError, match="first 'a'"):
        _ = Masks({"a": torch.ones(2, dtype=torch.bool)}) & Masks({"b": torch.ones(2, dtype=torch.bool)})


def test_digest_is_of_the_bits_and_ignores_layout() -> None:
    bits = torch.rand(4, 3, 2, 2) < 0.5
    plain, strided = Masks({"w": bits}), Masks({"w": bits.contiguous(memory_format=torch.channels_last)})
    assert plain.digest == strided.digest
    packed, value = bytearray(), 0
    flat = bits.flatten().tolist()
    for start in range(0, len(flat), 8):
        chunk = flat[start : start + 8] + [False] * 8
        value = sum(1 << (7 - i) for i in range(8) if chunk[i])
        packed.append(value)
    assert plain.digest == hashlib.sha256(b"w\0(4, 3, 2, 2)\0" + bytes(packed)).hexdigest()
    flipped = bits.clone()
    flipped[0, 0, 0, 0] ^= True
    assert Masks({"w": flipped}).digest != plain.digest


def test_apply_fills_even_nan_and_never_leaves_minus_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[float("nan"), -1.0], [float("inf"), 3.0]])
    Masks({"weight": torch.tensor([[False, False], [False, True]])}).apply_(model)
    assert model.weight.tolist() == [[0.0, 0.0], [0.0, 3.0]]
    assert not torch.signbit(model.weight).any()


def test_save_and_load(tmp_path) -> None:
    model = Small()
    masks = random_masks(model)
    masks.save(tmp_path / "m.safetensors")
    loaded = Masks.load(tmp_path / "m.safetensors", model)
    assert loaded == masks
    assert list(loaded) == list(masks)


def test_masks_of_another_model_name_the_file(tmp_path) -> None:
    random_masks(nn.Linear(3, 4)).save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors: 'weight' has shape 4x3, the model's is 4x2"):
        Masks.load(tmp_path / "m.safetensors", nn.Linear(2, 4))
    with pytest.raises(UserError, match=r"m\.safetensors: 'weight' is not a prunable parameter"):
        Masks.load(tmp_path / "m.safetensors", Small())


def test_damaged_and_foreign_mask_files_are_named(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    random_masks(nn.Linear(30, 40)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"m\.safetensors: not a whole safetensors file"):
        Masks.load(path)
    bits = bytearray(whole)
    bits[-1] ^= 1
    path.write_bytes(bytes(bits))
    with pytest.raises(UserError, match=r"m\.safetensors: its digest does not match"):
        Masks.load(path)
    from utils.files import save_weights

    save_weights(path, nn.Linear(3, 3))
    with pytest.raises(UserError, match="not a 0/1 mask"):
        Masks.load(path)
    with pytest.raises(UserError, match="no such file"):
        Masks.load(tmp_path / "absent.safetensors")


def test_copied_tensors_are_equal_contiguous_and_of_one_memory_of_their_own() -> None:
    bits = torch.rand(4, 3, 2, 2) < 0.5
    tensors = {
        "strided": bits.contiguous(memory_format=torch.channels_last), "scalar": torch.tensor(True),
        "empty": torch.zeros(0, 3, dtype=torch.bool), "expanded": torch.tensor(True).expand(2, 5),
    }  # fmt: skip
    for given_ in (tensors, {"alone": bits}, {}):
        before = {name: tensor.clone() for name, tensor in given_.items()}
        found = copied(given_, torch.device("cpu"))
        assert list(found) == list(given_)
        assert all(tensor.is_contiguous() for tensor in found.values())
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
        assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) <= 1
        for tensor in found.values():
            tensor.logical_not_()
        assert all(torch.equal(given_[name], tensor) for name, tensor in before.items())


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """From where to where tensors are copied together from now on."""
    copies: list[tuple[str, str]] = []

    def counted(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        copies.append((next(iter(tensors.values())).device.type, device.type))
        return copied(tensors, device)

    monkeypatch.setattr(module, "copied", counted)
    return copies


def test_on_the_cpu_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, masks = count_copies(monkeypatch), random_masks(Small())
    there = masks.on(torch.device("cpu"))
    assert all(there[name] is tensor for name, tensor in masks.items())
    assert copies == []


def test_masks_are_sent_to_a_gpu_once_and_those_from_there_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values stand for those of a GPU."""
    copies = count_copies(monkeypatch)
    gpu = torch.device("cuda:0")
    with FakeTensorMode():
        masks = Masks({"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.ones(5, dtype=torch.bool)})
        assert copies == []
        there = masks.on(gpu)
        assert masks.on(gpu) is there
        assert copies == [("cpu", "cuda")]
        copies.clear()
        again = Masks(there)
        assert copies == [("cuda", "cuda"), ("cuda", "cpu")]
        assert all(again.on(gpu)[name] is not tensor for name, tensor in there.items())
        assert len(copies) == 2
        for held, device in ((again, "cpu"), (again.on(gpu), "cuda"), (there, "cuda")):
            assert {name: tuple(t.shape) for name, t in held.items()} == {"a": (2, 3), "b": (5,)}
            assert {tensor.device.type for tensor in held.values()} == {device}
        mixed = Masks({"a": there["a"], "b": masks["b"]})
        assert {tensor.device.type for tensor in mixed.values()} == {"cpu"}
        assert len(copies) == 2


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda masks: pickle.loads(pickle.dumps(masks))])
def test_copies_and_pickles_leave_the_gpu_s_tensors_behind(make: Callable[[Masks], Masks]) -> None:
    masks = random_masks(Small())
    masks._tensors = copied(masks._tensors, torch.device("cpu"))  # views of one tensor, as those from a GPU are
    masks._there[torch.device("cuda:0")] = {"big": torch.zeros(10_000, dtype=torch.bool)}
    made = make(masks)
    assert made == masks
    assert made.digest == masks.digest
    assert made._there == {}
    assert len(pickle.dumps(masks)) < masks.total + 3000


def test_a_pickle_of_views_holds_every_byte_once() -> None:
    masks = Masks({f"{i}": torch.ones(1000, dtype=torch.bool) for i in range(20)})
    masks._tensors = copied(masks._tensors, torch.device("cpu"))
    assert len(pickle.dumps(masks)) < 2 * masks.total
