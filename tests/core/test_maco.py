"""MaCo: magnitudes stay what they are, whatever the phases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torchloupe as tl
from torchloupe_core.canvas import Canvas, Draw
from torchloupe_core.errors import BadInput
from torchloupe_core.maco import MaCo, magnitudes
from torchloupe_core.specimens import SPECIMENS


def canvas_of(kind: MaCo, size: tuple[int, int], n: int = 2) -> Canvas:
    return kind.canvas(Draw(0, 0, n), (3, *size), torch.device("cpu"), torch.float64)


def spectrum(canvas: Canvas) -> Tensor:
    return torch.fft.rfft2(canvas.decode().detach(), norm="ortho").abs()


@pytest.mark.parametrize("size", [(16, 20), (15, 17), (16, 17), (15, 20)])
def test_magnitudes_stay_as_they_are_through_every_step(size: tuple[int, int]) -> None:
    canvas = canvas_of(MaCo(), size)
    before = spectrum(canvas)
    with torch.no_grad():
        for tensor in canvas.tensors:
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 3)
    torch.testing.assert_close(spectrum(canvas), before)
    frequency = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])).double()
    inverse = 1 / frequency.clamp(min=1 / max(size))
    inverse[0, 0] = 0  # the mean is grey
    expected = inverse * before[0, 0, 1, 1] / inverse[1, 1]
    torch.testing.assert_close(before[0, 0], expected, atol=1e-6, rtol=1e-5)
    assert canvas.images().mean().item() == pytest.approx(0.5, abs=0.02)


def test_measured_magnitudes_are_kept_and_resized() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 3, 16, 16, generator=generator) * 0.5 + 0.25
    images = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    measured = magnitudes(images)
    assert measured.shape == (3, 16, 9)
    found = spectrum(canvas_of(MaCo(measured), (16, 16)))[0]
    ratio = found[:, 1:] / measured[:, 1:].double()
    torch.testing.assert_close(ratio, ratio[0, 0, 0].expand_as(ratio))
    larger = spectrum(canvas_of(MaCo(measured), (32, 48)))[0, 0]
    assert larger[2, 2] > 3 * larger[16, 12]  # still falls off where it did
    same = magnitudes((images * 255).round().to(torch.uint8))
    torch.testing.assert_close(same, measured, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("colours", ["imagenet", None])
def test_contrast_is_the_spread_of_colours(colours: str | None) -> None:
    for contrast in (0.5, 2.0):
        canvas = canvas_of(MaCo(contrast=contrast, colours=colours), (32, 32), n=6)
        logits = torch.logit(canvas.images())
        assert logits.square().mean().sqrt().item() == pytest.approx(contrast, rel=0.05)


def test_a_given_image_gives_its_phases() -> None:
    given = torch.rand(2, 3, 16, 18, generator=torch.Generator().manual_seed(0)).double() * 0.5 + 0.25
    canvas = canvas_of(MaCo(magnitudes(given[:1])), (16, 18), n=1)
    canvas.paint(given[:1])
    ours, theirs = torch.logit(canvas.images()), torch.logit(given[:1])
    cosine = torch.nn.functional.cosine_similarity(
        (ours - ours.mean((2, 3), keepdim=True)).flatten(),
        (theirs - theirs.mean((2, 3), keepdim=True)).flatten(),
        dim=0,
    )
    assert cosine.item() > 0.98  # up to contrast, mean, and the signs of the four coefficients that are real


def test_what_the_run_was_about_is_opaque() -> None:
    handle, _ = SPECIMENS["residual"]()
    made = tl.visualize(handle, "layer1:2@4,4", parametrization="maco", steps=8, transforms="none", progress=False)
    assert made.backend == "native" and made.alpha is not None and made.alpha.shape == (1, 1, 32, 32)
    assert made.alpha.min() >= 0 and made.alpha.max() == 1
    top, left, bottom, right = tl.receptive_field(handle, "layer1").box(4, 4)
    inside = made.alpha[:, :, top:bottom, left:right]
    assert inside.mean() > 0.2 and made.alpha.sum().item() == pytest.approx(inside.sum().item())
    _, axes = made.plot()
    shown = axes[0][0].images[0].get_array()
    assert math.isclose(float(shown[31, 31].min()), 1.0)  # what did not matter is white
    assert tl.visualize(handle, "layer1:2", steps=2, progress=False).alpha is None


def test_wrong_magnitudes_say_what_works() -> None:
    with pytest.raises(BadInput, match=r"\[3, H, W // 2 \+ 1\]; got \[2, 4, 4\]"):
        canvas_of(MaCo(torch.rand(2, 4, 4)), (16, 16))
    with pytest.raises(BadInput, match=r"got \[3, 4, 4\]"):
        magnitudes(torch.rand(3, 4, 4))
