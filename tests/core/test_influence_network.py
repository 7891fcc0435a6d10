"""Influence through whole networks, against explicit Jacobians and Hessians of tiny ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core.methods.influence import network
from torchloupe_core.methods.influence.pieces import chosen_parameters
from torchloupe_core.methods.influence.sample_gradients import SampleGradients
from torchloupe_core.targets import parse

SIZE = (1, 6, 6)
DAMPING = 0.02


class Tiny(nn.Module):
    """Two convolutions, batch normalisation and a head: 150 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.fc = nn.Conv2d(4, 3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).tanh()
        return self.fc(self.conv2(x).tanh().mean((2, 3)))


@pytest.fixture(scope="module")
def tiny() -> tuple[tl.Handle, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    module = Tiny().double().eval()
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> TensorDataset:
        inputs = torch.randn(n, *SIZE, generator=generator, dtype=torch.float64)
        return TensorDataset(inputs, torch.randint(0, 4, (n,), generator=generator))

    return tl.wrap(module, input_size=SIZE), some(30), some(4)


def names_of(handle: tl.Handle, layers: Any) -> list[str]:
    return [name for name, _ in handle.module.named_parameters() if layers == "all" or name.split(".")[0] in layers]


def jacobians(handle: tl.Handle, names: list[str], of: Any, inputs: Tensor) -> Tensor:
    """`[N, ..., P]` of a function of the logits, parameters in the model's order."""
    tensors = [handle.module.get_parameter(name).detach() for name in names]

    def call(*parameters: Tensor) -> Tensor:
        return of(torch.func.functional_call(handle.module, dict(zip(names, parameters, strict=True)), (inputs,)))

    found = torch.autograd.functional.jacobian(call, tuple(tensors))
    lead = found[0].ndim - tensors[0].ndim
    return torch.cat([one.flatten(lead) for one in found], -1)


def expected(handle: tl.Handle, layers: Any, train: Any, test: Any, curvature: str, damping: float = DAMPING) -> Tensor:
    names = names_of(handle, layers)
    inputs, labels = train.tensors
    with torch.no_grad():
        logits = handle.module(inputs)
    whole = jacobians(handle, names, lambda z: z, inputs)  # [n, K, P]
    p = logits.softmax(1)
    w = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("nkp,nkl,nlq->pq", whole, w, whole) / len(inputs)
    if curvature == "hessian":
        tensors = {name: handle.module.get_parameter(name).detach() for name in names}
        sizes = [one.numel() for one in tensors.values()]

        def loss(theta: Tensor) -> Tensor:
            parts = {n: p.view_as(t) for (n, t), p in zip(tensors.items(), torch.split(theta, sizes), strict=True)}
            return F.cross_entropy(torch.func.functional_call(handle.module, parts, (inputs,)), labels)

        matrix = torch.autograd.functional.hessian(loss, torch.cat([one.flatten() for one in tensors.values()]))
    matrix += damping * torch.eye(len(matrix), dtype=matrix.dtype)
    ours = jacobians(handle, names, lambda z: F.cross_entropy(z, test.tensors[1], reduction="none"), test.tensors[0])
    theirs = jacobians(handle, names, lambda z: F.cross_entropy(z, labels, reduction="none"), inputs)
    return ours @ torch.linalg.solve(matrix, theirs.T) / len(inputs)


def asked(tiny: Any, **options: Any) -> tl.Influence:
    handle, train, test = tiny
    return tl.influence(handle, train, test, **{"layers": "all", "damping": DAMPING, "check": 0, **options})


@pytest.mark.parametrize("layers", ["all", ["conv1", "fc"], ["norm"]])
@pytest.mark.parametrize(("curvature", "damping"), [("gauss_newton", 0.02), ("hessian", 1.0)])
def test_the_formula_through_any_layers(tiny: Any, layers: Any, curvature: Any, damping: float) -> None:
    truth = expected(*tiny[:1], layers, *tiny[1:], curvature, damping)
    for method, options in (("exact", {}), ("cg", {"tolerance": 1e-10}), ("lissa", {"tolerance": 1e-9})):
        found = asked(tiny, method=method, layers=layers, curvature=curvature, damping=damping, **options)
        torch.testing.assert_close(found.scores, truth, rtol=1e-5, atol=1e-8)
        assert found.parameters == sum(tiny[0].module.get_parameter(n).numel() for n in names_of(tiny[0], layers))


def test_the_hessian_of_a_network_is_indefinite_and_that_is_said(tiny: Any) -> None:
    for method in ("exact", "cg", "lissa"):
        with pytest.raises(tl.errors.NotApplicable, match=r"the Hessian is indefinite.*damping above 0\.\d"):
            asked(tiny, method=method, curvature="hessian", damping=1e-4)


def test_memory_bounds_change_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = expected(*tiny[:1], "all", *tiny[1:], "gauss_newton")
    monkeypatch.setattr("torchloupe_core.methods.influence.functions.LARGEST_EXPLICIT", 1)
    for memory in (1e-5, 1e-3):  # one image at a time, read anew for each product; or a few
        found = asked(tiny, memory=memory, tolerance=1e-9)
        torch.testing.assert_close(found.scores, truth, rtol=1e-5, atol=1e-8)
    monkeypatch.setattr(network.NetworkProblem, "_by_rows", lambda self, vectors: False)
    found = asked(tiny, memory=1e-3, tolerance=1e-9)
    torch.testing.assert_close(found.scores, truth, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("target", ["logit:2", "prob:1-logit:0", "conv2:1", "logit:1+0.5*conv2:2@0,0"])
def test_targets_at_the_output_and_inside(tiny: Any, target: str) -> None:
    handle, train, test = tiny
    names = names_of(handle, "all")
    found = asked(tiny, method="gradient_dot", target=target)
    theirs = jacobians(
        handle, names, lambda z: F.cross_entropy(z, train.tensors[1], reduction="none"), train.tensors[0]
    )
    rows = []
    tensors = [handle.module.get_parameter(name) for name in names]
    with handle.borrow(), torch.enable_grad():
        for one in tensors:
            one.requires_grad_(True)
        for image in test.tensors[0]:
            value = handle.read(image[None], handle.bind(parse(target), image[None]))[0]
            got = torch.autograd.grad(value, tensors, allow_unused=True)
            rows.append(
                torch.cat(
                    [torch.zeros(t.numel()) if g is None else g.flatten() for g, t in zip(got, tensors, strict=True)]
                )
            )
    torch.testing.assert_close(found.scores, -torch.stack(rows) @ theirs.T / 30)
    assert found.sign.endswith("removing it lowers the target")


def test_self_influence_through_all_layers(tiny: Any) -> None:
    handle, train, _ = tiny
    found = asked(tiny, method="self")
    truth = expected(handle, "all", train, train, "gauss_newton").diagonal()
    torch.testing.assert_close(found.scores[0], truth, rtol=1e-6, atol=1e-10)
    norms = asked(tiny, method="self", with_curvature=False)
    alone = tl.influence(handle, train, train, layers="all", method="gradient_dot", check=0).scores.diagonal()
    torch.testing.assert_close(norms.scores[0], alone)


def test_the_head_by_name_is_the_head(tiny: Any) -> None:
    by_name = asked(tiny, layers=["fc"], method="exact")
    alone = asked(tiny, layers=None, method="exact")
    torch.testing.assert_close(by_name.scores, alone.scores)
    for name in ("gradient_norm", "typical_gradient_norm", "stationary", "damping"):
        assert by_name.diagnostics[name] == pytest.approx(alone.diagnostics[name]), name
    chosen = [asked(tiny, layers=one, damping=None).diagnostics["damping"] for one in (None, ["fc"])]
    assert chosen[0] == pytest.approx(chosen[1])


def test_a_weight_decay_by_parameter(tiny: Any) -> None:
    handle, train, test = tiny
    found = asked(tiny, method="exact", weight_decay={"conv2.weight": 0.5}, damping=1e-3)
    with handle.borrow():
        gradients = SampleGradients(handle, chosen_parameters(handle, "all"))
        spread = gradients.spread(lambda name: 0.5 if name == "conv2.weight" else 0.0)
        back = gradients.unpacked(spread)
    assert {name for name, one in back.items() if one.any()} == {"conv2.weight"} and back["conv2.weight"].min() == 0.5
    names = names_of(handle, "all")
    logits = handle.module(train.tensors[0]).detach()
    whole = jacobians(handle, names, lambda z: z, train.tensors[0])
    p = logits.softmax(1)
    matrix = torch.einsum("nkp,nkl,nlq->pq", whole, torch.diag_embed(p) - p[:, :, None] * p[:, None], whole) / 30
    added = [
        torch.full((handle.module.get_parameter(n).numel(),), 0.501 if n == "conv2.weight" else 1e-3) for n in names
    ]
    matrix += torch.diag(torch.cat(added).double())
    ours = jacobians(handle, names, lambda z: F.cross_entropy(z, test.tensors[1], reduction="none"), test.tensors[0])
    theirs = jacobians(
        handle, names, lambda z: F.cross_entropy(z, train.tensors[1], reduction="none"), train.tensors[0]
    )
    torch.testing.assert_close(found.scores, ours @ torch.linalg.solve(matrix, theirs.T) / 30, rtol=1e-5, atol=1e-8)


def test_frozen_heads_are_refused(tiny: Any) -> None:
    handle, train, test = tiny
    handle.module.fc.requires_grad_(False)
    try:
        for layers in (None, ["fc"]):
            with pytest.raises(tl.errors.BadInput, match=r"'fc' are frozen \(requires_grad=False\)"):
                tl.influence(handle, train, test, layers=layers)
        found = tl.influence(handle, train, test, layers="all", method="gradient_dot")
        assert found.layers == ("conv1", "norm", "conv2")
    finally:
        handle.module.requires_grad_(True)
