"""Scans that are stored: killed and gone on with, shared out between processes, the same to the last bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torchloupe as tl
from stored_scans import IMAGES, blocks, ended, forked, inputs, killed, model, require_same, scanned, several
from torchloupe_core import filling
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.dataset import open_data
from torchloupe_core.errors import BadInput, StoreError
from torchloupe_core.filling import scan_stored
from torchloupe_core.scan import Joint, scan
from torchloupe_core.statistics import Features, Moments, Top
from torchloupe_core.store import Damaged, Store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A store of a scan that ran through, and its statistics."""
    path = tmp_path_factory.mktemp("whole") / "store"
    return path, scanned(path, model(), inputs())[0]


# -- one process ------------------------------------------------------------------------------------------------------


def test_a_stored_scan_is_a_scan(whole: tuple[Path, Any]) -> None:
    """In blocks of one batch, statistics that are exact are those of a pass that knows no blocks."""
    handle, plain = model(), several()
    found = scan(handle, open_data(inputs(), handle.spec), plain, batch_size=4)
    for layer, place in (("relu1", 0), ("relu1", 2), ("relu1", 4), ("fc.in", 0), ("fc.in", 1)):
        one, other = plain[layer][place].compute(), whole[1][layer][place].compute()
        for a, b in zip(*(vars(x).values() if hasattr(x, "__dict__") else x for x in (one, other)), strict=True):
            assert torch.equal(a, b), (layer, place)
    mean, covariance = whole[1]["relu1"][1].compute()
    torch.testing.assert_close(mean, plain["relu1"][1].compute()[0])
    torch.testing.assert_close(covariance, plain["relu1"][1].compute()[1])
    assert found.images == IMAGES


def test_what_is_there_is_not_done_again(whole: tuple[Path, Any]) -> None:
    handle = model()
    again, found = scanned(whole[0], handle, inputs())
    assert (handle.forwards, found.images, found.shape) == (0, IMAGES, (3, 32, 32))
    require_same(again, whole[1])


def test_only_what_is_missing_is_done(whole: tuple[Path, Any], tmp_path: Path) -> None:
    scanned(tmp_path / "s", model(), inputs())
    for block in (0, 7, 18):
        (tmp_path / "s" / "blocks" / f"{block:08d}.npz").unlink()
    handle, seen = model(), []
    again, _ = scanned(tmp_path / "s", handle, inputs(), progress=lambda done, total: seen.append((done, total)))
    assert handle.forwards == 8 + 8 + 6
    assert seen[0] == (IMAGES - 22 + 4, IMAGES) and seen[-1] == (IMAGES, IMAGES)
    require_same(again, whole[1])
    assert blocks(tmp_path / "s") == blocks(whole[0])


def test_blocks_that_are_no_whole_batches(tmp_path: Path) -> None:
    """Every image once, in its own block, whatever is read ahead across the border."""
    handle, data = model(), inputs(45)
    for path in (tmp_path, tmp_path):
        found, _ = scanned(path, handle, data, block_size=7, batch_size=4)
        indices, vectors = found["relu1"][4].compute()
        assert indices.tolist() == list(range(45))
        torch.testing.assert_close(vectors, tl.activations(handle, data, "relu1").maps.mean((2, 3)))
    assert [Store.open(tmp_path).facts(block)["images"] for block in range(7)] == [7, 7, 7, 7, 7, 7, 3]


def test_what_statistics_held_before_stays() -> None:
    handle, data = model(), inputs(20)
    both, apart = Top(3), Top(3)
    scan_stored(handle, open_data(data[:10], handle.spec), {"relu1": [both]}, batch_size=4)
    scan_stored(handle, open_data(data[10:], handle.spec), {"relu1": [apart]}, batch_size=4)
    before = both.compute().scores.clone()
    scan_stored(handle, open_data(data[10:], handle.spec), {"relu1": [both]}, batch_size=4)
    assert torch.equal(
        both.compute().scores, torch.cat([before, apart.compute().scores], 1).sort(1, True).values[:, :3]
    )


