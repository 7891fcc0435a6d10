"""`tl.influence`: data of every kind, labels, results, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable, StoreError, UnknownName
from torchloupe_core.specimens import CLASSES, SPECIMENS

HEADS = ["plain", "residual", "concat", "depthwise", "inplace", "nhwc", "vit_registers", "grayscale"]


def labelled(handle: Any, n: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *handle.spec.input_size, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 5, (n,), generator=generator))


def asked(name: str = "plain", n: int = 20, **options: Any) -> tl.Influence:
    handle, inputs = SPECIMENS[name]()
    return tl.influence(handle, labelled(handle, n), inputs, **{"check": 0, **options})


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_every_kind_of_model_against_a_loop(name: str) -> None:
    handle, inputs = SPECIMENS[name]()
    train = labelled(handle, 12)
    found = tl.influence(handle, train, inputs, method="gradient_dot", check=0)
    (layer,) = found.layers
    parameters = list(handle.module.get_submodule(layer).parameters())

    def gradient(image: Tensor, label: Tensor) -> Tensor:
        for one in parameters:
            one.requires_grad_(True)
        value = F.cross_entropy(handle.module(image[None].clone()), label[None])
        return torch.cat([one.flatten() for one in torch.autograd.grad(value, parameters)])

    predicted = handle.module(inputs.clone()).argmax(1)
    ours = torch.stack([gradient(*one) for one in zip(inputs, predicted, strict=True)])
    theirs = torch.stack([gradient(*one) for one in train])
    torch.testing.assert_close(found.scores, ours @ theirs.T / 12, rtol=1e-4, atol=1e-7)
    assert found.parameters == ours.shape[1]


def test_the_answer_says_what_was_asked_of_what() -> None:
    handle, inputs = SPECIMENS["residual"]()
    test = TensorDataset(inputs, torch.tensor([0, 4, 2]))
    found = tl.influence(handle, labelled(handle, 20), test, weight_decay=0.01, check=4)
    assert found.scores.shape == (3, 20) and found.scores.dtype == torch.float32
    assert found.about == ("loss for ant", "loss for elk", "loss for cat")
    assert found.sign == "positive: the image supported the prediction; removing it raises the test loss"
    assert found.units == "the change when the training image is removed, to first order"
    assert found.layers == ("fc",) and found.parameters == 17 * 5
    assert (
        found.test_labels.tolist() == [0, 4, 2]
        and found.train_labels.tolist() == labelled(handle, 20).tensors[1].tolist()
    )
    guesses = handle.predict(inputs, k=1)
    assert found.predictions.tolist() == [one[0].index for one in guesses]
    torch.testing.assert_close(found.confidences, torch.tensor([one[0].probability for one in guesses]))
    assert found.method == "cg" and found.options["tolerance"] == 1e-5 and found.forwards == 24
    assert (
        found.diagnostics["weight_decay"] == pytest.approx(0.01)
        and len(found.diagnostics["spot_check"]["removed"]) == 4
    )
    bare = tl.influence(handle, labelled(handle, 20), inputs, check=0)
    assert bare.about[0] == f"loss for {guesses[0][0].name}, as predicted" and bare.test_labels.tolist() == [-1, -1, -1]


def test_top_and_together() -> None:
    found = asked(n=9)
    best = found.top(4)
    expected = found.scores.argsort(1, descending=True)[:, :4]
    assert torch.equal(best.indices, expected) and torch.equal(best.scores, found.scores.gather(1, expected))
    assert torch.equal(best.labels, found.train_labels[expected])
    worst = found.top(2, "harmful")
    assert torch.equal(worst.scores[:, 0], found.scores.amin(1))
    assert found.top(99).indices.shape == (3, 9)
    groups = found.together([[0, 3, 5], range(9), []])
    torch.testing.assert_close(groups[:, 0], found.scores[:, [0, 3, 5]].sum(1))
    torch.testing.assert_close(groups[:, 1], found.scores.sum(1))
    assert (groups[:, 2] == 0).all() and found.together([]).shape == (3, 0)
    with pytest.raises(BadInput, match="no training image 9"):
        found.together([[9]])
    with pytest.raises(BadInput, match='kind is "helpful" or "harmful"; got \'best\''):
        found.top(2, "best")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="k is at least 1"):
        found.top(0)
    one = found[-1]
    assert len(one) == 1 and torch.equal(one.scores[0], found.scores[2]) and one.about == found.about[2:]


def test_one_test_image_of_any_kind() -> None:
    handle, inputs = SPECIMENS["plain"]()
    train = labelled(handle, 6)
    expected = tl.influence(handle, train, inputs[:1], check=0).scores
    torch.testing.assert_close(tl.influence(handle, train, inputs[0], check=0).scores, expected)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    assert len(tl.influence(handle, train, picture, check=0)) == 1
    assert len(tl.influence(handle, train, np.asarray(picture), check=0)) == 1


# -- data -------------------------------------------------------------------------------------------------------------


class Streamed(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data[n] for n in range(len(self.data)))


def test_data_sets_of_every_kind_give_the_same() -> None:
    handle, inputs = SPECIMENS["plain"]()
    train = labelled(handle, 12)
    expected = tl.influence(handle, train, inputs, check=0).scores
    for data in (DataLoader(train, 5, shuffle=True), Streamed(train), [train[n] for n in range(12)]):
        torch.testing.assert_close(tl.influence(handle, data, inputs, check=0).scores, expected)
    found = tl.influence(handle, train.tensors[0], inputs, labels=train.tensors[1], check=0, batch_size=5)
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-8)


def folder(path: Path, names: tuple[str, ...], each: int = 3) -> Path:
    for number, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for n in range(each):
            values = np.random.default_rng([number, n]).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(values).save(path / name / f"{n}.png")
    return path


def test_the_subfolders_of_a_folder_are_classes_by_name(tmp_path: Path) -> None:
    handle, inputs = SPECIMENS["plain"]()
    found = tl.influence(handle, folder(tmp_path / "a", ("elk", "bee")), inputs, check=0)
    assert found.train_labels.tolist() == [1, 1, 1, 4, 4, 4]  # bee and elk of the model's, not 0 and 1
    assert found.names["3"].endswith("elk/0.png")
    numbered = tl.influence(handle, folder(tmp_path / "b", ("0", "3")), inputs, check=0)
    assert numbered.train_labels.tolist() == [0, 0, 0, 3, 3, 3]
    with pytest.raises(BadInput, match="the training folder 'yak' is no class of the model, as 'ant', 'bee'"):
        tl.influence(handle, folder(tmp_path / "c", ("ant", "yak")), inputs, check=0)


def test_what_cannot_be_read_has_no_column(tmp_path: Path) -> None:
    handle, inputs = SPECIMENS["plain"]()
    path = folder(tmp_path, ("ant", "bee"))
    (path / "ant" / "1.png").write_bytes(b"no picture")
    found = tl.influence(handle, path, inputs, check=0)
    assert found.scores.shape == (3, 5) and found.train_indices.tolist() == [0, 2, 3, 4, 5]
    assert list(found.skipped) == [str(path / "ant" / "1.png")]
    assert set(found.top(5).indices.flatten().tolist()) == {0, 2, 3, 4, 5}
    with pytest.raises(BadInput, match=r"no training image 1"):
        found.together([[1]])
    with pytest.raises(BadInput, match=r"1\.png"):
        tl.influence(handle, path, inputs, check=0, skip_failures=False)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_labels_missing_or_out_of_range() -> None:
    handle, inputs = SPECIMENS["plain"]()
    with pytest.raises(BadInput, match=r"the training set has no labels.*labels="):
        tl.influence(handle, inputs, inputs)
    with pytest.raises(BadInput, match="the training label of image 2 is 5; the model has 5 outputs, 0 to 4"):
        tl.influence(handle, inputs, inputs, labels=[0, 1, 5])
    with pytest.raises(BadInput, match="the test label of image 0 is -1"):
        tl.influence(handle, inputs, inputs, labels=[0, 1, 2], test_labels=[-1, 0, 0])
    with pytest.raises(BadInput, match=r"the training label of image 1 is 0\.5"):
        tl.influence(handle, inputs, inputs, labels=[0, 0.5, 2])
    with pytest.raises(BadInput, match=r"labels of 3 training images are one number each; got shape \[2\]"):
        tl.influence(handle, inputs, inputs, labels=[0, 1])
    with pytest.raises(BadInput, match="1 of 3 training images have no label, the first: image 1"):
        tl.influence(handle, [(inputs[0], 1), inputs[1], (inputs[2], 0)], inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_decay": -1.0}, BadInput, "weight_decay is at least 0; got -1.0"),
        ({"weight_decay": {"fc.weigth": 0.1}}, UnknownName, "fc.weight"),
        ({"damping": float("nan")}, BadInput, "damping is at least 0"),
        ({"method": "cgs"}, UnknownName, "'cg'"),
        ({"depth": 3}, BadInput, "cg has no option 'depth'; its options: tolerance"),
        ({"tolerance": 0}, BadInput, "tolerance is more than 0"),
        ({"loss": "crossentropy"}, UnknownName, "cross_entropy"),
        ({"loss": F.cross_entropy}, BadInput, r"gives shape \[\] for"),
        ({"target": "logit:yak"}, UnknownName, "yak"),
        (
            {"target": "conv2:3"},
            NotApplicable,
            "the target reads layer 'conv2', which the parameters of 'fc' have no part",
        ),
        ({"target": ["logit:ant"] * 2}, BadInput, "2 targets for 3 test images"),
        ({"method": "exact", "removal": "all"}, BadInput, 'removal is "first_order" or "newton"'),
        ({"curvature": "fisher"}, BadInput, 'curvature is "gauss_newton" or "hessian"; got \'fisher\''),
        ({"memory": 0}, BadInput, "memory is a number of GiB above 0; got 0"),
        ({"layers": ["fc", "conv9"]}, UnknownName, "no layer 'conv9'; did you mean 'conv2', 'conv1'"),
        ({"layers": "relu1"}, BadInput, "layer 'relu1', a ReLU, has no parameters"),
        ({"layers": ["fc"], "target": "conv2:3"}, NotApplicable, "the target conv2:3 does not depend on the layers"),
        ({"check": -1}, BadInput, "check is at least 0"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        asked(**options)


class Follows(nn.Module):
    """A head whose logits are not the output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)).log_softmax(1) * 3


