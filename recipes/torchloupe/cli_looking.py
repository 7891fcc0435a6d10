"""The commands `torchloupe weights | activations | examples`: filters, feature maps, and what drives units."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchloupe.cli import FILE, _load, _print, _say, main
from torchloupe.cli_options import kept, of_a_model, searched
from torchloupe_core.errors import BadInput, LoupeError

if TYPE_CHECKING:
    from torchloupe_core.activations import Activations
    from torchloupe_core.examples import Examples
    from torchloupe_core.filters import Scale
    from torchloupe_core.handle import Handle
    from torchloupe_core.methods.patches import Band, Crop
    from torchloupe_core.results import Result

__all__ = ["activations", "examples", "weights"]


def _numbers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of numbers, as in 3,17")
    return [int(part) for part in parts]


def _threshold(ctx: click.Context, parameter: click.Parameter, text: str | None) -> float | str | None:
    if text is None or text.strip().endswith("%"):
        return text
    with contextlib.suppress(ValueError):
        return float(text)
    raise click.BadParameter(f"{text!r} is no value, as in 0.5, and no quantile, as in 99%")


_channels = click.option("--channels", callback=_numbers, metavar="N,N", help="All of the layer unless given.")


def _opened(name: str, no_pretrained: bool, pretrained: str | None, **options: Any) -> Handle:
    if pretrained is not None:  # not every source has a choice
        options["weights"] = pretrained
    return _load(name, no_pretrained, **options)


@main.command(no_args_is_help=True)
@click.argument("model")
@click.argument("layer")
@click.option("--to", help="An earlier layer, or input: weights over its channels, through what lies between.")
@click.option("--scale", type=click.Choice(["shared", "each"]), default="shared", show_default=True)
@_channels
@of_a_model
def weights(
    model: str,
    layer: str,
    out: Path,
    to: str | None,
    scale: Scale,
    channels: list[int] | None,
    as_json: bool,
    progress: bool | None,
    **asked: Any,
) -> None:
    """The filters of LAYER of MODEL as pictures.

    --out gets LAYER.weights.png, a drawing, and LAYER.weights.npz, the raw weights, which torchloupe.open reads; what
    is there already is replaced. A drawing shows what fits; the .npz holds every filter asked for.

    \b
    Example:
      torchloupe weights timm/resnet50 conv1 --out filters
    """
    import torchloupe as tl
    from torchloupe_core.results import writable_folder

    writable_folder(out)
    found = tl.weights(_opened(model, **asked), layer, to=to, channels=channels, scale=scale, progress=progress)
    over = "" if to is None else f".over.{to}"
    png, npz = _written(found, out / f"{layer}{over}.weights")
    facts = {"layer": found.layer, "to": to, "filters": len(found), "shape": list(found.images.shape)}
    _tell(facts | {"png": png, "npz": npz}, f"{found.layer}{over}  {len(found)} filters", png, as_json)


@main.command(no_args_is_help=True)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=FILE)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--layer", required=True, help='Which layer; "torchloupe layers MODEL" lists them.')
@click.option(
    "--threshold", callback=_threshold, help="Darkens pictures where a map is below: 0.5, or 99% of its values."
)
@click.option("--over", type=FILE, help="Folder of pictures that a threshold in percent is taken over.")
@_channels
@of_a_model
def activations(
    images: tuple[Path, ...],
    model: str,
    layer: str,
    out: Path,
    channels: list[int] | None,
    threshold: float | str | None,
    over: Path | None,
    as_json: bool,
    progress: bool | None,
    **asked: Any,
) -> None:
    """The feature maps of LAYER for each IMAGE.

    An IMAGE is a file or a folder. For x.jpg and layer4, --out gets x.jpg.layer4.activations.png, a drawing, and
    x.jpg.layer4.activations.npz, the raw maps, which torchloupe.open reads; what is there already is replaced. A
    threshold in percent is each channel's quantile over all the pictures, or over those of another folder. A picture
    that cannot be read is reported and left out.

    \b
    Example:
      torchloupe activations photos --model timm/resnet50 --layer layer4 --threshold 99% --out maps
    """
    from torchloupe._folder import named
    from torchloupe_adapters.tqdm import progress_bar
    from torchloupe_core.activations import quantiles_over
    from torchloupe_core.dataset import open_data
    from torchloupe_core.results import writable_folder

    pictures = named(images, out)
    writable_folder(out)
    handle = _opened(model, **asked)
    if handle.spec.input_size:
        handle.layer(layer)
    maps = _Maps(handle, layer, channels)
    with progress_bar("activations", " pictures", progress) as report:
        values, words = threshold, ""  # type: Any, str
        if over is not None:
            values, words = quantiles_over(handle, open_data(over, handle.spec), layer, values)
        elif isinstance(threshold, str):
            values, words = maps.quantiles(list(pictures.values()), threshold)
        for done, (name, path) in enumerate(pictures.items(), 1):
            for found in maps.of(path, values):
                found = replace(found, threshold=words or found.threshold)
                png, npz = _written(found, out / f"{name}.{layer}.activations")
                facts = {"image": path, "layer": layer, "shape": list(found.maps.shape), "png": png, "npz": npz}
                _tell(facts, f"{click.format_filename(path)}  {layer}", png, as_json)
            report(done, len(pictures))
    _say(str(maps))
    raise click.exceptions.Exit(1 if maps.failed else 0)


@main.command(no_args_is_help=True)
@click.argument("images", metavar="[IMAGE...]", nargs=-1, type=FILE)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option(
    "--target", "targets", multiple=True, required=True, help="As in layer4:17, layer4 or logit:dog; several."
)
@click.option("-k", type=click.IntRange(1), default=9, show_default=True, help="How many of each unit.")
@click.option("--crop", type=click.Choice(["patch", "image"]), default="patch", show_default=True)
@click.option("--band", type=click.Choice(["max", "min", "middle", "spectrum"]), default="max", show_default=True)
@click.option("--per-image", type=click.IntRange(1), default=1, show_default=True, help="Patches of one image.")
@click.option("--without-gates", is_flag=True, help="Patches as they are without attention and squeeze-excite.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images.")
@kept
@of_a_model
def examples(
    images: tuple[Path, ...],
    model: str,
    targets: tuple[str, ...],
    out: Path,
    as_json: bool,
    progress: bool | None,
    k: int,
    crop: Crop,
    band: Band,
    per_image: int,
    without_gates: bool,
    workers: int | None,
    store: Path | None,
    resume: bool,
    engine: str | None,
    seed: int,
    **asked: Any,
) -> None:
    """The images among all IMAGEs, or their patches, that drive each TARGET most.

    An IMAGE is a file or a folder, or a store that torchloupe scan made. A layer stands for all its channels; one pass
    answers all targets. For layer4:17, --out gets layer4_17.examples.png, a drawing, and layer4_17.examples.npz, which
    torchloupe.open reads; what is there already is replaced. A drawing shows the first units of a layer; the .npz holds
    them all. Pictures that cannot be read are reported and left out.

    \b
    Example:
      torchloupe examples photos --model timm/resnet50 --target layer3:17 --target layer4 --out units
    """
    import torchloupe as tl
    from torchloupe_core.results import writable_folder

    pictures, store = searched(images, store, out)
    writable_folder(out)
    found = tl.examples(
        _opened(model, seed=seed, **asked),
        pictures,
        list(dict.fromkeys(targets)),
        k=k,
        crop=crop,
        band=band,
        per_image=per_image,
        without_gates=without_gates,
        workers=workers,
        store=store,
        resume=resume,
        engine=engine,
        seed=seed,
        progress=progress,
    )
    for name, why in found.skipped.items():
        _say(why if name in why else f"{name}: {why}")
    for stem, units in _by_target(found).items():
        png, npz = _written(units, out / f"{stem}.examples")
        row = int(units.scores[:, 0].argmax())
        best = f"{units.units[row]} = {units.scores[row, 0].item():.4g} in {units.name(int(units.indices[row, 0]))}"
        facts = {"target": units.asked[0], "units": list(map(_facts, units)), "png": png, "npz": npz}
        _tell(facts, f"{stem}  {best}", png, as_json)
    failed = f", {len(found.skipped)} could not be read" if found.skipped else ""
    _say(f"examples: {found.images} pictures searched{failed}")
    raise click.exceptions.Exit(1 if found.skipped else 0)


def _facts(unit: Examples) -> dict[str, Any]:
    """One unit's examples for JSON."""
    there = unit.indices[0] >= 0
    return {
        "unit": unit.units[0],
        "images": [unit.name(index) for index in unit.indices[0, there].tolist()],
        "scores": unit.scores[0, there].tolist(),
        "boxes": unit.boxes[0, there].tolist(),
    }


