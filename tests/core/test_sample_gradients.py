"""Gradients of single images, against one image after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.methods.influence.pieces import chosen_parameters
from torchloupe_core.methods.influence.sample_gradients import SampleGradients
from torchloupe_core.specimens import SPECIMENS


def combinations(logits: Tensor) -> Tensor:
    """Two combinations of each image's logits."""
    n, k = logits.shape
    return torch.stack([logits.softmax(1), torch.arange(n * k, dtype=logits.dtype).view(n, k) / 7], 1)


def looped(module: nn.Module, names: Any, inputs: Tensor, gradients: SampleGradients) -> Tensor:
    rows = []
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        wanted = combinations(module(inputs.clone()))
    for place, image in enumerate(inputs):
        for m in range(2):
            with torch.enable_grad():
                for name in names:
                    parameters[name].requires_grad_(True)
                value = (module(image[None].clone())[0] * wanted[place, m]).sum()
                found = torch.autograd.grad(value, [parameters[name] for name in names])
                for name in names:
                    parameters[name].requires_grad_(False)
            rows.append(gradients.packed(dict(zip(names, found, strict=True))))
    return torch.stack(rows).view(len(inputs), 2, -1)


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_kind_of_model_against_a_loop(name: str) -> None:
    handle, inputs = SPECIMENS[name]()
    names = chosen_parameters(handle, "all")
    with handle.borrow():
        gradients = SampleGradients(handle, names)
        held = {piece.module for piece in gradients.pieces}
        assert gradients.captured == held - {""}  # a ViT's tokens and positions belong to no layer
        assert ("" in held) == (name == "vit_registers")
        expected = looped(handle.module, names, inputs, gradients)
        for captured in (gradients.captured, frozenset[str]()):
            gradients.captured = captured
            rows, logits = gradients.rows(inputs, combinations)
            torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(logits, handle.module(inputs.clone()))
        torch.testing.assert_close(gradients.summed(inputs, combinations), expected.sum((0, 1)), rtol=1e-3, atol=1e-4)
    assert gradients.size == sum(one.numel() for one in handle.module.parameters())


class Odd(nn.Module):
    """Grouped, dilated, strided, reflecting convolutions, one called twice, and norms of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=2, dilation=2, padding_mode="reflect")
        self.b = nn.Conv2d(8, 8, 3, padding="same", groups=4, bias=False)
        self.c = nn.Conv2d(8, 8, (4, 1), stride=(2, 1), groups=8)
        self.norm, self.group, self.layer = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm((3, 8))
        self.fc = nn.Linear(8, 5)
        self.flat = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.b(self.a(x))).relu())
        x = self.group(self.c(x))
        x = self.layer(x[:, :, :, :3].mean(2).transpose(1, 2))  # [N, 3, 8]
        return self.flat(self.fc(x).mean(1))


def test_convolutions_and_norms_of_every_kind() -> None:
    torch.manual_seed(0)
    handle = tl.wrap(Odd().double().eval(), input_size=(3, 9, 9))
    inputs = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    names = chosen_parameters(handle, "all")
    with handle.borrow():
        gradients = SampleGradients(handle, names)
        gradients.verify(inputs, combinations)
        assert len(gradients.captured) == 8
        expected = looped(handle.module, names, inputs, gradients)
        torch.testing.assert_close(gradients.rows(inputs, combinations)[0], expected)
        calls, rest, logits = gradients.apart(inputs, combinations, rest=False)
        assert [one.piece.module for one in calls].count("b") == 2 and len(calls) == 5
        assert rest == {} and logits.shape == (4, 5)
        _, rest, _ = gradients.apart(inputs, combinations)
        assert set(rest) == {"norm", "group", "layer", "flat"}


class Tied(nn.Module):
    """A weight used once more beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.linear(self.a(x.flatten(1)).relu(), self.a.weight))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_weights_used_otherwise_are_noticed() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    tied = tl.wrap(Tied().double(), input_size=(3, 2, 2))
    standard = tl.wrap(
        nn.Sequential(Standardised(3, 4, 2), nn.Flatten(), nn.Linear(4, 5)).double(), input_size=(3, 2, 2)
    )
    for handle, captured in ((tied, {"a", "fc"}), (standard, {"2"})):
        names = chosen_parameters(handle, "all")
        with handle.borrow():
            gradients = SampleGradients(handle, names)
            assert gradients.captured == captured
            gradients.verify(inputs, combinations)
            assert gradients.captured == ({"2"} if handle is standard else set())
            expected = looped(handle.module, names, inputs, gradients)
            torch.testing.assert_close(gradients.rows(inputs, combinations)[0], expected)


def test_a_loss_that_is_no_sum_over_images_is_refused() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 5))
    handle = tl.wrap(module, input_size=(3, 2, 2))
    with handle.borrow(), pytest.raises(BadInput, match="its loss is no sum over images"):
        SampleGradients(handle, chosen_parameters(handle, "all")).verify(torch.randn(4, 3, 2, 2), combinations)


def test_parameters_by_layer() -> None:
    handle, _ = SPECIMENS["residual"]()
    everything = chosen_parameters(handle, "all")
    assert everything == tuple(name for name, _ in handle.module.named_parameters())
    assert chosen_parameters(handle, ["fc", "layer2.conv1"]) == ("layer2.conv1.weight", "fc.weight", "fc.bias")
    assert len(chosen_parameters(handle, "layer1")) == 7
    with pytest.raises(UnknownName, match=r"no layer 'layer3'; did you mean 'layer2', 'layer1'"):
        chosen_parameters(handle, ["layer3"])
    with pytest.raises(BadInput, match=r"layer 'relu', a ReLU, has no parameters"):
        chosen_parameters(handle, ["relu"])
    with pytest.raises(BadInput, match="layers names no layer"):
        chosen_parameters(handle, [])
    handle.module.layer1.requires_grad_(False)  # type: ignore[union-attr,operator]
    assert chosen_parameters(handle, "all") == tuple(name for name in everything if not name.startswith("layer1."))
    with pytest.raises(BadInput, match=r"the parameters of layer 'layer1' are frozen \(requires_grad=False\)"):
        chosen_parameters(handle, ["layer1"])
    handle.module.requires_grad_(False)
    assert chosen_parameters(handle, "all") == everything  # loaded to be looked at


class Mixed(nn.Module):
    """Tokens first, images second, as in `nn.Transformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.flatten(2).permute(2, 0, 1))  # [L, N, D]
        return self.fc(x.tanh().mean(0))


def test_images_in_another_place_than_first_are_noticed() -> None:
    torch.manual_seed(0)
    handle = tl.wrap(Mixed().double(), input_size=(3, 2, 2))
    inputs, names = torch.randn(4, 3, 2, 2, dtype=torch.float64), chosen_parameters(handle, "all")
    with handle.borrow():
        gradients = SampleGradients(handle, names)
        mixed = gradients.rows(inputs, combinations)[0]
        expected = looped(handle.module, names, inputs, gradients)
        torch.testing.assert_close(mixed.sum(0), expected.sum(0))  # the sum tells nothing
        assert (mixed - expected).norm() > 0.1 * expected.norm()
        gradients.verify(inputs, combinations)
        torch.testing.assert_close(gradients.rows(inputs, combinations)[0], expected)
