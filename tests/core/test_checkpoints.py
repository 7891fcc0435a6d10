"""TracIn and TRAK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_influence_network import SIZE, Tiny, jacobians, names_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.methods.influence.checkpoints import Projection


def some(n: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *SIZE, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, 4, (n,), generator=generator))


def tiny(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Tiny().double().eval()


def losses(data: TensorDataset) -> Any:
    return lambda logits: F.cross_entropy(logits, data.tensors[1], reduction="none")


@pytest.mark.parametrize("layers", ["all", None])
def test_tracin_sums_over_checkpoints_of_every_kind(layers: Any, tmp_path: Path) -> None:
    train, test = some(12), some(3, seed=1)
    modules = [tiny(seed) for seed in (1, 2, 3)]
    torch.save(modules[1].state_dict(), tmp_path / "two.pt")
    checkpoints = [modules[0], tmp_path / "two.pt", modules[2].state_dict()]
    handle = tl.wrap(tiny(0), input_size=SIZE)
    kept = Snapshot(handle.module)
    found = tl.influence(
        handle, train, test, layers=layers, method="tracin", checkpoints=checkpoints, rates=[0.1, 0.2, 0.3], check=0
    )
    assert kept.differences() == []
    expected: Any = 0
    for module, rate in zip(modules, (0.1, 0.2, 0.3), strict=True):
        there = tl.wrap(module, input_size=SIZE)
        names = names_of(there, layers or ["fc"])
        ours, theirs = (jacobians(there, names, losses(data), data.tensors[0]) for data in (test, train))
        expected = expected + rate * ours @ theirs.T / 12
    torch.testing.assert_close(found.scores, expected)
    assert found.options["checkpoints"] == ["Tiny", str(tmp_path / "two.pt"), "state dict"]
    assert found.diagnostics["rates"] == [0.1, 0.2, 0.3]


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    handle, train = tl.wrap(tiny(0), input_size=SIZE), some(4)
    state = tiny(1).state_dict()
    del state["fc.bias"]
    for options, message in (
        ({}, r"give checkpoints=\[\.\.\.\], or take method='gradient_dot'"),
        ({"checkpoints": [tmp_path / "none.pt"]}, "no such checkpoint"),
        ({"checkpoints": [state]}, "the state dict does not fit this Tiny:\n  missing: fc.bias"),
        ({"checkpoints": [3]}, "a checkpoint is a file, a state dict, a module or a Handle; got int"),
        ({"checkpoints": [tiny(1)], "rates": [1.0, 2.0]}, "one for each of 1 checkpoints"),
        ({"checkpoints": [tiny(1)], "rates": -1.0}, "rates are numbers of at least 0"),
    ):
        with pytest.raises(tl.errors.BadInput, match=message):
            tl.influence(handle, train, train, method="tracin", **options)


def margins(data: TensorDataset) -> Any:
    """log(p / (1 - p)) of the label."""

    def of(logits: Tensor) -> Tensor:
        p = logits.softmax(1).gather(1, data.tensors[1][:, None])[:, 0]
        return p.log() - (1 - p).log()

    return of


def test_trak_without_a_projection_is_its_formula() -> None:
    """Equation 13 and 17 of the paper, with all parameters in place of a projection."""
    train, test = some(300), some(3, seed=1)
    modules = [tiny(1), tiny(2)]
    handle = tl.wrap(tiny(0), input_size=SIZE)
    found = tl.influence(
        handle, train, test, layers=["fc"], method="trak", dims=10_000, checkpoints=modules, target=None, check=0
    )
    kernels: Any = 0
    doubts: Any = 0
    for module in modules:
        there = tl.wrap(module, input_size=SIZE)
        features = jacobians(there, names_of(there, ["fc"]), margins(train), train.tensors[0])
        ours = jacobians(there, names_of(there, ["fc"]), losses(test), test.tensors[0])
        gram = features.T @ features
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        kernels = kernels - ours @ torch.linalg.solve(gram, features.T) / 2
        p = module(train.tensors[0]).softmax(1).gather(1, train.tensors[1][:, None])[:, 0].detach()
        doubts = doubts + (1 - p) / 2
    torch.testing.assert_close(found.scores, kernels * doubts)
    assert found.diagnostics == {**found.diagnostics, "dims": 16, "models": 2}


def test_a_projection_keeps_lengths_and_angles() -> None:
    rows = torch.randn(6, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1] += rows[0]
    projection = Projection(20_000, 2_000, rows, seed=0)
    found = projection(rows)
    assert found.shape == (6, 2_000)
    exact, projected = rows @ rows.T, found @ found.T
    assert (projected - exact).abs().max() < 0.15 * exact.diagonal().max()
    assert F.cosine_similarity(found[0], found[1], dim=0).item() == pytest.approx(0.5**0.5, abs=0.1)
    assert not torch.equal(Projection(20_000, 2_000, rows, seed=1)(rows), found)
    assert Projection(20_000, 20_000, rows, seed=0)(rows) is rows


def test_trak_is_of_the_sign_of_support_and_refuses_other_losses() -> None:
    handle, train = tl.wrap(tiny(0), input_size=SIZE), some(60)
    found = tl.influence(handle, train, train, layers="all", method="trak", dims=40, check=0)
    assert (found.scores.diagonal() > 0).all()  # an image supports itself
    for options, error, message in (
        ({"loss": "squared"}, tl.errors.NotApplicable, "trak is made for the cross-entropy"),
        ({"dims": 0}, tl.errors.BadInput, "dims is at least 1"),
    ):
        with pytest.raises(error, match=message):
            tl.influence(handle, train, train, method="trak", **options)
