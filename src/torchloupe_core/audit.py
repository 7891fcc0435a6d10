"""Shortcuts a model takes: what `audit` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from torchloupe_core.results import Result

__all__ = ["Audit"]


@dataclass(frozen=True, eq=False)
class Audit(Result):
    """S shortcuts: small regions that recur in the images of a class and decide for it by themselves.

    classes: of each, the class it makes the model see. shares: of the class's images, how many have it. covered: of
    those, how many are seen as another class once it is filled in from around it. transplanted: of images of other
    classes, how many are seen as this one once it is pasted in; control: once any window of the same images is. inside:
    how much of the region lies in the masks, NaN without masks. members: the images that have it, by index in the data
    set. pictures `[S, k, 3, H, W]` and boxes `[S, k, 4]`: the clearest few; patches `[S, 3, w, w]`: their median.

    looked_at: how many images. recurring: how many regions recurred, whether they decide or not. skipped: images that
    could not be read.
    """

    drawings: ClassVar[str] = "torchloupe_core.plots_audit"

    classes: tuple[str, ...]
    shares: tuple[float, ...]
    covered: tuple[float, ...]
    transplanted: tuple[float, ...]
    control: tuple[float, ...]
    inside: tuple[float, ...]
    members: tuple[tuple[int, ...], ...]
    pictures: Tensor
    boxes: Tensor
    patches: Tensor
    looked_at: int
    recurring: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.classes)

    def table(self) -> str:
        """What was found, a line for each shortcut."""
        if not len(self):
            return (
                f"no shortcut in {self.looked_at} images; {self.recurring} regions recur and decide nothing by "
                "themselves\n"
            )
        lines = []
        for row, name in enumerate(self.classes):
            place = "" if self.inside[row] != self.inside[row] else f", {self.inside[row]:.0%} of it on the object"
            lines.append(
                f"{name}: a region recurs in {len(self.members[row])} images ({self.shares[row]:.0%} of the class)"
                f"{place}; covered, {self.covered[row]:.0%} are seen as something else; pasted into other images, "
                f"{self.transplanted[row]:.0%} are seen as {name} (any other window: {self.control[row]:.0%})"
            )
        return "\n".join(lines) + "\n"
