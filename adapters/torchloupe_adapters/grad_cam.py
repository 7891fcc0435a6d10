"""pytorch-grad-cam: class activation maps of many kinds, taken before its ReLU, resizing and min-max scaling.

It is given a stand-in for the model, whose layer is laid out as it expects, so that tokens and channels-last maps work,
and our targets as its targets. What it does to a model, it does to the stand-in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method
from torchloupe_core.stand_in import Answer, StandIn, by_gradient, map_by, require_single_logits

__all__ = [
    "ablation_cam",
    "eigen_cam",
    "eigen_grad_cam",
    "fem",
    "finer_cam",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_plus_plus",
    "hires_cam",
    "kpca_cam",
    "layer_cam",
    "random_cam",
    "score_cam",
    "seg_eigen_cam",
    "shapley_cam",
    "xgrad_cam",
]

WHOLE = "1 forward for each channel"
ABLATED = "2 forwards + 1 for each channel"
KERNELS = ("cosine", "linear", "poly", "rbf", "sigmoid")
WITHOUT_SIGN = {"EigenCAM", "EigenGradCAM", "KPCA_CAM"}  # a direction may as well be its opposite

Target = Callable[[Tensor], Tensor]


@by_gradient("grad_cam.grad_cam", paper="Selvaraju et al. 2017, Grad-CAM, eq. 1 and 2, before the ReLU")
def grad_cam(query: Query) -> Map:
    """`sum_k mean_hw(d target / d A_k) A_k`, as grad_cam; for comparison of the two."""
    return map_by(query, _asked("GradCAM"))


@by_gradient("grad_cam.grad_cam++", paper="Chattopadhay et al. 2018, Grad-CAM++, of the exponential of the target")
def grad_cam_plus_plus(query: Query) -> Map:
    """As grad_cam++, with 1e-6 added to the denominator: where gradients are small, weights are smaller."""
    return map_by(query, _asked("GradCAMPlusPlus"))


@by_gradient("grad_cam.xgrad_cam", paper="Fu et al. 2020, Axiom-based Grad-CAM")
def xgrad_cam(query: Query) -> Map:
    """As xgrad_cam, with 1e-7 added to each channel's sum."""
    return map_by(query, _asked("XGradCAM"))


@by_gradient("grad_cam.hires_cam", paper="Draelos and Carin 2020, Use HiResCAM instead of Grad-CAM")
def hires_cam(query: Query) -> Map:
    """`sum_k g_k A_k`, as hires_cam."""
    return map_by(query, _asked("HiResCAM"))


@by_gradient("grad_cam.layer_cam", paper="Jiang et al. 2021, LayerCAM")
def layer_cam(query: Query) -> Map:
    """`sum_k relu(g_k) A_k`, as layer_cam."""
    return map_by(query, _asked("LayerCAM"))


@by_gradient(
    "grad_cam.grad_cam_elementwise", paper="Gildenblat 2021, pytorch-grad-cam, GradCAMElementWise", signed=False
)
def grad_cam_elementwise(query: Query) -> Map:
    """`sum_k relu(g_k A_k)`: only what speaks for the target, channel by channel."""
    return map_by(query, _asked("GradCAMElementWise"))


@method(
    "explain",
    "grad_cam.shapley_cam",
    needs=("layer", "gradient"),
    cost="1 forward + 2 backwards",
    paper="Cai 2025, CAMs as Shapley Value-based Explainers",
)
def shapley_cam(query: Query) -> Map:
    """`sum_k mean_hw(g_k - H A_k / 2) A_k`, with H the Hessian of the target at the layer.

    Where the target is piecewise linear after the layer, as after ReLUs, H is zero and this is grad_cam.
    """
    return map_by(query, _twice_differentiable(_asked("ShapleyCAM", _with_graph)), from_input=True)


@by_gradient("grad_cam.finer_cam", paper="Zhang et al. 2025, Finer-CAM, by Grad-CAM")
def finer_cam(query: Query, *, alpha: float = 1.0) -> Map:
    """Grad-CAM of a logit less the logits nearest to it, which shows what tells a class from those like it.

    alpha: how much of the others is taken off. Up to three others, each weighed by its probability. For targets that
    are one logit.
    """
    require_single_logits(query, "grad_cam.finer_cam")
    return map_by(query, _finer(alpha), alone=True, logits=True)


