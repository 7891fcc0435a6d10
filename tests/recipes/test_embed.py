"""`tl.embed` and `tl.features`: the data set as the model sees it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable, UnknownName
from torchloupe_core.specimens import SPECIMENS


@pytest.fixture(scope="module")
def scenes() -> Any:
    return tl.demo_scenes(300, 5)


@pytest.fixture(scope="module")
def seen(scenes: Any) -> tl.FeatureSet:
    return tl.features("demo", scenes)


def nearest_share(points: torch.Tensor, labels: torch.Tensor, k: int = 10) -> float:
    """How often the most frequent label of the k nearest others is the point's own."""
    gaps = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf)
    votes = labels[gaps.argsort(1)[:, :k]]
    return (votes.mode(1).values == labels).double().mean().item()


def test_features_are_the_input_of_the_classifier(scenes: Any, seen: tl.FeatureSet) -> None:
    model = tl.load("demo")
    assert seen.layer == "fc.in" and seen.vectors.shape == (300, 128)
    with model.watch("fc") as watch:
        watch(model.inputs(scenes.images[:5]))
        logits = watch["fc"]
    torch.testing.assert_close(model.module.fc(seen.vectors[:5]), logits)
    assert torch.equal(seen.labels, scenes.labels) and seen.classes == scenes.classes
    other = tl.features(model, scenes.images[:5], "layer2", batch_size=2)
    torch.testing.assert_close(other.vectors, tl.activations(model, scenes.images[:5], "layer2").maps.mean((2, 3)))


def test_principal_components_of_a_data_set(scenes: Any, seen: tl.FeatureSet) -> None:
    model = tl.load("demo")
    found = tl.embed(model, scenes, method="pca", dims=3)
    again = tl.embed(None, seen, method="pca", dims=3)
    assert torch.equal(found.points, again.points) and (found.forwards, again.forwards) == (300, 0)
    assert found.points.shape == (300, 3) and found.dims == 3 and len(found) == 300
    assert (found.method, found.backend, found.layer, found.seed) == ("sklearn.pca", "sklearn", "fc.in", 0)
    assert "scikit-learn" in found.versions and found.options == {"whiten": False, "pca": None}
    assert torch.equal(found.labels, scenes.labels) and found.indices.tolist() == list(range(300))
    assert found.classes == scenes.classes and found.names is None and found.skipped == {}
    assert 0.5 < found.diagnostics["trustworthiness"] < 1
    assert found.diagnostics["trustworthiness_images"] == 300


@pytest.mark.slow
def test_the_demo_s_classes_lie_apart_in_its_features_and_not_in_its_pixels(scenes: Any, seen: tl.FeatureSet) -> None:
    found = tl.embed(None, seen)
    assert found.method == "umap.umap" and nearest_share(found.points, found.labels) > 0.95
    tsne = tl.embed(None, seen, method="tsne")
    assert nearest_share(tsne.points, tsne.labels) > 0.95 and tsne.diagnostics["trustworthiness"] > 0.95
    flat = scenes.images.flatten(1).float()
    pixels = tl.FeatureSet(flat, torch.arange(300), scenes.labels, layer="pixels")
    assert nearest_share(tl.embed(None, pixels, pca=50).points, scenes.labels) < 0.3  # 12 classes: chance is .08


def test_components_first_are_laid_out_in_place_of_the_features(seen: tl.FeatureSet) -> None:
    seen = seen.some(range(80))
    found = tl.embed(None, seen, method="tsne", pca=20, iterations=250)
    shares = np.linalg.svd(seen.vectors.double().numpy() - seen.vectors.double().numpy().mean(0))[1] ** 2
    assert found.diagnostics["pca_variance"] == pytest.approx(shares[:20].sum() / shares.sum(), rel=1e-6)
    assert found.options["pca"] == 20
    plain = tl.embed(None, seen, method="tsne", iterations=250)
    assert not torch.equal(found.points, plain.points) and "pca_variance" not in plain.diagnostics


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for n in range(12):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{n:02}.png")
    (tmp_path / "05.png").write_bytes(b"nothing")
    found = tl.embed("demo", tmp_path, method="pca")
    assert len(found) == 11 and 5 not in found.indices.tolist()
    assert found.skipped == {str(tmp_path / "05.png"): f"{tmp_path / '05.png'} is not an image"}
    assert found.name(5) == str(tmp_path / "06.png") and not found.labelled
    with pytest.raises(BadInput, match=r"05\.png is not an image"):
        tl.embed("demo", tmp_path, method="pca", skip_failures=False)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="none of the 12 images could be read"):
        tl.embed("demo", tmp_path, method="pca")