def _by_target(found: Examples) -> dict[str, Examples]:
    """The result of each target, under what its files are called."""
    rows: dict[str, list[int]] = {}
    for row, target in enumerate(found.asked):
        rows.setdefault(target, []).append(row)
    stems: dict[str, Examples] = {}
    for target, some in rows.items():
        stem = re.sub(r"[^\w.,@+-]+", "_", target).strip("_")[:80] or "target"
        stems[stem if stem not in stems else f"{stem}-{len(stems)}"] = found.only(some)
    return stems


@dataclass
class _Maps:
    """Pictures asked about one by one, and the count of those that could not be read."""

    handle: Handle
    layer: str
    channels: list[int] | None
    seen: set[Path] = field(default_factory=set)
    failed: set[Path] = field(default_factory=set)

    def of(self, path: Path, threshold: Any = None) -> Iterator[Activations]:
        """The maps of one picture, none after a report if something is wrong with it."""
        import torchloupe as tl

        if path in self.failed:
            return
        try:
            inputs = self.handle.inputs(path)
        except BadInput as error:
            return self._fail(path, error)
        try:
            found = tl.activations(
                self.handle, inputs, self.layer, channels=self.channels, threshold=threshold, progress=False
            )
        except LoupeError as error:
            if not self.seen:
                raise  # not the picture's fault
            return self._fail(path, error)
        self.seen.add(path)
        yield found

    def quantiles(self, paths: list[Path], share: str) -> tuple[Any, str]:
        """Each channel's quantile over all positions of all pictures, and that in words."""
        import torch

        from torchloupe_core.activations import thresholds

        maps = [found.maps.flatten(2) for path in paths for found in self.of(path, share)]
        if not maps:
            return None, ""
        every = torch.cat(maps, 2)[..., None]  # [1, C, positions of all pictures, 1]
        values, _ = thresholds(every, share, range(every.shape[1]), every.shape[1])
        return values, f"{share.strip()} quantile of {len(maps)} images"

    def _fail(self, path: Path, error: LoupeError) -> None:
        self.failed.add(path)
        text = " ".join(str(error).split())
        _say(text if str(path) in text else f"{path}: {text}")

    def __str__(self) -> str:
        failed = (
            f", {len(self.failed)} {'picture' if len(self.failed) == 1 else 'pictures'} failed" if self.failed else ""
        )
        return f"activations: {len(self.seen - self.failed)} written{failed}"


def _written(found: Result, stem: Path, **options: Any) -> tuple[Path, Path]:
    """The drawing, with its options, and the data of a result, side by side."""
    import io

    from torchloupe_core.results import write_whole

    drawing = io.BytesIO()
    found.figure(**options).savefig(drawing, format="png", dpi=100)
    npz = found.save(stem.with_name(stem.name + ".npz"))
    png = stem.with_name(stem.name + ".png")
    write_whole(png, drawing.getvalue())
    return png, npz


def _tell(facts: dict[str, Any], line: str, png: Path, as_json: bool) -> None:
    _print(json.dumps(facts, default=str) if as_json else f"{line}  {click.format_filename(png)}")
