"""`tl.texture`, `tl.stylize`: the loss against a plain loop, how far Gram matrices come, what stays of the content."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.canvas import Canvas
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.parametrizations import Pixel
from torchloupe_core.spec import Spec
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.style import grams_of

PLAIN: dict[str, Any] = {"progress": False}


def photo(height: int = 48, width: int = 64, seed: int = 3) -> Tensor:
    """A picture in 8 bits with a texture of its own."""
    source = torch.Generator().manual_seed(seed)
    coarse = nn.functional.interpolate(torch.rand(1, 3, 5, 6, generator=source), size=(height, width), mode="bilinear")
    fine = nn.functional.interpolate(torch.rand(1, 3, height // 3, width // 3, generator=source), size=(height, width))
    return ((0.6 * coarse + 0.4 * fine)[0] * 255).round().byte()


@functools.cache
def scenes() -> Tensor:
    images: Tensor = tl.demo_scenes(8, seed=5).images
    return images


@functools.cache
def stylized() -> tl.Visualization:
    return tl.stylize("demo", scenes(), photo(), steps=25, **PLAIN)


def mean_of(rows: list[Any]) -> float:
    return float(torch.tensor([[value for _, value in row] for row in rows]).mean())


# -- textures ---------------------------------------------------------------------------------------------------------


def test_the_gram_distance_falls_more_than_a_hundredfold() -> None:
    made = tl.texture("demo", photo(), steps=120, tv=0.0, **PLAIN)
    assert made.losses.shape == (1, 120) and made.losses[0, -1] < made.losses[0, 0] / 100
    assert (made.losses.diff(dim=1) <= 1e-7).all()
    model = tl.load("demo")
    style = photo()[None].float() / 255
    wanted, found = (grams_of(model, images, ["layer1", "layer2"]) for images in (style, made.images))
    far = [((found[n] - wanted[n]) ** 2).sum() / (wanted[n] ** 2).sum() for n in ("layer1", "layer2")]
    assert made.scores.item() == pytest.approx(float(sum(far)) / 2, rel=1e-3)
    assert made.diagnostics["gram"][0][0][1] == pytest.approx(float(far[0]), rel=1e-3)
    assert made.size == (48, 64) and made.target == "texture"
    assert (made.images - style).abs().mean() > 0.05  # its statistics, not the picture


def test_sizes_numbers_and_seeds() -> None:
    options: dict[str, Any] = {"steps": 3, **PLAIN}
    made = tl.texture("demo", photo(), n=2, size=(40, 56), **options)
    assert made.images.shape == (2, 3, 40, 56) and not torch.equal(made.images[0], made.images[1])
    assert tl.texture("demo", photo(), size=40, **options).size == (40, 40)
    again = tl.texture("demo", photo(), n=2, size=(40, 56), batch_size=1, **options)
    torch.testing.assert_close(again.images, made.images, atol=1e-3, rtol=0)
    other = tl.texture("demo", photo(), size=(40, 56), seed=1, **options)
    torch.testing.assert_close(other.images[0], made.images[1], atol=1e-3, rtol=0)  # images count on from the seed


# -- style transfer ---------------------------------------------------------------------------------------------------


def test_what_is_minimised_is_content_style_and_variation() -> None:
    handle, _ = SPECIMENS["plain"]()
    handle = handle.with_spec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    content, style = photo(32, 32, 1), photo(27, 30, 2)
    options: dict[str, Any] = {"parametrization": Pixel(colours=None), "optimizer": "adam", "lr": 0.05, **PLAIN}
    options |= {"layers": ["relu1", "relu2"], "content_layer": "relu2", "style_weight": 3.0, "content_weight": 0.5}
    made = tl.stylize(handle, content, style, tv=0.2, steps=12, **options)
    module = handle.module

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        first = module.relu1(module.conv1(handle.spec.normalised(x)))
        return first, module.relu2(module.conv2(module.pool(first)))

    def grams(x: Tensor) -> list[Tensor]:
        return [torch.einsum("nihw,njhw->nij", one, one) / one[0].numel() for one in features(x)]

    start = content[None].float() / 255
    goals, given = [one.detach() for one in grams(style[None].float() / 255)], features(start)[1].detach()
    canvas = Canvas([torch.zeros(1, 3, 32, 32)], lambda: canvas.tensors[0], lambda values: [values])
    canvas.paint(start)
    numbers = canvas.tensors[0].detach().clone().requires_grad_(True)
    optimizer, losses = torch.optim.Adam([numbers], lr=0.05), []
    for _ in range(12):
        x = numbers.sigmoid()
        far = [(a - b).square().sum() / b.square().sum() for a, b in zip(grams(x), goals, strict=True)]
        content_loss = (features(x)[1] - given).square().mean() / given.square().mean()
        squares = x.diff(dim=2)[..., :-1].square() + x.diff(dim=3)[:, :, :-1].square()
        loss = 0.5 * content_loss + 3.0 * (far[0] + far[1]) / 2 + 0.2 * squares.mean()
        (numbers.grad,) = torch.autograd.grad(loss, numbers)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(made.images, numbers.detach().sigmoid(), atol=1e-3, rtol=0)
    assert made.losses[0].tolist() == pytest.approx(losses, rel=1e-3)


def test_style_comes_near_and_the_class_stays() -> None:
    made, model = stylized(), tl.load("demo")
    assert mean_of(made.diagnostics["gram"]) < mean_of(made.diagnostics["gram_start"]) / 5
    assert made.scores.tolist() == pytest.approx(
        [sum(value for _, value in row) / len(row) for row in made.diagnostics["gram"]], rel=1e-4
    )
    assert (made.losses.diff(dim=1) <= 1e-6).all()
    then, now = (model.predict(images, k=1) for images in (scenes(), model.spec.normalised(made.images)))
    kept = [one[0].index == other[0].index for one, other in zip(then, now, strict=True)]
    assert sum(kept) / len(kept) >= 0.75
    assert max(made.diagnostics["content"]) < 0.6 and made.diagnostics["content_layer"] == "layer2"
    assert made.target == "stylized" and made.given is not None
    torch.testing.assert_close(made.given, scenes().float() / 255)
    assert (made.images - made.given).abs().mean() > 0.05


def test_weights_trade_style_for_content() -> None:
    few = scenes()[:3]
    found = [tl.stylize("demo", few, photo(), style_weight=weight, steps=25, **PLAIN) for weight in (0.1, 1.0, 10.0)]
    far = [one.scores.mean().item() for one in found]
    content = [sum(one.diagnostics["content"]) for one in found]
    assert far == sorted(far, reverse=True) and content == sorted(content)
    assert far[2] < 0.5 * far[0] and content[2] > 2 * content[0]


def test_several_styles_are_mixed() -> None:
    styles = [photo(seed=3), photo(40, 40, seed=8)]
    options: dict[str, Any] = {"steps": 40, "size": 48, **PLAIN}
    first, mix, second = (
        tl.texture("demo", styles, weights=weights, **options) for weights in ([1, 0], [2, 2], [0, 1])
    )
    model = tl.load("demo")
    wanted = [grams_of(model, one[None].float() / 255, ["layer1"])["layer1"] for one in styles]

    def off(made: tl.Visualization, goal: Tensor) -> float:
        return float((grams_of(model, made.images, ["layer1"])["layer1"] - goal).square().sum())

    for place, made in ((0, first), (1, second)):
        assert off(made, wanted[place]) < off(mix, wanted[place]) < off(made, wanted[1 - place])
    assert off(mix, (wanted[0] + wanted[1]) / 2) < 0.5 * min(off(mix, one) for one in wanted)
    few, short = scenes()[:1], {"steps": 2, **PLAIN}
    even, twice = (tl.stylize("demo", few, styles, weights=weights, **short) for weights in (None, [2, 2]))
    assert torch.equal(even.images, twice.images)
    alone, first = (
        tl.stylize("demo", few, each, **more, **short)
        for each, more in ((styles[0], {}), (styles, {"weights": [1, 0]}))
    )
    torch.testing.assert_close(first.images, alone.images, atol=1e-4, rtol=0)
    for weights, message in [([1], "1 weights for 2 styles"), ([-1, 2], "at least 0"), ([0, 0], "not all of them")]:
        with pytest.raises(BadInput, match=message):
            tl.stylize("demo", few, styles, weights=weights, **PLAIN)


def test_colours_can_be_kept() -> None:
    content = scenes()[:2]
    blue = (photo().float() * torch.tensor([0.2, 0.3, 1.0]).view(3, 1, 1)).round().byte()
    plain, kept = (
        tl.stylize("demo", content, blue, style_weight=5.0, steps=25, preserve_colour=keep, **PLAIN)
        for keep in (False, True)
    )

    def off(made: tl.Visualization) -> float:
        return float((made.images.mean((2, 3)) - content.float().mean((2, 3)) / 255).abs().mean())

    assert off(kept) < 0.5 * off(plain)
    assert (kept.images - content.float() / 255).abs().mean() > 0.02
    halves = tl.stylize("demo", content, blue, style_weight=5.0, steps=25, preserve_colour=True, batch_size=1, **PLAIN)
    torch.testing.assert_close(halves.images, kept.images, atol=0.02, rtol=0)  # each image has a style of its own


def test_sizes_of_content_and_style_are_their_own(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.asarray(photo(30, 44).permute(1, 2, 0))).save(path)
    options: dict[str, Any] = {"steps": 2, **PLAIN}
    assert tl.stylize("demo", path, photo(), **options).size == (30, 44)
    assert tl.stylize("demo", path, path, size=66, style_size=30, **options).size == (45, 66)
    with pytest.raises(BadInput, match="different sizes"):
        tl.stylize("demo", [photo(30, 44), photo(32, 44)], path, **options)
    fixed, _ = SPECIMENS["vit_registers"]()  # takes 32 x 48 only: pictures are preprocessed for it
    made = tl.stylize(fixed, path, path, layers=["blocks.0"], content_layer="blocks.1", **options)
    assert made.size == (32, 48)
    with pytest.raises(BadInput, match=r"takes inputs of \[3, 32, 48\] only; leave out size="):
        tl.stylize(fixed, path, path, size=64, **options)
    with pytest.raises(BadInput, match=r"takes inputs of \[3, 32, 48\] only; got \[3, 40, 48\]"):
        tl.stylize(fixed, path, torch.rand(1, 3, 40, 48), **options)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_any_network_with_named_layers(name: str) -> None:
    torch.manual_seed(0)
    handle = tl.wrap(getattr(torchvision.models, name)(weights=None), input_size=(3, 64, 64))
    before = Snapshot(handle.module)
    made = tl.stylize(handle, photo(64, 64, 1), photo(), steps=12, tv=0.0, **PLAIN)
    assert made.losses[0, -1] < 0.7 * made.losses[0, 0]
    assert before.differences() == []


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.conv, self.end, self.what = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, 2), what

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        y = self.conv(x)
        return self.end(self.what(y) if CALLS[0] == CALLS[1] else y)


CALLS = [0, 0]


def failing(at: int, what: Any) -> Handle:
    torch.manual_seed(0)
    handle = Handle(Failing(what), Spec(input_size=(3, 20, 20)))
    for size in (20, 24):
        handle.trace((3, size, size))
    CALLS[:] = 0, at
    return handle


def interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_nan_and_ctrl_c_keep_the_last_good_image() -> None:
    options: dict[str, Any] = {"layers": ["end"], "steps": 9, "tv": 0.0, **PLAIN}
    made = tl.texture(failing(6, lambda x: x * float("nan")), photo(20, 20), **options)
    assert made.stopped == "the target or its gradient is NaN or infinite after step 4"
    assert made.images.isfinite().all() and made.losses.shape == (1, 4)
    with pytest.raises(KeyboardInterrupt):
        tl.texture(failing(6, interrupt), photo(20, 20), **options)
    kept = tl.texture(failing(6, interrupt), photo(20, 20), interruptible=True, **options)
    assert kept.stopped == "interrupted after step 4" and kept.losses.shape == (1, 4)
    assert kept.scores[0].item() == pytest.approx(kept.losses[0, -1].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": ["layer9"]}, UnknownName, "no layer 'layer9'"),
        ({"content_layer": "fc"}, NotApplicable, "gives no map with several positions"),
        ({"style_weight": -1.0}, BadInput, "at least 0"),
        ({"style_weight": 0.0, "content_weight": 0.0}, BadInput, "one of the first two is above it"),
        ({"optimizer": "sgd"}, BadInput, 'optimizer is "lbfgs" or "adam"'),
        ({"steps": 0}, BadInput, "steps is at least 1"),
        ({"init": photo()}, BadInput, "init cannot be chosen here"),
        ({"style": "nowhere.png"}, BadInput, "no such image file"),
        ({"style": []}, BadInput, "no style was given"),
        ({"style": torch.rand(1, 1, 20, 20)}, BadInput, "the model takes 3 channels; the images have 1"),
        ({"content": torch.rand(1, 4, 20, 20)}, BadInput, "the model takes 3 channels; the images have 4"),
        ({"content": torch.full((1, 3, 20, 20), float("nan"))}, BadInput, "NaN"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"content": photo(32, 32), "style": photo(), **options}
    with pytest.raises(error, match=message):
        tl.stylize("demo", given.pop("content"), given.pop("style"), **given, **PLAIN)


def test_channels_of_content_and_style_agree() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(BadInput, match="the content has 3 channels, the style 1"):
        tl.stylize(Handle(module, Spec()), torch.rand(1, 3, 20, 20), torch.rand(1, 1, 20, 20), **PLAIN)


def test_what_the_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("torchloupe_core.footprint.available", "torchloupe_core.memory.available"):
        monkeypatch.setattr(place, lambda device: 2**28)
    with pytest.raises(BadInput, match=r"a step on 1 image of 1536x2048 takes .* a longer side of size=\d+ fits"):
        tl.stylize("demo", photo(1536, 2048), photo(), steps=1, **PLAIN)
