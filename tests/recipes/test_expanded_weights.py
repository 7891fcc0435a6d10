"""`tl.weights(..., to=...)`: expanded weights against explicit composition of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.specimens import SPECIMENS


def wrapped(module: nn.Module, size: tuple[int, int, int] = (3, 24, 24)) -> tl.Handle:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return tl.wrap(module.double(), input_size=size)


def composed(later: Tensor, earlier: Tensor, stride: int = 1) -> Tensor:
    """The kernel of two convolutions in a row, `[F, C, h, w]`, by the plain sum over what lies between."""
    outputs, middle, height, width = later.shape
    _, inputs, h, w = earlier.shape
    found = torch.zeros(outputs, inputs, (height - 1) * stride + h, (width - 1) * stride + w, dtype=later.dtype)
    for row in range(height):
        for column in range(width):
            top, left = row * stride, column * stride
            share = torch.einsum("fm,mchw->fchw", later[:, :, row, column], earlier)
            found[:, :, top : top + h, left : left + w] += share
    assert middle == len(earlier)
    return found


def test_two_convolutions_compose() -> None:
    a, b, c = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(4, 6, (2, 3), padding=1)
    model = wrapped(nn.Sequential(a, nn.ReLU(), b, nn.GELU(), c))
    found = tl.weights(model, "4", to="0")
    torch.testing.assert_close(found.in_order(), composed(c.weight, b.weight).float())
    assert found.to == "0" and found.method == "expanded_weights" and not found.colour
    assert (found.images.flatten(2).norm(dim=2).diff(dim=1) <= 0).all()
    facts = found.diagnostics
    assert facts["ignored"] == {"relu": 1, "gelu": 1} and not facts["clipped"]
    assert tl.weights(model, "4", to="2").diagnostics["ignored"] == {"gelu": 1}  # a ReLU before it is not on the way
    top, left, bottom, right = facts["box"]
    assert (bottom - top, right - left) == (4, 5) == tuple(found.images.shape[2:])


def test_down_to_the_input_they_are_pictures_in_colour() -> None:
    a, b = nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 4, 3, dilation=2)
    model = wrapped(nn.Sequential(a, nn.ReLU6(), b))
    found = tl.weights(model, "2", to="input")
    spread = torch.zeros(4, 5, 5, 5, dtype=torch.float64)
    spread[:, :, ::2, ::2] = b.weight.detach()
    assert found.colour
    torch.testing.assert_close(found.images, composed(spread, a.weight, stride=2).float())
    torch.testing.assert_close(tl.weights(model, "2", to="0.in").images, found.images)
    torch.testing.assert_close(tl.weights(model, "0", to="input").images, a.weight.float())


def test_the_units_are_linear_in_what_the_weights_say() -> None:
    """With everything positive no rectifier is at work, and the weights predict the change of the centre unit."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.skip = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
            self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.a(x))
            y = self.norm(self.b(x))
            y += self.skip(x)
            return self.fc(self.relu(y).mean((2, 3)))

    module = Net()
    model = wrapped(module)
    for parameter in module.parameters():
        parameter.data.abs_()
    module.norm.running_mean.zero_()
    found = tl.weights(model, "relu", to="a")
    row, column = found.diagnostics["position"]
    top, left, bottom, right = found.diagnostics["box"]
    torch.manual_seed(1)
    one, other = torch.rand(2, 1, 4, 12, 12, dtype=torch.float64)

    def unit(x: Tensor) -> Tensor:
        return (module.norm(module.b(x)) + module.skip(x))[0, :, row, column]

    module.eval()
    change = (found.in_order() * (one - other)[:, :, top:bottom, left:right].float()).sum((1, 2, 3))
    torch.testing.assert_close((unit(one) - unit(other)).float(), change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2)])
def test_the_maximum_of_a_window_counts_as_its_mean(pool: Any) -> None:
    conv, size = nn.Conv2d(3, 4, 3), pool.kernel_size
    model = wrapped(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), pool, conv))
    found = tl.weights(model, "3", to="0")
    mean = torch.eye(3, dtype=torch.float64)[:, :, None, None].expand(-1, -1, size, size) / size**2
    torch.testing.assert_close(found.in_order(), composed(conv.weight, mean, stride=2).float())
    assert found.diagnostics["ignored"] == {"relu": 1} | ({"max_pool2d": 1} if isinstance(pool, nn.MaxPool2d) else {})


def test_the_head_through_the_pooling() -> None:
    model = tl.load("demo")
    found = tl.weights(model, "fc", to="layer4", channels=[2])
    assert found.images.shape == (1, 128, 8, 8) and found.names == (model.classes[2],)
    expected = model.module.fc.weight[2].detach()[:, None, None].expand(-1, 8, 8) / 64
    torch.testing.assert_close(found.in_order()[0], expected)
    assert not found.diagnostics["clipped"]


def test_inside_a_token_block() -> None:
    handle, _ = SPECIMENS["vit_registers"]()
    found = tl.weights(handle, "blocks.1.mlp.2", to="blocks.1.mlp.0")
    mlp = handle.module.blocks[1].mlp
    assert found.images.shape == (16, 32, 1, 1)
    torch.testing.assert_close(found.in_order()[:, :, 0, 0], mlp[2].weight.detach())
    patches = tl.weights(handle, "patches", to="input")
    torch.testing.assert_close(patches.images, handle.module.patches.weight.detach())


