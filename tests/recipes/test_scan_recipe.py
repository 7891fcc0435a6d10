"""A data set scanned once: what other verbs ask of it comes without another pass, and is what a pass gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import torchloupe as tl
from torchloupe_core.errors import BadInput, StoreError, UnknownName

LAYERS = ["layer3", "layer4", "fc.in"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, scenes = tmp_path_factory.mktemp("photos"), tl.demo_scenes(70, 3)
    for place in range(len(scenes)):
        image, label = scenes[place][:2]
        file = folder / scenes.classes[int(label)] / f"{place:03d}.png"
        file.parent.mkdir(exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image.permute(1, 2, 0).numpy())).save(file)
    (folder / scenes.classes[0] / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "store"
    tl.scan("demo", photos, LAYERS, store=path, scores=["prob:car"], k=5, batch_size=8)
    return path


def test_what_a_scan_says_of_itself(photos: Path, store: Path) -> None:
    model = tl.load("demo")
    found = tl.scan(model, photos, LAYERS, store=store, scores=["prob:car"], k=5)
    assert (found.images, found.layers, found.targets, found.forwards) == (70, tuple(LAYERS), ("prob:car",), 0)
    assert list(found.skipped) == [str(next(photos.rglob("broken.png")))]
    assert found.classes == tuple(sorted(one.name for one in photos.iterdir()))
    maps = tl.activations(model, list(found.features("layer4").names or ()), "layer4").maps
    mean, variance = found.moments("layer4")
    torch.testing.assert_close(mean, maps.mean((0, 2, 3)).double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(variance, maps.var((0, 2, 3), correction=0).double(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.extremes("layer4").scores[:, 0], maps.amax((0, 2, 3)))
    torch.testing.assert_close(found.extremes("layer4", largest=False).scores[:, 0], maps.amin((0, 2, 3)))
    again = tl.Scan.open(store)
    assert (again.images, again.layers, again.skipped) == (found.images, found.layers, found.skipped)
    with pytest.raises(UnknownName, match=r"no layer 'layer2' in .*'layer3'"):
        found.moments("layer2")


@pytest.mark.parametrize("target", ["layer4", "layer3:17", ["layer4:5", "layer4:2", "layer3:1"], "prob:car"])
@pytest.mark.parametrize("band", ["max", "min"])
def test_examples_from_a_store(photos: Path, store: Path, target: str | list[str], band: str) -> None:
    model = tl.load("demo")
    kept = tl.examples(model, store, target, k=4, band=band)  # type: ignore[arg-type]
    assert kept.images == 70 and len(kept.skipped) == 1
    expected = tl.examples(model, photos, target, k=4, band=band, batch_size=8)  # type: ignore[arg-type]
    forwards = model.forwards
    kept = tl.examples(model, store, target, k=4, band=band)  # type: ignore[arg-type]
    assert model.forwards == forwards
    for name in ("scores", "indices", "positions", "boxes", "labels"):
        assert torch.equal(getattr(kept, name), getattr(expected, name)), name
    assert (kept.units, kept.names, kept.classes) == (expected.units, expected.names, expected.classes)
    assert torch.equal(kept.crops[0][0], expected.crops[0][0])


def test_features_embed_and_neighbors_from_a_store(photos: Path, store: Path) -> None:
    model, asked = tl.load("demo"), tl.load("demo")
    kept, expected = tl.features(model, store), tl.features(asked, photos, batch_size=8)
    assert kept.layer == expected.layer == "fc.in" and model.forwards == 0
    assert torch.equal(kept.vectors, expected.vectors) and torch.equal(kept.labels, expected.labels)
    assert kept.names == expected.names and kept.failures == expected.failures
    torch.testing.assert_close(
        kept.scores["prob:car"].topk(4).values, tl.examples(model, photos, "prob:car", k=4).scores[0]
    )
    forwards = model.forwards
    for layer in (None, "layer4"):
        points = tl.embed(model, store, layer=layer, method="pca")
        assert torch.equal(points.points, tl.embed(asked, photos, layer=layer, method="pca", batch_size=8).points)
        assert torch.equal(points.points, tl.embed(None, store, layer=layer, method="pca").points)
        near = tl.neighbors(model, range(3), store, layer=layer, k=4)
        assert torch.equal(near.indices, tl.neighbors(asked, range(3), photos, layer=layer, k=4, batch_size=8).indices)
    assert model.forwards == forwards
    picture = next(photos.rglob("000.png"))
    near = tl.neighbors(model, [picture], store, k=1)
    assert near.names == (str(picture),) and model.forwards == forwards + 1  # the query's
    assert tl.neighbors(model, [picture], store, k=2, space="pixels").names is not None


def test_verbs_keep_what_they_find(photos: Path, tmp_path: Path) -> None:
    model = tl.load("demo")
    first = tl.features(model, photos, "layer4", store=tmp_path / "f")
    forwards = model.forwards
    assert torch.equal(tl.features(model, photos, "layer4", store=tmp_path / "f").vectors, first.vectors)
    assert torch.equal(
        tl.embed(model, photos, layer="layer4", method="pca", store=tmp_path / "f").indices, first.indices
    )
    tl.neighbors(model, range(2), photos, layer="layer4", store=tmp_path / "f")
    assert model.forwards == forwards
    wanted = {"k": 3, "band": "spectrum", "crop": "image"}
    for target in ("layer4", "layer4:3-layer4:5", "logit:car-0.5*layer3:2"):
        store, seen = tmp_path / target.replace("*", ""), []
        for _ in range(2):
            before = model.forwards
            found = tl.examples(model, photos, target, store=store, **{**wanted, "k": 5})  # type: ignore[arg-type]
            seen.append((found.scores, model.forwards - before))
        assert seen[1][1] == 0 < seen[0][1] and torch.equal(seen[0][0], seen[1][0])
        plain = tl.examples(model, photos, target, **{**wanted, "k": 5})  # type: ignore[arg-type]
        torch.testing.assert_close(plain.scores, seen[0][0])


def test_what_a_store_does_not_hold(photos: Path, store: Path, tmp_path: Path) -> None:
    for options in ({"k": 6}, {"band": "spectrum", "k": 5}, {"per_image": 2}):
        with pytest.raises(StoreError, match=r"\n  statistics: given .* of layer4, stored"):
            tl.examples("demo", store, "layer4", **options)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="no layer 'layer2' among the features"):
        tl.embed("demo", store, layer="layer2", method="pca")
    with pytest.raises(StoreError, match="made by another model"):
        tl.neighbors("demo/backdoored", range(2), store)
    with pytest.raises(StoreError, match="holds 2 of 2 blocks already"):
        tl.scan("demo", photos, LAYERS, store=store, scores=["prob:car"], k=5, resume=False)
    with pytest.raises(BadInput, match="keeps nothing and is done here"):
        tl.neighbors("demo", range(2), photos, space="pixels", store=tmp_path)
    with pytest.raises(BadInput, match="or a store of them"):
        tl.embed(None, photos)


def test_layers_are_chosen(photos: Path, tmp_path: Path) -> None:
    assert tl.scan("demo", photos, store=tmp_path / "a").layers == ("layer4", "fc.in")
    assert tl.scan("demo", photos, "layer1", store=tmp_path / "b").layers == ("layer1",)
    with pytest.raises(UnknownName, match="layer9"):
        tl.scan("demo", photos, "layer9", store=tmp_path / "c")
    assert tl.scan("demo", photos, "layer2", store=tmp_path / "c").layers == ("layer2",)  # nothing was there yet
