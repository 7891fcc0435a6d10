"""The embedded model explained on scenes whose truth is known: one page, nothing fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchloupe import __version__
from torchloupe._explain import explain
from torchloupe._models import load
from torchloupe_adapters.demo.scenes import Scenes, demo_scenes
from torchloupe_adapters.jinja2 import render
from torchloupe_adapters.tqdm import progress_bar
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.images import data_uri
from torchloupe_core.methods.localisation import energy_inside, pointing_hit, top_area_iou
from torchloupe_core.metrics.floors import floors
from torchloupe_core.results import Attribution, writable_folder, write_whole
from torchloupe_core.targets import margin

__all__ = ["METHODS", "Scores", "baseline_maps", "score_maps", "write_demo"]

METHODS: dict[str, dict[str, Any]] = {
    "grad_cam": {},
    "saliency": {},
    "integrated_gradients": {"steps": 16},
    "guided_backprop": {},
    "occlusion": {"window": 12, "stride": 8},
    "rise": {"n_masks": 200},
}
SHOWN, PAIRS = 6, 6
NEAR = 8  # pixels, one cell of the last feature map


@dataclass(frozen=True)
class Scores:
    """How well one method's maps point at the objects, over many scenes."""

    name: str
    pointing: float
    energy: float
    iou: float
    forwards: float
    milliseconds: float


def write_demo(out: Path, *, seed: int = 0, count: int = 100, progress: bool | None = None) -> Path:
    """Explains `count` fresh scenes by six methods, finds a planted backdoor, and writes `out/index.html`.

    Raises `StoreError` if nothing can be written there, before any work.
    """
    if count < SHOWN:
        raise BadInput(f"the demo needs at least {SHOWN} scenes; got {count}")
    page = writable_folder(out) / "index.html"
    model, scenes = load("demo"), demo_scenes(count, seed)
    with progress_bar("demo", "methods", progress) as report:
        rows, maps = [], {}
        for done, (name, options) in enumerate(METHODS.items()):
            maps[name] = explain(model, scenes.images, target=_truth(scenes), method=name, progress=False, **options)
            rows.append(_scored(maps[name], scenes))
            report(done + 1, len(METHODS) + 1)
        values = {
            "version": __version__,
            "count": count,
            "accuracy": _accuracy(model, scenes),
            "predictions": _predictions(model, scenes),
            "gallery": _gallery(maps, scenes),
            "rows": rows,
            "baselines": [score_maps(name, one, scenes) for name, one in baseline_maps(scenes).items()],
            "two": _two_objects(model, seed),
            "backdoor": _backdoor(seed, count),
        }
    write_whole(page, render(Path(__file__).parent / "pages" / "demo.html", **values).encode())
    return page


def score_maps(name: str, maps: Tensor, scenes: Scenes, *, forwards: float = 0, milliseconds: float = 0) -> Scores:
    """Means over the scenes, against the mask of each scene's first object."""
    masks = scenes.masks[:, 0]
    return Scores(
        name,
        pointing_hit(maps, masks).float().mean().item(),
        energy_inside(maps, masks).mean().item(),
        top_area_iou(maps, masks).mean().item(),
        forwards,
        milliseconds,
    )


def baseline_maps(scenes: Scenes) -> dict[str, Tensor]:
    """What a method must beat: noise, and the guess that things are in the middle."""
    found = floors(scenes.images, seed=0)
    return {"random": found["random"], "centre blob": found["centre"]}


def _scored(found: Attribution, scenes: Scenes) -> Scores:
    each = len(scenes)
    return score_maps(
        found.method, found.upsample(), scenes, forwards=found.forwards / each, milliseconds=1000 * found.seconds / each
    )


def _truth(scenes: Scenes) -> list[int]:
    labels: list[int] = scenes.true_labels.tolist()
    return labels


def _accuracy(model: Handle, scenes: Scenes) -> float:
    guessed = [guesses[0].index for guesses in model.predict(scenes.images, k=1)]
    return sum(a == b for a, b in zip(guessed, _truth(scenes), strict=True)) / len(scenes)


