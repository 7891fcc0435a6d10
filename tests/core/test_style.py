"""Gram matrices against plain sums, the layers they are read from, colours matched, and memory told beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.vgg import cfgs, make_layers

import torchloupe as tl
from torchloupe_core import footprint
from torchloupe_core.colour import matched
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.style import Style, apart, gram, grams_of, layers_for, mixed_grams, stages


def maps(seed: int = 0, n: int = 2) -> Tensor:
    return torch.randn(n, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_gram_matrix_is_a_sum_over_places() -> None:
    given = maps()
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for image in range(2):
        for i in range(3):
            for j in range(3):
                for row in range(4):
                    for column in range(5):
                        expected[image, i, j] += given[image, i, row, column] * given[image, j, row, column]
    torch.testing.assert_close(gram(given), expected / (3 * 4 * 5))
    shuffled = given.flatten(2)[..., torch.randperm(20, generator=torch.Generator().manual_seed(1))].view_as(given)
    torch.testing.assert_close(gram(shuffled), gram(given))  # it knows nothing of places
    torch.testing.assert_close(gram(given.repeat(1, 1, 2, 3)), gram(given))  # nor of sizes


def test_the_gradient_of_a_gram_matrix_is_that_of_the_sum() -> None:
    given, weights = maps().requires_grad_(True), torch.randn(2, 3, 3, dtype=torch.float64)  # not symmetric
    (found,) = torch.autograd.grad((gram(given) * weights).sum(), given)
    plain = torch.einsum("nihw,njhw->nij", given, given) / (3 * 4 * 5)
    (expected,) = torch.autograd.grad((plain * weights).sum(), given)
    torch.testing.assert_close(found, expected)


def test_distances_are_relative() -> None:
    a, b = gram(maps(0)), gram(maps(1))
    expected = [((a[k] - b[k]) ** 2).sum() / (b[k] ** 2).sum() for k in range(2)]
    torch.testing.assert_close(apart(a, b), torch.stack(expected))
    torch.testing.assert_close(apart(9 * a, 9 * b), apart(a, b))


def test_a_mix_has_the_gradient_of_the_mean_distance() -> None:
    several, weights = [{"a": gram(maps(seed, 1))} for seed in (1, 2)], [0.3, 0.7]
    mix = mixed_grams(several, weights)["a"]
    leaf = maps(0, 1).requires_grad_(True)
    (one,) = torch.autograd.grad((gram(leaf) - mix).square().sum(), leaf)
    total = sum(w * (gram(leaf) - each["a"]).square().sum() for w, each in zip(weights, several, strict=True))
    (other,) = torch.autograd.grad(total, leaf)  # type: ignore[arg-type]
    torch.testing.assert_close(one, other)


def test_some_of_the_images_keep_their_own_grams() -> None:
    own, shared = gram(maps(n=3)), gram(maps(n=1))
    part = Style(("a", "b"), grams={"a": own, "b": shared}).only(1, 3)
    assert torch.equal(part.grams["a"], own[1:]) and torch.equal(part.grams["b"], shared)


def test_layers_are_the_last_of_each_resolution() -> None:
    vgg, own = tl.wrap(make_layers(cfgs["D"]), input_size=(3, 64, 64)), (3, 64, 64)
    assert stages(vgg, own)[:4] == ["3", "8", "15", "22"]  # relu1_2, relu2_2, relu3_3, relu4_3
    assert layers_for(vgg, own, None, None) == (("3", "8", "15", "22"), "22")
    demo = tl.load("demo")
    assert layers_for(demo, own, None, None) == (("layer1", "layer2"), "layer2")
    assert layers_for(demo, own, ["relu"], "layer3") == (("relu",), "layer3")
    for style, error, message in [
        (["layer9"], UnknownName, "no layer 'layer9'"),
        ([], BadInput, "no layer was given"),
        (["avgpool"], NotApplicable, "gives no map with several positions"),
    ]:
        with pytest.raises(error, match=message):
            layers_for(demo, own, style, None)


def test_grams_of_images_are_those_of_their_maps() -> None:
    handle, _ = SPECIMENS["residual"]()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = grams_of(handle, images, ["layer1", "layer2"])
    with handle.watch("layer1", "layer2") as watch:
        watch(handle.spec.normalised(images))
        torch.testing.assert_close(found["layer2"], gram(watch.map("layer2")))
    assert found["layer1"].shape == (3, 8, 8)


def test_colours_matched_have_the_mean_and_covariance_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + 0.05 * torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    like = torch.tensor([0.6, 0.5, 0.4]).view(3, 1, 1) + 0.06 * torch.einsum(
        "rc,nchw->nrhw",
        torch.tensor([[1.0, 0.2, 0.1], [0.9, 0.0, -0.1], [0.8, -0.3, 0.1]]).double(),
        torch.randn(2, 3, 20, 12, generator=generator, dtype=torch.float64),
    )
    found = matched(images, like)
    for one, other in zip(found, like, strict=True):
        torch.testing.assert_close(one.mean((1, 2)), other.mean((1, 2)), atol=2e-3, rtol=0)
        torch.testing.assert_close(torch.cov(one.flatten(1)), torch.cov(other.flatten(1)), atol=2e-4, rtol=0.05)
    torch.testing.assert_close(matched(like, like), like.clamp(0, 1), atol=1e-6, rtol=0)
    grey = torch.full((1, 3, 8, 8), 0.3)
    assert matched(grey, like[:1]).isfinite().all()


def test_what_is_kept_for_the_backward_pass_is_counted() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    handle = tl.wrap(module, input_size=(3, 32, 32))
    pixels = 32 * 32
    kept = footprint.kept_bytes(handle, (3, 32, 32), ["2"])
    assert 4 * pixels * (3 + 8) <= kept <= 4 * pixels * (3 + 8 + 8 + 4 + 3)
    assert footprint.kept_bytes(handle, (3, 64, 64), ["2"]) == pytest.approx(4 * kept, rel=0.05)
    assert footprint.kept_bytes(handle, (3, 32, 32), ["0"]) < kept


def test_what_does_not_fit_is_refused_with_the_size_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = tl.load("demo")
    monkeypatch.setattr(footprint, "available", lambda device: 2**31)
    monkeypatch.setattr("torchloupe_core.memory.available", lambda device: 2**31)
    with pytest.raises(
        BadInput, match=r"a step on 1 image of 4096x3072 takes .* GiB and 2.0 GiB are free .* size=(\d+)"
    ) as e:
        footprint.require_room(handle, (3, 4096, 3072), ["layer1", "layer2"], 1)
    fits = int(str(e.value).rsplit("size=")[1].split()[0])
    assert 1000 < fits < 4096
    footprint.require_room(handle, (3, fits, round(fits * 0.75)), ["layer1", "layer2"], 1)
    footprint.require_room(handle, (3, 64, 64), ["layer1", "layer2"], 1)
