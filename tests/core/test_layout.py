"""Activations as canonical maps, against explicit loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchloupe_core.layout import Layout, from_map, infer, plausible_grid, to_map


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_a_channels_first_map_is_itself() -> None:
    x = numbered(2, 3, 4, 5)
    assert to_map(x, Layout("nchw", 3, (4, 5))) is x


def test_a_channels_last_map_against_a_loop() -> None:
    x, layout = numbered(2, 4, 5, 3), Layout("nhwc", 3, (4, 5))
    found = to_map(x, layout)
    assert found.shape == (2, 3, 4, 5)
    for n in range(2):
        for c in range(3):
            for row in range(4):
                for column in range(5):
                    assert found[n, c, row, column] == x[n, row, column, c]
    assert layout.channel_dim == -1


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_of_a_rectangular_grid_against_a_loop(prefix: int) -> None:
    x = numbered(2, prefix + 3 * 4, 6)
    found = to_map(x, Layout("tokens", 6, (3, 4), prefix))
    assert found.shape == (2, 6, 3, 4)
    for n in range(2):
        for c in range(6):
            for row in range(3):
                for column in range(4):
                    assert found[n, c, row, column] == x[n, prefix + row * 4 + column, c]


def test_unrolled_tokens_against_a_loop() -> None:
    """As Hiera orders them: the strides first, outermost first, then what is left of rows and columns."""
    strides, (rows, columns) = ((2, 1), (3, 2)), (12, 8)
    x = numbered(2, rows * columns, 3)
    found = to_map(x, Layout("tokens", 3, (rows, columns), unrolled=strides))
    for row in range(rows):
        for column in range(columns):
            first = row % 2, column % 1
            second = row // 2 % 3, column // 1 % 2
            rest = row // 6, column // 2
            token = first[0] + first[1]
            token = (token * 3 + second[0]) * 2 + second[1]
            token = (token * (rows // 6) + rest[0]) * (columns // 2) + rest[1]
            assert torch.equal(found[:, :, row, column], x[:, token])


def test_a_vector_is_a_map_of_one_position() -> None:
    x = numbered(2, 7)
    found = to_map(x, Layout("vector", 7))
    assert found.shape == (2, 7, 1, 1)
    assert torch.equal(found[:, :, 0, 0], x)
    assert not Layout("vector", 7).spatial


@pytest.mark.parametrize(
    "layout",
    [Layout("nchw", 3, (2, 4)), Layout("nhwc", 3, (2, 4)), Layout("tokens", 3, (2, 4), 2), Layout("vector", 3)],
)
def test_gradients_pass_through(layout: Layout) -> None:
    shape = {"nchw": (1, 3, 2, 4), "nhwc": (1, 2, 4, 3), "tokens": (1, 10, 3), "vector": (1, 3)}[layout.order]
    x = torch.randn(shape, requires_grad=True)
    found = to_map(x, layout)
    (gradient,) = torch.autograd.grad((found * found.detach()).sum(), x)
    expected = x.detach().clone()
    if layout.order == "tokens":
        expected[:, :2] = 0  # class and register tokens are no part of the map
    assert torch.equal(gradient, expected)


IMAGE = (32, 48)


@pytest.mark.parametrize(
    ("shape", "module", "expected"),
    [
        ((2, 8, 4, 6), nn.Conv2d(1, 8, 1), Layout("nchw", 8, (4, 6))),
        ((2, 4, 6, 8), nn.LayerNorm(8), Layout("nhwc", 8, (4, 6))),
        ((2, 4, 6, 8), nn.Linear(8, 8), Layout("nhwc", 8, (4, 6))),
        ((2, 8, 4, 6), nn.BatchNorm2d(8), Layout("nchw", 8, (4, 6))),
        ((2, 6, 6, 6), nn.Conv2d(1, 6, 1), Layout("nchw", 6, (6, 6))),  # shape alone would not tell
        ((2, 6, 6, 6), nn.LayerNorm(6), Layout("nhwc", 6, (6, 6))),
        ((2, 10), nn.Linear(8, 10), Layout("vector", 10)),
        ((2, 24, 8), nn.Identity(), Layout("tokens", 8, (4, 6), 0)),  # the image's own shape, 2 by 3
        ((2, 25, 8), nn.Identity(), None),  # no grid fits, and no class token was stated
        ((2,), nn.Identity(), None),
        ((8, 4, 6, 8), nn.LayerNorm(8), None),  # windows folded into the batch
        ((2, 3, 4, 5, 6), nn.Identity(), None),
    ],
)
def test_inference_from_type_and_shape(shape: tuple[int, ...], module: nn.Module, expected: Layout | None) -> None:
    assert infer(torch.zeros(shape), module, image=IMAGE, batch=2, grids=()) == expected


def test_tokens_take_the_grid_of_the_latest_map_that_fits() -> None:
    grids = [(8, 12), (4, 6)]
    found = lambda length, prefix=None: infer(  # noqa: E731
        torch.zeros(2, length, 8), nn.Identity(), image=IMAGE, batch=2, grids=grids, prefix=prefix
    )
    assert found(24) == Layout("tokens", 8, (4, 6), 0)
    assert found(25) == Layout("tokens", 8, (4, 6), 1)
    assert found(29) == Layout("tokens", 8, (4, 6), 5)
    assert found(29, 5) == Layout("tokens", 8, (4, 6), 5)
    assert found(29, 1) is None  # one class token is stated, and 4 by 7 is no part of any grid before
    assert found(7, 1) == Layout("tokens", 8, (2, 3), 1)  # every second row and column of the latest
    assert found(27, 1) is None
    assert found(96) == Layout("tokens", 8, (8, 12), 0)
    assert found(97, 1) == Layout("tokens", 8, (8, 12), 1)
    assert found(24, 1) == Layout("tokens", 8, (4, 6), 0)  # the last stages may drop the class token


def test_maps_inside_attention_are_no_pictures() -> None:
    inside = {"image": IMAGE, "batch": 2, "grids": [(4, 6)], "inside_attention": True}
    assert infer(torch.zeros(2, 3, 24, 24), nn.Softmax(-1), **inside) is None  # type: ignore[arg-type]
    assert infer(torch.zeros(2, 3, 24, 8), nn.LayerNorm(8), **inside) is None  # type: ignore[arg-type]  # q_norm
    assert infer(torch.zeros(2, 4, 6, 8), nn.Linear(8, 8), **inside) == Layout("nhwc", 8, (4, 6))  # type: ignore[arg-type]


def test_attention_keeps_to_the_grids_of_its_input_and_parts() -> None:
    known = {"image": IMAGE, "batch": 2, "grids": [(4, 6)], "prefixes": (0, 1), "attention": True}
    tokens = Layout("tokens", 8, (4, 6), 1)
    assert infer(torch.zeros(2, 25, 8), nn.Linear(8, 8), **known) == tokens  # type: ignore[arg-type]
    assert infer(torch.zeros(2, 28, 8), nn.Linear(8, 8), **known) is None  # type: ignore[arg-type]  # a window
    assert infer(torch.zeros(2, 6, 8), nn.Linear(8, 8), **known) is None  # type: ignore[arg-type]  # pooled keys
    assert infer(torch.zeros(2, 4, 12, 12), nn.Conv2d(4, 4, 1), **known) is None  # type: ignore[arg-type]  # of heads
    pooled = infer(torch.zeros(2, 8, 2, 3), nn.Conv2d(8, 8, 2, 2), **known)  # type: ignore[arg-type]
    assert pooled == Layout("nchw", 8, (2, 3))
    assert infer(torch.zeros(2, 8, 2, 3), nn.Identity(), **known) is None  # type: ignore[arg-type]


def test_tokens_from_tokens_keep_their_grid() -> None:
    fed = Layout("tokens", 8, (4, 6), 5)
    known = {"image": IMAGE, "batch": 2, "grids": [(4, 6), (2, 3)], "fed": fed}
    assert infer(torch.zeros(2, 29, 32), nn.Linear(8, 32), **known) == Layout("tokens", 32, (4, 6), 5)  # type: ignore[arg-type]
    assert infer(torch.zeros(2, 6, 32), nn.Linear(8, 32), **known) == Layout("tokens", 32, (2, 3), 0)  # type: ignore[arg-type]


def test_what_only_looks_like_tokens() -> None:
    known = {"image": IMAGE, "batch": 2, "grids": [(8, 12)]}
    assert infer(torch.zeros(2, 24, 9), nn.Conv1d(24, 24, 1), **known) is None  # type: ignore[arg-type]  # [N, C, L]
    assert infer(torch.zeros(2, 24, 9), nn.Identity(), **known) == Layout("tokens", 9, (4, 6))  # type: ignore[arg-type]
    finer = infer(torch.zeros(2, 16 * 24, 9), nn.Identity(), **known)  # type: ignore[arg-type]
    assert finer is None  # channels of transposed tokens: a grid does not become finer


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 12, 12), Layout("nhwc", 12, (8, 12))),  # [N, h, w, C]: (8, 12) was seen before
        ((2, 12, 8, 12), Layout("nchw", 12, (8, 12))),
        ((2, 16, 24, 32), Layout("nhwc", 32, (16, 24))),  # its strides are even, those of (24, 32) are not
        ((2, 32, 16, 24), Layout("nchw", 32, (16, 24))),
        ((2, 6, 6, 6), None),
        ((2, 36, 16, 8), None),
        ((2, 8, 1, 1), Layout("nchw", 8, (1, 1))),
    ],
)
def test_the_order_of_a_map_by_its_shape(shape: tuple[int, ...], expected: Layout | None) -> None:
    assert infer(torch.zeros(shape), nn.Identity(), image=IMAGE, batch=2, grids=[(8, 12)]) == expected


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of [N, C, h, w], as timm's and torchvision's."""


