"""What searching and showing a data set costs: the nearest of 100,000 vectors, an even grid, a page of 50,000 points.

    python benchmarks/embed.py             every row, about 2 minutes
    python benchmarks/embed.py nearest     the rows whose name begins so

Medians of seconds of one core's time; the page's are by the clock, from the beginning of its load until its points are
drawn, as the page itself takes them, in headless Chromium, each time in a fresh context.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Row, Rows, asked, in_turn, run
from torch import Tensor

import torchloupe as tl
from torchloupe_core.dataset import open_data
from torchloupe_core.embedding import Embedding
from torchloupe_core.features import FeatureSet

VECTORS, DIMS, K = 100_000, 512, 10
POINTS, TILES = 50_000, 2_000
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def nearest() -> Rows:
    """The library's own call, features in memory; against torch's product and top k in single precision."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(VECTORS, DIMS, generator=generator)
    found = FeatureSet(vectors, torch.arange(VECTORS), torch.full((VECTORS,), -1), layer="fc.in")
    found.lengths  # noqa: B018  (found once, as part of loading)
    for count in (1, 100):
        queries = torch.randn(count, DIMS, generator=generator)
        query = FeatureSet(queries, torch.arange(count), torch.full((count,), -1), layer="fc.in")
        for metric in ("cosine", "l2"):
            exact, rough = in_turn(
                lambda query=query, metric=metric: tl.neighbors(None, query, found, k=K, metric=metric),
                lambda queries=queries: (queries @ vectors.T).topk(K),
                rounds=9,
            )
            name, note = f"{count} queries, {metric}", f"torch's float32 top k {statistics.median(rough):.3f}"
            yield Row(name, statistics.median(exact), "s", 0.05 if count == 1 else None, note=note)


def grid() -> Rows:
    """Points in a dozen groups, which is harder than points spread evenly."""
    for count in (TILES // 2, TILES):
        found = _embedding(_groups(count))
        (taken,) = in_turn(found.grid, rounds=3)
        yield Row(f"{count:,} images", statistics.median(taken), "s", 10 if count == TILES else None)


def page() -> Rows:
    """With a picture for every point, two columns besides the label, and a name for every image."""
    path = shutil.which("chromium")
    if path is None:
        yield Row("", None, note="chromium is not installed")
        return
    from playwright.sync_api import sync_playwright

    model, scenes = tl.load("demo"), tl.demo_scenes(5_000)
    images = scenes.images.repeat(POINTS // 5_000, 1, 1, 1)
    found = _embedding(_groups(POINTS), open_data(images, model.spec))
    columns = {"x": found.points[:, 0], "kind": [str(n % 7) for n in range(POINTS)]}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        begun = time.perf_counter()
        written = found.html(Path(folder) / "page.html", columns=columns)
        taken = time.perf_counter() - begun
        yield Row("written", taken, "s", note=f"{written.stat().st_size / 1e6:.1f} MB")
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        ready, requests, said = [], 0, 0
        for _ in range(7):
            context = browser.new_context(viewport={"width": 1400, "height": 900})
            urls: list[str] = []
            texts: list[str] = []
            context.on("request", lambda request, urls=urls: urls.append(request.url))
            shown = context.new_page()
            shown.on("console", lambda message, texts=texts: texts.append(message.text))
            shown.on("pageerror", lambda error, texts=texts: texts.append(str(error)))
            shown.goto(written.as_uri())
            ready.append(float(shown.evaluate("document.documentElement.dataset.ready")) / 1000)
            shown.keyboard.press("n")  # which decodes a picture
            shown.wait_for_selector("#card canvas", state="visible")
            requests += sum(not url.startswith("data:") for url in urls) - 1  # the page itself
            said += len(texts)
            context.close()
        browser.close()
        note = f"{requests} requests, {said} complaints"
        yield Row("ready", statistics.median(ready), "s", 1.5, note=note)


def _groups(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(12, 2, generator=generator)
    return centres[torch.arange(count) % 12] + 0.5 * torch.randn(count, 2, generator=generator)


def _embedding(points: Tensor, data: object = None) -> Embedding:
    """An embedding of these points; where they come from does not matter here."""
    count = len(points)
    placed = tl.FeatureSet(points, torch.arange(count), torch.arange(count) % 12, layer="fc.in")
    found = tl.embed(None, FeatureSet(points[:99], placed.indices[:99], placed.labels[:99]), method="pca")
    names = tuple(f"/data/photos/class {n % 12}/image {n:06}.jpg" for n in range(count))
    facts = {"points": points, "labels": placed.labels, "indices": placed.indices, "names": names, "data": data}
    return Embedding(**{**vars(found), **facts})


PARTS: dict[str, Callable[[], Rows]] = {
    f"nearest {K} of {VECTORS:,} x {DIMS}": nearest,
    "grid": grid,
    f"page of {POINTS:,} points": page,
}

if __name__ == "__main__":
    run(PARTS, asked(__doc__))
