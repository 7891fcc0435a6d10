"""The embedded model and its scenes: everything can be run, seen and verified offline.

`demo` (robust), `demo/mislabelled` and `demo/backdoored` are three trainings of one small residual network on
procedural scenes whose truth is known.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchloupe_adapters import checkpoint as checkpoints
from torchloupe_adapters.demo.model import MEAN, STD, SceneNet
from torchloupe_adapters.demo.scenes import CLASSES, SIZE
from torchloupe_core.errors import UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.registry import method
from torchloupe_core.spec import Spec, resize_and_normalise

__all__ = ["NAMES", "load", "recognise"]

NAMES = ("robust", "mislabelled", "backdoored")


@method("load", "demo", cost="none")
def load(name: str = "", *, pretrained: bool | None = None, checkpoint: str | Path | None = None) -> Handle:
    """One of the embedded models; `robust` unless named."""
    name = name or NAMES[0]
    if name not in NAMES:
        raise UnknownName.of("demo model", name, NAMES)
    module = SceneNet().eval()
    if checkpoint is not None or pretrained is not False:
        checkpoints.load_into(module, checkpoint or Path(__file__).parent / "weights" / f"{name}.safetensors")
    return Handle(module, _spec(name))


@method("recognise", "demo", cost="none")
def recognise(module: nn.Module) -> Spec | None:
    """The facts about a scene network, or None if it is not one."""
    return _spec(type(module).__name__) if isinstance(module, SceneNet) else None


def _spec(name: str) -> Spec:
    size = (3, SIZE, SIZE)
    return Spec(
        name=name,
        source="demo",
        input_size=size,
        preprocess=resize_and_normalise(size, MEAN, STD),
        preprocess_text=f"resized to {SIZE}x{SIZE}",
        mean=MEAN,
        std=STD,
        classes=tuple(CLASSES),
        classifier="fc",
    )
