"""The vectors of a store in a LanceDB table: there once, whole, and made anew from the blocks where they are not."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import torchloupe as tl
from torchloupe_adapters import lancedb
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput, MissingDependency, StoreError, UnknownName
from torchloupe_core.features import FeatureSet, collect
from torchloupe_core.filling import scan_stored
from torchloupe_core.handle import Handle
from torchloupe_core.scan import Joint
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.statistics import Features, Top
from torchloupe_core.store import Store
from torchloupe_core.stored import rows_of, stored_features

IMAGES = 40


def model() -> Handle:
    handle, _ = SPECIMENS["plain"]()
    return handle


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, and one file that is no picture."""
    for place in range(IMAGES):
        folder = tmp_path / "photos" / ("even" if place % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(place))
        Image.fromarray(noise.numpy()).save(folder / f"{place:02d}.png")
    (tmp_path / "photos/odd/07.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def scanned(store: Path, data: Any, handle: Handle | None = None) -> Handle:
    handle = handle or model()
    joint = Joint([tl.logit(2), tl.prob(1)], [Features()])
    layers = {"relu1": [Top(2), Features()], "fc.in": [Features()]}
    scan_stored(handle, open_data(data, handle.spec), layers, joint=joint, store=store, batch_size=4, block_size=8)
    return handle


def require_same(found: FeatureSet, expected: FeatureSet) -> None:
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.labels, expected.labels)
    assert torch.equal(found.vectors, expected.vectors)
    assert (found.names, found.classes, found.layer) == (expected.names, expected.classes, expected.layer)
    assert dict(found.skipped) == dict(expected.skipped)


def table(store: Path, layer: str = "relu1") -> Any:
    import lancedb as package

    return package.connect(store / "vectors").open_table(lancedb.table_name(layer))


