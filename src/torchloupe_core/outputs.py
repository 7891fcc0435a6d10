"""What a model's output holds: logits `[N, K]`, class maps `[N, K, H, W]` or detections, found in tuples and dicts.

Detections are one dict for each image, as torchvision's: `boxes [D, 4]` (left, top, right, bottom), `labels [D]` and
`scores [D]`. The selector is `Spec.output`: an index, a key or attribute, or a function of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.spec import OutputSelector

__all__ = ["Detections", "Form", "class_maps", "detections", "form_of", "logits"]

Detections = Sequence[Mapping[str, Tensor]]
Form = Literal["logits", "maps", "detections"]

BOX_FIELDS = ("boxes", "labels", "scores")
MAIN = ("logits", "out")  # of a dict with more than one tensor; torchvision's segmentation gives "out" and "aux"


def logits(output: Any, selector: OutputSelector | None = None) -> Tensor:
    """The tensor `[N, K]` of a model's output; one number for each image is one column."""
    found = selected(output, selector)
    if not isinstance(found, Tensor):
        raise NotApplicable(
            "the model gives detections, not logits [N, K]; ask about one, "
            "target=tl.box_score(label, (top, left, bottom, right)), or about a layer"
        )
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim == 4:
        raise NotApplicable(
            f"the model's output has shape {list(found.shape)}, not [N, K]; ask about a class over a region, "
            "target=tl.region(label), or about a layer, or reduce it with output="
        )
    if found.ndim != 2:
        raise NotApplicable(
            f"the model's output has shape {list(found.shape)}, not [N, K]; name a tensor or a function of it "
            "with output=, or ask about a layer"
        )
    return found


def class_maps(output: Any, selector: OutputSelector | None = None) -> Tensor:
    """The tensor `[N, K, H, W]` of a segmentation model's output."""
    found = selected(output, selector)
    if not isinstance(found, Tensor) or found.ndim != 4:
        given = f"has shape {list(found.shape)}" if isinstance(found, Tensor) else "is detections"
        raise NotApplicable(
            f"a region is asked about where each position has logits, [N, K, H, W]; the model's output {given}. "
            "Select another with output="
        )
    return found


def detections(output: Any, selector: OutputSelector | None = None) -> Detections:
    """The detections in each image."""
    found = selected(output, selector)
    if isinstance(found, Tensor):
        raise NotApplicable(
            f"a box's score needs a detector, whose output is a dict of {', '.join(BOX_FIELDS)} for each image; this "
            f"model gives shape {list(found.shape)}. Make such a list with output="
        )
    return found


def form_of(output: Any, selector: OutputSelector | None = None) -> tuple[Form, int | None]:
    """What the output holds, and K where it has one."""
    found = selected(output, selector)
    if not isinstance(found, Tensor):
        return "detections", None
    return ("maps", found.shape[1]) if found.ndim == 4 else ("logits", logits(found).shape[1])


def selected(output: Any, selector: OutputSelector | None) -> Tensor | Detections:
    """The tensor or the detections that a selector, or else the output's own form, points at."""
    if callable(selector):
        output = selector(output)
    elif selector is not None:
        output = _item(output, selector)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
        if known := [key for key in MAIN if key in tensors]:
            return tensors[known[0]]
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        raise BadInput(f"the model's output is a dict; name its logits with output=, one of {list(output)}")
    if isinstance(output, (tuple, list)) and output:
        if isinstance(output[0], Tensor):
            return output[0]
        if all(_is_detections(one) for one in output):
            return output
    if isinstance(main := getattr(output, "logits", None), Tensor):
        return main
    raise BadInput(f"the model's output is {type(output).__name__}, not a tensor; select one with output=")


def _is_detections(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(name), Tensor) for name in BOX_FIELDS)


def _item(output: Any, selector: str | int) -> Any:
    try:
        return (
            getattr(output, selector) if isinstance(selector, str) and hasattr(output, selector) else output[selector]
        )
    except (LookupError, TypeError) as error:
        has = list(output) if isinstance(output, Mapping) else type(output).__name__
        raise BadInput(f"output={selector!r} selects nothing from the model's output, {has}") from error
