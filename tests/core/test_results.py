"""Attributions: saving, opening, and the named steps after the raw values."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe_core.errors import BadInput, StoreError
from torchloupe_core.results import Attribution, open_result, write_whole


def attribution(values: Tensor | None = None, **changes: Any) -> Attribution:
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) if values is None else values
    facts: dict[str, Any] = {
        "method": "captum.occlusion",
        "backend": "captum",
        "seed": 3,
        "seconds": 0.25,
        "forwards": 17,
        "versions": {"torch": "2.6"},
        "options": {"window": 3, "baseline": None},
        "values": values,
        "images": torch.rand(len(values), 3, 12, 16, generator=torch.Generator().manual_seed(1)),
        "scores": torch.arange(float(len(values))),
        "target": tuple(f"logit:{n}" for n in range(len(values))),
        "layer": "layer4",
        "signed": True,
        "per_channel": torch.randn(len(values), 3, 12, 16, generator=torch.Generator().manual_seed(2)),
        "diagnostics": {"completeness_gap": [0.5, 0.25]},
    }
    return Attribution(**{**facts, **changes})


# -- saving and opening -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"target": "logit:dog-0.5*layer4:1", "layer": None, "per_channel": None}])
def test_what_is_saved_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved = attribution(**changes)
    path = saved.save(tmp_path / "one")
    assert path == tmp_path / "one.npz"
    found = open_result(path)
    assert type(found) is Attribution
    for one in dataclasses.fields(Attribution):
        before, after = getattr(saved, one.name), getattr(found, one.name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after, one.name
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.npz"]  # nothing half-written lies about


def test_the_file_is_plain_numpy_and_json(tmp_path: Path) -> None:
    options = {"baseline": torch.tensor([1.0, 2.0]), "path": tmp_path, "p": np.float32(0.5)}
    path = attribution(options=options).save(tmp_path / "a.npz")
    with np.load(path, allow_pickle=False) as stored:
        assert set(stored.files) == {"provenance", "values", "images", "scores", "per_channel"}
        provenance = json.loads(str(stored["provenance"]))
    assert provenance["kind"] == "Attribution"
    assert provenance["options"] == {"baseline": [1.0, 2.0], "path": str(tmp_path), "p": 0.5}
    assert open_result(path).options["baseline"] == [1.0, 2.0]


def test_saving_makes_folders_and_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.b"
    assert attribution().save(path) == tmp_path / "new" / "folder" / "a.b.npz"
    attribution(seed=9).save(path)
    assert open_result(tmp_path / "new" / "folder" / "a.b.npz").seed == 9


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["PAYLOAD"],)


def foreign_files(tmp_path: Path) -> dict[str, Path]:
    path = attribution().save(tmp_path / "good")
    whole = path.read_bytes()
    files = {
        name: tmp_path / name for name in ("empty", "text", "cut", "flipped", "array", "other", "pickle", "objects")
    }
    files["empty"].write_bytes(b"")
    files["text"].write_text("no result")
    files["cut"].write_bytes(whole[: len(whole) // 2])
    files["flipped"].write_bytes(whole[:200] + bytes(b ^ 255 for b in whole[200:400]) + whole[400:])
    files["pickle"].write_bytes(pickle.dumps(Payload()))
    with files["array"].open("wb") as file:
        np.save(file, np.zeros(3))
    with files["other"].open("wb") as file:
        np.savez(file, x=np.zeros(3))
    with files["objects"].open("wb") as file:
        np.savez(file, provenance=np.array([Payload()], dtype=object))
    for name, provenance in {
        "not json": "{",
        "a list": "[1]",
        "a word": '"word"',
        "unknown kind": '{"kind": "Painting"}',
        "missing fields": '{"kind": "Attribution", "seed": 1}',
        "extra fields": json.dumps({"kind": "Attribution", "nonsense": 1}),
    }.items():
        files[name] = tmp_path / name
        with files[name].open("wb") as file:
            np.savez(file, provenance=np.array(provenance))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("provenance.npy", b"not an array")
    return files | {"zip": tmp_path / "zip", "folder": tmp_path, "nowhere": tmp_path / "nowhere"}


def test_a_file_that_is_no_result_is_refused_and_nothing_in_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "payload"))
    for name, path in foreign_files(tmp_path).items():
        with pytest.raises(StoreError) as caught:
            open_result(path)
        assert str(path) in str(caught.value), name
    assert not (tmp_path / "payload").exists()


def test_an_unwritable_place_is_an_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    with pytest.raises(StoreError, match="cannot write"):
        attribution().save(blocked / "a.npz")  # a file where a folder should be
    assert blocked.read_text() == "mine"
    kept = attribution(seed=1).save(tmp_path / "kept")

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:10])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, mode: Full(self, mode))
    with pytest.raises(StoreError, match="No space left on device"):
        attribution(seed=2).save(kept)
    monkeypatch.undo()
    assert open_result(kept).seed == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "kept.npz"]


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", b"after")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


# -- parts ------------------------------------------------------------------------------------------------------------


def test_one_image_of_several() -> None:
    both = attribution()
    for index, wanted in ((0, 0), (1, 1), (-1, 1)):
        one = both[index]
        assert len(one) == 1
        assert one.target == f"logit:{wanted}"
        assert one.per_channel is not None
        for name in ("values", "images", "scores", "per_channel"):
            assert torch.equal(getattr(one, name)[0], getattr(both, name)[wanted]), name
    assert [one.target for one in both] == ["logit:0", "logit:1"]
    with pytest.raises(IndexError):
        both[2]
    assert attribution(target="logit:dog").targets == ("logit:dog", "logit:dog")
    assert attribution(per_channel=None)[0].per_channel is None


def test_a_result_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        attribution().seed = 4  # type: ignore[misc]


# -- named steps ------------------------------------------------------------------------------------------------------


def test_upsampling_is_bilinear_to_the_images_size() -> None:
    found = attribution()
    expected = F.interpolate(found.values[:, None], (12, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found.upsample(), expected)
    assert torch.equal(attribution(torch.ones(1, 12, 16)).upsample(), torch.ones(1, 12, 16))
    corner = attribution(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 9.0]]])).upsample()
    assert corner[0, -1, -1] == corner.max() == 9


def test_normalisation_is_named_and_keeps_each_image_apart() -> None:
    values = torch.tensor([[[-2.0, 0.0], [1.0, 4.0]], [[0.0, 0.0], [0.0, 0.5]], [[3.0, 3.0], [3.0, 3.0]]])
    assert torch.equal(attribution(-values).normalize("absmax"), -attribution(values).normalize("absmax"))
    found = attribution(values)
    assert torch.equal(found.normalize("none"), values)
    absmax = torch.tensor([[[-0.5, 0.0], [0.25, 1.0]], [[0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    torch.testing.assert_close(found.normalize("absmax"), absmax)
    minmax = torch.tensor([[[0.0, 2 / 6], [0.5, 1.0]], [[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(found.normalize(), minmax)
    assert torch.equal(attribution(torch.zeros(1, 2, 2)).normalize("absmax"), torch.zeros(1, 2, 2))
    with pytest.raises(BadInput, match='"minmax", "absmax" or "none"'):
        found.normalize("softmax")  # type: ignore[arg-type]


def test_a_mask_holds_the_share_above_the_quantile() -> None:
    values = torch.stack([torch.randperm(192).view(12, 16), -torch.arange(192).view(12, 16)]).float()
    found = attribution(values)
    for quantile in (0.0, 0.5, 0.9):
        mask = found.mask(quantile=quantile)
        assert mask.shape == (2, 12, 16)
        assert mask.dtype == torch.bool
        assert mask.flatten(1).sum(1).tolist() == [191 - int(quantile * 191)] * 2
        assert values[0][mask[0]].min() > values[0][~mask[0]].max()
    for bad in (1.0, -0.1, 2):
        with pytest.raises(BadInput, match="quantile"):
            found.mask(quantile=bad)


def test_boxes_around_regions_the_heaviest_first() -> None:
    values = torch.zeros(3, 12, 16)
    values[0, 2:5, 3:9] = 1.0
    values[0, 8, 12] = 4.0
    values[0, 9, 13] = 4.0  # touches the last at a corner only: one region
    values[0, 10, 1] = 0.7  # below a fifth of the maximum
    values[1] = -1.0
    values[2] = 1.0
    found = attribution(values)
    assert found.boxes() == [[(2, 3, 5, 9), (8, 12, 10, 14)], [], [(0, 0, 12, 16)]]
    assert found.boxes(threshold=0.5)[0] == [(8, 12, 10, 14)]
    for bad in (0.0, 1.0):
        with pytest.raises(BadInput, match="threshold"):
            found.boxes(threshold=bad)


def test_a_winding_region_is_one_box() -> None:
    values = torch.zeros(1, 12, 16)
    values[0, ::2] = 1.0
    for row in range(1, 12, 2):
        values[0, row, -1 if row % 4 == 1 else 0] = 1.0
    assert attribution(values).boxes() == [[(0, 0, 12, 16)]]
