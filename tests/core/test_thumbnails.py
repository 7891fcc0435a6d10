"""Small pictures: what the model was shown, whole, from wherever they can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import embedding
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from torchloupe_core import thumbnails as module
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.spec import Spec
from torchloupe_core.thumbnails import natural_size, small

SPEC = Spec(input_size=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_they_are_what_the_model_was_shown() -> None:
    shown = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = (shown - 0.5) / 0.25
    assert torch.equal(small(inputs, SPEC, 16), (shown * 255).round().byte())
    halved = small(inputs, SPEC, 8)
    torch.testing.assert_close(
        halved.float(), torch.nn.functional.avg_pool2d(shown[None] * 255, 2)[0], atol=1.5, rtol=0
    )
    assert torch.equal(small(inputs, SPEC, 32)[:, ::2, 1::2], (shown * 255).round().byte())  # by whole pixels


def test_those_that_are_not_square_are_shown_whole_on_white() -> None:
    found = small(torch.zeros(3, 8, 16), Spec(), 16)
    assert (found[:, 4:12] == 0).all() and (found[:, :4] == 255).all() and (found[:, 12:] == 255).all()


def test_each_image_is_read_once_wherever_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data([flat((n * 20, 0, 0)) for n in range(10)], SPEC)
    read: list[int] = []
    reading = type(data).read
    monkeypatch.setattr(type(data), "read", lambda self, index: read.append(index) or reading(self, index))
    found = embedding(torch.rand(10, 2), data=data)
    told: list[tuple[int, int]] = []
    small_ones = found.thumbnails(4, torch.tensor([7, 2, 7]), progress=lambda done, total: told.append((done, total)))
    assert small_ones[:, 0, 0, 0].tolist() == [140, 40, 140]
    assert sorted(read) == [2, 7] and told[-1][1] == 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (flat((n * 20, 0, 0)) for n in range(5))


def test_of_a_stream_too() -> None:
    found = embedding(torch.rand(3, 2), indices=torch.tensor([0, 3, 4]), data=open_data(Stream(), SPEC))
    assert found.thumbnails(4)[:, 0, 0, 0].tolist() == [0, 60, 80]


def test_from_files_when_the_data_set_is_gone_and_grey_for_those_that_are_gone(tmp_path: Path) -> None:
    names = tuple(str(tmp_path / f"{n}.png") for n in range(3))
    for n, name in enumerate(names):
        flat((0, 50 * n, 0), (8, 4)).save(name)
    found = embedding(torch.rand(3, 2), names=names)
    assert natural_size(found) == 8
    Path(names[1]).unlink()
    pictures = found.thumbnails(8)
    assert pictures[2, 1, 4, 4] == 100 and (pictures[1] == module.MISSING).all()
    changed = embedding(torch.rand(3, 2), names=names, data=open_data(list(names), SPEC))
    assert (changed.thumbnails(8)[1] == module.MISSING).all()


def test_kept_ones_come_first(tmp_path: Path) -> None:
    data = open_data([flat((n, n, n)) for n in range(4)], SPEC)
    found = embedding(torch.rand(4, 2), data=data).with_pictures(8)
    again = type(found).kinds["Embedding"]
    assert found.pictures is not None and found.pictures.shape == (4, 3, 8, 8) and natural_size(found) == 8
    bare = embedding(torch.rand(4, 2), pictures=found.pictures)
    assert torch.equal(bare.thumbnails(8, torch.tensor([3, 1])), found.pictures[[3, 1]])
    assert bare.thumbnails(16).shape == (4, 3, 16, 16) and again is type(found)


def test_where_there_are_none() -> None:
    with pytest.raises(BadInput, match="not at hand: they were no files; with_pictures"):
        embedding(torch.rand(4, 2)).thumbnails()
    with pytest.raises(BadInput, match="at least 1 pixel"):
        embedding(torch.rand(4, 2), names=("a",) * 4).thumbnails(0)


def test_pictures_in_the_caller_s_arrays_stay_as_they_are() -> None:
    arrays = [np.full((16, 16, 3), n, dtype=np.uint8) for n in range(3)]
    before: list[Tensor] = [torch.from_numpy(one.copy()) for one in arrays]
    embedding(torch.rand(3, 2), data=open_data(arrays, SPEC)).thumbnails(4).add_(9)
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(arrays, before, strict=True))
