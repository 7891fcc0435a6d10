"""The command `torchloupe`. What needs torch is imported inside the commands, so that help is instant.

Exit codes: 0 all done; 1 done but for what was reported; 2 nothing could be done as asked; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchloupe import __version__
from torchloupe.cli_interrupt import interruptible
from torchloupe_core.errors import BadInput, LoupeError, NotApplicable, UnknownName

if TYPE_CHECKING:
    from torchloupe._folder import Question, Row
    from torchloupe_core.handle import Handle
    from torchloupe_core.trace import Layer

__all__ = ["main"]

FILE = click.Path(path_type=Path)
SEED = click.IntRange(0, 2**63 - 1)


class Commands(click.Group):
    """Commands whose errors are one line, whatever the library raises on purpose."""

    def invoke(self, ctx: click.Context) -> Any:
        if not logging.root.handlers:
            logging.root.addHandler(logging.NullHandler())  # else Python prints what libraries log as warnings
        with warnings.catch_warnings(), interruptible():
            warnings.simplefilter("ignore")
            try:
                return super().invoke(ctx)
            except LoupeError as error:
                _say(str(error))
                ctx.exit(2)
            except KeyboardInterrupt:
                _say("stopped")
                ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="torchloupe %(version)s")
def main() -> None:
    """Look inside any vision model, one question a command.

    \b
    Example:
      torchloupe explain photos --model timm/resnet50 --out maps
    """


# -- explain ----------------------------------------------------------------------------------------------------------


def _options(ctx: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [key for key, equals, _ in pairs if not (key.strip() and equals)]:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=VALUE, as in n_masks=500")
    return {key.strip(): _value(text.strip()) for key, _, text in pairs}


def _value(text: str) -> int | float | bool | str:
    """The number or truth value a text stands for, or else the text."""
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return {"true": True, "false": False}.get(text.lower(), text)


@main.command(no_args_is_help=True)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=FILE, help="Folder for what is written.")
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--target", help="As in logit:dog or layer4:17; each picture's predicted class unless given.")
@click.option("--method", multiple=True, default=["grad_cam"], metavar="M,M", help="grad_cam unless given.")
@click.option("--layer", help="Where methods that read a layer look; the last spatial one unless given.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", callback=_options, help="Of a method.")
@click.option("--checkpoint", type=FILE, help="File of weights, instead of pretrained ones.")
@click.option("--no-pretrained", is_flag=True, help="Random weights.")
@click.option("--weights", help="Which pretrained weights, for torchvision, as in IMAGENET1K_V2.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of random masks and weights.")
@click.option("--device", help="As in cpu or cuda.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Inputs through the model at once.")
@click.option("--overwrite", is_flag=True, help="Make anew what is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each picture and method.")
@click.option("--progress/--no-progress", default=None, help="A bar; on a terminal only unless given.")
def explain(
    images: tuple[Path, ...],
    out: Path,
    method: tuple[str, ...],
    options: dict[str, Any],
    overwrite: bool,
    as_json: bool,
    progress: bool | None,
    **asked: Any,
) -> None:
    """Where in each IMAGE the target came from.

    An IMAGE is a file or a folder. For x.jpg and grad_cam, --out gets x.jpg.grad_cam.png, a drawing, and
    x.jpg.grad_cam.npz, the raw map, which torchloupe.open reads; pictures from subfolders go to the same subfolders.
    What is there already is kept. A picture that cannot be read is reported and left out. "torchloupe methods explain"
    lists the methods and their options.

    \b
    Example:
      torchloupe explain photos --model timm/resnet50 --method grad_cam,rise --option n_masks=500 --out maps
    """
    from torchloupe._folder import Run, chosen, named
    from torchloupe_adapters.tqdm import progress_bar
    from torchloupe_core.results import writable_folder
    from torchloupe_core.targets import parse

    names = [name.strip() for text in method for name in text.split(",") if name.strip()]
    ways = chosen(names, options, asked["layer"])
    if asked["target"] is not None:
        parse(asked["target"])
    pictures = named(images, out)
    writable_folder(out)
    alone = len(pictures) == 1
    question = _question(progress=progress if alone else False, **asked)
    run = Run(question, list(ways), out, overwrite, _print_json if as_json else _print_row, _say)
    try:
        with progress_bar("explain", " pictures", False if alone else progress) as report:
            for number, (name, path) in enumerate(pictures.items(), 1):
                run.picture(name, path)
                report(number, len(pictures))
    except KeyboardInterrupt:
        _say(f"stopped; {run}; the same command goes on from there")
        raise click.exceptions.Exit(130) from None
    _say(str(run))
    raise click.exceptions.Exit(1 if run.failed or run.stale or len(run.ways) < len(ways) else 0)


def _question(
    *,
    model: str,
    target: str | None,
    layer: str | None,
    seed: int,
    batch_size: int | None,
    progress: bool | None,
    checkpoint: Path | None,
    no_pretrained: bool,
    weights: str | None,
    device: str | None,
) -> Question:
    """The model opened, target and layer checked against it as far as that is possible without a picture."""
    import torch

    from torchloupe._folder import Question, digest

    stated = {} if weights is None else {"weights": weights}  # not every source has a choice
    handle = _load(model, no_pretrained, seed=seed, device=device, checkpoint=checkpoint, **stated)
    if shape := handle.spec.input_size:
        if target is not None:
            handle.bind(target, torch.empty(1, *shape))
        if layer is not None:
            handle.layer(layer, shape)
    settings = {"model": model, "no_pretrained": no_pretrained, "weights": weights, "target": target, "seed": seed}
    settings["checkpoint"] = None if checkpoint is None else digest(checkpoint)
    return Question(handle, target, layer, seed, batch_size, progress, settings)


def _load(name: str, no_pretrained: bool, *, seed: int = 0, device: str | None = None, **options: Any) -> Handle:
    import torch

    import torchloupe as tl

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # random weights are the same every time
        return tl.load(name, pretrained=False if no_pretrained else None, device=device, **options)


def _print_json(row: Row) -> None:
    facts = asdict(row)
    _print(json.dumps({**facts.pop("answer"), **facts}, default=str))


def _print_row(row: Row) -> None:
    value = "{target} = {score:.4g}".format(**row.answer) if row.answer else "?"
    file = click.format_filename(row.png) + ("  (kept)" if row.kept else "")
    _print(f"{click.format_filename(row.image)}  {row.method}  {value}  {file}")


# -- methods, layers, receptive-field, demo ----------------------------------------------------------------------------


@main.command()
@click.argument("verb", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each method.")
def methods(verb: str | None, as_json: bool) -> None:
    """The methods, of one VERB or of all.

    For each: who does the work, what it needs of the model, what it costs, and its paper; with --json its options too.

    \b
    Example:
      torchloupe methods explain
    """
    from torchloupe import _tables

    found = _tables.methods(verb)
    if not found:
        raise UnknownName.of("verb", verb, sorted({way.verb for way in _tables.methods()}))
    if as_json:
        names = (*_tables.COLUMNS, "options", "random", "signed")
        for way in found:
            _print(json.dumps({name: getattr(way, name) for name in names}, default=str))
        return
    columns = _tables.COLUMNS[verb is not None :]
    rows = [columns, *([_cell(getattr(way, name), ", ") for name in columns] for way in found)]
    table, width = _table(rows), shutil.get_terminal_size().columns
    if sys.stdout.isatty() and max(map(len, table.splitlines())) > width:
        table = _table([(*row[:-1], row[-1].split(",")[0]) for row in rows], width)  # of a paper its author and year
    _print(table)


@main.command(no_args_is_help=True)
@click.argument("model")
@click.option("--no-pretrained", is_flag=True, help="Random weights; nothing is fetched.")
@click.option("--input-size", metavar="C,H,W", help="Of one input; the model's own unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each layer.")
def layers(model: str, no_pretrained: bool, input_size: str | None, as_json: bool) -> None:
    """The layers of MODEL, in forward order.

    For each: its name, for --layer and --target, the map it gives, and how often it runs. Marked are "features", the
    layer read unless told otherwise, and "embedding", what goes into the classifier.

    \b
    Example:
      torchloupe layers timm/resnet18 --no-pretrained
    """
    from torchloupe._tables import aligned

    size = None if input_size is None else _shape(input_size)
    rows = list(_layers(_load(model, no_pretrained), size))
    if as_json:
        for row in rows:
            _print(json.dumps(row))
        return
    _print(aligned([tuple(rows[0]), *(tuple(map(_cell, row.values())) for row in rows)]))


def _layers(handle: Handle, size: tuple[int, int, int] | None) -> Iterator[dict[str, Any]]:
    shape = size or handle.spec.input_size
    if shape is None:
        raise BadInput("this model's input size is not known; give it with --input-size C,H,W")
    with _sized(size):
        trace = handle.trace(shape)
    marks: dict[str, list[str]] = {}
    for mark, ask in (("features", handle.features_at), ("embedding", handle.embedding_at)):
        with contextlib.suppress(NotApplicable):
            marks.setdefault(ask(shape), []).append(mark)
    for name, layer in trace.layers.items():
        if f"{name}.in" in marks:
            yield _layer(trace.inputs[name], marks)
        yield _layer(layer, marks)


@contextlib.contextmanager
def _sized(size: tuple[int, int, int] | None) -> Iterator[None]:
    """Inside, a model that fails on an input of the size asked for is bad input."""
    try:
        yield
    except Exception as error:
        if size is None or isinstance(error, LoupeError):
            raise
        problem = (str(error) or repr(error)).splitlines()[0]
        raise BadInput(f"the model fails on an input of {_cell(size)}: {problem}") from error


def _layer(layer: Layer, marks: dict[str, list[str]]) -> dict[str, Any]:
    order = layer.layout and layer.layout.order
    facts = {"name": layer.name, "kind": layer.kind, "channels": layer.channels, "size": layer.size, "layout": order}
    return {**facts, "calls": layer.calls, "mark": " ".join(marks.get(layer.name, []))}


def _place(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    row, _, col = text.partition(",")
    if not (row.strip().isdecimal() and col.strip().isdecimal()):
        raise click.BadParameter(f"{text!r} is not ROW,COL, as in 10,3")
    return int(row), int(col)


@main.command(no_args_is_help=True)
@click.argument("model")
@click.argument("layer")
@click.option("--channel", type=click.IntRange(min=0), help="One channel; around all of them unless given.")
@click.option("--at", metavar="ROW,COL", callback=_place, help="A position of the map, to see its box.")
@click.option("--without-gates", is_flag=True, help="Leave out what reads the whole map at once.")
@click.option("--no-pretrained", is_flag=True, help="Random weights; nothing is fetched.")
@click.option("--input-size", metavar="C,H,W", help="Of one input; the model's own unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def receptive_field(
    model: str,
    layer: str,
    channel: int | None,
    at: tuple[int, int] | None,
    without_gates: bool,
    no_pretrained: bool,
    input_size: str | None,
    as_json: bool,
) -> None:
    """What the positions of a LAYER of MODEL read of the image.

    Position i reads size pixels from i * stride - padding on. With --at also the box of that position, as top, left,
    bottom and right, and how many pixels the image's border cuts off at each of these sides.

    \b
    Example:
      torchloupe receptive-field torchvision/resnet50 layer1 --no-pretrained --at 10,3
    """
    import torchloupe as tl
    from torchloupe._tables import aligned

    size = None if input_size is None else _shape(input_size)
    handle = _load(model, no_pretrained)
    with _sized(size):
        found = tl.receptive_field(handle, layer, channel, without_gates=without_gates, input_size=size)
    names = ("layer", "channel", "size", "stride", "padding", "regular", "grid", "image")
    row = {name: getattr(found, name) for name in names}
    if at is not None:
        row |= {"box": found.box(*at), "cut": found.clipped(*at).cut}
    if as_json:
        _print(json.dumps({**row, "measured": found.measured}))
        return
    if found.measured:
        _say(f"measured, for {found.measured}")
    cells = (_cell(value, "," if name in ("box", "cut") else "x") for name, value in row.items())
    _print(aligned([tuple(row), tuple(cells)]))


def _shape(text: str) -> tuple[int, int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise BadInput(f"--input-size is C,H,W as in 3,224,224; got {text!r}")
    channels, height, width = map(int, parts)
    return channels, height, width


@main.command()
@click.option("--out", required=True, type=FILE, help="Folder for what is written.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the scenes and the masks.")
@click.option("--count", type=click.IntRange(min=1), help="How many scenes.")
def demo(out: Path, seed: int, count: int | None) -> None:
    """A page of results on the embedded model.

    Everything is made offline, from scenes whose truth is known; the last line printed says where the page is.

    \b
    Example:
      torchloupe demo --out demo
    """
    from torchloupe._demo import write_demo

    page = write_demo(out, seed=seed) if count is None else write_demo(out, seed=seed, count=count)
    _print(click.format_filename(page))


# -- printing ---------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """One message on stderr, in place of a progress bar if there is one."""
    click.echo(("\r\x1b[K" if sys.stderr.isatty() else "") + f"torchloupe: {text}", err=True)


def _print(text: str) -> None:
    click.echo(("\r\x1b[K" if sys.stdout.isatty() and sys.stderr.isatty() else "") + text)


def _cell(value: Any, between: str = "x") -> str:
    if isinstance(value, tuple):
        return between.join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Rows in columns; where a terminal is too narrow, the widest columns are wrapped at spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in zip(*rows, strict=True)]
    while width and sum(widths) + 2 * (len(widths) - 1) > width and widths != words:
        widths[max((one for one in range(len(words)) if widths[one] > words[one]), key=widths.__getitem__)] -= 1
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, size) for cell, size in zip(row, widths, strict=True)]
        lines += ["  ".join(map(str.ljust, parts, widths)) for parts in itertools.zip_longest(*cells, fillvalue="")]
    return "\n".join(line.rstrip() for line in lines)


# Commands of files of their own, which need what is above.
from torchloupe import (  # noqa: E402
    cli_compare,  # noqa: F401
    cli_embedding,  # noqa: F401
    cli_images,  # noqa: F401
    cli_influence,  # noqa: F401
    cli_looking,  # noqa: F401
    cli_making,  # noqa: F401
    cli_scan,  # noqa: F401
)
