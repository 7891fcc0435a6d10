"""Watching layers: several in one forward, stopped after the last, whatever the model does to its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.watch import Place, hooked


def counted(module: nn.Module) -> dict[str, int]:
    """How often each part of a module runs from now on, by name."""
    calls: dict[str, int] = {}
    for name, part in module.named_modules():

        def count(part: nn.Module, given: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        part.register_forward_pre_hook(count)
    return calls


def plainly(module: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """What a layer gives, seen by an ordinary hook."""
    seen: list[Tensor] = []
    hook = module.get_submodule(layer).register_forward_hook(lambda part, given, output: seen.append(output.clone()))
    with torch.no_grad():
        module(inputs.clone())
    hook.remove()
    return seen[-1]


# -- several layers, one forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("specimen", SPECIMENS)
def test_every_layer_is_seen_in_one_forward(specimen: str) -> None:
    handle, inputs = SPECIMENS[specimen]()
    names = list(handle.layers)
    before = handle.forwards
    with handle.watch(*names, through=True) as watch:
        output = watch(inputs)
    assert handle.forwards - before == len(inputs)
    assert torch.equal(output, handle.module(inputs.clone()))
    for name in names:
        found = watch[name]
        assert isinstance(found, Tensor)
        assert torch.allclose(found, plainly(handle.module, name, inputs), atol=1e-6), name


def test_it_stops_after_the_last_layer_needed() -> None:
    handle, inputs = SPECIMENS["residual"]()
    handle.trace()
    calls = counted(handle.module)
    with handle.watch("layer1", "conv1") as watch:
        assert watch(inputs) is None
    assert calls["layer1"] == 1
    assert not {"layer2", "layer2.conv1", "fc"} & set(calls)
    assert watch["conv1"].shape == (3, 8, 32, 32) and watch["layer1"].shape == (3, 8, 16, 16)


def test_through_runs_on_and_no_layers_at_all_mean_the_output() -> None:
    handle, inputs = SPECIMENS["plain"]()
    with handle.watch("conv1", through=True) as watch:
        assert watch(inputs).shape == (3, 5)
    with handle.watch() as watch:
        assert watch(inputs).shape == (3, 5)


def test_a_watch_may_run_again() -> None:
    handle, inputs = SPECIMENS["inplace"]()
    with handle.watch("relu#1", "relu") as watch:
        watch(inputs[:1])
        first = watch["relu#1"].clone()
        watch(inputs[1:])
        assert len(watch["relu#1"]) == 2
        watch(inputs[:1])
        assert torch.equal(watch["relu#1"], first)


def test_a_layer_may_be_named_by_a_layer_object() -> None:
    handle, inputs = SPECIMENS["plain"]()
    layer = handle.layers["conv2"]
    with handle.watch(layer) as watch:
        watch(inputs)
    assert torch.equal(watch[layer], watch["conv2"])
    assert torch.equal(watch.map(layer), watch["conv2"])


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_registration_leaves_no_hook(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, _ = SPECIMENS["residual"]()
    handle.trace()
    before, real, done = Snapshot(handle.module), nn.Module.register_forward_hook, [0]

    def interrupted(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        done[0] += 1
        removable = real(module, *arguments, **options)
        if done[0] == 3:
            raise error("in the middle")  # registered, and the handle never returned
        return removable

    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(error), hooked(dict(handle.module.named_children()), lambda *_: None, lambda *_: None):
        pass
    assert before.differences() == []
    done[0] = 0
    with pytest.raises(error), handle.watch(*handle.layers):
        pass
    assert before.differences() == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_model_leaves_no_hook(error: type[BaseException]) -> None:
    handle, inputs = SPECIMENS["plain"]()
    handle.trace()
    raised = error("inside")

    def fails(x: Tensor) -> Tensor:
        raise raised

    handle.module.relu2.forward = fails
    before = Snapshot(handle.module, inputs)
    with pytest.raises(error) as caught, handle.watch("conv1", "gap") as watch:
        watch(inputs)
    assert caught.value is raised
    assert before.differences() == []
    del handle.module.relu2.forward
    with handle.watch("conv1", "gap") as watch:
        watch(inputs)


def test_the_users_own_hooks_run_and_stay() -> None:
    handle, inputs = SPECIMENS["plain"]()
    handle.module.conv1.register_forward_hook(lambda part, given, output: output * 2)
    ran: list[int] = []
    handle.module.relu1.register_forward_pre_hook(lambda part, given: ran.append(1))
    with handle.watch("conv1") as watch:
        watch(inputs)
    assert torch.allclose(watch["conv1"], 2 * nn.functional.conv2d(inputs, *_weights(handle, "conv1"), padding=1))
    assert len(handle.module.conv1._forward_hooks) == 1 and len(handle.module.relu1._forward_pre_hooks) == 1


def _weights(handle: Handle, layer: str) -> tuple[Tensor, Tensor]:
    part = handle.module.get_submodule(layer)
    return part.weight.detach(), part.bias.detach()


def test_a_model_that_catches_every_exception_still_stops() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.first(x)
            except Exception:
                x = x[:, :1].expand(-1, 4, -1, -1)
            return self.second(x)  # type: ignore[no-any-return]

    handle = tl.wrap(Stubborn().eval(), input_size=(3, 8, 8))
    handle.trace()
    calls = counted(handle.module)
    with handle.watch("first") as watch:
        watch(torch.zeros(1, 3, 8, 8))
    assert "second" not in calls


# -- in-place operations ----------------------------------------------------------------------------------------------


def test_what_was_seen_is_safe_from_an_in_place_relu() -> None:
    handle, inputs = SPECIMENS["inplace"]()
    expected = plainly(handle.module, "bn1", inputs)
    assert (expected < 0).any()
    with handle.watch("bn1", "conv2", through=True) as watch:
        output = watch(inputs)
    assert torch.equal(watch["bn1"], expected)
    assert torch.equal(watch["conv2"], plainly(handle.module, "conv2", inputs))
    assert torch.equal(output, handle.module(inputs.clone()))


def test_the_callers_input_is_safe_from_in_place_operations() -> None:
    handle, inputs = SPECIMENS["inplace"]()
    kept, version = inputs.clone(), inputs._version
    with handle.watch("conv1") as watch:
        watch(inputs)
    assert torch.equal(inputs, kept) and inputs._version == version


@pytest.mark.parametrize("layer", ["conv1", "bn1", "relu#1", "conv2", "relu#2", "conv3", "relu"])
def test_gradients_flow_through_in_place_operations(layer: str) -> None:
    handle, inputs = SPECIMENS["inplace"]()
    with handle.watch(layer, leaf=layer, through=True) as watch, torch.enable_grad():
        (gradient,) = torch.autograd.grad(watch(inputs)[:, 1].sum(), watch[layer])
    assert gradient.shape == watch[layer].shape and gradient.abs().sum() > 0


# -- calls, inputs, outputs -------------------------------------------------------------------------------------------


def test_each_call_of_a_reused_module_can_be_named() -> None:
    handle, inputs = SPECIMENS["inplace"]()
    assert handle.layer("relu").calls == 3
    seen: list[Tensor] = []
    hook = handle.module.relu.register_forward_hook(lambda part, given, output: seen.append(output.clone()))
    with torch.no_grad():
        handle.module(inputs.clone())
    hook.remove()
    with handle.watch("relu#1", "relu#2", "relu#3", "relu") as watch:
        watch(inputs)
    assert torch.equal(watch["relu#1"], seen[0]) and torch.equal(watch["relu#2"], seen[1])
    assert torch.equal(watch["relu"], seen[2]) and torch.equal(watch["relu#3"], seen[2])
    assert handle.layer("relu#1").size == (16, 16) and handle.layer("relu").size == (8, 8)


def test_it_stops_after_the_call_that_was_named() -> None:
    handle, inputs = SPECIMENS["inplace"]()
    handle.trace()
    calls = counted(handle.module)
    with handle.watch("relu#1") as watch:
        watch(inputs)
    assert calls["relu"] == 1 and "conv2" not in calls
    calls.clear()
    with handle.watch("relu") as watch:
        watch(inputs)
    assert calls["relu"] == 3 and "fc" not in calls


def test_a_call_that_does_not_happen() -> None:
    handle, inputs = SPECIMENS["inplace"]()
    with pytest.raises(UnknownName, match=r"no call 5 of 'relu'; it runs 3 times"), handle.watch("relu#5") as watch:
        watch(inputs)


def test_the_input_of_a_layer() -> None:
    handle, inputs = SPECIMENS["residual"]()
    with handle.watch("fc.in", "layer2.in", "layer1") as watch:
        assert watch(inputs) is None
    assert torch.equal(watch["layer2.in"], watch["layer1"])
    assert torch.allclose(watch["fc.in"], plainly(handle.module, "layer2", inputs).mean((2, 3)))
    assert handle.layer("layer2.in").size == (16, 16)


def test_places_print_as_they_are_written() -> None:
    for text in ("layer4", "relu#2", "fc.in", "relu#2.in", "features.0"):
        assert str(Place.parse(text)) == text
    assert Place.parse("relu#2.in") == Place("relu", 2, True)
    assert Place.parse("odd#name") == Place("odd#name")


# -- graphs that begin at a layer -------------------------------------------------------------------------------------


LEAVES = {
    "plain": ["conv1", "relu2", "fc.in"],
    "residual": ["relu", "layer1.relu#1", "layer2"],
    "concat": ["norm", "dense1"],
    "depthwise": ["act4", "se.reduce"],
    "inplace": ["relu#3", "conv3"],
    "nhwc": ["norm", "window_block.attn", "conv_block.norm"],
    "vit_registers": ["blocks.1", "blocks.2.norm1", "head.in"],
}


@pytest.mark.parametrize(("specimen", "layer"), [(name, layer) for name in LEAVES for layer in LEAVES[name]])
def test_a_leafs_gradient_is_the_full_graphs(specimen: str, layer: str) -> None:
    handle, inputs = SPECIMENS[specimen]()
    with handle.watch(layer, leaf=layer, through=True) as watch, torch.enable_grad():
        output = watch(inputs)
        assert watch[layer].is_leaf and watch[layer].requires_grad
        (found,) = torch.autograd.grad(output[:, 2].sum(), watch[layer])
    with handle.watch(layer, through=True) as watch, torch.enable_grad():
        output = watch(inputs.clone().requires_grad_(True))
        assert not watch[layer].is_leaf
        (expected,) = torch.autograd.grad(output[:, 2].sum(), watch[layer])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7) and expected.abs().sum() > 0


def test_before_a_leaf_there_is_no_graph() -> None:
    handle, inputs = SPECIMENS["residual"]()
    with handle.watch("conv1", "layer1", leaf="layer1", through=True) as watch:
        output = watch(inputs)
    assert not watch["conv1"].requires_grad and output.requires_grad


def test_a_leaf_is_cut_off_even_where_gradients_are_on() -> None:
    handle, inputs = SPECIMENS["residual"]()
    images = inputs.clone().requires_grad_(True)
    with handle.watch("conv1", leaf="layer1", through=True) as watch, torch.enable_grad():
        output = watch(images)
    assert watch["layer1"].is_leaf
    assert torch.autograd.grad(output.sum(), images, allow_unused=True) == (None,)


def test_grad_mode_inside_is_the_callers_own_after_a_leaf() -> None:
    handle, inputs = SPECIMENS["plain"]()
    with handle.watch(leaf="conv1", through=True) as watch:
        assert not torch.is_grad_enabled()
        watch(inputs)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# -- callers and models in any state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("specimen", ["plain", "vit_registers"])
def test_callers_in_any_mode(specimen: str, mode: Callable[[], Any]) -> None:
    expected, layers = SPECIMENS[specimen]()[0].features, list(SPECIMENS[specimen]()[0].layers)
    with mode():
        handle, _ = SPECIMENS[specimen]()  # a model made there, too
        inputs = torch.ones(1, *handle.input_shape)
    for fresh, images in ((handle, inputs), (SPECIMENS[specimen]()[0], inputs)):
        with mode():
            assert fresh.features == expected and list(fresh.layers) == layers
            fresh.predict(images), fresh.score(images, f"{expected}:0")
            with fresh.watch(leaf=expected, through=True) as watch, torch.enable_grad():
                (gradient,) = torch.autograd.grad(watch(images)[:, 0].sum(), watch[expected])
        assert gradient.abs().sum() > 0


def test_frozen_parameters_and_train_mode() -> None:
    handle, inputs = SPECIMENS["residual"]()
    expected = plainly(handle.module, "layer2", inputs)
    handle.module.requires_grad_(False)
    handle.module.train()
    handle.module.layer1.eval()
    before = Snapshot(handle.module, inputs)
    with handle.watch("layer2", leaf="layer1", through=True) as watch, torch.enable_grad():
        (gradient,) = torch.autograd.grad(watch(inputs)[:, 0].sum(), watch["layer1"])
    assert torch.equal(watch["layer2"], expected) and gradient.abs().sum() > 0
    assert before.differences() == []
    assert handle.module.layer2.training and not handle.module.layer1.training


# -- layers that are not there ----------------------------------------------------------------------------------------


class Spare(nn.Module):
    """One layer runs for large images only, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.large, self.never = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > 100:
            x = self.large(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_layers_that_do_not_run() -> None:
    handle = tl.wrap(Spare().eval(), input_size=(3, 8, 8))
    for name in ("never", "large"):
        words = f"no layer '{name}' that runs in the forward pass"
        with pytest.raises(UnknownName, match=words), handle.watch(name):
            pass
    with pytest.raises(UnknownName, match=r"no layer 'cnov'; did you mean 'conv'\?"), handle.watch("cnov"):
        pass


def test_a_layer_that_ran_when_traced_and_does_not_now() -> None:
    class Fickle(Spare):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((self.large(x) if x.mean() < 100 else x).mean((2, 3)))  # type: ignore[no-any-return]

    handle = tl.wrap(Fickle().eval(), input_size=(3, 8, 8))
    nn.init.ones_(handle.module.conv.weight)
    with pytest.raises(BadInput, match="'large' did not run in this forward pass"), handle.watch("large") as watch:
        watch(torch.full((1, 3, 8, 8), 100.0))


def test_what_an_earlier_run_saw_is_not_taken_for_this_one() -> None:
    class Sometimes(Spare):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((self.large(x) if x.mean() < 100 else x).mean((2, 3)))  # type: ignore[no-any-return]

    handle = tl.wrap(Sometimes().eval(), input_size=(3, 8, 8))
    nn.init.ones_(handle.module.conv.weight)
    with handle.watch("large") as watch:
        watch(torch.zeros(1, 3, 8, 8))
        with pytest.raises(BadInput, match="'large' did not run"):
            watch(torch.full((1, 3, 8, 8), 100.0))


def test_a_call_that_happened_when_traced_and_does_not_now() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3 if x.mean() < 50 else 1):
                x = self.conv(x)
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    handle = tl.wrap(Loop().eval(), input_size=(3, 8, 8))
    with pytest.raises(BadInput, match="ran 1 times in this forward pass"), handle.watch("conv#2") as watch:
        watch(torch.full((1, 3, 8, 8), 100.0))
    with handle.watch("conv") as watch:
        watch(torch.full((1, 3, 8, 8), 100.0))  # the plain name is the last call, whichever that is
    assert watch["conv"].shape == (1, 3, 8, 8)


