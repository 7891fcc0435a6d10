"""Weights from a file: what loads, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_adapters.checkpoint import load_into, read
from torchloupe_core.errors import BadInput


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.LazyLinear(5)).eval()


def made(seed: int, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    model = net(width)
    model(torch.zeros(2, 3, 6, 6))
    return model


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(value, now[key]) for key, value in state.items())


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


WRAPPINGS: dict[str, Any] = {
    "plain": lambda state: state,
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "compiled in parallel": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "parallel, compiled": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "both": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dicts_however_wrapped(tmp_path: Path, wrapping: str) -> None:
    source, target = made(1), made(2)
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "weights.pth")
    assert not same(target, kept(source))
    load_into(target, tmp_path / "weights.pth")
    assert same(target, kept(source))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(tmp_path: Path, prefix: str) -> None:
    source, target = made(1), made(2)
    save_file({f"{prefix}{key}": value for key, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    load_into(target, tmp_path / "w.safetensors")
    assert same(target, kept(source))


def test_a_model_whose_own_keys_begin_with_module(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    source, target = Wrapped(), Wrapped()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_into(target, tmp_path / "w.pt")
    assert same(target, kept(source))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.parametrize("form", ["torch.save", "legacy", "pickle", "inside a state dict", "named safetensors"])
def test_a_malicious_pickle_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "payload"))
    path = tmp_path / "weights.pt"
    evil: Any = Payload()
    if form == "inside a state dict":
        evil = {**made(1).state_dict(), "0.weight": Payload()}
    if form == "named safetensors":
        path = tmp_path / "weights.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form != "legacy")
    target = made(2)
    before = kept(target)
    with pytest.raises(BadInput) as caught:
        load_into(target, path)
    assert not (tmp_path / "payload").exists()
    assert "weights" in str(caught.value)
    assert ("could run code" in str(caught.value)) or form == "named safetensors"
    assert same(target, before)
    with pytest.raises(BadInput):
        tl.load("timm/test_resnet", checkpoint=path)
    assert not (tmp_path / "payload").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(BadInput, match=r"could run code.*state_dict"):
        read(tmp_path / "model.pt")


def test_a_mismatch_is_explained_key_by_key_and_changes_nothing(tmp_path: Path) -> None:
    state = made(1, width=6).state_dict()
    state["extra.weight"] = torch.zeros(3, 2)
    del state["3.bias"]
    torch.save(state, tmp_path / "w.pt")
    target = made(2)
    before = kept(target)
    with pytest.raises(BadInput) as caught:
        load_into(target, tmp_path / "w.pt")
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{tmp_path / 'w.pt'} does not fit this Sequential:"
    assert "  missing: 3.bias [5]" in lines
    assert "  not in the model: extra.weight [3, 2]" in lines
    assert "  of another shape: 0.weight [6, 3, 3, 3], the model has [4, 3, 3, 3]" in lines
    assert "  of another shape: 3.weight [5, 96], the model has [5, 64]" in lines
    assert same(target, before)


def test_a_refusal_loads_nothing_of_what_would_fit(tmp_path: Path) -> None:
    state = made(1).state_dict()
    del state["3.bias"]
    torch.save(state, tmp_path / "w.pt")
    target = made(2)
    before = kept(target)
    with pytest.raises(BadInput, match=r"missing: 3\.bias"):
        load_into(target, tmp_path / "w.pt")
    assert same(target, before)


def test_many_mismatches_are_counted(tmp_path: Path) -> None:
    torch.save({f"key{n}": torch.zeros(1) for n in range(30)}, tmp_path / "w.pt")
    with pytest.raises(BadInput) as caught:
        load_into(made(1), tmp_path / "w.pt")
    assert "  not in the model: 22 more" in str(caught.value)
    assert str(caught.value).count("not in the model: key") == 8


def bad_files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no weights, and rather more than eight bytes of it")
    torch.save(made(1).state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1500])
    save_file(made(1).state_dict(), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-50])
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "no weights")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    torch.save({"epoch": 3}, tmp_path / "number.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "folder.pt").mkdir()
    return {
        "empty.pt": "",
        "text.pt": "",
        "cut.pt": "",
        "zip.pt": "",
        "empty.safetensors": "not a safetensors file",
        "text.safetensors": "not a safetensors file",
        "cut.safetensors": "not a safetensors file",
        "list.pt": "no state dict",
        "nothing.pt": "no state dict",
        "number.pt": "no state dict",
        "tensor.pt": "no state dict",
        "folder.pt": "no such checkpoint",
        "nowhere.pt": "no such checkpoint",
    }


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    for name, says in bad_files(tmp_path).items():
        with pytest.raises(BadInput) as caught:
            read(tmp_path / name)
        assert name in str(caught.value), name
        assert says in str(caught.value), name


def test_what_is_loaded_does_not_alias_the_file_or_need_its_device(tmp_path: Path) -> None:
    source, target = made(1).double(), made(2)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_into(target, tmp_path / "w.pt")
    assert next(target.parameters()).dtype == torch.float32  # the model's own type stays
    torch.testing.assert_close(target[0].weight, source[0].weight.float())