@method(
    "explain",
    "grad_cam.eigen_cam",
    needs=("layer",),
    cost="1 forward",
    paper="Muhammad and Yeasin 2020, Eigen-CAM",
)
def eigen_cam(query: Query) -> Map:
    """The centred features' projection on their first principal direction, the same for every target.

    A direction has no sign, and the library leaves it to chance; it gets that of eigen_cam, whose map this is, centred.
    """
    return map_by(query, _asked("EigenCAM"), gradient=False)


@by_gradient("grad_cam.eigen_grad_cam", paper="Gildenblat 2021, pytorch-grad-cam, EigenGradCAM")
def eigen_grad_cam(query: Query) -> Map:
    """The projection of `g_k A_k` on its first principal direction, the one on the side of their mean."""
    return map_by(query, _asked("EigenGradCAM"))


@by_gradient("grad_cam.seg_eigen_cam", paper="Chung and Ying 2025, Seg-Eigen-CAM")
def seg_eigen_cam(query: Query) -> Map:
    """The projection of `|g_k| A_k` on its first principal direction, the larger end of it positive."""
    return map_by(query, _asked("SegEigenCAM"))


@method(
    "explain",
    "grad_cam.kpca_cam",
    needs=("layer",),
    cost="1 forward",
    paper="Karmani et al. 2024, KPCA-CAM",
)
def kpca_cam(query: Query, *, kernel: str = "sigmoid", gamma: float | None = None) -> Map:
    """The features' first principal component under a kernel, the same for every target; its sign as in eigen_cam.

    kernel, gamma: as in scikit-learn's `KernelPCA`.
    """
    if kernel not in KERNELS or (gamma is not None and gamma <= 0):
        raise BadInput(f"kernel is one of {', '.join(KERNELS)}, gamma above 0; got {kernel!r} and {gamma}")
    return map_by(query, _asked("KPCA_CAM", kernel=kernel, gamma=gamma), gradient=False, alone=True)


@method(
    "explain",
    "grad_cam.fem",
    needs=("layer",),
    cost="1 forward",
    paper="Fuad et al. 2020, Features Understanding in 3D CNNs, FEM",
)
def fem(query: Query, *, k: float = 2.0) -> Map:
    """`sum_k w_k A_k` with `w_k` the share of positions where the channel is unusually active; for every target.

    k: how many standard deviations above the channel's mean are unusual.
    """
    return map_by(query, _asked("FEM", k=k), gradient=False)


@method(
    "explain",
    "grad_cam.ablation_cam",
    needs=("layer",),
    cost=ABLATED,
    paper="Desai and Ramaswamy 2020, Ablation-CAM, before the ReLU",
)
def ablation_cam(query: Query) -> Map:
    """As ablation_cam, but divided by the score, not by its size: for scores below zero the map has the other sign.

    Channels are set to zero as in the paper. The library's own layer sets those of maps with negative values to -1e7.
    """
    return map_by(query, _asked("AblationCAM"), gradient=False, alone=True)


@method(
    "explain",
    "grad_cam.score_cam",
    needs=("layer",),
    cost=WHOLE,
    paper="Wang et al. 2020, Score-CAM, before the ReLU",
)
def score_cam(query: Query) -> Map:
    """As score_cam, the masks enlarged with their corners on the image's corners."""
    return map_by(query, _asked("ScoreCAM"), gradient=False, alone=True)


@by_gradient("grad_cam.random_cam", paper="Gildenblat 2021, pytorch-grad-cam, RandomCAM", random=True)
def random_cam(query: Query) -> Map:
    """`sum_k w_k A_k` with weights drawn from [-1, 1]: what a method has to beat."""
    return map_by(query, _asked("RandomCAM"), alone=True)


# -- how the library is asked -----------------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise MissingDependency.of("grad-cam", "peers") from error
    return pytorch_grad_cam


