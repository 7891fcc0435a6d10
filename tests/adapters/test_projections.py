"""The methods of `embed`: against closed forms, seeded, on few, equal and constant images."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchloupe as tl
from torchloupe_adapters.sklearn import trustworthiness
from torchloupe_core import registry
from torchloupe_core.embedding import Projection
from torchloupe_core.errors import BadInput, MissingDependency

QUICK = {"sklearn.tsne": {"iterations": 500}, "opentsne.tsne": {"iterations": 50}, "umap.umap": {"epochs": 50}}
METHODS = [entry.name for entry in tl.methods("embed")]


def placed(method: str, vectors: Tensor, dims: int = 2, seed: int = 0, **options: Any) -> Projection:
    found: Projection = registry.find("embed", method).run(vectors, dims, seed, **{**QUICK.get(method, {}), **options})
    return found


def three_groups(each: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(3, 10)
    vectors = centres.repeat_interleave(each, 0) + torch.randn(3 * each, 10, generator=generator)
    return vectors, torch.arange(3).repeat_interleave(each)


def test_they_are_listed_and_found_by_short_names() -> None:
    assert METHODS == ["opentsne.tsne", "sklearn.pca", "sklearn.tsne", "umap.umap"]
    for short, full in {"pca": "sklearn.pca", "tsne": "sklearn.tsne", "umap": "umap.umap"}.items():
        assert registry.find("embed", short).name == full
    with pytest.raises(tl.errors.UnknownName, match="did you mean 'tsne'"):
        registry.find("embed", "tnse")


@pytest.mark.parametrize("dims", [2, 3])
def test_principal_components_are_those_of_the_singular_value_decomposition(dims: int) -> None:
    vectors = 1000 + torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    found = placed("pca", vectors, dims)
    centred = vectors.double() - vectors.double().mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = left[:, :dims] * values[:dims]
    torch.testing.assert_close(found.points.double().abs(), expected.abs(), rtol=1e-4, atol=1e-3)  # signs are free
    shares = (values.square() / values.square().sum())[:dims]
    assert found.diagnostics["explained_variance"] == pytest.approx(shares.tolist(), rel=1e-6)
    whitened = placed("pca", vectors, dims, whiten=True)
    torch.testing.assert_close(whitened.points.std(0), torch.ones(dims), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_groups_stay_together(method: str) -> None:
    vectors, groups = three_groups()
    found = placed(method, vectors)
    assert found.points.dtype == torch.float32 and found.points.shape == (60, 2)
    gaps = torch.cdist(found.points, found.points).fill_diagonal_(torch.inf)
    assert (groups[gaps.argmin(1)] == groups).all()
    assert trustworthiness(vectors, found.points, 5) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_and_nothing_else(method: str) -> None:
    """Bit for bit the same at a seed, whatever the state of the random numbers of the caller, which stays as it is."""
    vectors, _ = three_groups(12)
    kept = vectors.clone()
    found = []
    for start in (1, 2):
        random.seed(start)
        np.random.seed(start)
        torch.manual_seed(start)
        before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # type: ignore[index]
        found.append(placed(method, vectors, seed=3).points)
        assert random.getstate() == before[0]
        assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
        assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(found[0], found[1]) and torch.equal(vectors, kept)
    if registry.find("embed", method).random and method != "sklearn.tsne":  # which begins with principal components
        assert not torch.equal(found[0], placed(method, vectors, seed=4).points)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dims", [2, 3])
def test_of_few_images(method: str, dims: int) -> None:
    """Laid out from the least number on, one fewer is refused with that number."""
    least = {"umap.umap": dims + 2, "sklearn.pca": dims + 1}.get(method, max(4, dims + 1))
    vectors = torch.randn(least, 6, generator=torch.Generator().manual_seed(0))
    found = placed(method, vectors, dims)
    assert found.points.shape == (least, dims) and found.points.isfinite().all()
    with pytest.raises(BadInput, match=rf"at least {least} images; got {least - 1}|in at most {dims - 1} directions"):
        placed(method, vectors[:-1], dims)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_equal_images_and_features_that_do_not_vary(method: str) -> None:
    vectors = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).repeat(10, 1)
    vectors[:, 2] = 7.0
    assert placed(method, vectors).points.isfinite().all()


def test_how_many_neighbours_were_used_is_stated() -> None:
    vectors = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert placed("tsne", vectors).diagnostics["perplexity"] == 3.0
    assert placed("tsne", vectors, perplexity=5.0).diagnostics["perplexity"] == 5.0
    assert placed("umap", vectors).diagnostics["n_neighbors"] == 9
    assert placed("opentsne.tsne", vectors).diagnostics.keys() == {"perplexity", "kl_divergence"}


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("tsne", {"perplexity": 20.0}, "perplexity is from 1 to below 10"),
        ("tsne", {"iterations": 10}, "at least 250 iterations; got 10"),
        ("tsne", {"metric": "unheard"}, "scikit-learn: "),
        ("opentsne.tsne", {"perplexity": 4.0}, "perplexity is from 1 to 3, a third"),
        ("umap", {"n_neighbors": 10}, "n_neighbors is from 2 to 9"),
        ("umap", {"min_dist": 2.0}, "min_dist is from 0 to 1"),
        ("umap", {"metric": "unheard"}, "umap: "),
    ],
)
def test_options_that_cannot_be(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        placed(method, torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), **options)


@pytest.mark.parametrize(
    ("method", "package", "line"),
    [
        ("umap", "umap", r'umap-learn is not installed; pip install "torchloupe\[umap\]"'),
        ("opentsne.tsne", "openTSNE", r'pip install "torchloupe\[opentsne\]"'),
        ("tsne", "sklearn.manifold", 'pip install "scikit-learn'),
        ("pca", "sklearn.decomposition", 'pip install "scikit-learn'),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    method: str, package: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=line):
        placed(method, torch.rand(10, 4))


def test_the_solver_and_the_graph_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchloupe_adapters.pynndescent import descend
    from torchloupe_adapters.scipy import assign

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.setitem(sys.modules, "pynndescent", None)
    with pytest.raises(MissingDependency, match="pip install scipy"):
        assign(torch.ones(1, 1))
    with pytest.raises(MissingDependency, match="umap"):
        descend(torch.ones(1, 2), torch.rand(200, 2), 3, "l2", 0)
