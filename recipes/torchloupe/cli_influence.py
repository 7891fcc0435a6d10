"""The commands `torchloupe influence | clean`: training pictures a prediction rests on; labels that may be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchloupe.cli import FILE, _options, _print, _say, main
from torchloupe.cli_looking import _opened, _tell, _written
from torchloupe.cli_options import kept, of_a_model
from torchloupe_core.errors import BadInput

if TYPE_CHECKING:
    from torchloupe_core.influence import Influence

__all__ = ["clean", "influence"]

SCORES = ("loss", "margin", "self_influence", "neighbors")  # named here, for --help loads no tensors


@main.command(no_args_is_help=True)
@click.option("--train", required=True, type=FILE, help="Folder with a subfolder of pictures for each class.")
@click.option(
    "--test", "tests", required=True, multiple=True, type=FILE, help="Picture or folder asked about; several."
)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--method", default="cg", show_default=True, help='"torchloupe methods influence" lists them.')
@click.option("--layers", metavar="L,L", help='Layers that take part, or "all"; the head alone unless given.')
@click.option("--target", help="As in logit:dog; the loss for the label, or for the predicted class, unless given.")
@click.option("--weight-decay", type=click.FloatRange(min=0), help="Of the training, for the mean loss.")
@click.option("--damping", type=click.FloatRange(min=0), help="Added to the curvature; chosen unless given.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", callback=_options, help="Of the method.")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="How many of each kind are printed.")
@click.option("--relative", is_flag=True, help="Scores over the norm of the training picture's gradient.")
@click.option("--batch-size", type=click.IntRange(1), help="Pictures through the model at once.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read pictures.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True, help="GiB.")
@kept
@of_a_model
def influence(
    train: Path,
    tests: tuple[Path, ...],
    model: str,
    out: Path,
    layers: str | None,
    options: dict[str, Any],
    k: int,
    relative: bool,
    as_json: bool,
    progress: bool | None,
    seed: int,
    **asked: Any,
) -> None:
    """The training pictures that support what the model says of each --test picture, and those that speak against it.

    The subfolders of --train are classes of the model. --out gets influence.npz, all scores, which torchloupe.open
    reads, and influence.png, a drawing; what is there already is replaced. What speaks against the scores is said on
    stderr; pictures that cannot be read are reported and left out.

    \b
    Example:
      torchloupe influence --model mine --checkpoint mine.pt --train photos --test cat.jpg --method ekfac \\
        --layers all --out why
    """
    import torchloupe as tl
    from torchloupe._folder import named
    from torchloupe_core.results import writable_folder

    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device")}
    if not train.is_dir():
        raise BadInput(f"--train is a folder with a subfolder of pictures for each class; {train} is no folder")
    pictures = [str(path) for path in named(tests, out).values()]
    writable_folder(out)
    through = layers if layers in (None, "all") else [one.strip() for one in layers.split(",")]
    handle = _opened(model, seed=seed, **weights)
    found = tl.influence(handle, train, pictures, layers=through, seed=seed, progress=progress, **asked, **options)
    found = found.relative() if relative else found
    for name, why in found.skipped.items():
        text = " ".join(why.split())
        _say(text if name in text else f"{name}: {text}")
    for warning in found.warnings:
        _say(warning)
    _rows(found, pictures, k, as_json)
    png, npz = _written(found, out / "influence")
    facts = {"method": found.method, "layers": found.layers, "units": found.units, "sign": found.sign}
    shape = "x".join(map(str, found.scores.shape))
    _tell(facts | {"diagnostics": found.diagnostics, "png": png, "npz": npz}, f"{shape} scores", png, as_json)
    raise click.exceptions.Exit(1 if found.skipped else 0)


def _rows(found: Influence, pictures: list[str], k: int, as_json: bool) -> None:
    """A line for each picture asked about and each training picture that matters most to it."""
    asked = [pictures[index] for index in found.test_indices.tolist()] or ["itself"]
    for kind in ("helpful", "harmful"):
        ranking = found.top(k, kind)
        for row, test in enumerate(asked):
            for index, score in zip(ranking.indices[row].tolist(), ranking.scores[row].tolist(), strict=True):
                name = found.names.get(str(index), f"image {index}")
                if as_json:
                    facts = {"test": test, "about": found.about[row], "kind": kind, "train": name, "score": score}
                    _print(json.dumps(facts))
                else:
                    _print(f"{click.format_filename(test)}  {kind}  {score:+.4g}  {click.format_filename(name)}")


@main.command(no_args_is_help=True)
@click.argument("folder", type=FILE)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--by", type=click.Choice(SCORES), help="One score to go by; all together unless given.")
@click.option("-k", "count", type=click.IntRange(1), default=20, show_default=True, help="How many are printed.")
@click.option("--page", type=click.IntRange(1), default=200, show_default=True, help="How many are on the page.")
@click.option("--neighbors", type=click.IntRange(1), default=10, show_default=True, help="How many are asked.")
@click.option("--weight-decay", type=click.FloatRange(min=0), help="Of the training, for the mean loss.")
@click.option("--damping", type=click.FloatRange(min=0), help="Added to the curvature; chosen unless given.")
@click.option("--batch-size", type=click.IntRange(1), help="Pictures through the model at once.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read pictures.")
@of_a_model
def clean(
    folder: Path,
    model: str,
    out: Path,
    by: str | None,
    count: int,
    page: int,
    neighbors: int,
    as_json: bool,
    progress: bool | None,
    seed: int,
    **asked: Any,
) -> None:
    """The pictures in FOLDER whose labels may be wrong, to a model that was trained on them, most suspicious first.

    The subfolders of FOLDER are classes of the model. --out gets suspects.html, a page to look through them and mark
    them, suspects.npz, all scores, which torchloupe.open reads, and suspects.png, a drawing; what is there already is
    replaced. Pictures that cannot be read are reported and left out.

    \b
    Example:
      torchloupe clean photos --model mine --checkpoint mine.pt --out labels
    """
    import torchloupe as tl
    from torchloupe_core.results import writable_folder

    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device")}
    if not folder.is_dir():
        raise BadInput(f"FOLDER holds a subfolder of pictures for each class; {folder} is no folder")
    writable_folder(out)
    handle = _opened(model, seed=seed, **weights)
    found = tl.clean(handle, str(folder), k=neighbors, seed=seed, progress=progress, **asked)
    for name, why in found.skipped.items():
        text = " ".join(why.split())
        _say(text if name in text else f"{name}: {text}")
    for row in found.order(by)[:count].tolist():
        facts: dict[str, Any] = {
            "picture": found.name(row),
            "label": found.class_name(int(found.labels[row])),
            "seen": found.class_name(int(found.predictions[row])),
            "probability": round(found.confidences[row].item(), 4),
            "suspicion": round(found.by(by)[row].item(), 6),
        }
        name = click.format_filename(found.name(row))
        line = "{label} -> {seen}  {probability:.0%}  {suspicion:.4g}".format(**facts)
        _print(json.dumps(facts) if as_json else f"{name}  {line}")
    html = found.html(out / "suspects.html", k=page)
    png, npz = _written(found, out / "suspects", by=by)
    _tell({"images": len(found), "html": html, "png": png, "npz": npz}, f"{len(found)} labels", html, as_json)
    raise click.exceptions.Exit(1 if found.skipped else 0)
