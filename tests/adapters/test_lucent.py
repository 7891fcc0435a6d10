"""Lucent as an engine: the same images as the native one, and none of what Lucent leaves behind."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import torchloupe as tl
from torchloupe_core.canvas import Draw
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.parametrizations import CPPN, Fourier, LowRes, Parametrization, Pixel, Pyramid, Shared
from torchloupe_core.specimens import SPECIMENS

pytest.importorskip("lucent")

QUICK: dict[str, Any] = {"steps": 12, "progress": False}


@pytest.fixture(scope="module")
def demo() -> Any:
    return tl.load("demo")


# -- one picture ------------------------------------------------------------------------------------------------------


def test_both_engines_make_the_same_image(demo: Any) -> None:
    targets = ["logit:fish", "layer3:1", "-layer2:3", "0.5*layer2:4+0.5*layer2:6"]
    native, lucent = (
        tl.visualize(demo, targets, method=method, steps=40, seed=3, progress=False) for method in ("native", "lucent")
    )
    assert (native.images - lucent.images).abs().max() < 1e-3
    assert (native.images - 0.5).abs().mean() > 0.05  # and not because nothing happened
    torch.testing.assert_close(native.losses, lucent.losses, atol=1e-3, rtol=1e-3)
    assert (native.backend, lucent.backend, lucent.method) == ("native", "lucent", "lucent")
    assert lucent.versions["torch-lucent"] == "0.1.8"
    assert native.diagnostics["redirected"] == lucent.diagnostics["redirected"]


@pytest.mark.parametrize(
    "kind", [Fourier(decay=1.5), Fourier(colours=None), Pixel(), Pyramid(), LowRes(2), Shared(factors=(2, 4)), CPPN(4)]
)
def test_every_parametrisation_that_lucent_has(kind: Parametrization) -> None:
    handle, _ = SPECIMENS["plain"]()
    target = ["conv2:3"] if isinstance(kind, CPPN) else ["conv2:3", "logit:cat"]
    options: dict[str, Any] = {"parametrization": kind, "regularizers": {"tv": 0.1}, **QUICK}
    native, lucent = (tl.visualize(handle, target, method=method, **options) for method in ("native", "lucent"))
    assert (native.images - lucent.images).abs().max() < 1e-3
    assert (native.images - 0.5).abs().max() > 0.01


@pytest.mark.parametrize("specimen", ["residual", "inplace", "nhwc", "vit_registers", "grayscale"])
def test_every_kind_of_model(specimen: str) -> None:
    handle, _ = SPECIMENS[specimen]()
    layer = handle.features
    options = {"n": 2, "diversity": 0.5, "size": (32, 48) if specimen != "vit_registers" else None, **QUICK}
    native, lucent = (tl.visualize(handle, f"{layer}:2", method=method, **options) for method in ("native", "lucent"))
    assert (native.images - lucent.images).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(16, 20), (15, 17)])
def test_our_images_are_lucents_own(size: tuple[int, int]) -> None:
    """Lucent's whole `param.image`, seeded as Lucent's users do."""
    from lucent.optvis import param

    for fft, kind in ((True, Fourier()), (False, Pixel())):
        torch.manual_seed(5)
        _, image = param.image(size[1], size[0], fft=fft)
        ours = kind.canvas(Draw(5, 0, 1), (3, *size), torch.device("cpu"), torch.float32).images()
        torch.testing.assert_close(ours, image(), atol=1e-6, rtol=0)


def test_one_image_begins_all_and_snapshots_are_kept(demo: Any) -> None:
    scene = tl.demo_scenes(1).images
    made = tl.visualize(demo, ["logit:fish", "logit:key"], init=scene, snapshots=[1, 12], method="lucent", **QUICK)
    assert made.snapshots is not None
    assert (made.at(1) - scene.float() / 255).abs().mean() < 0.1 and torch.equal(made.at(12), made.images)


# -- who is asked -----------------------------------------------------------------------------------------------------


def test_lucent_is_asked_where_it_can(demo: Any) -> None:
    assert tl.visualize(demo, "logit:fish", **QUICK).backend == "lucent"
    for options in ({"regularizers": {"blur": 1.0}}, {"regularizers": {"gradient_blur": 1.0}}):
        assert tl.visualize(demo, "logit:fish", **options, **QUICK).backend == "native"
        with pytest.raises(NotApplicable, match=r"Lucent's loop has no place for .*Blur.*method='native'"):
            tl.visualize(demo, "logit:fish", method="lucent", **options, **QUICK)
    two = {"parametrization": "cppn", **QUICK}
    assert tl.visualize(demo, ["logit:fish", "logit:key"], **two).backend == "native"
    with pytest.raises(NotApplicable, match="Lucent has no parametrisation CPPN"):
        tl.visualize(demo, ["logit:fish", "logit:key"], method="lucent", **two)


def test_without_lucent(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lucent"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lucent", None)
    assert tl.visualize(demo, "logit:fish", **QUICK).backend == "native"
    with pytest.raises(MissingDependency, match=r'pip install "torchloupe\[lucent\]"'):
        tl.visualize(demo, "logit:fish", method="lucent", **QUICK)


def test_nothing_of_kornia_is_needed(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import kornia

    for name in ("warp_affine", "get_rotation_matrix2d"):
        monkeypatch.delattr(kornia, name, raising=False)
    monkeypatch.setattr(kornia, "__version__", "99.0")
    assert tl.visualize(demo, "logit:fish", method="lucent", **QUICK).scores.isfinite().all()


# -- no trace ---------------------------------------------------------------------------------------------------------


def test_lucent_leaves_nothing_behind() -> None:
    from lucent.optvis import render
    from lucent.optvis.param import spatial

    handle, inputs = SPECIMENS["residual"]()
    handle.module.train()
    handle.module(inputs).sum().backward()
    before, device = Snapshot(handle.module), spatial.device
    for _ in range(2):
        tl.visualize(handle, ["layer2:3", "logit:cat"], method="lucent", **QUICK)
    assert before.differences() == []
    assert spatial.device is device and "print" not in vars(render)


@pytest.mark.parametrize("error", [RuntimeError("the model broke"), KeyboardInterrupt()])
def test_errors_are_not_swallowed(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    handle, _ = SPECIMENS["residual"]()
    calls = []

    def failing(module: Any, arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error

    handle.trace()
    handle.module.layer1.conv1.register_forward_pre_hook(failing)
    before = Snapshot(handle.module)
    with pytest.raises(type(error)):
        tl.visualize(handle, "layer1:3", read="post", method="lucent", **QUICK)
    assert before.differences() == [] and capsys.readouterr() == ("", "")
    calls.clear()
    if isinstance(error, KeyboardInterrupt):
        made = tl.visualize(handle, "layer1:3", read="post", method="lucent", interruptible=True, **QUICK)
        assert made.stopped == "interrupted after step 3" and made.losses.shape == (1, 3)
        assert capsys.readouterr() == ("", "")


def test_targets_without_a_gradient_and_nan_are_said() -> None:
    handle, _ = SPECIMENS["plain"]()
    with torch.no_grad():
        handle.module.conv2.bias[3] = -0.1
    with pytest.raises(NotApplicable, match="has no gradient at the start"):
        tl.visualize(handle, "relu2:3", read="post", transforms="none", method="lucent", **QUICK)
    with torch.no_grad():
        handle.module.fc.bias.fill_(float("nan"))
    with pytest.raises(BadInput, match="NaN or infinite for the image at the start"):
        tl.visualize(handle, "logit:cat", method="lucent", **QUICK)