def killing(function: Callable[..., Any], nth: int) -> Callable[..., Any]:
    """The function, but its nth call kills this process."""
    left = [nth]

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 9])
def test_killed_in_the_middle_of_a_write(
    whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
) -> None:
    path, handle = tmp_path / "s", model()
    with monkeypatch.context() as patch:
        owner: Any = os if step == "fsync" else Path
        patch.setattr(owner, step, killing(getattr(owner, step), nth))
        assert ended(forked(lambda: scanned(path, handle, inputs()))) == -signal.SIGKILL
    before = blocks(path) if (path / "blocks").exists() else {}
    assert before.items() <= blocks(whole[0]).items()
    require_same(scanned(path, handle, inputs())[0], whole[1])
    assert blocks(path) == blocks(whole[0])
    assert not list(path.rglob("*.part"))


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random(whole: tuple[Path, Any], tmp_path: Path, kills: int) -> None:
    """Nothing that was stored is lost, torn or done twice, however often a scan is killed, and it ends the same."""
    handle, expected, chance = model(), blocks(whole[0]), random.Random(kills)
    begun = time.monotonic()
    assert ended(forked(lambda: scanned(tmp_path / "timed", handle, inputs()))) == 0
    takes, died, store = time.monotonic() - begun, 0, 0
    while died < kills:
        path, before = tmp_path / f"{store}", dict[str, bytes]()
        while True:
            child = forked(lambda path=path: scanned(path, handle, inputs()))
            time.sleep(chance.uniform(0, takes / 2))
            code = killed(child)
            died += code != 0
            now = blocks(path) if (path / "blocks").exists() else {}
            assert before.items() <= now.items() <= expected.items()
            if code == 0 or died == kills:
                break
            before = now
        require_same(scanned(path, handle, inputs())[0], whole[1])
        assert blocks(path) == expected
        store += 1


def test_ctrl_c_leaves_no_trace(tmp_path: Path) -> None:
    handle, threads = model(), torch.get_num_threads()
    handle.module.train()
    before = Snapshot(handle.module)

    def stop(done: int, total: int) -> None:
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scanned(tmp_path, handle, inputs(), progress=stop)
    assert len(Store.open(tmp_path).present()) == 5
    assert before.differences() == []
    assert torch.get_num_threads() == threads
    scanned(tmp_path, handle, inputs())  # the lock is free


# -- damage -----------------------------------------------------------------------------------------------------------


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def flipped(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def emptied(content: bytes, chance: random.Random) -> bytes:
    return b""


@pytest.mark.parametrize("harm", [truncated, flipped, emptied])
def test_a_block_that_is_damaged_is_done_again(
    whole: tuple[Path, Any], tmp_path: Path, harm: Callable[[bytes, random.Random], bytes]
) -> None:
    path, handle, chance = tmp_path / "s", model(), random.Random(0)
    scanned(path, handle, inputs())
    for _ in range(4):
        block = chance.randrange(19)
        file = path / "blocks" / f"{block:08d}.npz"
        file.write_bytes(harm(file.read_bytes(), chance))
        with pytest.raises(Damaged):
            Store.open(path).read(block)
        before = handle.forwards
        require_same(scanned(path, handle, inputs())[0], whole[1])
        assert handle.forwards - before == (6 if block == 18 else 8)
        assert blocks(path) == blocks(whole[0])


def test_a_block_of_another_store_is_done_again(whole: tuple[Path, Any], tmp_path: Path) -> None:
    handle = model()
    scanned(tmp_path / "s", handle, inputs())
    scanned(tmp_path / "other", handle, inputs().flip(0))
    (tmp_path / "s/blocks/00000003.npz").write_bytes((tmp_path / "other/blocks/00000003.npz").read_bytes())
    (tmp_path / "s/blocks/00000005.npz").write_bytes((tmp_path / "s/blocks/00000004.npz").read_bytes())
    require_same(scanned(tmp_path / "s", handle, inputs())[0], whole[1])


def test_a_disk_that_does_not_keep_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, block, content: write(self, block, content[:-1] + b"?"))
    with pytest.raises(StoreError, match="does not keep what is written"):
        scanned(tmp_path, model(), inputs(20))