def test_inputs_are_enlarged_until_the_kernel_fits() -> None:
    found = tl.weights("demo", "layer4", to="conv1", channels=[0])
    assert found.diagnostics["input_size"] == (3, 128, 128) and not found.diagnostics["clipped"]
    assert found.images.shape == (1, 24, 39, 39)


def test_where_inputs_cannot_be_enlarged_the_border_is_stated() -> None:
    convolutions = [nn.Conv2d(3, 4, 3, 1, 1), *(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(4))]
    model = wrapped(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * 49, 2)), (3, 7, 7))
    found = tl.weights(model, "4", to="0")  # the classifier fails on larger inputs
    assert found.diagnostics["clipped"] and found.diagnostics["input_size"] == (3, 7, 7)
    assert found.images.shape[2:] == (7, 7)
    assert "cut off" in found.figure()._suptitle.get_text()
    assert not tl.weights(model, "1", to="0").diagnostics["clipped"]


@pytest.mark.parametrize(
    ("specimen", "layer", "to", "why"),
    [
        ("vit_registers", "blocks.1", "blocks.0", "scaled_dot_product_attention"),
        ("nhwc", "window_block", "down", "layer_norm"),
        ("depthwise", "project", "expand", "mul"),
    ],
)
def test_gates_attention_and_normalisation_refuse(specimen: str, layer: str, to: str, why: str) -> None:
    with pytest.raises(NotApplicable, match=rf"no fixed weights over '{to}'.*{why}"):
        tl.weights(SPECIMENS[specimen]()[0], layer, to=to)


@pytest.mark.parametrize("bend", [torch.sigmoid, torch.tanh, torch.abs, lambda x: x.clamp(min=0), lambda x: x * x])
def test_any_bend_that_is_no_rectifier_refuses(bend: Any) -> None:
    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bend(x)

    model = wrapped(nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), Bent(), nn.Conv2d(2, 2, 1)))
    with pytest.raises(NotApplicable, match="no fixed weights"):
        tl.weights(model, "2", to="0")
    assert tl.weights(model, "2", to="1").images.shape == (2, 2, 1, 1)


def test_a_unit_of_one_channel_and_position_refuses_too() -> None:
    """Where three draws might all fall on one side of a bend, one of them is the negative of another."""

    class Absolute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    for size in range(2, 14):
        net = nn.Sequential(nn.Conv2d(3, 1, 1), Absolute(), nn.Conv2d(1, 1, 1))
        with pytest.raises(NotApplicable, match="abs"):
            tl.weights(wrapped(net, (3, size, size)), "2", to="0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_double_precision(dtype: torch.dtype) -> None:
    convolutions = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 32, 3), nn.Conv2d(32, 4, 3)]
    model = wrapped(nn.Sequential(*convolutions)).to(dtype=dtype)
    _, a, b = (one.weight.detach().double() for one in model.module)
    found = tl.weights(model, "2", to="0").in_order()
    torch.testing.assert_close(found.double(), composed(b, a), atol=4e-6, rtol=1e-7)
    assert model.dtype == dtype


def test_a_gate_from_another_branch_refuses() -> None:
    """The product is linear in one branch, but its weights are what the other one shows."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            b = self.b(x)
            return self.out(self.a(x) * b)

    with pytest.raises(NotApplicable, match="no fixed weights"):
        tl.weights(wrapped(Gated()), "out", to="a")


def test_a_tiny_bend_is_told_from_rounding() -> None:
    """A fresh ConvNeXt scales its branches by 1e-6; their normalisation is no linear map all the same."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(24)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-6 * self.norm(x)

    model = wrapped(nn.Sequential(nn.Conv2d(3, 4, 1), Block())).to(dtype=torch.float32)
    with pytest.raises(NotApplicable, match="layer_norm"):
        tl.weights(model, "1", to="0")


def test_what_does_not_lead_to_the_layer_is_refused() -> None:
    model = tl.load("demo")
    with pytest.raises(BadInput, match="'conv1' does not depend on 'layer1'"):
        tl.weights(model, "conv1", to="layer1")
    with pytest.raises(BadInput, match="does not depend on"):
        tl.weights(model, "layer2.conv2", to="layer2.downsample.0")
    with pytest.raises(BadInput, match="the layer itself"):
        tl.weights(model, "conv1", to="conv1")
    with pytest.raises(UnknownName, match="no layer 'conv9'"):
        tl.weights(model, "layer1", to="conv9")
    with pytest.raises(BadInput, match="has channels 0 to 31; got 32"):
        tl.weights(model, "layer1", to="conv1", channels=32)
    with pytest.raises(BadInput, match="input size is not known"):
        tl.weights(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), "1", to="0")
    dilated = wrapped(nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2, dilation=2), nn.Conv2d(3, 3, 1)))
    with pytest.raises(NotApplicable, match="dilation"):
        tl.weights(dilated, "2", to="0")


def test_weights_that_are_all_zero_are_not_drawn_as_nothing() -> None:
    model = wrapped(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)))
    nn.init.zeros_(model.module[1].weight)
    with pytest.raises(NotApplicable, match="zero"):
        tl.weights(model, "1", to="0")


def test_a_rectifiers_result_may_be_written_into() -> None:
    """Only an in-place rectifier shares memory with its input."""

    class Writes(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.a, self.b, self.inplace = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), inplace

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = F.relu(x, inplace=self.inplace)
            y *= 3
            return self.b(x + y)

    for inplace, factor in ((False, 4), (True, 6)):
        module = Writes(inplace)
        found = tl.weights(wrapped(module), "b", to="a")
        torch.testing.assert_close(found.in_order(), factor * module.b.weight.detach().float())
