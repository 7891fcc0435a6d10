"""Recipes around optimised images: interactions, directions, spectra, prototypes, facets, accentuation, caricatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_adapters.sklearn import clusters
from torchloupe_core import animation
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.colour import as_colours
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable, UnknownName
from torchloupe_core.methods.patches import BANDS
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.terms import Caricature, Nearness

QUICK: dict[str, Any] = {"steps": 4, "method": "native", "progress": False}
SMALL: dict[str, Any] = {"steps": 12, "method": "native", "progress": False, "transforms": "none"}


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# -- interactions -----------------------------------------------------------------------------------------------------


def test_two_units_alone_added_subtracted_and_interpolated() -> None:
    handle, _ = SPECIMENS["residual"]()
    made = tl.interactions(handle, "layer2:3", "layer2:5", between=2, **QUICK)
    assert made.targets == (
        "layer2:3",
        "layer2:5",
        "layer2:3+layer2:5",
        "layer2:3-layer2:5",
        "layer2:5-layer2:3",
        *map(str, tl.interpolate("layer2:3", "layer2:5", 4)[1:-1]),
    )
    alone = tl.visualize(handle, "layer2:3", **QUICK)
    torch.testing.assert_close(made.images[:1], alone.images, atol=1e-4, rtol=0)
    assert len(tl.interactions(handle, "layer2:3", "logit:cat", between=0, **QUICK)) == 5


def test_channels_beside_random_directions(data: Tensor) -> None:
    handle, _ = SPECIMENS["residual"]()
    before = Snapshot(handle.module)
    found = tl.directions(handle, "layer2", data, n=2, k=3, seed=1, **QUICK)
    assert before.differences() == []
    assert found.images.shape == (4, 4, 3, 32, 32) and found.columns == (
        "optimised",
        *(f"example {i}" for i in (1, 2, 3)),
    )
    assert found.rows[0].startswith("layer2:") and found.rows[3] == "layer2: random direction 2"
    with handle.watch("layer2") as watch:
        watch(data)
        features = watch.map("layer2")  # [12, 16, h, w]
    vectors = torch.tensor(found.diagnostics["directions"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    for row in range(4):
        one_hot = torch.eye(features.shape[1])[int(found.rows[row].split(":")[1])] if row < 2 else vectors[row - 2]
        along = torch.einsum("nchw,c->nhw", features, one_hot).amax((1, 2))  # a search counts the largest
        best = along.argsort(descending=True, stable=True)[:3]
        assert found.indices[row].tolist() == [-1, *best.tolist()]
        torch.testing.assert_close(found.values[row, 1:], along[best], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.images[row, 1:], handle.spec.display(data[best]))
    chosen = tl.directions(handle, "layer2", data, channels=[7], n=1, k=20, **QUICK)
    assert chosen.rows[0] == "layer2:7" and chosen.images.shape[1] == 13  # all there are


def test_random_directions_are_the_seeds(data: Tensor) -> None:
    handle, _ = SPECIMENS["plain"]()
    one, again, other = (tl.directions(handle, "conv2", data, n=1, k=1, seed=seed, **QUICK) for seed in (1, 1, 2))
    assert one.rows == again.rows and torch.equal(one.images, again.images)
    assert one.diagnostics["directions"] != other.diagnostics["directions"]


def test_a_spectrum_goes_from_the_lowest_answer_to_the_highest(data: Tensor) -> None:
    handle, _ = SPECIMENS["residual"]()
    found = tl.spectrum(handle, ["layer2:3", "logit:cat"], data, **QUICK)
    assert found.rows == ("layer2:3", "logit:cat") and len(found.columns) == 7
    assert found.diagnostics["read"] == ["layer2.relu#2.in:3", "logit:cat"]  # behind the ReLU there is nothing below 0
    with handle.watch("layer2.relu#2.in") as watch:
        watch(data)
        unit = watch.map("layer2.relu#2.in")[:, 3].amax((1, 2))
    logits = handle.score(data, "logit:cat")
    for row, scores in enumerate((unit, logits)):
        expected = tl.examples(handle, data, found.diagnostics["read"][row], k=5, crop="image", band="spectrum")
        assert found.columns[1:6] == expected.bands == BANDS
        assert found.indices[row].tolist() == [-1, *expected.indices[0].tolist(), -1]
        assert expected.indices[0][[0, 4]].tolist() == [scores.argmin().item(), scores.argmax().item()]
        torch.testing.assert_close(found.values[row, 1:6], scores[expected.indices[0]], atol=1e-4, rtol=1e-4)
    negative = tl.visualize(handle, "-layer2.relu#2.in:3", **QUICK)
    torch.testing.assert_close(found.picture("layer2:3", "optimised negative"), negative.images[0], atol=1e-4, rtol=0)
    largest = handle.score(handle.spec.normalised(negative.images), "layer2.relu#2.in:3", reduce="max")
    assert found.values[0, 0].item() == pytest.approx(largest.item(), abs=1e-3)  # as the examples are scored
    with pytest.raises(BadInput, match="no column 'least'; there are optimised negative, minimum"):
        found.picture(0, "least")


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    model = tl.load("demo")
    for index, scene in enumerate(tl.demo_scenes(3).images):
        Image.fromarray(scene.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    found = tl.spectrum(model, "logit:fish", tmp_path, **{**QUICK, "steps": 1})
    ((path, why),) = found.diagnostics["skipped"].items()
    assert path == str(tmp_path / "bad.png") and "not an image" in why
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(BadInput, match="none of the 4 images could be read"):
        tl.spectrum(model, "logit:fish", tmp_path, **QUICK)


def test_the_image_of_a_class_as_in_2013_and_today() -> None:
    model = tl.load("demo")
    found = tl.class_prototype(model, ["fish", "house"], steps=12, method="native", progress=False)
    assert found.rows == ("logit:fish", "logit:house") and found.columns == ("L2 of pixels, 2013", "today")
    historic = tl.visualize(
        model,
        ["logit:fish", "logit:house"],
        parametrization=tl.parametrizations.Pixel(sd=0.0, colours=None),
        regularizers={"l2": 100.0},
        **SMALL,
    )
    torch.testing.assert_close(found.images[:, 0], historic.images)
    lighter = tl.class_prototype(model, "fish", weight=0.0, steps=12, method="native", progress=False)
    assert lighter.values[0, 0] > found.values[0, 0]  # the norm costs
    assert tl.class_prototype(model, 3, steps=1, method="native").rows == ("logit:3",)
    with pytest.raises(UnknownName, match="zebra"):
        tl.class_prototype(model, "zebra", **QUICK)


def test_galleries_are_saved_and_drawn(data: Tensor, tmp_path: Path) -> None:
    handle, _ = SPECIMENS["plain"]()
    found = tl.spectrum(handle, ["relu2:3", "conv2:1"], data, **QUICK)
    again = tl.open(found.save(tmp_path / "found"))
    assert isinstance(again, tl.Gallery) and torch.equal(again.images, found.images) and again.rows == found.rows
    figure, axes = found.plot()
    assert axes.shape == (2, 7) and axes[0][1].get_title(loc="left").startswith("minimum\n")
    assert axes[1][0].get_ylabel() == "conv2:1" and len(figure.axes) == 14
    assert found._repr_png_()[:4] == b"\x89PNG" and len(found) == 2


# -- directions of steepest rise --------------------------------------------------------------------------------------


def test_the_steepest_direction_under_three_norms(data: Tensor) -> None:
    handle, _ = SPECIMENS["plain"]()
    handle = handle.with_spec(mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25))
    found = tl.descents(handle, "conv2:3", data[:2])
    assert found.columns == ("given", "L2", "L-infinity", "decorrelated") and found.raw is not None
    leaf = handle.spec.pixels(data[:2]).requires_grad_(True)
    module = handle.module
    maps = module.conv2(module.pool(module.relu1(module.conv1(handle.spec.normalised(leaf)))))
    (gradient,) = torch.autograd.grad(maps[:, 3].mean((1, 2)).sum(), leaf)

    def cosine(one: Tensor, other: Tensor) -> float:
        return F.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()

    assert cosine(found.raw[0, 0], gradient[0]) == pytest.approx(1, abs=1e-5)
    assert torch.equal(found.raw[:, 1].sign(), gradient.sign())
    torch.testing.assert_close(found.raw.square().mean((2, 3, 4)), torch.ones(2, 3))
    # A A^T by hand: colours, then each frequency by its scale squared.
    matrix = as_colours("imagenet", 3)
    assert matrix is not None
    spectrum = torch.fft.rfft2(torch.einsum("rc,nrhw->nchw", matrix, gradient))
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)).clamp(min=1 / 32)
    smooth = torch.fft.irfft2(spectrum / frequency**2, s=(32, 32))
    expected = torch.einsum("rc,nchw->nrhw", matrix, smooth)
    assert cosine(found.raw[0, 2], expected[0]) == pytest.approx(1, abs=0.02)  # up to frequencies written down twice
    rough, fine = (found.raw[:, one].diff(dim=3).abs().mean() for one in (0, 2))
    assert fine < 0.7 * rough
    with pytest.raises(BadInput, match="3 targets for 2 images"):
        tl.descents(handle, ["conv2:1"] * 3, data[:2])


# -- from a given image -----------------------------------------------------------------------------------------------


def test_accentuation_stays_near_the_image() -> None:
    model = tl.load("demo")
    scenes = tl.demo_scenes(2).images
    start = scenes.float() / 255

    def far(weight: float) -> tuple[float, float]:
        made = tl.accentuate(model, scenes, "logit:fish", weight=weight, layer="layer2", **SMALL)
        with model.watch("layer2") as watch:
            watch(model.spec.normalised(made.images))
            one = watch.map("layer2").clone()
            watch(model.spec.normalised(start))
        torch.testing.assert_close(made.given, start, atol=1e-5, rtol=0)
        return (one - watch.map("layer2")).square().mean().item(), made.scores.mean().item()

    free, bound = far(0.0), far(300.0)
    assert bound[0] < 0.5 * free[0] and bound[1] < free[1]
    assert bound[1] > model.score(scenes, "logit:fish").mean()  # and yet it rises
    made = tl.accentuate(model, scenes, ["logit:fish", "logit:key"], **QUICK)
    assert made.targets == ("logit:fish", "logit:key") and made.options["terms"][0].startswith(
        "Nearness(layers=('layer2"
    )
    with pytest.raises(BadInput, match="name layer="):
        tl.accentuate(model, scenes, "conv1:2", **QUICK)


@pytest.mark.parametrize("method", ["native", "lucent"])
def test_the_given_image_is_seen_under_the_same_transforms(method: str) -> None:
    if method == "lucent":
        pytest.importorskip("lucent")
    handle, inputs = SPECIMENS["residual"]()
    inputs = inputs[:1].clamp(-1.5, 1.5) * 0.2 + 0.5
    options = {**SMALL, "transforms": "distill", "steps": 1, "lr": 1e-9, "layer": "layer1", "method": method}
    near = tl.accentuate(handle, inputs, "logit:cat", weight=1e6, **options)
    plain = tl.accentuate(handle, inputs, "logit:cat", weight=0.0, **options)
    assert (near.losses - plain.losses).abs().item() < 1.0  # of a million: it is where it was, wherever it was moved


def test_nearness_is_a_relative_squared_distance() -> None:
    handle, inputs = SPECIMENS["plain"]()
    with handle.watch("conv2") as watch:
        watch(inputs)
        maps = watch.map("conv2")
        reading = type("Seen", (), {"map": staticmethod(lambda name: maps)})()
        other = maps * 1.1
        share = Nearness(("conv2",), 2.0).penalty(reading, {"conv2": other})
    expected = 2 * (maps - other).square().mean((1, 2, 3)) / other.square().mean((1, 2, 3))
    torch.testing.assert_close(share, expected)


def test_a_caricature_excites_the_layer_as_the_image_does() -> None:
    model = tl.load("demo")
    scenes = tl.demo_scenes(2).images
    made = tl.caricature(model, scenes, "layer2", **{**SMALL, "steps": 40})
    assert made.targets == ("layer2", "layer2") and made.given is not None
    with model.watch("layer2") as watch:
        watch(model.inputs(scenes))
        given = watch.map("layer2").clone()
        watch(model.spec.normalised(made.images))
        found = watch.map("layer2")
    alike = F.cosine_similarity(found.flatten(1)[:, None], given.flatten(1)[None], dim=2)  # [made, given]
    assert alike[0, 0] > alike[0, 1] + 0.1 and alike[1, 1] > alike[1, 0] + 0.1
    with pytest.raises(NotApplicable, match="no caricature"):
        module = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 3))
        tl.caricature(tl.wrap(_Lines(module), input_size=(3, 8, 8)), torch.rand(1, 3, 8, 8), "inner.0", **QUICK)


class _Lines(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
def test_a_caricature_is_a_loop_over_positions(power: float) -> None:
    maps = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    given = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    reading = type("Seen", (), {"map": staticmethod(lambda name: maps)})()
    share = Caricature(("x",), 3.0, power=power).penalty(reading, {"x": given})
    for image in range(2):
        total = 0.0
        for row in range(3):
            for column in range(3):
                a, b = maps[image, :, row, column], given[image, :, row, column]
                dot = (a @ b).item()
                cosine = dot / (a.norm().item() * b.norm().item())
                total += dot * max(0.1, cosine) ** power
        assert share[image].item() == pytest.approx(-3 * total / 9, rel=1e-3)


# -- facets -----------------------------------------------------------------------------------------------------------


def test_facets_begin_with_the_mean_images_of_clusters() -> None:
    model = tl.load("demo")
    scenes = tl.demo_scenes(60, seed=5)
    houses, keys = (scenes.images[scenes.true_labels == scenes.classes.index(name)][:4] for name in ("house", "key"))
    images = torch.cat([houses, keys])
    made = tl.facets(model, "layer4:3", images, k=2, **{**SMALL, "steps": 1, "lr": 1e-9})
    labels = torch.tensor(made.diagnostics["labels"])
    assert len(made) == 2 and len(labels) == len(images) and (labels.bincount().diff() <= 0).all()
    pixels = images.float() / 255
    overall = pixels.mean((0, 2, 3), keepdim=True)
    for one in range(2):
        expected = (overall + pixels[labels == one].mean(0)) / 2
        torch.testing.assert_close(made.images[one : one + 1], expected, atol=1e-3, rtol=0)
    by_class = tl.facets(model, "layer4:3", images, labels=[7] * 4 + [2] * 4, **QUICK)
    assert by_class.diagnostics["labels"] == (1,) * 4 + (0,) * 4
    pulled = tl.facets(model, "layer4:3", images, labels=[0] * 4 + [1] * 4, pull=0.5, **QUICK)
    assert pulled.targets[0].startswith("layer4:3+0.5*layer4:[")
    assert made.diagnostics.get("indices") is None
    with pytest.raises(BadInput, match="k is from 1 to the 8 images"):
        tl.facets(model, "layer4:3", images, k=9, **QUICK)
    with pytest.raises(BadInput, match="8 images need as many labels"):
        tl.facets(model, "layer4:3", images, labels=[1, 2], **QUICK)


def test_facets_of_what_examples_found(tmp_path: Path) -> None:
    model, scenes = tl.load("demo"), tl.demo_scenes(20, seed=5)
    best = tl.examples(model, scenes.images, "layer4:3", k=6)
    made = tl.facets(model, "layer4:3", best, k=2, **QUICK)
    indices = torch.tensor(made.diagnostics["indices"])
    assert sorted(indices.tolist()) == sorted(best.indices[0].tolist())
    again = tl.facets(model, "layer4:3", scenes.images[indices], k=2, **QUICK)
    assert made.diagnostics["labels"] == again.diagnostics["labels"]
    torch.testing.assert_close(made.images, again.images, atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="was saved no longer knows its data set"):
        tl.facets(model, "layer4:3", tl.open(best.save(tmp_path / "best")), k=2, **QUICK)


def test_facets_of_an_embedding_begin_with_the_images_nearest_each_centre() -> None:
    model, scenes = tl.load("demo"), tl.demo_scenes(40, seed=5)
    laid_out = tl.embed(model, scenes.images, method="pca", progress=False)
    made = tl.facets(model, "layer4:3", laid_out, k=2, **QUICK)
    indices, labels = torch.tensor(made.diagnostics["indices"]), torch.tensor(made.diagnostics["labels"])
    groups = clusters(laid_out.points.numpy(), 2)
    for one in range(2):
        own = np.flatnonzero(groups == one)
        far = np.linalg.norm(laid_out.points.numpy()[own] - laid_out.points.numpy()[own].mean(0), axis=1)
        assert sorted(indices[labels == one].tolist()) == sorted(own[far.argsort()[:15]].tolist())
    assert 15 < len(indices) <= 30
    again = tl.facets(model, "layer4:3", scenes.images[indices], labels=labels, **QUICK)
    torch.testing.assert_close(made.images, again.images, atol=1e-5, rtol=0)


# -- moving pictures --------------------------------------------------------------------------------------------------


def test_a_run_as_a_gif(tmp_path: Path) -> None:
    handle, _ = SPECIMENS["plain"]()
    made = tl.visualize(handle, ["conv2:1", "conv2:2", "conv2:3"], snapshots=range(1, 7, 2), **{**QUICK, "steps": 6})
    path = made.animate(tmp_path / "run.gif", fps=10)
    with Image.open(path) as image:
        assert image.n_frames >= 4 and image.info["duration"] == 100 and image.size == (2 * 128 + 2, 2 * 128 + 2)
        image.seek(0)
        shown = np.asarray(image.convert("RGB")).astype(float) / 255
    first = made.at(1)[0].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)
    assert np.abs(shown[:128, :128] - first).mean() < 0.05 and (shown[130:, 130:] == 1).all()  # 256 colours
    with pytest.raises(BadInput, match="there are no snapshots to show"):
        tl.visualize(handle, "conv2:1", **QUICK).animate(tmp_path / "none.gif")
    with pytest.raises(BadInput, match=r"\.gif or an \.mp4 file; got 'run.avi'"):
        made.animate(tmp_path / "run.avi")
    with pytest.raises(BadInput, match="fps is above 0"):
        made.animate(tmp_path / "run.gif", fps=0)


def test_a_run_as_an_mp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, _ = SPECIMENS["plain"]()
    made = tl.visualize(handle, "conv2:1", snapshots=[1, 2], **QUICK)
    monkeypatch.setattr(animation.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="ffmpeg is not installed"):
        made.animate(tmp_path / "run.mp4")
    fake = tmp_path / "ffmpeg"
    fake.write_text('#!/bin/sh\nfor last; do :; done\nprintf "%s\\n" "$@" > "$last"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(animation.shutil, "which", lambda name: str(fake))
    asked = made.animate(tmp_path / "run.mp4", fps=8).read_text().splitlines()
    assert asked[asked.index("-framerate") + 1] == "8" and "libx264" in asked
    fake.write_text("#!/bin/sh\necho no such codec >&2\nexit 1\n")
    with pytest.raises(BadInput, match="ffmpeg fails: no such codec"):
        made.animate(tmp_path / "run.mp4")
