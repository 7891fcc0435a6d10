"""What images optimised for units cost, and how far they move the units: ours and Lucent's own, on one core.

    python benchmarks/visualize.py                  every row, about an hour
    python benchmarks/visualize.py cost memory      the rows whose name begins so
    python benchmarks/visualize.py quality --steps 128 --units 12

Costs are those of a step, from runs of two lengths, as ratios to a bare loop of forward and backward passes to the
image through the network cut off after the layer, with frozen parameters, at the same size and number of images;
medians of rounds in which each runs once. Lucent is its own `render_vis` with its own hooks, transforms and defaults.
Quality counts the units whose activation, for the final image at the model's own size, our default moves at least as
far as Lucent's at equal steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.memory import most_held

Steps = Callable[[int], object]

SIZE, FEW, MANY, CHANNEL = 224, 1, 6, 11
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of row names")
    parser.add_argument("--steps", type=int, default=512, help="of the quality rows")
    parser.add_argument("--units", type=int, default=50, help="of the quality rows")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)  # one measurement in this fresh process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.memory:
        print(json.dumps(_grown(arguments.memory)))
        return
    print(f"torch {torch.__version__}, one core\n")
    rows: dict[str, Callable[[], None]] = {
        **{f"cost of one channel, {layer}": lambda layer=layer: _one(layer) for layer in ("layer1", "layer3", "fc")},
        "cost of 32 channels, layer3": _many,
        "cost of diversity, 16 images, layer3": _diversity,
        "memory of 32 images": _memory,
        "quality on the demo model": lambda: _quality(tl.load("demo"), arguments.steps, arguments.units),
        "quality on a random resnet18": lambda: _quality(_resnet18(), arguments.steps, arguments.units),
    }
    for name, row in rows.items():
        if not arguments.names or any(name.startswith(one) for one in arguments.names):
            print(name, flush=True)
            row()


# -- costs ------------------------------------------------------------------------------------------------------------


def _resnet50() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).eval().requires_grad_(False)


def _target(layer: str, channel: int = CHANNEL) -> str:
    return f"logit:{channel}" if layer == "fc" else f"{layer}:{channel}"


def _bare(module: nn.Module, layer: str, images: int = 1) -> Steps:
    """Forward and backward passes to the image, through the layers up to the last one needed."""
    children = list(module.named_children())
    stages = [part for _, part in children[: [name for name, _ in children].index(layer) + 1]]
    head = [nn.Flatten()] if layer == "fc" else []
    network = nn.Sequential(*stages[: -1 if head else None], *head, *(stages[-1:] if head else []))

    def work(steps: int) -> None:
        x = torch.randn(images, 3, SIZE, SIZE).requires_grad_(True)
        for _ in range(steps):
            torch.autograd.grad(network(x)[:, CHANNEL].mean(), x)

    return work


def _native(handle: tl.Handle, target: Any, **options: Any) -> Steps:
    options = {"method": "native", "progress": False, **options}
    return lambda steps: tl.visualize(handle, target, steps=steps, **options)


def _lucent(module: nn.Module, layer: str, channel: int = CHANNEL, **options: Any) -> Callable[[int], Tensor]:
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


def _medians(*works: Steps) -> list[float]:
    """Seconds of a step of each, taken in turn."""
    for work in works:
        work(FEW)
    times: list[list[float]] = [[] for _ in works]
    for turn in range(ROUNDS):
        order = list(range(len(works)))
        for place in order if turn % 2 == 0 else reversed(order):
            begun = time.process_time()
            works[place](FEW)
            between = time.process_time()
            works[place](MANY)
            times[place].append((time.process_time() - between - (between - begun)) / (MANY - FEW))
    return [statistics.median(one) for one in times]


def _say(name: str, value: float, goal: float | None = None, least: bool = False) -> None:
    kept = "" if goal is None else "ok" if (value >= goal if least else value <= goal) else "MISSED"
    aim = "" if goal is None else f"  goal {'>=' if least else '<='} {goal:g}  {kept}"
    print(f"    {name:44} {value:8.3f}{aim}", flush=True)


def _one(layer: str) -> None:
    module = _resnet50()
    handle = tl.wrap(module)
    bare, native, lucent = _medians(_bare(module, layer), _native(handle, _target(layer)), _lucent(module, layer))
    _say("native / bare", native / bare, 1.3)
    _say("Lucent / bare", lucent / bare)


def _many() -> None:
    module = _resnet50()
    handle = tl.wrap(module)
    targets = [f"layer3:{channel}" for channel in range(32)]
    works = [_bare(module, "layer3"), _native(handle, targets), _lucent(module, "layer3")]
    bare, native, lucent = _medians(*works)
    _say("native, per image / bare", native / 32 / bare, 1.1)
    _say("Lucent one after another / native", 32 * lucent / native, 4.0, least=True)
    fast = tl.wrap(module)
    (quick,) = _medians(_native(fast, targets, dtype=torch.bfloat16, memory_format=torch.channels_last))
    _say("native in bfloat16, channels last / bare", quick / 32 / bare)


def _diversity() -> None:
    handle = tl.wrap(_resnet50())
    plain, diverse = _medians(
        *(_native(handle, "layer3:11", n=16, batch_size=16, diversity=weight) for weight in (0.0, 1.0))
    )
    _say("with the term / without", diverse / plain, 1.05)


def _memory() -> None:
    """Peak of 32 images against that of one chunk of 8, each in a fresh process."""
    peaks = [
        json.loads(
            subprocess.run([sys.executable, __file__, "--memory", str(n)], capture_output=True, check=True).stdout
        )
        for n in (8, 32)
    ]
    _say("32 images / one chunk of 8 and the images", peaks[1] / (peaks[0] + 32 * 3 * SIZE * SIZE * 4 * 6), 1.05)
    print(f"    {peaks[1] / 2**20:.0f} MiB against {peaks[0] / 2**20:.0f} MiB")


def _grown(images: int) -> int | None:
    """The most bytes held at once by a step."""
    handle = tl.wrap(_resnet50())
    run = _native(handle, [f"layer3:{channel}" for channel in range(images)])
    run(1)
    return most_held(lambda: run(1), torch.device("cpu"))


# -- quality ----------------------------------------------------------------------------------------------------------


def _resnet18() -> tl.Handle:
    torch.manual_seed(0)
    return tl.wrap(torchvision.models.resnet18(weights=None).eval(), input_size=(3, 64, 64))


def _quality(handle: tl.Handle, steps: int, count: int) -> None:
    """Random channels of the stages: the target's activation for our image and for Lucent's."""
    layers = [f"layer{stage}" for stage in (1, 2, 3, 4)]
    units = [(layer, channel) for layer in layers for channel in range(handle.layer(layer).channels or 0)]
    chosen = sorted(random.Random(0).sample(units, count))
    targets = [f"{layer}:{channel}" for layer, channel in chosen]
    ours = tl.visualize(handle, targets, steps=steps, method="native")
    scores = handle.score(handle.spec.normalised(ours.images), targets)
    _say("our least contrast (mean distance from grey)", _contrast(ours.images).min().item())
    for name, enlarged in (("Lucent's default", True), ("Lucent told the model's size", False)):
        print(f"    against {name}")
        theirs = torch.cat([_lucent_image(handle, layer, channel, steps, enlarged) for layer, channel in chosen])
        _compare(targets, scores, handle.score(handle.spec.normalised(theirs), targets))
        _say("its least contrast", _contrast(theirs).min().item())


def _compare(targets: Sequence[str], scores: Tensor, others: Tensor) -> None:
    for name, each in (
        ("ours at least Lucent's", scores >= others),
        ("ours at least 95% of it", scores >= 0.95 * others),
    ):
        _say(name, each.float().mean().item(), 0.9 if name == "ours at least Lucent's" else None, least=True)
    _say("median of ours / Lucent's", (scores / others.clamp(min=1e-6)).median().item())
    for name, a, b in zip(targets, scores.tolist(), others.tolist(), strict=True):
        print(f"        {name:14} {a:9.4f} {b:9.4f} {'' if a >= b else '<'}")


def _lucent_image(handle: tl.Handle, layer: str, channel: int, steps: int, enlarged: bool) -> Tensor:
    """Lucent's image of the model's own size, normalised as the model's; enlarged: to 224 pixels, as Lucent does."""
    from lucent.optvis import param, transform

    side = handle.spec.input_size[1]  # type: ignore[index]
    with handle.borrow(), torch.enable_grad():
        steps_of_lucent = [*transform.standard_transforms, handle.spec.normalised]
        make = _lucent(
            handle.module,
            layer,
            channel,
            param_f=lambda: param.image(side),
            fixed_image_size=None if enlarged else side,
            transforms=steps_of_lucent,
            preprocess=False,
        )
        return make(steps)


def _contrast(images: Tensor) -> Tensor:
    return (images - 0.5).abs().mean((1, 2, 3))


if __name__ == "__main__":
    main()