def test_a_store_gives_the_features_of_a_pass(photos: Path, tmp_path: Path) -> None:
    handle = scanned(tmp_path / "s", photos)
    before = handle.forwards
    for layer in ("relu1", "fc.in"):
        found = stored_features(tmp_path / "s", layer, handle)
        require_same(found, collect(model(), photos, layer, batch_size=4))
        assert len(found) == IMAGES - 1 and list(found.skipped) == [23]
        logits = collect(model(), photos, "fc", batch_size=4).vectors
        torch.testing.assert_close(found.scores["logit:2"], logits[:, 2])
        torch.testing.assert_close(found.scores["prob:1"], logits.softmax(1)[:, 1])
        assert found.data is not None and torch.equal(
            found.data.read(0).inputs, open_data(photos, handle.spec).read(0).inputs
        )
    assert handle.forwards == before
    rows = table(tmp_path / "s").to_arrow()
    assert rows["image"].to_pylist() == [str(Path(name).relative_to(photos)) for name in found.names or ()]
    assert rows["block"].to_pylist() == [int(index) // 8 for index in found.indices]
    assert table(tmp_path / "s").version == 5  # one append a block


def test_images_in_memory_have_no_names(tmp_path: Path) -> None:
    inputs = torch.randn(20, 3, 32, 32)
    found = stored_features((scanned(tmp_path, inputs), tmp_path)[1], "relu1")
    assert found.names is None and found.data is None and not found.labelled and len(found) == 20
    with pytest.raises(StoreError, match="images that are no files and cannot be opened; give the data set"):
        open_data(tmp_path, model().spec)
    again = collect(model(), inputs, "relu1", store=tmp_path)
    assert again.data is not None and torch.equal(again.vectors, found.vectors)


def test_wide_numbers_stay_wide(tmp_path: Path) -> None:
    handle = model().to(dtype=torch.float64)
    scanned(tmp_path, torch.randn(9, 3, 32, 32, dtype=torch.float64), handle)
    assert rows_of(Store.open(tmp_path), "relu1", 0).vectors.dtype == torch.float64
    stored_features(tmp_path, "relu1")
    assert str(table(tmp_path).schema.field("vector").type) == "fixed_size_list<item: double>[8]"


def test_blocks_without_an_image_have_no_rows(tmp_path: Path) -> None:
    files = [tmp_path / f"{place:02d}.png" for place in range(20)]
    for place, file in enumerate(files):
        if 8 <= place < 16:
            file.write_bytes(b"no picture")
        else:
            Image.new("RGB", (32, 32), (place, 0, 0)).save(file)
    scanned(tmp_path / "s", files)
    for _ in range(2):
        assert stored_features(tmp_path / "s", "relu1").indices.tolist() == [*range(8), *range(16, 20)]
    assert table(tmp_path / "s").version == 2


def test_names_that_lancedb_does_not_take(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.relu(x) - 1)  # type: ignore[no-any-return]

    handle = tl.wrap(Odd().eval(), input_size=(3, 8, 8))
    names = ["relu#1", "relu", "relu#2"]
    assert len({lancedb.table_name(name) for name in [*names, "relu_23_1", "relu_1"]}) == 5
    inputs = torch.randn(6, 3, 8, 8)
    scan_stored(handle, open_data(inputs, handle.spec), {name: [Features()] for name in names[:2]}, store=tmp_path)
    torch.testing.assert_close(stored_features(tmp_path, "relu#1").vectors, inputs.relu().mean((2, 3)))
    torch.testing.assert_close(stored_features(tmp_path, "relu").vectors, (inputs.relu() - 1).relu().mean((2, 3)))


# -- crashes and damage -----------------------------------------------------------------------------------------------


KILLS = """
import random, shutil, sys, time
sys.path[:0] = {path!r}
from stored_scans import ended, forked, killed
from torchloupe_adapters.lancedb import require_installed
from torchloupe_core.stored import stored_features

def ask():
    stored_features({store!r}, "relu1")

require_installed()  # but not used here: each child uses it for the first time
chance, died = random.Random(0), 0
for _ in range(2):
    shutil.rmtree({store!r} + "/vectors", ignore_errors=True)
    begun = time.monotonic()
    assert ended(forked(ask)) == 0
    takes = time.monotonic() - begun
for attempt in range(200):
    if attempt % 5 == 0:
        shutil.rmtree({store!r} + "/vectors")
    child = forked(ask)
    time.sleep(chance.uniform(0, takes))
    died += killed(child) != 0
    if died == 20:
        break
else:
    raise AssertionError(died)
"""


@pytest.mark.slow
def test_killed_while_it_appends(photos: Path, tmp_path: Path) -> None:
    """At random moments, in a process of its own: no row is lost, torn or there twice."""
    store = tmp_path / "s"
    scanned(store, photos)
    path = [one for one in sys.path if one.endswith(("src", "adapters", "recipes", "tests"))]
    script = KILLS.format(path=path, store=str(store))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = collect(model(), photos, "relu1", batch_size=4)
    require_same(stored_features(store, "relu1"), expected)
    assert sorted(table(store).to_arrow()["index"].to_pylist()) == expected.indices.tolist()


def test_an_append_that_was_interrupted_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned(tmp_path / "s", photos)
    expected = collect(model(), photos, "relu1", batch_size=4)
    asked: list[int] = []

    def rows(store: Store, layer: str, block: int, stop: int) -> Any:
        asked.append(block)
        if block == stop:
            raise KeyboardInterrupt
        return rows_of(store, layer, block)

    for stop in (0, 2, 4, 9):
        monkeypatch.setattr("torchloupe_core.stored.rows_of", lambda *given, stop=stop: rows(*given, stop=stop))
        if stop < 5:
            with pytest.raises(KeyboardInterrupt):
                stored_features(tmp_path / "s", "relu1")
        else:
            require_same(stored_features(tmp_path / "s", "relu1"), expected)
    assert asked == [0, 0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("what", ["data", "_versions", "_transactions"])
def test_a_table_that_is_damaged_is_made_anew(photos: Path, tmp_path: Path, what: str) -> None:
    handle = scanned(tmp_path / "s", photos)
    expected, chance = stored_features(tmp_path / "s", "relu1"), random.Random(1)
    for harm in range(6):
        file = chance.choice(sorted((tmp_path / "s/vectors/relu1.lance" / what).iterdir()))
        content = bytearray(file.read_bytes())
        if harm % 3 == 0:
            content = content[: len(content) // 2]
        elif harm % 3 == 1:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        if harm % 3 == 2:
            file.unlink()
        else:
            file.write_bytes(content)
        before = handle.forwards
        require_same(stored_features(tmp_path / "s", "relu1", handle), expected)
        assert handle.forwards == before


def test_rows_that_were_changed_are_noticed(photos: Path, tmp_path: Path) -> None:
    scanned(tmp_path / "s", photos)
    expected = stored_features(tmp_path / "s", "relu1")
    table(tmp_path / "s").update(where="index = 5", values={"label": 7})
    require_same(stored_features(tmp_path / "s", "relu1"), expected)
    opened = table(tmp_path / "s")
    opened.add(opened.to_arrow().slice(3, 1))  # by someone else
    require_same(stored_features(tmp_path / "s", "relu1"), expected)
    opened = table(tmp_path / "s")
    opened.add(opened.to_arrow().slice(8, 8))  # a whole block
    require_same(stored_features(tmp_path / "s", "relu1"), expected)
    assert len(table(tmp_path / "s").to_arrow()) == len(expected)
    table(tmp_path / "s").delete("block = 2")
    require_same(stored_features(tmp_path / "s", "relu1"), expected)


def test_a_table_of_another_store_is_not_taken(photos: Path, tmp_path: Path) -> None:
    scanned(tmp_path / "s", photos)
    scanned(tmp_path / "other", torch.randn(40, 3, 32, 32))
    stored_features(tmp_path / "other", "relu1")
    expected = stored_features(tmp_path / "s", "relu1")
    shutil.rmtree(tmp_path / "s/vectors")
    shutil.copytree(tmp_path / "other/vectors", tmp_path / "s/vectors")
    require_same(stored_features(tmp_path / "s", "relu1"), expected)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_a_store_lacks_is_said(photos: Path, tmp_path: Path) -> None:
    handle = scanned(tmp_path / "s", photos)
    assert stored_features(tmp_path / "s").layer == "fc.in"  # what goes into the classifier
    maps = {"relu1": [Features()], "pool": [Features()]}
    scan_stored(handle, open_data(photos, handle.spec), maps, store=tmp_path / "maps")
    with pytest.raises(BadInput, match=r"holds features of 2 layers: relu1, pool; name one with layer="):
        stored_features(tmp_path / "maps")
    with pytest.raises(UnknownName, match=r"no layer 'relu2' among the features in .*'relu1'"):
        stored_features(tmp_path / "s", "relu2")
    with torch.no_grad():
        handle.module.fc.bias += 1
    with pytest.raises(StoreError, match=r"was made by another model:\n  weights: given \w+, stored \w+$"):
        stored_features(tmp_path / "s", "relu1", handle)
    with pytest.raises(StoreError, match="is no store"):
        stored_features(photos)
    (tmp_path / "s/blocks/00000003.npz").write_bytes(b"torn")
    with pytest.raises(StoreError, match=r"is damaged .*; the scan that made it does it again"):
        stored_features(tmp_path / "s", "relu1")
    (tmp_path / "s/blocks/00000003.npz").unlink()
    with pytest.raises(StoreError, match="holds 4 of 5 blocks; the scan that made it goes on from there"):
        stored_features(tmp_path / "s", "relu1")


def test_without_lancedb(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(MissingDependency, match=r'pip install "torchloupe\[store\]"'):
        tl.scan(model(), photos, "relu1", store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
