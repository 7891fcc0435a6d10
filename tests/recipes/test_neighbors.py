"""`tl.neighbors`: in features and in pixels, against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core import search
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput
from torchloupe_core.plots_neighbors import NEUTRAL, OTHER, SAME
from torchloupe_core.specimens import SPECIMENS


@pytest.fixture(scope="module", autouse=True)
def without_a_screen() -> None:
    matplotlib.use("Agg")


@pytest.fixture(scope="module")
def scenes() -> Any:
    return tl.demo_scenes(300, 5)


@pytest.fixture(scope="module")
def seen(scenes: Any) -> tl.FeatureSet:
    return tl.features("demo", scenes)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for n in range(8):
        path = tmp_path / "photos" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def loop(queries: torch.Tensor, vectors: torch.Tensor, k: int, metric: str, own: Any = None) -> list[list[int]]:
    found = []
    for row, query in enumerate(queries.double()):
        distances = []
        for number, vector in enumerate(vectors.double()):
            if own is None or own[row] != number:
                apart = 1 - torch.cosine_similarity(query, vector, 0) if metric == "cosine" else (query - vector).norm()
                distances.append((apart.item(), number))
        found.append([number for _, number in sorted(distances)[:k]])
    return found


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_in_features_as_a_loop(seen: tl.FeatureSet, metric: Any) -> None:
    queries = tl.demo_scenes(4, 77)
    found = tl.neighbors("demo", queries, seen, k=6, metric=metric)
    asked = tl.features("demo", queries)
    assert found.indices.tolist() == loop(asked.vectors, seen.vectors, 6, metric)
    assert found.distances.dtype == torch.float64 and (found.distances.diff(dim=1) >= 0).all()
    assert (found.space, found.metric, found.layer, found.excluded) == ("features", metric, "fc.in", False)
    assert (found.method, found.backend, found.k, len(found), found.forwards) == ("exact", "native", 6, 4, 4)
    assert torch.equal(found.labels, seen.labels[found.indices]) and torch.equal(found.query_labels, queries.labels)
    assert found.diagnostics == {"images": 300} and found.options == {"k": 6, "exclude_self": None}


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_in_pixels_as_a_loop(scenes: Any, metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels of what the model is shown, in [0, 1], whatever it subtracts and divides by."""
    data, query = scenes.images[:60], scenes.images[60:63]
    model = tl.load("demo")
    found = tl.neighbors(model, query, data, k=5, space="pixels", metric=metric)
    shown = [model.spec.display(model.inputs(one)).flatten(1) for one in (query, data)]
    assert found.indices.tolist() == loop(*shown, 5, metric)
    assert found.layer is None and found.space == "pixels" and found.forwards == 0
    monkeypatch.setattr(search, "HELD", 1)
    monkeypatch.setattr(search, "AT_ONCE", 7)
    again = tl.neighbors(model, query, data, k=5, space="pixels", metric=metric)
    assert torch.equal(again.indices, found.indices) and torch.equal(again.distances, found.distances)


def test_features_know_the_classes_and_pixels_do_not(scenes: Any, seen: tl.FeatureSet) -> None:
    """10 nearest of every image but itself: the model's features put the same class beside it, pixels chance."""
    features = tl.neighbors(None, range(300), seen, k=10)
    assert features.excluded and features.label_agreement().mean() > 0.95
    pixels = tl.neighbors(None, range(300), seen, k=10, space="pixels")
    assert pixels.label_agreement().mean() < 0.2  # 12 classes: chance is .08
    assert not (features.indices == torch.arange(300)[:, None]).any()
    assert not (pixels.indices == torch.arange(300)[:, None]).any()


def test_queries_by_number_leave_themselves_out_unless_told_otherwise(seen: tl.FeatureSet) -> None:
    found = tl.neighbors(None, [7, 3], seen)
    assert found.query_indices.tolist() == [7, 3]
    assert found.indices.tolist() == loop(seen.vectors[[7, 3]], seen.vectors, 5, "cosine", own=[7, 3])
    with_self = tl.neighbors(None, 7, seen, exclude_self=False)
    assert with_self.indices[0, 0] == 7 and with_self.distances[0, 0] == 0 and not with_self.excluded
    for numbers in (np.array([7]), torch.tensor([7]), (7,), np.int64(7)):
        assert torch.equal(tl.neighbors(None, numbers, seen).indices, found.indices[:1])
    pixels = tl.neighbors(None, [7, 3, 7], seen, space="pixels", exclude_self=False)
    assert pixels.indices[:, 0].tolist() == [7, 3, 7] and (pixels.distances[:, 0] == 0).all()


