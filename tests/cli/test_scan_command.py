"""`torchloupe scan`, and the commands that ask its store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import Run, picture

import torchloupe as tl


def test_a_folder_is_scanned_once(run: Run, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    (photos / "bad.png").write_bytes(b"no picture")
    for _ in range(2):
        done = run("scan", photos, "--layer", "layer4", "--layer", "fc.in", "--score", "logit:car", "--store", store)
        assert (done.exit_code, done.stdout) == (1, f"3 images at layer4, fc.in  {store}\n")
        assert done.stderr == f"torchloupe: {photos / 'bad.png'} is not an image\n"
    facts = json.loads(
        run(
            "scan", photos, "--layer", "layer4", "--layer", "fc.in", "--score", "logit:car", "--store", store, "--json"
        ).stdout
    )
    assert (facts["images"], facts["skipped"], facts["forwards"], facts["scores"]) == (3, 1, 0, ["logit:car"])
    assert run("scan", photos, "--layer", "layer4", "--store", store).exit_code == 1  # a part of it
    done = run("scan", photos, "--layer", "layer3", "--store", store)
    assert done.exit_code == 2 and "was made by another question" in done.stderr and "Traceback" not in done.stderr
    assert run("scan", photos, "--store", store, "--no-resume").exit_code == 2
    assert "scan needs --store" in run("scan", photos).stderr


def test_other_commands_ask_the_store(run: Run, photos: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "s", tmp_path / "out"
    for place in range(6):
        picture(10 + place).save(photos / f"{place}.png")
    assert run("scan", photos, "--store", store).exit_code == 0
    for given in ([store], ["--store", store], [photos, "--store", store]):
        done = run("embed", *given, "--method", "pca", "--no-page", "--out", out)
        assert done.exit_code == 0, done.stderr
        assert tl.open(out / "embedding.npz").forwards == 0
        done = run("examples", *given, "--target", "layer4:17", "-k", 3, "--out", out)
        assert done.exit_code == 0, done.stderr
        found = tl.open(out / "layer4_17.examples.npz")
        assert found.forwards == 0 and torch.equal(found.scores, tl.examples("demo", photos, "layer4:17", k=3).scores)
    query = photos / "a.png"
    for given in (["--data", store], ["--store", store], ["--data", photos, "--store", store]):
        done = run("neighbors", query, *given, "--k", 2, "--out", out)
        assert done.exit_code == 0, done.stderr
        first = done.stdout.splitlines()[0].split("  ")
        assert (first[0], first[-1]) == (str(query), str(query)) and float(first[3]) < 1e-6
        assert tl.open(out / "neighbors.npz").forwards == 1
    for command in ("embed", "examples --target layer4:17", f"neighbors {query}"):
        words = [*command.split(), "--out", out]
        done = run(*words)
        assert done.exit_code == 2 and "no pictures were given" in done.stderr
        done = run(*words, "--store", tmp_path / "none")
        assert done.exit_code == 2 and "torchloupe: " in done.stderr
    done = run("embed", store, "--model", "demo/backdoored", "--out", out)
    assert done.exit_code == 2 and "was made by another model" in done.stderr


def test_commands_keep_their_pass(run: Run, photos: Path, tmp_path: Path) -> None:
    for command in (
        ["embed", photos, "--method", "pca", "--no-page"],
        ["examples", photos, "--target", "layer3:2", "--target", "logit:car"],
    ):
        seen = []
        for _ in range(2):
            done = run(*command, "--store", tmp_path / command[0], "--out", tmp_path)
            assert done.exit_code == 0, done.stderr
            file = "embedding" if command[0] == "embed" else "layer3_2.examples"
            seen.append(tl.open(tmp_path / f"{file}.npz").forwards)
        assert seen == [3, 0]


@pytest.mark.slow
def test_ranks_of_torchrun_speak_once(photos: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    main = tmp_path / "main.py"
    path = [one for one in sys.path if one.endswith(("src", "adapters", "recipes"))]
    main.write_text(f"import sys\nsys.path[:0] = {path!r}\nfrom torchloupe.cli import main\nmain()\n")
    words = [*run, main, "scan", photos, "--store", tmp_path / "s"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"3 images at layer4, fc.in  {tmp_path / 's'}\n"
