"""`torchloupe embed` and `torchloupe neighbors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Run, picture
from PIL import Image

import torchloupe as tl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in two classes."""
    for n in range(12):
        path = tmp_path / "photos" / ("ant", "bee")[n % 2] / f"{n:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(path)
    return tmp_path / "photos"


def test_embed_writes_points_a_drawing_a_grid_and_a_page(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("embed", folder, "--method", "pca", "--grid", "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"12 images at fc.in, sklearn.pca  {out / 'embedding.png'}",
        f"grid 3x4  {out / 'grid.png'}",
        f"page  {out / 'embedding.html'}",
    ]
    found, grid = tl.open(out / "embedding.npz"), tl.open(out / "grid.npz")
    assert isinstance(found, tl.Embedding) and isinstance(grid, tl.Grid)
    assert torch.equal(found.points, tl.embed("demo", folder, method="pca").points)
    assert found.classes == ("ant", "bee") and grid.shape == (3, 4)
    assert found.thumbnails(8).shape == (12, 3, 8, 8)  # from the files
    assert "</html>" in (out / "embedding.html").read_text()
    for name in ("embedding.png", "grid.png"):
        with Image.open(out / name) as image:
            assert image.format == "PNG"


def test_embed_as_json_with_options_of_the_method(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "ant" / "bad.png").write_bytes(b"nothing")
    arguments = ["--method", "tsne", "--option", "perplexity=2.0", "--option", "iterations=250", "--dims", 3]
    done = run("embed", folder, "--layer", "layer3", *arguments, "--pca", 5, "--out", tmp_path, "--json")
    assert done.exit_code == 1 and done.stderr == f"torchloupe: {folder / 'ant' / 'bad.png'} is not an image\n"
    (facts,) = map(json.loads, done.stdout.splitlines())
    assert (facts["images"], facts["layer"], facts["perplexity"]) == (12, "layer3", 2.0)
    found = tl.open(facts["npz"])
    assert isinstance(found, tl.Embedding) and found.dims == 3 and found.options["pca"] == 5
    assert not (tmp_path / "embedding.html").exists()  # a page shows two dimensions


def test_pictures_instead_of_points_and_no_page(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run("embed", folder, "--method", "pca", "--images", "--no-page", "--out", tmp_path / "out")
    assert done.exit_code == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "embedding.npz",
        "embedding.png",
    ]
    with Image.open(tmp_path / "out" / "embedding.png") as image:
        assert image.size[0] > 1000


def test_neighbors_prints_a_line_for_each_and_draws_them(run: Run, folder: Path, tmp_path: Path) -> None:
    query, out = folder / "ant" / "02.png", tmp_path / "out"
    done = run("neighbors", query, "--data", folder, "--k", 3, "--exclude-self", "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    found = tl.open(out / "neighbors.npz")
    assert isinstance(found, tl.Neighbors) and found.excluded and found.k == 3
    expected = tl.neighbors("demo", query, folder, k=3, exclude_self=True)
    assert torch.equal(found.indices, expected.indices) and found.names == expected.names
    *rows, last = done.stdout.splitlines()
    lines = zip(range(1, 4), expected.distances[0].tolist(), expected.names or (), strict=True)
    assert rows == [f"{query}  features  {rank}  {distance:.4g}  {name}" for rank, distance, name in lines]
    assert last == f"1 queries  {out / 'neighbors.png'}" and (out / "neighbors.png").stat().st_size > 1000


def test_both_spaces_side_by_side(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run(
        "neighbors", folder / "ant", "--data", folder, "--space", "both", "--metric", "l2", "--json", "--out", tmp_path
    )
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert done.exit_code == 0 and len(rows) == 2 * 6 * 5 and last["images"] == 12
    assert {row["space"] for row in rows} == {"features", "pixels"}
    assert all(row["image"] == row["query"] and row["distance"] == 0 for row in rows if row["rank"] == 1)
    spaces: list[Any] = [tl.open(tmp_path / name) for name in ("neighbors.npz", "pixels.npz")]
    assert [one.space for one in spaces] == ["features", "pixels"] and spaces[0].metric == "l2"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed", "FOLDER", "--method", "umpa"], "no embed method 'umpa'; did you mean 'umap'"),
        (["embed", "FOLDER", "--method", "pca", "--option", "perplexity=3"], "sklearn.pca has no option 'perplexity'"),
        (["embed", "FOLDER", "--method", "pca", "--pca", "5"], "leave out pca="),
        (["embed", "FOLDER", "--method", "pca", "--layer", "layer9"], "no layer 'layer9'"),
        (["embed", "FOLDER", "--dims", "5"], "5 is not in the range"),
        (["embed", "nowhere", "--method", "pca"], "no such folder: nowhere"),
        (["neighbors", "FOLDER", "--data", "nowhere"], "no such folder: nowhere"),
        (["neighbors", "nowhere.png", "--data", "FOLDER"], "no such image file"),
        (["neighbors", "FOLDER"], "no pictures were given; name a folder"),
        (["neighbors", "FOLDER", "--data", "FOLDER", "--k", "0"], "0 is not in the range"),
        (["neighbors", "FOLDER", "--data", "FOLDER", "--space", "pixels", "--layer", "fc"], "reads no layer"),
        (["neighbors", "FOLDER", "--data", "FOLDER", "--approximate"], "for at least 100 images"),
    ],
)
def test_what_cannot_be_done_exits_2(run: Run, folder: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    given = [str(folder) if one == "FOLDER" else one for one in arguments]
    done = run(*given, "--out", tmp_path / "out")
    assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_pictures_that_cannot_be_read(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "bee" / "bad.png").write_bytes(b"nothing")
    done = run("neighbors", folder / "ant" / "00.png", "--data", folder, "--out", tmp_path)
    assert done.exit_code == 1 and f"{folder / 'bee' / 'bad.png'} is not an image" in done.stderr
    for path in folder.rglob("*.png"):
        path.write_bytes(b"nothing")
    done = run("embed", folder, "--method", "pca", "--out", tmp_path)
    assert done.exit_code == 2 and "none of the 13 images could be read" in done.stderr
