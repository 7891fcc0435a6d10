"""`tl.train_stylizer`: its loss, training that goes on from where it was, and what the network is applied to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable, StoreError, UnknownName
from torchloupe_core.methods.feedforward import Training
from torchloupe_core.stylenet import StyleNet

SMALL: dict[str, Any] = {"width": 6, "blocks": 1, "batch_size": 2, "lr": 2e-3, "progress": False}


def photo(height: int, width: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    coarse = nn.functional.interpolate(torch.rand(1, 3, 5, 6, generator=source), size=(height, width), mode="bilinear")
    return (coarse[0] * 255).round().byte()


@functools.cache
def scenes() -> Any:
    return tl.demo_scenes(12, seed=3)


STYLES = (photo(40, 48, 1) // 3, photo(48, 40, 2) // 2 + 127)


@functools.cache
def trained() -> tl.Stylizer:
    return tl.train_stylizer("demo", list(STYLES), scenes(), names=["warm", "cold"], steps=30, **SMALL)


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (5, 3), (1, 1)])
def test_the_network_takes_pictures_of_any_size(size: tuple[int, int]) -> None:
    network = StyleNet(3, width=4, blocks=1)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    made = network(images, torch.eye(3)[:2])
    assert made.shape == images.shape and made.min() > 0 and made.max() < 1
    torch.testing.assert_close(network(images[1:], torch.eye(3)[1:2]), made[1:], atol=1e-5, rtol=1e-4)


def test_styles_share_everything_but_scales_and_shifts() -> None:
    network = StyleNet(2, width=4, blocks=1, seed=1)
    with torch.no_grad():
        for part in network.modules():
            if hasattr(part, "shift"):
                part.shift[1] += 0.5
                part.scale[1] *= 2
    own = {name for name, one in network.named_parameters() if one.shape[0] == 2 and one.ndim == 2}
    assert own == {name for name, _ in network.named_parameters() if name.endswith(("scale", "shift"))}
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    first, second, half = (network(image, torch.tensor([mix])) for mix in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]))
    assert (first - second).abs().max() > 0.01 and (half - first).abs().max() > 0.001
    both = network(image.expand(2, -1, -1, -1), torch.eye(2))
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-5, rtol=1e-4)


# -- training ---------------------------------------------------------------------------------------------------------


def test_what_is_minimised_is_what_stylize_minimises() -> None:
    """The first step's losses, computed anew image by image."""
    model, six = tl.load("demo"), tl.demo_scenes(6, seed=3)
    made = tl.train_stylizer(model, list(STYLES), six, steps=1, **{**SMALL, "batch_size": 6})
    which = torch.randint(2, (6,), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    images = six.images[order].float() / 255
    with torch.no_grad():
        shown = StyleNet(2, width=6, blocks=1, seed=0)(images, torch.eye(2)[which])
    content, style = [], []
    with model.borrow(), model.watch("layer1", "layer2") as watch:

        def maps(image: Tensor) -> list[Tensor]:
            watch(model.spec.normalised(image[None]))
            return [watch.map(name)[0] for name in ("layer1", "layer2")]

        for before, after, index in zip(images, shown, which.tolist(), strict=True):
            goal, given, found = maps(STYLES[index].float() / 255), maps(before)[1], maps(after)
            content.append((found[1] - given).square().mean() / given.square().mean())
            pairs = [
                [torch.einsum("ihw,jhw->ij", one, one) / one.numel() for one in each]
                for each in zip(found, goal, strict=True)
            ]
            style += [(a - b).square().sum() / b.square().sum() for a, b in pairs]
    squares = shown.diff(dim=2)[..., :-1].square() + shown.diff(dim=3)[:, :, :-1].square()
    expected = [float(torch.stack(content).mean()), float(torch.stack(style).mean()), float(squares.mean())]
    assert made.losses[0].tolist() == pytest.approx(expected, rel=1e-3)


def test_style_comes_nearer() -> None:
    made, model = trained(), tl.load("demo")
    assert made.losses.shape == (30, 3)
    total = made.losses[:, :2].sum(1)
    assert total[-8:].mean() < 0.75 * total[:2].mean() and made.losses[-8:, 1].mean() < 0.5 * made.losses[0, 1]
    assert made.made.shape == (2, 4, 3, 64, 64) and made.styles == ("warm", "cold")
    assert (made.made[0] - made.made[1]).abs().max() > 1e-3  # one network, two styles
    torch.testing.assert_close(made.samples, scenes().images[:4].float() / 255)
    assert model.module.training is False


def test_every_step_shows_other_images_in_other_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, shown = Training._batch, []

    def noted(self: Any) -> Any:
        shown.append(batch(self))
        return shown[-1]

    monkeypatch.setattr(Training, "_batch", noted)
    tl.train_stylizer("demo", list(STYLES), scenes(), steps=12, **SMALL)
    styles = [tuple(mix.argmax(1).tolist()) for _, mix in shown]
    assert {one for pair in styles for one in pair} == {0, 1} and len(set(styles)) >= 3
    every = torch.cat([images for images, _ in shown])  # two epochs of twelve
    all_of_them = scenes().images.float() / 255
    for epoch in (every[:12], every[12:]):
        found = torch.cdist(epoch.flatten(1), all_of_them.flatten(1)).argmin(1)
        assert sorted(found.tolist()) == list(range(12))
    assert not torch.equal(every[:12], every[12:])


def test_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "training.npz"
    options: dict[str, Any] = {**SMALL, "every": 3}
    whole = tl.train_stylizer("demo", list(STYLES), scenes(), steps=7, **options)
    tl.train_stylizer("demo", list(STYLES), scenes(), steps=4, checkpoint=path, **options)
    again = tl.train_stylizer("demo", list(STYLES), scenes(), steps=7, checkpoint=path, **options)
    assert again.forwards < whole.forwards
    torch.testing.assert_close(again.losses, whole.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.weights, whole.weights, rtol=1e-4, atol=1e-5)
    restarted = tl.train_stylizer("demo", list(STYLES), scenes(), steps=3, **options)
    assert not torch.allclose(restarted.weights, whole.weights, rtol=1e-4, atol=1e-5)
    done = tl.train_stylizer("demo", list(STYLES), scenes(), steps=7, checkpoint=path, **options)
    assert torch.equal(done.weights, again.weights) and torch.equal(done.losses, again.losses)
    for changes, message in [
        ({"width": 5}, "was trained with width=6, this run has 5"),
        ({"seed": 1}, "was trained with seed=0, this run has 1"),
        ({"tv": 0.1}, "weights="),
    ]:
        with pytest.raises(BadInput, match=message):
            tl.train_stylizer("demo", list(STYLES), scenes(), steps=7, checkpoint=path, **{**options, **changes})
    with pytest.raises(BadInput, match="was trained with styles="):
        tl.train_stylizer("demo", [STYLES[0], STYLES[0]], scenes(), steps=7, checkpoint=path, **options)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(StoreError, match="is no checkpoint of a stylizer"):
        tl.train_stylizer("demo", list(STYLES), scenes(), steps=7, checkpoint=path, **options)


def test_ctrl_c_keeps_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Training._make_step

    def interrupted(self: Any, watch: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        step(self, watch)

    monkeypatch.setattr(Training, "_make_step", interrupted)
    path, args = tmp_path / "training.npz", ("demo", list(STYLES), scenes())
    with pytest.raises(KeyboardInterrupt):
        tl.train_stylizer(*args, steps=5, checkpoint=path, **SMALL)
    kept = tl.train_stylizer(*args, steps=5, interruptible=True, **SMALL)
    assert kept.stopped == "interrupted after step 3" and kept.losses.shape == (3, 3)
    monkeypatch.undo()
    gone_on = tl.train_stylizer(*args, steps=5, checkpoint=path, **SMALL)
    torch.testing.assert_close(gone_on.losses[:3], kept.losses, rtol=1e-4, atol=1e-5)
    assert gone_on.losses.shape == (5, 3) and gone_on.stopped == ""


def test_nan_stops_training_and_keeps_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Training._unlike
    calls = [0]

    def spoilt(self: Any, watch: Any, mix: Tensor) -> Tensor:
        calls[0] += 1
        return made(self, watch, mix) * (float("nan") if calls[0] == 4 else 1.0)

    monkeypatch.setattr(Training, "_unlike", spoilt)
    args = ("demo", list(STYLES), scenes())
    found = tl.train_stylizer(*args, steps=9, **SMALL)
    assert found.stopped == "the losses or their gradients are NaN or infinite after step 3"
    assert found.weights.isfinite().all() and found.losses.shape == (3, 3)
    calls[0] = 3
    with pytest.raises(BadInput, match="NaN or infinite at the first step"):
        tl.train_stylizer(*args, steps=9, **SMALL)


def test_nothing_is_left_behind_and_the_seed_decides() -> None:
    model = tl.load("demo")
    before = Snapshot(model.module)
    args = (model, STYLES[0], scenes())
    one, again, other = (tl.train_stylizer(*args, steps=2, seed=seed, **SMALL) for seed in (0, 0, 1))
    assert before.differences() == []
    torch.testing.assert_close(one.weights, again.weights, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.weights, other.weights)
    assert one.styles == ("style 0",)


# -- what it is applied to --------------------------------------------------------------------------------------------


def test_pictures_of_any_size(tmp_path: Path) -> None:
    made = trained()
    path = tmp_path / "x.png"
    Image.fromarray(photo(37, 90, 5).permute(1, 2, 0).numpy()).save(path)
    assert made.apply(path, "cold").shape == (1, 3, 37, 90)
    assert made.apply(path, size=45).shape == (1, 3, 18, 45)
    images = scenes().images[:4]
    torch.testing.assert_close(made.apply(images, "cold"), made.made[1], atol=1e-4, rtol=0)
    for style in (1, [0, 2], {"cold": 3.0}, torch.tensor([0.0, 1.0])):
        torch.testing.assert_close(made.apply(images, style, batch_size=3), made.made[1], atol=1e-4, rtol=0)
    half = made.apply(images, {"warm": 1, "cold": 1})
    assert not torch.allclose(half, made.made[0], atol=1e-3) and not torch.allclose(half, made.made[1], atol=1e-3)
    for style, error, message in [
        ("hot", UnknownName, "no style 'hot'"),
        (2, UnknownName, "no style 2; there are 2, 0 to 1"),
        ([1.0], BadInput, "has a weight for each"),
        ([0.0, 0.0], BadInput, "above 0 in all"),
    ]:
        with pytest.raises(error, match=message):
            made.apply(images, style)  # type: ignore[arg-type]


def test_a_folder(tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for name, size in (("a.png", (30, 44)), ("sub/b.jpg", (25, 20))):
        Image.fromarray(photo(*size, 4).permute(1, 2, 0).numpy()).save(source / name)
    (source / "broken.png").write_bytes(b"no picture")
    written, failed = trained().folder(source, out, "warm")
    assert [str(one.relative_to(out)) for one in written] == ["a.png", "sub/b.jpg.png"]
    assert list(failed) == [str(source / "broken.png")] and "is not an image" in failed[str(source / "broken.png")]
    values = np.asarray(Image.open(written[0])).astype(float) / 255
    expected = trained().apply(source / "a.png", "warm")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(values, expected, atol=0.5 / 255 + 1e-5)
    assert not list(out.rglob(".*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write into"):
        trained().folder(source, tmp_path / "file")


def test_saving_and_drawing(tmp_path: Path) -> None:
    again = tl.open(trained().save(tmp_path / "stylizer"))
    assert isinstance(again, tl.Stylizer) and again.styles == ("warm", "cold")
    image = scenes().images[:1]
    torch.testing.assert_close(again.apply(image, "cold"), trained().apply(image, "cold"))
    _, axes = again.plot()
    assert len(axes) == 3 and len(axes[0]) == 5 and axes[1][0].get_title(loc="left") == "warm"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, BadInput, "at least 1"),
        ({"style_weight": 0.0}, BadInput, "style_weight is above 0"),
        ({"names": ["a"]}, BadInput, "2 styles have 2 names"),
        ({"names": ["a", "a"]}, BadInput, "no two alike"),
        ({"layers": ["layer9"]}, UnknownName, "no layer 'layer9'"),
        ({"content_layer": "fc"}, NotApplicable, "no style"),
        ({"dataset": []}, BadInput, "the data set is empty"),
        ({"dataset": ["nowhere.png"]}, BadInput, "none of the 1 images can be read"),
        ({"styles": ["nowhere.png"]}, BadInput, "no such image file"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"styles": list(STYLES), "dataset": scenes(), "steps": 1, **SMALL, **options}
    with pytest.raises(error, match=message):
        tl.train_stylizer("demo", given.pop("styles"), given.pop("dataset"), **given)


def test_an_unwritable_checkpoint_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write into"):
        tl.train_stylizer("demo", STYLES[0], scenes(), checkpoint=tmp_path / "file" / "x.npz", **SMALL)
