"""Options that several commands have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from torchloupe.cli import FILE, SEED
from torchloupe_core.errors import BadInput

__all__ = ["device_of_rank", "kept", "of_a_model", "of_weights", "searched", "source", "speaks"]


def of_weights(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which weights a model has and where it runs."""
    for option in (
        click.option("--progress/--no-progress", default=None, help="A bar; on a terminal only unless given."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each drawing."),
        click.option("--device", help="As in cpu or cuda."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Of random weights."),
        click.option("--weights", "pretrained", help="Which pretrained weights, for torchvision, as in IMAGENET1K_V2."),
        click.option("--no-pretrained", is_flag=True, help="Random weights."),
        click.option("--checkpoint", type=FILE, help="File of weights, instead of pretrained ones."),
    ):
        command = option(command)
    return command


def of_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The same for commands that write into a folder."""
    return click.option("--out", required=True, type=FILE, help="Folder for what is written.")(of_weights(command))


def kept(command: Callable[..., None]) -> Callable[..., None]:
    """The options of scans that last."""
    for option in (
        click.option("--engine", help='Who does the work: "ray"; else this process, or all ranks under torchrun.'),
        click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a store that is there."),
        click.option(
            "--store", type=FILE, help="Folder that keeps the pass: stopped, it goes on; done, it is not run."
        ),
    ):
        command = option(command)
    return command


def speaks() -> bool:
    """Whether this process prints and writes: of the ranks under torchrun the first does."""
    return os.environ.get("RANK", "0") == "0"


def device_of_rank(device: str | None) -> str | None:
    """The device asked for; of several GPUs this rank's."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def searched(images: tuple[Path, ...], store: Path | None, out: Path) -> tuple[Any, Path | None]:
    """The pictures that a command is about, and the store that keeps or has kept what it needs of them."""
    from torchloupe._folder import named
    from torchloupe_core.store import is_store

    if len(images) == 1 and is_store(images[0]) and store is None:
        return images[0], images[0]
    if images:
        whole = store is not None and len(images) == 1 and images[0].is_dir()  # as `scan` sees it, labels and all
        return images[0] if whole else list(named(images, out).values()), store
    if store is None:
        raise BadInput("no pictures were given; name files, a folder, or with --store one that was scanned")
    if not is_store(store):
        raise BadInput(f"{store} is no store yet; name the pictures, or make it with torchloupe scan")
    return store, store


def source(given: Path | None, store: Path | None) -> tuple[str, Path | None]:
    """Where the pictures are, or were when they were scanned; and the store to keep what is found in, if any."""
    from torchloupe_core.store import is_store

    if given is not None:
        return str(given), store
    if store is None or not is_store(store):
        raise BadInput("no pictures were given; name a folder, or with --store one that torchloupe scan made")
    return str(store), None
