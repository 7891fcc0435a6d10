"""`tl.receptive_field` on handles, bare modules and names."""

from __future__ import annotations

import pytest
from torch import nn

import torchloupe as tl
from torchloupe_core.errors import BadInput, UnknownName


def test_of_a_name_a_module_and_a_handle() -> None:
    model = tl.load("demo")
    fields = [tl.receptive_field(one, "layer2", 3) for one in ("demo", model.module, model)]
    assert fields[0] == fields[1] == fields[2]
    assert isinstance(fields[0], tl.ReceptiveField)
    assert (fields[0].layer, fields[0].channel, fields[0].image) == ("layer2", 3, (64, 64))


def test_at_another_size() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, (3, 5)))
    with pytest.raises(BadInput, match="input size is not known"):
        tl.receptive_field(module, "1")
    field = tl.receptive_field(module, "1", input_size=(1, 20, 30))
    assert (field.size, field.stride, field.padding, field.grid) == ((7, 11), 2, 1, (8, 11))
    assert field.box(2, 1) == (3, 1, 10, 12)
    for wrong in ((20, 30), (1, 0, 30)):
        with pytest.raises(BadInput, match="input_size is"):
            tl.receptive_field(module, "1", input_size=wrong)  # type: ignore[arg-type]


def test_unknown_layers_and_channels() -> None:
    with pytest.raises(UnknownName, match="did you mean 'layer2'"):
        tl.receptive_field("demo", "layr2")
    with pytest.raises(BadInput, match="there is no channel 1000"):
        tl.receptive_field("demo", "layer2", 1000)
