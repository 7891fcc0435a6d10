"""`tl.validate_influence`: what it measures, against trainings made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.methods.influence import validating
from torchloupe_core.methods.influence.spot_check import spearman
from torchloupe_core.specimens import SPECIMENS

N, T, DECAY = 60, 5, 0.01


def network(state: dict[str, Tensor] | None = None) -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    if state is not None:
        module.load_state_dict(state)
    return module


def fitted(inputs: Tensor, labels: Tensor, n: int) -> dict[str, Tensor]:
    """Softmax regression at the minimum of sum of losses / n + DECAY / 2 |parameters|^2."""
    parameters = [torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    for one in parameters:
        one.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(one.square().sum() for one in parameters) * DECAY / 2
        loss = F.cross_entropy(F.linear(inputs.flatten(1), *parameters), labels, reduction="sum") / n + penalty
        for one, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            one.grad = slope
        return loss

    optimizer.step(closure)
    return {"1.weight": parameters[0].detach(), "1.bias": parameters[1].detach()}


@pytest.fixture(scope="module")
def softmax() -> tuple[tl.Handle, TensorDataset, TensorDataset]:
    """Three overlapping classes, fitted to the end."""
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> TensorDataset:
        labels = torch.arange(n) % 3
        noise = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        return TensorDataset((F.one_hot(labels, 6) * 2.0 + noise).view(n, 1, 2, 3), labels)

    train = some(N)
    module = network(fitted(*train.tensors, N))
    return tl.wrap(module, input_size=(1, 2, 3)), train, some(T)


@pytest.fixture(scope="module")
def found(softmax: Any) -> tl.Validation:
    methods = ["exact", "gradient_dot", "feature_cosine"]
    return tl.validate_influence(*softmax, method=methods, weight_decay=DECAY, images=20, groups=9, subsets=8)


def test_changes_are_those_of_trainings_without_the_images(softmax: Any, found: tl.Validation) -> None:
    handle, train, test = softmax
    inputs, labels = train.tensors
    groups = validating.strong_groups(torch.zeros(3, T, N), 9, 3, 0)  # only how many there are counts here
    assert len(groups) == 9 and found.single_actual is not None and found.group_actual is not None
    exact = tl.influence(handle, train, test, method="exact", weight_decay=DECAY, check=0).scores.double()
    scores = torch.stack(
        [
            tl.influence(handle, train, test, method=name, weight_decay=DECAY, check=0).scores.double()
            for name in ("exact", "gradient_dot", "feature_cosine")
        ]
    )
    removed = validating.single_images(scores, 20, 0)
    with torch.no_grad():
        before = F.cross_entropy(handle.module(test.tensors[0]), test.tensors[1], reduction="none")
        for column, (row,) in enumerate(removed):
            kept = torch.arange(N) != row
            module = network(fitted_without(inputs, labels, kept))
            after = F.cross_entropy(module(test.tensors[0]), test.tensors[1], reduction="none")
            torch.testing.assert_close(found.single_actual[:, column].double(), after - before, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(found.single_predicted[0, :, column].double(), exact[:, row])
    expected = [spearman(a, b) for a, b in zip(found.single_predicted[0], found.single_actual, strict=True)]
    assert found.rows[0]["leave_one_out"] == pytest.approx(sum(expected) / T, abs=1e-6)


def fitted_without(inputs: Tensor, labels: Tensor, kept: Tensor) -> dict[str, Tensor]:
    with torch.enable_grad():
        return fitted(inputs[kept], labels[kept], N)


def test_exact_influence_foretells_them_and_other_scores_less(found: tl.Validation) -> None:
    exact, dot, cosine = found.rows[:3]
    assert exact["leave_one_out"] >= 0.90 and exact["leave_k_out"] >= 0.90 and exact["lds"] >= 0.85
    for check in ("leave_one_out", "leave_k_out", "lds"):
        assert cosine[check] < dot[check] < exact[check], check
    assert exact["removal"] > 0.1 and exact["removal"] > cosine["removal"]
    assert found.removal is not None and found.removal.shape == (4, 4)
    assert bool((found.removal[0].diff() > 0).all()) and found.removal[0, 0] > found.question


def test_wrong_labels_are_put_in_and_found(found: tl.Validation) -> None:
    assert found.wrong is not None and int(found.wrong.sum()) == 6 and found.suspicion is not None
    assert found.suspicious == (
        "exact",
        "gradient_dot",
        "feature_cosine",
        "loss",
        "margin",
        "self-influence",
        "neighbors",
    )
    rows = {row["method"]: row["precision"] for row in found.rows}
    assert min(rows["exact"], rows["loss"]) >= 0.5  # by chance .1
    for name, row in zip(found.suspicious, found.suspicion, strict=True):
        first = row.argsort(descending=True, stable=True)[:6]
        assert rows[name] == pytest.approx(found.wrong[first].double().mean().item())
        assert found.precision_at(6)[name] == pytest.approx(rows[name])


def test_flipped_labels_are_others() -> None:
    labels = torch.arange(50) % 4
    wrong, which = validating.flipped(labels, 4, 0.2, 0)
    assert int(which.sum()) == 10 and (wrong != labels).equal(which) and wrong.min() >= 0 and wrong.max() < 4


def test_subsets_are_of_the_share_asked_for() -> None:
    groups = validating.halves(50, 4, 0.7, 0)
    assert all(len(set(group)) == 15 and max(group) < 50 for group in groups) and groups[0] != groups[1]


def test_groups_are_the_most_helpful_the_most_harmful_and_drawn() -> None:
    scores = torch.stack([torch.arange(12.0).repeat(2, 1), -torch.arange(12.0).repeat(2, 1)])
    groups = validating.strong_groups(scores, 6, 3, 0)
    assert groups[0] == [9, 10, 11] and groups[1] == [0, 1, 2]
    assert groups[3] == [0, 1, 2] and groups[4] == [9, 10, 11]  # the other method
    assert groups[2] != groups[5]


def test_a_function_that_trains(softmax: Any) -> None:
    handle, train, test = softmax
    asked: list[tuple[int, int]] = []

    def fit(indices: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
        asked.append((len(indices), seed))
        assert labels.equal(train.tensors[1][indices])
        return fitted_without(train.tensors[0], train.tensors[1], torch.isin(torch.arange(N), indices))

    options: dict[str, Any] = {"weight_decay": DECAY, "images": 6, "checks": "leave_one_out", "seed": 3}
    whole = {"whole": {"method": "exact", "layers": "all"}}
    found = tl.validate_influence(handle, train, test, method=whole, fit=fit, seeds=2, **options)
    assert asked == [(N, 3), (N, 4), *[(N - 1, seed) for _ in range(6) for seed in (3, 4)]]
    assert found.trainings == 14 and found.names == ("whole",) and found.refits == "trainings anew"
    head = tl.validate_influence(handle, train, test, method="exact", **options)
    torch.testing.assert_close(found.single_actual, head.single_actual, atol=1e-6, rtol=1e-4)
    assert found.group_actual is None and found.wrong is None and found.removal is None


def test_wrong_labels_with_a_function_that_trains(softmax: Any) -> None:
    handle, train, test = softmax

    def fit(indices: Tensor, labels: Tensor, seed: int) -> nn.Module:
        return network(fitted(train.tensors[0][indices], labels, len(indices)))

    options: dict[str, Any] = {"weight_decay": DECAY, "checks": ["mislabelled"], "method": "exact"}
    found = tl.validate_influence(handle, train, test, fit=fit, **options)
    head = tl.validate_influence(handle, train, test, **options)
    assert found.wrong is not None and head.wrong is not None and found.wrong.equal(head.wrong)
    torch.testing.assert_close(found.suspicion, head.suspicion, atol=1e-4, rtol=1e-3)


def test_the_table_the_drawing_and_the_file(found: tl.Validation, tmp_path: Path) -> None:
    lines = found.table().splitlines()
    assert lines[0].split("  ")[-1] == "seconds" and len(lines) == 1 + 3 + 4
    assert lines[1].split()[:2] == ["exact", f"{found.rows[0]['leave_one_out']:.3f}"] and str(found) == found.table()
    assert lines[4].split()[0] == "loss" and lines[4].split()[1:4] == ["-", "-", "-"]
    figure = found.figure()
    assert len(figure.axes) == 5
    assert len(figure.axes[3].lines) == 7 + 2 and len(figure.axes[4].lines) == 4
    again = tl.open(found.save(tmp_path / "found"))
    assert isinstance(again, tl.Validation) and again.table() == found.table()
    assert len(again.figure().axes) == 5


def test_the_model_comes_back_as_it_was() -> None:
    handle, inputs = SPECIMENS["residual"]()
    generator = torch.Generator().manual_seed(0)
    train = TensorDataset(torch.randn(12, 3, 32, 32, generator=generator), torch.arange(12) % 5)
    handle.module.train()
    kept = Snapshot(handle.module, inputs)
    tl.validate_influence(handle, train, inputs, damping=0.1, images=3, groups=3, subsets=3)
    assert kept.differences() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "self"}, "'self' has no scores for test images"),
        ({"method": {"deep": {"method": "ekfac", "layers": "all"}}}, "'deep' asks about layers; give fit="),
        ({"method": []}, "method names no method"),
        ({"checks": "beauty"}, "checks are among leave_one_out, leave_k_out, lds, mislabelled, removal; got beauty"),
        ({"checks": []}, "got none"),
        ({"images": 2}, "images is at least 3; got 2"),
        ({"seeds": 0}, "seeds is at least 1; got 0"),
        ({"share": 1.0}, "share is a share of the training images, between 0 and 1; got 1.0"),
        ({"shares": [0.1, 2]}, "shares is a share"),
    ],
)
def test_what_is_refused(softmax: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tl.validate_influence(*softmax, **options)


def test_a_training_that_gives_nan_is_refused(softmax: Any) -> None:
    with pytest.raises(BadInput, match="trained on 60 images gives NaN"):
        broken = {"1.weight": torch.full((3, 6), torch.nan), "1.bias": torch.zeros(3)}
        tl.validate_influence(*softmax, method="exact", weight_decay=DECAY, fit=lambda *_: broken, checks="lds")


def test_a_head_without_a_minimum_is_refused() -> None:
    module = network()
    inputs = torch.eye(6, dtype=torch.float64).view(6, 1, 2, 3)
    train = TensorDataset(inputs, torch.arange(6) % 3)
    with pytest.raises(NotApplicable, match=r"found no minimum|singular"):
        handle = tl.wrap(module, input_size=(1, 2, 3))
        tl.validate_influence(handle, train, train, method="gradient_dot", damping=1e-14, checks="mislabelled")
