"""Parametrisations against their formulas, colours against the covariance of pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from torchloupe_core.canvas import Canvas, Draw
from torchloupe_core.colour import IMAGENET, as_colours, measured, mixed, separated
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.parametrizations import (
    CPPN,
    PARAMETRIZATIONS,
    Fourier,
    LowRes,
    Parametrization,
    Pixel,
    Pyramid,
    Shared,
    as_parametrization,
)

CPU = torch.device("cpu")


def canvas_of(kind: Parametrization, size: tuple[int, int] = (16, 20), n: int = 2, seed: int = 0) -> Canvas:
    return kind.canvas(Draw(seed, 0, n), (3, *size), CPU, torch.float32)


def colours_by_lucid() -> np.ndarray:
    root = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    return root / np.linalg.norm(root, axis=0).max()


@pytest.mark.parametrize("size", [(16, 20), (15, 15), (1, 9), (8, 1)])
def test_fourier_is_lucids_formula(size: tuple[int, int]) -> None:
    """From the numbers to the picture with numpy: 1 / max(f, 1 / max(w, h)), a quarter, colours, sigmoid."""
    height, width = size
    canvas = canvas_of(Fourier(), size)
    columns = width // 2 + 1
    numbers = canvas.tensors[0].detach().double().numpy()[:, :, :, :columns]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.abs(np.fft.fftfreq(width))[:columns])
    spectrum = (numbers[..., 0] + 1j * numbers[..., 1]) / np.maximum(frequency, 1 / max(height, width))
    values = np.fft.irfft2(spectrum, s=size, norm="ortho") / 4
    rgb = np.einsum("rc,nchw->nrhw", colours_by_lucid(), values)
    np.testing.assert_allclose(canvas.images().detach().numpy(), 1 / (1 + np.exp(-rgb)), atol=1e-6)


def test_the_first_image_begins_as_torchs_own_draw() -> None:
    """As Lucent's does after `torch.manual_seed`."""
    torch.manual_seed(7)
    assert torch.equal(canvas_of(Fourier(), n=1, seed=7).tensors[0], torch.randn(1, 3, 16, 11, 2) * 0.01)


def test_decay_and_spread() -> None:
    smooth, rough = (canvas_of(Fourier(decay=decay), (64, 64)).decode() for decay in (2.0, 0.0))
    assert smooth.diff(dim=3).std() / smooth.std() < 0.3 * rough.diff(dim=3).std() / rough.std()
    assert canvas_of(Pixel(sd=0.5, colours=None), (64, 64)).decode().std().item() == pytest.approx(0.5, rel=0.05)


def test_an_image_does_not_depend_on_how_many_are_made() -> None:
    for kind in (Fourier(), Pixel(), LowRes(), Pyramid(), CPPN()):
        whole = kind.canvas(Draw(3, 0, 4), (3, 16, 16), CPU, torch.float32).images()
        part = kind.canvas(Draw(3, 2, 3), (3, 16, 16), CPU, torch.float32).images()
        torch.testing.assert_close(whole[2:3], part)
        if not isinstance(kind, CPPN):  # which begins grey
            assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("kind", [Fourier(), Pixel(), Pyramid(), Shared(), Fourier(colours=None), Fourier(decay=2.0)])
@pytest.mark.parametrize("size", [(16, 20), (15, 17)])
def test_a_given_image_is_taken_up(kind: Parametrization, size: tuple[int, int]) -> None:
    given = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    canvas = canvas_of(kind, size)
    canvas.paint(given)
    torch.testing.assert_close(canvas.images(), given, atol=2e-5, rtol=0)


