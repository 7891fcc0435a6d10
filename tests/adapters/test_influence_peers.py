"""kronfluence and dattri, against the native methods where they are the same."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import torch
from test_captum_influence import SIZE, some, tiny
from torch import nn

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot

OF_DATTRI = ("arnoldi", "cg", "datainf", "explicit", "tracin", "trak")


def asked(method: str, **options: Any) -> tl.Influence:
    handle = tl.wrap(options.pop("module", None) or tiny(), input_size=SIZE)
    return tl.influence(handle, some(20), some(3, seed=1), method=method, check=0, **{"layers": "all", **options})


# -- kronfluence ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kronfluence() -> None:
    pytest.importorskip("kronfluence")


@pytest.mark.parametrize("layers", ["all", ["conv2", "fc"], None])
@pytest.mark.parametrize("target", [None, "margin:1"])
def test_ekfac_with_the_empirical_fisher_is_the_native_one(kronfluence: None, layers: Any, target: Any) -> None:
    options: Any = {"layers": layers, "target": target, "damping": 0.02, "weight_decay": 0.01}
    found = asked("kronfluence.ekfac", empirical=True, **options)
    native = asked("ekfac", fisher="empirical", **{**options, "layers": layers or ["fc"]})
    torch.testing.assert_close(found.scores, native.scores, rtol=1e-4, atol=1e-6)
    assert found.backend == "kronfluence" and found.diagnostics["damping"] == pytest.approx(0.02)
    assert found.layers == native.layers and found.diagnostics["left_out"] == []


def test_ekfac_with_drawn_labels_comes_near(kronfluence: None) -> None:
    found, native = asked("kronfluence.ekfac", damping=0.1), asked("ekfac", fisher="exact", damping=0.1)
    assert torch.corrcoef(torch.stack([found.scores.flatten(), native.scores.flatten()]))[0, 1] > 0.95
    assert asked("kronfluence.ekfac", damping=0.1).scores.equal(found.scores)  # by the seed
    assert not asked("kronfluence.ekfac", damping=0.1, seed=1).scores.equal(found.scores)


def test_what_kronfluence_leaves_out_is_said_and_what_it_cannot_do_refused(kronfluence: None) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).double()
    found = asked("kronfluence.ekfac", module=module)
    assert found.diagnostics["left_out"] == ["1"] and found.diagnostics["damping_chosen"]
    with pytest.raises(tl.errors.NotApplicable, match="none is asked about"):
        asked("kronfluence.ekfac", module=module, layers=["1"])
    with pytest.raises(tl.errors.NotApplicable, match="give empirical=True"):
        asked("kronfluence.ekfac", loss="squared")
    with pytest.raises(tl.errors.BadInput, match="one weight_decay for all"):
        asked("kronfluence.ekfac", weight_decay={"fc.weight": 0.1})
    with pytest.raises(tl.errors.BadInput, match="batch is at least 1"):
        asked("kronfluence.ekfac", batch=0)


# -- dattri -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dattri() -> None:
    pytest.importorskip("dattri")


@pytest.mark.parametrize("layers", ["all", ["conv2", "fc"], None])
@pytest.mark.parametrize("target", [None, "margin:1"])
def test_the_explicit_hessian_in_our_units(dattri: None, layers: Any, target: Any) -> None:
    options: Any = {"layers": layers, "target": target, "weight_decay": 0.5, "damping": 0.5}
    found = asked("dattri.explicit", **options)
    native = asked("exact", curvature="hessian", **{**options, "layers": layers or ["fc"]})
    torch.testing.assert_close(found.scores, native.scores, rtol=1e-4, atol=1e-6)
    assert found.backend == "dattri"


@pytest.mark.parametrize(("method", "options"), [("cg", {"max_iter": 16}), ("arnoldi", {"proj_dim": 9, "max_iter": 9})])
def test_solvers_come_to_the_inverse(dattri: None, method: str, options: Any) -> None:
    native = asked("exact", layers=["fc"], damping=0.05)
    found = asked(f"dattri.{method}", layers=["fc"], damping=0.05, **options)
    assert torch.corrcoef(torch.stack([found.scores.flatten(), native.scores.flatten()]))[0, 1] > 0.99
    assert found.scores.norm() == pytest.approx(native.scores.norm().item(), rel=0.1)


def test_more_directions_than_there_are_are_no_scores(dattri: None) -> None:
    with pytest.raises(tl.errors.BadInput, match="gives NaN or infinity: the curvature has fewer directions"):
        asked("dattri.arnoldi", layers=["fc"], damping=0.05, proj_dim=16, max_iter=16)


def test_datainf_is_the_mean_of_inverses(dattri: None) -> None:
    found = asked("dattri.datainf", layers=["conv2", "fc"], damping=0.3)
    module = tiny()
    parts = [[*module.conv2.parameters()], [*module.fc.parameters()]]  # type: ignore[operator, union-attr]

    def gradients(data: Any) -> list[torch.Tensor]:
        rows: list[list[torch.Tensor]] = [[], []]
        for image, label in data:
            loss = nn.functional.cross_entropy(module(image[None]), label[None])
            for row, part in zip(rows, parts, strict=True):
                row.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss, part, retain_graph=True)]))
        return [torch.stack(row) for row in rows]

    expected: Any = 0
    for train, test in zip(gradients(some(20)), gradients(some(3, seed=1)), strict=True):
        inverse = sum(
            torch.linalg.inv(0.3 * torch.eye(len(one), dtype=one.dtype) + torch.outer(one, one)) for one in train
        )
        expected = expected + test @ (inverse / 20) @ train.T / 20
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(tl.errors.BadInput, match="divides by what is added"):
        asked("dattri.datainf", damping=0.0)


def test_tracin_is_the_native_one(dattri: None) -> None:
    options: Any = {"checkpoints": [tiny(1), tiny(2).state_dict()], "rates": [0.1, 0.3]}
    torch.testing.assert_close(
        asked("dattri.tracin", **options).scores, asked("tracin", **options).scores, rtol=1e-4, atol=1e-7
    )


def test_trak_is_the_native_one_where_neither_projects(dattri: None) -> None:
    """With as many dimensions as parameters a projection is nearly a rotation, which changes nothing."""
    native = asked("trak", dims=10_000, layers=["fc"], damping=0.05)
    found = asked("dattri.trak", dims=4_000, layers=["fc"], damping=0.05)
    assert torch.corrcoef(torch.stack([found.scores.flatten(), native.scores.flatten()]))[0, 1] > 0.99
    assert found.scores.norm() == pytest.approx(native.scores.norm().item(), rel=0.1)


def test_dattri_keeps_no_graph(dattri: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold all tests with all training images at once: 17 GB for 200, 1,500 and 14,000 parameters."""
    from dattri.algorithm.influence_function import IFAttributorDataInf

    original, graphs = IFAttributorDataInf.transform_test_rep, []

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        found: torch.Tensor = original(*given, **named)
        graphs.append(found.requires_grad)
        return found

    monkeypatch.setattr(IFAttributorDataInf, "transform_test_rep", noted)
    asked("dattri.datainf", layers=["fc"], damping=0.05)
    assert graphs and not any(graphs)


