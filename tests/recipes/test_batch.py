"""Images of a data set as one batch: which were read, where they stand, and what could not be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from torchloupe._batch import read_batch
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.spec import Spec


@pytest.fixture
def handle() -> Handle:
    def as_they_are(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    return Handle(torch.nn.Conv2d(3, 2, 1).double(), Spec(preprocess=as_they_are))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (8, 6), (51 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    return tmp_path


def test_images_stand_in_the_order_asked_for(handle: Handle, folder: Path) -> None:
    data = open_data(folder, handle.spec)
    read = read_batch(handle, data, [3, 1, 0, 3], asking="a test")
    assert (read.places, read.indices, len(read)) == ([0, 2, 3], [3, 0, 3], 3)
    assert read.inputs.shape == (3, 3, 6, 8) and read.inputs.dtype == torch.float64
    torch.testing.assert_close(read.inputs[:, 0, 0, 0], torch.tensor([0.6, 0.0, 0.6]).double(), atol=1e-6, rtol=0)
    assert list(read.skipped) == [data.name(1)] and read.skipped[data.name(1)]


def test_none_is_an_empty_batch(handle: Handle, folder: Path) -> None:
    read = read_batch(handle, open_data(folder, handle.spec), [1], asking="a test")
    assert not len(read) and not len(read.inputs) and len(read.skipped) == 1


def test_what_cannot_be_one_batch(handle: Handle, folder: Path) -> None:
    with pytest.raises(BadInput, match=r"1\.png: "):
        read_batch(handle, open_data(folder, handle.spec), [0, 1], asking="a test", skip_failures=False)
    Image.new("RGB", (6, 6)).save(folder / "2.png")
    with pytest.raises(BadInput, match="of several sizes; a test needs one"):
        read_batch(handle, open_data(folder, handle.spec), [0, 2], asking="a test")
