"""K-FAC and EK-FAC, against matrices written down and against what they equal exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_influence_network import Tiny, names_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl

DAMPING = 0.03


def some(n: int, size: tuple[int, int, int], outputs: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *size, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, outputs, (n,), generator=generator))


@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_linear_layer_with_squared_loss_is_a_product_exactly(method: str, layers: Any) -> None:
    """What comes back does not depend on what is read, so nothing is lost; weight decay included."""
    torch.manual_seed(0)
    handle = tl.wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double(), input_size=(3, 2, 2))
    train, test = some(30, (3, 2, 2), 4), some(3, (3, 2, 2), 4, seed=1)
    options: Any = {"loss": "squared", "weight_decay": 0.1, "damping": 0.02, "check": 0, "layers": layers}
    exact = tl.influence(handle, train, test, method="exact", **options)
    found = tl.influence(handle, train, test, method=method, fisher="exact", **options)
    torch.testing.assert_close(found.scores, exact.scores)
    assert found.diagnostics["damping"] == 0.02 and found.diagnostics["diagonal_parameters"] == 0


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_cross_entropy_where_the_curvature_is_the_same_for_all_images(method: str) -> None:
    """With weights of zero every probability is 1/K."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    handle = tl.wrap(module, input_size=(3, 2, 2))
    train, test = some(30, (3, 2, 2), 4), some(3, (3, 2, 2), 4, seed=1)
    options: Any = {"damping": DAMPING, "check": 0}
    exact = tl.influence(handle, train, test, method="exact", **options)
    found = tl.influence(handle, train, test, method=method, fisher="exact", **options)
    torch.testing.assert_close(found.scores, exact.scores)
    sampled = tl.influence(handle, train, test, method=method, samples=300, seed=1, **options)
    torch.testing.assert_close(sampled.scores, exact.scores, rtol=0.2, atol=0.03 * exact.scores.abs().max().item())
    again = tl.influence(handle, train, test, method=method, samples=300, seed=1, **options)
    assert torch.equal(again.scores, sampled.scores)


class Grouped(nn.Module):
    """Grouped convolution, one layer called twice, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.conv2, self.fc = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).tanh()
        return self.fc(self.fc(self.conv2(x).tanh().mean((2, 3))).tanh())


def rows_of(handle: tl.Handle, data: TensorDataset, wanted: Any) -> dict[str, Tensor]:
    """`[n, m, *shape]` for each parameter: gradients of combinations of logits, one after another."""
    tensors = dict(handle.module.named_parameters())
    found: dict[str, list[list[Tensor]]] = {name: [] for name in tensors}
    for image, label in data:
        logits = handle.module(image[None])
        combinations = wanted(logits.detach(), label[None])[0]
        each = [
            torch.autograd.grad((logits[0] * one).sum(), list(tensors.values()), retain_graph=True)
            for one in combinations
        ]
        for place, name in enumerate(tensors):
            found[name].append([one[place] for one in each])
    return {name: torch.stack([torch.stack(each) for each in rows]) for name, rows in found.items()}


def of_empirical(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1]))[:, None]


def of_exact(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.softmax(1)
    return (torch.diag_embed(p.sqrt()) - p[:, :, None] * p[:, None].sqrt()).transpose(1, 2)


@pytest.mark.parametrize(("fisher", "wanted"), [("empirical", of_empirical), ("exact", of_exact)])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("build", [Tiny, Grouped])
def test_every_block_against_dense_matrices(build: Any, corrected: bool, fisher: Any, wanted: Any) -> None:
    torch.manual_seed(0)
    module = build().double().eval()
    handle = tl.wrap(module, input_size=(1, 6, 6))
    train, test = some(20, (1, 6, 6), 4), some(3, (1, 6, 6), 4, seed=1)
    method = "ekfac" if corrected else "kfac"
    found = tl.influence(handle, train, test, layers="all", method=method, fisher=fisher, damping=DAMPING)
    moments = rows_of(handle, train, wanted)
    ours, theirs = (rows_of(handle, data, of_empirical) for data in (test, train))
    expected = torch.zeros(3, 20, dtype=torch.float64)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in names_of(handle, "all")):
        part = handle.module.get_submodule(layer)
        names = [f"{layer}.{one}" for one, _ in part.named_parameters()]
        if isinstance(part, nn.BatchNorm2d):
            for name in names:
                diagonal = moments[name].square().sum(1).mean(0)
                expected += (
                    torch.einsum("tc,c,nc->tn", ours[name][:, 0], 1 / (diagonal + DAMPING), theirs[name][:, 0]) / 20
                )
            continue
        groups = part.groups if isinstance(part, nn.Conv2d) else 1
        for group in range(groups):
            blocks = [matrix_rows(rows, names, group, groups) for rows in (moments, ours, theirs)]  # [n, m, O, I]
            reading, back = factors(handle, part, train, wanted, group, groups)
            _, of_reading = torch.linalg.eigh(reading)
            _, of_back = torch.linalg.eigh(back)
            basis = torch.kron(of_back, of_reading)
            if corrected:
                turned = blocks[0].flatten(2) @ basis
                dense = basis @ torch.diag(turned.square().sum(1).mean(0)) @ basis.T
            else:
                dense = torch.kron(back, reading)
            dense += DAMPING * torch.eye(len(dense), dtype=dense.dtype)
            mine, training = blocks[1][:, 0].flatten(1), blocks[2][:, 0].flatten(1)
            expected += mine @ torch.linalg.solve(dense, training.T) / 20
    torch.testing.assert_close(found.scores, expected)


def matrix_rows(rows: dict[str, Tensor], names: list[str], group: int, groups: int) -> Tensor:
    """`[n, m, O, I]`: weights and bias of one group."""
    weight = rows[names[0]].flatten(3)
    whole = torch.cat([weight, rows[names[1]][..., None]], -1) if len(names) == 2 else weight
    return whole.chunk(groups, 2)[group]


def factors(
    handle: tl.Handle, part: nn.Module, data: TensorDataset, wanted: Any, group: int, groups: int
) -> tuple[Tensor, Tensor]:
    """The two second moments of one group, image by image and position by position."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = part.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
    reading: Any = 0
    back: Any = 0
    for image, label in data:
        seen.clear()
        logits = handle.module(image[None])
        combinations = wanted(logits.detach(), label[None])[0]
        for place, (given, output) in enumerate(seen):
            if isinstance(part, nn.Conv2d):
                patches = F.unfold(given, part.kernel_size, padding=part.padding, stride=part.stride)[0].chunk(groups)[
                    group
                ]  # type: ignore[arg-type]
            else:
                patches = given[0][:, None]
            patches = patches.detach()
            if part.bias is not None:
                patches = torch.cat([patches, torch.ones(1, patches.shape[1])])
            for position in range(patches.shape[1]):
                reading = reading + torch.outer(patches[:, position], patches[:, position])
            for one in combinations:
                (got,) = torch.autograd.grad((logits[0] * one).sum(), output, retain_graph=True)
                columns = got[0].flatten(1).chunk(groups)[group] if isinstance(part, nn.Conv2d) else got[0][:, None]
                for position in range(columns.shape[1]):
                    back = back + torch.outer(columns[:, position], columns[:, position]) / columns.shape[1]
            assert place < 2
    hook.remove()
    return reading / len(data), back / len(data)


