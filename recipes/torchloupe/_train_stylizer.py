"""A network that puts pictures into styles in one pass."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchloupe._models import ModelLike, opened
from torchloupe._style import seen_as_pictures
from torchloupe._versions import versions
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput
from torchloupe_core.making import pictures
from torchloupe_core.methods.feedforward import Training, digest
from torchloupe_core.results import writable_folder
from torchloupe_core.style import grams_of, layers_for
from torchloupe_core.stylenet import StyleNet
from torchloupe_core.stylizer import Stylizer, flat

__all__ = ["train_stylizer"]

SHOWN, SMALL = 4, 96  # images in every style; pixels of a style's picture


def train_stylizer(
    model: ModelLike,
    styles: Any,
    dataset: Any,
    *,
    names: Sequence[str] | None = None,
    steps: int = 2000,
    batch_size: int = 4,
    lr: float = 1e-3,
    style_weight: float = 1.0,
    content_weight: float = 1.0,
    tv: float = 0.05,
    layers: Sequence[object] | None = None,
    content_layer: object | None = None,
    style_size: int | None = None,
    width: int = 32,
    blocks: int = 5,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 200,
    seed: int = 0,
    device: torch.device | str | None = None,
    interruptible: bool = False,
    progress: bool | None = None,
) -> Stylizer:
    """A feed-forward network for several styles, trained on the losses of `stylize` (Johnson 2016, Dumoulin 2017).

    styles: pictures of any size, one or several; names: theirs, of their files unless given. dataset: as everywhere;
    its images are preprocessed for the model. At each step every image of the batch gets a style at random. layers,
    content_layer and the weights mean what they mean for `stylize`. width, blocks: of the network, 32 and 5 in the
    papers; smaller is faster. checkpoint: a file that training is kept in every so many steps; where it is there
    already training goes on from it to `steps` in all, as if it had never stopped, to rounding.

    What comes back is applied to pictures of any size, `.apply(image, style)`, and to a folder, `.folder(source, out)`.
    Raises `BadInput` for a checkpoint of other settings, `StoreError` for one that cannot be written, before any work.
    """
    begun = time.perf_counter()
    if steps < 1 or batch_size < 1 or every < 1 or width < 1 or blocks < 0 or not 0 < lr < float("inf"):
        raise BadInput("steps, batch_size, every and width are at least 1, blocks at least 0, and lr is above 0")
    if min(style_weight, content_weight, tv) < 0 or style_weight <= 0:
        raise BadInput("style_weight is above 0, content_weight and tv are at least 0")
    handle = opened(model, device=device)
    several = list(styles) if isinstance(styles, (list, tuple)) or _is_batch(styles) else [styles]
    given = [image[None] for one in several for image in seen_as_pictures(handle, one, style_size)]
    called = _names(names, several, len(given))
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        writable_folder(path.parent)
    data = open_data(dataset, handle.spec)
    own, middle = layers_for(handle, handle.input_shape, layers, content_layer)
    forwards = handle.forwards
    with handle.borrow(), progress_bar("train-stylizer", "steps", progress) as report:
        each = [grams_of(handle, one, own) for one in given]
        weights = (content_weight, style_weight, tv)
        settings: dict[str, Any] = {"width": width, "blocks": blocks, "batch_size": batch_size, "lr": lr, "seed": seed}
        settings |= {"weights": list(weights), "layers": list(own), "content_layer": middle, "images": data.length}
        settings |= {"model": handle.spec.name, "styles": digest(given)}
        network = StyleNet(len(given), channels=handle.input_shape[0], width=width, blocks=blocks, seed=seed)
        training = Training(
            handle,
            network.to(handle.device),
            data,
            {name: torch.cat([one[name] for one in each]) for name in own},
            middle,
            weights,
            batch_size,
            lr,
            seed,
            settings,
            report,
        )
        training.run(steps, checkpoint=path, every=every, interruptible=interruptible)
        samples = _samples(training)
        made = _in_each_style(training, samples)
    return Stylizer(
        method="feedforward",
        backend="native",
        seed=seed,
        seconds=time.perf_counter() - begun,
        forwards=handle.forwards - forwards,
        versions=versions(),
        options=settings,
        weights=flat(network),
        channels=handle.input_shape[0],
        width=width,
        blocks=blocks,
        styles=called,
        losses=torch.stack(training.losses),
        pictures=torch.cat([_small(one) for one in given]),
        samples=samples,
        made=made,
        stopped=training.stopped,
        diagnostics={"steps": training.step},
    )


def _is_batch(styles: Any) -> bool:
    return isinstance(styles, Tensor) and styles.ndim == 4


def _names(names: Sequence[str] | None, several: Sequence[Any], count: int) -> tuple[str, ...]:
    """What the styles are called, no two alike."""
    if names is None:
        files = [
            Path(one).stem if isinstance(one, (str, os.PathLike)) else f"style {n}" for n, one in enumerate(several)
        ]
        names = files if len(files) == count else [f"style {number}" for number in range(count)]
        names = [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names)]
    if len(names) != count or len(set(names)) != count:
        raise BadInput(f"{count} styles have {count} names, no two alike; got {list(names)}")
    return tuple(map(str, names))


def _samples(training: Training) -> Tensor:
    """The first images of the data set, as pixels."""
    inputs = torch.stack([training.read(place) for place in range(min(SHOWN, len(training.images)))])
    return training.handle.spec.pixels(inputs.float()).cpu()


def _in_each_style(training: Training, samples: Tensor) -> Tensor:
    """`[S, k, C, H, W]`."""
    count = len(next(iter(training.grams.values())))
    mixes = torch.eye(count).to(training.handle.device)
    images = samples.to(training.handle.device)
    with torch.no_grad():
        made = [training.network(images, mix.expand(len(images), -1)) for mix in mixes]
    return torch.stack(made).cpu()


def _small(style: Tensor) -> Tensor:
    """`[1, 3, h, w]`: a square picture of a style, all of one size."""
    return F.interpolate(pictures(style.float().cpu()), size=(SMALL, SMALL), mode="bilinear", antialias=True)
