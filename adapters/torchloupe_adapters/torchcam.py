"""torch-cam: class activation maps, taken before its ReLU and scaling.

It is given a stand-in for the model, whose layer is laid out as it expects and whose output is the target's value, so
that tokens, channels-last maps and targets of every kind work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_core.errors import BadInput, MissingDependency
from torchloupe_core.methods.cam import cam as verified
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method
from torchloupe_core.stand_in import Answer, StandIn, by_gradient, map_by, require_single_logits

__all__ = [
    "cam",
    "finer_cam",
    "grad_cam",
    "grad_cam_plus_plus",
    "is_cam",
    "layer_cam",
    "score_cam",
    "smooth_grad_cam_plus_plus",
    "ss_cam",
    "xgrad_cam",
]

BATCHED = {"ISCAM", "SSCAM", "ScoreCAM"}


@method(
    "explain",
    "torchcam.cam",
    needs=("pooled_linear", "layer"),
    cost="2 forwards",
    paper="Zhou et al. 2016, Learning Deep Features for Discriminative Localization",
)
def cam(query: Query) -> Map:
    """`sum_k w_ck A_k`, as cam, whose refusals it shares: that this is exact on the model is verified first."""
    found = verified(query)
    classifier = query.handle.module.get_submodule(query.handle.embedding_at(query.shape).removesuffix(".in"))

    def answer(model: StandIn) -> Tensor:
        model.head = _head(classifier, model.part)
        return _map(model, "CAM", list(range(len(model.part.targets))), fc_layer="head")

    found.values = map_by(query, answer, gradient=False).values
    return found


@by_gradient("torchcam.grad_cam", paper="Selvaraju et al. 2017, Grad-CAM, eq. 1 and 2, before the ReLU")
def grad_cam(query: Query) -> Map:
    """`sum_k mean_hw(d target / d A_k) A_k`, as grad_cam; for comparison of the two."""
    return map_by(query, _asked("GradCAM"))


@by_gradient("torchcam.grad_cam++", paper="Chattopadhay et al. 2018, Grad-CAM++, as torch-cam 0.5 computes it")
def grad_cam_plus_plus(query: Query) -> Map:
    """`sum_k w_k A_k` with `w_k = sum_hw g_k^2 relu(g_k)`; not grad_cam++.

    In torch-cam 0.5 the division of `alpha_k` by its denominator acts on a copy and is lost.
    """
    return map_by(query, _asked("GradCAMpp"))


@method(
    "explain",
    "torchcam.smooth_grad_cam++",
    needs=("layer", "gradient"),
    cost="n_samples (4) + 1 forwards and backwards of the head",
    paper="Omeiza et al. 2019, Smooth Grad-CAM++",
    random=True,
)
def smooth_grad_cam_plus_plus(query: Query, *, n_samples: int = 4, std: float = 0.3) -> Map:
    """Grad-CAM++ with the powers of the gradient averaged over images with noise; maps and gradient of the last one.

    std: of the noise, in units of the model's input.
    """
    _require_samples(n_samples, std)
    return map_by(query, _asked("SmoothGradCAMpp", num_samples=n_samples, std=std), alone=True)


@by_gradient("torchcam.xgrad_cam", paper="Fu et al. 2020, Axiom-based Grad-CAM")
def xgrad_cam(query: Query) -> Map:
    """As xgrad_cam, with 1e-8 added to each channel's sum."""
    return map_by(query, _asked("XGradCAM"))


@by_gradient("torchcam.layer_cam", paper="Jiang et al. 2021, LayerCAM")
def layer_cam(query: Query) -> Map:
    """`sum_k relu(g_k) A_k`, as layer_cam."""
    return map_by(query, _asked("LayerCAM"))