def _predictions(model: Handle, scenes: Scenes) -> list[dict[str, Any]]:
    """One scene of each class, with what the model sees in it."""
    truth = _truth(scenes)
    firsts = [truth.index(label) for label in sorted(set(truth))]
    guesses = model.predict(scenes.images[firsts], k=3)
    return [
        {"picture": data_uri(scenes.images[index]), "truth": scenes.classes[truth[index]], "guesses": best}
        for index, best in zip(firsts, guesses, strict=True)
    ]


def _gallery(maps: dict[str, Attribution], scenes: Scenes) -> list[dict[str, Any]]:
    """A few scenes, each with every method's map and how well it points."""
    rows = []
    for index in range(SHOWN):
        mask = scenes.masks[index : index + 1, 0]
        cells = []
        for found in maps.values():
            one = found[index]
            values = one.upsample()
            cells.append(
                {
                    "method": one.method,
                    "picture": data_uri(one.overlay()[0]),
                    "hit": bool(pointing_hit(values, mask)[0]),
                    "iou": top_area_iou(values, mask)[0].item(),
                }
            )
        name = scenes.classes[int(scenes.true_labels[index])]
        rows.append({"name": name, "picture": data_uri(_outlined(scenes.images[index], mask[0])), "cells": cells})
    return rows


def _two_objects(model: Handle, seed: int) -> list[dict[str, Any]]:
    """Scenes with two objects, asked about one and then about the other."""
    scenes = demo_scenes(4, seed + 1, two_object=1.0)
    pairs = list(zip(scenes.true_labels.tolist(), scenes.second_labels.tolist(), strict=True))
    asked = [
        explain(model, scenes.images, target=[margin(*pair[::order]) for pair in pairs], method="occlusion", window=12)
        for order in (1, -1)
    ]
    return [
        {
            "picture": data_uri(scenes.images[index]),
            "names": [scenes.classes[label] for label in pair],
            "maps": [data_uri(found[index].overlay()[0]) for found in asked],
        }
        for index, pair in enumerate(pairs)
    ]


def _backdoor(seed: int, count: int) -> dict[str, Any]:
    """The same scenes with and without a watermark, seen by a model with a planted backdoor.

    The maps are of "mushroom minus what the model said without the mark", so they show what changed its mind.
    """
    model = load("demo/backdoored")
    plain, marked = (demo_scenes(count, seed + 2, watermark=share) for share in (0.0, 1.0))
    before, after = ([g[0] for g in model.predict(one.images, k=1)] for one in (plain, marked))
    flipped = [i for i in range(count) if before[i].name != "mushroom" and after[i].name == "mushroom"]
    others = sum(guess.name != "mushroom" for guess in before)
    targets = [margin("mushroom", before[i].index) for i in flipped]
    found = {
        name: explain(model, marked.images[flipped], target=targets, method=name, progress=False, **METHODS[name])
        for name in ("grad_cam", "integrated_gradients", "occlusion")
    }
    marks = marked.watermark_masks[flipped]
    return {
        "share": len(flipped) / max(others, 1),
        "others": others,
        "near": NEAR,
        "hits": {
            name: pointing_hit(one.upsample(), marks, tolerance=NEAR).float().mean().item()
            for name, one in found.items()
        },
        "pairs": [
            {
                "before": {"picture": data_uri(plain.images[i]), "guess": before[i]},
                "after": {"picture": data_uri(marked.images[i]), "guess": after[i]},
                "maps": [{"method": name, "picture": data_uri(one[row].overlay()[0])} for name, one in found.items()],
            }
            for row, i in enumerate(flipped[:PAIRS])
        ],
    }


def _outlined(image: Tensor, mask: Tensor) -> Tensor:
    """The picture with the true object's outline in white."""
    inner = -torch.nn.functional.max_pool2d(-mask[None, None].float(), 3, 1, 1)[0, 0] > 0
    return torch.where(mask & ~inner, torch.tensor(255, dtype=torch.uint8), image)
