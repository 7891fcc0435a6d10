"""A model as libraries of class activation maps expect one, standing in for the user's.

They register hooks on a module, take its output for `[N, C, h, w]` and the model's for `[N, K]`, switch the model to
eval mode, exchange its parts. A stand-in is made for one question and thrown away: its `layer` is a module of its own
that the canonical maps of the layer asked about pass through, whatever their order in the model and whichever call of
which module gives them, and its output is the target's value. The user's model is run by `Handle.watch` as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Reading, pick
from torchloupe_core.layout import from_map, to_map
from torchloupe_core.methods.cam import other_layer
from torchloupe_core.query import Map, Query, finite
from torchloupe_core.registry import method

__all__ = ["Answer", "StandIn", "by_gradient", "map_by", "require_single_logits"]

# Registers a class activation map by the gradient at a layer; the name and the paper are its own.
by_gradient = partial(method, "explain", needs=("layer", "gradient"), cost="1 forward + backward of the head")


class StandIn(nn.Module):
    """A question as a model: images in, the target's value `[N, 1]` out, the layer's maps passing through `.layer`.

    A batch of one image for each target asks each its own; where the question is about one image, any number of
    variants of it may be given. logits: the output is the model's logits `[N, K]` instead. from_input: the graph begins
    at the images, not at the layer. `scores [N]` are the values of the first pass, the images as they are.
    """

    def __init__(self, part: Query, layer: str, *, logits: bool = False, from_input: bool = False) -> None:
        super().__init__()
        layout = part.handle.layer(layer, part.shape).layout
        if layout is None:
            raise NotApplicable(f"layer {layer!r} gives no map of channels; {other_layer(part, layer)}")
        self.part, self.name, self.layout = part, layer, layout
        self.logits, self.from_input = logits, from_input
        self.layer = nn.Identity()
        self.anchor = nn.Parameter(torch.empty(0, device=part.inputs.device), requires_grad=False)  # says where it is
        self.scores: Tensor | None = None
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        part, handle = self.part, self.part.handle
        targets = list(part.targets) * len(inputs) if len(part.targets) == 1 else part.targets
        names = dict.fromkeys(name for bound in targets for name in bound.target.layers)
        through = self.logits or any(bound.target.reads_output for bound in targets)
        graph = torch.is_grad_enabled()
        leaf = self.name if graph and not self.from_input else None
        exchange = {self.name: self._pass}
        inputs = inputs.to(part.inputs.dtype)
        with handle.watch(*names, leaf=leaf, through=through, shape=part.shape, exchange=exchange) as watch:
            reading = Reading(handle, watch, watch(inputs))
            with torch.set_grad_enabled(graph):
                scores = finite(pick(reading, targets))
                output = handle.counted(self._wide(reading.logits())) if self.logits else scores[:, None]
        if graph and not output.requires_grad:
            raise NotApplicable(f"the target does not depend on layer {self.name!r}; {other_layer(part, self.name)}")
        self.scores = scores.detach() if self.scores is None else self.scores
        return output

    def _pass(self, raw: Tensor) -> Tensor:
        """Lets the layer's maps through `.layer`, in single precision at least: numpy has no bfloat16."""
        maps = to_map(raw, self.layout)
        maps = self.layer(self._wide(maps))
        return from_map(maps.to(raw.dtype), self.layout, raw).clone()  # what follows may work in place

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


Answer = Callable[[StandIn], Tensor]


def map_by(
    query: Query,
    answer: Answer,
    *,
    gradient: bool = True,
    alone: bool = False,
    logits: bool = False,
    from_input: bool = False,
) -> Map:
    """The map `[N, h, w]` that `answer` makes of stand-ins `[n, h, w]`, batch by batch.

    gradient: whether it differentiates. alone: it is given one image at a time and in the same random state, as for
    methods that draw or ask about many variants. logits, from_input: of the stand-in.
    """
    layer = query.resolved_layer()

    def ask(part: Query) -> tuple[Tensor, Tensor]:
        model = StandIn(part, layer, logits=logits, from_input=from_input)
        with torch.set_grad_enabled(gradient):
            values = answer(model).detach()
        if model.scores is None:
            raise RuntimeError("the library did not run the model that it was given")
        if model.layout.prefix and not values.any():
            raise NotApplicable(
                f"after {layer!r} only the class token counts, so its map is zero; {other_layer(part, layer)}"
            )
        return values, model.scores

    def ask_alone(part: Query) -> tuple[Tensor, Tensor]:
        found = []
        for index in range(len(part.inputs)):
            torch.manual_seed(query.seed)
            np.random.seed(query.seed % 2**32)
            found.append(ask(part.only(index, index + 1)))
        maps, scores = zip(*found, strict=True)
        return torch.cat(maps), torch.cat(scores)

    maps, scores = zip(*query.each(ask_alone if alone else ask), strict=True)
    return Map(torch.cat(maps), layer=layer, scores=torch.cat(scores))


def require_single_logits(query: Query, name: str) -> None:
    """Raises `NotApplicable` unless each target is the logit of one class."""
    for bound in query.targets:
        if list((bound.logit_weights or {}).values()) != [1.0]:
            raise NotApplicable(f"{name} compares one logit with others, and {bound.target} is not one; use grad_cam")
