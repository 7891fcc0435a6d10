"""What every method of Captum is asked with: the target as a function, our inputs, baselines, segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from torchloupe_adapters import skimage
from torchloupe_core.baselines import filling
from torchloupe_core.errors import BadInput, MissingDependency, NotApplicable
from torchloupe_core.query import Query

__all__ = [
    "Scored",
    "asked",
    "attr",
    "each_from",
    "in_batches",
    "joined",
    "one_by_one",
    "refused_without",
    "segments_of",
    "target_of",
    "tensor_of",
]

T = TypeVar("T")


def attr() -> Any:
    """The module `captum.attr`. Raises `MissingDependency`."""
    try:
        import captum.attr
    except ImportError as error:
        raise MissingDependency.of("captum", None) from error
    return captum.attr


def asked(part: Query) -> dict[str, Any]:
    """The arguments every method of Captum takes: the inputs, and which image each of them belongs to."""
    inputs = part.inputs.detach().requires_grad_(True)  # Captum would set it, and leave it set after an exception
    return {"inputs": inputs, "additional_forward_args": (torch.arange(len(inputs)),)}


def tensor_of(found: Any) -> Tensor:
    """What Captum found, without its graph."""
    tensor: Tensor = found.detach()
    return tensor


def joined(answers: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What one batch after another gave, put together."""
    return tuple(map(torch.cat, zip(*answers, strict=True)))


# -- the target -------------------------------------------------------------------------------------------------------


def target_of(part: Query, kept: list[Tensor] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The target's values as a function of inputs and their images; noted in `kept` as they come.

    Raises `NotApplicable` where a gradient is wanted and none leads to the input.
    """

    def scored(inputs: Tensor, images: Tensor) -> Tensor:
        values = part.score(inputs, images)
        refused_without(values, inputs)
        if kept is not None:
            kept.append(values.detach())
        return values

    return scored


def refused_without(values: Tensor, inputs: Tensor) -> None:
    """Raises `NotApplicable` where a gradient is wanted and none leads from the values to the inputs."""
    if torch.is_grad_enabled() and inputs.requires_grad and not values.requires_grad:
        raise NotApplicable("the target has no gradient with respect to the input; rise, occlusion and lime need none")


class Scored(nn.Module):
    """The model with the target as its output, for methods of Captum that want a module."""

    def __init__(self, part: Query, kept: list[Tensor] | None = None) -> None:
        super().__init__()
        self.model, self.score = part.handle.module, target_of(part, kept)

    def forward(self, inputs: Tensor, images: Tensor) -> Tensor:
        return self.score(inputs, images)


def in_batches(part: Query) -> Callable[[Tensor, Tensor], Tensor]:
    """The target's values for any number of inputs, with the graph of one batch in memory at a time.

    Methods that draw at random draw for all their samples at once, so that nothing depends on the batch size; of the
    same draws the gradients are shared.
    """

    def scored(inputs: Tensor, images: Tensor) -> Tensor:
        values: Tensor = _InBatches.apply(inputs, images, part)
        return values

    return scored


class _InBatches(torch.autograd.Function):
    """Each batch is differentiated as soon as it has run; the way back multiplies by what was found."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, images: Tensor, part: Query) -> Tensor:
        ask = partial(_differentiated, part, inputs, images)

        def differentiated() -> tuple[Tensor, ...]:
            return joined([found for _, _, found in part.pace.run(len(inputs), ask)])

        values, gradients = part.once(("gradients", *images.tolist()), inputs, differentiated)
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * given[:, None, None, None], None, None


def _differentiated(part: Query, inputs: Tensor, images: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The target's values for some of the inputs, and their gradient."""
    rows = inputs[start:stop].detach().requires_grad_(True)
    with torch.enable_grad():
        values = target_of(part)(rows, images[start:stop])
        (gradient,) = torch.autograd.grad(values.sum(), rows)
    return values.detach(), gradient


# -- images and segments ----------------------------------------------------------------------------------------------


def each_from(query: Query, baseline: Tensor | float | str | None, answer: Callable[[Query, Tensor], T]) -> list[T]:
    """What `answer` says of this query and each image's baseline `[n, C, H, W]`, batch by batch."""
    begin = filling(query, baseline).expand(len(query.inputs), *query.shape)
    answers: list[T] = []

    def ask(start: int, stop: int) -> T:
        return answer(query.only(start, stop), begin[start:stop])

    for _, done, one in query.pace.run(len(query.inputs), ask):
        answers.append(one)
        query.progress(done, len(query.inputs))
    return answers


def one_by_one(query: Query, answer: Callable[[Query], T]) -> list[T]:
    """What `answer` says of each image alone, in the same random state each time.

    Captum draws from the global generators of torch and numpy, which are put back when the model is.
    """
    answers = []
    for index in range(len(query.inputs)):
        torch.manual_seed(query.seed)
        np.random.seed(query.seed % 2**32)
        answers.append(answer(query.only(index, index + 1)))
        query.progress(index + 1, len(query.inputs))
    return answers


def segments_of(query: Query, segments: Tensor | None, n_segments: int) -> list[Tensor]:
    """For each image the superpixel of every pixel, `[H, W]`, numbered from 0; cut by SLIC unless given."""
    if segments is None:
        return [skimage.slic(image, n_segments) for image in query.handle.spec.display(query.inputs)]
    given = torch.as_tensor(segments)
    given = given.expand(len(query.inputs), *given.shape) if given.ndim == 2 else given
    expected = (len(query.inputs), *query.size)
    if tuple(given.shape) != expected or given.is_floating_point():
        raise BadInput(f"segments are integers [H, W] or [N, H, W] = {list(expected)}; got {list(given.shape)}")
    return [one.unique(return_inverse=True)[1].view(query.size) for one in given]
