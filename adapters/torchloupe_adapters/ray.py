"""Ray: the blocks of a scan spread over a cluster through Ray Data."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from torchloupe_core import errors
from torchloupe_core.blocks import Done, Work
from torchloupe_core.errors import LoupeError, MissingDependency, StoreError
from torchloupe_core.registry import method
from torchloupe_core.scan import Report

__all__ = ["spread"]

PATIENCE = 1800.0  # seconds without a block from any worker
USAGE = "RAY_USAGE_STATS_ENABLED"


@method("engine", "ray.data", cost="1 forward")
def spread(work: Work, blocks: Sequence[int], done: Done, progress: Report, *, patience: float = PATIENCE) -> None:
    """Does blocks on all processors of the cluster but one, which is kept for this process.

    A model on a GPU is asked on all its GPUs. Where Ray does not run it is started on this machine, and ended
    afterwards. Workers send what they did here, so the store need not be within their reach; the files of the data set
    must be. Raises `StoreError` where no worker has room, and when no block came for `patience` seconds.
    """
    if not blocks:
        return
    with _started() as ray:
        asked = {"num_cpus": work.store.computing["threads"], "num_gpus": int(work.handle.device.type == "cuda")}
        count = min(_room(ray, **asked), len(blocks))
        sent = ray.put(replace(work, workers=work.workers or 0))
        items = ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
        pool = ray.data.ActorPoolStrategy(size=count)
        rows = items.map(_Worker, fn_constructor_args=(sent,), compute=pool, **asked)
        for row in _watched(rows.iter_rows(), patience):
            if row["error"]:
                raise getattr(errors, row["error"])(row["content"].decode())
            done(row["block"], row["content"])
            progress(0, 0)


class _Worker:
    """Does one block after another with one copy of the model."""

    def __init__(self, sent: Any) -> None:
        import ray

        self.work: Work = ray.get(sent)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found: list[bytes] = []
        try:
            self.work.run([row["block"]], lambda block, content: found.append(content))
        except LoupeError as error:  # on its way home as it is, without Ray's account of it
            return {**row, "content": str(error).encode(), "error": type(error).__name__}
        return {**row, "content": found[0], "error": ""}


@contextlib.contextmanager
def _started() -> Iterator[ModuleType]:
    """Ray, running, and silent while it works for us."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency.of("ray", "ray") from error
    context = ray.data.DataContext.get_current()
    bars, own = context.enable_progress_bars, not ray.is_initialized()
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if own:
            _start(ray)
        context.enable_progress_bars = False
        yield ray
    except ray.exceptions.RayError as error:
        raise _ours(error) from error
    finally:
        context.enable_progress_bars = bars
        if own:
            ray.shutdown()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _start(ray: ModuleType) -> None:
    before = os.environ.get(USAGE)
    os.environ.setdefault(USAGE, "0")  # it tells its makers nothing of what was not asked
    try:
        cpus = max(2, os.cpu_count() or 2)  # a machine of one processor does both in turn
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    finally:
        if before is None:
            del os.environ[USAGE]


def _room(ray: ModuleType, *, num_cpus: int, num_gpus: int) -> int:
    """How many workers the cluster has room for, with a processor left for this process."""
    there = ray.cluster_resources()
    room = int(there.get("CPU", 0) - 1) // num_cpus
    if num_gpus:
        room = min(room, int(there.get("GPU", 0)))
    if room < 1:
        what = f"{there.get('CPU', 0):g} processors" + (f", {there.get('GPU', 0):g} GPUs" if num_gpus else "")
        raise StoreError(
            f"ray has {what}: no room for a worker of {num_cpus}"
            + (" and a GPU" if num_gpus else "")
            + " beside the one kept for this process"
        )
    return room


def _watched(rows: Iterator[Any], patience: float) -> Iterator[Any]:
    """Rows as they come. Raises `StoreError` in place of waiting for ever."""
    came: queue.Queue[tuple[str, Any]] = queue.Queue()

    def follow() -> None:
        try:
            for row in rows:
                came.put(("row", row))
            came.put(("end", None))
        except BaseException as error:  # raised where someone is listening
            came.put(("error", error))

    threading.Thread(target=follow, daemon=True, name="blocks from ray").start()
    while True:
        try:
            kind, what = came.get(timeout=patience)
        except queue.Empty:
            raise StoreError(
                f"no block came from ray for {patience:g} seconds: its workers hang, or the cluster has no room for "
                "them; what is stored stays, and the same scan goes on from there"
            ) from None
        if kind == "error":
            raise what
        if kind == "end":
            return
        yield what


def _ours(error: BaseException) -> StoreError:
    """What Ray raised, in the words of what was behind it."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return StoreError(f"ray failed: {type(error).__name__}: {error}")
