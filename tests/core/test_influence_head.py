"""Influence through a linear head: against closed forms, plain loops and models trained again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_adapters.sklearn import digits
from torchloupe_core.methods.spot_check import ranks, spearman

SIZE = (1, 3, 4)
DECAY = 0.01


def linear(outputs: int, size: tuple[int, int, int] = SIZE, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    inputs = size[0] * size[1] * size[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, bias=bias)).double()


def some(n: int, outputs: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *SIZE, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, outputs, (n,), generator=generator))


def fitted(module: nn.Module, objective: Any) -> nn.Module:
    """Newton's method with the Hessian of autograd."""
    theta = nn.utils.parameters_to_vector(module.parameters()).detach()
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(objective, theta)
        theta = theta - torch.linalg.solve(torch.autograd.functional.hessian(objective, theta), gradient)
        if gradient.norm() < 1e-13:
            break
    nn.utils.vector_to_parameters(theta, module.parameters())
    return module


def objective_of(data: TensorDataset, loss: Any, decay: float, outputs: int, left_out: tuple[int, ...] = ()) -> Any:
    """Mean loss over all n images, without those left out, + decay / 2 x |parameters|^2, as a function of a vector."""
    inputs, labels = data.tensors[0].flatten(1), data.tensors[1]
    kept = torch.ones(len(inputs), dtype=torch.float64)
    kept[list(left_out)] = 0

    def objective(theta: Tensor) -> Tensor:
        weight, bias = theta[:-outputs].view(outputs, -1), theta[-outputs:]
        values = loss(inputs @ weight.T + bias, labels)
        return (values * kept).sum() / len(inputs) + decay / 2 * theta.square().sum()

    return objective


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits[:, 0] - labels).square() / 2


@pytest.fixture(scope="module")
def softmax() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    train, test = some(40, 3), some(5, 3, seed=2)
    return fitted(linear(3), objective_of(train, cross_entropy, DECAY, 3)), train, test


def asked(module: nn.Module, train: Any, test: Any, **options: Any) -> tl.Influence:
    return tl.influence(tl.wrap(module, input_size=SIZE), train, test, **{"weight_decay": DECAY, **options})


# -- against a loop ---------------------------------------------------------------------------------------------------


def looped(module: nn.Module, train: TensorDataset, test: TensorDataset, added: float | Tensor) -> Tensor:
    """The formula with one gradient after another and the Hessian of autograd."""
    parameters = list(module.parameters())

    def gradient(image: Tensor, label: Tensor) -> Tensor:
        value = cross_entropy(module(image[None]), label[None])[0]
        return torch.cat([one.flatten() for one in torch.autograd.grad(value, parameters)])

    theta = nn.utils.parameters_to_vector(parameters).detach()
    hessian = torch.autograd.functional.hessian(objective_of(train, cross_entropy, 0.0, 3), theta)
    hessian.diagonal().add_(added)
    ours = torch.stack([gradient(*one) for one in test])
    theirs = torch.stack([gradient(*one) for one in train])
    return ours @ torch.linalg.solve(hessian, theirs.T) / len(train)


@pytest.mark.parametrize("damping", [0.0, 0.05])
@pytest.mark.parametrize(
    ("method", "options", "close"),
    [
        ("exact", {}, 1e-9),
        ("cg", {"tolerance": 1e-10}, 1e-7),
        ("lissa", {"tolerance": 1e-8}, 1e-6),
        ("arnoldi", {"steps": 39, "rank": 39}, 1e-7),
    ],
)
def test_every_solver_gives_the_formula(softmax: Any, method: str, options: Any, close: float, damping: float) -> None:
    module, train, test = softmax
    found = asked(module, train, test, method=method, damping=damping, **options)
    expected = looped(module, train, test, DECAY + damping)
    torch.testing.assert_close(found.scores, expected, rtol=close, atol=close * expected.abs().max().item())
    assert found.diagnostics["residual"] < close and found.diagnostics["converged"]
    assert found.forwards == 40 + 5 + 1  # one pass over each, and one image to compare the head with the model


