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

import time
from collections.abc import Callable
from typing import Any

import torch
from lds import small_network
from measuring import Row, Rows, asked, grown, in_turn, over, run, seconds
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_adapters.sklearn import digits
from torchloupe_core.methods.influence.pieces import chosen_parameters
from torchloupe_core.methods.influence.sample_gradients import SampleGradients
from torchloupe_core.methods.influence.study import needed

IMAGES = 32


def head() -> Rows:
    model, train, test = tl.load("demo"), tl.demo_scenes(10_000, 1), tl.demo_scenes(200, 2)
    _ = train.images, test.images  # rendering is not what is measured
    begun = time.process_time()
    found = tl.influence(model, train, test, method="exact", check=0)
    taken = time.process_time() - begun
    yield Row("exact, 10,000 x 200", (found.forwards - 200) / 10_000, "passes", 2, note=f"{taken:.1f} s")


def gradients() -> Rows:
    demo, small = tl.load("demo"), tl.wrap(small_network(0), input_size=(1, 8, 8))
    yield from image_by_image("demo, 64 x 64", demo, demo.inputs(tl.demo_scenes(IMAGES, 1).images), 12)
    yield from image_by_image("14,022 parameters, 8 x 8", small, torch.rand(8 * IMAGES, 1, 8, 8), 10)


def image_by_image(name: str, model: tl.Handle, inputs: Tensor, outputs: int) -> Rows:
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

    ours, loop, least = in_turn(together, looped, summed)
    yield over(loop, ours, f"{len(inputs)} images, {name}: a loop / ours", goal=10, least=True)
    yield over(loop, least, f"{len(inputs)} images, {name}: a loop / their sum alone")


def partial_errors(labels: Tensor) -> Any:
    return lambda logits: (logits.softmax(1) - F.one_hot(labels, logits.shape[1]))[:, None]


def ekfac() -> Rows:
    model, train, test = tl.load("demo"), tl.demo_scenes(1_000, 1), tl.demo_scenes(20, 2)
    _ = train.images, test.images
    options: dict[str, Any] = {"layers": "all", "damping": 1e-3, "check": 0}
    ours = seconds(lambda: tl.influence(model, train, test, method="ekfac", **options))
    yield Row("the whole network, 1,000 x 20", ours, "s")
    theirs = seconds(lambda: tl.influence(model, train, test, method="kronfluence.ekfac", **options))
    yield Row("the same by kronfluence", theirs, "s")
    yield Row("ours / kronfluence's", ours / theirs)


def cg() -> Rows:
    images, labels = (torch.from_numpy(one) for one in digits())
    module = small_network(0)
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
    model = tl.wrap(module, input_size=(1, 8, 8))
    found, time_taken, grew = taken(
        lambda: tl.influence(model, train, test, layers="all", damping=0.01, tolerance=1e-3, check=0)
    )
    facts = f"{found.diagnostics['iterations']} iterations, residual {found.diagnostics['residual']:.1e}"
    size = f"{found.parameters:,} parameters, 1,500 x 200"
    yield Row(f"{size}, time", time_taken, "s", note=facts)
    yield Row(f"{size}, memory", grew, "GiB")


def scale() -> Rows:
    model, train, test = tl.load("demo"), tl.demo_scenes(200, 1), tl.demo_scenes(1_000, 2)
    _ = train.images, test.images
    found, time_taken, grew = taken(
        lambda: tl.influence(model, train, test, layers="all", method="ekfac", damping=1e-3, check=0)
    )
    size = f"ekfac, {found.parameters:,} parameters"
    foretold, large = (needed(found.parameters, n, 1_000, 4, 2**31) / 2**30 for n in (200, 50_000))
    yield Row(f"{size}, 200 x 1,000, time", time_taken, "s")
    yield Row(f"{size}, 200 x 1,000, memory", grew, "GiB", note=f"foretold {foretold:.1f} at most")
    yield Row(f"{size}, 50,000 x 1,000, memory foretold", large, "GiB", 24)


def taken(work: Callable[[], tl.Influence]) -> tuple[tl.Influence, float, float]:
    """What a work gives, its seconds of processor time, and by how many GiB the process's peak grew."""
    found: list[tl.Influence] = []
    begun = time.process_time()
    grew = grown(lambda: found.append(work()))
    return found[0], time.process_time() - begun, grew / 2**30


if __name__ == "__main__":
    run({part.__name__: part for part in (head, gradients, ekfac, cg, scale)}, asked(__doc__))
