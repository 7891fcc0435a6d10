"""Draws the README's pictures: six methods on four scenes of the embedded model, patches, and an even grid of scenes.

python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import torchloupe as tl

METHODS: dict[str, dict[str, Any]] = {
    "grad_cam": {},
    "integrated_gradients": {},
    "guided_backprop": {},
    "occlusion": {"window": 12, "stride": 4},
    "lime": {"n_samples": 1000},
    "rise": {"n_masks": 2000},
}
SCENES = (2, 3, 5, 8)
UNITS = ("layer1:3", "layer2:9", "layer3:5", "layer3:9", "layer4:17")


def main() -> None:
    """Writes `methods.png`, `examples.png` and `grid.png` beside this file."""
    methods()
    examples()
    grid()


def methods() -> None:
    """One row a scene, one column a method."""
    model, scenes = tl.load("demo"), tl.demo_scenes(12)
    images, names = scenes.images[list(SCENES)], [scenes.classes[scenes.true_labels[index]] for index in SCENES]
    asked = [tl.logit(name) for name in names]
    maps = {name: tl.explain(model, images, target=asked, method=name, **options) for name, options in METHODS.items()}
    figure = Figure(figsize=(10.5, 6.35), layout="constrained")
    grid = figure.subplots(len(SCENES), 1 + len(maps))
    for row, name in enumerate(names):
        pictures = [images[row].float() / 255, *(found.overlay(alpha=0.75)[row] for found in maps.values())]
        for axes, picture in zip(grid[row], pictures, strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        grid[row][0].set_ylabel(f"logit:{name}", fontsize=10)
    for axes, title in zip(grid[0], ["scene", *maps], strict=True):
        axes.set_title(title.replace("_", " "), fontsize=10)
    figure.savefig(Path(__file__).with_name("methods.png"), dpi=110)


def examples() -> None:
    """One row a unit."""
    found = tl.examples("demo", tl.demo_scenes(300, seed=3), list(UNITS))
    found.figure().savefig(Path(__file__).with_name("examples.png"), dpi=100)


def grid() -> None:
    """300 scenes where t-SNE of the model's features puts them, one in each cell."""
    found = tl.embed("demo", tl.demo_scenes(300, seed=5), method="tsne")
    found.grid(shape=(12, 25)).figure(size=40).savefig(Path(__file__).with_name("grid.png"), dpi=100)


if __name__ == "__main__":
    main()
