"""What judging maps costs: insertion and deletion beside their bare forwards, and a whole study.

python benchmarks/compare.py            every row, about a quarter of an hour
python benchmarks/compare.py curves     insertion and deletion of one map of resnet18, ratios of CPU time, one core
python benchmarks/compare.py study      12 methods x 8 metrics x 100 scenes on the embedded model, two threads
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torchvision

import torchloupe as tl
from torchloupe_core.metrics.case import Case
from torchloupe_core.metrics.faithfulness import deletion, insertion
from torchloupe_core.query import Query

ROUNDS, SIZE, STEP = 3, 224, 448
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="curves, study")
    arguments = parser.parse_args()
    rows: dict[str, Callable[[], None]] = {"curves": _curves, "study": _study}
    for name, row in rows.items():
        if not arguments.names or name in arguments.names:
            print(name, flush=True)
            row()


def _curves() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    handle = tl.wrap(torchvision.models.resnet18(weights=None).eval(), input_size=(3, SIZE, SIZE))
    inputs, maps = torch.randn(1, 3, SIZE, SIZE), torch.rand(1, SIZE, SIZE)
    query = Query(handle, inputs, handle.bind("prob:3", inputs), batch_size=8)
    count = -(-SIZE * SIZE // STEP) + 1
    batches = [inputs.expand(min(8, count - start), -1, -1, -1).clone() for start in range(0, count, 8)]

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                handle.module(batch)

    def judged(metric: Callable[..., object], **options: object) -> Callable[[], None]:
        def work() -> None:
            with handle.borrow():
                metric(Case(query, maps), step=STEP, **options)

        return work

    works = [bare, judged(deletion), judged(insertion, baseline="blur")]
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for place, work in enumerate(works):
            begun = time.process_time()
            work()
            times[place].append(time.process_time() - begun)
    plain, *others = (statistics.median(one) for one in times)
    for name, seconds in zip(("deletion", "insertion"), others, strict=True):
        kept = "ok" if seconds / plain <= 1.05 else "MISSED"
        print(f"    {name} / its {count} forwards  {seconds / plain:.3f}  goal <= 1.05  {kept}", flush=True)


def _study() -> None:
    torch.set_num_threads(2)
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
    print(f"    {minutes:.1f} minutes  goal <= 10  {'ok' if minutes <= 10 else 'MISSED'}", flush=True)


if __name__ == "__main__":
    main()
