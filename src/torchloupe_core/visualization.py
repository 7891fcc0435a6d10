"""Images made to move a target: what `visualize` returns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from torchloupe_core.animation import animated
from torchloupe_core.errors import BadInput
from torchloupe_core.results import Result

__all__ = ["Visualization"]


@dataclass(frozen=True, eq=False)
class Visualization(Result):
    """Images optimised for targets.

    images: `[n, 3, H, W]` in [0, 1]. target: its canonical text, or one text for each image; of textures and styles a
    word. scores: the target's value for each image as it is, `[n]`; where an image was made to agree with another, how
    far it is from that. losses: `[n, steps]`, what was minimised at each step, on the images as transformed
    then: the target's negative and the penalties. alpha: `[n, 1, H, W]` in [0, 1], how much the optimisation was about
    each pixel, where the parametrisation tells. given: `[n, 3, H, W]`, the images it began from or was compared with.
    snapshots: `[s, n, 3, H, W]`, the images after `snapshot_steps`.
    stopped: why the run ended before its last step, "" if it did not. diagnostics: what else is known of the run; a
    list holds one entry for each image. Of them `redirected` counts the steps in which an image's gradient was zero
    and a redirected one was taken, and `seen_as` and `units` say what other units think of the image.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_visualization"

    images: Tensor
    target: str | tuple[str, ...]
    scores: Tensor
    losses: Tensor
    alpha: Tensor | None = None
    given: Tensor | None = None
    snapshots: Tensor | None = None
    snapshot_steps: tuple[int, ...] = ()
    stopped: str = ""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Visualization:
        """The visualization of one image."""
        index = range(len(self))[index]
        one = slice(index, index + 1)
        return replace(
            self,
            images=self.images[one],
            target=self.targets[index],
            scores=self.scores[one],
            losses=self.losses[one],
            alpha=None if self.alpha is None else self.alpha[one],
            given=None if self.given is None else self.given[one],
            snapshots=None if self.snapshots is None else self.snapshots[:, one],
            diagnostics={
                name: value[one] if isinstance(value, list) else value for name, value in self.diagnostics.items()
            },
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """The target of each image."""
        return (self.target,) * len(self) if isinstance(self.target, str) else self.target

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.images.shape[2], self.images.shape[3]

    def at(self, step: int) -> Tensor:
        """`[n, 3, H, W]`: the images after a step that a snapshot was asked for."""
        if self.snapshots is None or step not in self.snapshot_steps:
            known = ", ".join(map(str, self.snapshot_steps)) or "none; ask with snapshots="
            raise BadInput(f"no snapshot after step {step}; there are {known}")
        return self.snapshots[self.snapshot_steps.index(step)]

    def animate(self, path: str | os.PathLike[str], *, fps: float = 12.0) -> Path:
        """Writes the run as a moving picture, `.gif`, or `.mp4` where ffmpeg is installed, and returns where.

        What was given, each snapshot, then the images; ask for many with `snapshots=range(1, steps, 4)`.
        """
        if self.snapshots is None:
            raise BadInput("there are no snapshots to show; ask for some, as snapshots=range(1, 512, 8)")
        given = [] if self.given is None else [self.given]
        return animated([*given, *self.snapshots, self.images], path, fps=fps)
