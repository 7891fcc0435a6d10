"""Methods side by side: what is said of them, kept of them, and left behind."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import torchloupe as tl
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.comparison import Row, _cell, bootstrapped
from torchloupe_core.errors import BadInput, NotApplicable, StoreError, UnknownName
from torchloupe_core.metrics.floors import FLOORS
from torchloupe_core.specimens import SPECIMENS

METHODS = ["cam", "grad_cam", "guided_backprop", "integrated_gradients"]
METRICS = ["insertion", "deletion", "pointing", "iou", "sparsity", "randomisation", "seed_stability"]
OPTIONS: dict[str, Any] = {"integrated_gradients": {"steps": 8}, "insertion": {"step": 256}, "deletion": {"step": 256}}
QUICK: dict[str, Any] = {"methods": ["cam", "saliency"], "metrics": ["sparsity"], "progress": False}


@pytest.fixture(scope="module")
def scenes() -> Any:
    return tl.demo_scenes(24, seed=11)


@pytest.fixture(scope="module")
def found(scenes: Any) -> tl.Comparison:
    return tl.compare(
        "demo",
        scenes.images,
        methods=METHODS,
        metrics=METRICS,
        masks=scenes.masks[:, 0],
        options=OPTIONS,
        progress=False,
    )


def test_what_comes_back(found: tl.Comparison) -> None:
    assert found.methods == ("cam", "grad_cam", "captum.guided_backprop", "captum.integrated_gradients", *FLOORS)
    assert (
        found.metrics == tuple(METRICS) and found.better[:2] == ("higher", "lower") and found.values.shape == (7, 7, 24)
    )
    assert found.layers[:2] == ("layer4", "layer4") and found.layers[2] == ""
    assert found.maps.shape == (7, 6, 64, 64) and found.images.shape == (6, 3, 64, 64) and len(found.targets) == 24
    assert found.cost_forwards[0] == 1 and found.cost_forwards[3] > 8 and (found.cost_seconds[:4] > 0).all()
    assert found.memory.isnan().all() and found.refused == {} and len(found) == 7
    randomised = found.values[0, METRICS.index("randomisation")]
    assert randomised[:16].isfinite().all() and randomised[16:].isnan().all()


def test_values_are_those_of_the_metrics_alone(scenes: Any, found: tl.Comparison) -> None:
    targets = [tl.target(text) for text in found.targets]
    explained = tl.explain("demo", scenes.images, target=targets, method="integrated_gradients", steps=8).upsample()
    inside = scenes.masks[:, 0].flatten(1)[torch.arange(24), explained.flatten(1).argmax(1)]
    assert found.values[3, METRICS.index("pointing")].tolist() == inside.float().tolist()
    assert found.row("captum.integrated_gradients", "pointing").mean == pytest.approx(inside.float().mean().item())


def test_real_methods_beat_what_knows_nothing_of_the_model(found: tl.Comparison) -> None:
    for metric in ("insertion", "deletion", "pointing", "iou"):
        for name in ("cam", "captum.integrated_gradients"):
            assert set(found.row(name, metric).beats) >= {"random", "centre"}, (name, metric)


def test_two_names_of_one_map_are_said_to_be_one(found: tl.Comparison) -> None:
    (note,) = [one for one in found.notes["cam"] if "same maps" in one]
    assert note.startswith("the same maps as grad_cam up to scale; on a layer that is averaged")
    for metric in METRICS:
        assert found.row("cam", metric).rank == found.row("grad_cam", metric).rank
    assert "grad_cam" not in found.notes and found.agreement[0, 0, 1] == pytest.approx(1)


@pytest.mark.slow
def test_every_method_that_reads_a_layer_or_shares_out_beats_all_that_knows_nothing() -> None:
    """On insertion, deletion and pointing, the intervals apart; and what does not hold for slopes alone."""
    scenes = tl.demo_scenes(48, seed=5)
    good = ["cam", "layer_cam", "guided_grad_cam", "guided_backprop", "integrated_gradients", "deep_lift", "occlusion"]
    worse = {"saliency": {"pointing"}, "deconvolution": {"insertion", "deletion", "pointing"}}
    options: dict[str, Any] = {"integrated_gradients": {"steps": 8}, "occlusion": {"window": 12, "stride": 8}}
    options |= {"insertion": {"step": 512}, "deletion": {"step": 512}}
    found = tl.compare(
        "demo",
        scenes.images,
        methods=[*good, *worse],
        metrics=["insertion", "deletion", "pointing"],
        masks=scenes.masks[:, 0],
        options=options,
        progress=False,
    )
    for row in found.rows:
        if row.method not in FLOORS:
            lacking = worse.get(row.method.removeprefix("captum."), set())
            assert (set(row.beats) == set(FLOORS)) == (row.metric not in lacking), (row.method, row.metric)


def test_a_method_that_looks_past_the_model_is_named(found: tl.Comparison) -> None:
    (note,) = found.notes["captum.guided_backprop"]
    assert note.startswith("hardly looks at the model")
    assert (
        found.row("cam", "randomisation").mean < 0.3 < 0.5 < found.row("captum.guided_backprop", "randomisation").mean
    )
    assert set(found.notes) == {"cam", "captum.guided_backprop"}


def test_tables(found: tl.Comparison, tmp_path: Path) -> None:
    text = found.table(metrics=["deletion", "pointing"])
    lines = text.splitlines()
    assert lines[0].split() == ["method", "deletion", "↓", "pointing", "↑", "ms/image", "forwards", "backwards"]
    assert [line.split()[0] for line in lines[5:8]] == list(FLOORS)
    assert "captum.guided_backprop: hardly looks at the model" in text
    records = list(csv.DictReader(io.StringIO(found.to_csv(tmp_path / "rows.csv"))))
    assert (tmp_path / "rows.csv").read_text() == found.to_csv() and len(records) == 7 * 7
    best = next(one for one in records if one["metric"] == "deletion")
    assert best["rank"] == "1" and float(best["mean"]) == found.row(best["method"], "deletion").mean
    latex = found.to_latex(metrics=["deletion"])
    assert r"captum.guided\_backprop" in latex and r"\textbf{" in latex and latex.count(r"\midrule") == 2
    with pytest.raises(BadInput, match="no metric 'delete'; there are insertion, deletion"):
        found.table(metrics=["delete"])
    with pytest.raises(BadInput, match="no 'lime' under 'iou'"):
        found.row("lime", "iou")


def test_small_numbers_can_be_read() -> None:
    row = Row("a", "b", "lower", 8.66e-5, 6.6e-5, 10.74e-5, 9, 1, ())
    assert _cell(row, True) == "8.66e-05 ±2.1e-05 (1)"
    assert _cell(replace(row, mean=0.0123, low=0.0121, high=0.0125), False) == "0.0123 ±0.0002"


def test_one_image_may_stand_alone(scenes: Any, tmp_path: Path) -> None:
    picture = to_pil_image(scenes.images[0])
    picture.save(tmp_path / "a.png")
    all_of = tl.compare("demo", scenes.images[:1], **QUICK)
    for alone in (scenes.images[0].permute(1, 2, 0).numpy(), picture, tmp_path / "a.png", str(tmp_path / "a.png")):
        found = tl.compare("demo", alone, **QUICK)
        assert torch.equal(found.values, all_of.values) and found.targets == all_of.targets
    inputs = tl.load("demo").inputs(scenes.images[:1])[0]
    assert torch.equal(tl.compare("demo", inputs, **QUICK).values, all_of.values)
    assert tl.recommend("demo", picture, methods=["cam"], metrics=["sparsity"], progress=False).recommended == "cam"


def test_intervals() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean, low, high, count = bootstrapped(torch.cat([values, torch.full((3,), torch.nan)]))
    assert count == 400 and mean == pytest.approx(values.mean().item(), abs=1e-6)
    half = 1.96 * values.std().item() / 20  # of a mean of 400
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)
    assert bootstrapped(torch.full((2,), torch.nan))[3] == 0


def test_saved_and_drawn(found: tl.Comparison, tmp_path: Path) -> None:
    again = tl.open(found.save(tmp_path / "found"))
    assert isinstance(again, tl.Comparison) and again.table() == found.table()
    for kind, panels in {"bars": 7 + 2, "maps": 6 * 8, "cost": 1, "agreement": 4}.items():
        figure = again.figure(kind=kind)
        assert len(figure.axes) == panels, kind
    with pytest.raises(BadInput, match=r"kind is .bars."):
        again.figure(kind="pie")
    assert found._repr_png_()[:4] == b"\x89PNG"


@pytest.mark.parametrize("specimen", ["plain", "residual", "concat", "depthwise", "vit_registers"])
def test_nothing_is_left_behind_on_any_model(specimen: str) -> None:
    """Methods that are refused for a model are left out with the reason, and the others go on."""
    handle, inputs = SPECIMENS[specimen]()
    before = Snapshot(handle.module)
    found = tl.compare(
        handle,
        inputs,
        methods=["cam", "grad_cam", "saliency"],
        metrics=["deletion", "randomisation", "input_invariance"],
        options={"deletion": {"step": 512}},
        progress=False,
    )
    assert before.differences() == []
    refused = {"concat": ["cam"], "vit_registers": ["cam"]}.get(specimen, [])
    assert list(found.refused) == refused and ("cam" in found.methods) == (not refused)
    assert found.values[:-3].isfinite().all()


def test_nothing_is_left_behind_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, inputs = SPECIMENS["plain"]()
    before = Snapshot(handle.module)
    with pytest.raises(BadInput, match="step is a number of pixels"):
        tl.compare(handle, inputs, methods=["cam"], metrics=["deletion"], options={"deletion": {"step": 0}})
    assert before.differences() == []


def test_a_study_goes_on_where_it_stopped(scenes: Any, tmp_path: Path) -> None:
    store, model = tmp_path / "study", tl.load("demo")
    asked: dict[str, Any] = {"methods": ["cam", "saliency"], "metrics": ["sparsity", "complexity"], "progress": False}
    images = scenes.images[:20]
    whole = tl.compare(model, images, store=store, **asked)
    (store / "blocks" / "00000001.npz").write_bytes(b"torn")
    forwards = model.forwards
    again = tl.compare(model, images, store=store, **asked)
    assert torch.equal(again.values, whole.values) and again.table(metrics=["sparsity"]).split()[0] == "method"
    assert 0 < model.forwards - forwards <= 40  # the four images of the second group alone
    forwards = model.forwards
    assert torch.equal(tl.compare(model, images, store=store, **asked).values, whole.values)
    assert model.forwards - forwards <= 8  # nothing but what identifies the model
    with pytest.raises(StoreError, match=r"made by another question[^;]*; (.|\n)*seed: given 1, stored 0"):
        tl.compare(model, images, store=store, seed=1, **asked)
    with pytest.raises(StoreError, match="metrics"):
        tl.compare(model, images, store=store, **{**asked, "metrics": ["sparsity"]})
    with pytest.raises(StoreError, match="resume=True goes on"):
        tl.compare(model, images, store=store, resume=False, **asked)
    with pytest.raises(StoreError, match="memory measured: given True, stored False"):
        tl.compare(model, images, store=store, memory=True, **asked)
    masks = scenes.masks[:20, 0]
    tl.compare(model, images, store=tmp_path / "masked", masks=masks, **asked)
    with pytest.raises(StoreError, match="masks: given"):
        tl.compare(model, images, store=tmp_path / "masked", masks=~masks, **asked)


@pytest.mark.slow
def test_ranks_share_a_comparison_and_each_gets_all_of_it(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    path = [one for one in sys.path if one.endswith(("src", "adapters", "recipes"))]
    main.write_text(
        f"import sys\nsys.path[:0] = {path!r}\nimport os, torch, torchloupe as tl\n"
        "model, scenes = tl.load('demo'), tl.demo_scenes(64, seed=1)\n"
        "asked = {'methods': ['cam', 'saliency'], 'metrics': ['sparsity', 'pointing'], 'masks': scenes.masks[:, 0]}\n"
        f"found = tl.compare(model, scenes.images, store={str(tmp_path / 'store')!r}, progress=False, **asked)\n"
        f"found.save({str(tmp_path)!r} + '/rank' + os.environ['RANK'])\n"
        f"open({str(tmp_path)!r} + '/forwards' + os.environ['RANK'], 'w').write(str(model.forwards))\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(main)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    scenes = tl.demo_scenes(64, seed=1)
    asked: dict[str, Any] = {"methods": ["cam", "saliency"], "metrics": ["sparsity", "pointing"], "progress": False}
    alone = tl.compare("demo", scenes.images, masks=scenes.masks[:, 0], **asked)
    for rank in range(2):
        found = tl.open(tmp_path / f"rank{rank}.npz")
        assert isinstance(found, tl.Comparison) and found.targets == alone.targets
        torch.testing.assert_close(found.values, alone.values, atol=1e-5, rtol=0)
    both = [int((tmp_path / f"forwards{rank}").read_text()) for rank in range(2)]
    assert all(0 < one < sum(both) for one in both)


def test_maps_that_are_one_are_judged_once(scenes: Any) -> None:
    """By metrics that do not mind the scale; the others ask each method."""
    model = tl.load("demo")
    asked: dict[str, Any] = {"metrics": ["deletion", "seed_stability"], "progress": False}
    forwards = [model.forwards]
    for methods in (["cam"], ["cam", "grad_cam"], ["cam", "layer_cam"]):
        found = tl.compare(model, scenes.images[:5], methods=methods, **asked)
        forwards.append(model.forwards)
        if "grad_cam" in methods:
            assert found.notes["cam"][0].startswith("the same maps as grad_cam up to scale; on a layer")
            assert torch.equal(found.values[0], found.values[1])
    one, alike, apart = torch.tensor(forwards).diff().tolist()
    assert alike - one == 6  # of the method itself, once about one image before
    assert apart - one == 6 + 5 * 65
    named = tl.compare(model, scenes.images[:2], methods=["hires_cam", "cam", "grad_cam"], metrics=["sparsity"])
    assert list(named.notes) == ["hires_cam"] and "as cam, grad_cam up to scale" in named.notes["hires_cam"][0]


@pytest.mark.parametrize(
    "methods", [["grad_cam", "grad_cam++", "layer_cam"], ["saliency", "input_x_gradient"], ["smooth_grad", "var_grad"]]
)
def test_what_methods_do_alike_is_done_once(scenes: Any, methods: list[str]) -> None:
    """Also of the models that the metrics ask them about; each is charged for it."""
    model, images = tl.load("demo"), scenes.images[:3]
    samples = {name: {"n_samples": 4} for name in methods if name in ("smooth_grad", "var_grad")}
    asked: dict[str, Any] = {"metrics": ["sparsity", "randomisation"], "progress": False, "seed": 1}
    alone, passes = [], []
    for several in (*([name] for name in methods), methods):
        options = {name: more for name, more in samples.items() if name in several}
        before = model.forwards, model.backwards
        alone.append(tl.compare(model, images, methods=several, options=options, **asked))
        passes.append((model.forwards - before[0], model.backwards - before[1]))
    *alone, together = alone
    ahead = (5, 4) if samples else (1, 1)  # of each other method about one image, before any is timed
    others = len(methods) - 1
    assert passes[-1] == tuple(one + others * more for one, more in zip(passes[0], ahead, strict=True))
    for row, one in enumerate(alone):
        assert torch.equal(together.maps[row], one.maps[0])
        assert torch.equal(together.values[row].nan_to_num(-1), one.values[0].nan_to_num(-1))
        assert together.cost_forwards[row] == one.cost_forwards[0]
        assert together.cost_backwards[row] == one.cost_backwards[0]
        assert together.cost_seconds[row] > 0.2 * together.cost_seconds[0]


def test_passes_are_counted(scenes: Any) -> None:
    methods = ["cam", "grad_cam", "integrated_gradients", "smooth_grad"]
    options: dict[str, Any] = {"integrated_gradients": {"steps": 8}, "smooth_grad": {"n_samples": 6}}
    found = tl.compare("demo", scenes.images[:3], methods=methods, metrics=["sparsity"], options=options)
    assert found.cost_backwards.tolist() == [0, 1, 8, 6, 0, 0, 0]
    assert found.cost_forwards[:2].tolist() == [1, 1]


def test_boxes_and_cut_outs_are_scored(scenes: Any) -> None:
    pytest.importorskip("cv2")
    masks = scenes.masks[:16, 0]
    found = tl.compare(
        "demo",
        scenes.images[:16],
        methods=["grad_cam"],
        metrics=["corloc", "segmentation"],
        masks=masks,
        progress=False,
    )
    targets = [tl.target(text) for text in found.targets]
    explained = tl.explain("demo", scenes.images[:16], target=targets)
    cut = explained.segment()
    expected = (cut & masks).sum((1, 2)) / (cut | masks).sum((1, 2))
    torch.testing.assert_close(found.values[0, 1], expected, atol=1e-6, rtol=0)
    hits = []
    for boxes, mask in zip(explained.boxes(), masks, strict=True):
        top, left, bottom, right = boxes[0]
        rows, columns = mask.nonzero(as_tuple=True)
        truth, own = torch.zeros_like(mask), torch.zeros_like(mask)
        truth[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = own[top:bottom, left:right] = True
        hits.append(float((truth & own).sum() / (truth | own).sum() > 0.5))
    assert found.values[0, 0].tolist() == hits and sum(hits) > 0


def test_a_folder_with_masks(scenes: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for index in range(4):
        Image.fromarray(scenes.images[index].permute(1, 2, 0).numpy()).save(tmp_path / f"images/{index}.png")
        Image.fromarray((scenes.masks[index, 0].numpy() * 255).astype("uint8")).save(tmp_path / f"masks/{index}.png")
    asked: dict[str, Any] = {"methods": ["cam"], "metrics": ["iou", "pointing"], "progress": False}
    found = tl.compare("demo", tmp_path / "images", masks=tmp_path / "masks", **asked)
    given = tl.compare("demo", scenes.images[:4], masks=scenes.masks[:4, 0], **asked)
    torch.testing.assert_close(found.values, given.values, atol=1e-4, rtol=0)
    (tmp_path / "images/4.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match="holds no picture named '4'"):
        tl.compare("demo", tmp_path / "images", masks=tmp_path / "masks", **asked)
    found = tl.compare("demo", tmp_path / "images", **{**asked, "metrics": ["sparsity"]})
    assert found.values.shape[2] == 4 and list(found.skipped) == [str(tmp_path / "images/4.png")]
    with pytest.raises(BadInput, match=r"4\.png"):
        tl.compare("demo", tmp_path / "images", skip_failures=False, **{**asked, "metrics": ["sparsity"]})


def test_images_that_cannot_be_read_leave_the_rest(scenes: Any, tmp_path: Path) -> None:
    """All of the first group here, of which the maps would have been kept."""
    files = [tmp_path / f"{index}.png" for index in range(18)]
    for file in files[:16]:
        file.write_bytes(b"no picture")
    for file, image in zip(files[16:], scenes.images, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    found = tl.compare("demo", files, memory=True, **QUICK)
    assert (
        found.values.shape == (5, 1, 2)
        and (found.memory[:2] > 0).all()
        and len(found.skipped) == 16
        and len(found.targets) == 2
    )
    assert found.values.isfinite().all() and found.cost_forwards[0] == 1
    tl.compare("demo", files, store=tmp_path / "kept", **QUICK)
    with pytest.raises(BadInput, match=r"0\.png"):
        tl.compare("demo", files, store=tmp_path / "kept", skip_failures=False, **QUICK)
    with pytest.raises(BadInput, match="no maps were kept"):
        found.figure(kind="maps")
    assert "None of the first images could be read" in found.html(tmp_path / "page").read_text()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"methods": []}, "methods is a list of names"),
        ({"methods": "cam"}, "methods is a list of names"),
        ({"options": {"lime": {"n_samples": 5}}}, "options are given for 'lime', which is not compared"),
        ({"options": {"cam": {"width": 5}}}, "cam has no option 'width'"),
        ({"masks": torch.zeros(2, 64, 64)}, r"masks are \[N, H, W\], one for each of the 3 images"),
        ({"metrics": ["iou"]}, None),
    ],
)
def test_bad_input_is_said(scenes: Any, changes: dict[str, Any], problem: str | None) -> None:
    asked = {**QUICK, **changes}
    if problem is None:  # a metric that says nothing of any method is listed, not an error
        found = tl.compare("demo", scenes.images[:3], **asked)
        assert "needs masks=" in found.refused["cam, iou"] and found.row("cam", "iou").images == 0
        assert " - " in found.table()
        return
    with pytest.raises(BadInput, match=problem):
        tl.compare("demo", scenes.images[:3], **asked)


def test_unknown_names_and_models_that_refuse_everything() -> None:
    handle, inputs = SPECIMENS["vit_registers"]()
    with pytest.raises(UnknownName, match="deletion"):
        tl.compare(handle, inputs, methods=["grad_cam"], metrics=["delete"])
    with pytest.raises(UnknownName, match="grad_cam"):
        tl.compare(handle, inputs, methods=["gradcam"], metrics=["deletion"])
    with pytest.raises(NotApplicable, match="every method is refused: cam:"):
        tl.compare(handle, inputs, methods=["cam"], metrics=["deletion"], progress=False)


def test_memory_is_measured_if_asked(scenes: Any) -> None:
    found = tl.compare("demo", scenes.images[:2], memory=True, **QUICK)
    assert (found.memory[:2] > 1e5).all() and found.memory[2:].isnan().all()
    assert "MiB" in found.table()


def test_one_method_in_every_backend(scenes: Any) -> None:
    found = tl.compare(
        "demo",
        scenes.images[:3],
        methods=["grad_cam"],
        across="backends",
        metrics=["deletion"],
        progress=False,
        options={"deletion": {"step": 512}},
    )
    there = [name for name in found.methods if name not in FLOORS]
    assert {"grad_cam", "captum.grad_cam"} <= set(there)
    assert {*there, *found.refused} == {"grad_cam", "captum.grad_cam", "grad_cam.grad_cam", "torchcam.grad_cam"}
    assert (found.memory[: len(there)] > 1e4).all() and "MiB" in found.table()
    targets = [tl.target(one) for one in found.targets]
    native = tl.explain("demo", scenes.images[:3], target=targets).values
    for name in there[1:]:
        assert any("its raw maps lie at most" in note and "of grad_cam" in note for note in found.notes[name])
        other = tl.explain(
            "demo", scenes.images[:3], target=[tl.target(one) for one in found.targets], method=name
        ).values
        assert (other - native).abs().max() <= 1e-4
        assert found.row(name, "deletion").rank == 1
    with pytest.raises(BadInput, match="across is"):
        tl.compare("demo", scenes.images[:3], across="models", **QUICK)


def test_a_method_is_recommended_with_the_evidence(scenes: Any) -> None:
    names = ["grad_cam", "guided_backprop", "integrated_gradients", "saliency", "attention_relevance"]
    asked: dict[str, Any] = {"metrics": ["deletion", "pointing", "randomisation"], "masks": scenes.masks[:12, 0]}
    options = {"deletion": {"step": 512}, "integrated_gradients": {"steps": 4}}
    found = tl.recommend("demo", scenes.images[:12], methods=names, options=options, progress=False, **asked)
    ranks = found.mean_ranks()
    assert found.recommended == next(name for name in ranks if name != "captum.guided_backprop")
    assert "attention" in found.refused["attention_relevance"] and f"recommended: {found.recommended}" in found.table()
    assert found.options["captum.integrated_gradients"] == {"steps": 4}
    with pytest.raises(NotApplicable, match=r"no method is left: grad_cam: takes .* above the budget of 1e-09 s"):
        tl.recommend("demo", scenes.images[:2], methods=["grad_cam"], budget=1e-9)
    with pytest.raises(BadInput, match="budget is in seconds"):
        tl.recommend("demo", scenes.images[:2], budget=0)


def test_a_data_frame(found: tl.Comparison) -> None:
    pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert len(frame) == 7 * 7 and list(frame.columns[:4]) == ["method", "layer", "metric", "better"]
    best = frame[frame["metric"] == "iou"].iloc[0]
    assert best["mean"] == found.row(best["method"], "iou").mean
