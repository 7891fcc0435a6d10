"""The commands `torchloupe dream | invert | fool | texture | stylize | train-stylizer`: images made from images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchloupe.cli import FILE, _print, _say, main
from torchloupe.cli_looking import _opened, _written
from torchloupe.cli_making import _size
from torchloupe.cli_options import of_a_model, of_weights
from torchloupe_core.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from torchloupe_core.results import Result

__all__ = ["dream", "fool", "invert", "stylize", "texture", "train_stylizer"]

MODEL = click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
IMAGES = click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=FILE)
STEPS = click.IntRange(min=1)
OPTIMIZER = click.option("--optimizer", type=click.Choice(["lbfgs", "adam"]), default="lbfgs", show_default=True)
LAYERS = click.option(
    "--style-layer", "layers", multiple=True, metavar="LAYER", help="One of each resolution unless given."
)
LONGEST = click.option("--size", type=click.IntRange(min=1), help="Pixels of the longer side to scale pictures to.")


def _fraction(ctx: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{text!r} is no number, as in 0.03, and no fraction, as in 8/255") from None


def _mix(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> Any:
    """A style's name or number, or names with their weights."""
    if not texts:
        return 0
    pairs = [text.rpartition("=") for text in texts]
    if len(pairs) == 1 and not pairs[0][1]:
        return int(texts[0]) if texts[0].isdecimal() else texts[0]
    try:
        return {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError:
        raise click.BadParameter("a mix of styles is NAME=WEIGHT for each, as in flower=0.3") from None


def _each(
    images: tuple[Path, ...],
    out: Path,
    verb: str,
    make: Callable[[Path], Any],
    tell: Callable[[Path, str, Any], dict[str, Any]],
    as_json: bool,
) -> None:
    """One picture after the other: made, written and told. What cannot be done is reported, the rest goes on.

    tell: writes what was made of a picture under a stem, and gives its facts, among them the `line` to print.
    """
    from torchloupe._folder import named
    from torchloupe_core.results import writable_folder

    pictures = named(images, out)
    writable_folder(out)
    failed = 0
    for name, path in pictures.items():
        try:
            made = make(path)
        except BadInput as error:
            if len(pictures) == 1:
                raise
            _say(f"{click.format_filename(path)}: {error}")
            failed += 1
            continue
        except KeyboardInterrupt:
            _say(f"stopped at {click.format_filename(path)}")
            raise click.exceptions.Exit(130) from None
        facts = {"image": path, **tell(out / f"{name}.{verb}", name, made)}
        line = facts.pop("line")
        _print(json.dumps(facts, default=str) if as_json else f"{line}  {click.format_filename(facts['png'])}")
        if made.stopped:
            _say(made.stopped)
            if "interrupted" in made.stopped:
                raise click.exceptions.Exit(130)
            failed += 1
    if failed:
        raise click.exceptions.Exit(1 if failed < len(pictures) else 2)


def _save(stem: Path, image: Tensor, found: Result, **figure: Any) -> dict[str, Any]:
    """The picture itself and the data, with a drawing of both where there is more to see."""
    from torchloupe_core.results import write_whole
    from torchloupe_core.stylizer import png

    path = stem.with_name(stem.name + ".png")
    write_whole(path, png(image))
    facts: dict[str, Any] = {"png": path, "npz": found.save(stem.with_name(stem.name + ".npz"))}
    if figure:
        from torchloupe_core import plots

        facts["figure"] = stem.with_name(stem.name + ".figure.png")
        write_whole(facts["figure"], plots.png(found, **figure))
    return facts


# -- dream, invert, fool ----------------------------------------------------------------------------------------------


@main.command(no_args_is_help=True)
@IMAGES
@click.option("--target", required=True, help="As in layer3, layer3:17 or logit:dog.")
@click.option("--octaves", type=STEPS, default=4, show_default=True, help="Sizes it is changed at.")
@click.option("--octave-scale", type=float, default=1.4, show_default=True)
@click.option("--steps", type=STEPS, default=12, show_default=True, help="At each size.")
@click.option("--lr", type=float, default=0.006, show_default=True, help="Mean change of a pixel a step.")
@click.option("--tile", type=STEPS, default=512, show_default=True, help="Pixels that the model is shown at once.")
@LONGEST
@MODEL
@of_a_model
def dream(
    images: tuple[Path, ...], out: Path, model: str, progress: bool | None, as_json: bool, seed: int, **asked: Any
) -> None:
    """Each IMAGE with more of what a target answers to: DeepDream.

    Pictures keep their size; large ones go through the model in tiles. For x.jpg, --out gets x.jpg.dream.png and
    x.jpg.dream.npz, which torchloupe.open reads; what is there already is replaced. Ctrl-C ends the run, and what was
    made so far is written.

    \b
    Example:
      torchloupe dream photo.jpg --target layer3 --out dreams
    """
    import torchloupe as tl

    tl.target(asked["target"])
    handle, asked = _model(model, seed, asked)

    def make(path: Path) -> Any:
        return tl.dream(handle, path, seed=seed, progress=progress, interruptible=True, **asked)

    def tell(stem: Path, name: str, made: Any) -> dict[str, Any]:
        score = made.scores[0].item()
        facts = {"target": asked["target"], "score": score, "line": f"{name}  {asked['target']} = {score:.4g}"}
        return {**facts, **_save(stem, made.images[0], made)}

    _each(images, out, "dream", make, tell, as_json)


@main.command(no_args_is_help=True)
@IMAGES
@click.option("--layer", "layers", multiple=True, required=True, help="Several make a row.")
@click.option("--tv", type=float, default=0.3, show_default=True, help="Weight of the total variation.")
@click.option("--steps", type=STEPS, default=200, show_default=True)
@OPTIMIZER
@MODEL
@of_a_model
def invert(
    images: tuple[Path, ...],
    out: Path,
    layers: tuple[str, ...],
    model: str,
    progress: bool | None,
    as_json: bool,
    seed: int,
    **asked: Any,
) -> None:
    """What each LAYER still knows of each IMAGE: an image made from noise that it cannot tell from the given one.

    For x.jpg, --out gets x.jpg.invert.png, the image of the last layer, x.jpg.invert.figure.png, all of them with how
    far they are off, and x.jpg.invert.npz, which torchloupe.open reads; what is there already is replaced. Ctrl-C ends
    the run, and what was made so far is written.

    \b
    Example:
      torchloupe invert photo.jpg --layer layer1 --layer layer2 --layer layer3 --out rows
    """
    import torchloupe as tl

    handle, asked = _model(model, seed, asked)

    def make(path: Path) -> Any:
        return tl.invert(handle, path, list(layers), seed=seed, progress=progress, interruptible=True, **asked)

    def tell(stem: Path, name: str, made: Any) -> dict[str, Any]:
        lost = {layer: score for layer, score in zip(made.targets, made.scores.tolist(), strict=True)}  # noqa: C416
        words = ", ".join(f"{layer} {score:.3g}" for layer, score in lost.items())
        facts = {"distances": lost, "rmse": made.diagnostics["rmse"], "line": f"{name}  {words}"}
        return {**facts, **_save(stem, made.images[-1], made, curve=True)}

    _each(images, out, "invert", make, tell, as_json)


@main.command(no_args_is_help=True)
@IMAGES
@click.option("--target", help="The class to be seen; any other than the one seen unless given.")
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option("--eps", callback=_fraction, metavar="N or N/255", help="8/255 for linf, 1 for l2 unless given.")
@click.option("--method", default="pgd", show_default=True, help="pgd or fgsm.")
@click.option("--loss", type=click.Choice(["prob", "margin"]), default="prob", show_default=True)
@click.option("--steps", type=STEPS, help="Of pgd, 20 unless given.")
@click.option("--restarts", type=click.IntRange(min=0), help="Of pgd, from random places near the picture.")
@MODEL
@of_a_model
def fool(
    images: tuple[Path, ...],
    out: Path,
    model: str,
    progress: bool | None,
    as_json: bool,
    seed: int,
    steps: int | None,
    restarts: int | None,
    **asked: Any,
) -> None:
    """Each IMAGE changed so little that it looks the same, and so that the model sees something else.

    For x.jpg, --out gets x.jpg.fool.png, the changed picture, x.jpg.fool.figure.png, before, difference and after, and
    x.jpg.fool.npz, which torchloupe.open reads; what is there already is replaced. No pixel of the picture written is
    further off than --eps. Ctrl-C ends the run, and what was made so far is written.

    \b
    Example:
      torchloupe fool photo.jpg --target logit:fish --eps 4/255 --out fooled
    """
    import torchloupe as tl

    asked |= {key: value for key, value in (("steps", steps), ("restarts", restarts)) if value is not None}
    handle, asked = _model(model, seed, asked)

    def make(path: Path) -> Any:
        return tl.fool(handle, path, seed=seed, progress=progress, interruptible=True, **asked)

    def tell(stem: Path, name: str, made: Any) -> dict[str, Any]:
        before, after = made.seen(0)
        success = bool(made.success[0])
        facts = {"before": before, "after": after, "fooled": success, "largest": made.distances[0, 0].item()}
        facts |= {
            "l2": made.distances[0, 1].item(),
            "line": f"{name}  {before} -> {after}{'' if success else '  failed'}",
        }
        return {**facts, **_save(stem, made.images[0], made, most=1)}

    _each(images, out, "fool", make, tell, as_json)


# -- texture, stylize -------------------------------------------------------------------------------------------------


@main.command(no_args_is_help=True)
@IMAGES
@click.option("--n", type=STEPS, default=1, show_default=True, help="Textures of each picture.")
@click.option("--size", callback=_size, metavar="N or H,W", help="In pixels; the picture's own unless given.")
@click.option("--steps", type=STEPS, default=300, show_default=True)
@click.option("--tv", type=float, default=0.05, show_default=True, help="Weight of the total variation.")
@LAYERS
@OPTIMIZER
@MODEL
@of_a_model
def texture(
    images: tuple[Path, ...],
    out: Path,
    layers: tuple[str, ...],
    model: str,
    progress: bool | None,
    as_json: bool,
    seed: int,
    **asked: Any,
) -> None:
    """New textures like each IMAGE, made from noise until their Gram matrices agree.

    For x.jpg, --out gets x.jpg.texture.png, the first of them, x.jpg.texture.figure.png, all, and x.jpg.texture.npz,
    which torchloupe.open reads; what is there already is replaced. Ctrl-C ends the run, and what was made so far is
    written.

    \b
    Example:
      torchloupe texture bark.jpg --model torchvision/vgg19 --size 256 --out textures
    """
    import torchloupe as tl

    handle, asked = _model(model, seed, asked)
    asked["layers"] = layers or None

    def make(path: Path) -> Any:
        return tl.texture(handle, path, seed=seed, progress=progress, interruptible=True, **asked)

    def tell(stem: Path, name: str, made: Any) -> dict[str, Any]:
        facts = {"distances": made.scores.tolist(), "line": f"{name}  distance {made.scores[0].item():.3g}"}
        return {**facts, **_save(stem, made.images[0], made, curve=True)}

    _each(images, out, "texture", make, tell, as_json)


def _of_style(command: Callable[..., None]) -> Callable[..., None]:
    """What can be asked of a style transfer by optimisation."""
    for option in (
        click.option("--style", "styles", multiple=True, type=FILE, help="A picture; several are mixed."),
        click.option("--weight", "weights", multiple=True, type=float, help="Of each style, in order."),
        click.option("--style-weight", type=float, default=1.0, show_default=True),
        click.option("--content-weight", type=float, default=1.0, show_default=True),
        click.option("--tv", type=float, default=0.05, show_default=True, help="Weight of the total variation."),
        click.option("--preserve-colour", is_flag=True, help="With the colours of the content."),
        click.option("--content-layer", help="The last of the resolution in the middle unless given."),
        click.option("--style-size", type=click.IntRange(min=1), help="Pixels of the longer side of styles."),
        click.option("--steps", type=STEPS, default=100, show_default=True),
        click.option("--stylizer", type=FILE, help="What train-stylizer wrote, in place of --style."),
        click.option("--in-style", multiple=True, callback=_mix, metavar="NAME or NAME=WEIGHT", help="Of a stylizer."),
    ):
        command = option(command)
    return command


@main.command(no_args_is_help=True)
@IMAGES
@_of_style
@LONGEST
@LAYERS
@OPTIMIZER
@MODEL
@of_a_model
def stylize(
    images: tuple[Path, ...],
    out: Path,
    styles: tuple[Path, ...],
    weights: tuple[float, ...],
    layers: tuple[str, ...],
    stylizer: Path | None,
    in_style: Any,
    size: int | None,
    model: str,
    progress: bool | None,
    as_json: bool,
    seed: int,
    **asked: Any,
) -> None:
    """Each IMAGE in the style of others, by optimisation, or in one pass of a trained network.

    Pictures keep their size. For x.jpg, --out gets x.jpg.stylize.png and, of an optimisation, x.jpg.stylize.npz, which
    torchloupe.open reads; what is there already is replaced. Ctrl-C ends the run, and what was made so far is written.

    \b
    Example:
      torchloupe stylize photo.jpg --style waves.jpg --model torchvision/vgg19 --out styled
      torchloupe stylize photos --stylizer waves.npz --in-style waves --out styled
    """
    import torchloupe as tl

    if (stylizer is None) == (not styles):
        raise BadInput("name the style by --style, one or several, or a trained network by --stylizer")
    if stylizer is not None:
        _apply(images, out, stylizer, in_style, size, as_json, progress)
        return
    handle, asked = _model(model, seed, asked)
    asked |= {"layers": layers or None, "weights": weights or None, "size": size}

    def make(path: Path) -> Any:
        return tl.stylize(handle, path, list(styles), seed=seed, progress=progress, interruptible=True, **asked)

    def tell(stem: Path, name: str, made: Any) -> dict[str, Any]:
        facts = {"distance": made.scores[0].item(), "content": made.diagnostics["content"][0]}
        line = "{name}  style {distance:.3g}, content {content:.3g}".format(name=name, **facts)
        return {**facts, "line": line, **_save(stem, made.images[0], made)}

    _each(images, out, "stylize", make, tell, as_json)


class _Applied:
    """A picture that a network made at once."""

    stopped = ""

    def __init__(self, image: Tensor) -> None:
        self.image = image


def _apply(
    images: tuple[Path, ...], out: Path, file: Path, style: Any, size: int | None, as_json: bool, progress: bool | None
) -> None:
    """Every picture through a trained network."""
    import torchloupe as tl
    from torchloupe._folder import named
    from torchloupe_adapters.tqdm import progress_bar
    from torchloupe_core.results import write_whole
    from torchloupe_core.stylizer import png

    stylizer = tl.open(file)
    if not isinstance(stylizer, tl.Stylizer):
        raise BadInput(f"{file} is a {type(stylizer).__name__}, no trained stylizer")
    stylizer.mix(style)
    total, done = len(named(images, out)), 0
    with progress_bar("stylize", " pictures", progress if total > 1 else False) as report:

        def make(path: Path) -> _Applied:
            nonlocal done
            made = _Applied(stylizer.apply(path, style, size=size)[0])
            done += 1
            report(done, total)
            return made

        def tell(stem: Path, name: str, made: _Applied) -> dict[str, Any]:
            target = stem.with_name(stem.name + ".png")
            write_whole(target, png(made.image))
            return {"line": name, "png": target}

        _each(images, out, "stylize", make, tell, as_json)


@main.command(no_args_is_help=True)
@click.argument("styles", metavar="STYLE...", nargs=-1, required=True, type=FILE)
@click.option("--data", required=True, type=FILE, help="Folder of pictures to train on.")
@click.option("--out", required=True, type=FILE, help="File for the network, as in waves.npz.")
@click.option("--steps", type=STEPS, default=2000, show_default=True)
@click.option("--batch-size", type=STEPS, default=4, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True)
@click.option("--style-weight", type=float, default=1.0, show_default=True)
@click.option("--content-weight", type=float, default=1.0, show_default=True)
@click.option("--tv", type=float, default=0.05, show_default=True, help="Weight of the total variation.")
@click.option("--content-layer", help="The last of the resolution in the middle unless given.")
@click.option("--style-size", type=click.IntRange(min=1), help="Pixels of the longer side of styles.")
@click.option("--width", type=STEPS, default=32, show_default=True, help="Channels of the network.")
@click.option("--blocks", type=click.IntRange(min=0), default=5, show_default=True, help="Of the network.")
@click.option(
    "--training", type=FILE, help="File that training is kept in, to go on from; OUT.training.npz unless given."
)
@click.option("--every", type=STEPS, default=200, show_default=True, help="Steps between two writes of it.")
@LAYERS
@MODEL
@of_weights
def train_stylizer(
    styles: tuple[Path, ...],
    data: Path,
    out: Path,
    training: Path | None,
    layers: tuple[str, ...],
    model: str,
    progress: bool | None,
    as_json: bool,
    seed: int,
    **asked: Any,
) -> None:
    """Trains a network that puts pictures of any size into each STYLE in one pass.

    --out gets the network, which torchloupe stylize --stylizer and torchloupe.open read, and OUT.png, pictures in every
    style. Stopped, also with Ctrl-C, the same command goes on where it was, and what was trained so far is written.

    \b
    Example:
      torchloupe train-stylizer waves.jpg mosaic.jpg --data photos --model torchvision/vgg16 --out styles.npz
    """
    import torchloupe as tl
    from torchloupe_core.results import writable_folder

    out = out if out.suffix == ".npz" else out.with_name(out.name + ".npz")
    writable_folder(out.parent)
    kept = out.with_name(f"{out.stem}.training.npz") if training is None else training
    handle, asked = _model(model, seed, asked)
    asked["layers"] = layers or None
    made = tl.train_stylizer(
        handle, list(styles), data, checkpoint=kept, seed=seed, progress=progress, interruptible=True, **asked
    )
    png, npz = _written(made, out.with_name(out.stem))
    facts = {"styles": list(made.styles), "steps": made.diagnostics["steps"], "png": png, "npz": npz}
    facts |= {"style": made.losses[-20:, 1].mean().item(), "content": made.losses[-20:, 0].mean().item()}
    line = "{steps} steps, style {style:.3g}, content {content:.3g}".format(**facts)
    _print(json.dumps(facts, default=str) if as_json else f"{line}  {click.format_filename(npz)}")
    if made.stopped:
        _say(made.stopped + "; the same command goes on from there")
        raise click.exceptions.Exit(130 if "interrupted" in made.stopped else 1)


def _model(name: str, seed: int, asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model opened, and what is asked of the recipe."""
    how = {key: asked.pop(key) for key in ("checkpoint", "no_pretrained", "pretrained", "device")}
    return _opened(name, how.pop("no_pretrained"), how.pop("pretrained"), seed=seed, **how), asked
