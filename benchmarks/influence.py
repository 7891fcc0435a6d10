"""What influence costs, on one core: passes over the training set, seconds, memory, and against a plain loop.

    python benchmarks/influence.py                 every row, about 15 minutes
    python benchmarks/influence.py head gradients  the rows whose name begins so

`head`: 10,000 scenes x 200 tests through the head of the embedded model. `gradients`: sample-wise gradients of its
whole network against a backward pass for each image. `ekfac`: the whole network, 1,000 x 20, and kronfluence's on the
same images. `cg`: 1,500 x 200 through a network of 14,000 parameters on scikit-learn's digits, with the memory it grew
by. `scale`: EK-FAC for 1,000 tests at once through 494,276 parameters, with the memory it grew by and what was
foretold, which but for the scores does not depend on the training images. How well each method does is in lds.py.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from typing import Any

import torch
from lds import network
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_adapters.sklearn import digits
from torchloupe_core.errors import MissingDependency
from torchloupe_core.methods.influence.pieces import chosen_parameters
from torchloupe_core.methods.influence.sample_gradients import SampleGradients
from torchloupe_core.methods.influence.study import needed

IMAGES, ROUNDS = 32, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of row names")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one core\n")
    for row in (head, gradients, ekfac, cg, scale):
        if not names or any(row.__name__.startswith(name) for name in names):
            row()


def head() -> None:
    model, train, test = tl.load("demo"), tl.demo_scenes(10_000, 1), tl.demo_scenes(200, 2)
    _ = train.images, test.images  # rendering is not what is measured
    begun = time.process_time()
    found = tl.influence(model, train, test, method="exact", check=0)
    passes = (found.forwards - 200) / 10_000
    print(f"head, exact, 10,000 x 200: {passes:.3f} passes (goal 2), {time.process_time() - begun:.1f} s")


def gradients() -> None:
    demo = tl.load("demo")
    small = tl.wrap(network(0), input_size=(1, 8, 8))
    _gradients("demo, 64 x 64", demo, demo.inputs(tl.demo_scenes(IMAGES, 1).images), 12)
    _gradients("14,022 parameters, 8 x 8", small, torch.rand(8 * IMAGES, 1, 8, 8), 10)


def _gradients(name: str, model: tl.Handle, inputs: Tensor, outputs: int) -> None:
    """Sample-wise gradients, a loop for them, and their sum from one pass, which is the least they can take."""
    labels, names = torch.arange(len(inputs)) % outputs, chosen_parameters(model, "all")
    parameters = [model.module.get_parameter(one) for one in names]
    model.module.eval()

    def together() -> None:
        with model.borrow():
            SampleGradients(model, names).rows(inputs, partial_errors(labels))

    def looped() -> None:
        rows = []
        for image, label in zip(inputs, labels, strict=True):
            found = torch.autograd.grad(F.cross_entropy(model.module(image[None]), label[None]), parameters)
            rows.append(torch.cat([one.flatten() for one in found]))
        torch.stack(rows)

    def summed() -> None:
        torch.autograd.grad(F.cross_entropy(model.module(inputs), labels, reduction="sum"), parameters)

    ours, loop, least = (_fastest(one) for one in (together, looped, summed))
    text = f"{loop / ours:.1f} times as fast as a loop (goal 10; at most {loop / least:.1f}, their sum alone)"
    print(f"gradients of {len(inputs)} images, {name}: {text}")


def partial_errors(labels: Tensor) -> Any:
    return lambda logits: (logits.softmax(1) - F.one_hot(labels, logits.shape[1]))[:, None]


def ekfac() -> None:
    model, train, test = tl.load("demo"), tl.demo_scenes(1_000, 1), tl.demo_scenes(20, 2)
    _ = train.images, test.images
    seconds = {}
    for method in ("ekfac", "kronfluence.ekfac"):
        begun = time.process_time()
        try:
            tl.influence(model, train, test, layers="all", method=method, damping=1e-3, check=0)
        except MissingDependency as error:
            print(error)
        else:
            seconds[method] = time.process_time() - begun
    print("ekfac, whole network, 1,000 x 20: " + ", ".join(f"{name} {one:.1f} s" for name, one in seconds.items()))


def cg() -> None:
    images, labels = (torch.from_numpy(one) for one in digits())
    module = network(0)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(200):
        chosen = torch.randint(0, 1_500, (64,))
        loss = F.cross_entropy(module(images[chosen, None]), labels[chosen])
        for parameter, gradient in zip(
            module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
    train, test = (TensorDataset(images[part, None], labels[part]) for part in (slice(1_500), slice(1_500, 1_700)))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = tl.influence(
        tl.wrap(module, input_size=(1, 8, 8)), train, test, layers="all", damping=0.01, tolerance=1e-3, check=0
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    facts = f"{found.diagnostics['iterations']} iterations, residual {found.diagnostics['residual']:.1e}"
    seconds = time.process_time() - begun
    print(f"cg, {found.parameters:,} parameters, 1,500 x 200: {seconds:.0f} s, {grown:.1f} GiB, {facts}")


def scale() -> None:
    model, train, test = tl.load("demo"), tl.demo_scenes(200, 1), tl.demo_scenes(1_000, 2)
    _ = train.images, test.images
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = tl.influence(model, train, test, layers="all", method="ekfac", damping=1e-3, check=0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    foretold, large = (needed(found.parameters, n, 1_000, 4, 2**31) / 2**30 for n in (200, 50_000))
    seconds = time.process_time() - begun
    text = f"{grown:.1f} GiB, foretold {foretold:.1f} at most; of 50,000 images {large:.1f} (goal 24)"
    print(f"scale, ekfac, {found.parameters:,} parameters, 200 x 1,000: {seconds:.0f} s, {text}")


def _fastest(work: Any) -> float:
    """Seconds of the fastest of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