def test_pixels_at_the_ends_stay_finite() -> None:
    canvas = canvas_of(Fourier(colours=None), (4, 4))
    canvas.paint(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    torch.testing.assert_close(canvas.images()[1], torch.full((3, 4, 4), 0.99), atol=1e-3, rtol=0)


def test_low_resolution_takes_up_what_it_can() -> None:
    canvas = canvas_of(LowRes(4), (16, 16))
    assert canvas.tensors[0].shape == (2, 3, 4, 4)
    canvas.paint(torch.full((2, 3, 16, 16), 0.3))
    torch.testing.assert_close(canvas.images(), torch.full((2, 3, 16, 16), 0.3))


def test_a_pyramid_is_the_sum_of_enlarged_levels() -> None:
    canvas = canvas_of(Pyramid(levels=3), (16, 20))
    assert [tuple(one.shape[2:]) for one in canvas.tensors] == [(16, 20), (8, 10), (4, 5)]
    with torch.no_grad():
        canvas.tensors[0].zero_()
        canvas.tensors[1].fill_(1.0)
        canvas.tensors[2].fill_(2.0)
    torch.testing.assert_close(canvas.decode(), torch.full((2, 3, 16, 20), 3.0))


def test_shared_numbers_move_every_image() -> None:
    canvas = canvas_of(Shared(factors=(4,)), (16, 16), n=3)
    own, common = canvas.tensors
    assert own.shape[0] == 3 and common.shape == (1, 3, 4, 4)
    before = canvas.decode().detach().clone()
    with torch.no_grad():
        common.add_(1.0)
    torch.testing.assert_close(canvas.decode() - before, torch.ones(3, 3, 16, 16), atol=1e-6, rtol=0)


def test_a_network_of_coordinates_is_a_plain_loop() -> None:
    canvas = canvas_of(CPPN(layers=3, hidden=4), (5, 7), n=2)
    assert torch.equal(canvas.images(), torch.full((2, 3, 5, 7), 0.5))  # grey to begin with
    with torch.no_grad():
        for tensor in canvas.tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    found, limit = canvas.images(), math.sqrt(3)
    first = [tensor[1].detach().double() for tensor in canvas.tensors]
    for row in range(5):
        for column in range(7):
            x = torch.tensor([-limit + 2 * limit * row / 4, -limit + 2 * limit * column / 6]).double()
            for layer in range(3):
                x = first[2 * layer] @ x + first[2 * layer + 1]
                if layer < 2:
                    x = torch.cat([x.atan() / 0.67, x.atan() ** 2 / 0.6])
            torch.testing.assert_close(found[1, :, row, column].double(), x.sigmoid(), atol=1e-5, rtol=0)


def test_a_network_cannot_take_up_an_image() -> None:
    with pytest.raises(NotApplicable, match=r"cannot take up a given image; use 'fourier'"):
        canvas_of(CPPN()).paint(torch.rand(2, 3, 16, 20))


def test_numbers_go_back() -> None:
    canvas = canvas_of(Pyramid())
    kept, before = canvas.kept(), canvas.images().detach().clone()
    canvas.paint(torch.rand(2, 3, 16, 20))
    assert not torch.equal(canvas.images(), before)
    canvas.go_back(kept)
    assert torch.equal(canvas.images(), before)


def test_names() -> None:
    assert set(PARAMETRIZATIONS) >= {"fourier", "pixel", "pyramid", "lowres", "shared", "cppn"}
    assert as_parametrization("pixel") == Pixel()
    with pytest.raises(UnknownName, match=r"no parametrization 'furier'.*fourier"):
        as_parametrization("furier")
    with pytest.raises(BadInput, match="name or a Parametrization; got int"):
        as_parametrization(3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="at least one level"):
        Pyramid(levels=0)
    with pytest.raises(BadInput, match="factor of at least 1"):
        canvas_of(LowRes(0))


# -- colours ----------------------------------------------------------------------------------------------------------


def test_colours_are_lucids_and_can_be_undone() -> None:
    matrix = as_colours("imagenet", 3)
    assert matrix is not None
    np.testing.assert_allclose(matrix.numpy(), colours_by_lucid(), atol=1e-6)
    values = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(separated(mixed(values, matrix), matrix), values, atol=1e-4, rtol=1e-4)
    assert as_colours("imagenet", 1) is None and as_colours("none", 3) is None and as_colours(None, 3) is None
    assert torch.equal(mixed(values, None), values)


def test_measured_colours_give_the_covariance_of_the_pixels() -> None:
    root = torch.tensor([[0.20, 0.05, 0.01], [0.18, 0.00, -0.03], [0.15, -0.06, 0.02]])
    pixels = torch.einsum("rc,nchw->nrhw", root, torch.randn(8, 3, 40, 40, generator=torch.Generator().manual_seed(0)))
    found = measured(pixels)
    torch.testing.assert_close(found @ found.T, torch.cov(pixels.movedim(1, 0).flatten(1)), atol=1e-5, rtol=1e-3)
    assert (found.norm(dim=0).diff() < 0).all() and (found.sum(0) > 0).all()
    torch.testing.assert_close(found @ found.T, root @ root.T, atol=2e-3, rtol=0.05)
    eight_bit = (pixels * 40 + 128).round().clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(measured(eight_bit) * 255 / 40, found, atol=2e-3, rtol=0.05)


def test_wrong_colours_say_what_works() -> None:
    for wrong, reason in [
        ("imagnet", "imagenet"),
        (torch.ones(3, 3), "can be undone"),
        (torch.eye(2), r"\[3, 3\]"),
    ]:
        with pytest.raises(BadInput, match=reason):
            as_colours(wrong, 3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no three independent colours"):
        measured(torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4))
    with pytest.raises(BadInput, match=r"\[N, 3, H, W\]; got \[3, 4, 4\]"):
        measured(torch.rand(3, 4, 4))
    assert IMAGENET.shape == (3, 3)


def test_numbers_are_drawn_image_by_image() -> None:
    draw: Draw = Draw(2**63 - 1, 0, 2)  # the last seed there is, and the one after
    found: Tensor = draw(4)
    assert found.shape == (2, 4) and draw.uniform(3).shape == (2, 3) and draw.common(5).shape == (5,)
    assert torch.equal(found[1], Draw(0, 0, 1)(4)[0])
