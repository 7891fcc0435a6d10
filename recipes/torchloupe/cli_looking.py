"""The commands `torchloupe weights` and `torchloupe activations`: pictures of filters and feature maps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchloupe.cli import FILE, SEED, _load, _print, _say, main
from torchloupe_core.errors import BadInput, LoupeError

if TYPE_CHECKING:
    from torchloupe_core.activations import Activations
    from torchloupe_core.filters import Scale
    from torchloupe_core.handle import Handle
    from torchloupe_core.results import Result

__all__ = ["activations", "weights"]


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


def _of_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which weights a model has and where it runs."""
    for option in (
        click.option("--progress/--no-progress", default=None, help="A bar; on a terminal only unless given."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each drawing."),
        click.option("--device", help="As in cpu or cuda."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Of random weights."),
        click.option("--weights", "pretrained", help="Which pretrained weights, for torchvision, as in IMAGENET1K_V2."),
        click.option("--no-pretrained", is_flag=True, help="Random weights."),
        click.option("--checkpoint", type=FILE, help="File of weights, instead of pretrained ones."),
        click.option("--channels", callback=_numbers, metavar="N,N", help="All of the layer unless given."),
        click.option("--out", required=True, type=FILE, help="Folder for what is written."),
    ):
        command = option(command)
    return command


def _opened(name: str, no_pretrained: bool, pretrained: str | None, **options: Any) -> Handle:
    if pretrained is not None:  # not every source has a choice
        options["weights"] = pretrained
    return _load(name, no_pretrained, **options)


@main.command(no_args_is_help=True)
@click.argument("model")
@click.argument("layer")
@click.option("--to", help="An earlier layer, or input: weights over its channels, through what lies between.")
@click.option("--scale", type=click.Choice(["shared", "each"]), default="shared", show_default=True)
@_of_a_model
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
@_of_a_model
def activations(
    images: tuple[Path, ...],
    model: str,
    layer: str,
    out: Path,
    channels: list[int] | None,
    threshold: float | str | None,
    as_json: bool,
    progress: bool | None,
    **asked: Any,
) -> None:
    """The feature maps of LAYER for each IMAGE.

    An IMAGE is a file or a folder. For x.jpg and layer4, --out gets x.jpg.layer4.activations.png, a drawing, and
    x.jpg.layer4.activations.npz, the raw maps, which torchloupe.open reads; what is there already is replaced. A
    threshold in percent is each channel's quantile over all the pictures. One that cannot be read is reported and left
    out.

    \b
    Example:
      torchloupe activations photos --model timm/resnet50 --layer layer4 --threshold 99% --out maps
    """
    from torchloupe._folder import named
    from torchloupe_adapters.tqdm import progress_bar
    from torchloupe_core.results import writable_folder

    pictures = named(images, out)
    writable_folder(out)
    handle = _opened(model, **asked)
    if handle.spec.input_size:
        handle.layer(layer)
    maps = _Maps(handle, layer, channels)
    with progress_bar("activations", " pictures", progress) as report:
        words = ""
        if isinstance(threshold, str):
            threshold, words = maps.quantiles(list(pictures.values()), threshold)
        for done, (name, path) in enumerate(pictures.items(), 1):
            for found in maps.of(path, threshold):
                found = replace(found, threshold=words or found.threshold)
                png, npz = _written(found, out / f"{name}.{layer}.activations")
                facts = {"image": path, "layer": layer, "shape": list(found.maps.shape), "png": png, "npz": npz}
                _tell(facts, f"{click.format_filename(path)}  {layer}", png, as_json)
            report(done, len(pictures))
    _say(str(maps))
    raise click.exceptions.Exit(1 if maps.failed else 0)


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


def _written(found: Result, stem: Path, **drawn: Any) -> tuple[Path, Path]:
    """The drawing and the data of a result, side by side."""
    import io

    from torchloupe_core.results import write_whole

    drawing = io.BytesIO()
    found.figure(**drawn).savefig(drawing, format="png", dpi=100)
    npz = found.save(stem.with_name(stem.name + ".npz"))
    png = stem.with_name(stem.name + ".png")
    write_whole(png, drawing.getvalue())
    return png, npz


def _tell(facts: dict[str, Any], line: str, png: Path, as_json: bool) -> None:
    _print(json.dumps(facts, default=str) if as_json else f"{line}  {click.format_filename(png)}")
