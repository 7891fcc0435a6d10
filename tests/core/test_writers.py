"""Who may write into a store, and ranks that share a scan out between them and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stored_scans import blocks, ended, forked, inputs, killed, model, require_alike, require_same, scanned, states
from torchloupe_core import filling, writers
from torchloupe_core.errors import BadInput, StoreError
from torchloupe_core.writers import Crew, Writer

RUN = {"WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("whole") / "store"
    return path, scanned(path, model(), inputs())[0]


@pytest.fixture
def said() -> Iterator[tuple[int, int]]:
    """A pipe, to hear from children by."""
    pipe = os.pipe()
    yield pipe
    for end in pipe:
        os.close(end)


# -- one writer -------------------------------------------------------------------------------------------------------


def test_another_process_is_kept_out_until_it_has_ended(
    tmp_path: Path, said: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "SECONDS", 0.2)
    scanned(tmp_path, model(), inputs(20))
    (tmp_path / "blocks/00000000.npz").unlink()

    def hold() -> None:
        with Writer(tmp_path / "lock", Crew()):
            os.write(said[1], b".")
            time.sleep(60)

    child = forked(hold)
    os.read(said[0], 1)
    with pytest.raises(StoreError, match=rf"is in use: process {child} on \S+ writes into it"):
        scanned(tmp_path, model(), inputs(20))
    with pytest.raises(StoreError, match="is in use"), Writer(tmp_path / "lock", Crew(0, 2, "another run")):
        pass
    assert killed(child) == -signal.SIGKILL
    scanned(tmp_path, model(), inputs(20))


def test_what_is_complete_is_read_while_another_writes(tmp_path: Path) -> None:
    scanned(tmp_path, model(), inputs(20))
    with Writer(tmp_path / "lock", Crew()):
        scanned(tmp_path, model(), inputs(20))


def test_a_process_is_kept_out_by_itself(tmp_path: Path) -> None:
    with (
        Writer(tmp_path / "lock", Crew()),
        pytest.raises(StoreError, match="is being written by this process already"),
        Writer(tmp_path / "lock", Crew()),
    ):
        pass
    with Writer(tmp_path / "lock", Crew()):
        pass


def test_a_reader_that_outlives_a_killed_writer_holds_nothing(tmp_path: Path, said: tuple[int, int]) -> None:
    """As a loader's worker does for some seconds."""

    def hold() -> None:
        with Writer(tmp_path / "lock", Crew()) as writer:
            writer.take(3)
            worker = forked(lambda: time.sleep(60))
            os.write(said[1], worker.to_bytes(8, "little"))
            time.sleep(60)

    child = forked(hold)
    worker = int.from_bytes(os.read(said[0], 8), "little")
    killed(child)
    try:
        with Writer(tmp_path / "lock", Crew()) as writer:
            assert writer.take(3)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_ranks_of_one_run_write_together_and_take_different_blocks(tmp_path: Path, said: tuple[int, int]) -> None:
    def hold() -> None:
        with Writer(tmp_path / "lock", Crew(1, 2, "run")) as writer:
            assert writer.first and writer.take(5)
            os.write(said[1], b".")
            time.sleep(60)

    child = forked(hold)
    os.read(said[0], 1)
    with Writer(tmp_path / "lock", Crew(0, 2, "run")) as writer:
        assert not writer.first and not writer.alone
        assert writer.take(4) and not writer.take(5)
    with pytest.raises(StoreError, match="is in use"), Writer(tmp_path / "lock", Crew(0, 2, "another")):
        pass
    with Writer(tmp_path / "lock", Crew(0, 2, "run")) as writer:
        killed(child)
        assert writer.take(5)
    for crew in (Crew(0, 2, "another"), Crew()):
        with Writer(tmp_path / "lock", crew) as writer:
            assert writer.first