def test_queries_that_are_files_of_the_folder(photos: Path) -> None:
    query = photos / "a" / "2.png"
    found = tl.neighbors("demo", query, photos, exclude_self=True, k=20)
    assert found.excluded and found.k == 7  # all others; there are no more
    assert found.query_names == (str(query),) and str(query) not in (found.names or ())
    kept = tl.neighbors("demo", query, photos, k=20)
    assert kept.k == 8 and (kept.names or ())[0] == str(query) and not kept.excluded
    assert found.classes == ("a", "b") and (found.names or ())[0].endswith(".png")
    pixels = tl.neighbors("demo", query, photos, exclude_self=True, k=20, space="pixels")
    assert pixels.k == 7 and str(query) not in (pixels.names or ())
    elsewhere = photos.parent / "copy.png"
    elsewhere.write_bytes(query.read_bytes())
    assert tl.neighbors("demo", elsewhere, photos, exclude_self=True, k=20).k == 8  # another file with the same pixels
    with pytest.raises(BadInput, match="nothing says which of the data set they are"):
        tl.neighbors("demo", torch.rand(1, 3, 64, 64), photos, exclude_self=True)


@pytest.mark.parametrize("kind", ["path", "PIL", "array", "tensor", "inputs", "list"])
def test_one_image_of_any_kind_is_a_query(scenes: Any, seen: tl.FeatureSet, kind: str, tmp_path: Path) -> None:
    model, picture = tl.load("demo"), Image.fromarray(scenes.images[4].permute(1, 2, 0).numpy())
    picture.save(tmp_path / "x.png")
    queries = {
        "path": tmp_path / "x.png",
        "PIL": picture,
        "array": np.asarray(picture),
        "tensor": scenes.images[4],
        "inputs": model.inputs(scenes.images[4:5]),
        "list": [picture],
    }
    found = tl.neighbors(model, queries[kind], seen)
    assert found.indices.shape == (1, 5) and found.indices[0, 0] == 4
    assert found.distances[0, 0] < 1e-6


@pytest.mark.slow
def test_an_approximate_search_says_what_share_it_found(seen: tl.FeatureSet) -> None:
    truth = tl.neighbors(None, range(300), seen, k=10)
    found = tl.neighbors(None, range(300), seen, k=10, approximate=True, seed=1)
    hits = (found.indices[:, :, None] == truth.indices[:, None]).any(2).double()
    assert found.diagnostics["recall_queries"] == 100 and found.diagnostics["recall"] > 0.9
    chosen = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:100]
    assert found.diagnostics["recall"] == pytest.approx(hits[chosen].mean().item())
    right = found.indices == truth.indices
    assert torch.equal(found.distances[right], truth.distances[right])
    assert (found.method, found.backend) == ("pynndescent", "pynndescent") and "pynndescent" in found.versions
    assert not (found.indices == torch.arange(300)[:, None]).any()
    assert torch.equal(tl.neighbors(None, range(300), seen, k=10, approximate=True, seed=1).indices, found.indices)


def test_a_recall_below_one_is_reported_and_lost_queries_are_searched_for(seen: tl.FeatureSet) -> None:
    """With a stand-in that finds the first of the data set only, and nothing for one query."""

    def first(queries: Any, vectors: Any, k: int, metric: str) -> torch.Tensor:
        rows = torch.arange(k).expand(len(queries), k).clone()
        rows[1] = -1
        return rows

    queries, nobody = seen.some(range(100, 110)), torch.full((10,), -1)
    exact = search.in_features(queries, seen, 5, "l2", nobody, None)
    found = search.in_features(queries, seen, 5, "l2", nobody, first)
    assert torch.equal(found.indices[1], exact.indices[1]) and torch.equal(found.distances[1], exact.distances[1])
    assert found.indices[0].sort().values.tolist() == list(range(5)) and (found.distances.diff(dim=1) >= 0).all()
    right = sum(len(set(a) & set(b)) for a, b in zip(found.indices.tolist(), exact.indices.tolist(), strict=True))
    assert found.diagnostics == {"recall": right / 50, "recall_queries": 10} and right < 50


def test_saved_and_opened_with_its_pictures(scenes: Any, tmp_path: Path) -> None:
    found = tl.neighbors("demo", scenes.images[:2], scenes.images[2:12], k=3)
    again = tl.open(found.save(tmp_path / "bare"))
    assert isinstance(again, tl.Neighbors) and torch.equal(again.distances, found.distances)
    with pytest.raises(BadInput, match="not at hand"):
        again.figure()
    kept = tl.open(found.with_pictures(32).save(tmp_path / "pictured"))
    assert isinstance(kept, tl.Neighbors) and torch.equal(kept.thumbnails(32), found.thumbnails(32))
    assert kept.thumbnails(64).shape == (2, 3, 3, 64, 64) and kept.figure(most=1).axes


