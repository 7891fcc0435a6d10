"""`tl.clean`: scores against loops, wrong labels found, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.specimens import SPECIMENS

N, K = 60, 3


@pytest.fixture(scope="module")
def blobs() -> tuple[tl.Handle, TensorDataset, torch.Tensor]:
    """Images `[1, 2, 2]` of three classes that a linear layer tells apart, six of their labels wrong."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(N) % K
    inputs = F.one_hot(truth, 4).float() * 3 + 0.5 * torch.randn(N, 4, generator=generator)
    wrong = torch.randperm(N, generator=generator)[:6].sort().values
    labels = truth.clone()
    labels[wrong] = (truth[wrong] + 1) % K
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, K))
    with torch.no_grad():
        module[1].weight.copy_(torch.eye(K, 4))
        module[1].bias.zero_()
    return tl.wrap(module, input_size=(1, 2, 2)), TensorDataset(inputs.view(N, 1, 2, 2), labels), wrong


def test_each_score_is_what_it_says(blobs: Any) -> None:
    handle, data, _ = blobs
    found = tl.clean(handle, data, k=5)
    inputs, labels = data.tensors
    with torch.no_grad():
        logits = handle.module(inputs)
    torch.testing.assert_close(found.by("loss"), F.cross_entropy(logits, labels, reduction="none"))
    margins = [max(row[c] for c in range(K) if c != y) - row[y] for row, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(found.by("margin"), torch.stack(margins))
    itself = tl.influence(handle, data, inputs[:1], method="self", check=0)
    torch.testing.assert_close(found.by("self_influence"), itself.scores[0])
    flat = inputs.flatten(1).double()
    alike = F.normalize(flat) @ F.normalize(flat).T
    for row in range(N):
        others = sorted((other for other in range(N) if other != row), key=lambda other: -alike[row, other].item())[:5]
        share = sum(labels[other] != labels[row] for other in others) / 5
        assert share <= found.by("neighbors")[row] <= share + 1 / 6 + 1e-6
    assert found.predictions.equal(logits.argmax(1)) and found.labels.equal(labels) and found.k == 5
    torch.testing.assert_close(found.confidences, logits.softmax(1).amax(1))


def test_wrong_labels_come_first(blobs: Any) -> None:
    handle, data, wrong = blobs
    found = tl.clean(handle, data)
    for by in (None, *found.score_names):
        assert found.top(6, by).sort().values.equal(wrong), by
    assert found.order().sort().values.equal(torch.arange(N))


def test_suspicion_is_the_mean_share_of_less_suspicious_images(blobs: Any) -> None:
    found = tl.clean(*blobs[:2])
    for values, shares in zip(found.scores, found.shares, strict=True):
        below = (values[None] < values[:, None]).sum(1) + ((values[None] == values[:, None]).sum(1) - 1) / 2
        torch.testing.assert_close(shares, below.double() / (N - 1))
    torch.testing.assert_close(found.suspicion, found.shares.mean(0))


@pytest.mark.slow
def test_the_wrong_labels_of_the_embedded_model_are_found() -> None:
    train = tl.demo_scenes(800, 9_002, mislabelled=0.038)
    found = tl.clean("demo/mislabelled", train)
    wrong = torch.as_tensor(train.mislabelled)
    for by in (None, *found.score_names):
        assert wrong[found.top(int(wrong.sum()), by)].double().mean() >= 0.90, by  # by chance .04


def test_labels_given_win_and_a_list_of_pictures_keeps_its_names(tmp_path: Path) -> None:
    handle, _ = SPECIMENS["plain"]()
    paths = []
    for number in range(5):
        values = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(values).save(paths[-1])
    paths[2].write_bytes(b"no picture")
    found = tl.clean(handle, [str(path) for path in paths], labels=[0, 1, 2, 3, 4], k=50)
    assert found.labels.tolist() == [0, 1, 3, 4] and found.k == 3 and len(found.skipped) == 1
    assert found.name(2) == str(paths[3]) and found.indices.tolist() == [0, 1, 3, 4]
    with pytest.raises(BadInput, match="labels"):
        tl.clean(handle, [str(path) for path in paths])
    with pytest.raises(BadInput, match="is not an image"):
        tl.clean(handle, [str(path) for path in paths], labels=[0, 1, 2, 3, 4], skip_failures=False)


def test_what_is_refused(blobs: Any) -> None:
    handle, data, _ = blobs
    with pytest.raises(BadInput, match="k is at least 1; got 0"):
        tl.clean(handle, data, k=0)
    with pytest.raises(BadInput, match="is 7; the model has 3 outputs"):
        tl.clean(handle, data, labels=[7] * N)
    with pytest.raises(BadInput, match="one image has no neighbours"):
        tl.clean(handle, TensorDataset(*(one[:1] for one in data.tensors)))
    found = tl.clean(handle, data)
    with pytest.raises(BadInput, match="there is no score 'beauty'; there are loss, margin"):
        found.top(3, by="beauty")
    single = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(BadInput, match="looked through as classes"):
        tl.clean(tl.wrap(single, input_size=(1, 2, 2)), data, labels=[0] * N)
    bare = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Softmax(1))
    with pytest.raises(NotApplicable):
        tl.clean(tl.wrap(bare, input_size=(1, 2, 2)), data)


def test_the_model_comes_back_as_it_was() -> None:
    handle, inputs = SPECIMENS["residual"]()
    handle.module.train()
    kept = Snapshot(handle.module, inputs)
    tl.clean(handle, TensorDataset(inputs, torch.tensor([0, 1, 2])))
    assert kept.differences() == []


def test_saved_drawn_and_opened_again(blobs: Any, tmp_path: Path) -> None:
    found = tl.clean(*blobs[:2])
    again = tl.open(found.save(tmp_path / "found"))
    assert isinstance(again, tl.Suspects) and again.scores.equal(found.scores) and again.data is None
    rows = found.order()[:3]
    assert again.thumbnails(rows, 96).equal(found.thumbnails(rows, 96))
    figure = found.figure(k=5)
    shown = [one.get_text() for one in figure.axes[0].texts]
    first = int(found.order()[0])
    assert shown[0] == str(int(found.labels[first])) and shown[1].startswith(f"sees {int(found.predictions[first])} ")
    assert len(figure.axes[0].images) == 5 and "5 of 60 labels" in figure._suptitle.get_text()
    bare = tl.open(found.save(tmp_path / "bare", pictures=False))
    with pytest.raises(BadInput, match="not at hand"):
        bare.figure()


def test_the_page_holds_what_it_shows(blobs: Any, tmp_path: Path) -> None:
    handle, data, wrong = blobs
    found = tl.clean(handle, data)
    page = found.html(tmp_path / "page", k=10, title="A <b>title</b>").read_text()
    assert "A &lt;b&gt;title&lt;/b&gt;" in page
    (text,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', page, re.DOTALL)
    facts = json.loads(text)
    items = {one["index"]: one for one in facts["items"]}
    assert set(wrong.tolist()) <= set(items) and 10 <= len(items) <= 40
    for index, item in items.items():
        torch.testing.assert_close(torch.tensor(item["shares"]), found.shares[:, index].float(), atol=1e-5, rtol=0)
        assert item["given"] == str(int(found.labels[index])) and item["seen"] == str(int(found.predictions[index]))
    with pytest.raises(BadInput, match="k is at least 1"):
        found.html(tmp_path / "none", k=0)