# -- where to look in a class-token model -----------------------------------------------------------------------------


def test_features_of_a_class_token_model_is_the_last_layer_whose_patches_count() -> None:
    handle, inputs = SPECIMENS["vit_registers"]()
    assert handle.features == "blocks.2.norm1"
    after = ["blocks.2.norm2", "blocks.2.mlp", "blocks.2", "norm"]
    with handle.watch(*after, handle.features, through=True) as watch, torch.enable_grad():
        score = watch(inputs.clone().requires_grad_(True))[:, 0].sum()
        gradients = torch.autograd.grad(score, [watch[name] for name in [*after, handle.features]])
    patches = [gradient[:, 5:].abs().sum().item() for gradient in gradients]
    assert patches[:-1] == [0.0] * len(after) and patches[-1] > 0
    assert handle.layer(handle.features).size == (4, 6)


def test_features_before_a_unit_reach_it() -> None:
    handle, inputs = SPECIMENS["concat"]()
    wide = tl.explain(handle, inputs, target="wide:1", method="grad_cam")
    assert wide.layer == "stem" and wide.values.any()  # 'narrow' ends later, beside it
    tokens, images = SPECIMENS["vit_registers"]()
    found = tl.explain(tokens, images, target=tokens.embedding, method="grad_cam")
    assert found.layer == "blocks.2.norm1" and found.values.any()
