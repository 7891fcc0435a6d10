"""What images made from images cost, how much memory a photograph takes, and how often models are fooled, on one core.

    python benchmarks/images.py                   every row, about half an hour
    python benchmarks/images.py cost memory       the rows whose name begins so
    python benchmarks/images.py fooling --scenes 50

Costs are those of a step, from runs of two lengths, as ratios to a bare loop of forward and backward passes to the
image through the network cut off after the last layer read, with frozen parameters, at the same size; medians of rounds
in which each runs once. Memory is the growth of the peak of a fresh process. The network for styles is trained for
`--minutes` on scenes, then compared with 100 steps of the optimiser on scenes it has not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import Row, Rows, Steps, asked, grown, in_fresh_process, over, ratio, run, seconds, steps_in_turn
from networks import SIZE, network, passes_to
from torch import Tensor, nn

import torchloupe as tl

FEW, MANY = 2, 8
PHOTO = (1536, 2048)


def parts(given: argparse.Namespace) -> dict[str, Callable[[], Rows]]:
    return {
        "cost of a step, resnet50": costs,
        "memory of a photograph of 2048x1536": photographs,
        "fooling the demo model, trained against it": lambda: fooling("demo", given.scenes),
        "fooling the demo model, not so trained": lambda: fooling("demo/mislabelled", given.scenes),
        "network for styles": lambda: styles(given.minutes),
    }


# -- costs ------------------------------------------------------------------------------------------------------------


def costs() -> Rows:
    handle = tl.wrap(network())
    image, style = photo(SIZE, SIZE, 1), photo(SIZE, SIZE, 2)
    quiet: dict[str, Any] = {"progress": False}
    works: dict[str, tuple[str, Steps]] = {
        "dream, layer3": ("layer3", lambda n: tl.dream(handle, image, "layer3", octaves=1, steps=n, **quiet)),
        "invert, layer3, L-BFGS": ("layer3", lambda n: tl.invert(handle, image, "layer3", steps=n, **quiet)),
        "fool, PGD": ("fc", lambda n: tl.fool(handle, image, steps=n, **quiet)),
        "texture, relu to layer3, L-BFGS": ("layer3", lambda n: tl.texture(handle, style, steps=n, **quiet)),
        "stylize, relu to layer3, L-BFGS": ("layer3", lambda n: tl.stylize(handle, image, style, steps=n, **quiet)),
    }
    for name, (layer, work) in works.items():
        taken = steps_in_turn(work, passes_to(handle.module, layer), few=FEW, many=MANY)
        yield over(*taken, f"{name} / bare", goal=1.3)


# -- memory -----------------------------------------------------------------------------------------------------------


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, height // 16), max(2, width // 16), generator=source)
    return (nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0] * 255).round().byte()


MEMORY: dict[str, Callable[[], Any]] = {
    "dream of resnet50 layer3, in tiles of 512": lambda: tl.dream(
        tl.wrap(network()), photo(*PHOTO), "layer3", octaves=2, steps=1, progress=False
    ),
    "dream of resnet50 layer3, a picture of 512x512": lambda: tl.dream(
        tl.wrap(network()), photo(512, 512), "layer3", octaves=1, steps=1, progress=False
    ),
    "stylize, demo model, whole": lambda: tl.stylize(
        "demo", photo(*PHOTO), photo(512, 512, 1), steps=2, progress=False
    ),
}


def photographs() -> Rows:
    for name in MEMORY:
        found = in_fresh_process(name)
        yield Row(name, found["grown"] / 2**20, "MiB", note=found["said"])


def growth(name: str) -> dict[str, Any]:
    """Bytes by which the process's peak grows, and what was said in place of an image."""
    tl.dream("demo", photo(32, 32), "layer1", octaves=1, steps=1, progress=False)
    said: list[str] = []

    def work() -> None:
        try:
            MEMORY[name]()
        except tl.errors.BadInput as error:
            said.append(f"refused: {error}")

    return {"grown": grown(work), "said": "".join(said)}


# -- fooling, styles --------------------------------------------------------------------------------------------------


def fooling(name: str, count: int) -> Rows:
    """The share of scenes seen as something else, or as a given class, after rounding to 8 bits."""
    model, scenes = tl.load(name), tl.demo_scenes(count, seed=77)
    with torch.no_grad():
        own = [guess[0].index for guess in model.predict(scenes.images, k=1)]
    others = [(label + 1) % 12 for label in own]
    for levels in (2, 4, 8):
        for method in ("fgsm", "pgd"):
            for kind, target in (("any other", None), ("a given", others)):
                made = tl.fool(model, scenes.images, target, eps=levels / 255, method=method, progress=False)
                assert ((made.images - made.given) * 255).round().abs().max() <= levels
                yield Row(f"eps {levels}/255, {method}, {kind} class", made.rate, "of the scenes")


def styles(minutes: float) -> Rows:
    model, data = tl.load("demo"), tl.demo_scenes(1000, seed=3)
    style = photo(64, 96, 5)
    settings: dict[str, Any] = {"width": 16, "blocks": 3, "progress": False}
    tl.train_stylizer(model, style, data, steps=5, **settings)  # the scenes are drawn, the layers are looked at
    pace = seconds(lambda: tl.train_stylizer(model, style, data, steps=20, **settings)) / 20
    net = tl.train_stylizer(model, style, data, steps=max(20, round(60 * minutes / pace)), **settings)
    fresh = tl.demo_scenes(8, seed=99).images
    optimise = partial(tl.stylize, model, fresh, style, style_size=96, progress=False)
    optimised, made = optimise(), net.apply(fresh)
    layers = [name for name, _ in optimised.diagnostics["gram"][0]]
    far = [style_loss(model, images, style, layers) for images in (fresh.float() / 255, optimised.images, made)]
    yield Row("training", net.seconds / 60, "minutes")
    yield Row("style loss of the scenes as they are", far[0])
    yield Row("style loss of the optimiser, 100 steps", far[1])
    yield Row("style loss of the network / the optimiser's", far[2] / far[1], goal=2)
    yield ratio(
        optimise, lambda: net.apply(fresh), "optimiser / network, seconds an image", rounds=1, goal=100, least=True
    )


def style_loss(model: tl.Handle, images: Tensor, style: Tensor, layers: list[str]) -> float:
    """The relative squared distance of Gram matrices, computed here anew."""
    found, grams = {}, {}
    for name, batch in (("style", style[None].float() / 255), ("images", images)):
        with model.watch(*layers, shape=(3, batch.shape[2], batch.shape[3])) as watch:
            watch(model.spec.normalised(batch))
            found[name] = [watch.map(layer).flatten(2) for layer in layers]
        grams[name] = [one @ one.transpose(1, 2) / one[0].numel() for one in found[name]]
    pairs = zip(grams["images"], grams["style"], strict=True)
    return float(torch.stack([(a - b).square().sum((1, 2)) / b.square().sum() for a, b in pairs]).mean())


if __name__ == "__main__":
    given = asked(__doc__, scenes=200, minutes=3.0)
    run(parts(given), given, {name: partial(growth, name) for name in MEMORY})
