"""What images optimised for units cost, and how far they move the units: ours and Lucent's own, on one core.

    python benchmarks/visualize.py                  every row, about an hour
    python benchmarks/visualize.py cost memory      the rows whose name begins so
    python benchmarks/visualize.py quality --steps 128 --units 12

Costs are those of a step, from runs of two lengths, as ratios to a bare loop of forward and backward passes to the
image through the network cut off after the layer, with frozen parameters, at the same size and number of images;
medians over rounds in which each runs once. Lucent is its own `render_vis` with its own hooks, transforms and defaults.
Quality counts the units whose activation, for the final image at the model's own size, our default moves at least as
far as Lucent's at equal steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from measuring import Row, Rows, Steps, asked, memory, over, run, steps_in_turn
from networks import SIZE, network, passes_to
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.memory import most_held

FEW, MANY, CHANNEL = 1, 6, 11


def parts(given: argparse.Namespace) -> dict[str, Callable[[], Rows]]:
    return {
        **{f"cost of one channel, {layer}": partial(one, layer) for layer in ("layer1", "layer3", "fc")},
        "cost of 32 channels, layer3": many,
        "cost of diversity, 16 images, layer3": diversity,
        "memory of 32 images": chunks,
        "quality on the demo model": lambda: quality(tl.load("demo"), given.steps, given.units),
        "quality on a random resnet18": lambda: quality(small(), given.steps, given.units),
    }


# -- costs ------------------------------------------------------------------------------------------------------------


def native(handle: tl.Handle, target: Any, **options: Any) -> Steps:
    options = {"method": "native", "progress": False, **options}
    return lambda steps: tl.visualize(handle, target, steps=steps, **options)


def by_lucent(module: nn.Module, layer: str, channel: int = CHANNEL, **options: Any) -> Callable[[int], Tensor]:
    from lucent.optvis import param, render

    options = {"param_f": lambda: param.image(SIZE), **options}

    def work(steps: int) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            (image,) = render.render_vis(
                module, f"{layer}:{channel}", thresholds=(steps,), progress=False, show_image=False, **options
            )
        for part in module.modules():  # which Lucent leaves
            part._forward_hooks.clear()
        return torch.from_numpy(image).permute(0, 3, 1, 2)

    return work


def one(layer: str) -> Rows:
    module, target = network(), f"logit:{CHANNEL}" if layer == "fc" else f"{layer}:{CHANNEL}"
    ours, bare = steps_in_turn(native(tl.wrap(module), target), passes_to(module, layer), few=FEW, many=MANY)
    yield over(ours, bare, "native / bare", goal=1.3)
    lucent, bare = steps_in_turn(by_lucent(module, layer), passes_to(module, layer), few=FEW, many=MANY)
    yield over(lucent, bare, "Lucent / bare")


def many() -> Rows:
    module, targets = network(), [f"layer3:{channel}" for channel in range(32)]
    others = [by_lucent(module, "layer3")] if find_spec("lucent") else []
    ours, bare, fast, *lucent = steps_in_turn(
        native(tl.wrap(module), targets),
        passes_to(module, "layer3"),
        native(tl.wrap(module), targets, dtype=torch.bfloat16, memory_format=torch.channels_last),
        *others,
        few=FEW,
        many=MANY,
    )
    yield over(ours, bare, "native, per image / bare", times=1 / 32, goal=1.1)
    yield over(fast, bare, "native in bfloat16, channels last, per image / bare", times=1 / 32)
    name = "Lucent one after another / native"
    missing = Row(name, None, note="torch-lucent is not installed")
    yield over(*lucent, ours, name, times=32, goal=4, least=True) if lucent else missing


def diversity() -> Rows:
    handle = tl.wrap(network())
    plain, diverse = (native(handle, "layer3:11", n=16, batch_size=16, diversity=weight) for weight in (0.0, 1.0))
    taken = steps_in_turn(diverse, plain, few=FEW, many=MANY)
    yield over(*taken, "with the term / without", goal=1.05)


def chunks() -> Rows:
    """Peak of 32 images against that of one chunk of 8."""
    images = 32 * 3 * SIZE * SIZE * 4 * 6
    yield memory("32", "8", "32 images / one chunk of 8 and the images", beside=images, goal=1.05)


def held(images: int) -> int | None:
    """The most bytes held at once by a step."""
    step = partial(native(tl.wrap(network()), [f"layer3:{channel}" for channel in range(images)]), 1)
    step()
    return most_held(step, torch.device("cpu"))


# -- quality ----------------------------------------------------------------------------------------------------------


def small() -> tl.Handle:
    return tl.wrap(network("resnet18").requires_grad_(True), input_size=(3, 64, 64))


def quality(handle: tl.Handle, steps: int, count: int) -> Rows:
    """Random channels of the stages: the target's activation for our image and for Lucent's."""
    layers = [f"layer{stage}" for stage in (1, 2, 3, 4)]
    units = [(layer, channel) for layer in layers for channel in range(handle.layer(layer).channels or 0)]
    chosen = sorted(random.Random(0).sample(units, count))
    targets = [f"{layer}:{channel}" for layer, channel in chosen]
    ours = tl.visualize(handle, targets, steps=steps, method="native")
    scores = handle.score(handle.spec.normalised(ours.images), targets)
    yield Row("our least contrast", contrast(ours.images), "mean distance from grey")
    for name, enlarged in (("Lucent's default", True), ("Lucent told the model's size", False)):
        theirs = torch.cat([image_by_lucent(handle, layer, channel, steps, enlarged) for layer, channel in chosen])
        yield from compared(name, targets, scores, handle.score(handle.spec.normalised(theirs), targets))
        yield Row(f"{name}: its least contrast", contrast(theirs), "mean distance from grey")


def compared(name: str, targets: Sequence[str], scores: Tensor, others: Tensor) -> Rows:
    for target, a, b in zip(targets, scores.tolist(), others.tolist(), strict=True):
        print(f"    {target:14} {a:9.4f} {b:9.4f} {'' if a >= b else '<'}")
    better, close = ((scores >= share * others).float().mean().item() for share in (1.0, 0.95))
    yield Row(f"{name}: ours at least as far", better, "of the units", 0.9, least=True)
    yield Row(f"{name}: ours at least 95% as far", close, "of the units")
    yield Row(f"{name}: median of ours / theirs", (scores / others.clamp(min=1e-6)).median().item())


def image_by_lucent(handle: tl.Handle, layer: str, channel: int, steps: int, enlarged: bool) -> Tensor:
    """Lucent's image of the model's own size, normalised as the model's; enlarged: to 224 pixels, as Lucent does."""
    from lucent.optvis import param, transform

    side = handle.spec.input_size[1]  # type: ignore[index]
    with handle.borrow(), torch.enable_grad():
        steps_of_lucent = [*transform.standard_transforms, handle.spec.normalised]
        make = by_lucent(
            handle.module,
            layer,
            channel,
            param_f=lambda: param.image(side),
            fixed_image_size=None if enlarged else side,
            transforms=steps_of_lucent,
            preprocess=False,
        )
        return make(steps)


def contrast(images: Tensor) -> float:
    """The least of the images."""
    return (images - 0.5).abs().mean((1, 2, 3)).min().item()


if __name__ == "__main__":
    given = asked(__doc__, steps=512, units=50)
    run(parts(given), given, {str(images): partial(held, images) for images in (8, 32)})