class Batched(nn.Module):
    """Normalised over the batch whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3, track_running_stats=False), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).flatten(1))


class Dropped(Batched):
    """Dropout whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(x, 0.5).flatten(1))


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (Follows(), NotApplicable, "not what 'fc' gives: something follows it; name layers="),
        (Batched(), BadInput, "in another batch.*batch normalisation without running statistics"),
        (Dropped(), BadInput, "dropout that does not heed eval mode"),
    ],
)
def test_models_whose_head_is_not_all(module: nn.Module, error: type[Exception], message: str) -> None:
    handle = tl.wrap(module, input_size=(3, 2, 2))
    with pytest.raises(error, match=message):
        tl.influence(handle, labelled(handle, 8), labelled(handle, 4, seed=2), check=0)


def test_a_hessian_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchloupe_core import memory

    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(BadInput, match=r"a Hessian of 65 parameters takes 0\.0 GiB and 0\.0 GiB are free on cpu"):
        asked(method="exact")
    from torchloupe_core.methods.influence import functions

    monkeypatch.setattr(functions, "LARGEST_EXPLICIT", 64)
    with pytest.raises(
        BadInput, match="'exact' writes down the Hessian of 65 parameters, more than 64; take method='cg'"
    ):
        asked(method="exact")


# -- no trace, and results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [one.name for one in tl.methods("influence") if one.backend == "native"])
def test_the_model_comes_back_as_it_was(method: str) -> None:
    handle, inputs = SPECIMENS["residual"]()
    options = {"checkpoints": [SPECIMENS["residual"](seed=1)[0]]} if method == "tracin" else {}
    handle.module.train()
    for parameter in handle.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    kept = Snapshot(handle.module, inputs)
    tl.influence(handle, labelled(handle, 8), inputs, method=method, check=2, weight_decay=0.1, **options)
    assert kept.differences() == []
    with pytest.raises(NotApplicable):
        tl.influence(handle, labelled(handle, 8), inputs, method=method, target="conv1:0", **options)
    assert kept.differences() == []


