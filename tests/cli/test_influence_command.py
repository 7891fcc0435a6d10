"""`torchloupe influence`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Run
from PIL import Image

import torchloupe as tl


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in folders of their classes."""
    folder = tmp_path_factory.mktemp("training")
    scenes = tl.demo_scenes(24, 5)
    for number, (image, label) in enumerate(scenes[n] for n in range(len(scenes))):
        place = folder / scenes.classes[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tests")
    paths = [folder / "a.png", folder / "b.png"]
    for path, image in zip(paths, tl.demo_scenes(2, 6).images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return paths


def test_scores_a_drawing_and_what_matters_most(run: Run, training: Path, tests: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("influence", "--train", training, "--test", tests[0], "--test", tests[1], "-k", 2, "--out", out)
    assert done.exit_code == 0
    found = tl.open(out / "influence.npz")
    assert isinstance(found, tl.Influence) and found.method == "cg" and found.layers == ("fc",)
    expected = tl.influence("demo", training, [str(one) for one in tests])
    torch.testing.assert_close(found.scores, expected.scores)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 2 * 2 + 1 and lines[-1] == f"2x24 scores  {out / 'influence.png'}"
    best = expected.top(1)
    name = expected.names[str(int(best.indices[0, 0]))]
    assert lines[0] == f"{tests[0]}  helpful  {best.scores[0, 0].item():+.4g}  {name}"
    assert [line.split("  ")[1] for line in lines[:-1]] == ["helpful"] * 4 + ["harmful"] * 4
    said = done.stderr.splitlines()
    assert len(said) == len(expected.warnings) > 0 and said[0] == f"torchloupe: {expected.warnings[0]}"


def test_json_options_and_the_whole_network(run: Run, training: Path, tests: list[Path], tmp_path: Path) -> None:
    asked = ["--layers", "layer4.conv2, fc", "--method", "ekfac", "--option", "samples=2", "--target", "logit:fish"]
    done = run(
        "influence",
        "--train",
        training,
        "--test",
        tests[0],
        *asked,
        "--damping",
        0.01,
        "--relative",
        "--json",
        "-k",
        1,
        "--out",
        tmp_path,
    )
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert [row["kind"] for row in rows] == ["helpful", "harmful"] and {row["about"] for row in rows} == {"logit:fish"}
    assert last["layers"] == ["layer4.conv2", "fc"] and last["units"].endswith("over the norm of its gradient")
    assert last["sign"].endswith("removing it lowers the target") and last["diagnostics"]["damping"] == 0.01
    options: dict[str, object] = {"layers": ["layer4.conv2", "fc"], "method": "ekfac", "samples": 2, "damping": 0.01}
    expected = tl.influence("demo", training, [str(tests[0])], target="logit:fish", **options).relative()  # type: ignore[arg-type]
    assert rows[0]["score"] == pytest.approx(expected.scores.max().item(), rel=1e-4)


def test_what_cannot_be_asked_is_one_line(run: Run, training: Path, tests: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    (odd / "yak").mkdir(parents=True)
    (odd / "yak" / "a.png").write_bytes(tests[0].read_bytes())
    base = ["--test", tests[0], "--out", tmp_path / "out"]
    for arguments, message in (
        (["--train", tests[0]], "--train is a folder with a subfolder"),
        (["--train", odd], "the training folder 'yak' is no class of the model"),
        (["--train", training, "--method", "cgs"], "no influence method 'cgs'"),
        (["--train", training, "--layers", "layer9"], "no layer 'layer9'"),
        (["--train", training, "--method", "tracin"], "tracin goes along a training"),
    ):
        done = run("influence", *arguments, *base)
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, message


def test_a_picture_that_cannot_be_read_is_reported(run: Run, training: Path, tests: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    done = run("influence", "--train", training, "--test", bad, "--test", tests[1], "-k", 1, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "bad.png is not an image" in done.stderr
    assert all(line.startswith(str(tests[1])) for line in done.stdout.splitlines()[:-1])  # the right name for the row


def test_clean_lists_labels_and_writes_a_page(run: Run, training: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    done = run("clean", training, "--out", out, "-k", 3, "--page", 5, "--by", "loss", "--neighbors", 4)
    assert done.exit_code == 0
    found = tl.open(out / "suspects.npz")
    assert isinstance(found, tl.Suspects) and len(found) == 24 and found.k == 4
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[-1] == f"24 labels  {out / 'suspects.html'}"
    first = int(found.order("loss")[0])
    label, seen = (found.class_name(int(one[first])) for one in (found.labels, found.predictions))
    assert lines[0] == (
        f"{found.name(first)}  {label} -> {seen}  {found.confidences[first]:.0%}  {found.by('loss')[first].item():.4g}"
    )
    assert found.name(first).startswith(str(training)) and (out / "suspects.png").is_file()
    assert "sorted by" in (out / "suspects.html").read_text()


def test_clean_in_json_and_of_no_folder(run: Run, training: Path, tmp_path: Path) -> None:
    done = run("clean", training, "--out", tmp_path / "a", "-k", 1, "--json")
    facts, files = (json.loads(line) for line in done.stdout.splitlines())
    assert set(facts) == {"picture", "label", "seen", "probability", "suspicion"} and files["images"] == 24
    assert Path(files["html"]).is_file() and facts["suspicion"] <= 1
    picture = next(training.rglob("*.png"))
    done = run("clean", picture, "--out", tmp_path / "b")
    assert done.exit_code == 2 and "is no folder" in done.stderr


def test_a_store_is_gone_on_with_and_another_question_refused(
    run: Run, training: Path, tests: list[Path], tmp_path: Path
) -> None:
    asked = ["--train", training, "--test", tests[0], "--layers", "layer4.conv2", "--method", "gradient_dot"]
    for out in ("a", "b"):
        done = run("influence", *asked, "--store", tmp_path / "kept", "--out", tmp_path / out)
        assert done.exit_code == 0
    assert tl.open(tmp_path / "a" / "influence.npz").scores.equal(tl.open(tmp_path / "b" / "influence.npz").scores)  # type: ignore[attr-defined]
    assert list((tmp_path / "kept" / "products" / "blocks").glob("*.npz"))
    done = run("influence", *asked, "--target", "logit:0", "--store", tmp_path / "kept", "--out", tmp_path / "c")
    assert done.exit_code == 2 and "made by another question" in done.stderr and "targets" in done.stderr
