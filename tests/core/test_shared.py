"""Work that is done once for several methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchloupe_core import shared
from torchloupe_core.handle import Handle
from torchloupe_core.shared import Cost, Shared

INPUTS = torch.arange(12.0).view(1, 3, 2, 2)


class Work:
    """Sends an image through a model, and counts how often it does."""

    def __init__(self) -> None:
        self.handle, self.times = Handle(nn.Identity()), 0

    def __call__(self) -> torch.Tensor:
        self.times += 1
        self.handle.forwards += 2
        self.handle.backwards += 1
        return INPUTS * self.times


def test_the_same_question_is_answered_once_and_charged_each_time() -> None:
    work, found = Work(), Shared()
    first = found.once(work.handle, "gradient", INPUTS, work)
    assert found.spared == Cost()
    again = found.once(work.handle, "gradient", INPUTS.clone(), work)
    assert again is first and work.times == 1
    assert (found.spared.forwards, found.spared.backwards) == (2, 1) and found.spared.seconds > 0
    found.once(work.handle, "gradient", INPUTS, work)
    assert found.spared.forwards == 4
    assert found.begin() is found.spared and found.spared == Cost()


@pytest.mark.parametrize("changed", ["what", "inputs", "shape", "model"])
def test_another_question_is_not(changed: str) -> None:
    work, found = Work(), Shared()
    found.once(work.handle, "gradient", INPUTS, work)
    handle = Handle(nn.Identity()) if changed == "model" else work.handle
    inputs = {"inputs": INPUTS + 1e-6, "shape": INPUTS.expand(2, 3, 2, 2)}.get(changed, INPUTS)
    found.once(handle, "other" if changed == "what" else "gradient", inputs, work)
    assert work.times == 2 and found.spared == Cost()


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "ROOM", 3 * INPUTS.nbytes)
    work, found = Work(), Shared()
    for name in ("first", "second", "first", "second"):
        found.once(work.handle, name, INPUTS, work)
    assert work.times == 3  # the second is done anew