def test_saved_and_opened(scenes: Any, tmp_path: Path) -> None:
    found = tl.embed("demo", scenes.images[:30], method="pca")
    again = tl.open(found.save(tmp_path / "points"))
    assert isinstance(again, tl.Embedding) and torch.equal(again.points, found.points)
    assert again.diagnostics == found.diagnostics and again.layer == "fc.in"
    with pytest.raises(BadInput, match="not at hand"):
        again.thumbnails()
    kept = tl.open(found.with_pictures(32).save(tmp_path / "pictured"))
    assert isinstance(kept, tl.Embedding) and torch.equal(kept.thumbnails(32), found.thumbnails(32))
    assert isinstance(tl.open(kept.grid().save(tmp_path / "grid")), tl.Grid)


def test_nothing_of_the_model_is_changed_not_even_by_an_error() -> None:
    handle, inputs = SPECIMENS["residual"]()
    handle.module.train()
    before = Snapshot(handle.module, inputs)
    tl.embed(handle, inputs, method="pca")
    with pytest.raises(BadInput, match="at least 4 images; got 3"):
        tl.embed(handle, inputs, method="tsne")
    with pytest.raises(UnknownName):
        tl.embed(handle, inputs, method="pca", layer="nowhere")
    assert before.differences() == []


def test_any_model_and_its_dtype() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    data = TensorDataset(torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2)
    found = tl.embed(module.double(), data, method="pca")
    assert found.layer == "3.in" and found.points.dtype == torch.float32
    torch.testing.assert_close(tl.embed(module, data, method="pca", dtype=torch.float32).points, found.points)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "umpa"}, UnknownName, "did you mean 'umap'"),
        ({"dims": 4}, BadInput, "2 or 3 dimensions; got dims=4"),
        ({"method": "pca", "pca": 10}, BadInput, "principal components as it is; leave out pca="),
        ({"method": "tsne", "pca": 2}, BadInput, "more components than the 2 dimensions wanted; got 2"),
        ({"method": "pca", "perplexity": 5}, BadInput, "sklearn.pca has no option 'perplexity'; its options: whiten"),
        ({"method": "pca", "layer": "layer9"}, UnknownName, "no layer 'layer9'"),
    ],
)
def test_what_cannot_be_asked(scenes: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tl.embed("demo", scenes.images[:5], **options)


def test_bad_data(seen: tl.FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="the data set is empty"):
        tl.embed("demo", [], method="pca")
    with pytest.raises(BadInput, match="all 6 images have the same features"):
        tl.embed("demo", torch.full((6, 3, 64, 64), 0.5), method="pca")
    with pytest.raises(BadInput, match="a single image"):
        tl.embed("demo", torch.rand(1, 3, 64, 64), method="pca")
    with pytest.raises(BadInput, match=r"features of layer 'fc\.in'; got layer='layer3'"):
        tl.embed(None, seen, layer="layer3")
    with pytest.raises(BadInput, match="without a model the data set is its features"):
        tl.embed(None, torch.rand(5, 3, 64, 64), method="pca")
    with pytest.raises(NotApplicable, match="name layer="):
        tl.embed(torch.nn.Conv2d(3, 4, 3), torch.rand(5, 3, 8, 8), method="pca")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingDependency, match=r"torchloupe\[umap\]"):
        tl.embed(None, seen)