def test_damping_of_its_own_where_none_is_given() -> None:
    torch.manual_seed(0)
    handle = tl.wrap(Tiny().double().eval(), input_size=(1, 6, 6))
    train, test = some(20, (1, 6, 6), 4), some(3, (1, 6, 6), 4, seed=1)
    found = tl.influence(handle, train, test, layers="all", method="ekfac")
    assert found.diagnostics["damping_chosen"] and found.diagnostics["damping"] > 0
    again = tl.influence(handle, train, test, layers="all", method="ekfac", damping=found.diagnostics["damping"])
    torch.testing.assert_close(again.scores, found.scores)
    with pytest.raises(tl.errors.NotApplicable, match="the Hessian is singular"):
        tl.influence(handle, train, test, layers=["fc"], method="ekfac", fisher="exact", damping=0.0)


def test_options_that_mean_nothing() -> None:
    handle = tl.wrap(Tiny().double().eval(), input_size=(1, 6, 6))
    train = some(4, (1, 6, 6), 4)
    for options, message in (
        ({"fisher": "true"}, 'fisher is "sampled", "exact"'),
        ({"samples": 0}, "samples is at least 1"),
    ):
        with pytest.raises(tl.errors.BadInput, match=message):
            tl.influence(handle, train, train, method="ekfac", **options)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_several_models_are_averaged_over(method: str) -> None:
    handles = []
    for seed in range(3):
        torch.manual_seed(seed)
        handles.append(tl.wrap(Tiny().double().eval(), input_size=(1, 6, 6)))
    train, test = some(20, (1, 6, 6), 4), some(3, (1, 6, 6), 4, seed=1)
    options: Any = {"method": method, "layers": "all", "damping": DAMPING, "check": 0}
    found = tl.influence(handles[0], train, test, checkpoints=[handles[1].module, handles[2].module], **options)
    alone = [tl.influence(handle, train, test, **options).scores for handle in handles[1:]]
    torch.testing.assert_close(found.scores, (alone[0] + alone[1]) / 2)
    assert found.diagnostics["models"] == 2 and found.diagnostics["damping"] == pytest.approx(DAMPING)
    assert found.units.endswith("the mean over 2 models")
