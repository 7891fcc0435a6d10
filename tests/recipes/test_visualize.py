"""`tl.visualize`: images against a plain loop, every kind of target and model, units that are off, and no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.adam import Adam
from torchloupe_core.canvas import Draw
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, BadTarget, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.spec import Spec
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.terms import similarity
from torchloupe_core.transforms import Crops, Jitter

NATIVE: dict[str, Any] = {"method": "native", "progress": False}
PLAIN: dict[str, Any] = {**NATIVE, "transforms": "none"}


def score(handle: Handle, made: tl.Visualization) -> list[float]:
    return handle.score(handle.spec.normalised(made.images), list(made.targets)).tolist()


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_the_image_is_that_of_a_plain_loop() -> None:
    handle, _ = SPECIMENS["plain"]()
    handle = handle.with_spec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    made = tl.visualize(
        handle, "relu2:3", steps=20, parametrization=tl.parametrizations.Pixel(colours=None), read="post", **PLAIN
    )
    module, mean, std = handle.module, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    pixels = (torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))[None] * 0.01).requires_grad_(True)
    optimizer, losses = Adam([pixels], lr=0.05), []
    for _ in range(20):
        x = (pixels.sigmoid() - mean[:, None, None]) / std[:, None, None]
        loss = -module.relu2(module.conv2(module.pool(module.relu1(module.conv1(x)))))[:, 3].mean()
        optimizer.step(torch.autograd.grad(loss, pixels))
        losses.append(loss.item())
    torch.testing.assert_close(made.images, pixels.detach().sigmoid(), atol=1e-5, rtol=0)
    assert made.losses[0].tolist() == pytest.approx(losses, abs=1e-5)
    assert made.scores.tolist() == pytest.approx(score(handle, made), abs=1e-5)


def test_the_forward_pass_stops_at_the_last_layer_read() -> None:
    handle, _ = SPECIMENS["residual"]()
    ran: list[str] = []
    handle.module.layer2.register_forward_pre_hook(lambda *_: ran.append("layer2"))
    handle.trace()
    ran.clear()
    made = tl.visualize(handle, "layer1:2", steps=3, **{**NATIVE, "read": "post"})
    assert ran.count("layer2") == 1  # when other units are asked what they think of it
    assert made.forwards == 3 + 1 + 1


def test_what_comes_back() -> None:
    handle, _ = SPECIMENS["residual"]()
    made = tl.visualize(handle, ["layer2:3", "logit:cat"], n=2, steps=6, snapshots=[2, 6], **NATIVE)
    assert isinstance(made, tl.Visualization) and len(made) == 4
    assert made.images.shape == (4, 3, 32, 32) and made.images.dtype == torch.float32
    assert made.images.min() >= 0 and made.images.max() <= 1
    assert made.targets == ("layer2:3", "layer2:3", "logit:cat", "logit:cat")
    assert made.losses.shape == (4, 6) and made.losses.isfinite().all()
    assert made.scores.tolist() == pytest.approx(score(handle, made), abs=1e-5)
    assert made.snapshots is not None and made.snapshots.shape == (2, 4, 3, 32, 32) and made.snapshot_steps == (2, 6)
    assert torch.equal(made.at(6), made.images) and not torch.equal(made.at(2), made.images)
    assert (made.method, made.backend, made.seed, made.stopped, made.alpha) == ("native", "native", 0, "", None)
    assert made.seconds > 0 and set(made.versions) == {"torchloupe", "torch"}
    assert made.options["steps"] == 6 and made.options["parametrization"].startswith("Fourier(")
    with pytest.raises(BadInput, match="no snapshot after step 3; there are 2, 6"):
        made.at(3)


def test_one_of_several_and_saving(tmp_path: Path) -> None:
    handle, _ = SPECIMENS["residual"]()
    made = tl.visualize(handle, ["layer2:3", "logit:cat"], steps=4, snapshots=[1], **NATIVE)
    second = made[-1]
    assert second.target == "logit:cat" and len(second) == 1 and torch.equal(second.images, made.images[1:])
    assert second.losses.shape == (1, 4) and second.scores.tolist() == made.scores[1:].tolist()
    assert second.snapshots is not None and second.snapshots.shape == (1, 1, 3, 32, 32)
    assert second.diagnostics["seen_as"] == made.diagnostics["seen_as"][1:]
    again = tl.open(made.save(tmp_path / "made"))
    assert isinstance(again, tl.Visualization)
    assert torch.equal(again.images, made.images) and again.targets == made.targets
    assert again.snapshot_steps == (1,) and again.diagnostics == dict(made.diagnostics)
    with pytest.raises(IndexError):
        made[2]


def test_what_other_units_think_of_it() -> None:
    handle, _ = SPECIMENS["residual"]()
    made = tl.visualize(handle, ["logit:cat", "layer1:2"], steps=30, **NATIVE)
    x = handle.spec.normalised(made.images)
    guesses = handle.predict(x)
    seen_as = made.diagnostics["seen_as"]
    assert [name for name, _ in seen_as[0]] == [guess.name for guess in guesses[0]]
    assert [value for _, value in seen_as[0]] == pytest.approx([guess.logit for guess in guesses[0]], abs=1e-4)
    with handle.watch("layer1") as watch:
        watch(x[1:])
        means = watch.map("layer1").mean((2, 3))[0]
    assert made.diagnostics["units"][0] == []
    best = means.argsort(descending=True)[:5].tolist()
    assert [name for name, _ in made.diagnostics["units"][1]] == [f"layer1:{index}" for index in best]


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_seeds(seed: int) -> None:
    handle, _ = SPECIMENS["plain"]()
    torch.manual_seed(seed % 1000)
    one, again = (tl.visualize(handle, "relu2:3", steps=3, seed=seed, **NATIVE) for _ in range(2))
    other = tl.visualize(handle, "relu2:3", steps=3, seed=seed - 1 if seed else 1, **NATIVE)
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert one.seed == seed


def test_an_image_does_not_depend_on_its_company() -> None:
    handle, _ = SPECIMENS["residual"]()
    targets = ["layer2:3", "logit:cat", "layer1:2", "-layer1.conv1:4", "prob:dog"]
    whole = tl.visualize(handle, targets, steps=8, **NATIVE)
    for size in (1, 2):
        parts = tl.visualize(handle, targets, steps=8, batch_size=size, snapshots=[3], **NATIVE)
        torch.testing.assert_close(parts.images, whole.images, atol=1e-4, rtol=0)
        torch.testing.assert_close(parts.losses, whole.losses, atol=1e-4, rtol=0)
        assert parts.snapshots is not None and parts.snapshots.shape == (1, 5, 3, 32, 32)
    alone = tl.visualize(handle, targets[0], steps=8, **NATIVE)
    torch.testing.assert_close(alone.images, whole.images[:1], atol=1e-4, rtol=0)


# -- targets and models -----------------------------------------------------------------------------------------------

LAYERS = {
    "plain": "relu2",
    "residual": "layer2",
    "concat": "norm",
    "depthwise": "project",
    "inplace": "conv2",
    "nhwc": "window_block",
    "vit_registers": "blocks.1",
    "grayscale": "conv2",
}


@pytest.mark.parametrize("specimen", LAYERS)
def test_every_target_rises_on_every_model(specimen: str) -> None:
    handle, _ = SPECIMENS[specimen]()
    layer = LAYERS[specimen]
    ramp = torch.linspace(-1, 1, handle.layer(layer).channels or 0)
    direction = tl.direction(layer, ramp, power=2.0)
    targets = [
        f"{layer}:1",
        f"{layer}:2@1,1",
        f"{layer}:2@center",
        layer,
        "logit:bee",
        "prob:bee",
        "margin:bee",
        f"-{layer}:3",
        f"{layer}:1+0.5*logit:bee",
        direction,
        *tl.interpolate(f"{layer}:1", f"{layer}:2", 3)[1:2],
    ]
    early = tl.visualize(handle, targets, steps=1, **PLAIN)
    late = tl.visualize(handle, targets, steps=40, **PLAIN)
    assert late.targets == tuple(map(str, map(tl.target, map(str, targets))))
    for text, before, after in zip(late.targets, early.scores.tolist(), late.scores.tolist(), strict=True):
        assert after > before or (text.startswith("-") and before == after == 0), text  # off already
    assert (late.images - 0.5).abs().flatten(1).amax(1).min() > 0.05  # none is grey
    assert late.images.shape == (len(targets), 3, *handle.input_shape[1:])


def test_images_of_one_channel_are_grey_pictures() -> None:
    handle, _ = SPECIMENS["grayscale"]()
    made = tl.visualize(handle, "conv2:1", steps=5, **NATIVE)
    assert torch.equal(made.images[:, 0], made.images[:, 2])
    x = made.images[:, :1]
    assert handle.score(x, "conv2:1").tolist() == pytest.approx(made.scores.tolist(), abs=1e-5)


def test_sizes() -> None:
    handle, _ = SPECIMENS["residual"]()
    assert tl.visualize(handle, "layer1:2", steps=2, size=20, **NATIVE).images.shape == (1, 3, 20, 20)
    assert tl.visualize(handle, "layer1:2", steps=2, size=(20, 26), **NATIVE).size == (20, 26)
    fixed, _ = SPECIMENS["vit_registers"]()  # shown at 32 x 48 whatever the image
    made = tl.visualize(fixed, "blocks.1:2", steps=2, size=(40, 60), **NATIVE)
    assert made.size == (40, 60) and made.options["shown"] == [32, 48]
    crops = tl.visualize(handle, "layer1:2", steps=2, size=80, transforms=[Crops(0.3, 0.5, views=3)], **NATIVE)
    assert crops.size == (80, 80) and crops.options["shown"] == [32, 32]
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert tl.visualize(module, "0:1", steps=2, size=16, **NATIVE).size == (16, 16)
    with pytest.raises(BadInput, match="input size is not known"):
        tl.visualize(module, "0:1", steps=2, **NATIVE)


def test_double_and_half_precision() -> None:
    handle, _ = SPECIMENS["residual"]()
    single, double = (
        tl.visualize(handle, "layer2:3", steps=6, dtype=dtype, **NATIVE).images
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single, double, atol=1e-4, rtol=0)
    for options in ({"dtype": torch.bfloat16}, {"precision": torch.bfloat16}):
        rough = tl.visualize(handle, "layer2:3", steps=6, memory_format=torch.channels_last, **options, **NATIVE)
        assert rough.images.dtype == torch.float32
        assert 0 < (rough.images - single).abs().max() < 0.2 and (rough.images - single).abs().mean() < 0.02


# -- options ----------------------------------------------------------------------------------------------------------


def test_views_are_averaged() -> None:
    """The loss of a step is the mean over crops, each shown at the model's size."""
    handle, _ = SPECIMENS["plain"]()
    crops = Crops(0.5, 0.5, views=3)
    made = tl.visualize(
        handle, ["relu2:3", "conv2:1"], steps=1, size=64, transforms=[crops], **{**NATIVE, "read": "post"}
    )
    start = [
        tl.parametrizations.Fourier()
        .canvas(Draw(0, index, index + 1), (3, 64, 64), torch.device("cpu"), torch.float32)
        .images()
        for index in range(2)
    ]
    shown = crops(torch.cat(start).detach(), torch.Generator().manual_seed(0))
    for index, target in enumerate(made.targets):
        assert handle.score(shown[index::2], target).mean().item() == pytest.approx(
            -made.losses[index, 0].item(), abs=1e-5
        )


