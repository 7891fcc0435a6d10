"""`tl.dream`: a plain loop, octaves, tiles, pictures of any size, and what was made kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, BadTarget, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.methods.dream import octave_sizes
from torchloupe_core.spec import Spec
from torchloupe_core.specimens import SPECIMENS

PLAIN: dict[str, Any] = {"progress": False}


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth picture in 8 bits."""
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth[0] * 255).round().byte()


def test_an_octave_is_a_plain_loop() -> None:
    handle, _ = SPECIMENS["plain"]()
    handle = handle.with_spec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    made = tl.dream(handle, photo(40, 52), "relu2", octaves=1, steps=6, lr=0.02, jitter=5, read="post", **PLAIN)
    module, mean, std = handle.module, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    x, source, losses = photo(40, 52)[None].float() / 255, torch.Generator().manual_seed(0), []
    for _ in range(6):
        shift = torch.randint(-5, 6, (2,), generator=source).tolist()
        leaf = x.clone().requires_grad_(True)
        shown = (leaf.roll(shift, (2, 3)) - mean[:, None, None]) / std[:, None, None]
        value = module.relu2(module.conv2(module.pool(module.relu1(module.conv1(shown))))).square().mean()
        (gradient,) = torch.autograd.grad(value, leaf)
        x = (x + 0.02 * gradient / gradient.abs().mean()).clamp(0, 1)
        losses.append(-value.item())
    torch.testing.assert_close(made.images, x, atol=1e-4, rtol=0)
    assert made.losses[0].tolist() == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 1.2 * losses[0] < 0
    assert made.given is not None and torch.equal(made.given, photo(40, 52)[None].float() / 255)
    assert (made.method, made.backend, made.target) == ("deepdream", "native", "relu2")


def test_octaves_go_from_coarse_to_fine() -> None:
    assert octave_sizes((100, 50), 3, 2.0) == [(25, 12), (50, 25), (100, 50)]
    assert octave_sizes((100, 50), 3, 2.0, least=(30, 20)) == [(50, 25), (100, 50)]
    handle, _ = SPECIMENS["residual"]()
    sizes: list[tuple[int, ...]] = []
    handle.module.conv1.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
    made = tl.dream(handle, photo(48, 64), "layer1", octaves=3, steps=4, octave_scale=1.5, **PLAIN)
    assert made.options["octaves"] == [[21, 28], [32, 43], [48, 64]]
    assert [one for at, one in enumerate(sizes) if at == 0 or sizes[at - 1] != one] == [(21, 28), (32, 43), (48, 64)]
    assert made.losses.shape == (1, 12)
    alone = tl.dream(handle, photo(48, 64), "layer1", octaves=1, steps=4, **PLAIN)
    assert made.scores[0] > alone.scores[0]  # it builds on what the smaller sizes began
    assert made.given is not None
    coarse = (
        nn.functional.avg_pool2d(made.images - made.given, 8),
        nn.functional.avg_pool2d(alone.images - made.given, 8),
    )
    assert coarse[0].abs().mean() > coarse[1].abs().mean()


def test_a_large_picture_is_seen_in_tiles_only() -> None:
    handle, _ = SPECIMENS["residual"]()
    sizes: set[tuple[int, ...]] = set()
    handle.module.conv1.register_forward_pre_hook(lambda _, args: sizes.add(tuple(args[0].shape[2:])))
    made = tl.dream(handle, photo(100, 70), "layer1", octaves=2, octave_scale=2.0, steps=5, tile=32, **PLAIN)
    assert sizes == {(32, 32)}
    whole = tl.dream(handle, photo(100, 70), "layer1", octaves=2, octave_scale=2.0, steps=5, tile=None, **PLAIN)
    assert (
        made.given is not None
        and made.scores[0] > 1.2 * handle.score(handle.spec.normalised(made.given), "layer1").item()
    )
    assert made.scores[0].item() == pytest.approx(whole.scores[0].item(), rel=0.25)
    change = (made.images - made.given).abs().mean((0, 1))  # no tile and no seam is left out, or stands out
    blocks = nn.functional.avg_pool2d(change[None, None], 10)
    assert blocks.min() > 0.2 * blocks.mean() and blocks.max() < 3 * blocks.mean()
    with pytest.raises(BadInput, match=r"layer1:2@1,1 names a place, but the picture is shown in tiles"):
        tl.dream(handle, photo(100, 70), "layer1:2@1,1", tile=32, octaves=1, **PLAIN)


def test_a_model_of_one_size_sees_tiles_of_it() -> None:
    handle, _ = SPECIMENS["vit_registers"]()  # 32 x 48
    made = tl.dream(handle, photo(64, 80), "blocks.1:2", octaves=4, steps=2, **PLAIN)
    assert made.size == (64, 80) and made.options["tile"] == [32, 48]
    assert made.options["octaves"] == [[46, 57], [64, 80]]
    with pytest.raises(BadInput, match="the model sees 32x48 only and the picture is 30x80; scale it up with size="):
        tl.dream(handle, photo(30, 80), "blocks.1:2", **PLAIN)
    assert tl.dream(handle, photo(30, 80), "blocks.1:2", size=140, octaves=1, steps=1, **PLAIN).size == (52, 140)


