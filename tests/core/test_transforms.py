"""Transforms of optimised images against plain loops, and what the network is shown of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.transforms import (
    SETS,
    Crops,
    Jitter,
    Noise,
    Pad,
    Rotate,
    Scale,
    Views,
    as_transforms,
)


def images(height: int = 9, width: int = 12, n: int = 2) -> Tensor:
    return torch.rand(n, 3, height, width, generator=Generator().manual_seed(0))


def source(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def turned(one: Tensor, degrees: float) -> Tensor:
    """`[C, H, W]` turned counter-clockwise, pixel by pixel: where each comes from, between four neighbours."""
    _, height, width = one.shape
    found, angle = torch.zeros_like(one), math.radians(degrees)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, row - (height - 1) / 2  # rows run downwards
            from_x = math.cos(angle) * x - math.sin(angle) * y + (width - 1) / 2
            from_y = math.sin(angle) * x + math.cos(angle) * y + (height - 1) / 2
            from_x, from_y = min(max(from_x, 0), width - 1), min(max(from_y, 0), height - 1)
            left, top = min(int(from_x), width - 2), min(int(from_y), height - 2)
            a, b = from_y - top, from_x - left
            upper = (1 - b) * one[:, top, left] + b * one[:, top, left + 1]
            lower = (1 - b) * one[:, top + 1, left] + b * one[:, top + 1, left + 1]
            found[:, row, column] = (1 - a) * upper + a * lower
    return found


@pytest.mark.parametrize("degrees", [10.0, -37.0, 90.0])
def test_rotation_is_a_plain_loop_over_pixels(degrees: float) -> None:
    given = images()
    found = Rotate((degrees,))(given, source())
    torch.testing.assert_close(found, torch.stack([turned(one, degrees) for one in given]), atol=1e-5, rtol=0)


def test_a_quarter_turn_is_counter_clockwise() -> None:
    given = images(8, 8)
    torch.testing.assert_close(Rotate((90.0,))(given, source()), given.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_jitter_shows_every_place_and_nothing_else() -> None:
    given, generator = images(), source()
    possible = [given[:, :, row : row + 7, column : column + 10] for row in range(3) for column in range(3)]
    seen = set()
    for _ in range(200):
        found = Jitter(2)(given, generator)
        seen |= {place for place, one in enumerate(possible) if torch.equal(one, found)}
        assert any(torch.equal(one, found) for one in possible)
    assert seen == set(range(9))


def test_padding_is_grey_or_mirrored() -> None:
    given = images()
    grey = Pad(2)(given, source())
    assert grey.shape == (2, 3, 13, 16) and (grey[:, :, 2:-2, 2:-2] == given).all()
    assert grey.sum().item() == pytest.approx(given.sum().item() + 0.5 * 2 * 3 * (13 * 16 - 9 * 12), rel=1e-5)
    mirrored = Pad(2, "reflect")(given, source())
    assert torch.equal(mirrored[:, :, 1, 2:-2], given[:, :, 1]) and torch.equal(mirrored[:, :, 0, 2:-2], given[:, :, 2])


def test_scaling_takes_each_factor_and_keeps_a_slope() -> None:
    slope = torch.linspace(0, 1, 20).expand(1, 1, 20, 20).contiguous()
    generator, sizes = source(), set()
    for _ in range(60):
        found = Scale((0.5, 1.0, 1.5))(slope, generator)
        sizes.add(tuple(found.shape[2:]))
        assert found.mean().item() == pytest.approx(0.5, abs=1e-3)
        assert (found.diff(dim=3) >= -1e-6).all() and found.diff(dim=2).abs().max() < 1e-6
    assert sizes == {(10, 10), (20, 20), (30, 30)}


def test_crops_have_the_size_and_spread_of_the_paper() -> None:
    given = torch.arange(100.0)[:, None].expand(1, 1, 100, 100)
    generator, tops, sizes = source(), [], []
    for _ in range(300):
        found = Crops(0.2, 0.25, views=2)(given, generator)
        assert found.shape[0] == 2 and found.shape[2] == found.shape[3]
        tops += found[:, 0, 0, 0].tolist()
        sizes.append(found.shape[2])
    assert min(sizes) == 20 and max(sizes) == 25
    centres = torch.tensor(tops) + 11
    assert centres.mean().item() == pytest.approx(50, abs=2) and centres.std().item() == pytest.approx(15, abs=1.5)
    several = Crops(0.5, 0.5, views=3)(images(), source())
    assert several.shape == (6, 3, 4, 6)  # all images' first crop, then their second ...
    assert torch.equal(several[::2], Crops(0.5, 0.5, views=3)(images()[:1], source()))


def test_noise_is_the_same_for_every_image() -> None:
    given = torch.zeros(4, 3, 50, 50)
    found = Noise(0.1)(given, source())
    assert torch.equal(found[0], found[3])
    assert found.std().item() == pytest.approx(0.1, rel=0.05)


# -- views ------------------------------------------------------------------------------------------------------------


def test_the_network_sees_one_size_throughout() -> None:
    views = Views(SETS["distill"], (40, 48), (40, 48), seed=0)
    assert {tuple(views(images(40, 48)).shape) for _ in range(30)} == {(2, 3, 40, 48)}
    smaller = Views(SETS["distill"], (40, 40), (24, 24), seed=0)
    assert smaller(images(40, 40)).shape == (2, 3, 24, 24)
    crops = Views(SETS["maco"], (80, 80), (32, 32), seed=0)
    assert crops(images(80, 80)).shape == (12, 3, 32, 32)


def test_without_transforms_images_are_shown_as_they_are() -> None:
    given = images()
    assert torch.equal(Views(as_transforms("none"), (9, 12), (9, 12), 0)(given), given)


def test_what_is_larger_is_cut_around_the_centre() -> None:
    given = images()
    assert torch.equal(Views((Pad(3),), (9, 12), (9, 12), 0)(given), given)


def test_draws_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(3)
    first = Views(SETS["distill"], (30, 30), (30, 30), seed=5)
    torch.manual_seed(4)
    again = Views(SETS["distill"], (30, 30), (30, 30), seed=5)
    other = Views(SETS["distill"], (30, 30), (30, 30), seed=6)
    given = images(30, 30, n=3)
    one, two, three = ([view(given[:n]) for _ in range(5)] for view, n in ((first, 3), (again, 2), (other, 3)))
    assert all(torch.equal(a[:2], b) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_the_standard_set_is_lucids() -> None:
    pad, jitter, scale, rotate, last = SETS["distill"]
    assert (pad, jitter, last) == (Pad(12, 0.5), Jitter(8), Jitter(4))
    assert isinstance(scale, Scale) and scale.factors == tuple(1 + (i - 5) / 50 for i in range(11))
    assert isinstance(rotate, Rotate) and sorted(rotate.angles) == sorted([*range(-10, 11), 0, 0, 0, 0, 0])


def test_wrong_transforms_say_what_works() -> None:
    with pytest.raises(UnknownName, match=r"no set of transforms 'distil'.*distill"):
        as_transforms("distil")
    with pytest.raises(BadInput, match=r"as Jitter\(8\); got 3"):
        as_transforms([3])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="leaves nothing of images of 9x12"):
        Jitter(9)(images(), source())
    for wrong in (lambda: Pad(-1), lambda: Jitter(-1), lambda: Scale(()), lambda: Rotate(()), lambda: Crops(0.0)):
        with pytest.raises(BadInput):
            wrong()