def test_start_from_images() -> None:
    model = tl.load("demo")
    scenes = tl.demo_scenes(2).images
    made = tl.visualize(model, "logit:fish", init=scenes[:1], steps=1, n=2, lr=1e-6, **PLAIN)
    torch.testing.assert_close(made.images, (scenes[:1].float() / 255).expand(2, -1, -1, -1), atol=0.02, rtol=0)
    each = tl.visualize(model, ["logit:fish", "logit:key"], init=model.inputs(scenes), steps=1, lr=1e-6, **PLAIN)
    torch.testing.assert_close(each.images, scenes.float() / 255, atol=0.02, rtol=0)
    larger = tl.visualize(model, "logit:fish", init=scenes[:1], size=80, steps=1, lr=1e-6, **PLAIN)
    assert larger.size == (80, 80) and (larger.images.mean() - made.images.mean()).abs() < 0.01
    with pytest.raises(BadInput, match="init holds 2 images for 3; give one for all, or one for each"):
        tl.visualize(model, ["logit:fish"] * 3, init=scenes, steps=1, **PLAIN)
    with pytest.raises(NotApplicable, match="cannot take up a given image"):
        tl.visualize(model, "logit:fish", init=scenes[:1], parametrization="cppn", steps=1, **PLAIN)


def test_regularizers_do_what_they_say() -> None:
    handle, _ = SPECIMENS["residual"]()

    def roughness(**options: Any) -> float:
        made = tl.visualize(handle, "layer2:3", steps=30, **options, **PLAIN)
        return float(made.images.diff(dim=3).abs().mean())

    plain = roughness()
    for name, strength in {
        "tv": 10.0,
        "l2": 10.0,
        "l1": 10.0,
        "blur": 1.0,
        "bilateral": 1.5,
        "gradient_blur": 2.0,
    }.items():
        assert roughness(regularizers={name: strength}) < 0.9 * plain, name
    clipped = tl.visualize(handle, "layer2:3", steps=8, regularizers={"clip_pixels": 0.3}, **PLAIN).images
    assert ((clipped - 0.5).abs().amax(1) < 1e-3).float().mean().item() == pytest.approx(0.3, abs=0.01)
    historic = tl.visualize(handle, "layer2:5", steps=20, transforms="yosinski", regularizers="yosinski", **NATIVE)
    assert ((historic.images - 0.5).abs().amax(1) < 1e-3).float().mean().item() > 0.09
    loss = tl.visualize(handle, "logit:cat", steps=1, regularizers={"l2": 100.0}, **{**PLAIN, "read": "post"}).losses
    start = tl.visualize(handle, "logit:cat", steps=1, **{**PLAIN, "read": "post"}).losses
    assert 0 < (loss - start).item() < 0.1  # the penalty of the faint noise at the start


