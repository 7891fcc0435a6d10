"""What a layer still knows of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchloupe._models import ModelLike, opened
from torchloupe._visualize import rendered
from torchloupe_core.adam import Adam
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.images import Pixels, require_pictures
from torchloupe_core.lbfgs import LBFGS
from torchloupe_core.making import pictures
from torchloupe_core.methods.inversion import distances
from torchloupe_core.parametrizations import Fourier, ParametrizationLike
from torchloupe_core.regularizers import TotalVariation
from torchloupe_core.targets import layer as of_layer
from torchloupe_core.terms import Nearness
from torchloupe_core.visualization import Visualization

__all__ = ["invert"]


def invert(
    model: ModelLike,
    image: Any,
    layer: object,
    *,
    tv: float = 0.3,
    power: float = 2.0,
    steps: int = 200,
    optimizer: Literal["lbfgs", "adam"] = "lbfgs",
    lr: float | None = None,
    parametrization: ParametrizationLike | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    interruptible: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Visualization:
    """An image made from noise that a layer cannot tell from the given one (Mahendran and Vedaldi 2015).

    Least is made the relative squared distance of the layer's activations, `mean((a - a0)^2) / mean(a0^2)`, plus `tv`
    times the total variation, the mean over pixels of `(dx^2 + dy^2) ** (power / 2)`: a larger tv makes smoother images
    that are further off in the layer. layer: one, or several for the classical row, the images of each one after the
    other. optimizer: "lbfgs", whose line search never lets the sum rise from step to step, or "adam". parametrization:
    frequencies with decay 0.5 and independent colours unless given. options: of `visualize`, as snapshots, seed.

    `scores` are the distances at the end, 0 for none and about 1 for a grey image; of the diagnostics, `rmse` is the
    distance in pixels and `fidelity` the distance that each of the layers asked for sees, `[layer, distance]`.
    Raises `NotApplicable` for a layer without an activation for the image, which leaves nothing to compare.
    """
    handle = opened(model, device=device, dtype=dtype)
    inputs = handle.inputs(image)
    require_pictures(inputs, handle.spec)
    given = handle.spec.pixels(inputs)
    layers = [str(one) for one in layer] if isinstance(layer, Sequence) and not isinstance(layer, str) else [str(layer)]
    if not layers:
        raise BadInput("no layer was given")
    if tv < 0:
        raise BadInput(f"tv is at least 0; got {tv}")
    if optimizer not in ("lbfgs", "adam"):
        raise BadInput(f'optimizer is "lbfgs" or "adam"; got {optimizer!r}')
    _require_something(handle, given, layers)
    how: dict[str, Any] = {
        "optimizer": LBFGS if optimizer == "lbfgs" else Adam,
        "lr": lr if lr is not None or optimizer == "adam" else 1.0,
        "parametrization": Fourier(decay=0.5, colours=None) if parametrization is None else parametrization,
        "regularizers": [TotalVariation(tv, power)] if tv else None,
    }
    fixed: dict[str, Any] = {"method": "native", "transforms": "none", "read": "post", "aim": 0.0}
    if clash := sorted(fixed.keys() & options.keys()):
        raise BadInput(f"invert decides on {', '.join(clash)} itself")
    rows: list[Visualization] = []
    for name in layers:
        try:
            rows.append(
                rendered(
                    handle,
                    [of_layer(name)] * len(given),
                    compare=Pixels(given),
                    terms=(Nearness((name,)),),
                    steps=steps,
                    interruptible=interruptible,
                    progress=progress,
                    **how,
                    **fixed,
                    **options,
                )
            )
        except KeyboardInterrupt:  # in the first step of a later layer
            if not (rows and interruptible):
                raise
            rows[-1] = replace(rows[-1], stopped="interrupted")
        if "interrupted" in rows[-1].stopped:
            break
    return _row(handle, rows, given, layers[: len(rows)], optimizer)


def _require_something(handle: Handle, given: Tensor, layers: Sequence[str]) -> None:
    """Every layer has a map, and an activation for every image."""
    shape = (given.shape[1], given.shape[2], given.shape[3])
    for name in layers:
        found = handle.layer(name, shape)
        if found.layout is None:
            raise NotApplicable(f"layer {name!r} ({found.kind}) gives no map of channels, so it cannot be inverted")
    with handle.watch(*layers, shape=shape) as watch:
        watch(handle.spec.normalised(given).to(handle.dtype))
        for name in layers:
            silent = (watch.map(name).flatten(1).abs().amax(1) == 0).nonzero().flatten().tolist()
            if silent:
                raise NotApplicable(f"layer {name!r} is zero everywhere for image {silent[0]}; name an earlier one")


def _row(
    handle: Handle, rows: Sequence[Visualization], given: Tensor, layers: Sequence[str], optimizer: str
) -> Visualization:
    """The images of all layers as one result, with what each has lost."""
    images = torch.cat([one.images for one in rows])
    shown = torch.cat([given[: len(one)] for one in rows])
    seen = distances(handle, images[:, : given.shape[1]].to(given), shown, layers)  # [n, layers]
    own = [place for place, one in enumerate(rows) for _ in range(len(one))]
    longest = max(one.losses.shape[1] for one in rows)
    pad = torch.nn.functional.pad
    kept = [one.snapshots for one in rows if one.snapshots is not None]
    whole = len(kept) == len(rows) and len({one.snapshot_steps for one in rows}) == 1
    facts = {
        "label": "distance",
        "rmse": (images[:, : given.shape[1]] - shown.float().cpu()).square().mean((1, 2, 3)).sqrt().tolist(),
        "fidelity": [[[name, value] for name, value in zip(layers, row, strict=True)] for row in seen.tolist()],
    }
    return replace(
        rows[0],
        images=images,
        target=tuple(target for one in rows for target in one.targets),
        scores=seen[torch.arange(len(own)), torch.tensor(own)],
        losses=torch.cat([pad(one.losses, (0, longest - one.losses.shape[1]), value=float("nan")) for one in rows]),
        given=pictures(shown.float().cpu()),
        snapshots=torch.cat(kept, 1) if whole and kept else None,
        snapshot_steps=rows[0].snapshot_steps if whole and kept else (),
        stopped="; ".join(dict.fromkeys(one.stopped for one in rows if one.stopped)),
        seconds=sum(one.seconds for one in rows),
        forwards=sum(one.forwards for one in rows),
        options={**rows[0].options, "optimizer": optimizer},
        diagnostics=facts,
    )
