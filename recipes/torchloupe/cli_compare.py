"""The commands `torchloupe compare | recommend | audit`: methods side by side, and what a model goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from torchloupe.cli import FILE, _options, _print, _say, main
from torchloupe.cli_looking import _opened
from torchloupe.cli_options import device_of_rank, kept, of_a_model, of_weights, speaks
from torchloupe_core.errors import BadInput

__all__ = ["audit", "compare", "recommend"]


@main.command(no_args_is_help=True)
@click.argument("folder", type=FILE)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--methods", multiple=True, metavar="M,M", help="Of torchloupe methods explain; four unless given.")
@click.option("--metrics", multiple=True, metavar="M,M", help="Of torchloupe methods compare.")
@click.option("--across", type=click.Choice(["backends"]), help="Each method as every backend has it.")
@click.option("--masks", type=FILE, help="Folder of pictures named like those in FOLDER, white where the object is.")
@click.option("--target", help="As in logit:dog; each picture's predicted class unless given.")
@click.option("--layer", help="Where methods that read a layer look; the last spatial one unless given.")
@click.option("--option", "options", multiple=True, metavar="NAME.KEY=VALUE", callback=_options, help="Of one of them.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Inputs through the model at once.")
@click.option("--memory/--no-memory", default=None, help="Measure the most that is held for one picture.")
@kept
@of_a_model
def compare(
    folder: Path,
    model: str,
    methods: tuple[str, ...],
    metrics: tuple[str, ...],
    masks: Path | None,
    options: dict[str, Any],
    out: Path,
    as_json: bool,
    progress: bool | None,
    **asked: Any,
) -> None:
    """Explains the pictures of FOLDER by several methods and judges the maps by several metrics.

    Prints a table, and writes it into --out as comparison.csv, .tex, .npz, a page and drawings. With --store it goes on
    where it was stopped, and under torchrun all processes work together.

    \b
    Example:
      torchloupe compare photos --model timm/resnet50 --methods grad_cam,rise --option rise.n_masks=500 --out study
      torchrun --nproc-per-node 4 --no-python torchloupe compare photos --store photos.study --out study
    """
    import torchloupe as tl
    from torchloupe_core import plots
    from torchloupe_core.results import writable_folder, write_whole

    writable_folder(out)
    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device", "seed")}
    chosen: dict[str, Any] = {
        name: _names(given) for name, given in (("methods", methods), ("metrics", metrics)) if given
    }
    found = tl.compare(
        _opened(model, **{**weights, "device": device_of_rank(weights["device"])}),
        str(folder),
        masks=None if masks is None else str(masks),
        options=_by_name(options),
        seed=weights["seed"],
        progress=progress if speaks() else False,
        **chosen,
        **asked,
    )
    if not speaks():
        return
    found.to_csv(out / "comparison.csv")
    found.to_latex(out / "comparison.tex")
    found.save(out / "comparison")
    found.html(out / "comparison.html")
    for kind in ("bars", *(["maps"] if len(found.images) else []), "cost", "agreement"):
        write_whole(out / f"{kind}.png", plots.png(found, kind=kind))
    for name, why in found.skipped.items():
        _say(why if name in why else f"{name}: {why}")
    if as_json:
        for row in found.rows:
            _print(json.dumps({name: None if value != value else value for name, value in vars(row).items()}))
    else:
        _print(found.table().rstrip())
        _print(click.format_filename(out / "comparison.html"))
    raise click.exceptions.Exit(1 if found.skipped else 0)


def _names(given: tuple[str, ...]) -> list[str]:
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def _by_name(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"rise": {"n_masks": 500}}` of `{"rise.n_masks": 500}`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        name, dot, option = key.rpartition(".")
        if not dot:
            raise BadInput(f"--option {key} does not say whose it is, as in rise.{key}=...")
        found.setdefault(name, {})[option] = value
    return found


@main.command(no_args_is_help=True)
@click.argument("folder", type=FILE)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--methods", multiple=True, metavar="M,M", help="The candidates; one of each kind unless given.")
@click.option("--metrics", multiple=True, metavar="M,M", help="Of torchloupe methods compare.")
@click.option("--masks", type=FILE, help="Folder of pictures named like those in FOLDER, white where the object is.")
@click.option("--target", help="As in logit:dog; each picture's predicted class unless given.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Seconds that one picture may take.")
@of_weights
def recommend(
    folder: Path,
    model: str,
    methods: tuple[str, ...],
    metrics: tuple[str, ...],
    masks: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Says which method of explain to use on a model, from the pictures of FOLDER; a few dozen will do.

    \b
    Example:
      torchloupe recommend photos --model timm/resnet50 --budget 1
    """
    import torchloupe as tl

    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device", "seed")}
    chosen: dict[str, Any] = {
        name: _names(given) for name, given in (("methods", methods), ("metrics", metrics)) if given
    }
    found = tl.recommend(
        _opened(model, **weights),
        str(folder),
        masks=None if masks is None else str(masks),
        seed=weights["seed"],
        **chosen,
        **asked,
    )
    _print(
        json.dumps({"recommended": found.recommended, "mean_ranks": found.mean_ranks()})
        if as_json
        else found.table().rstrip()
    )


@main.command(no_args_is_help=True)
@click.argument("folder", type=FILE)
@click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")
@click.option("--masks", type=FILE, help="Folder of pictures named like those in FOLDER, white where the object is.")
@click.option(
    "--method", default="captum.integrated_gradients", show_default=True, help="Of torchloupe methods explain."
)
@click.option("--width", type=click.IntRange(min=3), help="Of a region, in pixels; a fifth of the side unless given.")
@click.option("--images", type=click.IntRange(min=5), default=1000, show_default=True, help="Looked at, at most.")
@of_a_model
def audit(folder: Path, model: str, masks: Path | None, out: Path, as_json: bool, **asked: Any) -> None:
    """Looks for small regions that recur in the pictures of a class and decide for it by themselves.

    Prints what was found, and writes it into --out as audit.npz and audit.png.

    \b
    Example:
      torchloupe audit photos --model mine --checkpoint mine.pt --out audit
    """
    import torchloupe as tl
    from torchloupe_core import plots
    from torchloupe_core.results import writable_folder, write_whole

    writable_folder(out)
    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device", "seed")}
    found = tl.audit(
        _opened(model, **weights),
        str(folder),
        masks=None if masks is None else str(masks),
        seed=weights["seed"],
        **asked,
    )
    found.save(out / "audit")
    write_whole(out / "audit.png", plots.png(found))
    for name, why in found.skipped.items():
        _say(why if name in why else f"{name}: {why}")
    facts = {name: getattr(found, name) for name in ("classes", "shares", "covered", "transplanted", "control")}
    _print(json.dumps(facts) if as_json else found.table().rstrip())
    raise click.exceptions.Exit(1 if found.skipped else 0)
