"""Blocks spread through Ray Data: the same answer to the last bit, errors as they are, and no silent hang."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import torchloupe as tl
from stored_scans import blocks, inputs, model, require_same, scanned
from torchloupe_adapters import ray as engine
from torchloupe_core.errors import BadInput, MissingDependency, StoreError, UnknownName
from torchloupe_core.store import Store


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three processors: two workers, and one for this process."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_go_on_where_one_process_stopped(cluster: Any, tmp_path: Path) -> None:
    expected = scanned(tmp_path / "alone", model(), inputs())[0]
    handle, shown = model(), list[tuple[int, int]]()
    scanned(tmp_path / "both", handle, inputs())
    for block in range(4, 19):
        (tmp_path / "both" / "blocks" / f"{block:08d}.npz").unlink()
    before = handle.forwards
    found, _ = scanned(
        tmp_path / "both", handle, inputs(), engine="ray", progress=lambda done, total: shown.append((done, total))
    )
    assert handle.forwards == before  # the workers' own
    require_same(found, expected)
    assert blocks(tmp_path / "both") == blocks(tmp_path / "alone")
    assert len(shown) == 15 and shown[-1] == (150, 150) and shown[0][0] > 32
    assert cluster.is_initialized()


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_is_said_here(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [tmp_path / "no.png", tmp_path / "none.png"]
    for file in bad:
        file.write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"no\.png is not an image"):
        scanned(None, model(), bad, engine="ray", skip_failures=False)
    monkeypatch.setattr(cluster, "cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(StoreError, match="ray has 1 processors: no room for a worker of 1 beside the one kept"):
        scanned(tmp_path / "room", model(), inputs(), engine="ray")
    assert Store.open(tmp_path / "room").present() == set()


@pytest.mark.slow
def test_a_comparison_is_shared_out(cluster: Any, tmp_path: Path) -> None:
    handle, scenes = tl.load("demo"), tl.demo_scenes(40, seed=2)
    asked: dict[str, Any] = {"methods": ["cam", "saliency"], "metrics": ["sparsity", "pointing"], "progress": False}
    alone = tl.compare(handle, scenes.images, masks=scenes.masks[:, 0], **asked)
    before = handle.forwards
    asked |= {"engine": "ray", "store": tmp_path / "store"}
    found = tl.compare(handle, scenes.images, masks=scenes.masks[:, 0], **asked)
    assert handle.forwards == before  # the workers' own
    assert found.targets == alone.targets and found.methods == alone.methods
    torch.testing.assert_close(found.values, alone.values, atol=1e-5, rtol=0)
    assert torch.equal(found.images, alone.images) and (found.cost_seconds[:2] > 0).all()


def test_no_silent_hang() -> None:
    never = threading.Event()

    def rows() -> Iterator[int]:
        yield 1
        never.wait()

    came, begun = [], time.monotonic()
    with pytest.raises(StoreError, match=r"no block came from ray for 0\.2 seconds"):
        came += engine._watched(rows(), 0.2)
    assert time.monotonic() - begun < 5
    never.set()
    assert list(engine._watched(iter([1, 2]), 5.0)) == [1, 2]

    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("it")

    with pytest.raises(KeyError, match="it"):
        list(engine._watched(broken(), 5.0))


def test_engines_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match=r"no engine method 'dask'.*'ray'"):
        scanned(tmp_path, model(), inputs(), engine="dask")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="engine='ray' spreads a scan by itself; leave it out under torchrun"):
        scanned(tmp_path, model(), inputs(), engine="ray")
    monkeypatch.delenv("RANK")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r'pip install "torchloupe\[ray\]"'):
        scanned(tmp_path, model(), inputs(), engine="ray")


@pytest.mark.slow
def test_gradients_of_training_images_are_spread(cluster: Any, tmp_path: Path) -> None:
    handle = model()
    train = TensorDataset(inputs(30), torch.arange(30) % 5)
    asked: dict[str, Any] = {"layers": ["fc", "conv1"], "method": "gradient_dot", "check": 0}
    alone = tl.influence(handle, train, inputs(3), **asked)
    before = handle.forwards
    found = tl.influence(handle, train, inputs(3), store=tmp_path, engine="ray", progress=True, **asked)
    torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.gradient_norms, alone.gradient_norms, rtol=1e-4, atol=1e-7)
    assert handle.forwards - before < alone.forwards  # the gradients are the workers' own
    assert len(Store.open(tmp_path / "products").present()) > 2