def test_cg_is_the_same_without_the_hessian_written_down(softmax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchloupe_core.methods import head, influence

    module, train, test = softmax
    whole = asked(module, train, test, tolerance=1e-10)
    monkeypatch.setattr(influence, "LARGEST_EXPLICIT", 1)
    monkeypatch.setattr(head, "CHUNK", 64)  # one image at a time
    parts = asked(module, train, test, tolerance=1e-10, check=0)
    torch.testing.assert_close(parts.scores, whole.scores)
    assert parts.diagnostics["eigenvalues"]["largest"] == pytest.approx(whole.diagnostics["eigenvalues"]["largest"])


def test_gradient_dot_and_self(softmax: Any) -> None:
    module, train, test = softmax
    images, labels = train.tensors
    errors = module(images).softmax(1).detach() - F.one_hot(labels, 3)
    rows = torch.cat([images.flatten(1), torch.ones(40, 1)], 1)
    gradients = torch.einsum("nk,nd->nkd", errors, rows).flatten(1)
    found = asked(module, train, train, method="gradient_dot")
    torch.testing.assert_close(found.scores, gradients @ gradients.T / 40)
    alone = asked(module, train, test, method="self", with_curvature=False)
    torch.testing.assert_close(alone.scores, gradients.square().sum(1)[None] / 40)
    curved = asked(module, train, test, method="self")
    exact = asked(module, train, train, method="exact")
    torch.testing.assert_close(curved.scores[0], exact.scores.diagonal())
    assert len(curved) == 1 and curved.about == ("its own loss",) and len(curved.test_indices) == 0


def test_a_loss_of_ones_own_is_asked_the_same_way(softmax: Any) -> None:
    module, train, test = softmax
    expected = asked(module, train, test, method="exact")
    found = asked(module, train, test, method="exact", loss=cross_entropy)
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("target", ["logit:1", "margin:0", "prob:2-0.5*logit:0"])
def test_a_target_has_the_sign_of_its_support(softmax: Any, target: str) -> None:
    module, train, test = softmax
    found = asked(module, train, test, method="exact", target=target, damping=0)
    parameters = list(module.parameters())
    values = tl.wrap(module, input_size=SIZE).logits(module(test.tensors[0]))
    from torchloupe_core.recorded import Outputs

    of = Outputs(values).score(tl.target(target))
    hessian = torch.autograd.functional.hessian(
        objective_of(train, cross_entropy, DECAY, 3), nn.utils.parameters_to_vector(parameters).detach()
    )
    for row in range(len(test)):
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(of[row], parameters, retain_graph=True)])
        pulled = torch.linalg.solve(hessian, gradient)
        for column in (0, 7):
            image, label = train[column]
            theirs = torch.autograd.grad(cross_entropy(module(image[None]), label[None])[0], parameters)
            expected = -(pulled @ torch.cat([g.flatten() for g in theirs])) / len(train)
            assert found.scores[row, column].item() == pytest.approx(expected.item(), rel=1e-8, abs=1e-14)
    assert found.sign.endswith("removing it lowers the target") and found.about == (str(tl.target(target)),) * 5


def test_a_weight_decay_for_each_parameter(softmax: Any) -> None:
    """As in scikit-learn, whose intercept is free."""
    module, train, test = softmax
    found = asked(module, train, test, method="exact", weight_decay={"1.weight": 0.02}, damping=1e-3)
    added = torch.tensor([0.021] * 36 + [0.001] * 3, dtype=torch.float64)
    torch.testing.assert_close(found.scores, looped(module, train, test, added))