class OtherNorm(nn.LayerNorm):
    pass


def test_a_norm_over_channels_says_where_they_are() -> None:
    known = {"image": IMAGE, "batch": 2, "grids": ()}
    assert infer(torch.zeros(2, 8, 4, 6), LayerNorm2d(8), **known) == Layout("nchw", 8, (4, 6))  # type: ignore[arg-type]
    assert infer(torch.zeros(2, 4, 6, 8), OtherNorm(8), **known) == Layout("nhwc", 8, (4, 6))  # type: ignore[arg-type]
    assert infer(torch.zeros(2, 6, 6, 6), LayerNorm2d(6), **known) == Layout("nchw", 6, (6, 6))  # type: ignore[arg-type]
    assert infer(torch.zeros(2, 6, 6, 6), OtherNorm(6), **known) == Layout("nhwc", 6, (6, 6))  # type: ignore[arg-type]


def test_integer_outputs_are_no_maps() -> None:
    assert infer(torch.zeros(2, 8, 4, 6, dtype=torch.long), nn.Identity(), image=IMAGE, batch=2, grids=()) is None


def test_plausible_grids() -> None:
    assert plausible_grid((7, 7), (224, 224))
    assert plausible_grid((7, 10), (224, 320))
    assert plausible_grid((1, 1), (224, 224))
    assert not plausible_grid((7, 14), (224, 224))
    assert not plausible_grid((448, 448), (224, 224))
    assert not plausible_grid((1, 7), (224, 224))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 4, 5), Layout("nchw", 3, (4, 5))),
        ((2, 4, 5, 3), Layout("nhwc", 3, (4, 5))),
        ((2, 7), Layout("vector", 7)),
        ((2, 5 + 3 * 4, 6), Layout("tokens", 6, (3, 4), 5)),
        ((2, 12 * 8, 3), Layout("tokens", 3, (12, 8), unrolled=((2, 1), (3, 2)))),
    ],
)
def test_maps_go_back_to_where_they_were_read(shape: tuple[int, ...], layout: Layout) -> None:
    x = numbered(*shape)
    assert torch.equal(from_map(to_map(x, layout), layout, x), x)
    zeroed = from_map(torch.zeros_like(to_map(x, layout)), layout, x)
    before = 5 if layout.prefix else 0
    assert not zeroed[:, before:].any()
    assert torch.equal(zeroed[:, :before], x[:, :before])  # the class token is not part of the map
