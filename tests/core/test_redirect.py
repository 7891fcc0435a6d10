"""Units that are off: where they are read before their ReLU, and what their gradient is redirected to."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.preactivation import before_rectifier, read_before_rectifier
from torchloupe_core.redirect import Redirected
from torchloupe_core.spec import Spec
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.targets import parse

SHAPE = (3, 32, 32)


def pull(function: object, x: Tensor, given: Tensor) -> Tensor:
    """The gradient at x of `given` times what a function gives for x, redirected."""
    leaf = x.clone().requires_grad_(True)
    with torch.enable_grad(), Redirected():
        (found,) = torch.autograd.grad((function(leaf.clone()) * given).sum(), leaf)  # type: ignore[operator]
    return found


OFF, ON = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-1.0, 2.0, -0.5]])
WAYS = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "in place": lambda x: x.relu_(),
    "inplace=True": lambda x: F.relu(x, inplace=True),
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "relu6": F.relu6,
    "module relu6": nn.ReLU6(),
    "module relu6 in place": nn.ReLU6(inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 1e9),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_rectifier_that_is_off_lets_through_what_switches_it_on(way: str) -> None:
    given = torch.tensor([[3.0, -1.0, 2.0]])
    assert pull(WAYS[way], OFF, given).tolist() == [[3.0, 0.0, 2.0]]  # not what pushes it down further


@pytest.mark.parametrize("way", WAYS)
def test_a_rectifier_that_lets_something_through_is_left_alone(way: str) -> None:
    given = torch.tensor([[3.0, -1.0, 2.0]])
    assert pull(WAYS[way], ON, given).tolist() == [[0.0, -1.0, 0.0]]
    both = pull(WAYS[way], torch.cat([ON, OFF]), given.repeat(2, 1))  # image by image
    assert both.tolist() == [[0.0, -1.0, 0.0], [3.0, 0.0, 2.0]]


def test_where_only_pushing_down_is_wanted_all_is_let_through() -> None:
    assert pull(F.relu, OFF, torch.tensor([[-3.0, -1.0, 0.0]])).tolist() == [[-3.0, -1.0, 0.0]]


def test_a_clipped_rectifier_is_redirected_at_its_upper_end_too() -> None:
    above = torch.tensor([[7.0, 8.0]])
    assert pull(F.relu6, above, torch.tensor([[1.0, -2.0]])).tolist() == [[0.0, -2.0]]


def test_values_are_those_of_the_rectifier() -> None:
    x = torch.linspace(-9, 9, 31)
    with Redirected():
        assert torch.equal(F.relu(x), x.clamp(min=0)) and torch.equal(F.relu6(x), x.clamp(0, 6))
        assert torch.equal(F.hardtanh(x), x.clamp(-1, 1)) and torch.equal(F.hardtanh(x, -2, 3), x.clamp(-2, 3))
        same = x.clone()
        assert nn.ReLU(inplace=True)(same) is same and torch.equal(same, x.clamp(min=0))


# -- before the ReLU --------------------------------------------------------------------------------------------------


def test_the_place_before_the_relu_holds_what_the_relu_gets() -> None:
    handle, inputs = SPECIMENS["residual"]()
    place = before_rectifier(handle, "layer2", SHAPE)
    assert place == "layer2.relu#2.in"
    with handle.watch("layer2", place, shape=SHAPE) as watch:
        watch(inputs)
        assert (watch[place] < 0).any() and torch.equal(watch[place].relu(), watch["layer2"])


@pytest.mark.parametrize(
    ("specimen", "layer", "expected"),
    [
        ("plain", "relu2", "relu2.in"),
        ("plain", "conv2", "conv2"),
        ("plain", "fc", "fc"),
        ("residual", "layer1.relu#1", "layer1.relu#1.in"),
        ("residual", "layer1.relu", "layer1.relu.in"),
        ("residual", "layer1.bn1", "layer1.bn1"),
        ("residual", "relu.in", "relu.in"),
        ("inplace", "relu#3", "relu#3.in"),
        ("nhwc", "window_block", "window_block"),
    ],
)
def test_places_before_the_relu(specimen: str, layer: str, expected: str) -> None:
    handle, _ = SPECIMENS[specimen]()
    assert before_rectifier(handle, layer, SHAPE) == expected


def test_blocks_of_torchvision() -> None:
    module = torchvision.models.resnet18(weights=None)
    handle = Handle(module, Spec(input_size=(3, 64, 64)))
    assert before_rectifier(handle, "layer2", (3, 64, 64)) == "layer2.1.relu#2.in"
    assert before_rectifier(handle, "layer2.0", (3, 64, 64)) == "layer2.0.relu#2.in"


class Functions(nn.Module):
    """Rectified by functions; and a ReLU module that is not the last thing in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 4, 3), Skipping()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.relu(self.conv(x))).mean((2, 3))  # type: ignore[no-any-return]


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x - 0.1) + x  # type: ignore[no-any-return]


def test_a_relu_inside_a_block_is_not_taken_for_its_end() -> None:
    handle = Handle(Functions().eval(), Spec(input_size=(3, 12, 12)))
    with pytest.raises(NotApplicable, match=r"'block' \(Skipping\) is nowhere below zero and does not end in a ReLU"):
        before_rectifier(handle, "block", (3, 12, 12))
    with pytest.raises(NotApplicable, match="leave read= out"):  # what a function rectified
        before_rectifier(handle, "block.in", (3, 12, 12))


def test_targets_are_read_before_their_relu_and_outputs_as_they_are() -> None:
    handle, _ = SPECIMENS["residual"]()
    found = read_before_rectifier(handle, parse("2*layer2:3-logit:cat+layer1.bn1:2@1,1"), SHAPE)
    assert str(found) == "2*layer2.relu#2.in:3-logit:cat+layer1.bn1:2@1,1"
