"""What judging maps costs: insertion and deletion beside their bare forwards and other libraries, and a whole study.

    python benchmarks/compare.py            every row, about a quarter of an hour
    python benchmarks/compare.py curves     insertion and deletion of one map of resnet18, ratios of CPU time, one core
    python benchmarks/compare.py against    resnet18 at 224 pixels, with as many forwards on both sides
    python benchmarks/compare.py study      12 methods x 8 metrics x 100 scenes on the embedded model, two threads

Ratios are measured as in `explain.py`; the minutes of the study are by the clock.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from measuring import Row, Rows, Work, asked, cores, in_turn, over, ratio, run
from networks import BATCH, CLASS, SIZE, forward, network, noise

import torchloupe as tl
from torchloupe_core.metrics.case import Case
from torchloupe_core.metrics.faithfulness import deletion, insertion, road
from torchloupe_core.query import Query

STEP, ROUNDS = 448, 5
METHODS = [
    "cam",
    "grad_cam",
    "layer_cam",
    "eigen_cam",
    "captum.saliency",
    "captum.input_x_gradient",
    "captum.guided_backprop",
    "captum.integrated_gradients",
    "captum.smooth_grad",
    "captum.deep_lift",
    "captum.occlusion",
    "rise",
]
METRICS = ["insertion", "deletion", "road", "average_drop", "sparsity", "pointing", "iou", "randomisation"]
OPTIONS = {
    "captum.integrated_gradients": {"steps": 16},
    "captum.smooth_grad": {"n_samples": 8},
    "captum.occlusion": {"window": 12, "stride": 8},
    "rise": {"n_masks": 200},
}


def judging(handle: tl.Handle, size: int, n: int = 1) -> Callable[..., Work]:
    """How a metric judges n maps of noise."""
    inputs, maps = noise(n, size), torch.rand(n, size, size)
    query = Query(handle, inputs, handle.bind(f"prob:{CLASS}", inputs), batch_size=BATCH)

    def judged(metric: Callable[..., object], **options: object) -> Work:
        def work() -> None:
            with handle.borrow():
                metric(Case(query, maps), **options)

        return work

    return judged


def curves() -> Rows:
    module, inputs = network("resnet18"), noise(1)
    judged = judging(tl.wrap(module, input_size=(3, SIZE, SIZE)), SIZE)
    count = -(-SIZE * SIZE // STEP) + 1
    batches = [inputs.expand(min(BATCH, count - start), -1, -1, -1).clone() for start in range(0, count, BATCH)]
    bare, *ours = in_turn(
        lambda: [forward(module, batch) for batch in batches],
        judged(deletion, step=STEP),
        judged(insertion, step=STEP, baseline="blur"),
        rounds=ROUNDS,
    )
    for name, taken in zip(("deletion", "insertion"), ours, strict=True):
        yield over(taken, bare, f"{name} / its {count} forwards", goal=1.05)


def quantus() -> Rows:
    """Quantus orders all numbers of an image; as many of them a step as come to one forward fewer than ours."""
    import quantus

    at_once = 1792
    module, images = network("resnet18"), noise(BATCH)
    judged = judging(tl.wrap(module), SIZE, BATCH)
    theirs = quantus.PixelFlipping(features_in_step=at_once, disable_warnings=True)
    batches = images.numpy(), np.full(BATCH, CLASS), torch.rand(BATCH, 1, SIZE, SIZE).numpy()

    def flipping() -> None:
        theirs(module, *batches, device="cpu")

    steps = 3 * SIZE * SIZE // at_once
    yield ratio(judged(deletion, step=-(-SIZE * SIZE // steps)), flipping, rounds=2)


def imputing() -> Rows:
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    module, images = network("resnet18"), noise(1)
    judged, maps = judging(tl.wrap(module), SIZE), torch.rand(1, SIZE, SIZE).numpy()
    percentiles = (20, 50, 80)
    theirs = ROADCombined(percentiles=percentiles)
    targets = [ClassifierOutputSoftmaxTarget(CLASS)]
    ours = judged(road, shares=tuple(one / 100 for one in percentiles))
    yield ratio(ours, lambda: theirs(images, maps, targets, module), rounds=1)


def study() -> Rows:
    cores(2)
    scenes = tl.demo_scenes(100, seed=5)
    with tempfile.TemporaryDirectory() as store:
        begun = time.perf_counter()
        found = tl.compare(
            "demo",
            scenes.images,
            methods=METHODS,
            metrics=METRICS,
            masks=scenes.masks[:, 0],
            options=OPTIONS,
            store=store,
            progress=False,
        )
        minutes = (time.perf_counter() - begun) / 60
    print(found.table())
    yield Row("12 methods x 8 metrics x 100 scenes", minutes, "minutes", 10)


PARTS: dict[str, Callable[[], Rows]] = {
    "curves": curves,
    "against Quantus: deletion / its PixelFlipping, 8 images": quantus,
    "against pytorch-grad-cam: road of 3 shares / its ROAD": imputing,
    "study": study,
}

if __name__ == "__main__":
    run(PARTS, asked(__doc__))