def test_diversity_makes_images_differ() -> None:
    handle, _ = SPECIMENS["residual"]()

    def likeness(**options: Any) -> float:
        made = tl.visualize(handle, ["layer2:3", "layer2:5"], n=3, steps=40, **options, **PLAIN)
        with handle.watch("layer2") as watch:
            watch(handle.spec.normalised(made.images))
            maps = watch.map("layer2")
        return float(similarity(maps[:3]).mean() + similarity(maps[3:]).mean())

    assert likeness(diversity=50.0) < likeness() - 0.2
    apart = tl.visualize(handle, ["layer2:3", "layer2:5"], n=2, steps=4, diversity=1.0, batch_size=2, **PLAIN)
    together = tl.visualize(handle, ["layer2:3", "layer2:5"], n=2, steps=4, diversity=1.0, **PLAIN)
    torch.testing.assert_close(apart.images, together.images, atol=1e-4, rtol=0)
    for options, message in [
        ({"diversity": 1.0}, "make several with n="),
        ({"diversity": 1.0, "n": 4, "batch_size": 2}, "batch_size is at least 4"),
        ({"alignment": 1.0}, "compares neighbouring images"),
    ]:
        with pytest.raises(BadInput, match=message):
            tl.visualize(handle, "layer2:3", steps=2, **options, **PLAIN)


