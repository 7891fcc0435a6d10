"""The commands `torchloupe embed` and `torchloupe neighbors`: a folder of pictures as the model sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchloupe.cli import FILE, _options, _print, _say, main
from torchloupe.cli_looking import _opened, _tell, _written
from torchloupe.cli_options import kept, of_a_model, source

if TYPE_CHECKING:
    from torchloupe_core.neighbors import Neighbors

__all__ = ["embed", "neighbors"]

WORKERS = click.option(
    "--workers", type=click.IntRange(min=0), help="Processes that read pictures; chosen unless given."
)
BATCH = click.option("--batch-size", type=click.IntRange(min=1), help="Pictures through the model at once.")
LAYER = click.option("--layer", help="Whose features; what goes into the classifier unless given.")
MODEL = click.option("--model", default="demo", show_default=True, help="As in timm/resnet50 or torchvision/resnet50.")


@main.command(no_args_is_help=True)
@click.argument("folder", required=False, type=FILE)
@MODEL
@LAYER
@click.option(
    "--method", default="umap", show_default=True, help='As in pca or tsne; "torchloupe methods embed" lists them.'
)
@click.option("--dims", type=click.IntRange(2, 3), default=2, show_default=True)
@click.option("--pca", type=click.IntRange(min=3), help="Lay out so many principal components instead of the features.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", callback=_options, help="Of the method.")
@click.option("--images", is_flag=True, help="Draw small pictures in place of points.")
@click.option("--grid", is_flag=True, help="Also the even grid, one picture in each cell.")
@click.option("--page/--no-page", default=True, show_default=True, help="Also a page to look around in.")
@BATCH
@WORKERS
@kept
@of_a_model
def embed(
    folder: Path | None,
    model: str,
    out: Path,
    images: bool,
    grid: bool,
    page: bool,
    options: dict[str, Any],
    as_json: bool,
    progress: bool | None,
    seed: int,
    store: Path | None,
    **asked: Any,
) -> None:
    """Every picture of FOLDER as a point, near those that the model sees alike.

    FOLDER may be a store that torchloupe scan made. Subfolders give labels. --out gets embedding.npz, the points, which
    torchloupe.open reads; embedding.png, a drawing; embedding.html, a page that needs nothing else; with --grid also
    grid.npz and grid.png. What is there already is replaced. Pictures that cannot be read are reported and left out.

    \b
    Example:
      torchloupe embed photos --model timm/resnet50 --method umap --grid --out seen
    """
    import torchloupe as tl
    from torchloupe_adapters.tqdm import progress_bar
    from torchloupe_core.results import writable_folder

    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device")}
    shown, store = source(folder, store)
    writable_folder(out)
    handle = _opened(model, seed=seed, **weights)
    found = tl.embed(handle, shown, store=store, seed=seed, progress=progress, **asked, **options)
    _report(found.skipped)
    png, npz = _written(found, out / "embedding", images=images)
    facts = {"images": len(found), "layer": found.layer, "method": found.method, **found.diagnostics}
    _tell(facts | {"png": png, "npz": npz}, f"{len(found)} images at {found.layer}, {found.method}", png, as_json)
    if grid:
        png, npz = _written(cells := found.grid(), out / "grid")
        shape = "x".join(map(str, cells.shape))
        _tell({"shape": cells.shape, **cells.diagnostics, "png": png, "npz": npz}, f"grid {shape}", png, as_json)
    if page and found.dims == 2:
        with progress_bar("page", " images", progress) as report:
            path = found.html(out / "embedding.html", title=str(shown), progress=report)
        _tell({"page": path}, "page", path, as_json)
    raise click.exceptions.Exit(1 if found.skipped else 0)


@main.command(no_args_is_help=True)
@click.argument("queries", metavar="QUERY...", nargs=-1, required=True, type=FILE)
@click.option("--data", type=FILE, help="Folder to search, or a store that torchloupe scan made.")
@MODEL
@LAYER
@click.option("--k", type=click.IntRange(min=1), default=5, show_default=True, help="How many neighbours.")
@click.option("--space", type=click.Choice(["features", "pixels", "both"]), default="features", show_default=True)
@click.option("--metric", type=click.Choice(["cosine", "l2"]), default="cosine", show_default=True)
@click.option("--exclude-self", is_flag=True, help="Leave out a query that is in the folder itself.")
@click.option("--approximate", is_flag=True, help="Sooner for many queries; measures what it misses.")
@BATCH
@WORKERS
@kept
@of_a_model
def neighbors(
    queries: tuple[Path, ...],
    data: Path | None,
    model: str,
    out: Path,
    layer: str | None,
    space: str,
    as_json: bool,
    progress: bool | None,
    approximate: bool,
    seed: int,
    store: Path | None,
    resume: bool,
    engine: str | None,
    **asked: Any,
) -> None:
    """The pictures of a folder most like each QUERY.

    A QUERY is a file or a folder. --out gets neighbors.npz, which torchloupe.open reads, and neighbors.png, a drawing;
    pixels.npz too where both spaces are searched. What is there already is replaced. Printed is a line for each query
    and neighbour; pictures that cannot be read are reported and left out.

    \b
    Example:
      torchloupe neighbors cat.jpg --data photos --model timm/resnet50 --k 8 --space both --out alike
    """
    import torchloupe as tl
    from torchloupe._folder import named
    from torchloupe_core.results import writable_folder

    weights = {name: asked.pop(name) for name in ("no_pretrained", "pretrained", "checkpoint", "device")}
    pictures = [str(path) for path in named(queries, out).values()]
    where, store = source(data, store)
    writable_folder(out)
    handle = _opened(model, seed=seed, **weights)
    facts: dict[str, Any] = {"seed": seed, "progress": progress, **asked}
    found = []
    if space != "pixels":
        lasting: dict[str, Any] = {"store": store, "resume": resume, "engine": engine}
        one = tl.neighbors(handle, pictures, where, layer=layer, approximate=approximate, **lasting, **facts)
        found.append(one)
    if space != "features":
        own: dict[str, Any] = (
            {} if space == "both" else {"layer": layer, "approximate": approximate}
        )  # refused where they mean nothing
        found.append(tl.neighbors(handle, pictures, where, space="pixels", **own, **facts))
    first, beside = found[0], found[1] if len(found) > 1 else None
    _report({name: why for each in found for name, why in each.skipped.items()})
    png, npz = _written(first, out / "neighbors", beside=beside)
    if beside is not None:
        beside.save(out / "pixels.npz")
    for each in found:
        _rows(each, as_json)
    _tell({"png": png, "npz": npz, **first.diagnostics}, f"{len(first)} queries", png, as_json)
    raise click.exceptions.Exit(1 if first.skipped else 0)


def _rows(found: Neighbors, as_json: bool) -> None:
    names, asked = found.names or (), found.query_names or ()
    for query in range(len(found)):
        for rank in range(found.k):
            image, distance = names[query * found.k + rank], found.distances[query, rank].item()
            if as_json:
                facts = {"query": asked[query], "space": found.space, "rank": rank + 1}
                _print(json.dumps({**facts, "image": image, "distance": distance}))
            else:
                shown = [click.format_filename(asked[query]), found.space, str(rank + 1), f"{distance:.4g}"]
                _print("  ".join([*shown, click.format_filename(image)]))


def _report(skipped: Mapping[str, str]) -> None:
    for name, why in skipped.items():
        text = " ".join(why.split())
        _say(text if name in text else f"{name}: {text}")