def test_the_drawing_shows_the_query_and_both_spaces_side_by_side(scenes: Any, seen: tl.FeatureSet) -> None:
    found = tl.neighbors(None, [5, 9], seen, k=4)
    pixels = tl.neighbors(None, [5, 9], seen, k=3, space="pixels")
    figure = found.figure(beside=pixels, size=64)
    (axes,) = figure.axes
    canvas = axes.images[0].get_array()
    texts = [text.get_text() for text in axes.texts]
    assert "features at fc.in, cosine" in texts and "pixels, cosine" in texts

    def at(picture: torch.Tensor) -> list[tuple[int, int]]:
        wanted = (picture.float() / 255).permute(1, 2, 0).numpy()
        rows, columns = np.nonzero(np.abs(canvas - wanted[0, 0]).max(-1) < 1e-6)
        places = zip(rows.tolist(), columns.tolist(), strict=True)
        return [(y, x) for y, x in places if np.array_equal(canvas[y : y + 64, x : x + 64], wanted)]

    for row, query in enumerate((5, 9)):
        (own,) = at(scenes.images[query])
        frames = [own]
        for side in (found, pixels):
            for place in range(side.k):
                image = int(side.indices[row, place])
                places = [one for one in at(scenes.images[image]) if one[0] == own[0] and one[1] > frames[-1][1]]
                assert places  # to the right of the one before
                frames.append(places[0])
                y, x = places[0]
                colour = SAME if scenes.labels[image] == scenes.labels[query] else OTHER
                assert canvas[y - 1, x - 1].tolist() == pytest.approx(colour)
        assert canvas[own[0] - 1, own[1] - 1].tolist() == pytest.approx(NEUTRAL)
    names = {f"{found.distances[0, 0]:.3g} {scenes.classes[found.labels[0, 0]]}"}
    assert names <= set(texts)
    with pytest.raises(BadInput, match="same queries"):
        found.figure(beside=tl.neighbors(None, [5, 8], seen))
    assert to_rgb("white") == tuple(canvas[0, 0])


def test_nothing_of_the_model_is_changed() -> None:
    handle, inputs = SPECIMENS["residual"]()
    handle.module.train()
    before = Snapshot(handle.module, inputs)
    tl.neighbors(handle, inputs[:1], inputs, k=2)
    tl.neighbors(handle, inputs[:1], inputs, k=2, space="pixels")
    with pytest.raises(BadInput):
        tl.neighbors(handle, [5], inputs)
    assert before.differences() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"space": "colours"}, 'space is "features" or "pixels"; got \'colours\''),
        ({"metric": "l1"}, 'metric is "cosine" or "l2"; got \'l1\''),
        ({"k": 0}, "whole number of at least 1; got 0"),
        ({"k": True}, "whole number of at least 1; got True"),
        ({"space": "pixels", "layer": "fc"}, "reads no layer; leave out layer='fc'"),
        ({"space": "pixels", "approximate": True}, "is exact; leave out approximate="),
        ({"approximate": True}, "for at least 100 images; these are 3, leave out approximate="),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], words: str) -> None:
    handle, inputs = SPECIMENS["plain"]()
    with pytest.raises(BadInput, match=words):
        tl.neighbors(handle, inputs[:1], inputs, **options)


def test_bad_data(seen: tl.FeatureSet, photos: Path) -> None:
    handle, inputs = SPECIMENS["plain"]()
    with pytest.raises(BadInput, match="no other image than the query"):
        tl.neighbors(handle, 0, inputs[:1])
    with pytest.raises(BadInput, match="no image 300 in the data set of 300"):
        tl.neighbors(None, [2, 300], seen)
    with pytest.raises(BadInput, match="no image -1 in the data set of 3"):
        tl.neighbors(handle, -1, inputs, space="pixels")
    with pytest.raises(BadInput, match="without a model"):
        tl.neighbors(None, inputs, seen)
    with pytest.raises(BadInput, match="128"):
        tl.neighbors(handle, tl.features(handle, inputs, "fc.in"), seen)
    with pytest.raises(BadInput, match="do not say where their images are read"):
        bare = tl.FeatureSet(seen.vectors, seen.indices, seen.labels)
        tl.neighbors("demo", [1], bare, space="pixels")
    with pytest.raises(BadInput, match="the data set is empty"):
        tl.neighbors(handle, [], inputs)
    (photos / "a" / "bad.png").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"image 4 of the data set could not be read: .*bad\.png is not an image"):
        tl.neighbors("demo", 4, photos)
    found = tl.neighbors("demo", 0, photos, space="pixels")
    assert list(found.skipped) == [str(photos / "a" / "bad.png")] and found.diagnostics["images"] == 8
    sizes = [torch.rand(3, 16, 16), torch.rand(3, 8, 32)]
    with pytest.raises(BadInput, match="at one size; image 1 is pixels 3x8x32, not pixels 3x16x16"):
        tl.neighbors(handle, sizes[0], sizes, space="pixels")


def test_labels_of_a_data_set_without_any() -> None:
    handle, inputs = SPECIMENS["plain"]()
    found = tl.neighbors(handle, inputs[:1], TensorDataset(inputs), k=2)
    assert found.labels.tolist() == [[-1, -1]] and found.label_agreement().isnan().all()