@pytest.mark.parametrize(("channels", "places"), [(4, 9), (12, 2)])  # with the matrices, and without writing them down
def test_likeness_is_that_of_gram_matrices_and_so_is_its_gradient(channels: int, places: int) -> None:
    maps = torch.randn(3, channels, places, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps.requires_grad_(True)
    grams = [one.flatten(1) @ one.flatten(1).T for one in maps]
    alike = torch.stack([torch.stack([(a * b).sum() / (a.norm() * b.norm()) for b in grams]).sum() - 1 for a in grams])
    torch.testing.assert_close(similarity(maps), alike)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mine, plain = (torch.autograd.grad((one * weights).sum(), maps)[0] for one in (similarity(maps), alike))
    torch.testing.assert_close(mine, plain)


def test_alignment_brings_neighbours_together() -> None:
    handle, _ = SPECIMENS["residual"]()
    path = tl.interpolate("layer2:3", "layer2:5", 4)

    def apart(**options: Any) -> float:
        made = tl.visualize(handle, path, steps=40, **options, **PLAIN)
        with handle.watch("layer2") as watch:
            watch(handle.spec.normalised(made.images))
            return float(watch.map("layer2").diff(dim=0).square().mean())

    plain = apart()
    assert apart(alignment=5.0) < 0.7 * plain
    shared = tl.visualize(handle, path, steps=10, parametrization="shared", batch_size=4, **PLAIN)
    assert shared.images.shape == (4, 3, 32, 32)
    with pytest.raises(BadInput, match="batch_size is at least 4"):
        tl.visualize(handle, path, steps=10, parametrization="shared", batch_size=2, **PLAIN)


def test_logits_are_compared_at_the_last_spatial_layer() -> None:
    handle, _ = SPECIMENS["residual"]()
    made = tl.visualize(handle, "logit:cat", n=2, diversity=0.1, steps=2, **PLAIN)
    assert made.options["terms"] == ["Diversity(layers=('layer2',), weight=0.1, group=2)"]


# -- units that are off -----------------------------------------------------------------------------------------------


def with_a_dead_unit(build: Callable[[], tuple[Handle, Tensor]] = SPECIMENS["plain"]) -> Handle:
    """Channel 3 of the last convolution is far below zero for the image that is begun with."""
    handle, _ = build()
    with torch.no_grad():
        handle.module.conv2.bias[3] = -0.1
    return handle


def test_a_unit_that_is_off_is_switched_on() -> None:
    handle = with_a_dead_unit()
    with pytest.raises(NotApplicable, match=r"relu2:3 has no gradient at the start.*read='pre'.*read='auto'"):
        tl.visualize(handle, "relu2:3", steps=60, **{**PLAIN, "read": "post"})
    for read in ("auto", "pre"):
        made = tl.visualize(handle, "relu2:3", steps=60, **{**PLAIN, "read": read})
        assert handle.score(handle.spec.normalised(made.images), "relu2:3").item() > 0, read
        assert made.targets == ("relu2:3",)


class Rectified(nn.Module):
    """A unit rectified by a function, off for the image that is begun with, and one that is on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 2, 3), nn.Identity()
        with torch.no_grad():
            self.conv.weight.fill_(0.1)
            self.conv.bias.copy_(torch.tensor([-1.7, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.conv(x)))


def test_a_gradient_of_zero_is_redirected_and_recorded() -> None:
    handle = Handle(Rectified(), Spec(input_size=(3, 16, 16)))
    made = tl.visualize(handle, ["end:0", "end:1"], steps=40, **PLAIN)
    off, on = made.diagnostics["redirected"]
    assert 0 < off < 40 and on == 0
    assert made.scores[0] > 0.1
    alone = tl.visualize(handle, "end:1", steps=40, **{**PLAIN, "read": "post"})
    torch.testing.assert_close(made.images[1], tl.visualize(handle, ["end:0", "end:1"], steps=40, **PLAIN).images[1])
    assert alone.scores[0].item() == pytest.approx(made.scores[1].item(), rel=0.05)  # which no redirection touches
    with pytest.raises(NotApplicable, match="does not end in a ReLU module"):
        tl.visualize(handle, "end:0", steps=4, **{**PLAIN, "read": "pre"})


def test_no_picture_of_the_demo_model_stays_grey() -> None:
    model = tl.load("demo")
    made = tl.visualize(model, ["layer3:1", "layer3:7"], steps=100, **NATIVE)  # off at the start
    assert (made.images - 0.5).abs().mean((1, 2, 3)).min() > 0.05
    assert (made.scores > 0).all()


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 2, 3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end((self.conv(x) * 10).round()).mean((2, 3))


def test_a_target_without_any_gradient_is_refused() -> None:
    handle = Handle(Rounding(), Spec(input_size=(3, 16, 16)))
    for read in ("auto", "pre", "post"):
        with pytest.raises(NotApplicable, match="end:0 has no gradient"):
            tl.visualize(handle, "end:0", steps=4, **{**PLAIN, "read": read})
    assert tl.visualize(handle, "conv:0", steps=4, **PLAIN).scores.isfinite().all()


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 2, 3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv(x).argmax(1, keepdim=True).float())


def test_a_target_cut_off_from_the_image_is_refused() -> None:
    handle = Handle(Detached(), Spec(input_size=(3, 16, 16)))
    with pytest.raises(NotApplicable, match="end:0 has no gradient with respect to the image"):
        tl.visualize(handle, "end:0", steps=4, **PLAIN)


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Does something else from its n-th call on."""

    def __init__(self, after: int, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.calls, self.after, self.what = nn.Conv2d(3, 4, 3), 0, after, what

    def forward(self, x: Tensor) -> Tensor:
        COUNT[0] += 1
        return self.conv(x) if COUNT[0] <= self.after else self.what(self.conv(x))


COUNT = [0]  # outside the module, whose attributes are put back


def failing(after: int, what: Callable[[Tensor], Tensor]) -> Handle:
    torch.manual_seed(0)
    handle = Handle(Failing(10**9, what), Spec(input_size=(3, 12, 12), classes=("a", "b")))
    handle.trace()
    handle.module.after = after
    COUNT[0] = 0
    return handle


def nan(x: Tensor) -> Tensor:
    return x * float("nan")


def test_nan_stops_the_run_and_keeps_the_last_good_image() -> None:
    made = tl.visualize(failing(5, nan), "conv:1", steps=9, **{**PLAIN, "read": "post"})
    assert made.stopped == ""  # the layer read comes before
    handle = failing(4, nan)
    handle = Handle(nn.Sequential(handle.module, nn.Identity()), handle.spec)
    handle.trace()
    COUNT[0] = 0
    made = tl.visualize(handle, "1:1", steps=9, snapshots=[2, 3, 4], **{**PLAIN, "read": "post"})
    assert made.stopped == "the target or its gradient is NaN or infinite after step 4"
    assert made.images.isfinite().all() and made.losses.shape == (1, 4)
    COUNT[0] = -(10**6)
    good = tl.visualize(handle, "1:1", steps=3, **{**PLAIN, "read": "post"})
    assert torch.equal(made.images, good.images)  # the last one whose value was seen to be finite


def test_nan_at_once_is_an_error() -> None:
    handle = failing(0, nan)
    handle = Handle(nn.Sequential(handle.module, nn.Identity()), handle.spec)
    with pytest.raises(BadInput, match="NaN or infinite for the image at the start"):
        tl.visualize(handle, "1:1", steps=9, **{**PLAIN, "read": "post"})


def interrupting(x: Tensor) -> Tensor:
    COUNT[0] = -(10**6)  # once
    raise KeyboardInterrupt


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("the model broke")


def test_ctrl_c_keeps_what_was_made_if_asked() -> None:
    with pytest.raises(KeyboardInterrupt):
        tl.visualize(sequence(5, interrupting), "1:1", steps=9, **PLAIN)
    made = tl.visualize(sequence(5, interrupting), "1:1", steps=9, interruptible=True, **PLAIN)
    assert made.stopped == "interrupted after step 5" and made.losses.shape == (1, 5)
    whole = tl.visualize(sequence(10**6, interrupting), "1:1", steps=9, snapshots=[4, 5], **PLAIN)
    assert torch.equal(made.images, whole.at(5)) and not torch.equal(made.images, whole.at(4))
    with pytest.raises(KeyboardInterrupt):  # nothing was made
        tl.visualize(sequence(0, interrupting), "1:1", steps=9, interruptible=True, **PLAIN)
    several = tl.visualize(
        sequence(16, interrupting), ["1:1", "1:2", "1:3"], steps=9, batch_size=1, interruptible=True, **PLAIN
    )
    assert several.targets == ("1:1", "1:2") and "interrupted after step" in several.stopped
    assert several.losses.shape[0] == 2 and several.losses[0].isfinite().all() and several.losses[1].isnan().any()


def sequence(after: int, what: Callable[[Tensor], Tensor]) -> Handle:
    handle = failing(after, what)
    whole = Handle(nn.Sequential(handle.module, nn.Identity()), handle.spec)
    COUNT[0] = -(10**6)
    whole.trace()
    tl.visualize(whole, "1:1", steps=1, **PLAIN)  # finds the place before the ReLU, once
    COUNT[0] = 0
    return whole


def memory(x: Tensor) -> Tensor:
    if len(x) > 2:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
    return x


def test_batches_too_large_for_the_memory_are_halved() -> None:
    handle = sequence(0, memory)
    made = tl.visualize(handle, [f"1:{index % 4}" for index in range(5)], steps=3, **PLAIN)
    assert len(made) == 5 and made.losses.isfinite().all()
    full = sequence(0, lambda x: memory(x.repeat(3, 1, 1, 1)))
    with pytest.raises(BadInput, match="the memory does not suffice for 1 image of 12x12; give a smaller size="):
        tl.visualize(full, "1:1", steps=3, **PLAIN)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "layer9:1"}, UnknownName, "layer9"),
        ({"target": "layer2:99"}, BadTarget, "channels 0 to 15"),
        ({"target": "layer2:1@40,1"}, BadTarget, "rows 0 to"),
        ({"target": "logit:zebra"}, UnknownName, "zebra"),
        ({"target": []}, BadInput, "no targets were given"),
        ({"n": 0}, BadInput, "n is at least 1"),
        ({"steps": 0}, BadInput, "steps is at least 1"),
        ({"size": 0}, BadInput, "size is a number of pixels"),
        ({"size": (8, -1)}, BadInput, "size is a number of pixels"),
        ({"lr": 0.0}, BadInput, "lr is above 0"),
        ({"read": "before"}, BadInput, '"auto", "pre" or "post"'),
        ({"snapshots": [9]}, BadInput, "snapshots are steps from 1 to 3"),
        ({"batch_size": 0}, BadInput, "batch_size is at least 1"),
        ({"parametrization": "furier"}, UnknownName, "fourier"),
        ({"transforms": "distil"}, UnknownName, "distill"),
        ({"regularizers": {"tvv": 1.0}}, UnknownName, "tv"),
        ({"method": "lucid"}, UnknownName, "lucent"),
        ({"size": 9, "transforms": [Jitter(9)]}, BadInput, "leaves nothing of images"),
    ],
)
def test_bad_input_is_said(options: dict[str, Any], error: type[Exception], message: str) -> None:
    handle, _ = SPECIMENS["residual"]()
    before = Snapshot(handle.module)
    with pytest.raises(error, match=message):
        tl.visualize(handle, **{"target": "layer2:1", "steps": 3, **NATIVE, **options})
    assert before.differences() == []


