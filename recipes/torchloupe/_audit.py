"""Shortcuts a model takes: small things that recur in a class and decide for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchloupe._batch import read_batch
from torchloupe._explain import explain
from torchloupe._masks import masks_of
from torchloupe._models import ModelLike, opened
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core import registry
from torchloupe_core.audit import Audit
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.methods.recurring import Region, recurring
from torchloupe_core.metrics.imputation import imputed
from torchloupe_core.targets import logit

__all__ = ["audit"]

LEAST = 5  # images that share a region
ALIKE = 0.8  # correlation of regions that are one
DECIDES = 0.5  # of other images that a region turns, from which on it is a shortcut
ON_OBJECT = 0.5  # of a region inside the masks, from which on it is the object itself
OF_A_CLASS, OTHERS, SHOWN = 100, 50, 5  # images
NOISE = 0.01  # on what is filled in


def audit(
    model: ModelLike,
    dataset: Any,
    *,
    masks: Any = None,
    method: str = "captum.integrated_gradients",
    width: int | None = None,
    share: float = 0.1,
    images: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Audit:
    """Regions that attributions of a class keep pointing at, and that turn other images into that class.

    For each class the model sees, the attributions of its images are brought together by what they point at, wherever
    that lies (as SpRAy brings heatmaps together, Lapuschkin et al. 2019). A window that recurs in `share` of the
    class's images, five at least, is a shortcut if it decides by itself: pasted into images of other classes it turns
    at least half of them into this one, and more than any other window of its images does. masks: where the object is,
    as in `compare`; a region mostly on it is the object and no shortcut. width: of the window in pixels, a fifth of the
    shorter side unless given. images: looked at, at most, evenly spread. method, options: of `explain`.
    """
    registry.find("explain", method).check_options(options)
    handle = opened(model, device=device, dtype=dtype)
    begun, forwards = time.perf_counter(), handle.forwards
    data = open_data(dataset, handle.spec)
    if data.order is None:
        raise BadInput("a stream of images has no length; give an audit a folder, a list or a data set with one")
    if images < LEAST or not 0 < share <= 1:
        raise BadInput(f"images is at least {LEAST} and share above 0, at most 1; got {images} and {share}")
    order = list(data.order)
    chosen = [order[place * len(order) // min(images, len(order))] for place in range(min(images, len(order)))]
    read = read_batch(handle, data, chosen, asking="an audit")
    if not len(read):
        raise BadInput(f"none of the {len(chosen)} images could be read: {next(iter(read.skipped.values()), '')}")
    pictures = handle.spec.display(read.inputs).float().cpu()
    side = round(min(pictures.shape[2:]) / 5) if width is None else width
    if not 3 <= side <= min(pictures.shape[2:]) // 2:
        raise BadInput(f"width is from 3 pixels to half of the image's shorter side; got {side}")
    truth = masks_of(masks, data, order)
    inside = None if truth is None else truth(read.indices, (pictures.shape[2], pictures.shape[3]))
    with progress_bar("audit", "classes", progress) as report:
        suspects = _suspects(handle, read.inputs, pictures, method, options, side, share, seed, batch_size, report)
        tried = [_tried(handle, read.inputs, one, inside, seed) for one in suspects]
    found = [one for one in tried if _decides(one)]
    shown = min((len(one.boxes) for one in found), default=0)
    shown = min(shown, SHOWN)
    height, across = pictures.shape[2:]
    return Audit(
        method="audit",
        backend="native",
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(),
        options={"method": method, "width": side, "share": share, "images": images, **options},
        classes=tuple(handle.name_of(one.cls) for one in found),
        shares=tuple(len(one.members) / one.of for one in found),
        covered=tuple(one.covered for one in found),
        transplanted=tuple(one.transplanted for one in found),
        control=tuple(one.control for one in found),
        inside=tuple(one.inside for one in found),
        members=tuple(tuple(read.indices[row] for row in one.members.tolist()) for one in found),
        pictures=torch.stack([pictures[one.members[:shown]] for one in found])
        if found
        else torch.empty(0, 0, 3, height, across),
        boxes=torch.stack([one.boxes[:shown] for one in found]) if found else torch.empty(0, 0, 4, dtype=torch.long),
        patches=torch.stack([one.patch for one in found]) if found else torch.empty(0, 3, side, side),
        looked_at=len(read),
        recurring=len(tried),
        skipped=read.skipped,
    )


@dataclass(frozen=True)
class _Suspect:
    """A region that recurs among `of` images of one class: the rows that have it, and those of other classes."""

    cls: int
    of: int
    members: Tensor
    others: Tensor
    region: Region


@dataclass(frozen=True)
class _Finding:
    """A region that recurs, the rows that have it, and what came of trying it."""

    cls: int
    of: int
    members: Tensor
    boxes: Tensor
    patch: Tensor
    covered: float
    transplanted: float
    control: float
    inside: float


def _suspects(
    handle: Handle,
    inputs: Tensor,
    pictures: Tensor,
    method: str,
    options: Mapping[str, Any],
    side: int,
    share: float,
    seed: int,
    batch_size: int | None,
    report: Callable[[int, int], None],
) -> list[_Suspect]:
    """What recurs where the attributions of each class point."""
    seen = torch.tensor([one[0].index for one in handle.predict(inputs, k=1)])
    classes, found = sorted(set(seen.tolist())), []
    asked: dict[str, Any] = {"method": method, "seed": seed, "batch_size": batch_size, "progress": False, **options}
    for done, cls in enumerate(classes):
        own, others = (seen == cls).nonzero()[:, 0], (seen != cls).nonzero()[:, 0]
        chosen = own[torch.linspace(0, len(own) - 1, min(OF_A_CLASS, len(own))).round().long()]
        if len(chosen) >= LEAST:
            maps = explain(handle, inputs[chosen], target=logit(cls), **asked).upsample()
            least = max(LEAST, round(share * len(chosen)))
            found += [
                _Suspect(cls, len(chosen), chosen[region.members], others, region)
                for region in recurring(pictures[chosen], maps, side, alike=ALIKE, least=least)
            ]
        report(done + 1, len(classes))
    return found


def _decides(one: _Finding) -> bool:
    """Whether the region turns images by itself, and is not the object."""
    return one.transplanted >= max(DECIDES, 2 * one.control) and not one.inside >= ON_OBJECT


def _tried(handle: Handle, inputs: Tensor, suspect: _Suspect, inside: Tensor | None, seed: int) -> _Finding:
    """The region taken out of the images that have it, and put into others."""
    members, boxes, cls = suspect.members, suspect.region.boxes, suspect.cls
    hole = torch.zeros(len(members), *inputs.shape[2:], dtype=torch.bool)
    for row, (top, left, bottom, right) in enumerate(boxes.tolist()):
        hole[row, top:bottom, left:right] = True
    generator = torch.Generator().manual_seed(seed)
    filled = imputed(inputs[members], hole.to(inputs.device), NOISE, generator)
    others = suspect.others[torch.randperm(len(suspect.others), generator=generator)[:OTHERS]]
    sources = members.repeat(-(-len(others) // len(members)))[: len(others)]
    places = boxes.repeat(-(-len(others) // len(members)), 1)[: len(others)]
    side = int(boxes[0, 2] - boxes[0, 0])
    corners = [torch.randint(size - side + 1, (len(others),), generator=generator) for size in inputs.shape[2:]]
    anywhere = torch.stack([*corners, *(corner + side for corner in corners)], 1)
    return _Finding(
        cls,
        suspect.of,
        members,
        boxes,
        suspect.region.median,
        covered=1 - _share(handle, filled, cls),
        transplanted=_share(handle, _pasted(inputs[others], inputs[sources], places), cls),
        control=_share(handle, _pasted(inputs[others], inputs[sources], anywhere), cls),
        inside=float("nan") if inside is None else float(inside[members][hole].float().mean()),
    )


def _pasted(images: Tensor, sources: Tensor, boxes: Tensor) -> Tensor:
    """Images with one window each of the sources in its place."""
    found = images.clone()
    for image, source, (top, left, bottom, right) in zip(found, sources, boxes.tolist(), strict=True):
        image[:, top:bottom, left:right] = source[:, top:bottom, left:right]
    return found


def _share(handle: Handle, inputs: Tensor, cls: int) -> float:
    """Of images, how many the model sees as the class."""
    if not len(inputs):
        return 0.0
    return sum(one[0].index == cls for one in handle.predict(inputs, k=1)) / len(inputs)
