"""`torchloupe visualize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Run
from PIL import Image

import torchloupe as tl


def test_visualize_writes_pictures_and_the_data(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--steps", 4, "--n", 2, "--method", "native", "--snapshots", "2", "--seed", 3]
    done = run("visualize", "layer3:11", "logit:fish", *options, "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    made = tl.open(out / "visualization.npz")
    assert isinstance(made, tl.Visualization)
    expected = tl.visualize("demo", ["layer3:11", "logit:fish"], n=2, steps=4, snapshots=[2], seed=3, method="native")
    assert torch.equal(made.images, expected.images) and made.snapshot_steps == (2,)
    names = ["layer3_11.png", "layer3_11_2.png", "logit_fish.png", "logit_fish_2.png"]
    assert [Path(line.split("  ")[1]).name for line in done.stdout.splitlines()] == names
    assert done.stdout.startswith(f"layer3:11 = {made.scores[0].item():.4g}  ")
    for name, image in zip(names, made.images, strict=True):
        values = np.asarray(Image.open(out / name)).astype(float) / 255
        np.testing.assert_allclose(values, image.permute(1, 2, 0).numpy(), atol=0.5 / 255 + 1e-6)
    assert (out / "visualization.png").stat().st_size > 10_000


def test_options_reach_the_optimisation(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    made = tl.visualize("demo", "layer1:2", steps=1, method="native")

    def visualize(handle: Any, target: Any, **options: Any) -> Any:
        asked.update(options, target=target)
        return made

    monkeypatch.setattr("torchloupe.visualize", visualize)
    photo = tmp_path / "x.png"
    options = ["--size", "48,64", "--regularizer", "tv=0.1", "--regularizer", "l2=2", "--transforms", "none"]
    options += ["--parametrization", "pixel", "--init", photo, "--diversity", 0.5, "--read", "pre", "--lr", 0.1]
    done = run("visualize", *options, "--out", tmp_path, "--batch-size", 3, "--", "-layer1:2")
    assert done.exit_code == 0
    assert asked["size"] == (48, 64) and asked["regularizers"] == {"tv": 0.1, "l2": 2.0} and asked["init"] == photo
    assert (asked["transforms"], asked["parametrization"], asked["diversity"]) == ("none", "pixel", 0.5)
    assert (asked["read"], asked["lr"], asked["batch_size"], asked["steps"]) == ("pre", 0.1, 3, 512)
    assert asked["interruptible"] and asked["target"] == [tl.target("-layer1:2")]
    run("visualize", "layer1:2", "--size", 48, "--regularizer", "yosinski", "--out", tmp_path)
    assert asked["size"] == 48 and asked["regularizers"] == "yosinski"


def test_json(run: Run, tmp_path: Path) -> None:
    done = run("visualize", "layer3:11", "--steps", 2, "--method", "native", "--out", tmp_path, "--json")
    (facts,) = map(json.loads, done.stdout.splitlines())
    assert facts["target"] == "layer3:11" and facts["method"] == "native" and facts["redirected"] == 0
    assert Path(facts["png"]) == tmp_path / "layer3_11.png" and Path(facts["npz"]).exists()
    assert len(facts["seen_as"]) == 5 and facts["units"][0][0].startswith("layer3:")


def test_ctrl_c_keeps_what_was_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchloupe_core.methods.optimize import Run as Course

    stepped = Course.stepped

    def interrupted(self: Any) -> None:
        stepped(self)
        if self.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Course, "stepped", interrupted)
    for method in ("native", "lucent"):
        out = tmp_path / method
        done = run("visualize", "layer3:11", "--steps", 9, "--method", method, "--out", out)
        assert done.exit_code == 130 and "torchloupe: interrupted after step 3" in done.stderr
        made = tl.open(out / "visualization.npz")
        assert isinstance(made, tl.Visualization) and made.losses.shape == (1, 3)
        assert (out / "layer3_11.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer9:1"], "no layer 'layer9'"),
        (["layer3:"], "layer3:"),
        (["layer3:1", "--size", "x"], "is no number of pixels"),
        (["layer3:1", "--regularizer", "tv=a"], "is not NAME=STRENGTH"),
        (["layer3:1", "--regularizer", "tv=1", "--regularizer", "yosinski"], "is not NAME=STRENGTH"),
        (["layer3:1", "--method", "lucid"], "no visualize method 'lucid'"),
        (["layer3:1", "--init", "nowhere.png"], "no such image file"),
    ],
)
def test_bad_input_is_one_line(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("visualize", *arguments, "--steps", 1, "--out", tmp_path)
    assert done.exit_code == 2 and message in done.stderr
