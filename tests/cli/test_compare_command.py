"""`torchloupe compare | recommend | audit`."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from command import Run
from PIL import Image

import torchloupe as tl

QUICK = ("--methods", "cam,saliency", "--metrics", "sparsity", "--metrics", "complexity", "--no-progress")


def test_a_folder_is_compared(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compare", photos, *QUICK, "--out", out)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["method", "sparsity", "↑"] and lines[-1] == str(out / "comparison.html")
    assert {line.split()[0] for line in lines[1:6]} == {"cam", "captum.saliency", "random", "centre", "edges"}
    found = tl.open(out / "comparison.npz")
    again = tl.compare("demo", photos, methods=["cam", "saliency"], metrics=["sparsity", "complexity"], progress=False)
    assert found.values.equal(again.values)
    with (out / "comparison.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5 * 2
    assert "toprule" in (out / "comparison.tex").read_text()
    page = (out / "comparison.html").read_text()
    assert "captum.saliency" in page.replace("<wbr>", "") and page.count("data:image/png") == (1 + 5) * len(
        found.images
    )
    assert not re.search(r'(src|href)="(?!data:)', page)  # fetches nothing
    assert {path.name for path in out.glob("*.png")} == {"bars.png", "maps.png", "cost.png", "agreement.png"}


def test_rows_as_json_and_options(run: Run, photos: Path, tmp_path: Path) -> None:
    words = ("compare", photos, "--methods", "rise", "--metrics", "deletion", "--option", "rise.n_masks=8")
    done = run(*words, "--option", "deletion.step=1024", "--json", "--no-progress", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["method"] for row in rows} == {"rise", "random", "centre", "edges"}
    assert tl.open(tmp_path / "out/comparison.npz").options["rise"] == {"n_masks": 8}


def test_bad_input_is_one_line(run: Run, photos: Path, tmp_path: Path) -> None:
    for words, problem in (
        (("--option", "n_masks=8"), "does not say whose it is, as in rise.n_masks"),
        (("--option", "rise.n_masks=8"), "which is not compared"),
        (("--masks", tmp_path / "none"), "is no folder"),
    ):
        done = run("compare", photos, *QUICK, *words, "--out", tmp_path / "out")
        assert done.exit_code == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_method_is_recommended(run: Run, photos: Path) -> None:
    words = ("recommend", photos, "--methods", "cam,saliency", "--metrics", "sparsity", "--no-progress")
    done = run(*words)
    assert done.exit_code == 0 and "recommended: captum.saliency" in done.stdout, done.stderr
    facts = json.loads(run(*words, "--json").stdout)
    assert facts["recommended"] in facts["mean_ranks"] and set(facts["mean_ranks"]) == {"cam", "captum.saliency"}


def test_a_shortcut_is_looked_for(run: Run, tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    for index, scene in enumerate(tl.demo_scenes(40, seed=21, watermark=0.5).images):
        Image.fromarray(scene.permute(1, 2, 0).numpy()).save(tmp_path / f"scenes/{index:03d}.png")
    done = run("audit", tmp_path / "scenes", "--model", "demo/backdoored", "--no-progress", "--out", tmp_path / "out")
    assert done.exit_code == 0 and done.stdout.startswith("mushroom: a region recurs in"), done.stderr
    assert tl.open(tmp_path / "out/audit.npz").classes == ("mushroom",) and (tmp_path / "out/audit.png").exists()
