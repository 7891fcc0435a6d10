"""`torchloupe weights`, `torchloupe activations` and `torchloupe examples`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Run
from PIL import Image

import torchloupe as tl


def test_weights_writes_a_drawing_and_the_data(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("weights", "demo", "conv1", "--channels", "3, 1", "--scale", "each", "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"conv1  2 filters  {out / 'conv1.weights.png'}\n"
    found = tl.open(out / "conv1.weights.npz")
    assert isinstance(found, tl.Filters) and found.channels == (3, 1) and found.scale == "each"
    assert torch.equal(found.images, tl.weights("demo", "conv1", channels=[3, 1]).images)
    with Image.open(out / "conv1.weights.png") as image:
        assert image.format == "PNG"


def test_weights_over_an_earlier_layer_as_json(run: Run, tmp_path: Path) -> None:
    done = run("weights", "demo", "layer2", "--to", "layer1", "--channels", 0, "--out", tmp_path, "--json")
    facts = json.loads(done.stdout)
    assert facts["to"] == "layer1" and facts["shape"] == [1, 32, 7, 7]
    assert Path(facts["npz"]).name == "layer2.over.layer1.weights.npz" and Path(facts["png"]).exists()


def test_random_weights_are_the_same_for_a_seed(run: Run, tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        run("weights", "demo", "conv1", "--no-pretrained", "--seed", seed, "--out", tmp_path)
        found.append(tl.open(tmp_path / "conv1.weights.npz").images)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_activations_of_a_folder(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (photos / "bad.png").write_bytes(b"no picture")
    done = run("activations", photos, "--layer", "layer4", "--channels", "2,5", "--out", out)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"torchloupe: {photos / 'bad.png'} is not an image",
        "torchloupe: activations: 3 written, 1 picture failed",
    ]
    assert len(done.stdout.splitlines()) == 3
    for name in ("a.png", "b.jpg", "sub/c.jpg"):
        found = tl.open(out / f"{name}.layer4.activations.npz")
        assert isinstance(found, tl.Activations) and found.masks is None
        expected = tl.activations("demo", photos / name, "layer4", channels=[2, 5])
        assert torch.equal(found.maps, expected.maps)
        assert (out / f"{name}.layer4.activations.png").stat().st_size > 1000


def test_a_quantile_is_over_all_pictures(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    done = run("activations", photos, "--layer", "layer3", "--channels", "2,5", "--threshold", "90%", "--out", tmp_path)
    assert done.stderr.count("bad.png") == 1  # reported once although the pictures are read twice
    good = [photos / name for name in ("a.png", "b.jpg", "sub/c.jpg")]
    expected = tl.activations("demo", good, "layer3", channels=[2, 5], threshold="90%")
    for name in ("a.png", "sub/c.jpg"):
        found = tl.open(tmp_path / f"{name}.layer3.activations.npz")
        assert isinstance(found, tl.Activations) and found.thresholds is not None and expected.thresholds is not None
        torch.testing.assert_close(found.thresholds, expected.thresholds)
        assert found.threshold == expected.threshold == "90% quantile of 3 images"


def test_a_quantile_over_another_folder(run: Run, photos: Path, tmp_path: Path) -> None:
    options = ("--layer", "layer3", "--channels", "2,5", "--out", tmp_path / "out")
    run("activations", photos / "a.png", *options, "--threshold", "90%", "--over", photos)
    expected = tl.activations("demo", photos / "a.png", "layer3", channels=[2, 5], threshold="90%", over=photos)
    found = tl.open(tmp_path / "out" / "a.png.layer3.activations.npz")
    assert isinstance(found, tl.Activations) and found.thresholds is not None and expected.thresholds is not None
    assert torch.equal(found.thresholds, expected.thresholds) and found.threshold == "90% quantile of 3 images"
    done = run("activations", photos / "a.png", *options, "--threshold", "0.5", "--over", photos)
    assert done.exit_code == 2 and 'is a quantile, as "99.5%"; got 0.5' in done.stderr


def test_a_threshold_is_a_number_too(run: Run, photos: Path, tmp_path: Path) -> None:
    done = run("activations", photos / "a.png", "--layer", "conv1", "--threshold", "-0.5", "--out", tmp_path, "--json")
    facts = json.loads(done.stdout)
    assert facts["shape"] == [1, 24, 32, 32] and facts["layer"] == "conv1"
    found = tl.open(facts["npz"])
    assert isinstance(found, tl.Activations) and found.threshold == "-0.5"
    assert done.stderr == "torchloupe: activations: 1 written\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["weights", "demo", "layer9"], "no layer 'layer9'; did you mean"),
        (["weights", "demo", "bn1"], "holds no filters"),
        (["weights", "demo", "conv1", "--channels", "99"], "channels 0 to 23; got 99"),
        (["weights", "demo", "conv1", "--channels", "a"], "'a' is not a list of numbers"),
        (["weights", "demo", "conv1", "--to", "layer1"], "does not depend on"),
        (["weights", "demo", "conv1", "--scale", "own"], "'own' is not one of"),
        (["weights", "dmeo", "conv1"], "no model 'dmeo'"),
        (["activations", "PHOTOS", "--layer", "layer9"], "no layer 'layer9'"),
        (["activations", "PHOTOS", "--layer", "layer4", "--channels", "999"], "channels 0 to 127; got 999"),
        (["activations", "PHOTOS", "--layer", "layer4", "--threshold", "high"], "'high' is no value"),
        (["activations", "PHOTOS", "--layer", "layer4", "--threshold", "100%"], 'below "100%"'),
        (["activations", "PHOTOS", "--layer", "fc", "--threshold", "9%"], "one position"),
        (["activations", "nowhere.jpg", "--layer", "layer4"], "no such image file"),
        (["activations", "PHOTOS"], "Missing option '--layer'"),
    ],
)
def test_what_cannot_be_done_exits_2(run: Run, photos: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    given = [str(photos) if one == "PHOTOS" else one for one in arguments]
    done = run(*given, "--out", tmp_path / "out")
    assert done.exit_code == 2 and words in done.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_written_is_said_before_any_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("weights", "demo", "conv1", "--out", tmp_path / "file" / "out")
    assert done.exit_code == 2 and "cannot write into" in done.stderr


def test_examples_of_a_folder(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (photos / "bad.png").write_bytes(b"no picture")
    done = run("examples", photos, "--target", "layer3:5", "--target", "layer4", "-k", 2, "--out", out)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"torchloupe: {photos / 'bad.png'} is not an image",
        "torchloupe: examples: 3 pictures searched, 1 could not be read",
    ]
    good = [photos / name for name in ("a.png", "b.jpg", "sub/c.jpg")]
    expected = tl.examples("demo", good, ["layer3:5", "layer4"], k=2)
    one, layer = (tl.open(out / f"{stem}.examples.npz") for stem in ("layer3_5", "layer4"))
    assert isinstance(one, tl.Examples) and isinstance(layer, tl.Examples)
    assert one.units == ("layer3:5",) and layer.units == expected.units[1:] and layer.asked[0] == "layer4"
    assert torch.equal(torch.cat([one.scores, layer.scores]), expected.scores)
    assert [one.name(i) for i in one.indices[0].tolist()] == [expected.name(i) for i in expected.indices[0].tolist()]
    first, second = done.stdout.splitlines()
    best = expected.name(int(expected.indices[0, 0]))
    assert first == f"layer3_5  layer3:5 = {expected.scores[0, 0]:.4g} in {best}  {out / 'layer3_5.examples.png'}"
    assert second.startswith("layer4  layer4:")
    assert (out / "layer4.examples.png").stat().st_size > 5000
    again = run(
        "examples", photos, out, "--target", "layer3:5", "-k", 2, "--out", out
    )  # its own drawings are no images
    assert again.stderr.splitlines()[-1] == "torchloupe: examples: 3 pictures searched, 1 could not be read"


def test_examples_as_json(run: Run, photos: Path, tmp_path: Path) -> None:
    options = ("--crop", "image", "--band", "min", "--json", "--out", tmp_path)
    done = run("examples", photos, "--target", "-layer1:2+0.5*logit:0", "--target", "fc", *options)
    assert done.exit_code == 0
    joint, head = map(json.loads, done.stdout.splitlines())
    assert (
        joint["target"] == "-layer1:2+0.5*logit:0" and Path(joint["npz"]).name == "-layer1_2+0.5_logit_0.examples.npz"
    )
    assert len(head["units"]) == 12 and head["units"][3]["unit"] == "fc:3"
    scores = joint["units"][0]["scores"]
    assert len(scores) == 3 and scores == sorted(scores)
    assert joint["units"][0]["boxes"] == [[0, 0, 64, 64]] * 3
    assert sorted(joint["units"][0]["images"]) == [str(photos / name) for name in ("a.png", "b.jpg", "sub/c.jpg")]


def test_examples_says_what_is_wrong(run: Run, photos: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--target", "fc:3"), 'crop="image" shows the images'),
        (("--target", "layer3:999"), "has channels 0 to"),
        (("--target", "layer3:1", "-k", 3, "--band", "spectrum"), "k is at least 5 here; got 3"),
    ):
        done = run("examples", photos, *arguments, "--out", tmp_path / "out")
        assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