def test_what_dattri_is_not_asked(dattri: None) -> None:
    many = {"checkpoints": [tiny(1)], "target": "logit:1"}
    with pytest.raises(tl.errors.NotApplicable, match=r"'dattri\.tracin' asks about the loss"):
        asked("dattri.tracin", **many)
    with pytest.raises(tl.errors.NotApplicable, match=r"'dattri\.trak' asks about the loss"):
        asked("dattri.trak", target="logit:1")
    with pytest.raises(tl.errors.NotApplicable, match="the target reads layer 'conv2'"):
        asked("dattri.explicit", target="conv2:1")


@pytest.mark.parametrize(
    "method",
    [f"dattri.{one}" for one in ("arnoldi", "cg", "datainf", "explicit", "tracin", "trak")] + ["kronfluence.ekfac"],
)
def test_the_users_model_is_left_alone_and_nothing_is_printed(method: str) -> None:
    pytest.importorskip(method.split(".")[0])
    module = tiny().train()
    options: Any = {"checkpoints": [tiny(1)]} if method == "dattri.tracin" else {"damping": 0.5}
    if method == "dattri.arnoldi":  # with more directions than the curvature has, rounding decides whether it answers
        options |= {"proj_dim": 4, "max_iter": 4}
    kept, said = Snapshot(module), io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        tl.influence(tl.wrap(module, input_size=SIZE), some(8), some(2, seed=1), method=method, check=0, **options)
    assert kept.differences() == [] and said.getvalue() == ""