@by_gradient("torchcam.finer_cam", paper="Zhang et al. 2025, Finer-CAM, by Grad-CAM")
def finer_cam(query: Query, *, gamma: float = 0.6, n_references: int = 3) -> Map:
    """Grad-CAM of a logit less `gamma` times the mean of the logits nearest to it; for targets that are one logit."""
    require_single_logits(query, "torchcam.finer_cam")
    if gamma < 0 or n_references < 1:
        raise BadInput(f"gamma is at least 0, n_references at least 1; got {gamma} and {n_references}")

    def answer(model: StandIn) -> Tensor:
        classes = [next(iter(bound.logit_weights or {})) for bound in model.part.targets]
        return _map(model, "FinerCAM", classes, gamma=gamma, num_references=n_references)

    return map_by(query, answer, logits=True)


@method(
    "explain",
    "torchcam.score_cam",
    needs=("layer",),
    cost="1 forward for each channel",
    paper="Wang et al. 2020, Score-CAM, before the ReLU",
)
def score_cam(query: Query) -> Map:
    """As score_cam, the masks stretched to [0, 1] before they are enlarged."""
    return map_by(query, _asked("ScoreCAM"), gradient=False, alone=True)


@method(
    "explain",
    "torchcam.ss_cam",
    needs=("layer",),
    cost="n_samples (35) forwards for each channel",
    paper="Wang et al. 2020, SS-CAM, before the ReLU",
    random=True,
)
def ss_cam(query: Query, *, n_samples: int = 35, std: float = 2.0) -> Map:
    """Score-CAM with each weight averaged over masks with noise. std: of the noise on masks in [0, 1]."""
    _require_samples(n_samples, std)
    return map_by(query, _asked("SSCAM", num_samples=n_samples, std=std), gradient=False, alone=True)


@method(
    "explain",
    "torchcam.is_cam",
    needs=("layer",),
    cost="n_samples (10) forwards for each channel",
    paper="Naidu et al. 2020, IS-CAM, before the ReLU",
)
def is_cam(query: Query, *, n_samples: int = 10) -> Map:
    """Score-CAM with each weight averaged over masks of growing strength."""
    _require_samples(n_samples, 1.0)
    return map_by(query, _asked("ISCAM", num_samples=n_samples), gradient=False, alone=True)


# -- how the library is asked -----------------------------------------------------------------------------------------


def _asked(kind: str, **options: Any) -> Answer:
    """How a kind of map is asked of a stand-in. options: of its constructor."""

    def answer(model: StandIn) -> Tensor:
        batched: dict[str, Any] = {"batch_size": model.part.batch} if kind in BATCHED else {}
        return _map(model, kind, 0, **options, **batched)

    return answer


def _map(model: StandIn, kind: str, classes: int | list[int], **options: Any) -> Tensor:
    """The map `[N, h, w]` of an output of a stand-in, or of one output for each image."""
    try:
        import torchcam.methods
    except ImportError as error:
        raise MissingDependency.of("torchcam", "peers") from error
    make: Callable[..., Any] = getattr(torchcam.methods, kind)
    with make(model, "layer", input_shape=model.part.shape, **options) as extractor:
        output = model(model.part.inputs)
        getattr(extractor, "base_cam", extractor)._relu = False  # which `normalized=False` leaves on
        found: Tensor = extractor(classes, output, normalized=False)[0]
    return found


def _head(classifier: nn.Module, part: Query) -> nn.Module:
    """A linear layer with an output for each image: the sum of logits asked about."""
    weight = torch.as_tensor(classifier.weight).detach().flatten(1)  # [K, C]
    rows = [
        torch.stack([value * weight[label] for label, value in (bound.logit_weights or {}).items()]).sum(0)
        for bound in part.targets
    ]
    head = nn.Linear(weight.shape[1], len(rows), bias=False, device=weight.device, dtype=weight.dtype)
    head.weight = nn.Parameter(torch.stack(rows), requires_grad=False)
    return head


def _require_samples(n_samples: int, std: float) -> None:
    if n_samples < 1 or std <= 0:
        raise BadInput(f"n_samples is at least 1, std above 0; got {n_samples} and {std}")