class Interrupted(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise KeyboardInterrupt
        return torch.zeros(3, 32, 32), 0


def test_nothing_stays_after_an_interruption() -> None:
    handle, inputs = SPECIMENS["residual"]()
    kept = Snapshot(handle.module, inputs)
    with pytest.raises(KeyboardInterrupt):
        tl.influence(handle, Interrupted(), inputs, batch_size=2)
    assert kept.differences() == []


def test_a_result_is_saved_and_read_back_with_its_pictures(tmp_path: Path) -> None:
    found = asked(n=9, check=3, damping=0.1)
    again = tl.open(found.save(tmp_path / "found"))
    assert isinstance(again, tl.Influence)
    for one in dataclasses.fields(found):
        before, after = getattr(found, one.name), getattr(again, one.name)
        if isinstance(before, Tensor):
            assert torch.equal(before, after), one.name
        elif one.name not in ("train", "test", "question", "thumbnail_of", "options", "versions"):
            assert str(before) == str(after) or one.name == "thumbnails", one.name
    assert (
        again.train is None and again.diagnostics["spot_check"]["removed"] == found.diagnostics["spot_check"]["removed"]
    )
    wanted = found.top(3).indices.flatten().tolist()
    before, after = found.pictures("train", wanted), again.pictures("train", wanted)
    assert list(before) == sorted(set(wanted)) and all(torch.equal(after[index], before[index]) for index in before)
    assert again.figure() is not None and again.save(tmp_path / "twice").exists()
    bare = tl.open(found.save(tmp_path / "bare", pictures=False))
    with pytest.raises(BadInput, match="saved without a picture of test image 0"):
        bare.figure()
    with pytest.raises(StoreError):
        found.save(tmp_path / "found.npz" / "x")


def test_names_of_classes() -> None:
    found = asked(n=4)
    assert [found.name_of(one) for one in (-1, 0, 4, 7, 0.5)] == ["-", CLASSES[0], CLASSES[4], "7", "0.5"]


def test_labels_are_numbers_where_there_is_one_output() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    handle = tl.wrap(module, input_size=(3, 2, 2))
    images = torch.randn(9, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linspace(-1, 1, 9, dtype=torch.float64)
    found = tl.influence(
        handle, images, images[:2], labels=values, test_labels=[0.5, -0.25], loss="squared", damping=0.1, check=0
    )
    assert found.about == ("loss for 0.5", "loss for -0.25")
    torch.testing.assert_close(found.train_labels, values)
    error = module(images).detach()[:, 0] - values
    rows = torch.cat([images.flatten(1), torch.ones(9, 1)], 1)
    hessian = rows.T @ rows / 9 + 0.1 * torch.eye(13)
    ours = (module(images[:2]).detach()[:, 0] - torch.tensor([0.5, -0.25]))[:, None] * rows[:2]
    expected = ours @ torch.linalg.solve(hessian, (error[:, None] * rows).T) / 9
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-8)


# -- where in a training image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "loss"), [(None, None), ("all", None), (["conv2"], None), (None, "own")])
def test_where_is_the_scores_slope_by_the_pixels(layers: Any, loss: Any) -> None:
    """Against the score of the training image with a pixel moved, everything else as it was."""

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5)
    )
    handle = tl.wrap(module.double(), input_size=(3, 7, 7))
    layers = ["2"] if layers == ["conv2"] else layers
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 7, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    options: Any = {"layers": layers, "method": "gradient_dot", "check": 0, "test_labels": [1, 3]}
    options |= {"loss": own} if loss else {}
    found = tl.influence(handle, TensorDataset(images, labels), images[:2], **options)
    kept = Snapshot(handle.module)
    slope = found.where(4, test=1)
    assert kept.differences() == []
    assert slope.values.shape == (1, 7, 7) and slope.per_channel is not None
    torch.testing.assert_close(slope.values, slope.per_channel.sum(1))
    torch.testing.assert_close(slope.scores, found.scores[1, 4:5])
    for place in ((0, 2, 3), (2, 6, 0)):
        ends = []
        for step in (1e-4, -1e-4):
            moved = images.clone()
            moved[4][place] += step
            ends.append(tl.influence(handle, TensorDataset(moved, labels), images[:2], **options).scores[1, 4])
        assert slope.per_channel[0][place].item() == pytest.approx(
            ((ends[0] - ends[1]) / 2e-4).item(), rel=1e-3, abs=1e-8
        )
    torch.testing.assert_close(found[1].where(4).values, slope.values)


def test_where_refuses_what_has_no_gradient_to_ask(tmp_path: Path) -> None:
    found = asked(n=6)
    assert found.where(3).figure() is not None
    with pytest.raises(BadInput, match="no training image 6"):
        found.where(6)
    again = tl.open(found.save(tmp_path / "found"))
    for one in (asked(n=6, method="feature_cosine"), found.relative(), again):
        with pytest.raises(NotApplicable, match=r"keeps nothing to ask about pixels: take 'cg'"):
            one.where(3)
