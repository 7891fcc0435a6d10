"""The same method in several backends gives the same raw map; a backend that is not installed says how to get it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core import registry
from torchloupe_core.specimens import SPECIMENS

PACKAGES = {"captum": "captum", "grad_cam": "pytorch_grad_cam", "torchcam": "torchcam", "native": "torch"}
LARGEST = 1e-4  # difference, of the largest value


def net(scale: float = 1e5) -> tuple[tl.Handle, Tensor]:
    """Two linear layers after the features, so that no two methods agree; the scale of its logits keeps gradients well
    above epsilons."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    module = nn.Sequential(*body, *head).eval()
    module[-1].weight.data *= scale
    return tl.wrap(module, input_size=(3, 32, 32)), torch.randn(2, 3, 32, 32)


def demo() -> tuple[tl.Handle, Tensor]:
    model = tl.load("demo")
    return model, model.inputs([scene[0] for scene in tl.demo_scenes(3, 0)])


def maps(model: tl.Handle, inputs: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    """The map of each backend that is installed and does not refuse the model."""
    found = {}
    for backend, name in names.items():
        if not find_spec(PACKAGES[backend]):
            continue
        try:
            found[backend] = tl.explain(model, inputs, method=name).values
        except tl.errors.NotApplicable:
            assert backend == "captum"  # which knows one layout only
    return found


@pytest.mark.parametrize("model", [*SPECIMENS, "demo"])
def test_raw_grad_cam_is_the_same_in_four_backends(model: str) -> None:
    names = registry.same_method("explain", "grad_cam")
    assert set(names) == set(PACKAGES)
    found = maps(*(demo() if model == "demo" else SPECIMENS[model]()), names)
    refusing = {"captum"} if model in ("nhwc", "vit_registers") else set()
    assert set(found) == {backend for backend, package in PACKAGES.items() if find_spec(package)} - refusing
    apart = {backend: float((one - found["native"]).abs().max()) for backend, one in found.items()}
    assert max(apart.values()) <= LARGEST * min(1.0, float(found["native"].abs().max())), apart


# Where a library computes something else under the same name, the reason.
DIFFERENT = {
    ("torchcam", "grad_cam++"): "its denominator is lost",
    ("torchcam", "score_cam"): "it stretches masks before it enlarges them",
    ("grad_cam", "score_cam"): "it enlarges masks with their corners aligned",
}


@pytest.mark.parametrize("method", ["grad_cam++", "xgrad_cam", "hires_cam", "layer_cam", "score_cam"])
def test_the_same_method_is_the_same_map_but_for_known_differences(method: str) -> None:
    names = registry.same_method("explain", method)
    assert len(names) >= 2
    found = maps(*net(10.0 if method == "score_cam" else 1e5), names)
    largest = float(found["native"].abs().max())
    for backend, one in found.items():
        apart = float((one - found["native"]).abs().max()) / largest
        assert (apart > LARGEST) == ((backend, method) in DIFFERENT), f"{backend}: {apart:.2g}"


@pytest.mark.parametrize("model", SPECIMENS)
def test_eigen_cam_is_ours_centred_its_sign_too(model: str) -> None:
    """The library leaves the sign to chance."""
    pytest.importorskip("pytorch_grad_cam")
    handle, inputs = SPECIMENS[model]()
    ours, theirs = (tl.explain(handle, inputs, method=f"{prefix}eigen_cam").values for prefix in ("", "grad_cam."))
    torch.testing.assert_close(theirs, ours - ours.mean((1, 2), keepdim=True), rtol=1e-3, atol=1e-4)


def test_ablation_cam_is_ours_but_for_the_sign_of_the_score() -> None:
    pytest.importorskip("pytorch_grad_cam")
    model, inputs = net()
    ours, theirs = (
        tl.explain(model, inputs, method=f"{prefix}ablation_cam", target="logit:1") for prefix in ("", "grad_cam.")
    )
    assert (ours.scores < 0).any()
    sign = ours.scores.sign()[:, None, None]
    torch.testing.assert_close(theirs.values, ours.values * sign, rtol=1e-3, atol=1e-4)


def test_cam_is_the_same_through_torchcam() -> None:
    pytest.importorskip("torchcam")
    for model, inputs in (SPECIMENS["residual"](), SPECIMENS["depthwise"]()):
        ours, theirs = (
            tl.explain(model, inputs, method=name, target="logit:dog-0.5*logit:1") for name in ("cam", "torchcam.cam")
        )
        torch.testing.assert_close(theirs.values, ours.values)
        assert theirs.backend == "torchcam"
        assert theirs.versions["torchcam"]


def test_the_same_method_is_found_from_any_of_its_names() -> None:
    expected = {
        "native": "grad_cam",
        "captum": "captum.grad_cam",
        "grad_cam": "grad_cam.grad_cam",
        "torchcam": "torchcam.grad_cam",
    }
    for name in expected.values():
        assert registry.same_method("explain", name) == expected
    assert list(registry.same_method("explain", "torchcam.grad_cam")) == list(expected)  # the native one first
    lime = {"captum": "captum.lime", "lime": "lime.image"}
    assert registry.same_method("explain", "lime") == registry.same_method("explain", "lime.image") == lime
    assert registry.same_method("explain", "rise") == {"native": "rise"}
    with pytest.raises(tl.errors.UnknownName, match="grad_cam"):
        registry.same_method("explain", "grad_kam")


def test_groups_of_the_same_method_share_no_member() -> None:
    """So that a comparison can walk them."""
    names = [way.name for way in tl.methods("explain")]
    for one, other in product(names, names):
        mine, its = (set(registry.same_method("explain", name).values()) for name in (one, other))
        assert mine == its or not mine & its
        assert one in mine


ABSENT = {
    "grad_cam.grad_cam": ("pytorch_grad_cam", r'pip install "torchloupe\[peers\]"'),
    "grad_cam.finer_cam": ("pytorch_grad_cam", r'pip install "torchloupe\[peers\]"'),
    "torchcam.layer_cam": ("torchcam", r'pip install "torchloupe\[peers\]"'),
    "zennit.epsilon_plus": ("zennit", "pip install zennit"),
    "lime.image": ("lime", r'pip install "torchloupe\[peers\]"'),
    "shap.partition": ("shap", r'pip install "torchloupe\[peers\]"'),
}


@pytest.mark.parametrize("method", ABSENT)
def test_what_is_not_installed_is_listed_and_says_how_to_get_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, line = ABSENT[method]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    handle, inputs = SPECIMENS["plain"]()
    assert method in {way.name for way in tl.methods("explain")}
    with pytest.raises(tl.errors.MissingDependency, match=line):
        tl.explain(handle, inputs, method=method)
