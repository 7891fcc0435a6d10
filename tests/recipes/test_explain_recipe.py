"""`tl.explain`: its options, what models and targets it takes, and what its result states."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.errors import BadInput, BadTarget, NotApplicable, UnknownName

SIZE = (3, 16, 16)
CLASSES = ("cat", "dog", "crane", "crane")
X = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(1))
QUICK: dict[str, dict[str, Any]] = {
    "cam": {},
    "grad_cam": {},
    "rise": {"n_masks": 20},
    "saliency": {},
    "input_x_gradient": {},
    "integrated_gradients": {"steps": 4},
    "guided_backprop": {},
    "occlusion": {"window": 8, "stride": 8},
    "lime": {"n_samples": 10, "n_segments": 4},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def model(**facts: Any) -> tl.Handle:
    return tl.wrap(net(), **{"input_size": SIZE, "classes": CLASSES, **facts})


def test_these_are_all_the_methods() -> None:
    assert {entry.name.removeprefix("captum.") for entry in tl.methods("explain")} >= set(QUICK)


@pytest.mark.parametrize("method", QUICK)
def test_the_result_states_where_it_comes_from(method: str) -> None:
    subject = model()
    before = subject.forwards
    found = tl.explain(subject, X, target="logit:dog", method=method, seed=5, **QUICK[method])
    assert found.values.shape[0] == 3
    assert found.values.dtype == torch.float32
    assert found.values.std() > 0
    assert found.method in (method, f"captum.{method}")
    assert found.backend == found.method.split(".")[0] if "." in found.method else "native"
    assert found.target == "logit:dog"
    assert found.seed == 5
    assert found.seconds > 0
    assert found.forwards == subject.forwards - before > 0
    assert found.versions["torch"] == importlib.metadata.version("torch")
    assert found.versions["torchloupe"] == importlib.metadata.version("torchloupe")
    assert found.options.items() >= QUICK[method].items()
    assert found.layer == ("relu2" if method in ("cam", "grad_cam") else None)
    torch.testing.assert_close(found.scores, subject.score(X, "logit:dog"))
    assert found.images.shape == (3, *SIZE)


@pytest.mark.parametrize("method", QUICK)
def test_a_float64_model_is_asked_in_float64(method: str) -> None:
    subject = model()
    single = tl.explain(subject, X, target=1, method=method, **QUICK[method])
    for double in (
        tl.explain(subject, X, target=1, method=method, dtype=torch.float64, **QUICK[method]),
        tl.explain(tl.wrap(net().double(), input_size=SIZE), X, target=1, method=method, **QUICK[method]),
    ):
        assert double.values.dtype == torch.float32
        scale = single.values.abs().max().item()
        torch.testing.assert_close(double.values, single.values, atol=1e-3 * scale, rtol=1e-3)
    assert subject.dtype == torch.float32


def test_device_and_type_leave_the_model_where_it_is() -> None:
    module = net()
    found = tl.explain(tl.wrap(module, input_size=SIZE), X, device="cpu", dtype=torch.bfloat16)
    assert found.values.isfinite().all()
    assert next(module.parameters()).dtype == torch.float32
    assert tl.explain(tl.wrap(module, input_size=SIZE), X, device=torch.device("cpu")).values.std() > 0


def test_every_form_of_model() -> None:
    expected = tl.explain(model(), X, target=1).values
    module = net()
    for given in (module, nn.DataParallel(module), tl.wrap(module), tl.wrap(nn.DataParallel(module)), module.train()):
        torch.testing.assert_close(tl.explain(given, X, target=1).values, expected)
    assert module.training
    for nonsense in (None, 3, net, [module]):
        with pytest.raises(BadInput, match=r"a name, a torch\.nn\.Module or a Handle"):
            tl.explain(nonsense, X)  # type: ignore[arg-type]


def test_the_target_is_each_images_prediction_unless_named() -> None:
    subject = model()
    with torch.no_grad():
        best = subject.module.eval()(X).argmax(1).tolist()
    found = tl.explain(subject, X)
    names = [f"logit:{CLASSES[index]}" if CLASSES.count(CLASSES[index]) == 1 else f"logit:{index}" for index in best]
    assert found.targets == tuple(names)
    for index, guesses in enumerate(subject.predict(X, k=1)):
        torch.testing.assert_close(found.scores[index].item(), guesses[0].logit)
    assert tl.explain(model(classes=None), X).targets == tuple(f"logit:{index}" for index in best)


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize(
    "target",
    [0, "margin:dog", "prob:cat", "conv2:3", "conv2:3@2,5", "conv2", "-conv2:[1,0,0,0,0,0,0,1]^2", "logit:dog-conv2:1"],
)
def test_any_target_with_any_method(method: str, target: Any) -> None:
    if method == "cam" and target != 0:
        with pytest.raises(NotApplicable, match="sums of logits only"):
            tl.explain(model(), X[:1], target=target, method=method)
        return
    found = tl.explain(model(), X[:1], target=target, method=method, **QUICK[method])
    assert found.values.isfinite().all()
    assert found.values.abs().sum() > 0
    torch.testing.assert_close(found.scores, model().score(X[:1], target))


def test_targets_as_numbers_of_other_libraries() -> None:
    expected = tl.explain(model(), X, target=[1, 0, 2]).values
    for given in (torch.tensor([1, 0, 2]), (1, 0, 2), ["logit:dog", "logit:cat", tl.logit(2)]):
        torch.testing.assert_close(tl.explain(model(), X, target=given).values, expected)
    torch.testing.assert_close(tl.explain(model(), X, target=torch.tensor(1)).values[0], expected[0])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"method": "grad_cma"}, UnknownName, "'grad_cam'"),
        ({"method": "captum.salience"}, UnknownName, "'captum.saliency'"),
        ({"steps": 3}, BadInput, "grad_cam has no option 'steps'; its options: none"),
        ({"method": "rise", "masks": 3}, BadInput, "n_masks=4000, cells=7, p=0.5"),
        ({"method": "saliency", "layer": "conv1"}, BadInput, "reads the input, not a layer"),
        ({"method": "rise", "layer": "conv1"}, BadInput, "reads the input, not a layer"),
        ({"layer": "cnov1"}, UnknownName, "'conv1'"),
        ({"layer": "fc"}, NotApplicable, "'relu2'"),
        ({"target": "logit:dgo"}, UnknownName, "'dog'"),
        ({"target": "logit:crane"}, UnknownName, "[2, 3]"),
        ({"target": "logit:"}, BadTarget, "^"),
        ({"target": 4}, UnknownName, "0 to 3"),
        ({"target": [0, 1]}, BadInput, "2 targets for 3 images"),
        ({"target": 1.5}, BadTarget, "float"),
        ({"batch_size": 0}, BadInput, "batch_size is at least 1"),
        ({"batch_size": -2}, BadInput, "batch_size is at least 1"),
    ],
)
def test_what_is_asked_wrongly_is_answered_with_what_would_work(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        tl.explain(model(), X, **options)
    assert says in str(caught.value)


@pytest.mark.parametrize("method", QUICK)
def test_an_output_that_is_not_finite_names_the_stage(method: str) -> None:
    subject = model()
    subject.module.fc.weight.data[1] = torch.nan
    with pytest.raises(BadInput, match="the model's output holds NaN or infinity"):
        tl.explain(subject, X, target=1, method=method, **QUICK[method])
    with pytest.raises(BadInput, match="the model's output holds NaN or infinity"):
        tl.explain(subject, X, method=method, **QUICK[method])


def test_a_gradient_that_is_not_finite_names_the_method() -> None:
    class Root(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + (x - x).abs().sqrt().mean((1, 2, 3))[:, None] * 1.0

    with pytest.raises(BadInput, match=r"captum\.saliency gave NaN or infinity; the model's gradients"):
        tl.explain(tl.wrap(Root(), input_size=SIZE), X, target=0, method="saliency")


def test_an_input_that_is_not_finite_names_the_image() -> None:
    bad = X.clone()
    bad[1, 0, 0, 0] = torch.inf
    with pytest.raises(BadInput, match="NaN or infinity, in image 1"):
        tl.explain(model(), bad)


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    values = torch.randint(0, 255, (20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(values.numpy())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / "one.png")
    expected = tl.explain(model(), picture, target=1).values
    for given in (tmp_path / "a" / "one.png", str(tmp_path / "a"), values.numpy(), values.permute(2, 0, 1)):
        torch.testing.assert_close(tl.explain(model(), given, target=1).values, expected)
    assert len(tl.explain(model(), tmp_path, target=1)) == 2
    assert len(tl.explain(model(), [picture, picture.convert("L"), picture.convert("RGBA")], target=1)) == 3


def test_outputs_of_other_forms_are_selected() -> None:
    class Pair(Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return {"aux": -logits, "main": logits}

    torch.manual_seed(0)
    pair = Pair()
    expected = tl.explain(model(), X, target=1, method="saliency").per_channel
    for found in (
        tl.explain(tl.wrap(pair, output="main"), X, target=1, method="saliency"),
        tl.explain(pair, X, target=1, method="saliency", output="main"),
        tl.explain(pair, X, target=1, method="saliency", output=lambda out: -out["aux"]),
    ):
        torch.testing.assert_close(found.per_channel, expected)
    with pytest.raises(BadInput, match="output="):
        tl.explain(pair, X, target=1)


def test_progress_is_reported_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    told: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def bar(title: str, unit: str, show: bool | None = None) -> Any:
        yield lambda done, total: told.append((done, total))

    monkeypatch.setattr("torchloupe._explain.progress_bar", bar)
    for method in ("rise", "integrated_gradients", "occlusion", "lime"):
        told.clear()
        tl.explain(model(), X, target=1, method=method, **QUICK[method])
        assert told, method
        done, total = told[-1]
        assert done == total, method
        assert [one for one, _ in told] == sorted(one for one, _ in told)


def test_nothing_is_printed_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    for method in QUICK:
        tl.explain(model(), X, target=1, method=method, **QUICK[method])
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_the_same_seed_gives_the_same_map_whatever_came_before() -> None:
    for method in ("rise", "lime"):
        first = tl.explain(model(), X[:1], target=1, method=method, **QUICK[method])
        torch.rand(7)
        assert torch.equal(tl.explain(model(), X[:1], target=1, method=method, **QUICK[method]).values, first.values)
        other = tl.explain(model(), X[:1], target=1, method=method, seed=1, **QUICK[method])
        assert not torch.equal(other.values, first.values)


def test_the_demo_model_explains_its_scenes() -> None:
    scenes = tl.demo_scenes(4, 3)
    found = tl.explain("demo", scenes.images, method="grad_cam")
    assert found.values.shape == (4, 8, 8)
    assert found.images.shape == (4, 3, 64, 64)
    torch.testing.assert_close(found.images, scenes.images.float() / 255, atol=0.01, rtol=0)


@pytest.mark.parametrize("method", ["cam", "grad_cam", "layer_cam", "saliency"])
def test_half_precision_and_another_memory_format_ask_a_copy(method: str) -> None:
    subject = tl.load("demo")
    images = tl.demo_scenes(4).images
    exact = tl.explain(subject, images, target=0, method=method)
    fast = tl.explain(subject, images, target=0, method=method, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert fast.values.dtype == torch.float32
    error = (fast.values - exact.values).norm() / exact.values.norm()
    assert 0 < error < (0.1 if method == "saliency" else 0.02)
    assert subject.dtype == torch.float32


def test_the_memory_format_reaches_the_copy() -> None:
    seen = []

    class Noting(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    module = nn.Sequential(Noting(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    tl.explain(tl.wrap(module, input_size=SIZE), X, target=0, memory_format=torch.channels_last)
    assert seen and all(seen)