def test_a_full_disk(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """A limit on the size of files stands for one: one error, and what was stored is gone on from."""
    import resource

    handle = model()
    scanned(tmp_path, handle, inputs())
    for block in range(5, 19):
        (tmp_path / "blocks" / f"{block:08d}.npz").unlink()
    said, saying = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            scanned(tmp_path, handle, inputs())
        except StoreError as error:
            os.write(saying, str(error).encode())

    assert ended(forked(work)) == 0
    assert (
        os.read(said, 9999).decode().startswith(f"cannot write {tmp_path / 'blocks' / '00000005.npz'}: File too large")
    )
    assert len(blocks(tmp_path)) == 5 and not list(tmp_path.rglob("*.part"))
    require_same(scanned(tmp_path, handle, inputs())[0], whole[1])


# -- what a store is of -----------------------------------------------------------------------------------------------


def other_weights(handle: Any, data: Tensor) -> Any:
    with torch.no_grad():
        handle.module.fc.bias[0] += 1e-6
    return handle, data


def other_buffer(handle: Any, data: Tensor) -> Any:
    handle.module.register_buffer("scale", torch.ones(1), persistent=False)
    return handle, data


def other_structure(handle: Any, data: Tensor) -> Any:
    handle.module.relu1 = torch.nn.LeakyReLU(0.1)
    return handle, data


def other_precision(handle: Any, data: Tensor) -> Any:
    return handle.to(dtype=torch.float64), data


def other_preprocessing(handle: Any, data: Tensor) -> Any:
    return tl.wrap(handle.module, preprocess=lambda image: torch.zeros(3, 32, 32), input_size=(3, 32, 32)), data


def fewer_images(handle: Any, data: Tensor) -> Any:
    return handle, data[:-1]


def another_image(handle: Any, data: Tensor) -> Any:
    data = data.clone()
    data[0, 0, 0, 0] += 1
    return handle, data


DIFFERENT: dict[str, Any] = {
    "weights": other_weights,
    "weights ": other_buffer,
    "structure": other_structure,
    "precision": other_precision,
    "preprocessed noise": other_preprocessing,
    "images": fewer_images,
    "images looked at": another_image,
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_store_of_something_else_is_refused(tmp_path: Path, what: str) -> None:
    scanned(tmp_path, model(), inputs())
    stored = blocks(tmp_path)
    handle, data = DIFFERENT[what](model(), inputs())
    with pytest.raises(StoreError, match=rf"another question(?s:.*)\n  {what.strip()}: given .*, stored ") as caught:
        scanned(tmp_path, handle, data)
    if what == "weights":
        assert str(caught.value).count("\n") == 1
    assert blocks(tmp_path) == stored


def test_a_store_of_another_question_is_refused(tmp_path: Path) -> None:
    handle = model()
    data = open_data(inputs(), handle.spec)
    scan_stored(handle, data, {"relu1": [Top(3)]}, store=tmp_path, batch_size=4, block_size=8)
    for other in ({"relu2": [Top(3)]}, {"relu1": [Top(4)]}, {"relu1": [Top(3, largest=False)]}, {"relu1": [Moments()]}):
        with pytest.raises(StoreError, match=r"\n  statistics: given \w+\(.*\) of relu\d, stored Top\(k=3"):
            scan_stored(handle, data, other, store=tmp_path)
    with pytest.raises(StoreError, match=r"\n  statistics: given Top\(k=3.*\) of logit:2"):
        joint = Joint([tl.logit(2)], [Top(3)])
        scan_stored(handle, data, {"relu1": [Top(3)]}, joint=joint, store=tmp_path)
    with pytest.raises(StoreError, match=r"\n  autocast: given torch.bfloat16, stored None"):
        scan_stored(handle, data, {"relu1": [Top(3)]}, autocast=torch.bfloat16, store=tmp_path)
    for one in ("batch_size", "block_size"):
        (tmp_path / "blocks/00000000.npz").unlink(missing_ok=True)
        with pytest.raises(StoreError, match=rf"\n  {one}: given 16, stored \d"):
            scan_stored(handle, data, {"relu1": [Top(3)]}, store=tmp_path, **{one: 16})


def test_files_are_known_by_name_size_and_time(tmp_path: Path) -> None:
    folder, handle = tmp_path / "photos", model()
    folder.mkdir()
    for place in range(4):
        Image.new("RGB", (40, 40), (place * 60, 0, 0)).save(folder / f"{place}.png")

    def ask() -> None:
        scanned(tmp_path / "s", handle, folder, batch_size=2, block_size=2)

    ask()
    (tmp_path / "s/blocks/00000000.npz").unlink()
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    ask()  # the same files elsewhere
    (tmp_path / "s/blocks/00000000.npz").unlink()
    os.utime(folder / "2.png", ns=(1, 1))
    with pytest.raises(StoreError, match=r"\n  times of change: given [^\n]*$"):
        ask()
    (folder / "2.png").rename(folder / "20.png")
    with pytest.raises(StoreError, match=r"\n  files: given"):
        ask()


def test_a_complete_store_answers_part_of_its_question(whole: tuple[Path, Any]) -> None:
    """Also the best 2 of the best 4."""
    handle, wanted, few = model(), Features(), Top(2)
    data = open_data(inputs(), handle.spec)
    scan_stored(handle, data, {"relu1": [few, wanted]}, store=whole[0])
    assert handle.forwards == 0
    assert torch.equal(wanted.compute()[1], whole[1]["relu1"][4].compute()[1])
    assert torch.equal(few.compute().scores, whole[1]["relu1"][0].compute().scores[:, :2])


def test_targets_are_stored_too(tmp_path: Path) -> None:
    handle, found = model(), []
    data = open_data(inputs(30), handle.spec)
    for store in (tmp_path, tmp_path, None):
        joint = Joint([tl.logit(2), tl.logit(1) - 2 * tl.channel("relu2", 3)], [Top(3), Features()])
        scan_stored(handle, data, {}, joint=joint, store=store, batch_size=4, block_size=8)
        found.append(joint.statistics)
    require_same({"": found[0]}, {"": found[1]})
    require_same({"": found[0]}, {"": found[2]})
    vectors = found[0][1].compute()[1]
    maps = tl.activations(handle, inputs(30), "relu2", channels=[3]).maps
    with torch.no_grad():
        logits = handle.module(inputs(30))
    torch.testing.assert_close(vectors[:, 1], logits[:, 1] + (-2 * maps).amax((1, 2, 3)))


def test_not_going_on_is_refused_where_there_is_something(tmp_path: Path) -> None:
    handle = model()
    scanned(tmp_path, handle, inputs(20), resume=False)
    with pytest.raises(StoreError, match="holds 3 of 3 blocks already"):
        scanned(tmp_path, handle, inputs(20), resume=False)


def test_a_store_of_another_version(tmp_path: Path) -> None:
    scanned(tmp_path, model(), inputs(20))
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    for content, message in (
        (text.replace('"format": 1', '"format": 2'), "is a store of format 2; this version of torchloupe reads 1"),
        (text[:100], "cannot be read"),
        ("{}", "cannot be read"),
    ):
        manifest.write_text(content)
        with pytest.raises(StoreError, match=message):
            scanned(tmp_path, model(), inputs(20))


def test_folders_that_cannot_be_stores(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    for path, message in (
        ("file", "file cannot be a store: Not a directory"),
        ("file/below", "cannot be a store: Not a directory"),
        ("photos", "no store, but a folder with 'a.png' in it"),
    ):
        with pytest.raises(StoreError, match=message):
            scanned(tmp_path / path, model(), inputs(20))
    assert [one.name for one in (tmp_path / "photos").iterdir()] == ["a.png"]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(inputs(20))


class Random(Dataset[Tensor]):
    """Random crops, as for training."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return inputs(20)[index] + torch.rand(())


def test_data_sets_that_cannot_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a stream of images has no places to go on from"):
        scanned(tmp_path, model(), Stream())
    with pytest.raises(BadInput, match="image 0 is another one each time it is read"):
        scanned(tmp_path, model(), Random())
    assert not list(tmp_path.iterdir())


def test_a_loader_states_its_batch_size(tmp_path: Path, whole: tuple[Path, Any]) -> None:
    loader = DataLoader(TensorDataset(inputs()), 4, shuffle=True)
    again, _ = scanned(tmp_path, model(), loader, batch_size=None)
    assert Store.open(tmp_path).computing["batch_size"] == 4
    require_same(again, whole[1])


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for place in range(12):
        (folder / f"{place % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + place, 40), (place * 20, 0, 0)).save(folder / f"{place % 2}" / f"{place:02d}.png")
    (folder / "1/03.png").write_bytes(b"no picture")
    handle = tl.wrap(model().module, preprocess=lambda image: torch.ones(3, image.height - 8, image.width - 8))
    found = [scanned(tmp_path / "s", handle, folder, batch_size=2, block_size=3) for _ in range(2)]
    plain = scan(handle, open_data(folder, handle.spec), several(), batch_size=2)
    for _, one in found:
        assert (one.images, one.skipped, one.labels) == (plain.images, plain.skipped, plain.labels)
        assert all(one.shape_of(index) == plain.shape_of(index) for index in range(12) if index not in one.skipped)
    require_same(found[0][0], found[1][0])
    with pytest.raises(BadInput, match=r"03\.png is not an image"):
        scanned(tmp_path / "s", handle, folder, batch_size=2, block_size=3, skip_failures=False)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"none of the 12 images could be read; the first: .*00\.png"):
        scanned(tmp_path / "none", handle, folder)


def test_memory_that_ends_is_no_smaller_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = model()
    forward = type(handle.module).forward
    monkeypatch.setattr(
        type(handle.module),
        "forward",
        lambda self, x: (
            forward(self, x) if len(x) < 4 else (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
        ),
    )
    with pytest.raises(StoreError, match=r"memory ended at 4 images at once.*smaller batch_size="):
        scanned(tmp_path, handle, inputs())


def test_worker_processes_read_ahead(tmp_path: Path, whole: tuple[Path, Any]) -> None:
    require_same(scanned(tmp_path, model(), inputs(), workers=2)[0], whole[1])


def test_without_sizes_they_are_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = model()
    data = open_data(inputs(600), handle.spec)  # several blocks, whatever size is found
    monkeypatch.setattr(filling, "WORTH", 1)  # so that a search is worth it
    scan_stored(handle, data, {"relu1": [Moments()]}, store=tmp_path)
    sizes = Store.open(tmp_path).computing
    assert handle.pace((3, 32, 32)).settled and sizes["batch_size"] == handle.pace((3, 32, 32)).size
    assert sizes["block_size"] % sizes["batch_size"] == 0 and sizes["block_size"] >= 64
    handle.pace((3, 32, 32)).size = 1
    (tmp_path / "blocks/00000000.npz").unlink()
    scan_stored(handle, data, {"relu1": [Moments()]}, store=tmp_path)
    assert Store.open(tmp_path).computing == sizes


def test_every_run_computes_in_as_many_threads(tmp_path: Path) -> None:
    """Sums that are split otherwise round otherwise."""
    handle, seen, before = model(), set[int](), torch.get_num_threads()
    scanned(tmp_path, handle, inputs())
    (tmp_path / "blocks/00000004.npz").unlink()
    torch.set_num_threads(before + 1)
    try:
        scanned(tmp_path, handle, inputs(), progress=lambda done, total: seen.add(torch.get_num_threads()))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert seen == {before} == {Store.open(tmp_path).computing["threads"]}