def test_an_image_smaller_than_the_network_allows_is_said() -> None:
    handle = Handle(nn.Sequential(nn.Conv2d(3, 4, 9), nn.MaxPool2d(4)), Spec(input_size=(3, 32, 32)))
    with pytest.raises(BadInput, match=r"the model fails on an input of 3x6x6: .*; its own size is 3x32x32"):
        tl.visualize(handle, "0:1", size=6, steps=3, **NATIVE)


# -- no trace ---------------------------------------------------------------------------------------------------------


def trained() -> Handle:
    """A model in train mode in the middle of training, with gradients and a frozen parameter."""
    handle, inputs = SPECIMENS["residual"]()
    handle.module.train()
    handle.module(inputs).sum().backward()
    handle.module.layer1.conv1.weight.requires_grad_(False)
    return handle


@pytest.mark.parametrize("batch_size", [None, 1])
def test_nothing_is_left_behind(batch_size: int | None) -> None:
    handle = trained()
    start = torch.rand(3, 32, 32)
    before = Snapshot(handle.module, start)
    tl.visualize(
        handle,
        ["layer2:3", "logit:cat"],
        steps=4,
        init=start,
        batch_size=batch_size,
        regularizers="yosinski",
        snapshots=[2],
        **NATIVE,
    )
    assert before.differences() == []


