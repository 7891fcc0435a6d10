"""What part of the image a position of a layer reads."""

from __future__ import annotations

from torchloupe._models import ModelLike, opened
from torchloupe_core import receptive
from torchloupe_core.errors import BadInput
from torchloupe_core.receptive import ReceptiveField

__all__ = ["receptive_field"]


def receptive_field(
    model: ModelLike,
    layer: object,
    channel: int | None = None,
    *,
    without_gates: bool = False,
    input_size: tuple[int, int, int] | None = None,
) -> ReceptiveField:
    """What the positions of a layer read of the image, exactly, for one channel or around all of them.

    layer: by name; `relu#2` is a call of a module that runs several times, `fc.in` its input. without_gates: leave out
    what reads the whole map at once, as squeeze-excite, attention over all tokens and group normalisation do; the exact
    field behind them is the whole image. input_size: (C, H, W), if not the model's own. Where a network holds an
    operation that is not understood, the field is measured by gradients, and its `measured` says why.
    """
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise BadInput(f"input_size is (C, H, W); got {tuple(input_size)}")
    return receptive.fields(opened(model), layer, shape=input_size, without_gates=without_gates).of(channel)
