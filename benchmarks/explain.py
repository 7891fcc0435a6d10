"""What attribution costs beyond the passes it needs: ratios of times taken in turn, on one core.

    python benchmarks/explain.py                  every row, about 10 minutes
    python benchmarks/explain.py cam saliency     the rows whose name begins so

Rollout reads attention matrices that the bare pass, with fused attention, never writes down.

Each row is the median of `ours / bare` over rounds in which both run once, so that a change of the machine's speed hits
both. F is one forward pass, FB a forward and backward pass to the input with frozen parameters. Memory is the
growth of the process's peak over what it held before, in a fresh process for each side. Weights are random: costs do
not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import torchloupe as tl

CLASS = 207
BATCH = 8
Work = Callable[[], object]


@dataclass
class Row:
    """Two pieces of work to time against each other, and the ratio to stay below; what the unit of the ratio is."""

    name: str
    goal: float
    unit: str
    pair: Callable[[], tuple[Work, Work]]
    rounds: int = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of row names")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # one measurement in this fresh process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(_grown(MEMORY[arguments.memory]())))
        return
    chosen = [row for row in ROWS if _asked(row.name, arguments.names)]
    print(f"torch {torch.__version__}, one core; medians of ours / bare\n")
    for row in chosen:
        ratio, low, high = _ratio(row)
        _report(row.name, ratio, row.goal, f"{row.unit}  ({low:.3f} to {high:.3f})")
    for name, ours, bare, goal in MEMORY_ROWS:
        if _asked(name, arguments.names):
            grown, against = _fresh(ours), _fresh(bare)
            _report(name, grown / against, goal, f"{grown / 2**20:.0f} MiB against {against / 2**20:.0f} MiB")
    for name, difference in ERRORS.items():
        if _asked(name, arguments.names):
            print(f"{name:44} {difference()}")


def _asked(name: str, beginnings: list[str]) -> bool:
    return not beginnings or any(name.startswith(one) for one in beginnings)


def _report(name: str, ratio: float, goal: float, rest: str) -> None:
    print(f"{name:44} {ratio:7.3f}  goal {goal:<5} {'ok  ' if ratio <= goal else 'OVER'} {rest}", flush=True)


def _ratio(row: Row) -> tuple[float, float, float]:
    """Median, least and largest of ours / bare."""
    ours, bare = row.pair()
    ours(), bare()
    ratios = []
    for turn in range(row.rounds):
        first, second = (ours, bare) if turn % 2 == 0 else (bare, ours)
        times = {work: _seconds(work) for work in (first, second)}
        ratios.append(times[ours] / times[bare])
    return statistics.median(ratios), min(ratios), max(ratios)


def _seconds(work: Work) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


# -- what is measured -------------------------------------------------------------------------------------------------


def _model(name: str = "resnet50") -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = getattr(torchvision.models, name)(weights=None).eval()
    return module.requires_grad_(False)


def _images(n: int = BATCH) -> Tensor:
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def _explaining(module: nn.Module, images: Tensor, method: str, **options: Any) -> Work:
    handle = tl.wrap(module)
    return lambda: tl.explain(handle, images, target=CLASS, method=method, progress=False, **options)


def _forward(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(images)
        return logits


def _backward(module: nn.Module, images: Tensor) -> Tensor:
    inputs = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(module(inputs)[:, CLASS].sum(), inputs)
    return gradient


def _against_forward(method: str, **options: Any) -> tuple[Work, Work]:
    module, images = _model(), _images()
    return _explaining(module, images, method, **options), lambda: _forward(module, images)


def _against_backward(method: str, **options: Any) -> tuple[Work, Work]:
    module, images = _model(), _images()
    return _explaining(module, images, method, **options), lambda: _backward(module, images)


def _path(steps: int = 32) -> tuple[Work, Work]:
    """Integrated gradients of one image against the bare loop at the same batch size."""
    module, image = _model(), _images(1)

    def bare() -> None:
        for start in range(0, steps, BATCH):
            scale = torch.arange(start, min(start + BATCH, steps)).add(0.5).div(steps)
            _backward(module, image * scale[:, None, None, None])

    return _explaining(module, image, "integrated_gradients", steps=steps, batch_size=BATCH), bare


def _channels() -> tuple[Work, Work]:
    module, image = _model("resnet18"), _images(1)
    return _explaining(module, image, "ablation_cam"), lambda: _forward(module, image)


def _masked(method: str, n: int, **options: Any) -> tuple[Work, Work]:
    """A perturbation method against n bare forward passes in the same batches."""
    module, image = _model(), _images(1)
    batch = _images(BATCH)

    def bare() -> None:
        for start in range(0, n, BATCH):
            _forward(module, batch[: min(BATCH, n - start)])

    return _explaining(module, image, method, batch_size=BATCH, **options), bare


def _all_classes(n: int) -> tuple[Work, Work]:
    """RISE with the outputs kept, and then the map of another class from them."""
    module, image = _model(), _images(1)
    handle = tl.wrap(module)
    _, bare = _masked("rise", n, n_masks=n)

    def ours() -> object:
        options = {"n_masks": n, "classes": True, "batch_size": BATCH, "progress": False}
        return tl.explain(handle, image, target=CLASS, method="rise", **options).of(CLASS + 1)

    return ours, bare


def _precision(method: str) -> tuple[Work, Work]:
    """The fast copy against the exact model."""
    module, images = _model(), _images()
    fast = tl.wrap(module).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    return (
        lambda: tl.explain(fast, images, target=CLASS, method=method),
        _explaining(module, images, method),
    )


def _error(method: str) -> str:
    module, images = _model(), _images()
    fast, exact = (work() for work in _precision(method))
    del module, images
    apart = (fast.values - exact.values).flatten(1).norm(dim=1) / exact.values.flatten(1).norm(dim=1)
    return f"{apart.mean():.2g} of the exact map's norm apart"


def _segments(n: int) -> Tensor:
    """n vertical strips."""
    return (torch.arange(224) * n // 224).expand(224, 224)


FAMILY = ("cam", "grad_cam", "grad_cam++", "xgrad_cam", "hires_cam", "layer_cam", "eigen_cam")

ROWS = [
    *(Row(name, 1.1, "F", lambda name=name: _against_forward(name)) for name in FAMILY),
    Row("attention_rollout (vit_b_16)", 1.5, "F", lambda: _tokens("attention_rollout", _forward)),
    Row("attention_relevance (vit_b_16)", 1.1, "FB", lambda: _tokens("attention_relevance", _backward)),
    Row("ablation_cam, 512 channels (resnet18)", 5, "F", _channels),
    Row("saliency", 1.1, "FB", lambda: _against_backward("saliency")),
    Row("input_x_gradient", 1.1, "FB", lambda: _against_backward("input_x_gradient")),
    Row("guided_backprop", 1.1, "FB", lambda: _against_backward("guided_backprop")),
    Row("guided_grad_cam", 1.2, "FB", lambda: _against_backward("guided_grad_cam")),
    Row("integrated_gradients, 32 steps", 1.05, "of the loop", _path),
    Row("rise, one class", 1.01, "of its forwards", lambda: _masked("rise", 128, n_masks=128)),
    Row("rise, all classes", 1.05, "of its forwards", lambda: _all_classes(128)),
    Row("lime", 1.03, "of its forwards", lambda: _masked("lime", 128, n_samples=128, segments=_segments(50))),
    Row(
        "kernel_shap",
        1.03,
        "of its forwards",
        lambda: _masked("kernel_shap", 128, n_samples=128, segments=_segments(50)),
    ),
    Row("occlusion", 1.03, "of its forwards", lambda: _masked("occlusion", 257, window=28, stride=14)),
    *(
        Row(f"bfloat16 and channels_last, {name}", 0.5, "of float32", lambda name=name: _precision(name))
        for name in ("grad_cam", "saliency")
    ),
]

ERRORS = {f"bfloat16 and channels_last, {name}": lambda name=name: _error(name) for name in ("grad_cam", "saliency")}


def _tokens(method: str, bare: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Work, Work]:
    module, images = _model("vit_b_16"), _images(4)
    return _explaining(module, images, method), lambda: bare(module, images)


# -- memory -----------------------------------------------------------------------------------------------------------


def _grown(work: Work) -> int:
    """By how many bytes a piece of work raises the process's peak. Linux only: the peak is reset first."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1])


