"""A borrowed model comes back exactly as it was, whatever happened meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchloupe_core import borrow
from torchloupe_core.borrow import borrowed, kept_randomness
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.handle import Handle
from torchloupe_core.specimens import SPECIMENS


def _model() -> nn.Module:
    """A model in the middle of training: mixed flags, some parameters frozen, some with gradients."""
    module = SPECIMENS["residual"]()[0].module
    for index, part in enumerate(module.modules()):
        part.training = index % 2 == 0
    for index, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        parameter.grad = torch.ones_like(parameter) if index % 2 else None
    return module


def test_inside_everything_is_eval_frozen_and_without_gradients() -> None:
    module = _model()
    with torch.inference_mode(), borrowed(module):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.enable_grad():
            inputs = torch.randn(2, 3, 32, 32, requires_grad=True)
            (gradient,) = torch.autograd.grad(module(inputs)[:, 0].sum(), inputs)
    assert gradient.abs().sum() > 0


def _hook(module: nn.Module) -> None:
    module.conv1.register_forward_hook(lambda *_: None)
    module.conv1.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    module.fc.register_full_backward_hook(lambda *_: None)
    module.fc.register_full_backward_pre_hook(lambda *_: None)
    module.layer1.register_state_dict_post_hook(lambda *_: None)


def _train(module: nn.Module) -> None:
    module.train()
    module(torch.randn(2, 3, 32, 32))  # moves the statistics


def _thaw(module: nn.Module) -> None:
    module.requires_grad_(True)
    with torch.enable_grad():
        module(torch.randn(2, 3, 32, 32)).sum().backward()


def _rebuild(module: nn.Module) -> None:
    module.relu = nn.Softplus()
    module.extra = nn.Linear(2, 2)
    module.register_buffer("seen", torch.zeros(1), persistent=False)
    del module.fc
    module.layer1.conv1.weight = nn.Parameter(torch.zeros(8, 8, 3, 3))
    module.bn1.running_mean = torch.ones(8)
    module.layer2.forward = lambda x: x
    module.conv1.stride = (2, 2)


def _draw(module: nn.Module) -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)


def _clear(module: nn.Module) -> None:
    module.zero_grad()
    module.bn1.reset_running_stats()


DAMAGE = [_hook, _train, _thaw, _rebuild, _draw, _clear]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("damage", DAMAGE)
def test_everything_is_put_back(damage: Callable[[nn.Module], None], error: type[BaseException] | None) -> None:
    module = _model()
    before = Snapshot(module)
    raised = None if error is None else error("inside")
    try:
        with borrowed(module):
            damage(module)
            assert before.differences()
            if raised is not None:
                raise raised
    except BaseException as caught:
        if caught is not raised:
            raise
    assert before.differences() == []


def test_containers_that_a_model_fills_while_it_runs_are_put_back() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.seen: list[int] = []
            self.cache: dict[int, Tensor] = {}
            self.sizes: set[int] = set()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            self.cache[len(x)] = x
            self.sizes.add(len(x))
            self.calls += 1
            return self.fc(x)  # type: ignore[no-any-return]

    module = Remembers()
    module(torch.zeros(1, 4))
    before = Snapshot(module)
    with borrowed(module):
        module(torch.zeros(2, 4))
        assert len(module.seen) == 2
    assert before.differences() == []
    assert module.seen == [1] and list(module.cache) == [1] and module.sizes == {1} and module.calls == 1


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("step", ["_module_keeper", "_parameter_keeper", "_buffer_keeper", "_uncompiled"])
def test_an_interrupt_while_borrowing_leaves_nothing(step: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, done, real = _model(), [0], getattr(borrow, step)

    def interrupted(*arguments: object) -> object:
        done[0] += 1
        if done[0] > at or step == "_uncompiled":
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(borrow, step, interrupted)
    before = Snapshot(module)
    with pytest.raises(KeyboardInterrupt), borrowed(module):
        pass
    assert before.differences() == []


def test_an_interrupt_half_way_through_freezing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, real, done = _model(), nn.Parameter.requires_grad_, [0]

    def interrupted(parameter: nn.Parameter, required: bool = True) -> Tensor:
        done[0] += 1
        if done[0] == 4:
            raise KeyboardInterrupt
        return real(parameter, required)

    before = Snapshot(module)
    monkeypatch.setattr(nn.Parameter, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt), borrowed(module):
        pass
    assert before.differences() == []


def test_the_users_own_train_method_is_not_called() -> None:
    class Particular(nn.Sequential):
        def train(self, mode: bool = True) -> Particular:
            raise AssertionError("train() was called")

    module = Particular(nn.Linear(2, 2))
    with borrowed(module):
        assert not module[0].training
    assert module.training and module[0].training


def test_shared_parts_are_put_back_once() -> None:
    shared = nn.Linear(3, 3)
    module = nn.Sequential(shared, nn.ReLU(), shared)
    module.append(nn.Linear(3, 3))
    module[3].weight = shared.weight
    before = Snapshot(module)
    with borrowed(module):
        module(torch.zeros(1, 3))
    assert before.differences() == []


def test_a_model_made_in_inference_mode_can_be_borrowed() -> None:
    with torch.inference_mode():
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with borrowed(module):
        assert module(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    assert module.training


def test_a_handle_may_be_borrowed_again_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, _ = SPECIMENS["plain"]()
    times, real = [0], borrow.borrowed

    def counted(module: nn.Module) -> object:
        times[0] += 1
        return real(module)

    monkeypatch.setattr("torchloupe_core.handle.borrowed", counted)
    for _ in range(2):
        with handle.borrow(), handle.borrow(), pytest.raises(ZeroDivisionError), handle.borrow():
            raise ZeroDivisionError
    assert times == [2]
    other = Handle(handle.module)
    with other.borrow():
        pass
    assert times == [3]


def test_two_handles_on_one_model_may_nest() -> None:
    module = _model()
    before = Snapshot(module)
    with Handle(module).borrow(), Handle(module).borrow():
        module(torch.zeros(1, 3, 32, 32))
    assert before.differences() == []


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_kept_randomness(error: type[BaseException] | None) -> None:
    draw = lambda: (torch.rand(2).tolist(), np.random.random(), random.random())  # noqa: E731
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    try:
        with kept_randomness():
            draw()
            if error is not None:
                raise error
    except BaseException as caught:
        assert type(caught) is error
    assert draw() == expected


def test_no_hooks_no_files_no_randomness_at_construction() -> None:
    module = _model()
    before = Snapshot(module)
    Handle(module)
    assert before.differences() == []


@pytest.mark.parametrize("way", ["wrapper", "method", "part"])
def test_compiled_models_run_as_plain_python(way: str) -> None:
    module = SPECIMENS["plain"]()[0].module
    inputs = torch.randn(2, 3, 32, 32)
    expected = module(inputs)
    if way == "wrapper":
        module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    elif way == "method":
        module.compile(backend="eager")
    else:
        module.conv2 = torch.compile(module.conv2, backend="eager")
    ran: list[str] = []
    before = Snapshot(module)
    with borrowed(module), torch.enable_grad():
        handle = module.get_submodule("_orig_mod.relu1" if way == "wrapper" else "relu1")
        handle.register_forward_hook(lambda *_: ran.append("relu1"))
        assert torch.allclose(module(inputs), expected)
    assert ran == ["relu1"]
    assert before.differences() == []
    assert torch.allclose(module(inputs), expected)
