"""A handle: predictions, scores, outputs of every form, wrappers, devices and types."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Handle, unwrapped
from torchloupe_core.spec import Spec

Pair = namedtuple("Pair", ["features", "scores"])


class Net(nn.Module):
    """Logits, given in a form chosen by `form`."""

    def __init__(self, form: Any = None) -> None:
        super().__init__()
        self.conv, self.fc, self.form = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5), form

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).relu().mean((2, 3))
        logits = self.fc(features)
        return logits if self.form is None else self.form(features, logits)


def net(form: Any = None) -> Net:
    torch.manual_seed(0)
    return Net(form).eval()


def handle(form: Any = None, **facts: Any) -> Handle:
    return Handle(net(form), Spec(**{"input_size": (3, 8, 8), **facts}))


X = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_predictions_are_the_softmax_best_first() -> None:
    model = handle(classes=tuple("abcde"))
    with torch.no_grad():
        logits = model.module(X)
    found = model.predict(X, k=3)
    assert len(found) == 20
    for row, guesses in zip(logits, found, strict=True):
        order = row.argsort(descending=True).tolist()[:3]
        assert [guess.index for guess in guesses] == order
        assert [guess.name for guess in guesses] == ["abcde"[index] for index in order]
        torch.testing.assert_close(torch.tensor([guess.logit for guess in guesses]), row[order])
        torch.testing.assert_close(torch.tensor([guess.probability for guess in guesses]), row.softmax(0)[order])
    assert [len(guesses) for guesses in model.predict(X[:2], k=99)] == [5, 5]
    assert handle().predict(X[:1], k=1)[0][0].name == str(order_of(handle().module, X[:1]))
    assert model.forwards == 22


def order_of(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return int(module(x).argmax())


def test_a_score_is_the_same_however_the_images_come() -> None:
    model = handle()
    together = model.score(X, "logit:2")
    one_by_one = torch.cat([model.score(x, "logit:2") for x in X])
    torch.testing.assert_close(together, one_by_one)
    assert together.shape == (20,)
    assert not together.requires_grad


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda f, s: (s, f), None),
        (lambda f, s: [s, f], None),
        (lambda f, s: (f, s), 1),
        (lambda f, s: {"logits": s, "features": f}, None),
        (lambda f, s: {"only": s}, None),
        (lambda f, s: {"a": f, "b": s}, "b"),
        (lambda f, s: Pair(f, s), "scores"),
        (lambda f, s: Pair(f, s), 1),
        (lambda f, s: {"a": (f, s)}, lambda out: out["a"][1]),
        (lambda f, s: s[:, :, None, None], lambda out: out.flatten(1)),
    ],
)
def test_the_logits_of_every_form_of_output(form: Any, output: Any) -> None:
    expected = handle().score(X[:2], 3)
    torch.testing.assert_close(handle(form, output=output).score(X[:2], 3), expected)
    assert handle(form, output=output).predict(X[:1])[0][0].index == order_of(net(), X[:1])


@pytest.mark.parametrize(
    ("form", "output", "error", "says"),
    [
        (lambda f, s: {"a": f, "b": s}, None, BadInput, "output=, one of ['a', 'b']"),
        (lambda f, s: {"a": f, "b": s}, "c", BadInput, "output='c' selects nothing"),
        (lambda f, s: (f, s), 2, BadInput, "output=2 selects nothing"),
        (lambda f, s: "text", None, BadInput, "str"),
        (lambda f, s: None, None, BadInput, "NoneType"),
        (lambda f, s: s[:, :, None, None], None, NotApplicable, "[2, 5, 1, 1], not [N, K]"),
    ],
)
def test_an_output_without_logits_says_what_it_is(form: Any, output: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        handle(form, output=output).score(X[:2], 0)
    assert says in str(caught.value)


def test_one_number_for_each_image_is_one_output() -> None:
    model = handle(lambda f, s: s[:, 0])
    torch.testing.assert_close(model.score(X[:3], 0), handle().score(X[:3], 0))
    assert model.predict(X[:1])[0][0].index == 0


def test_outputs_that_are_not_finite_name_the_stage() -> None:
    model = handle(lambda f, s: s / 0)
    with pytest.raises(BadInput, match="the model's output holds NaN or infinity"):
        model.predict(X[:1])


def test_wrappers_are_taken_off() -> None:
    inner = net()
    assert unwrapped(nn.DataParallel(inner)) is inner
    assert unwrapped(torch.compile(inner)) is inner  # type: ignore[arg-type]
    assert unwrapped(torch.compile(nn.DataParallel(inner))) is inner  # type: ignore[arg-type]
    assert Handle(nn.DataParallel(inner)).module is inner


def test_another_type_or_device_is_a_copy() -> None:
    model = handle()
    assert model.to() is model
    assert model.to("cpu", torch.float32) is model
    double = model.to(dtype=torch.float64)
    assert double.dtype == torch.float64
    assert double.score(X[:2], 1).dtype == torch.float64
    assert model.dtype == next(model.module.parameters()).dtype == torch.float32
    torch.testing.assert_close(double.score(X[:2], 1).float(), model.score(X[:2], 1))


def test_another_memory_format_is_a_copy_with_the_same_answers() -> None:
    model = handle()
    last = model.to(memory_format=torch.channels_last)
    weights = [part.weight for part in last.module.modules() if isinstance(part, nn.Conv2d)]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(one.is_contiguous() for one in model.module.parameters())
    torch.testing.assert_close(last.score(X[:2], 1), model.score(X[:2], 1))


def test_what_a_model_without_parameters_is() -> None:
    model = Handle(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), Spec(input_size=(3, 8, 8)))
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.score(X, 2), X[:, 2].mean((1, 2)))


def test_the_embedding_is_what_goes_into_the_classifier() -> None:
    assert handle().embedding == "fc.in"
    features_only = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert Handle(features_only, Spec(input_size=(3, 8, 8))).embedding == "2"
    headless = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert Handle(headless.eval(), Spec(input_size=(3, 8, 8))).embedding == "3"
    fully_convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert Handle(fully_convolutional, Spec(input_size=(3, 8, 8))).embedding == "1.in"
    mlp = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 9), nn.ReLU(), nn.Linear(9, 7))
    assert Handle(mlp, Spec(input_size=(3, 8, 8))).embedding == "4.in"
    named = Handle(mlp, Spec(input_size=(3, 8, 8), classifier="2"))
    assert named.embedding == "2.in"

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) @ self.weight.T

    with pytest.raises(NotApplicable, match="name layer="):
        _ = Handle(Functional(), Spec(input_size=(3, 8, 8))).embedding


def test_unknown_layers_are_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="'conv'"):
        handle().layer("cnv")
    with pytest.raises(UnknownName, match="'conv'"), handle().watch("cnv"):
        pass


def test_a_forward_stops_after_the_last_layer_needed() -> None:
    model = handle(lambda f, s: 1 / 0)
    model._kept.update(handle()._kept)
    with pytest.raises(ZeroDivisionError):
        model.score(X[:1], 0)

    class Half(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            ran.append("conv")
            z = self.fc(y.mean((2, 3)))
            ran.append("fc")
            return z

    ran: list[str] = []
    half = Handle(Half().eval(), Spec(input_size=(3, 8, 8)))
    half.trace()
    ran.clear()
    half.score(X[:2], "conv:1")
    assert ran == []  # the pass ended inside the hook of conv
    half.score(X[:2], "conv:1+logit:0")
    assert ran == ["conv", "fc"]


def test_a_handle_prints_what_it_is() -> None:
    text = repr(handle(name="net", source="mine", preprocess_text="resized"))
    assert text == "Handle(mine/net, input 3x8x8, cpu, resized)"
