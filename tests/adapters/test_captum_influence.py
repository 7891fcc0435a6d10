"""Captum's influence methods, against the native ones where they are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot

SIZE = (1, 6, 6)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 3, 3, 2, 1), nn.Conv2d(3, 3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).tanh()).tanh().mean((2, 3)))


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Tiny().double().eval()


def some(n: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *SIZE, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, 4, (n,), generator=generator))


def asked(method: str, **options: Any) -> tl.Influence:
    handle = tl.wrap(tiny(), input_size=SIZE)
    return tl.influence(handle, some(20), some(3, seed=1), method=method, check=0, **options)


@pytest.mark.parametrize("layers", ["all", ["conv2", "fc"], None])
@pytest.mark.parametrize("target", [None, "logit:1"])
def test_the_explicit_hessian_in_our_units(layers: Any, target: Any) -> None:
    """With the summed loss's units mistaken for the mean's the scores would be others."""
    options: Any = {"layers": layers, "target": target, "weight_decay": 0.5, "damping": 0.5}
    found = asked("captum.naive", **options)
    native = asked("exact", curvature="hessian", **options)
    torch.testing.assert_close(found.scores, native.scores, rtol=1e-6, atol=1e-9)
    assert found.backend == "captum" and found.diagnostics["hessian_reg"] == pytest.approx(20)


def test_arnoldi_with_all_directions_is_the_inverse() -> None:
    options: Any = {"layers": None, "weight_decay": 0.2, "damping": 0.0}
    found = asked("captum.arnoldi", projection_dim=16, arnoldi_dim=16, arnoldi_tol=1e-9, **options)
    native = asked("exact", **options)
    assert torch.corrcoef(torch.stack([found.scores.flatten(), native.scores.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("layers", ["all", None])
def test_tracin_is_the_native_one(layers: Any) -> None:
    options: Any = {"layers": layers, "checkpoints": [tiny(1), tiny(2).state_dict()], "rates": [0.1, 0.3]}
    native = asked("tracin", **options)
    torch.testing.assert_close(asked("captum.tracin", **options).scores, native.scores)


def test_tracin_fast_is_of_the_heads_weights_without_its_bias() -> None:
    modules, rates = [tiny(1), tiny(2)], [0.1, 0.3]
    found = asked("captum.tracin_fast", checkpoints=modules, rates=rates)
    expected: Any = 0
    for module, rate in zip(modules, rates, strict=True):
        sides = []
        for data in (some(3, seed=1), some(20)):
            read = module.conv2(module.conv1(data.tensors[0]).tanh()).tanh().mean((2, 3)).detach()  # type: ignore[operator]
            error = module(data.tensors[0]).softmax(1).detach() - nn.functional.one_hot(data.tensors[1], 4)
            sides.append((read, error))
        (ours, our_error), (theirs, their_error) = sides
        expected = expected + rate * (ours @ theirs.T) * (our_error @ their_error.T) / 20
    torch.testing.assert_close(found.scores, expected)


def test_what_captum_cannot_be_asked() -> None:
    many = {"checkpoints": [tiny(1)], "layers": "all"}
    for method, options, error, message in (
        (
            "captum.naive",
            {"layers": "all", "target": "conv2:1"},
            tl.errors.NotApplicable,
            "the target reads layer 'conv2'",
        ),
        ("captum.naive", {"weight_decay": {"fc.weight": 0.1}}, tl.errors.BadInput, "one weight_decay for all"),
        ("captum.tracin", {}, tl.errors.BadInput, "tracin goes along a training"),
        ("captum.tracin_fast", many, tl.errors.NotApplicable, "goes through one linear layer, the last"),
    ):
        with pytest.raises(error, match=message):
            asked(method, **options)


@pytest.mark.parametrize("method", ["naive", "arnoldi", "tracin", "tracin_fast"])
def test_the_users_model_is_left_alone(method: str) -> None:
    module = tiny().train()
    options: Any = {"checkpoints": [tiny(1)]} if "tracin" in method else {"damping": 0.5}
    kept = Snapshot(module)
    tl.influence(
        tl.wrap(module, input_size=SIZE), some(8), some(2, seed=1), method=f"captum.{method}", check=0, **options
    )
    assert kept.differences() == []