def test_pictures_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(photo(30, 44).permute(1, 2, 0).numpy()).save(path)
    options: dict[str, Any] = {"octaves": 1, "steps": 2, **PLAIN}
    named = tl.dream("demo", path, "layer1", **options)
    assert named.size == (30, 44)
    model = tl.load("demo")
    inputs = model.spec.normalised(photo(30, 44)[None].float() / 255)
    for other in (np.asarray(Image.open(path)), Image.open(path), inputs):
        torch.testing.assert_close(tl.dream(model, other, "layer1", **options).images, named.images, atol=1e-3, rtol=0)
    assert tl.dream("demo", path, "layer1", size=66, **options).size == (45, 66)
    two = tl.dream(model, [path, path], ["layer1", "logit:fish"], **options)
    assert two.targets == ("layer1", "logit:fish")
    torch.testing.assert_close(two.images[0], named.images[0], atol=1e-3, rtol=0)
    one = tl.dream(model, path, ["layer1", "logit:fish"], **options)
    torch.testing.assert_close(one.images, two.images)
    grey, _ = SPECIMENS["grayscale"]()
    assert tl.dream(grey, path, "conv2:1", **options).size == (30, 44)


def test_targets_rise_and_nothing_is_left_behind(tmp_path: Path) -> None:
    model, scene = tl.load("demo"), tl.demo_scenes(1, seed=3).images
    before = Snapshot(model.module)
    for target in ("layer2", "layer3:5", "logit:fish", "layer3:5+0.1*logit:fish"):
        made = tl.dream(model, scene, target, octaves=2, steps=5, **PLAIN)
        assert made.scores[0] > model.score(scene, target)[0]
    assert before.differences() == []
    again = tl.open(made.save(tmp_path / "dream"))
    assert isinstance(again, tl.Visualization) and torch.equal(again.images, made.images)
    one, other = (tl.dream(model, scene, "layer2", octaves=1, steps=3, seed=seed, **PLAIN) for seed in (0, 1))
    assert not torch.equal(one.images, other.images)


class Failing(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.conv, self.end, self.what = nn.Conv2d(3, 4, 3), nn.Identity(), what

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        return self.end(self.what(self.conv(x)) if CALLS[0] == CALLS[1] else self.conv(x))


CALLS = [0, 0]


def failing(at: int, what: Any) -> Handle:
    torch.manual_seed(0)
    handle = Handle(Failing(what), Spec(input_size=(3, 12, 12)))
    for size in (10, 20):
        handle.trace((3, size, size))
    CALLS[:] = 0, at
    return handle


def interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_nan_and_ctrl_c_keep_what_was_made() -> None:
    options: dict[str, Any] = {"octaves": 2, "octave_scale": 2.0, "steps": 4, "read": "post", **PLAIN}
    made = tl.dream(failing(4, lambda x: x * float("nan")), photo(20, 20), "end", **options)
    assert made.stopped == "the target or its gradient is NaN or infinite after step 3"
    assert made.images.isfinite().all() and made.size == (20, 20) and made.losses.shape == (1, 3)
    with pytest.raises(KeyboardInterrupt):
        tl.dream(failing(8, interrupt), photo(20, 20), "end", **options)
    kept = tl.dream(failing(8, interrupt), photo(20, 20), "end", interruptible=True, **options)
    assert kept.stopped == "interrupted after step 2" and kept.losses.shape == (1, 6) and kept.size == (20, 20)
    between = tl.dream(failing(6, interrupt), photo(20, 20), "end", interruptible=True, **options)
    assert between.stopped == "interrupted after octave 1" and between.size == (20, 20)
    small = tl.dream(failing(0, interrupt), photo(20, 20), "end", **{**options, "octaves": 1, "octave_scale": 2.0})
    assert kept.given is not None and not torch.equal(kept.images, kept.given) and small.size == (20, 20)
    with pytest.raises(KeyboardInterrupt):  # nothing was made
        tl.dream(failing(1, interrupt), photo(20, 20), "end", interruptible=True, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "layer9"}, UnknownName, "no layer 'layer9'"),
        ({"target": "layer3:99"}, BadTarget, "channels 0 to 95"),
        ({"octaves": 0}, BadInput, "octaves is at least 1"),
        ({"octave_scale": 1.0}, BadInput, "each above 1 times as large"),
        ({"steps": 0}, BadInput, "steps is at least 1"),
        ({"lr": 0.0}, BadInput, "lr is above 0"),
        ({"size": 0}, BadInput, "size is at least 1"),
        ({"tile": 0}, BadInput, "tile is at least 1"),
        ({"image": "nowhere.png"}, BadInput, "no such image file"),
        ({"image": torch.randn(1, 3, 64, 64) * 9}, BadInput, "which is no picture"),
        ({"image": torch.rand(1, 4, 64, 64)}, BadInput, "the model takes 3 channels"),
        ({"image": [photo(20, 20), photo(20, 24)]}, BadInput, "different sizes"),
        ({"target": ["layer1", "layer2"], "image": [photo(20, 20)] * 3}, BadInput, "2 targets for 3 images"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"image": photo(32, 32), "target": "layer2", **options}
    with pytest.raises(error, match=message):
        tl.dream("demo", given.pop("image"), given.pop("target"), **given, **PLAIN)