# -- against training again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_least_squares_and_ridge_leave_one_out(decay: float) -> None:
    """facts.md: theta_{-i} - theta = (X'X)^-1 x_i r_i / (1 - h_i), and to first order this times (1 - h_i)."""
    train, test = some(60, 5), some(6, 5, seed=3)
    module = fitted(linear(1), objective_of(train, squared, decay, 1))
    options: Any = {"loss": "squared", "weight_decay": decay, "damping": 0.0, "method": "exact"}
    first = asked(module, train, test, **options)
    whole = asked(module, train, test, removal="newton", **options)
    rows = torch.cat([train.tensors[0].flatten(1), torch.ones(60, 1)], 1)
    tests = torch.cat([test.tensors[0].flatten(1), torch.ones(6, 1)], 1)
    inverse = torch.linalg.inv(rows.T @ rows + 60 * decay * torch.eye(13))
    residual = module(train.tensors[0]).detach()[:, 0] - train.tensors[1]
    leverage = (rows @ inverse * rows).sum(1)
    step = (inverse @ rows.T) * residual / (1 - leverage)  # [P, n]
    error = module(test.tensors[0]).detach()[:, 0] - test.tensors[1]
    moved = tests @ step  # of each test's output
    torch.testing.assert_close(first.scores, error[:, None] * moved * (1 - leverage), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole.scores, error[:, None] * moved + moved**2 / 2, rtol=1e-9, atol=1e-10)
    for index in (0, 31):  # and that is what a model trained without it gives
        again = fitted(linear(1), objective_of(train, squared, decay, 1, left_out=(index,)))
        was = (module(test.tensors[0])[:, 0] - test.tensors[1]).square() / 2
        now = (again(test.tensors[0])[:, 0] - test.tensors[1]).square() / 2
        torch.testing.assert_close(whole.scores[:, index], (now - was).detach(), rtol=1e-6, atol=1e-9)


def test_one_step_of_newton_comes_nearer_to_leave_one_out_than_first_order(softmax: Any) -> None:
    module, train, test = softmax
    first = asked(module, train, test, method="exact")
    whole = asked(module, train, test, method="exact", removal="newton")
    was = cross_entropy(module(test.tensors[0]), test.tensors[1]).detach()
    actual = []
    for index in range(40):
        again = fitted(linear(3), objective_of(train, cross_entropy, DECAY, 3, left_out=(index,)))
        actual.append(cross_entropy(again(test.tensors[0]), test.tensors[1]).detach() - was)
    truth = torch.stack(actual, 1)
    assert (whole.scores - truth).norm() < 0.4 * (first.scores - truth).norm()
    assert (whole.scores - truth).norm() < 0.2 * truth.norm()
    assert min(spearman(a, b) for a, b in zip(first.scores, truth, strict=True)) > 0.95
    checked = first.diagnostics["spot_check"]  # holds the same truth
    torch.testing.assert_close(
        torch.tensor(checked["actual"], dtype=torch.float64), truth[:, checked["removed"]], rtol=1e-6, atol=1e-10
    )
    rows = [spearman(first.scores[row, checked["removed"]], truth[row, checked["removed"]]) for row in range(5)]
    assert checked["spearman"] == pytest.approx(sum(rows) / 5) and checked["not_reached"] == 0


@pytest.mark.slow
def test_digits_agree_with_leave_one_out_in_rank() -> None:
    """Softmax regression of scikit-learn's on its digits, 60 images really left out; its intercept has no decay."""
    from sklearn.linear_model import LogisticRegression

    images, labels = digits()
    rows, size, n, decay = images.reshape(-1, 64).astype("float64"), (1, 8, 8), 600, 1e-2

    # Its objective is C x the summed loss + |weights|^2 / 2, so C is 1 / (n x weight decay of the mean loss).
    fitter = LogisticRegression(C=1 / (n * decay), solver="newton-cholesky", tol=1e-10, warm_start=True)

    def fit(kept: Any) -> nn.Module:
        model = fitter.fit(rows[kept], labels[kept])
        module = linear(10, size)
        with torch.no_grad():
            module[1].weight.copy_(torch.from_numpy(model.coef_))  # type: ignore[index]
            module[1].bias.copy_(torch.from_numpy(model.intercept_))  # type: ignore[index]
        return module

    train = TensorDataset(torch.from_numpy(images[:n, None]).double(), torch.from_numpy(labels[:n]))
    test = TensorDataset(torch.from_numpy(images[n : n + 10, None]).double(), torch.from_numpy(labels[n : n + 10]))
    model = fit(range(n))
    was = cross_entropy(model(test.tensors[0]), test.tensors[1]).detach()
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:60]
    actual = []
    for left_out in chosen.tolist():
        again = fit([index for index in range(n) if index != left_out])
        actual.append(cross_entropy(again(test.tensors[0]), test.tensors[1]).detach() - was)
    truth = torch.stack(actual, 1)
    options: Any = {"weight_decay": {"1.weight": decay}, "damping": 1e-9, "check": 0}
    for method in ("exact", "cg"):
        found = tl.influence(tl.wrap(model, input_size=size), train, test, method=method, **options)
        assert found.diagnostics["stationary"]
        scores = found.scores[:, chosen]
        agreement = [spearman(a, b) for a, b in zip(scores, truth, strict=True)]  # near ties are what is left
        assert sum(agreement) / 10 >= 0.999 and min(agreement) > 0.995, method
        assert (scores - truth).norm() < 0.2 * truth.norm(), method


