"""Watching models that give containers, and models inside wrappers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_watch import plainly
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.watch import first_tensor


class Pair(NamedTuple):
    maps: Tensor
    size: int


class Structured(nn.Module):
    """Its trunk gives what it is told to, tensors inside containers; so does the model itself."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor], out: Callable[[Tensor], Any]):
        super().__init__()
        self.trunk, self.relu, self.fc = Packing(pack), nn.ReLU(inplace=True), nn.Linear(4, 3)
        self.unpack, self.out = unpack, out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(self.relu(self.unpack(self.trunk(x))).mean((2, 3))))


class Packing(nn.Module):
    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.pack = nn.Conv2d(3, 4, 3), pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.conv(x))


PACKINGS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda t: (t, None), lambda packed: packed[0]),
    "list": (lambda t: [t], lambda packed: packed[0]),
    "dict": (lambda t: {"note": "x", "maps": t}, lambda packed: packed["maps"]),
    "ordered dict": (lambda t: OrderedDict(maps=t), lambda packed: packed["maps"]),
    "named tuple": (lambda t: Pair(t, 2), lambda packed: packed.maps),
    "nested": (lambda t: ({"deep": [t]}, 1), lambda packed: packed[0]["deep"][0]),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_layers_that_give_containers(packing: str) -> None:
    torch.manual_seed(0)
    handle = tl.wrap(Structured(*PACKINGS[packing], out=lambda t: t).eval(), input_size=(3, 8, 8))
    inputs = torch.randn(2, 3, 8, 8)
    with handle.watch("trunk", "trunk.conv", leaf="trunk", through=True) as watch, torch.enable_grad():
        (gradient,) = torch.autograd.grad(watch(inputs)[:, 0].sum(), watch["trunk"])
    assert torch.equal(watch["trunk"], watch["trunk.conv"]) and (watch["trunk"] < 0).any()
    assert gradient.abs().sum() > 0
    assert tl.explain(handle, inputs, layer="trunk").values.shape == (2, 6, 6)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "first of a tuple": (lambda t: (t, t[:, :1]), None),
    "index": (lambda t: (t[:, :1], t), 1),
    "list": (lambda t: [t], None),
    "logits of a dict": (lambda t: {"loss": t.sum(), "logits": t}, None),
    "only one of a dict": (lambda t: {"classes": t, "note": 3}, None),
    "key": (lambda t: {"a": t[:, :1], "b": t}, "b"),
    "field": (lambda t: Pair(t, 1), "maps"),
    "function": (lambda t: {"a": {"deep": t}}, lambda output: output["a"]["deep"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_models_that_give_containers(kind: str) -> None:
    out, select = OUTPUTS[kind]
    torch.manual_seed(0)
    module = Structured(*PACKINGS["tuple"], out=out).eval()
    handle = tl.wrap(module, input_size=(3, 8, 8), output=select)
    inputs = torch.randn(2, 3, 8, 8)
    expected = module.fc(module.trunk(inputs)[0].relu().mean((2, 3)))
    assert torch.allclose(handle.score(inputs, "logit:2"), expected[:, 2])
    found = tl.explain(module, inputs, output=select, target=2, method="grad_cam")
    assert torch.equal(found.values, tl.explain(handle, inputs, target=2).values) and found.values.any()
    assert tl.explain(handle, inputs, method="cam", target=2).values.shape == (2, 6, 6)


@pytest.mark.parametrize(
    ("out", "select", "words"),
    [
        (lambda t: {"a": t, "b": t}, None, r"name its logits with output=, one of \['a', 'b'\]"),
        (lambda t: {"a": t, "b": t}, "c", r"output='c' selects nothing from the model's output, \['a', 'b'\]"),
        (lambda t: (t, t), 2, "output=2 selects nothing"),
        (lambda t: "nothing", None, "is str, not a tensor"),
    ],
)
def test_an_output_that_holds_no_logits(out: Callable[[Tensor], Any], select: Any, words: str) -> None:
    handle = tl.wrap(Structured(*PACKINGS["tuple"], out=out).eval(), input_size=(3, 8, 8), output=select)
    with pytest.raises(BadInput, match=words):
        handle.predict(torch.zeros(1, 3, 8, 8))


def test_containers_are_not_written_to() -> None:
    kept: list[list[Tensor]] = []

    def pack(tensor: Tensor) -> list[Tensor]:
        kept.append([tensor])
        return kept[-1]

    module = Structured(pack, lambda packed: packed[0], out=lambda t: t).eval()
    handle = tl.wrap(module, input_size=(3, 8, 8))
    with handle.watch("trunk", leaf="trunk", through=True) as watch:
        watch(torch.zeros(1, 3, 8, 8))
    assert not kept[-1][0].requires_grad and kept[-1][0] is not watch["trunk"]


def test_each_selected_output_has_its_own_number_of_classes() -> None:
    module = Structured(*PACKINGS["tuple"], out=lambda t: (t[:, :1], t)).eval()
    outputs = [tl.wrap(module, input_size=(3, 8, 8), output=select).outputs for select in (0, 1, None)]
    assert outputs == [1, 3, 1]


def test_first_tensor() -> None:
    tensor = torch.zeros(1)
    assert first_tensor((None, {"a": [1, tensor]})) is tensor
    assert first_tensor({"a": "no"}) is None and first_tensor(3) is None


# -- wrappers ---------------------------------------------------------------------------------------------------------


def _wrappers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def by_method(module: nn.Module) -> nn.Module:
        module.compile(backend="eager")
        return module

    def nested(module: nn.Module) -> nn.Module:
        module.layer1 = torch.compile(module.layer1, backend="eager")
        module.layer2.compile(backend="eager")
        return module

    return {
        "DataParallel": nn.DataParallel,
        "torch.compile": lambda module: torch.compile(module, backend="eager"),
        "DataParallel of torch.compile": lambda module: nn.DataParallel(torch.compile(module, backend="eager")),
        "Module.compile": by_method,
        "nested torch.compile": nested,
    }


@pytest.mark.parametrize("used", ["new", "used before"])
@pytest.mark.parametrize("wrapper", _wrappers())
def test_wrapped_models_are_watched_like_plain_ones(wrapper: str, used: str) -> None:
    handle, inputs = SPECIMENS["residual"]()
    expected = tl.explain(handle, inputs, target=1)
    wrapped = _wrappers()[wrapper](SPECIMENS["residual"]()[0].module)
    if used == "used before":
        with torch.no_grad():
            wrapped(inputs)
    before = Snapshot(wrapped, inputs)
    other = tl.wrap(wrapped, input_size=(3, 32, 32))
    found = tl.explain(other, inputs, target=1, layer=other.features)
    assert torch.allclose(found.values, expected.values, atol=1e-6)
    assert before.differences() == []
    part = "layer1._orig_mod.conv1" if wrapper == "nested torch.compile" else "layer1.conv1"
    with other.watch(part, "layer1") as watch:
        watch(inputs)
    assert torch.allclose(watch[part], plainly(handle.module, "layer1.conv1", inputs), atol=1e-6)
    assert before.differences() == []
    with torch.no_grad():
        assert torch.allclose(wrapped(inputs), handle.module(inputs), atol=1e-6)


def test_the_last_call_is_waited_for_to_its_end() -> None:
    """Its input, or a module inside it, is seen in that call before its output is."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
            self.after = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.after(self.block(self.block(x))).mean((2, 3))
            return logits

    model = tl.wrap(Twice(), input_size=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        once = model.module.block(x)
        inner, twice = model.module.block[0](once), model.module.block(once)
    for earlier, expected in (("block.in", once), ("block.0", inner)):
        with model.watch("block", earlier) as watch:
            assert watch(x) is None
            torch.testing.assert_close(watch["block"], twice)
            torch.testing.assert_close(watch[earlier], expected)
