"""The command `torchloupe visualize`: images made for targets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchloupe.cli import FILE, SEED, _load, _print, _say, main
from torchloupe.cli_looking import _numbers, _written

if TYPE_CHECKING:
    from torchloupe_core.visualization import Visualization

__all__ = ["visualize"]

LETTERS = 80  # of a file's name


def _size(ctx: click.Context, parameter: click.Parameter, text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r} is no number of pixels, as in 128, and no H,W, as in 96,128")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _strengths(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> Any:
    """A named set, or names with their strengths."""
    pairs = [text.partition("=") for text in texts]
    if len(pairs) == 1 and not pairs[0][1]:
        return texts[0]
    found = {}
    for name, _, strength in pairs:
        try:
            found[name.strip()] = float(strength)
        except ValueError:
            raise click.BadParameter(f"{name!r} is not NAME=STRENGTH, as in tv=0.1, nor a set by itself") from None
    return found or None


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What can be asked of the optimisation."""
    for option in (
        click.option("--n", type=click.IntRange(min=1), default=1, show_default=True, help="Images for each target."),
        click.option("--steps", type=click.IntRange(min=1), default=512, show_default=True),
        click.option("--size", callback=_size, metavar="N or H,W", help="In pixels; the model's own unless given."),
        click.option("--method", default="auto", show_default=True, help="lucent, native, or lucent if installed."),
        click.option("--parametrization", default="fourier", show_default=True, help="pixel, pyramid, cppn, ..."),
        click.option("--transforms", help="distill unless given; yosinski, none."),
        click.option("--regularizer", "regularizers", multiple=True, callback=_strengths, metavar="NAME=STRENGTH"),
        click.option("--init", type=FILE, help="A picture to begin from, instead of noise."),
        click.option("--diversity", type=float, default=0.0, help="Weight against likeness of a target's images."),
        click.option("--read", type=click.Choice(["auto", "pre", "post"]), default="auto", show_default=True),
        click.option("--lr", type=float, help="Step size of Adam."),
        click.option("--snapshots", callback=_numbers, metavar="N,N", help="Steps after which images are kept."),
        click.option("--batch-size", type=click.IntRange(min=1), help="Images at once."),
    ):
        command = option(command)
    return command


@main.command(no_args_is_help=True)
@click.argument("targets", metavar="TARGET...", nargs=-1, required=True)
@click.option("--out", required=True, type=FILE, help="Folder for what is written.")
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@_options
@click.option("--checkpoint", type=FILE, help="File of weights, instead of pretrained ones.")
@click.option("--no-pretrained", is_flag=True, help="Random weights.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise and of random weights.")
@click.option("--device", help="As in cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each image.")
@click.option("--progress/--no-progress", default=None, help="A bar; on a terminal only unless given.")
def visualize(
    targets: tuple[str, ...],
    out: Path,
    model: str,
    checkpoint: Path | None,
    no_pretrained: bool,
    seed: int,
    device: str | None,
    snapshots: list[int] | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Images made to move each TARGET of MODEL as far as it goes.

    A TARGET is a logit:dog, a channel as layer3:11, or any other; one that begins with a minus comes after --. --out
    gets a picture for each image, visualization.png, all of them with the loss step by step, and visualization.npz,
    which torchloupe.open reads; what is there already is replaced. Ctrl-C ends the run, and what was made so far is
    written.

    \b
    Example:
      torchloupe visualize layer3:11 logit:fish --steps 256 --out images
    """
    import torchloupe as tl
    from torchloupe_core.results import writable_folder

    wanted = [tl.target(text) for text in targets]
    writable_folder(out)
    handle = _load(model, no_pretrained, checkpoint=checkpoint, seed=seed, device=device)
    made = tl.visualize(handle, wanted, seed=seed, snapshots=snapshots or (), interruptible=True, **asked)
    _, npz = _written(made, out / "visualization", curve=True)
    for path, facts in _pictures(made, out):
        facts |= {"png": path, "npz": npz}
        line = "{target} = {score:.4g}".format(**facts)
        _print(json.dumps(facts, default=str) if as_json else f"{line}  {click.format_filename(path)}")
    if made.stopped:
        _say(made.stopped)
        raise click.exceptions.Exit(130 if "interrupted" in made.stopped else 1)


def _pictures(made: Visualization, out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Writes each image, and tells what it is."""
    import io

    from PIL import Image

    from torchloupe_core.results import write_whole

    names: dict[str, int] = {}
    for index, target in enumerate(made.targets):
        name = re.sub(r"[^\w.+-]+", "_", target).strip("_")[:LETTERS]
        names[name] = names.get(name, 0) + 1
        path = out / (f"{name}.png" if names[name] == 1 else f"{name}_{names[name]}.png")
        buffer = io.BytesIO()
        values = (made.images[index].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(values).save(buffer, "PNG")
        write_whole(path, buffer.getvalue())
        facts: dict[str, Any] = {"target": target, "score": made.scores[index].item(), "method": made.method}
        facts |= {key: each[index] for key, each in made.diagnostics.items() if isinstance(each, list)}
        yield path, facts
