"""`tl.invert`: the loss against a plain loop, errors that fall with the steps and grow with depth, and what tv does."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.canvas import Draw
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.methods.inversion import distances
from torchloupe_core.parametrizations import Pixel
from torchloupe_core.spec import Spec
from torchloupe_core.specimens import SPECIMENS

PLAIN: dict[str, Any] = {"progress": False}
STAGES = ["relu", "layer1", "layer2", "layer4"]
KEPT = (5, 15, 40)


@functools.cache
def scenes() -> Tensor:
    images: Tensor = tl.demo_scenes(4, seed=5).images
    return images


@functools.cache
def inverted() -> tl.Visualization:
    return tl.invert("demo", scenes(), STAGES, steps=40, snapshots=KEPT, **PLAIN)


def test_what_is_minimised_is_the_distance_and_the_variation() -> None:
    handle, _ = SPECIMENS["plain"]()
    handle = handle.with_spec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    given = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    inputs = handle.spec.normalised(given)
    options: dict[str, Any] = {"parametrization": Pixel(colours=None), "optimizer": "adam", "lr": 0.05, **PLAIN}
    made = tl.invert(handle, inputs, "relu2", tv=0.7, power=1.0, steps=15, **options)
    module = handle.module

    def features(x: Tensor) -> Tensor:
        x = handle.spec.normalised(x)
        return module.relu2(module.conv2(module.pool(module.relu1(module.conv1(x)))))  # type: ignore[no-any-return]

    goal = features(given).detach()
    numbers = (Draw(0, 0, 1)(3, 32, 32) * 0.01).requires_grad_(True)
    optimizer, losses = torch.optim.Adam([numbers], lr=0.05), []
    for _ in range(15):
        x = numbers.sigmoid()
        squares = x.diff(dim=2)[..., :-1].square() + x.diff(dim=3)[:, :, :-1].square()
        loss = (features(x) - goal).square().mean() / goal.square().mean() + 0.7 * (squares + 1e-8).sqrt().mean()
        (numbers.grad,) = torch.autograd.grad(loss, numbers)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(made.images, numbers.detach().sigmoid(), atol=1e-4, rtol=0)
    assert made.losses[0].tolist() == pytest.approx(losses, abs=2e-4)
    relative = (features(made.images) - goal).square().mean() / goal.square().mean()
    assert made.scores.item() == pytest.approx(relative.item(), rel=1e-3)


def test_the_error_falls_from_step_to_step() -> None:
    made = inverted()
    assert made.losses.shape == (16, 40) and (made.losses.diff(dim=1) <= 1e-7).all()
    model, given = tl.load("demo"), scenes().float() / 255
    for row, layer in enumerate(STAGES):
        part = slice(4 * row, 4 * row + 4)
        errors = torch.stack([distances(model, made.at(step)[part], given, [layer])[:, 0] for step in KEPT])
        assert (errors.mean(1).diff() < 0).all(), layer
        torch.testing.assert_close(errors[-1], made.scores[part], rtol=1e-3, atol=1e-4)


def test_more_is_lost_in_deeper_layers() -> None:
    made = inverted()
    lost = torch.tensor(made.diagnostics["rmse"]).view(len(STAGES), 4).mean(1)
    assert (lost.diff() > 0.02).all()
    truth = (made.images - scenes().repeat(len(STAGES), 1, 1, 1).float() / 255).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(torch.tensor(made.diagnostics["rmse"]), truth)
    seen = [dict(row) for row in made.diagnostics["fidelity"]]
    early = torch.tensor([[row["relu"] for row in seen[4 * k : 4 * k + 4]] for k in range(len(STAGES))]).mean(1)
    assert (early.diff() > 0).all()  # as the first layer sees it
    for index, row in enumerate(seen):
        assert row[made.targets[index]] == pytest.approx(made.scores[index].item())
    model = tl.load("demo")  # and yet what the layer knows is enough to see the same
    then, now = (model.predict(images) for images in (scenes(), model.spec.normalised(made.images[4:8])))
    assert [one[0].name for one in then] == [one[0].name for one in now]


def test_tv_trades_distance_for_smoothness() -> None:
    found = []
    for tv in (0.0, 3.0, 100.0):
        made = tl.invert("demo", scenes(), "relu", tv=tv, steps=30, **PLAIN)
        found.append((made.scores.mean().item(), made.images.diff(dim=3).square().mean().item()))
    errors, variations = zip(*found, strict=True)
    assert list(errors) == sorted(errors) and errors[2] > 2 * errors[0]
    assert list(variations) == sorted(variations, reverse=True) and variations[2] < 0.5 * variations[0]


def test_the_classical_row() -> None:
    made = tl.invert("demo", scenes()[:1], STAGES, steps=2, **PLAIN)
    assert made.targets == tuple(STAGES) and len(made) == 4 and made.given is not None and len(made.given) == 4
    _, axes = made.plot(curve=True)
    titles = [one.get_title(loc="left") for one in axes[0]]
    assert titles[0] == "given" and len(titles) == 5
    assert titles[1] == f"relu\ndistance {made.scores[0].item():.3g}"
    assert made.options["optimizer"] == "lbfgs" and made.options["regularizers"] == [
        "TotalVariation(weight=0.3, power=2.0)"
    ]
    one = made[2]
    assert one.target == "layer2" and one.diagnostics["rmse"] == made.diagnostics["rmse"][2:3]


@pytest.mark.parametrize(
    "specimen", ["residual", "concat", "depthwise", "inplace", "nhwc", "vit_registers", "grayscale"]
)
def test_any_model_can_be_inverted(specimen: str) -> None:
    layers = {
        "residual": "layer1",
        "concat": "stem",
        "depthwise": "project",
        "inplace": "conv2",
        "nhwc": "window_block",
    }
    handle, batch = SPECIMENS[specimen]()
    layer = {**layers, "vit_registers": "blocks.1", "grayscale": "conv2"}[specimen]
    before = Snapshot(handle.module)
    given = torch.rand(batch[:1].shape, generator=torch.Generator().manual_seed(0))
    made = tl.invert(handle, handle.spec.normalised(given), layer, tv=0.0, steps=25, **PLAIN)
    assert made.losses[0, -1] < 0.6 * made.losses[0, 0] and made.images.isfinite().all()
    assert before.differences() == []


class Failing(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.conv, self.end, self.what = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), what

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        y = self.conv(x)
        return self.end(self.what(y) if CALLS[0] == CALLS[1] else y)


CALLS = [0, 0]


def failing(at: int, what: Any) -> Handle:
    torch.manual_seed(0)
    handle = Handle(Failing(what), Spec(input_size=(3, 12, 12)))
    handle.trace()
    CALLS[:] = 0, at
    return handle


def interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_nan_and_ctrl_c_keep_the_last_good_image() -> None:
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    made = tl.invert(failing(7, lambda x: x * float("nan")), image, "end", steps=9, **PLAIN)
    assert made.stopped == "the target or its gradient is NaN or infinite after step 4"
    assert made.images.isfinite().all() and made.losses.shape == (1, 4)
    assert made.scores[0] <= made.losses[0, -1] + 1e-6  # the best place seen, not the last one tried
    with pytest.raises(KeyboardInterrupt):
        tl.invert(failing(7, interrupt), image, "end", steps=9, **PLAIN)
    kept = tl.invert(failing(7, interrupt), image, ["end", "conv"], steps=9, interruptible=True, **PLAIN)
    assert kept.targets == ("end",) and kept.stopped == "interrupted after step 4"
    tl.invert(failing(0, interrupt), image, "end", steps=3, **PLAIN)
    first = CALLS[0] + 1  # the first step of another layer
    two = tl.invert(failing(first, interrupt), image, ["end", "end"], steps=3, interruptible=True, **PLAIN)
    assert two.targets == ("end",) and two.stopped == "interrupted" and two.losses.shape == (1, 3)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x) - 100)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "layer9"}, UnknownName, "no layer 'layer9'"),
        ({"layer": []}, BadInput, "no layer was given"),
        ({"tv": -1.0}, BadInput, "tv is at least 0"),
        ({"optimizer": "sgd"}, BadInput, 'optimizer is "lbfgs" or "adam"'),
        ({"steps": 0}, BadInput, "steps is at least 1"),
        ({"transforms": "distill"}, BadInput, "invert decides on transforms itself"),
        ({"image": torch.randn(1, 3, 64, 64) * 9}, BadInput, "which is no picture"),
        ({"image": torch.rand(1, 1, 64, 64)}, BadInput, "the model takes 3 channels"),
        ({"parametrization": "fuorier"}, UnknownName, "fourier"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"image": scenes()[:1], "layer": "layer1", **options}
    with pytest.raises(error, match=message):
        tl.invert("demo", given.pop("image"), given.pop("layer"), **given, **PLAIN)


def test_a_silent_layer_leaves_nothing_to_compare() -> None:
    handle = Handle(Silent(), Spec(input_size=(3, 12, 12)))
    with pytest.raises(NotApplicable, match="layer 'relu' is zero everywhere for image 0"):
        tl.invert(handle, torch.rand(1, 3, 12, 12), "relu", **PLAIN)