def test_the_crew_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert Crew.present() == Crew()
    for name, value in {**RUN, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Crew.present() == Crew(1, 2, "MASTER_ADDR=here MASTER_PORT=29500")
    for rank in ("2", "-1", "one"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(BadInput, match=f"make no sense: '{rank}' and '2'"):
            Crew.present()


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_two_ranks_share_a_scan(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """Each does about half and gets all of it."""
    handle = model()

    def rank() -> None:
        found, _ = scanned(tmp_path, handle, inputs())
        require_same(found, whole[1])
        (tmp_path / f"{os.environ['RANK']}.part").write_text(str(handle.forwards))

    children = [forked(rank, **RUN, RANK=str(number)) for number in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    assert blocks(tmp_path) == blocks(whole[0])
    done = [int((tmp_path / f"{number}.part").read_text()) for number in range(2)]
    assert sum(done) == 150 and min(done) > 0


def test_a_rank_survives_the_other(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """Killed right after its first block, with the next one taken."""
    handle = model()

    def dying() -> None:
        scanned(tmp_path, handle, inputs(), progress=lambda done, total: killed(os.getpid()) if done >= 12 else None)

    def surviving() -> None:
        time.sleep(0.2)
        require_same(scanned(tmp_path, handle, inputs())[0], whole[1])

    children = [forked(dying, **RUN, RANK="1"), forked(surviving, **RUN, RANK="0")]
    assert [ended(child) for child in children] == [-signal.SIGKILL, 0]
    assert blocks(tmp_path) == blocks(whole[0])


def test_a_rank_that_hangs_is_not_waited_for(
    whole: tuple[Path, Any], tmp_path: Path, said: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "PATIENCE", 0.2)
    handle = model()

    def hanging() -> None:
        def hang(done: int, total: int) -> None:
            os.write(said[1], b".")
            time.sleep(60)

        scanned(tmp_path, handle, inputs(), progress=hang)

    child = forked(hanging, **RUN, RANK="1")
    os.read(said[0], 1)
    for name, value in {**RUN, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    require_same(scanned(tmp_path, handle, inputs())[0], whole[1])
    assert killed(child) == -signal.SIGKILL


def test_a_rank_alone_does_it_all(whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where rank 0 alone asks, in a script of many."""
    for name, value in {**RUN, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    require_same(scanned(tmp_path, model(), inputs())[0], whole[1])


def test_ranks_mend_damage_together(whole: tuple[Path, Any], tmp_path: Path) -> None:
    handle = model()
    scanned(tmp_path, handle, inputs())
    for block in (2, 3, 11):
        (tmp_path / "blocks" / f"{block:08d}.npz").write_bytes(b"torn")

    def rank() -> None:
        require_same(scanned(tmp_path, handle, inputs())[0], whole[1])

    children = [forked(rank, **RUN, RANK=str(number)) for number in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    assert blocks(tmp_path) == blocks(whole[0])


SCRIPT = """
import os, signal, sys, time
sys.path[:0] = {path!r}
import torch
from stored_scans import inputs, model, scanned, states

rank, attempt, handle = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), model()

def die(done, total):
    if attempt == 0 and done >= 12:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)  # leaves some to the other one, until torchrun ends both

found, _ = scanned({store!r}, handle, inputs(), progress=die)
torch.save([rank, attempt, handle.forwards, states(found)], {store!r} + "/" + str(rank) + ".part")
"""


@pytest.mark.slow
def test_torchrun_starts_ranks_again_and_they_go_on(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """One is killed, `torchrun` ends the other and starts both again: restart and resume are one."""
    store, script = tmp_path / "store", tmp_path / "script.py"
    path = [one for one in sys.path if one.endswith(("src", "adapters", "recipes", "tests"))]
    script.write_text(SCRIPT.format(path=path, store=str(store)))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*run, "--max-restarts", "1", str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert blocks(store) == blocks(whole[0])
    found = [torch.load(store / f"{rank}.part") for rank in range(2)]
    assert [one[:2] for one in found] == [[0, 1], [1, 1]]
    assert sum(one[2] for one in found) < 150  # some was there from the first attempt
    for *_, held in found:
        require_alike(held, states(whole[1]))
