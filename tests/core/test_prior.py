"""Images made by a generator: its code is optimised, and the generator comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.adam import Adam
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.prior import Prior, as_prior
from torchloupe_core.regularizers import Patches
from torchloupe_core.specimens import SPECIMENS

QUICK: dict[str, Any] = {"progress": False, "transforms": "none", "read": "post"}


class Decoder(nn.Module):
    """Twelve numbers to 32 x 32 pixels in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.conv = nn.Linear(12, 8 * 8 * 8), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        maps = self.norm(self.fc(codes).view(-1, 8, 8, 8))
        return nn.functional.interpolate(self.conv(maps), scale_factor=4, mode="bilinear").sigmoid()


def decoder() -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder()


def test_the_code_is_that_of_a_plain_loop() -> None:
    handle, _ = SPECIMENS["plain"]()
    generator = decoder().eval()
    made = tl.visualize(handle, "conv2:3", prior=generator, steps=10, **QUICK)
    code = torch.randn(12, generator=torch.Generator().manual_seed(0))[None].requires_grad_(True)
    optimizer = Adam([code], 0.05)
    module = handle.module
    for _ in range(10):
        loss = -module.conv2(module.pool(module.relu1(module.conv1(generator(code)))))[:, 3].mean()
        optimizer.step(torch.autograd.grad(loss, code))
    torch.testing.assert_close(made.images, generator(code).detach(), atol=1e-5, rtol=0)
    assert made.backend == "native" and made.options["parametrization"].startswith("Prior(Decoder, code=(12,)")


def test_the_generator_comes_back_as_it_was() -> None:
    handle, _ = SPECIMENS["plain"]()
    generator = decoder().train()
    generator(torch.randn(4, 12)).sum().backward()
    before, model = Snapshot(generator), Snapshot(handle.module)
    tl.visualize(handle, ["conv2:3", "logit:cat"], prior=generator, steps=3, batch_size=1, **QUICK)
    assert before.differences() == [] and model.differences() == []
    with pytest.raises(BadInput, match=r"makes images \[n, 1, h, w\] of codes; it gave \[1, 3, 32, 32\]"):
        tl.visualize(SPECIMENS["grayscale"]()[0], "conv2:3", prior=generator, steps=3, **QUICK)
    assert before.differences() == []


def test_codes_stay_within_their_limits_and_decay() -> None:
    handle, _ = SPECIMENS["plain"]()
    generator = decoder().eval()
    seen: list[Tensor] = []
    generator.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
    prior = Prior(generator, (12,), limits=(0.0, 0.5), sd=2.0)
    tl.visualize(handle, "conv2:3", prior=prior, steps=20, lr=0.3, **QUICK)
    assert all(codes.min() >= 0 and codes.max() <= 0.5 for codes in seen) and seen[0].max() == 0.5
    sizes = []
    for decay in (0.0, 10.0):
        seen.clear()
        made = tl.visualize(handle, "conv2:3", prior=Prior(generator, (12,), decay=decay), steps=20, **QUICK)
        sizes.append(seen[-1].square().mean().item())
    assert sizes[1] < 0.5 * sizes[0]
    start = torch.randn(12, generator=torch.Generator().manual_seed(0)).square().mean().item()
    free = tl.visualize(handle, "conv2:3", prior=Prior(generator, (12,)), steps=1, **QUICK)
    assert (made.losses[0, 0] - free.losses[0, 0]).item() == pytest.approx(10 * start, rel=1e-4)


def test_a_denoiser_pulls_codes_along() -> None:
    """With a step of nothing, `pull` times the difference is added each time."""
    handle, _ = SPECIMENS["plain"]()
    generator = decoder().eval()
    seen: list[Tensor] = []
    generator.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
    prior = Prior(generator, (12,), denoise=lambda codes: torch.ones_like(codes), pull=0.25)
    tl.visualize(handle, "conv2:3", prior=prior, steps=8, lr=1e-9, **QUICK)
    start = torch.randn(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[-1][0], 1 + (start - 1) * 0.75**8, atol=1e-5, rtol=0)
    seen.clear()
    tl.visualize(handle, "conv2:3", prior=Prior(generator, (12,), noise=0.5), steps=200, lr=1e-9, **QUICK)
    assert (seen[-1] - seen[0]).std().item() == pytest.approx(0.5 * 200**0.5, rel=0.5)


def test_images_in_other_ranges_and_sizes() -> None:
    handle, _ = SPECIMENS["plain"]()
    inner = decoder().eval()

    class Symmetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, codes: Tensor) -> Tensor:
            return self.inner(codes) * 2 - 1  # type: ignore[no-any-return]

    one = tl.visualize(handle, "conv2:3", prior=inner, steps=4, **QUICK)
    same = tl.visualize(handle, "conv2:3", prior=Prior(Symmetric(), (12,), values="symmetric"), steps=4, **QUICK)
    torch.testing.assert_close(one.images, same.images, atol=1e-5, rtol=0)
    assert tl.visualize(handle, "conv2:3", prior=inner, size=40, steps=2, **QUICK).size == (40, 40)


