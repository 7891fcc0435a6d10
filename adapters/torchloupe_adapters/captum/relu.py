"""Gradients with another rule at every ReLU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from torchloupe_adapters.captum.asked import Scored, asked, attr, joined, tensor_of
from torchloupe_adapters.captum.calls import separated
from torchloupe_core.errors import NotApplicable
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method

__all__ = ["deconvolution", "guided_backprop"]


@method(
    "explain",
    "captum.guided_backprop",
    needs=("gradient", "relu"),
    cost="1 forward + 1 backward",
    paper="Springenberg et al. 2015, Striving for Simplicity",
    signed=False,
)
def guided_backprop(query: Query) -> Map:
    """The largest magnitude over the channels of the gradient with negative values stopped at every ReLU.

    Its sign says which way to change a pixel, not whether the pixel speaks for the target; `per_channel` has it.

    Captum reaches `torch.nn.ReLU` modules only. A model without any would give the plain gradient under this name, one
    that also rectifies through functions a mixture; both are refused.
    """
    return _with_rule(query, "guided_backprop", "GuidedBackprop")


@method(
    "explain",
    "captum.deconvolution",
    needs=("gradient", "relu"),
    cost="1 forward + 1 backward",
    paper="Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks",
    signed=False,
)
def deconvolution(query: Query) -> Map:
    """The largest magnitude over the channels of what the ReLUs let pass on the way back by its own sign alone.

    Where guided_backprop stops values both by their sign and where the ReLU was off, this looks at their sign only.
    """
    return _with_rule(query, "deconvolution", "Deconvolution")


def _with_rule(query: Query, name: str, explainer: str) -> Map:
    _require_relu_modules(query, name)

    def answer(part: Query) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        way: Any = getattr(attr(), explainer)(Scored(part, kept))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting backward hooks on ReLU")
            found = way.attribute(**asked(part))
        return tensor_of(found), torch.cat(kept)

    with separated(query, (nn.ReLU,)):
        found, scores = joined(query.each(answer))
    return Map(found.abs().amax(1), found, scores=scores)


def _require_relu_modules(query: Query, name: str) -> None:
    trace = query.handle.trace(query.shape)
    modules = sum(layer.kind == "ReLU" for layer in trace.calls.values())
    others = "saliency, input_x_gradient and integrated_gradients work on any model"
    if not modules:
        raise NotApplicable(f"this model has no torch.nn.ReLU, so {name} would be the plain gradient; {others}")
    if trace.rectified > modules:
        raise NotApplicable(
            f"this model rectifies {trace.rectified - modules} times through a function, out of captum's reach, so "
            f"{name} would mix two gradients; {others}"
        )
