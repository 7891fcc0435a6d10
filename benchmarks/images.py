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
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import torchloupe as tl

Steps = Callable[[int], object]

SIZE, FEW, MANY, ROUNDS = 224, 2, 8, 3
PHOTO = (1536, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of row names")
    parser.add_argument("--scenes", type=int, default=200, help="of the fooling rows")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # one measurement in this fresh process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.memory:
        print(json.dumps(_grown(arguments.memory)))
        return
    print(f"torch {torch.__version__}, one core\n")
    rows: dict[str, Callable[[], None]] = {
        "cost of a step, resnet50": _costs,
        "memory of a photograph of 2048x1536": _memory,
        "fooling the demo model, trained against it": lambda: _fooling("demo", arguments.scenes),
        "fooling the demo model, not so trained": lambda: _fooling("demo/mislabelled", arguments.scenes),
        "network for styles": lambda: _network(arguments.minutes),
    }
    for name, row in rows.items():
        if not arguments.names or any(name.startswith(one) for one in arguments.names):
            print(name, flush=True)
            row()


def _say(name: str, value: float, goal: float | None = None, least: bool = False) -> None:
    kept = "" if goal is None else "ok" if (value >= goal if least else value <= goal) else "MISSED"
    aim = "" if goal is None else f"  goal {'>=' if least else '<='} {goal:g}  {kept}"
    print(f"    {name:52} {value:8.3f}{aim}", flush=True)


# -- costs ------------------------------------------------------------------------------------------------------------


def _resnet50() -> tl.Handle:
    torch.manual_seed(0)
    return tl.wrap(torchvision.models.resnet50(weights=None).eval().requires_grad_(False))


def _bare(module: nn.Module, layer: str) -> Steps:
    children = list(module.named_children())
    stages = [part for _, part in children[: [name for name, _ in children].index(layer) + 1]]
    network = nn.Sequential(*stages[:-1], nn.Flatten(), stages[-1]) if layer == "fc" else nn.Sequential(*stages)

    def work(steps: int) -> None:
        x = torch.rand(1, 3, SIZE, SIZE).requires_grad_(True)
        for _ in range(steps):
            torch.autograd.grad(network(x)[:, 11].mean(), x)

    return work


def _costs() -> None:
    handle = _resnet50()
    image, style = _photo(SIZE, SIZE, 1), _photo(SIZE, SIZE, 2)
    quiet: dict[str, Any] = {"progress": False}
    works: dict[str, tuple[str, Steps]] = {
        "dream, layer3": ("layer3", lambda n: tl.dream(handle, image, "layer3", octaves=1, steps=n, **quiet)),
        "invert, layer3, L-BFGS": ("layer3", lambda n: tl.invert(handle, image, "layer3", steps=n, **quiet)),
        "fool, PGD": ("fc", lambda n: tl.fool(handle, image, steps=n, **quiet)),
        "texture, relu to layer3, L-BFGS": ("layer3", lambda n: tl.texture(handle, style, steps=n, **quiet)),
        "stylize, relu to layer3, L-BFGS": ("layer3", lambda n: tl.stylize(handle, image, style, steps=n, **quiet)),
    }
    for name, (layer, work) in works.items():
        bare, ours = _medians(_bare(handle.module, layer), work)
        _say(f"{name} / bare", ours / bare, 1.3)


def _medians(*works: Steps) -> list[float]:
    """Seconds of a step of each, taken in turn."""
    for work in works:
        work(FEW)
    times: list[list[float]] = [[] for _ in works]
    for turn in range(ROUNDS):
        for place in range(len(works)) if turn % 2 == 0 else reversed(range(len(works))):
            begun = time.process_time()
            works[place](FEW)
            between = time.process_time()
            works[place](MANY)
            times[place].append((time.process_time() - between - (between - begun)) / (MANY - FEW))
    return [statistics.median(one) for one in times]


# -- memory -----------------------------------------------------------------------------------------------------------


def _photo(height: int, width: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, height // 16), max(2, width // 16), generator=source)
    return (nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0] * 255).round().byte()


MEMORY: dict[str, Callable[[], Any]] = {
    "dream of resnet50 layer3, in tiles of 512": lambda: tl.dream(
        _resnet50(), _photo(*PHOTO), "layer3", octaves=2, steps=1, progress=False
    ),
    "dream of resnet50 layer3, a picture of 512x512": lambda: tl.dream(
        _resnet50(), _photo(512, 512), "layer3", octaves=1, steps=1, progress=False
    ),
    "stylize, demo model, whole": lambda: tl.stylize(
        "demo", _photo(*PHOTO), _photo(512, 512, 1), steps=2, progress=False
    ),
}


def _memory() -> None:
    for name in MEMORY:
        done = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"    {name:52} {found['grown'] / 2**20:8.0f} MiB  {found['said']}", flush=True)


def _grown(name: str) -> dict[str, Any]:
    """Bytes by which the process's peak grows, and what was said in place of an image."""
    tl.dream("demo", _photo(32, 32), "layer1", octaves=1, steps=1, progress=False)
    before, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
    try:
        MEMORY[name]()
    except tl.errors.BadInput as error:
        said = f"refused: {error}"
    return {"grown": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), "said": said}


# -- fooling, styles --------------------------------------------------------------------------------------------------


def _fooling(name: str, count: int) -> None:
    """The share of scenes seen as something else, or as a given class, after rounding to 8 bits."""
    model, scenes = tl.load(name), tl.demo_scenes(count, seed=77)
    with torch.no_grad():
        own = [guess[0].index for guess in model.predict(scenes.images, k=1)]
    others = [(label + 1) % 12 for label in own]
    for levels in (2, 4, 8):
        found = {}
        for method in ("fgsm", "pgd"):
            for kind, target in (("any other", None), ("a given", others)):
                made = tl.fool(model, scenes.images, target, eps=levels / 255, method=method, progress=False)
                assert ((made.images - made.given) * 255).round().abs().max() <= levels
                found[f"{method}, {kind}"] = made.rate
        print(f"    eps {levels}/255  " + "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)


def _network(minutes: float) -> None:
    model, data = tl.load("demo"), tl.demo_scenes(1000, seed=3)
    style = _photo(64, 96, 5)
    settings: dict[str, Any] = {"width": 16, "blocks": 3, "progress": False}
    tl.train_stylizer(model, style, data, steps=5, **settings)  # the scenes are drawn, the layers are looked at
    begun = time.process_time()
    tl.train_stylizer(model, style, data, steps=20, **settings)
    pace = (time.process_time() - begun) / 20
    net = tl.train_stylizer(model, style, data, steps=max(20, round(60 * minutes / pace)), **settings)
    fresh = tl.demo_scenes(8, seed=99).images
    begun = time.process_time()
    optimised = tl.stylize(model, fresh, style, style_size=96, progress=False)
    slow = time.process_time() - begun
    net.apply(fresh)
    begun = time.process_time()
    made = net.apply(fresh)
    quick = time.process_time() - begun
    layers = [name for name, _ in optimised.diagnostics["gram"][0]]
    far = [_style_loss(model, images, style, layers) for images in (fresh.float() / 255, optimised.images, made)]
    _say("minutes of training", net.seconds / 60)
    _say("style loss of the scenes as they are", far[0])
    _say("of the optimiser, 100 steps", far[1])
    _say("of the network / the optimiser's", far[2] / far[1], 2.0)
    _say("optimiser / network, seconds an image", slow / quick, 100.0, least=True)


def _style_loss(model: tl.Handle, images: Tensor, style: Tensor, layers: list[str]) -> float:
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
    main()