def _fresh(name: str) -> int:
    """The same in a new process."""
    found = subprocess.run([sys.executable, __file__, "--memory", name], check=True, capture_output=True, text=True)
    return int(json.loads(found.stdout))


def _captum_grad_cam() -> Work:
    from captum.attr import LayerGradCam

    module, images = _model().requires_grad_(True), _images(16)  # as a model is loaded
    _forward(module, images[:1])
    method = LayerGradCam(module, module.layer4)
    return lambda: method.attribute(images, target=CLASS)


def _own(method: str) -> Work:
    module, images = _model(), _images(16)
    _forward(module, images[:1])
    tl.wrap(module).trace((3, 224, 224))
    return _explaining(module, images, method, batch_size=16)


class _Tiny(nn.Module):
    """So small that the masks, not the activations, would fill the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _rise(n: int) -> Work:
    handle = tl.wrap(_Tiny(), input_size=(3, 224, 224))
    tl.explain(handle, _images(1), target=1, method="rise", n_masks=64, batch_size=BATCH)
    return lambda: tl.explain(handle, _images(1), target=1, method="rise", n_masks=n, batch_size=BATCH)


MEMORY: dict[str, Callable[[], Work]] = {
    **{name: lambda name=name: _own(name) for name in FAMILY},
    "captum": _captum_grad_cam,
    "rise 500": lambda: _rise(500),
    "rise 8000": lambda: _rise(8000),
}
MEMORY_ROWS = [
    *((f"memory, {name} against captum's Grad-CAM", name, "captum", 0.5) for name in FAMILY),
    ("memory, rise of 8000 masks against 500", "rise 8000", "rise 500", 1.1),
]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
