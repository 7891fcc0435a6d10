"""The features of a data set: against the layer's own output, image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.features import FeatureSet, collect
from torchloupe_core.handle import Handle
from torchloupe_core.specimens import SPECIMENS


def test_the_input_of_the_classifier_as_a_plain_loop_gives_it() -> None:
    handle, inputs = SPECIMENS["residual"]()
    module = handle.module.eval()
    found = collect(handle, inputs)
    seen: list[Tensor] = []
    hook = module.fc.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for one in inputs:
            module(one[None])
    hook.remove()
    assert found.layer == "fc.in" and found.indices.tolist() == [0, 1, 2] and found.labels.tolist() == [-1] * 3
    torch.testing.assert_close(found.vectors, torch.cat(seen))
    assert found.vectors.dtype == torch.float32 and not found.labelled
    assert (found.names, found.classes, found.skipped, len(found)) == (None, None, {}, 3)


@pytest.mark.parametrize("specimen", ["plain", "vit_registers", "nhwc", "concat"])
def test_a_layer_is_averaged_over_its_positions(specimen: str) -> None:
    handle, inputs = SPECIMENS[specimen]()
    layer = handle.features
    found = collect(handle, inputs, layer, batch_size=2)
    with handle.watch(layer) as watch:
        watch(inputs)
        torch.testing.assert_close(found.vectors, watch.map(layer).mean((2, 3)))
    assert found.layer == layer


def test_nothing_of_the_model_is_changed() -> None:
    handle, inputs = SPECIMENS["residual"]()
    handle.module.train()
    before = Snapshot(handle.module, inputs)
    collect(handle, inputs)
    with pytest.raises(UnknownName):
        collect(handle, inputs, "nowhere")
    assert before.differences() == []


def test_a_folder_gives_files_labels_classes_and_what_could_not_be_read(tmp_path: Path) -> None:
    handle, _ = SPECIMENS["plain"]()
    rng = np.random.default_rng(0)
    for name in ("ant/1.png", "ant/2.png", "bee/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "ant" / "0.png").write_bytes(b"no picture")
    found = collect(handle, tmp_path)
    assert found.names == tuple(str(tmp_path / name) for name in ("ant/1.png", "ant/2.png", "bee/3.png"))
    assert (found.labels.tolist(), found.classes, found.indices.tolist()) == ([0, 0, 1], ("ant", "bee"), [1, 2, 3])
    assert list(found.skipped) == [0] and list(found.failures) == [str(tmp_path / "ant" / "0.png")]
    with pytest.raises(BadInput, match=r"0\.png is not an image"):
        collect(handle, tmp_path, skip_failures=False)
    some = found.some([2, 0])
    assert some.names == (found.names[2], found.names[0]) and some.indices.tolist() == [3, 1]
    assert torch.equal(some.vectors, found.vectors[[2, 0]]) and some.name(0).endswith("3.png")


class Named(Dataset[Any]):
    classes = ("ant", "bee")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)), index % 2


def test_class_names_are_those_the_data_set_states() -> None:
    handle, _ = SPECIMENS["plain"]()
    assert collect(handle, Named()).classes == ("ant", "bee")
    assert collect(handle, DataLoader(Named(), 2)).classes == ("ant", "bee")
    labelled = collect(handle, TensorDataset(torch.rand(2, 3, 16, 16), torch.tensor([1, 4])))
    assert labelled.classes is None and labelled.labelled  # not the model's: its labels may mean something else


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (Named()[index] for index in range(4))


def test_a_stream_and_a_model_of_unknown_input_size() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    handle = Handle(module)
    found = collect(handle, Stream())
    assert found.layer == "4.in" and torch.equal(found.vectors, collect(handle, Named()).vectors)
    with pytest.raises(BadInput, match="no image of the data set can be read"):
        collect(handle, [object(), object()])


def test_bad_features_are_refused() -> None:
    three = torch.arange(3)
    with pytest.raises(BadInput, match=r"features are \[M, D\].*got \[3\]"):
        FeatureSet(torch.ones(3), three, three)
    with pytest.raises(BadInput, match="got \\[0, 4\\]"):
        FeatureSet(torch.ones(0, 4), three[:0], three[:0])
    with pytest.raises(BadInput, match="3 vectors come with 2 labels"):
        FeatureSet(torch.ones(3, 4), three, three[:2])
    values = torch.ones(3, 4)
    values[1, 2] = torch.nan
    with pytest.raises(BadInput, match="features of image 7 hold NaN"):
        FeatureSet(values, three + 6, three)


def test_lengths_are_those_of_the_vectors() -> None:
    found = FeatureSet(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.arange(2), torch.full((2,), -1))
    assert found.lengths.tolist() == [5.0, 0.0]