@pytest.mark.parametrize("what", [broken, interrupting])
def test_nothing_is_left_behind_after_an_exception(what: Callable[[Tensor], Tensor]) -> None:
    handle = sequence(3, what)
    before = Snapshot(handle.module)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        tl.visualize(handle, "1:1", steps=9, **PLAIN)
    assert before.differences() == []


def test_nothing_is_left_behind_after_a_run_that_was_stopped() -> None:
    handle = sequence(3, interrupting)
    before = Snapshot(handle.module)
    assert tl.visualize(handle, "1:1", steps=9, interruptible=True, **PLAIN).stopped
    assert before.differences() == []


def test_under_no_grad_and_inference_mode() -> None:
    handle, _ = SPECIMENS["plain"]()
    expected = tl.visualize(handle, "relu2:3", steps=4, **NATIVE).images
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(tl.visualize(handle, "relu2:3", steps=4, **NATIVE).images, expected)


# -- drawings ---------------------------------------------------------------------------------------------------------


def test_drawings() -> None:
    handle, _ = SPECIMENS["plain"]()
    made = tl.visualize(handle, [f"relu2:{index}" for index in range(9)], steps=2, **NATIVE)
    figure, axes = made.plot()
    assert [len(row) for row in axes] == [5, 5]
    assert axes[0][1].get_title(loc="left").startswith("relu2:1\n= ")
    assert len(axes[1][3].images) == 1 and len(axes[1][4].images) == 0
    few = made.figure(most=4)
    assert few.get_supxlabel() == "4 of 9 images"
    steps = tl.visualize(handle, "relu2:1", n=2, steps=3, snapshots=[1, 2], **NATIVE)
    figure, axes = steps.plot(curve=True)
    assert [len(row) for row in axes] == [3, 3] and axes[0][0].get_title(loc="left") == "step 1"
    assert len(figure.axes) == 7 and len(figure.axes[-1].lines) == 2
    assert steps._repr_png_()[:4] == b"\x89PNG"


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("specimen", ["residual", "vit_registers"])
def test_compiled_passes_give_the_same_image(specimen: str) -> None:
    """With the backend that runs the captured graph as it is, so that no compiler is needed."""
    handle, _ = SPECIMENS[specimen]()
    targets = [f"{handle.features}:3", "logit:cat"]
    before = Snapshot(handle.module)
    plain, compiled = (
        tl.visualize(handle, targets, steps=6, compile=backend, **NATIVE) for backend in (False, "eager")
    )
    assert (plain.images - compiled.images).abs().max() < 1e-3
    assert (plain.images - 0.5).abs().max() > 0.02 and before.differences() == []
    with pytest.raises(NotApplicable, match="leave out compile="):
        tl.accentuate(
            handle, torch.rand(1, *handle.input_shape), "logit:cat", steps=1, compile="eager", method="native"
        )


@pytest.mark.slow
def test_passes_are_compiled_once_whatever_the_crop() -> None:
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    handle, _ = SPECIMENS["plain"]()
    tl.visualize(handle, "conv2:3", steps=6, compile="eager", **{**NATIVE, "transforms": "distill"})
    assert counters["unique_graphs"] - before == 1
