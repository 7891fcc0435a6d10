"""The command `torchloupe scan`: a folder of pictures, sent through a model once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from torchloupe.cli import FILE, _print, _say, main
from torchloupe.cli_looking import _opened
from torchloupe.cli_options import device_of_rank, kept, of_weights, speaks

__all__ = ["scan"]


@main.command(no_args_is_help=True)
@click.argument("folder", type=FILE)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--layer", "layers", multiple=True, help="The last spatial one and the classifier's input unless given.")
@click.option("--score", "scores", multiple=True, metavar="TARGET", help="Value kept of each picture, as prob:dog.")
@click.option("--k", type=click.IntRange(min=1), default=9, show_default=True, help="How many examples of a channel.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Pictures through the model at once.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that read pictures; chosen unless given.")
@kept
@of_weights
def scan(
    folder: Path,
    model: str,
    store: Path | None,
    layers: tuple[str, ...],
    as_json: bool,
    progress: bool | None,
    **asked: Any,
) -> None:
    """Sends every picture of FOLDER through the model once, and keeps what other commands ask.

    torchloupe embed, neighbors and examples take the store in place of the pictures, and then need no pass. Subfolders
    give labels. Stopped in any way, the same command goes on where it was. Under torchrun all processes work together,
    also on several machines that share the store's folder; pictures that cannot be read are reported and left out.

    \b
    Example:
      torchloupe scan photos --model timm/resnet50 --layer layer4 --store photos.scan
      torchrun --nproc-per-node 4 --no-python torchloupe scan photos --device cuda --store photos.scan
    """
    import torchloupe as tl

    if store is None:
        raise click.UsageError("scan needs --store, the folder to keep it in")
    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device", "seed")}
    handle = _opened(model, **{**weights, "device": device_of_rank(weights["device"])})
    try:
        found = tl.scan(handle, folder, layers or None, store=store, progress=progress if speaks() else False, **asked)
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from there")
        raise click.exceptions.Exit(130) from None
    if speaks():
        for name, why in found.skipped.items():
            _say(why if name in why else f"{name}: {why}")
        facts = {"store": store, "images": found.images, "layers": found.layers, "scores": found.targets}
        facts |= {"skipped": len(found.skipped), "forwards": found.forwards, "seconds": round(found.seconds, 3)}
        line = f"{found.images} images at {', '.join(found.layers)}  {click.format_filename(store)}"
        _print(json.dumps(facts, default=str) if as_json else line)
    raise click.exceptions.Exit(1 if found.skipped else 0)
