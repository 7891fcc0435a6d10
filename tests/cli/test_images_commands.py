"""`torchloupe dream | invert | fool | texture | stylize | train-stylizer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Run, picture
from PIL import Image

import torchloupe as tl


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    picture(1).save(path)
    return path


SHORT = {
    "dream": ["--target", "layer2", "--steps", "2", "--octaves", "2"],
    "invert": ["--layer", "relu", "--layer", "layer1", "--steps", "3"],
    "fool": ["--steps", "2", "--eps", "4/255"],
    "texture": ["--steps", "3", "--size", "24,32"],
}


@pytest.mark.parametrize("verb", SHORT)
def test_each_command_writes_the_picture_and_the_data(run: Run, photo: Path, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    done = run(verb, photo, *SHORT[verb], "--out", out, "--seed", 3)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("photo.png  ") and done.stdout.endswith(f"photo.png.{verb}.png\n")
    made = tl.open(out / f"photo.png.{verb}.npz")
    asked: dict[str, Any] = {"seed": 3, "progress": False}
    expected = {
        "dream": lambda: tl.dream("demo", photo, "layer2", steps=2, octaves=2, **asked),
        "invert": lambda: tl.invert("demo", photo, ["relu", "layer1"], steps=3, **asked),
        "fool": lambda: tl.fool("demo", photo, steps=2, eps=4 / 255, **asked),
        "texture": lambda: tl.texture("demo", photo, steps=3, size=(24, 32), **asked),
    }[verb]()
    assert isinstance(made, (tl.Visualization, tl.Fooled))
    torch.testing.assert_close(made.images, expected.images, atol=1e-3, rtol=0)
    shown = made.images[-1 if verb == "invert" else 0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels(out / f"photo.png.{verb}.png") / 255, shown, atol=0.5 / 255 + 1e-6)
    assert (out / f"photo.png.{verb}.figure.png").exists() == (verb != "dream")


def test_stylize_by_optimisation_and_by_a_network(run: Run, photos: Path, photo: Path, tmp_path: Path) -> None:
    out, net = tmp_path / "out", tmp_path / "net.npz"
    done = run("stylize", photo, "--style", photos / "a.png", "--steps", 2, "--out", out)
    assert done.exit_code == 0 and done.stdout.startswith("photo.png  style ")
    assert pixels(out / "photo.png.stylize.png").shape == (32, 48, 3)
    short = ["--data", photos, "--width", 3, "--blocks", 0, "--batch-size", 2, "--out", net]
    trained = run("train-stylizer", photos / "a.png", photo, *short, "--steps", 2)
    assert (trained.exit_code, trained.stderr) == (0, "") and trained.stdout.startswith("2 steps, style ")
    stylizer = tl.open(net)
    assert isinstance(stylizer, tl.Stylizer) and stylizer.styles == ("a", "photo") and (tmp_path / "net.png").exists()
    more = run("train-stylizer", photos / "a.png", photo, *short, "--steps", 3, "--json")
    assert json.loads(more.stdout)["steps"] == 3
    stylizer = tl.open(net)
    assert isinstance(stylizer, tl.Stylizer)
    torch.testing.assert_close(stylizer.losses[:2].shape, torch.Size([2, 3]))
    applied = run("stylize", photos, "--stylizer", net, "--in-style", "photo", "--out", out)
    assert applied.exit_code == 0
    assert [line.split("  ")[0] for line in applied.stdout.splitlines()] == ["a.png", "b.jpg", "sub/c.jpg"]
    expected = stylizer.apply(photos / "sub" / "c.jpg", "photo")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels(out / "sub" / "c.jpg.stylize.png") / 255, expected, atol=0.5 / 255 + 1e-5)
    mixed = ["--in-style", "a=0.3", "--in-style", "photo=0.7"]
    assert run("stylize", photo, "--stylizer", net, *mixed, "--out", out).exit_code == 0
    wrong = run("stylize", photo, "--stylizer", net, "--in-style", "waves", "--out", out)
    assert wrong.exit_code == 2 and "no style 'waves'" in wrong.stderr
    no_network = run("stylize", photo, "--stylizer", out / "photo.png.stylize.npz", "--out", out)
    assert no_network.exit_code == 2 and "no trained stylizer" in no_network.stderr


def test_json(run: Run, photo: Path, tmp_path: Path) -> None:
    facts = json.loads(run("fool", photo, *SHORT["fool"], "--out", tmp_path, "--json").stdout)
    assert facts["largest"] == pytest.approx(4 / 255, abs=1e-6) and isinstance(facts["fooled"], bool)
    assert Path(facts["png"]).exists() and Path(facts["npz"]).exists() and facts["before"] in tl.load("demo").classes
    facts = json.loads(run("invert", photo, *SHORT["invert"], "--out", tmp_path, "--json").stdout)
    assert list(facts["distances"]) == ["relu", "layer1"] and len(facts["rmse"]) == 2


def test_a_picture_that_cannot_be_read_is_reported(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    done = run("dream", photos, *SHORT["dream"], "--out", tmp_path / "out")
    assert done.exit_code == 1 and "broken.png is not an image" in done.stderr
    assert len(done.stdout.splitlines()) == 3
    alone = run("dream", photos / "broken.png", *SHORT["dream"], "--out", tmp_path / "out")
    assert alone.exit_code == 2 and "is not an image" in alone.stderr


@pytest.mark.parametrize("verb", SHORT)
def test_ctrl_c_keeps_what_was_made(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    from torchloupe_core.methods.optimize import Run as Course

    stepped = Course.stepped

    def interrupted(self: Any) -> None:
        stepped(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Course, "stepped", interrupted)
    done = run(verb, photo, *SHORT[verb], "--steps", 4, "--out", tmp_path)
    assert done.exit_code == 130 and "torchloupe: interrupted after step 2" in done.stderr
    made = tl.open(tmp_path / f"photo.png.{verb}.npz")
    assert isinstance(made, (tl.Visualization, tl.Fooled)) and made.losses.shape == (1, 2)
    assert (tmp_path / f"photo.png.{verb}.png").exists()


def test_ctrl_c_keeps_what_was_trained(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchloupe_core.methods.feedforward import Training

    step = Training._make_step

    def interrupted(self: Any, watch: Any) -> None:
        if self.step == 2:
            raise KeyboardInterrupt
        step(self, watch)

    monkeypatch.setattr(Training, "_make_step", interrupted)
    short = ["--data", photos, "--width", 3, "--blocks", 0, "--batch-size", 1, "--out", tmp_path / "net.npz"]
    done = run("train-stylizer", photos / "a.png", *short, "--steps", 5)
    assert done.exit_code == 130 and "interrupted after step 2; the same command goes on from there" in done.stderr
    made = tl.open(tmp_path / "net.npz")
    assert isinstance(made, tl.Stylizer) and made.losses.shape == (2, 3)
    monkeypatch.undo()
    assert run("train-stylizer", photos / "a.png", *short, "--steps", 3).stdout.startswith("3 steps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dream", "PHOTO", "--target", "layer9"], "no layer 'layer9'"),
        (["dream", "PHOTO", "--target", "layer3:"], "layer3:"),
        (["dream", "PHOTO"], "Missing option '--target'"),
        (["dream", "nowhere.png", "--target", "layer3"], "no such image file"),
        (["invert", "PHOTO", "--layer", "layer9"], "no layer 'layer9'"),
        (["fool", "PHOTO", "--eps", "a/255"], "is no number, as in 0.03, and no fraction, as in 8/255"),
        (["fool", "PHOTO", "--target", "fihs"], "fihs"),
        (["fool", "PHOTO", "--method", "fgsm", "--steps", "3"], "fgsm has no option 'steps'"),
        (["texture", "PHOTO", "--style-layer", "fc"], "so it has no style"),
        (["stylize", "PHOTO"], "name the style by --style"),
        (["stylize", "PHOTO", "--style", "nowhere.png"], "no such image file"),
        (["stylize", "PHOTO", "--stylizer", "nowhere.npz"], "no such file"),
        (["train-stylizer", "PHOTO", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(run: Run, photo: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "out"
    given = [str(photo) if one == "PHOTO" else one for one in arguments]
    target = out / "net.npz" if given[0] == "train-stylizer" else out
    done = run(*given, "--out", target)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("verb", SHORT)
def test_an_unwritable_folder_is_refused_before_any_work(run: Run, photo: Path, verb: str) -> None:
    done = run(verb, photo, *SHORT[verb], "--out", photo / "out")
    assert done.exit_code == 2 and "cannot write into" in done.stderr