def _asked(kind: str, targets: Callable[[StandIn], list[Target]] | None = None, **options: Any) -> Answer:
    """How a kind of map is asked of a stand-in. options: of its constructor."""

    def answer(model: StandIn) -> Tensor:
        library = _library()
        cam = _unscaled(getattr(library, kind))(model, [model.layer], **options)
        cam.batch_size = model.part.batch  # of those that have one
        cam.ablation_layer = _zeroing(library)
        try:
            with _without_bars(library):
                found = cam(model.part.inputs, targets(model) if targets else [_value] * len(model.part.inputs))
        finally:
            _release(cam)
        return torch.as_tensor(found)

    return answer


def _value(output: Tensor) -> Tensor:
    """The target of a stand-in's output `[1]`, as the library's targets are asked."""
    return output[0]


def _unscaled(kind: Any) -> Any:
    """A kind of map that stops before ReLU, resizing and min-max scaling."""

    class Unscaled(kind):  # type: ignore[misc]
        def compute_cam_per_layer(self, input_tensor: Tensor, targets: list[Target], eigen_smooth: bool) -> Any:
            read = self.activations_and_grads
            activations = read.activations[0]
            gradients = read.gradients[0] if read.gradients else None
            if self.detach:
                activations = activations.numpy()
                gradients = None if gradients is None else gradients.numpy()
            found = self.get_cam_image(
                input_tensor, self.target_layers[0], targets, activations, gradients, eigen_smooth
            )
            if kind.__name__ in WITHOUT_SIGN:
                return _signed(found, activations if gradients is None else gradients * activations)
            return found

        def aggregate_multi_layers(self, cam_per_target_layer: Any) -> Any:
            return cam_per_target_layer

    return Unscaled


def _signed(projections: Any, maps: Any) -> Any:
    """Projections `[N, h, w]` of centred maps `[N, C, h, w]`, along the direction that has their mean on its side."""
    mean = maps.mean((2, 3), keepdims=True)
    along = (projections * ((maps - mean) * mean).sum(1)).sum((1, 2), keepdims=True)
    return np.where(along < 0, -projections, projections)


def _release(cam: Any) -> None:
    """Ends a kind of map. Its own way, which it takes again when deleted, fails on gradients that are views."""
    read = cam.activations_and_grads
    read.activations, read.gradients = [], []
    read.release()


def _zeroing(library: Any) -> Any:
    """What takes the layer's place in Ablation-CAM: its maps with one channel of each set to zero."""

    class Zeroing(library.AblationLayer):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            output: Tensor = self.activations
            output[torch.arange(len(output)), torch.as_tensor(self.indices[: len(output)]).long()] = 0
            return output

    return Zeroing()


@contextlib.contextmanager
def _without_bars(library: Any) -> Iterator[None]:
    """Inside, the library draws no progress bars of its own."""
    modules = (library.ablation_cam, library.score_cam)
    before = [module.tqdm for module in modules]
    try:
        for module in modules:
            module.tqdm = SimpleNamespace(tqdm=iter)
        yield
    finally:
        for module, bars in zip(modules, before, strict=True):
            module.tqdm = bars


def _twice_differentiable(answer: Answer) -> Answer:
    """Attention through kernels whose gradient has a gradient."""

    def plainly(model: StandIn) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return answer(model)

    return plainly


def _with_graph(model: StandIn) -> list[Target]:
    """Targets whose gradient is part of a graph even where it is constant, as behind a linear head."""
    one = torch.ones((), device=model.part.inputs.device, requires_grad=True)
    return [lambda output: output[0] * one] * len(model.part.inputs)


def _finer(alpha: float) -> Answer:
    def answer(model: StandIn) -> Tensor:
        library, (label,) = _library(), model.part.targets[0].logit_weights or {}
        cam = library.FinerCAM(model, [model.layer], base_method=_unscaled(library.GradCAM))
        try:
            found = cam(model.part.inputs, alpha=alpha, target_idx=label)
        finally:
            _release(cam.base_cam)
        return torch.as_tensor(found)

    return answer