# -- what it says of itself -------------------------------------------------------------------------------------------


def test_a_model_at_no_minimum_is_said_to_be_none(softmax: Any) -> None:
    module, train, test = softmax
    found = asked(module, train, test)
    assert found.diagnostics["stationary"] and found.diagnostics["gradient_norm"] < 1e-10 and found.warnings == ()
    early = asked(linear(3), train, test)
    assert not early.diagnostics["stationary"]
    assert any("at no minimum" in one for one in early.warnings)
    parameters = linear(3)
    value = F.cross_entropy(parameters(train.tensors[0]), train.tensors[1])
    value = value + DECAY / 2 * sum(p.square().sum() for p in parameters.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters.parameters())])
    assert early.diagnostics["gradient_norm"] == pytest.approx(gradient.norm().item())


def test_eigenvalues_and_a_chosen_damping(softmax: Any) -> None:
    module, train, test = softmax
    theta = nn.utils.parameters_to_vector(module.parameters()).detach()
    eigenvalues = torch.linalg.eigvalsh(
        torch.autograd.functional.hessian(objective_of(train, cross_entropy, 0.0, 3), theta)
    )
    for method in ("exact", "cg", "lissa"):
        found = asked(module, train, test, method=method).diagnostics["eigenvalues"]
        assert found["largest"] == pytest.approx(eigenvalues[-1].item())
        assert found["smallest"] == 0.0  # adding a number to all logits changes no loss
    chosen = asked(module, train, test, weight_decay=None)
    assert chosen.diagnostics["damping"] == pytest.approx(10 * eigenvalues.mean().item())
    assert chosen.diagnostics["weight_decay"] == 0 and any("was chosen" in one for one in chosen.warnings)
    assert asked(module, train, test).diagnostics["damping"] == 0


def test_the_refits_of_a_model_at_no_minimum_start_from_it(softmax: Any) -> None:
    """There the check is of the damped objective in which the model is the minimum; influence is its derivative."""
    _, train, test = softmax
    found = asked(linear(3), train, test, method="exact", weight_decay=0.0, damping=3.0)
    checked = found.diagnostics["spot_check"]
    assert checked["spearman"] > 0.999 and checked["slope"] == pytest.approx(1, abs=0.05)


def test_a_hessian_without_a_floor_is_refused(softmax: Any) -> None:
    module, train, test = softmax
    with pytest.raises(tl.errors.NotApplicable, match=r"the Hessian is singular.*weight_decay"):
        asked(module, train, test, method="exact", weight_decay=0.0, damping=0.0)

    def concave(logits: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy(logits, labels)

    for method in ("exact", "cg", "lissa"):
        with pytest.raises(tl.errors.NotApplicable, match="the Hessian is indefinite"):
            asked(module, train, test, method=method, loss=concave)


def test_lissa_that_diverges_gives_no_scores(softmax: Any) -> None:
    module, train, test = softmax
    top = asked(module, train, test).diagnostics["eigenvalues"]["largest"]
    with pytest.raises(tl.errors.BadInput, match="lissa diverged"):
        asked(module, train, test, method="lissa", scale=0.4 * top)
    found = asked(module, train, test, method="lissa", depth=3)
    assert not found.diagnostics["converged"] and any("the solver stopped" in one for one in found.warnings)


def test_ranks_share_what_is_equal() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 9.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -5.0, -9.0])) == pytest.approx(-1)
