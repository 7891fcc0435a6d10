"""`torchloupe explain`: pictures in, maps out; what goes wrong is one line and an exit code."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command import Run, picture
from PIL import Image

import torchloupe as tl
from torchloupe import _folder
from torchloupe_adapters.demo.model import SceneNet
from torchloupe_core import images
from torchloupe_core.errors import BadInput, StoreError

GOOD = {
    "a photo, naïve (1).webp",
    "a/x.jpg",
    "b/x.jpg",
    "cmyk.jpg",
    "deep.png",
    "dot.png",
    "gray.png",
    "rgba.png",
    "x.jpg",
    "x.png",
}
BAD = {"corrupt.png", "empty.jpg", "truncated.jpg"}
COMMAND = (sys.executable, "-c", "from torchloupe.cli import main; main()")


def files(out: Path, suffix: str = "") -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob(f"*{suffix}") if path.is_file()}


def fails_if_called(*arguments: object, **options: object) -> None:
    raise AssertionError("this is not to be reached")


@pytest.fixture
def explain(run: Run, tmp_path: Path) -> Callable[..., Result]:
    """`torchloupe explain ... --no-pretrained --out OUT`."""

    def asked(*arguments: object) -> Result:
        return run("explain", *arguments, "--no-pretrained", "--out", tmp_path / "out")

    return asked


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_run(run: Run, odd_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("maps")
    return run("explain", odd_photos, "--no-pretrained", "--out", out), out


def test_every_picture_that_can_be_read_is_explained(odd_run: tuple[Result, Path]) -> None:
    _, out = odd_run
    assert files(out) == {f"{name}.grad_cam.{suffix}" for name in GOOD for suffix in ("png", "npz")}
    for name in GOOD:
        with Image.open(out / f"{name}.grad_cam.png") as drawing:
            assert min(drawing.size) > 200
        found = tl.open(out / f"{name}.grad_cam.npz")
        assert isinstance(found, tl.Attribution)
        assert found.method == "grad_cam" and len(found) == 1 and found.target.startswith("logit:")


def test_what_cannot_be_read_is_one_line_each_and_a_count(odd_run: tuple[Result, Path]) -> None:
    result, _ = odd_run
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == len(BAD) + 1
    for name in BAD:
        assert sum(name in line for line in lines) == 1
    assert lines[-1] == "torchloupe: maps: 10 written, 3 pictures failed"


def test_a_line_for_each_picture_says_target_score_and_file(odd_run: tuple[Result, Path], odd_photos: Path) -> None:
    result, out = odd_run
    lines = result.stdout.splitlines()
    assert len(lines) == len(GOOD)
    found = tl.open(out / "x.jpg.grad_cam.npz")
    assert isinstance(found, tl.Attribution)
    value = f"{found.target} = {found.scores[0].item():.4g}"
    assert f"{odd_photos / 'x.jpg'}  grad_cam  {value}  {out / 'x.jpg.grad_cam.png'}" in lines


def test_pictures_of_one_name_get_their_own_files(explain: Callable[..., Result], out: Path, tmp_path: Path) -> None:
    for seed, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        picture(seed).save(tmp_path / folder / "x.png")
    result = explain(tmp_path / "one", tmp_path / "two", tmp_path / "one/x.png", tmp_path / "two/../two/x.png")
    assert result.exit_code == 0
    assert files(out, ".png") == {"one/x.png.grad_cam.png", "two/x.png.grad_cam.png"}
    one, two = (
        json.loads(Image.open(out / f"{name}/x.png.grad_cam.png").info["torchloupe"]) for name in ("one", "two")
    )
    assert one["asked"]["picture"] != two["asked"]["picture"]


def test_a_folder_to_write_in_may_lie_among_the_pictures(run: Run, photos: Path) -> None:
    for out in (photos / "maps", photos):
        for _ in range(2):
            result = run("explain", photos, "--out", out, "--no-pretrained")
            assert result.exit_code == 0
            assert len(result.stdout.splitlines()) == 3


def test_options_go_to_the_methods_that_have_them(explain: Callable[..., Result], photos: Path, out: Path) -> None:
    options = ("--option", "n_masks=3", "--option", "p=0.25", "--layer", "layer3", "--seed", 5)
    result = explain(photos / "a.png", "--method", "rise,grad_cam", "--method", "saliency", *options)
    assert result.exit_code == 0
    rise, cam = (tl.open(out / f"a.png.{name}.npz") for name in ("rise", "grad_cam"))
    assert isinstance(rise, tl.Attribution) and isinstance(cam, tl.Attribution)
    assert (rise.options["n_masks"], rise.options["p"], rise.seed, rise.layer) == (3, 0.25, 5, None)
    assert (dict(cam.options), cam.layer) == ({}, "layer3")
    assert "a.png.captum.saliency.png" in files(out)


def test_target_is_what_was_asked(explain: Callable[..., Result], photos: Path, out: Path) -> None:
    explain(photos / "a.png", "--target", "0.5*logit:tree-layer3:2")
    found = tl.open(out / "a.png.grad_cam.npz")
    assert isinstance(found, tl.Attribution) and found.target == "0.5*logit:tree-layer3:2"


def test_targets_on_other_outputs_are_read_from_their_text(explain: Callable[..., Result], photos: Path) -> None:
    alike = explain(photos / "a.png", "--target", f'similarity:"{photos / "a.png"}"@fc.in')
    assert alike.exit_code == 0 and "@fc.in = 1 " in alike.stdout
    refused = explain(photos / "a.png", "--target", "box_score:tree@0,0,9,9", "--method", "saliency")
    assert refused.exit_code == 2 and "a box's score needs a detector" in refused.stderr


def test_random_weights_follow_the_seed(explain: Callable[..., Result], photos: Path) -> None:
    first, again, other = (
        json.loads(explain(photos / "a.png", "--json", "--overwrite", "--seed", seed).stdout)["score"]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_pictures_are_read_one_at_a_time(
    explain: Callable[..., Result], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    opened, answered = images.open_picture, tl.explain
    monkeypatch.setattr(images, "open_picture", lambda path: (order.append("read"), opened(path))[1])
    monkeypatch.setattr(tl, "explain", lambda *a, **k: (order.append("explain"), answered(*a, **k))[1])
    assert explain(photos, "--method", "grad_cam,saliency").exit_code == 0
    assert order == ["read", "explain", "explain"] * 3


# -- what is there already --------------------------------------------------------------------------------------------


def test_maps_that_are_there_are_kept_and_not_computed(
    explain: Callable[..., Result], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = explain(photos, "--json")
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    with monkeypatch.context() as patch:
        patch.setattr(SceneNet, "forward", fails_if_called)
        again = explain(photos, "--json")
    assert again.exit_code == 0
    assert {name: (out / name).stat().st_mtime_ns for name in files(out)} == before
    assert "0 written, 3 kept" in again.stderr
    rows, kept = ([json.loads(line) for line in one.stdout.splitlines()] for one in (first, again))
    assert kept == [{**row, "kept": True} for row in rows]
    anew = explain(photos, "--overwrite")
    assert "3 written" in anew.stderr and "kept" not in anew.stderr
    assert all((out / name).stat().st_mtime_ns > then for name, then in before.items())


@pytest.mark.parametrize("other", [("--target", "logit:tree"), ("--seed", "7"), ("--layer", "layer3")])
def test_kept_maps_of_another_question_are_told_apart(
    explain: Callable[..., Result], photos: Path, other: tuple[str, str]
) -> None:
    explain(photos / "a.png")
    result = explain(photos / "a.png", *other)
    assert result.exit_code == 1
    assert "1 of those made from another picture or with other settings" in result.stderr


def test_kept_maps_of_another_picture_are_told_apart(explain: Callable[..., Result], photos: Path) -> None:
    explain(photos / "a.png")
    picture(99).save(photos / "a.png")
    result = explain(photos / "a.png")
    assert result.exit_code == 1 and "another picture" in result.stderr


def test_half_a_pair_is_made_again(explain: Callable[..., Result], photos: Path, out: Path) -> None:
    for suffix in ("npz", "png"):
        explain(photos / "a.png")
        (out / f"a.png.grad_cam.{suffix}").unlink()
        assert "1 written" in explain(photos / "a.png").stderr
        assert len(files(out)) == 2


def test_a_foreign_file_under_the_name_is_kept_and_reported(
    explain: Callable[..., Result], photos: Path, out: Path
) -> None:
    out.mkdir()
    for suffix in ("png", "npz"):
        (out / f"a.png.grad_cam.{suffix}").write_text("mine")
    result = explain(photos / "a.png", "--json")
    assert result.exit_code == 1 and "1 kept" in result.stderr
    assert json.loads(result.stdout)["kept"] is True and "score" not in json.loads(result.stdout)


# -- JSON and progress ------------------------------------------------------------------------------------------------


def test_json_is_one_object_for_each_picture_and_method_and_nothing_else(
    explain: Callable[..., Result], odd_photos: Path, out: Path
) -> None:
    result = explain(odd_photos, "--json", "--method", "grad_cam,saliency")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    asked = {(str(odd_photos / name), method) for name in GOOD for method in ("grad_cam", "captum.saliency")}
    assert {(row["image"], row["method"]) for row in rows} == asked and len(rows) == len(asked)
    for row in rows:
        assert set(row) == {
            *("image", "method", "target", "score", "layer", "seconds", "forwards", "png", "npz", "kept"),
        }
        assert isinstance(row["score"], float) and row["forwards"] > 0 and row["kept"] is False
        assert Path(row["png"]).is_file() and Path(row["npz"]).is_file()


def test_a_bar_only_where_it_was_asked_for(
    explain: Callable[..., Result], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tl.explain
    monkeypatch.setattr(tl, "explain", lambda *a, **k: (time.sleep(0.4), real(*a, **k))[1])
    assert "3/3" not in explain(photos, "--overwrite").stderr
    result = explain(photos, "--overwrite", "--progress", "--json")
    assert "3/3" in result.stderr
    assert [json.loads(line)["kept"] for line in result.stdout.splitlines()] == [False] * 3


def test_warnings_and_logs_of_libraries_are_not_shown(
    explain: Callable[..., Result], photos: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    real = tl.explain

    def noisy(*arguments: Any, **options: Any) -> Any:
        warnings.warn("clutter", stacklevel=1)
        logging.getLogger("some.library").warning("clutter")
        return real(*arguments, **options)

    monkeypatch.setattr(tl, "explain", noisy)
    assert "clutter" not in explain(photos).output
    assert not recwarn.list


# -- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "gradcam"], "no explain method 'gradcam'; did you mean 'grad_cam'"),
        (["--method", ","], "no method was given"),
        (["--option", "n=1"], "grad_cam has no option 'n'; its options: none"),
        (["--method", "rise,cam", "--option", "n=1"], "rise has no option 'n'; its options: n_masks=4000"),
        (["--method", "rise", "--option", "n_masks=many"], "option n_masks of rise takes int; got 'many'"),
        (["--method", "rise", "--option", "n_masks=1.5"], "option n_masks of rise takes int; got 1.5"),
        (["--method", "rise", "--option", "n_masks=true"], "option n_masks of rise takes int; got True"),
        (["--method", "lime", "--option", "segments=3"], "a tensor, which only Python can give"),
        (["--method", "rise", "--layer", "layer4"], "rise reads the input, not a layer"),
        (["--target", "layer4:"], "expected a channel number"),
        (["--target", "region:tree@9,0,3,4"], "a box is (top, left, bottom, right) in pixels"),
        (["missing.jpg"], "no such image file: missing.jpg"),
    ],
)
def test_what_is_wrong_by_itself_is_found_before_the_model_is_opened(
    explain: Callable[..., Result],
    photos: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(tl, "load", fails_if_called)
    result = explain(photos, *arguments)
    assert result.exit_code == 2 and not result.stdout and not out.exists()
    assert result.stderr.startswith("torchloupe: ") and said in result.stderr
    assert len(result.stderr.splitlines()) == (3 if "--target" in arguments else 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "logit:tre"], "no class 'tre'; did you mean 'tree'"),
        (["--target", "logit:12"], "no class 12; the model has 12 outputs"),
        (["--target", "layer4:128"], "'layer4' has channels 0 to 127"),
        (["--layer", "layr4"], "no layer 'layr4'; did you mean 'layer4'"),
        (["--model", "nothing"], "no model 'nothing'"),
        (["--model", "timm/resnet1O"], "no timm model 'resnet1O'"),
        (["--weights", "V2"], "demo has no option 'weights'"),
        (["--checkpoint", "missing.pt"], "no such checkpoint: missing.pt"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
    ],
)
def test_what_the_model_lacks_is_found_before_the_first_picture(
    explain: Callable[..., Result], photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(tl.Handle, "inputs", fails_if_called)
    monkeypatch.setattr(tl, "explain", fails_if_called)
    result = explain(photos, *arguments)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("torchloupe: ") and said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--option", "a"], ["--option", "=1"], ["--seed", "-1"], ["--batch-size", "0"]])
def test_arguments_that_do_not_parse_exit_2(explain: Callable[..., Result], photos: Path, arguments: list[str]) -> None:
    result = explain(photos, *arguments)
    assert result.exit_code == 2 and "Invalid value" in result.stderr


def test_an_empty_folder_exits_2(explain: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    result = explain(tmp_path / "none")
    assert result.exit_code == 2 and "no images in" in result.stderr


def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tl, "load", fails_if_called)
    result = run("explain", photos, "--out", photos / "a.png" / "out", "--no-pretrained")
    assert result.exit_code == 2
    assert result.stderr.startswith("torchloupe: cannot write into") and len(result.stderr.splitlines()) == 1


def test_one_method_that_does_not_apply_exits_2(explain: Callable[..., Result], photos: Path, out: Path) -> None:
    for arguments in (
        ["cam", "--target", "prob:tree"],
        ["rise", "--option", "n_masks=0"],
        ["grad_cam", "--layer", "fc"],
    ):
        result = explain(photos, "--method", *arguments)
        assert result.exit_code == 2 and not files(out)
        assert len(result.stderr.splitlines()) == 1 and not result.stdout


def test_of_several_methods_one_that_does_not_apply_is_left_out(
    explain: Callable[..., Result], photos: Path, out: Path
) -> None:
    result = explain(photos, "--method", "cam,grad_cam", "--target", "prob:tree")
    assert result.exit_code == 1
    assert len(files(out, ".png")) == 3 and not any(".cam." in name for name in files(out))
    assert result.stderr.count("cam is left out: CAM explains sums of logits only") == 1


def test_a_picture_that_one_method_fails_on_leaves_the_others_alone(
    explain: Callable[..., Result], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tl.explain, []  # type: Any, list[str]

    def fails_on_second(*arguments: Any, **options: Any) -> Any:
        calls.append(options["method"])
        if len(calls) == 3:
            raise BadInput("the model's output holds NaN")
        return real(*arguments, **options)

    monkeypatch.setattr(tl, "explain", fails_on_second)
    result = explain(photos, "--method", "grad_cam,saliency")
    assert result.exit_code == 1 and len(files(out, ".png")) == 5
    assert f"torchloupe: {photos / 'b.jpg'}: the model's output holds NaN\n" in result.stderr


def test_a_name_too_long_to_write_is_that_pictures_trouble(
    explain: Callable[..., Result], photos: Path, out: Path
) -> None:
    picture(9).save(photos / ("a" * 245 + ".jpg"))
    result = explain(photos)
    assert result.exit_code == 1 and len(files(out, ".png")) == 3
    assert "name too long" in result.stderr and "1 picture failed" in result.stderr


def test_a_full_disk_ends_the_work(
    explain: Callable[..., Result], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise StoreError(f"cannot write {path}: disk full") from OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(_folder, "write_whole", full)
    result = explain(photos)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "disk full" in result.stderr
    assert not files(out, ".png") and not files(out, ".part")


# -- Ctrl-C and pipes -------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_done(
    explain: Callable[..., Result], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tl.explain, []  # type: Any, list[int]

    def stopped_at_third(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(tl, "explain", stopped_at_third)
    result = explain(photos)
    assert result.exit_code == 130
    assert result.stderr == "torchloupe: stopped; maps: 2 written; the same command goes on from there\n"
    assert len(files(out)) == 4
    assert "1 written, 2 kept" in explain(photos).stderr


@pytest.mark.slow
def test_a_real_ctrl_c_leaves_whole_files_and_no_traceback(photos: Path, out: Path) -> None:
    for seed in range(40):
        picture(seed).save(photos / f"{seed}.png")
    with started(photos, out) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.startswith("torchloupe: stopped; maps: ") and len(said.splitlines()) == 1
    assert 0 < len(files(out, ".png")) < 40 and not files(out, ".part")
    for name in files(out, ".npz"):
        tl.open(out / name)


@pytest.mark.slow
def test_a_reader_that_leaves_is_met_with_silence(photos: Path, out: Path) -> None:
    with started(photos, out) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


def started(photos: Path, out: Path) -> subprocess.Popen[str]:
    arguments = [*COMMAND, "explain", str(photos), "--no-pretrained", "--out", str(out)]
    source = [str(Path(__file__).parents[2] / name) for name in ("src", "adapters", "recipes")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(source)}
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit a deaf ear
    )


# -- other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["timm/resnet10t", "torchvision/resnet18"])
def test_models_of_other_sources(explain: Callable[..., Result], photos: Path, out: Path, model: str) -> None:
    result = explain(photos / "b.jpg", "--model", model, "--json")
    assert result.exit_code == 0
    found = tl.open(json.loads(result.stdout)["npz"])
    assert isinstance(found, tl.Attribution)
    assert found.layer == "layer4" and found.size[0] == found.size[1] >= 160
