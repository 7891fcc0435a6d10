"""DeepLIFT, where Captum has a rule for every nonlinearity."""

from __future__ import annotations

import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_adapters.captum.asked import Scored, asked, attr, each_from, joined, tensor_of
from torchloupe_adapters.captum.calls import separated, twin
from torchloupe_core.errors import NotApplicable
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import method
from torchloupe_core.targets import Output
from torchloupe_core.trace import Trace

__all__ = ["deep_lift"]

# Captum has a rule for Softmax too, but it subtracts a mean over the whole batch, so that images change each other.
RULES = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool2d)
NONLINEAR = (nn.AdaptiveMaxPool2d, nn.FractionalMaxPool2d, nn.LPPool2d, nn.MaxUnpool2d)
NONLINEAR_FILES = {f"torch.nn.modules.{name}" for name in ("activation", "instancenorm", "normalization")}

GAP = 1e-3  # of the sum of the shares' magnitudes; rounding stays below 1e-5
INSTEAD = "integrated_gradients and gradient_shap are complete on any differentiable model"


@method(
    "explain",
    "captum.deep_lift",
    needs=("gradient", "rules"),
    cost="2 forwards + 2 backwards",
    paper="Shrikumar et al. 2017, Learning Important Features Through Propagating Activation Differences, rescale rule",
)
def deep_lift(query: Query, *, baseline: Tensor | float | str | None = None) -> Map:
    """Each pixel's share of the difference the image makes against a baseline, summed over channels.

    baseline: as in integrated gradients. `diagnostics["completeness_gap"]` is f(x) - f(baseline) - sum, for each image,
    and zero up to rounding; a nonlinearity without a rule, for which Captum takes the plain gradient, is refused.
    """
    _require_rules(query)

    def answer(part: Query, begin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept: list[Tensor] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\s*Setting forward, backward hooks")
            shares = tensor_of(attr().DeepLift(Scored(part, kept)).attribute(**asked(part), baselines=begin))
        scores, reference = torch.cat(kept).chunk(2)  # image and baseline share a batch
        gaps = scores - reference - shares.flatten(1).sum(1)
        _require_complete(gaps, shares)
        return shares, scores, gaps

    with separated(query, RULES, _separate):
        shares, scores, gaps = joined(each_from(query, baseline, answer))
    return Map(shares.sum(1), shares, scores=scores, diagnostics={"completeness_gap": gaps.tolist()})


def _require_rules(query: Query) -> None:
    """Refuses what is known beforehand to have no rule."""
    trace = query.handle.trace(query.shape)
    without = sorted({type(part).__name__ for part in _parts(query, trace) if _has_no_rule(part)})
    modules = sum(query.handle.module.get_submodule(name.split("#")[0]).__class__ is nn.ReLU for name in trace.calls)
    if trace.rectified > modules:
        without.append("ReLU as a function")
    if without:
        raise NotApplicable(f"captum's deep_lift has no rule for {', '.join(without)}, which are here; {INSTEAD}")
    for bound in query.targets:
        if any(isinstance(atom, Output) and atom.kind != "logit" for _, atom in bound.terms):
            raise NotApplicable(f"deep_lift shares out logits, channels and neurons, not {bound.target}; {INSTEAD}")


def _parts(query: Query, trace: Trace) -> list[nn.Module]:
    return [query.handle.module.get_submodule(name) for name in trace.layers]


def _has_no_rule(part: nn.Module) -> bool:
    """Whether a layer bends its input in a way Captum would not notice."""
    nonlinear = isinstance(part, NONLINEAR) or any(kind.__module__ in NONLINEAR_FILES for kind in type(part).__mro__)
    return (nonlinear and type(part) not in RULES) or bool(getattr(part, "return_indices", False))


def _require_complete(gaps: Tensor, shares: Tensor) -> None:
    """Refuses what shows only in the sum: products, functions, layers of the model's own."""
    total = shares.flatten(1).abs().sum(1)
    if (gaps.abs() > GAP * total).any():
        worst = int((gaps.abs() / total).nan_to_num().argmax())
        raise NotApplicable(
            f"the shares miss f(x) - f(baseline) by {gaps[worst]:.3g}, their magnitudes summing to {total[worst]:.3g}; "
            f"something nonlinear in this model has no rule in captum's deep_lift; {INSTEAD}"
        )


def _separate(part: nn.Module) -> nn.Module:
    """A copy of a layer; pooling windows laid side by side, because Captum's rule loses what two windows share."""
    if not isinstance(part, nn.MaxPool2d):
        return twin(part)
    return nn.Sequential(_Windows(part), nn.MaxPool2d(_pair(part.kernel_size)))


class _Windows(nn.Module):
    """`[N, C, H, W]` to `[N, C, h*k, w*k]`: the windows of a pooling layer beside each other."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pooled = partial(nn.MaxPool2d.forward, pool)  # not a child, which Captum would find
        self.axes = [
            _Axis(*one)
            for one in zip(*map(_pair, (pool.kernel_size, pool.stride, pool.padding, pool.dilation)), strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        size = self.pooled(torch.empty(x.shape, device="meta")).shape[2:]
        for dim, (axis, length) in enumerate(zip(self.axes, size, strict=True), 2):
            x = axis.spread(x, dim, length)
        return x


class _Axis(NamedTuple):
    """A pooling layer along height or width."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def spread(self, x: Tensor, dim: int, length: int) -> Tensor:
        """Every window's entries one after another, below everything where a window hangs over the edge."""
        starts = torch.arange(length, device=x.device) * self.stride
        chosen = (starts[:, None] + torch.arange(self.kernel, device=x.device) * self.dilation).flatten()
        beyond = max(0, int(chosen.max()) + 1 - x.shape[dim] - self.padding)
        edges = [self.padding, beyond] if dim == 3 else [0, 0, self.padding, beyond]
        return F.pad(x, edges, value=torch.finfo(x.dtype).min).index_select(dim, chosen)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
