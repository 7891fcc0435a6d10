"""Lucent (Lucid for PyTorch): its parametrisations and its loop, with our targets, transforms, normalisation and seed.

Lucent hooks every module of the model and leaves the hooks there, fills parameters' gradients, draws from global
random states, knows ImageNet's normalisation only and goes on after errors in the forward pass. So it is not given
the model at all but a module without parts, whose forward pass is a watched one of ours, and whose gradient is taken to
the image only. Of kornia, which Lucent needs for its own transforms, nothing is used, so that any version will do.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from torchloupe_core.adam import Adam
from torchloupe_core.canvas import Canvas
from torchloupe_core.colour import mixed
from torchloupe_core.errors import MissingDependency, NotApplicable
from torchloupe_core.methods.optimize import Run
from torchloupe_core.parametrizations import CPPN, Fourier, LowRes, Pixel, Pyramid, Shared
from torchloupe_core.registry import method
from torchloupe_core.task import Made, Task

__all__ = ["lucent"]

Decode = Callable[[], Tensor]


@method(
    "visualize",
    "lucent",
    needs=("gradient",),
    cost="steps (512) x (forward + backward), up to the last layer read",
    paper="Olah et al. 2017, Feature Visualization, by Lucent",
    random=True,
    backend="lucent",
)
def lucent(task: Task) -> Made:
    """Lucent's `render_vis` and image parametrisations.

    Raises `NotApplicable` for what Lucent does not have: regularizers other than penalties, other parametrisations.
    """
    render = _imported()
    if changing := [one for one in task.regularizers if one.on_gradient or one.on_image]:
        raise NotApplicable(f"Lucent's loop has no place for {changing[0]}; leave method= out, or take method='native'")
    with task.watched() as watch:
        canvas = _LucentCanvas(task)
        run = Run(task, watch, canvas)
        seen = _Seen()

        def objective(layer: Callable[[str], Tensor]) -> Tensor:
            return run.loss(seen.views, layer("input") if task.regularizers else seen.views)

        with run.under_way(), torch.enable_grad(), _exchanged(render, "print", _quiet):
            render.render_vis(
                seen,
                objective,
                param_f=lambda: (canvas.parameters, canvas.images),
                optimizer=lambda parameters: _Optimizer(run, parameters, task.lr),
                transforms=[run.views],
                thresholds=(task.steps,),
                preprocess=False,
                fixed_image_size=task.shown,
                progress=False,
                show_image=False,
            )
            if run.step < task.steps:  # Lucent ends its loop on Ctrl-C and says nothing to its caller
                raise KeyboardInterrupt
        return run.made()


class _Seen(nn.Module):
    """What Lucent takes for the model: nothing in it to hook, and no error that Lucent could swallow.

    It keeps what it is shown; the model itself runs where Lucent asks for the objective.
    """

    views: Tensor

    def forward(self, views: Tensor) -> None:
        self.views = views


class _Optimizer:
    """Adam as Lucent calls an optimiser, telling the run of each step."""

    def __init__(self, run: Run, parameters: Sequence[Tensor], lr: float) -> None:
        self.run, self.parameters, self.adam = run, parameters, Adam(parameters, lr)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()
        self.adam.step([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        self.run.stepped()


class _LucentCanvas(Canvas):
    """Lucent's parameters, set to the numbers that the task begins with, and Lucent's images of them."""

    def __init__(self, task: Task) -> None:
        ours, device = task.canvas(), task.handle.device
        shape = (len(task), *task.shape)
        self.parameters, decode = _parametrized(task, shape)
        if any(one.device.type != device.type for one in self.parameters):
            raise NotApplicable(f"Lucent makes this parametrisation on {self.parameters[0].device}, not on {device}")
        for theirs, start in zip(self.parameters, ours.tensors, strict=True):
            theirs.data.copy_(start.detach().view_as(theirs))
        super().__init__(self.parameters, decode, None, ours.colours)
        if isinstance(task.parametrization, CPPN):
            self._valid = decode  # has its own sigmoid
        else:
            from lucent.optvis.param.color import to_valid_rgb

            # Lucent's own colours would be made on another device than the image's, where there are several.
            self._valid = to_valid_rgb(lambda: mixed(decode(), ours.colours), decorrelate=False)

    def images(self) -> Tensor:
        return self._valid()


def _parametrized(task: Task, shape: tuple[int, ...]) -> tuple[list[Tensor], Decode]:
    """Lucent's parameters and the function that decodes them. Raises `NotApplicable` for what Lucent does not have."""
    from lucent.optvis.param import cppn, lowres, spatial

    kind, size = task.parametrization, (shape[2], shape[3])
    coarse: list[tuple[int, ...]] = []
    with _exchanged(spatial, "device", task.handle.device):
        if type(kind) is CPPN and len(task) == 1 and shape[2] == shape[3] and kind.colours is None:
            parameters, decode = cppn(shape[2], shape[1], kind.hidden, kind.layers)
            return list(parameters), decode
        if type(kind) is Pixel:
            parameters, decode = spatial.pixel_image(shape, kind.sd)
        elif type(kind) is Fourier or type(kind) is Shared:
            parameters, decode = spatial.fft_image(shape, kind.sd, kind.decay)
            coarse = [(1, shape[1], *one) for one in kind.sizes(size)] if type(kind) is Shared else []
        elif type(kind) is LowRes or type(kind) is Pyramid:
            first, *coarse = [(*shape[:2], *one) for one in kind.sizes(size)]
            parameters, decode = lowres.lowres_tensor(shape, first, sd=kind.sd)
        else:
            raise NotApplicable(f"Lucent has no parametrisation {kind}; leave method= out, or take method='native'")
        parts = [lowres.lowres_tensor(shape, one, sd=0.0) for one in coarse]
    parameters = [*parameters, *(one for more, _ in parts for one in more)]
    return parameters, lambda: sum((more() for _, more in parts), start=decode())


def _imported() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kornia's, about functions of torch it uses
            from lucent.optvis import render
    except ImportError as error:
        raise MissingDependency.of("torch-lucent", "lucent") from error
    found: ModuleType = render
    return found


@contextlib.contextmanager
def _exchanged(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Inside, a name of a module stands for something else."""
    missing = object()
    before = vars(module).get(name, missing)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _quiet(*_: object) -> None:
    """In place of `print`."""
