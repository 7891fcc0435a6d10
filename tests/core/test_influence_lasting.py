"""Influence through layers that lasts: killed and gone on with, shared out; stores of something else are refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import torchloupe as tl
from stored_scans import ended, forked
from torchloupe_core import memory
from torchloupe_core.errors import BadInput, StoreError
from torchloupe_core.methods.influence import kfac, lasting, study
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.store import Store

N, T = 43, 5
LAYERS = ["fc", "conv1"]


@pytest.fixture(scope="module")
def data() -> tuple[tl.Handle, TensorDataset, TensorDataset]:
    handle, _ = SPECIMENS["plain"]()
    handle.trace()
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> TensorDataset:
        return TensorDataset(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 5)

    return handle, some(N), some(T)


def asked(data: Any, **options: Any) -> tl.Influence:
    handle, train, test = data
    return tl.influence(handle, train, test, **{"layers": LAYERS, "damping": 0.01, "check": 0, **options})


OPTIONS: dict[str, dict[str, Any]] = {
    "ekfac": {"fisher": "exact"},
    "kfac": {"fisher": "exact"},
    "gradient_dot": {},
    "cg": {"tolerance": 1e-7},
    "lissa": {"tolerance": 1e-4},
    "arnoldi": {"steps": 20, "rank": 10},
    "trak": {"dims": 8},
    "tracin": {"rates": 0.1},
}


@pytest.mark.parametrize("method", sorted(lasting.KEEPING))
def test_the_scores_are_those_that_nothing_was_kept_of(data: Any, method: str, tmp_path: Path) -> None:
    options = dict(OPTIONS[method])
    if method == "tracin":
        options["checkpoints"] = [SPECIMENS["plain"](seed=one)[0] for one in (1, 2)]
    plain = asked(data, method=method, **options)
    kept = asked(data, method=method, store=tmp_path, **options)
    torch.testing.assert_close(kept.scores, plain.scores, rtol=1e-3, atol=1e-5 * plain.scores.abs().max().item())
    torch.testing.assert_close(kept.gradient_norms, plain.gradient_norms, rtol=1e-4, atol=1e-6)
    stores = [Store.open(path.parent) for path in tmp_path.rglob("manifest.json")]
    assert stores and all(not store.missing() for store in stores)
    again = asked(data, method=method, store=tmp_path, **options)
    assert again.scores.equal(kept.scores) and again.forwards < kept.forwards


def test_each_part_draws_signs_of_its_own(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, draw = list[int](), kfac._cotangents

    def noted(problem: Any, *options: Any) -> Any:
        seeds.append(problem.seed)
        return draw(problem, *options)

    monkeypatch.setattr(kfac, "_cotangents", noted)
    sampled = asked(data, method="ekfac", store=tmp_path, samples=300).scores
    exact = asked(data, method="ekfac", fisher="exact").scores
    assert (sampled - exact).norm() < 0.1 * exact.norm()
    parts = seeds[: len(seeds) // 2 - 1]  # then those of the second pass, and of the exact one
    assert len(set(parts)) == len(parts) > 2 and seeds[: len(parts)] == seeds[len(parts) : 2 * len(parts)]


@pytest.mark.parametrize(("method", "nth"), [("ekfac", 1), ("ekfac", 7), ("cg", 3)])
def test_killed_and_gone_on_with(
    data: Any, method: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS[method], "method": method, "memory": 1e-5}
    whole = asked(data, store=tmp_path / "whole", **options)
    left, write = [nth], Store.write

    def killing(self: Store, block: int, content: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, block, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", killing)
        assert ended(forked(lambda: asked(data, store=tmp_path / "killed", **options))) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.npz")}
    assert len(done) == nth - 1
    found = asked(data, store=tmp_path / "killed", **options)
    assert found.scores.equal(whole.scores)
    assert done.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.npz")}.items()


def test_ranks_share_it_out(data: Any, tmp_path: Path) -> None:
    whole = asked(data, method="ekfac", store=tmp_path / "whole", fisher="exact").scores

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_PORT": "1"}
        found = asked(data, method="ekfac", store=tmp_path / "shared", fisher="exact")
        torch.save(found.scores, tmp_path / f"{number}.pt")

    children = [forked(lambda number=number: rank(number)) for number in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    for number in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), whole, rtol=1e-4, atol=1e-7)


def test_a_damaged_part_is_done_again(data: Any, tmp_path: Path) -> None:
    whole = asked(data, method="gradient_dot", store=tmp_path).scores
    block = sorted(tmp_path.rglob("*.npz"))[1]
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(bytes(content))
    assert asked(data, method="gradient_dot", store=tmp_path).scores.equal(whole)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"damping": 0.02}, "damping"),
        ({"layers": "all"}, "parameters"),
        ({"method": "kfac"}, "method"),
        ({"seed": 1}, "seed"),
        ({"target": "logit:1"}, "targets"),
        ({"labels": [0] * N}, "training labels"),
        ({"test_labels": [0] * T}, "test labels"),
        ({"samples": 2}, "options"),
    ],
)
def test_a_store_of_another_question_is_refused(data: Any, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    asked(data, method="ekfac", store=tmp_path)
    with pytest.raises(StoreError, match=rf"another (question|scan); name another store[\s\S]*{said}"):
        asked(data, **{"method": "ekfac", "store": tmp_path, **changed})


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_a_training_set_in_another_order_is_refused(data: Any, layers: Any, tmp_path: Path) -> None:
    handle, train, test = data
    asked(data, method="gradient_dot", store=tmp_path, layers=layers)
    other = torch.arange(N).roll(1)
    shuffled = TensorDataset(*(one[other] for one in train.tensors))
    with pytest.raises(StoreError, match="name another store"):
        asked((handle, shuffled, test), method="gradient_dot", store=tmp_path, layers=layers)


def test_other_weights_are_refused(data: Any, tmp_path: Path) -> None:
    asked(data, method="gradient_dot", store=tmp_path)
    other, _ = SPECIMENS["plain"](seed=5)
    with pytest.raises(StoreError, match="weights"):
        asked((other, *data[1:]), method="gradient_dot", store=tmp_path)


def test_the_pass_of_the_head_lasts_too(data: Any, tmp_path: Path) -> None:
    plain = asked(data, layers=None)
    kept = asked(data, layers=None, store=tmp_path)
    torch.testing.assert_close(kept.scores, plain.scores)
    again = asked(data, layers=None, store=tmp_path, method="gradient_dot")  # of the same pass
    assert again.forwards == kept.forwards - N


def test_what_is_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'self' keeps no passes through layers; leave out store="):
        asked(data, method="self", store=tmp_path)
    with pytest.raises(BadInput, match="engine= spreads what store= keeps"):
        asked(data, method="ekfac", engine="ray")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"keeps no influence, but 'thesis.txt' is in it"):
        asked(data, method="ekfac", store=tmp_path)
    asked(data, method="gradient_dot", store=tmp_path / "s")
    with pytest.raises(StoreError, match="blocks already; resume=True goes on"):
        asked(data, method="gradient_dot", store=tmp_path / "s", resume=False)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_fifty_thousand_by_a_thousand_through_half_a_million_fits_in_24_gib() -> None:
    assert 8 * 2**30 < study.needed(500_000, 50_000, 1_000, 4, 2 * 2**30) < 24 * 2**30


def test_what_does_not_fit_is_refused_before_any_image_is_read(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, train, test = data
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    monkeypatch.setattr(TensorDataset, "__getitem__", None)
    with pytest.raises(BadInput, match=r"the influence of 43 images on 5 tests through .* parameters takes .* GiB"):
        tl.influence(handle, train, test, layers="all", method="ekfac")


def test_memory_bounds_the_group_that_is_solved_at_once(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchloupe_core.methods.influence import functions

    sizes: list[int] = []
    solve = functions.conjugate_gradients

    def noted(times: Any, b: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(b))
        return solve(times, b, **options)

    monkeypatch.setattr(functions, "conjugate_gradients", noted)
    plain = asked(data, method="cg", tolerance=1e-6)
    size = 8 * 2 * functions.CG_HOLDS * plain.parameters  # bytes of two questions
    few = asked(data, method="cg", tolerance=1e-6, memory=size / 2**30)
    assert sizes == [T, 2, 2, 1]
    torch.testing.assert_close(few.scores, plain.scores, rtol=1e-3, atol=1e-7)
    assert few.diagnostics["residual"] < 1e-5 and few.diagnostics["converged"]
