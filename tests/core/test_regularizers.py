"""Regularisers against plain loops, diversity and alignment against their closed forms and against pairs of images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.regularizers import (
    L1,
    L2,
    REGULARIZERS,
    Bilateral,
    Blur,
    ClipSmallContributions,
    ClipSmallPixels,
    GradientBlur,
    GradientPyramid,
    Regularizer,
    TotalVariation,
    as_regularizers,
)
from torchloupe_core.terms import similarity, unlikeness


def images(n: int = 2, size: int = 8) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_penalties_are_means_over_pixels() -> None:
    given = images()
    for kind, one in ((L2(3.0), lambda p: (p - 0.5) ** 2), (L1(3.0), lambda p: abs(p - 0.5))):
        expected = [3.0 * np.mean([one(p) for p in image.flatten().tolist()]) for image in given]
        penalty = kind.penalty(given)
        assert penalty is not None and penalty.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
def test_total_variation_is_a_loop_over_neighbours(power: float) -> None:
    given = images()
    expected = []
    for image in given.tolist():
        total = 0.0
        for channel in image:
            for row in range(7):
                for column in range(7):
                    across = channel[row][column + 1] - channel[row][column]
                    down = channel[row + 1][column] - channel[row][column]
                    total += math.hypot(across, down) ** power
        expected.append(2.0 * total / (3 * 7 * 7))
    found = TotalVariation(2.0, power).penalty(given)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_total_variation_of_a_flat_image_has_a_gradient_of_zero() -> None:
    flat = torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(TotalVariation(1.0).penalty(flat).sum(), flat)
    assert gradient.isfinite().all() and not gradient.any()


def test_blurs_act_every_few_steps_and_keep_the_mean() -> None:
    given, none = images(), torch.zeros(2, 3, 8, 8)
    assert Blur(1.0, every=4).projected(given, none, 3) is None
    found = Blur(1.0, every=4).projected(given, none, 4)
    assert found is not None and found.std() < 0.6 * given.std()
    point = torch.zeros(1, 3, 21, 21)
    point[:, :, 10, 10] = 1
    blurred = GradientBlur(1.5).filtered(point, point)
    squares = torch.arange(-10.0, 11) ** 2
    assert blurred.sum().item() == pytest.approx(3, rel=1e-4)
    assert (blurred[0, 0].sum(0) * squares).sum().item() == pytest.approx(1.5**2, rel=0.03)  # its variance


def test_the_pyramid_evens_out_scales() -> None:
    coarse = torch.linspace(0, 2 * math.pi, 32).sin()[None, None, :, None].expand(1, 3, 32, 32)
    fine = torch.tensor([1.0, -1.0]).repeat(16)[None, None, None, :].expand(1, 3, 32, 32)
    given = coarse + 0.01 * fine
    found = GradientPyramid(4).filtered(coarse, given)
    before, after = ((one * fine).mean() / one.std() for one in (given, found))
    assert found.isfinite().all() and after > 2 * before  # what is fine counts more
    assert GradientPyramid(4).filtered(coarse, torch.zeros(1, 3, 32, 32)).isfinite().all()
    twice = GradientPyramid(4).filtered(coarse, 2 * given)
    torch.testing.assert_close(twice, found)


def test_bilateral_is_a_loop_and_stops_at_edges() -> None:
    given = images(1, 6)
    found = Bilateral(sigma=1.0, tone=0.3, every=1).projected(given, given, 1)
    assert found is not None
    for row in range(6):
        for column in range(6):
            total, weights = torch.zeros(3), 0.0
            for down in range(-2, 3):
                for right in range(-2, 3):
                    other = given[0, :, min(max(row + down, 0), 5), min(max(column + right, 0), 5)]
                    apart = (other - given[0, :, row, column]).square().sum().item()
                    weight = math.exp(-(down**2 + right**2) / 2 - apart / (2 * 0.3**2))
                    total, weights = total + weight * other, weights + weight
            torch.testing.assert_close(found[0, :, row, column], total / weights, atol=1e-5, rtol=0)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    kept = Bilateral(2.0, 0.1, 1).projected(edge, edge, 1)
    torch.testing.assert_close(kept, edge)
    assert Bilateral(every=3).projected(edge, edge, 2) is None


def test_small_pixels_and_contributions_become_grey() -> None:
    given = torch.full((1, 3, 2, 2), 0.5)
    given[0, :, 0, 0], given[0, :, 0, 1], given[0, :, 1, 0], given[0, :, 1, 1] = 0.9, 0.6, 0.1, 0.45
    found = ClipSmallPixels(0.5).projected(given, given, 1)
    assert found is not None and found[0, 0].tolist() == [pytest.approx([0.9, 0.5]), pytest.approx([0.1, 0.5])]
    gradient = torch.ones(1, 3, 2, 2)
    gradient[0, :, 0, 0] = 0.01  # strong, and matters little
    found = ClipSmallContributions(0.25).projected(given, gradient, 1)
    assert found is not None and found[0, 0].tolist() == [pytest.approx([0.5, 0.6]), pytest.approx([0.1, 0.45])]
    assert ClipSmallPixels(0.5, every=2).projected(given, given, 1) is None
    assert ClipSmallContributions(0.5, every=2).projected(given, given, 1) is None
    unchanged = ClipSmallPixels(0.01).projected(given, given, 1)
    assert unchanged is not None and torch.equal(unchanged, given)


def test_names_and_sets() -> None:
    assert as_regularizers(None) == as_regularizers("none") == ()
    assert as_regularizers({"tv": 0.1, "l2": 2.0}) == (TotalVariation(0.1), L2(2.0))
    assert {type(one) for one in as_regularizers("yosinski")} == {L2, Blur, ClipSmallPixels, ClipSmallContributions}
    assert as_regularizers([L1(0.5)]) == (L1(0.5),)
    for name, make in REGULARIZERS.items():
        one = make(2.0 if name != "clip_pixels" else 0.5)
        assert isinstance(one, Regularizer)
        kinds = [one.penalty(images()) is not None, one.on_gradient, one.on_image]
        assert sum(kinds) == 1, name
    with pytest.raises(UnknownName, match=r"no regularizer 'tvv'.*tv"):
        as_regularizers({"tvv": 1.0})
    with pytest.raises(UnknownName, match="no set of regularizers 'l2'"):
        as_regularizers("l2")
    with pytest.raises(BadInput, match=r"an object as L2\(0\.1\); got 'l2'"):
        as_regularizers(["l2"])  # type: ignore[list-item]


# -- terms ------------------------------------------------------------------------------------------------------------


def by_pairs(maps: Tensor) -> list[float]:
    """For each image the sum of cosines of Gram matrices with the others, pair by pair."""
    grams = [m.flatten(1) @ m.flatten(1).T for m in maps.double()]
    grams = [gram / gram.norm() for gram in grams]
    return [sum((a * b).sum().item() for b in grams if b is not a) for a in grams]


@pytest.mark.parametrize("shape", [(5, 4, 6, 6), (4, 40, 2, 3)])  # fewer channels than places, and more
def test_diversity_is_the_sum_over_pairs(shape: tuple[int, ...]) -> None:
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert similarity(maps).tolist() == pytest.approx(by_pairs(maps), rel=1e-4)


@pytest.mark.parametrize("places", [1, 8])
def test_diversity_in_closed_form(places: int) -> None:
    """N identical images give N - 1, images of disjoint channels 0 (Olah 2017)."""
    one = torch.rand(1, 6, places, places) + 0.1
    torch.testing.assert_close(similarity(one.expand(4, -1, -1, -1)).mean(), torch.tensor(3.0))
    apart = torch.zeros(3, 6, places, places)
    for index in range(3):
        apart[index, 2 * index : 2 * index + 2] = one[0, :2]
    assert similarity(apart).abs().max() < 1e-5
    assert similarity(torch.zeros(3, 6, places, places)).isfinite().all()


def test_alignment_is_lucids_loop() -> None:
    maps = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for distance in (1, 2, 3, 4):
        for first in range(7 - distance):
            total += (maps[first] - maps[first + distance]).square().mean().item() / 2**distance
    assert unlikeness(maps).sum().item() == pytest.approx(total, rel=1e-5)
    assert unlikeness(maps[:2]).sum().item() == pytest.approx((maps[0] - maps[1]).square().mean().item() / 2, rel=1e-5)
    assert not unlikeness(maps[:1].expand(5, -1, -1, -1)).any()