def test_what_a_prior_may_be() -> None:
    assert as_prior(decoder()).code == (12,)
    with pytest.raises(BadInput, match=r"the size of the generator's codes is not known; give prior=tl.Prior\("):
        as_prior(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(BadInput, match="or a Prior; got int"):
        as_prior(3)  # type: ignore[arg-type]
    handle, _ = SPECIMENS["plain"]()
    with pytest.raises(BadInput, match="leave out parametrization="):
        tl.visualize(handle, "conv2:3", prior=decoder(), parametrization="pixel", **QUICK)
    with pytest.raises(NotApplicable, match="Lucent has no parametrisation Prior"):
        pytest.importorskip("lucent")
        tl.visualize(handle, "conv2:3", prior=decoder(), method="lucent", **QUICK)
    with pytest.raises(NotApplicable, match="cannot take up a given image"):
        tl.visualize(handle, "conv2:3", prior=decoder(), init=torch.rand(3, 32, 32), **QUICK)


# -- patches ----------------------------------------------------------------------------------------------------------


def test_patches_are_compared_with_their_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    database, images = torch.rand(3, 2, 9, 9, generator=generator), torch.rand(2, 2, 8, 8, generator=generator)
    prior = Patches(database, 2.0, size=3, stride=2, count=400)
    every = [
        database[n, :, top : top + 3, left : left + 3] for n in range(3) for top in range(7) for left in range(7)
    ]  # 400 draws find nearly all 147
    known = torch.stack([(one - one.mean((1, 2), keepdim=True)).flatten() for one in every])
    expected = []
    for image in images:
        apart = []
        for top in (0, 2, 4):
            for left in (0, 2, 4):
                patch = image[:, top : top + 3, left : left + 3]
                patch = (patch - patch.mean((1, 2), keepdim=True)).flatten()
                apart.append((known - patch).square().mean(1).min().item())
        expected.append(2 * sum(apart) / len(apart))
    assert prior.penalty(images).tolist() == pytest.approx(expected, rel=0.1)
    assert prior.penalty(database[:1, :, :8, :8]).item() < 0.02  # its own patches are there, and colours are free
    eight_bit = Patches((database * 255).round().to(torch.uint8), 2.0, size=3, stride=2, count=400)
    assert eight_bit.penalty(images).tolist() == pytest.approx(prior.penalty(images).tolist(), rel=0.02)
    with pytest.raises(BadInput, match=r"a data base of patches of 8 pixels is images \[N, C, H, W\]; got \[3, 4, 4\]"):
        Patches(torch.rand(3, 4, 4))


def test_a_data_base_of_patches_shapes_the_image() -> None:
    handle, _ = SPECIMENS["residual"]()
    stripes = torch.tensor([0.2, 0.8]).repeat(16)[None, None, None, :].expand(1, 3, 32, 32)
    options = {"steps": 40, "lr": 0.1, **QUICK}
    made = tl.visualize(handle, "logit:cat", regularizers=[Patches(stripes, 50.0, size=6, count=64)], **options).images
    assert made.diff(dim=3).abs().mean() > 2 * made.diff(dim=2).abs().mean()


# -- a generator of scenes --------------------------------------------------------------------------------------------


class Components(nn.Module):
    """A linear generator fitted to scenes: their mean and 48 principal components, codes of unit variance."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        flat = images.flatten(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, sizes, directions = torch.pca_lowrank(flat, q=48)
        self.fc = nn.Linear(48, flat.shape[1])
        with torch.no_grad():
            self.fc.weight.copy_(directions * sizes / len(images) ** 0.5)
            self.fc.bias.copy_(flat.mean(0))

    def forward(self, codes: Tensor) -> Tensor:
        return self.fc(codes).view(-1, 3, 64, 64)  # type: ignore[no-any-return]


def test_a_generator_of_scenes_moves_the_target_with_what_scenes_are_made_of() -> None:
    model = tl.load("demo")
    scenes = tl.demo_scenes(300, seed=11).images.float() / 255
    generator = Components(scenes).eval()
    prior = tl.Prior(generator, (48,), limits=(-3.0, 3.0))
    options: dict[str, Any] = {"steps": 60, "lr": 0.2, "method": "native", **QUICK}
    targets = ["logit:house", "logit:star", "logit:ring"]
    start = tl.visualize(model, targets, prior=prior, **{**options, "steps": 1, "lr": 1e-9})
    made = tl.visualize(model, targets, prior=prior, **options)
    free = tl.visualize(model, targets, parametrization="pixel", **options)
    assert (made.scores > start.scores + 3).all()
    directions = generator.fc.weight.detach()

    def outside(images: Tensor) -> float:
        """The share of an image that the generator cannot make."""
        away = images.flatten(1) - generator.fc.bias.detach()
        inside = torch.linalg.lstsq(directions, away.T).solution
        return float((away.T - directions @ inside).norm() / away.norm())

    assert outside(made.images) < 0.3 < 0.6 < outside(free.images)
