"""Streaming statistics against the plain answer: everything kept, then sorted, counted or averaged."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchloupe_core import statistics as module
from torchloupe_core.errors import BadInput
from torchloupe_core.statistics import Extremes, Features, Histogram, Moments, Quantiles, Sampled, Statistic, Top

MAKERS: dict[str, Callable[[], Any]] = {
    "top": lambda: Top(4),
    "bottom": lambda: Top(4, largest=False),
    "top, several of one image": lambda: Top(7, per_image=3),
    "sampled": lambda: Sampled(9, seed=3),
    "moments": lambda: Moments(),
    "covariance": lambda: Moments(covariance=True),
    "histogram": lambda: Histogram(64),
    "quantiles": lambda: Quantiles(32),
    "features": lambda: Features(),
}


def maps(n: int = 40, channels: int = 6, size: tuple[int, int] = (5, 4), seed: int = 0) -> Tensor:
    """Maps with ties: rectified and rounded, one channel dead, one constant, one negative."""
    values = torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed)).mul(2).round().relu()
    values[:, 1] = 0
    values[:, 2] = 1.5
    values[:, 3] *= -1
    return values


def fed(statistic: Any, values: Tensor, size: int = 8, indices: Sequence[int] | None = None) -> Any:
    """A statistic that has seen these maps in batches, of the images of these indices."""
    numbers = torch.arange(len(values)) if indices is None else torch.tensor(indices)
    for start in range(0, len(values), size):
        part = slice(start, start + size)
        statistic.update(statistic.look(values[part], numbers[part]), numbers[part])
    return statistic


def plain_top(values: Tensor, k: int, *, largest: bool = True, per_image: int = 1) -> Extremes:
    """Every activation kept, then sorted stably: first within each image, then over all images."""
    sign = 1 if largest else -1
    rows: list[list[tuple[float, int, int]]] = []
    for channel in range(values.shape[1]):
        kept: list[tuple[float, int, int]] = []
        for image in range(len(values)):
            flat = values[image, channel].flatten().tolist()
            order = sorted(range(len(flat)), key=lambda place: -sign * flat[place])
            kept += [(flat[place], image, place) for place in order[:per_image]]
        kept.sort(key=lambda one: -sign * one[0])
        rows.append((kept + [(-sign * float("inf"), -1, -1)] * k)[:k])
    scores, indices, positions = (torch.tensor([[one[field] for one in row] for row in rows]) for field in range(3))
    return Extremes(scores, indices, positions)


def require_equal(found: Any, expected: Any) -> None:
    """The same answer to the last bit."""
    if isinstance(found, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(found, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            require_equal(one, other)
    elif hasattr(found, "__dict__"):
        require_equal(tuple(vars(found).values()), tuple(vars(expected).values()))
    else:
        assert found == expected


# -- the largest and the smallest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("k", "per_image"), [(1, 1), (9, 1), (9, 3), (60, 1), (30, 25), (130, 2)])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_top_is_what_sorting_everything_gives(k: int, per_image: int, size: int, largest: bool) -> None:
    values = maps()
    found = fed(Top(k, largest=largest, per_image=per_image), values, size).compute()
    require_equal(found, plain_top(values, k, largest=largest, per_image=per_image))
    assert torch.equal(found.found, found.indices >= 0)
    assert int(found.found.sum(1)[0]) == min(k, 40 * min(per_image, 20))


def test_top_ranks_equal_values_by_image_within_a_batch_of_any_order() -> None:
    values = torch.zeros(6, 2, 1, 1)
    found = fed(Top(3), values, 3, indices=[2, 0, 1, 5, 3, 4]).compute()
    assert found.indices.tolist() == [[0, 1, 2]] * 2
    assert found.positions.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_top_in_other_precisions(dtype: torch.dtype) -> None:
    values = maps().to(dtype)
    for per_image in (1, 3, 18):
        expected = plain_top(values.double(), 5, per_image=per_image)
        found = fed(Top(5, per_image=per_image), values).compute()
        assert found.scores.dtype == dtype
        require_equal(
            (found.scores.double(), found.indices, found.positions),
            (expected.scores.double(), expected.indices, expected.positions),
        )


def test_top_of_maps_of_several_sizes() -> None:
    small, large = maps(8, size=(2, 2)), maps(8, size=(7, 3), seed=1)
    top = Top(12, per_image=6)
    top.update(top.look(small, torch.arange(8)), torch.arange(8))
    top.update(top.look(large, torch.arange(8, 16)), torch.arange(8, 16))
    padded = torch.cat([torch.nn.functional.pad(small.flatten(2), (0, 17), value=-torch.inf), large.flatten(2)])
    expected = plain_top(padded[..., None], 12, per_image=6)
    require_equal(top.compute(), expected)


def test_where_in_the_map_is_asked_only_of_those_that_may_count(monkeypatch: pytest.MonkeyPatch) -> None:
    values = maps(8)
    top = fed(Top(4), values)
    monkeypatch.setattr(module, "_first", None)
    scores, positions = top.look(values - 10, torch.arange(len(values)))
    assert scores.eq(-torch.inf).all()
    assert positions.eq(-1).all()
    bar = top.compute().scores[:, -1]
    _, positions = top.look(
        values.minimum(bar[:, None, None]), torch.arange(len(values))
    )  # as good as the last one held is not enough
    assert positions.eq(-1).all()


# -- drawn images -----------------------------------------------------------------------------------------------------


def test_a_sample_holds_each_images_largest_value() -> None:
    values = maps()
    indices, scores, positions = fed(Sampled(15, seed=1), values, 7).compute()
    assert len(indices) == 15
    assert indices.tolist() == sorted(set(indices.tolist()))
    expected = values[indices].flatten(2).max(2)
    require_equal((scores, positions), (expected.values, expected.indices))
    indices, _, _ = fed(Sampled(100), values, 7).compute()
    assert indices.tolist() == list(range(40))


def test_a_sample_is_drawn_evenly_and_by_its_seed() -> None:
    values = torch.zeros(200, 1, 1, 1)
    counts = torch.zeros(200)
    for seed in range(300):
        counts[fed(Sampled(20, seed=seed), values, 200).compute()[0]] += 1
    assert counts.sum() == 300 * 20
    chi = ((counts - 30).square() / (30 * 0.9)).sum()  # 199 degrees of freedom: 199 +- 20
    assert 120 < chi < 290
    halves = counts.view(2, 100).sum(1)
    assert (halves - 3000).abs().max() < 5 * (300 * 20 * 0.25 * 0.9) ** 0.5
    one, other = (fed(Sampled(20, seed=seed), values, 200).compute()[0] for seed in (0, 1))
    assert not torch.equal(one, other)


# -- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2**18, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_numpys(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    mixing = torch.randn(5, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    values = torch.einsum(
        "ncij,cd->ndij", torch.randn(30, 5, 6, 7, dtype=dtype, generator=torch.Generator().manual_seed(0)), mixing
    )
    values = values + torch.arange(5, dtype=dtype)[:, None, None] * 30  # means far from zero lose digits when squared
    flat = values.transpose(0, 1).flatten(1).double().numpy()
    mean, covariance = fed(Moments(covariance=True), values, 7).compute()
    _, variance = fed(Moments(), values, 7).compute()
    closeness = {"rtol": 1e-12, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 3e-6}
    assert mean.dtype == covariance.dtype == variance.dtype == torch.float64
    np.testing.assert_allclose(mean, flat.mean(1), **closeness)
    np.testing.assert_allclose(covariance, np.cov(flat, ddof=0), **closeness)
    np.testing.assert_allclose(variance, flat.var(1), **closeness)


def test_moments_of_values_whose_squares_float32_cannot_hold() -> None:
    values = maps() * 1e30
    _, covariance = fed(Moments(covariance=True), values).compute()
    expected = np.cov(values.transpose(0, 1).flatten(1).double().numpy(), ddof=0)
    np.testing.assert_allclose(covariance, expected, rtol=1e-6, atol=1e54)


# -- histograms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2**18, 64])
@pytest.mark.parametrize("bins", [4, 64, 100, 1024])
@pytest.mark.parametrize("scale", [1e-8, 0.3, 1.0, 1e4])
def test_histograms_are_torchs_whatever_the_order_of_the_values(
    bins: int, scale: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    values = torch.randn(30, 4, 5, 4, generator=torch.Generator().manual_seed(0)) * scale
    values[:, 2] = values[:, 2].mul(8).round().div(8)  # values on the edges
    values[0, 3, 0, 0], values[1, 3, 0, 1] = -1e-30, 0.0  # just below an edge, and on it
    values *= torch.linspace(0.01, 3, 30)[:, None, None, None]  # so that the range grows
    counts, edges = fed(Histogram(bins), values, 4).compute()
    again, same = fed(Histogram(bins), values.flip(0), 7).compute()
    require_equal((again, same), (counts, edges))
    reach = edges[-1].item()
    assert edges[0] == -reach
    assert 2.0 ** round(np.log2(reach)) == reach
    assert reach > values.abs().max()
    assert values.abs().max() >= reach / 2 or reach == 2.0**-20
    for channel in range(4):
        expected = torch.histogram(values[:, channel].double().flatten(), edges).hist
        assert torch.equal(counts[channel], expected.long())


@pytest.mark.parametrize("bins", [12, 100, 1024])
def test_values_beside_an_edge_fall_on_their_side_of_it(bins: int) -> None:
    edges = (torch.arange(-bins // 2, bins // 2 + 1, dtype=torch.float64) / (bins // 2))[:-1].float()
    ends = torch.tensor([-torch.inf, torch.inf])
    values = torch.cat([edges, edges[1:].nextafter(ends[0]), edges.nextafter(ends[1])])
    counts, bounds = fed(Histogram(bins), values[:, None, None, None], 50).compute()
    assert bounds[-1] == 2  # as -1 is among them
    assert torch.equal(counts[0], torch.histogram(values.double(), bounds).hist.long())


def test_a_histogram_begins_with_zeros_and_holds_the_range_it_needs() -> None:
    histogram = fed(Histogram(8), torch.zeros(3, 1, 2, 2))
    histogram.update(
        histogram.look(torch.tensor([-1.0, 0.999, 0.25]).view(3, 1, 1, 1), torch.arange(3)), torch.arange(3)
    )
    counts, edges = histogram.compute()
    assert edges.tolist() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert counts.tolist() == [[0, 0, 1, 0, 13, 1, 0, 0]]


# -- quantiles --------------------------------------------------------------------------------------------------------

SHARES = (0.0, 0.005, 0.25, 0.5, 0.9, 0.995, 1.0)


def exactly(flat: Tensor, q: float) -> Tensor:
    """The smallest value with at least a share q at or below it, of each row."""
    return flat.sort(1).values[:, max(1, int(np.ceil(q * flat.shape[1]))) - 1]


def rank_error(flat: Tensor, found: Tensor, q: float) -> float:
    """How far the nearest rank of the values found is from q, at most, as a share of all."""
    below, upto = ((flat < found[:, None]).double().mean(1), (flat <= found[:, None]).double().mean(1))
    return torch.maximum((below - q).clamp(min=0), (q - upto).clamp(min=0)).max().item()


@pytest.mark.parametrize("values", [maps(40), maps(102, size=(5, 4)), maps(1, 4, (1, 1))])
def test_quantiles_are_exact_while_everything_is_held(values: Tensor) -> None:
    sketch = fed(Quantiles(2048), values, 7).compute()
    flat = values.transpose(0, 1).flatten(1)
    assert len(sketch.levels) == 1
    for q in SHARES:
        assert torch.equal(sketch.quantile(q), exactly(flat, q))


STREAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda uniform: uniform.erfinv(),
    "skewed": lambda uniform: (20 * uniform).exp(),
    "constant": lambda uniform: torch.full_like(uniform, 3.0),
    "rectified": lambda uniform: (uniform - 0.3).relu(),
    "rising": lambda uniform: uniform.flatten().sort().values.view(uniform.shape),
    "falling": lambda uniform: uniform.flatten().sort(descending=True).values.view(uniform.shape),
    "periodic": lambda uniform: torch.arange(uniform.numel()).view(uniform.shape).remainder(2048).float(),
    "a few rare values": lambda uniform: (uniform > 0.997).float() * uniform,
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("images", "side", "size"), [(3000, 4, 256), (300, 14, 256), (12, 70, 256), (4000, 1, 64)])
def test_ranks_of_quantiles_are_off_by_little(stream: str, images: int, side: int, size: int) -> None:
    uniform = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = STREAMS[stream](uniform)
    quantiles = fed(Quantiles(size), values, 8)
    sketch, flat = quantiles.compute(), values.transpose(0, 1).flatten(1)
    assert sum(level.shape[1] << place for place, level in enumerate(sketch.levels)) == flat.shape[1]
    assert all(level.shape[1] <= size for level in sketch.levels)
    for q in SHARES:
        assert rank_error(flat, sketch.quantile(q), q) <= 1.5 / size, q


def test_halvings_keep_the_lower_and_the_upper_values_alike() -> None:
    quantiles = Quantiles(8)
    coins = [quantiles._coin(2) for _ in range(2000)]
    assert all(first != second for first, second in zip(coins[::2], coins[1::2], strict=True))
    assert 400 < sum(coins[::2]) < 600


# -- features ---------------------------------------------------------------------------------------------------------


def test_features_are_means_of_each_map_in_order_of_the_images() -> None:
    values = maps(10)
    indices, vectors = fed(Features(), values, 3, indices=[9, 2, 4, 1, 3, 0, 8, 7, 6, 5]).compute()
    assert indices.tolist() == list(range(10))
    for row, place in enumerate([5, 3, 1, 4, 2, 9, 8, 7, 6, 0]):
        torch.testing.assert_close(vectors[row], values[place].mean((1, 2)))
    assert fed(Features(), values.double()).compute()[1].dtype == torch.float64
    assert [len(one) for one in Features().compute()] == [0, 0]


# -- shards and states ------------------------------------------------------------------------------------------------

COUNTED = [name for name in MAKERS if name not in ("moments", "covariance", "quantiles")]  # to the last bit


def shards(count: int, *, interleaved: bool) -> list[list[int]]:
    images = list(range(40))
    size = -(-40 // count)
    return [images[part::count] if interleaved else images[part * size : (part + 1) * size] for part in range(count)]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_shards_merge_into_the_whole(name: str, count: int, interleaved: bool) -> None:
    values, parts = maps(), shards(count, interleaved=interleaved)
    whole = fed(MAKERS[name](), values)
    merged = MAKERS[name]()  # one that has seen nothing
    for part in reversed(parts):
        merged.merge(fed(MAKERS[name](), values[part], 3, indices=part))
    merged.merge(MAKERS[name]())
    if name in COUNTED:
        require_equal(merged.compute(), whole.compute())
    elif name == "quantiles":
        flat = values.transpose(0, 1).flatten(1)
        for q in SHARES:
            assert rank_error(flat, merged.compute().quantile(q), q) <= 1.5 / 32
    else:
        for found, expected in zip(merged.compute(), whole.compute(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # products are made in float32


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def through_numpy(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(value) for name, value in state.items()})
    file.seek(0)
    return dict(np.load(file))


@pytest.mark.parametrize("way", [through_torch, through_numpy])
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_put_away_goes_on_to_the_same_answer(
    name: str, way: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    values, indices = maps(), list(range(40))
    first = fed(MAKERS[name](), values[:24])
    state = first.state_dict()
    for value in state.values():  # nothing more goes into a file than there is to say
        assert not isinstance(value, Tensor) or value.untyped_storage().nbytes() == value.nbytes
    fed(first, values[24:], indices=indices[24:])  # the state is a copy
    second = MAKERS[name]()
    second.load_state_dict(way(state))
    fed(second, values[24:], indices=indices[24:])
    require_equal(second.compute(), fed(MAKERS[name](), values).compute())
    third = MAKERS[name]()
    third.load_state_dict(state)  # nor was it changed by who goes on from it
    require_equal(third.compute(), fed(MAKERS[name](), values[:24]).compute())


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_before_the_first_image_is_a_state(name: str) -> None:
    statistic = MAKERS[name]()
    statistic.load_state_dict(through_numpy(MAKERS[name]().state_dict()))
    require_equal(fed(statistic, maps()).compute(), fed(MAKERS[name](), maps()).compute())


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (lambda: Top(5), lambda: Top(4), r"Top\(k=5\) cannot take in what one with k=4"),
        (lambda: Top(4), lambda: Top(4, largest=False), "largest"),
        (lambda: Top(4), lambda: Top(4, per_image=2), "per_image"),
        (lambda: Sampled(4), lambda: Sampled(4, seed=1), "seed"),
        (lambda: Moments(), lambda: Moments(covariance=True), "covariance"),
        (lambda: Histogram(8), lambda: Histogram(16), "bins"),
        (lambda: Quantiles(8), lambda: Quantiles(16), "size"),
    ],
)
def test_only_those_made_alike_merge(one: Callable[[], Any], other: Callable[[], Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        one().merge(fed(other(), maps()))
    with pytest.raises(BadInput, match=message):
        one().load_state_dict(fed(other(), maps()).state_dict())


def test_a_state_of_another_statistic_is_refused() -> None:
    with pytest.raises(BadInput, match="no state of Moments: it lacks covariance, count, mean, scatter"):
        Moments().load_state_dict(Top(3).state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Top(0),
        lambda: Top(3, per_image=0),
        lambda: Sampled(0),
        lambda: Histogram(6),
        lambda: Histogram(0),
        lambda: Quantiles(7),
        lambda: Quantiles(6),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Statistic]) -> None:
    with pytest.raises(BadInput, match="got"):
        make()


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_quantile_is_a_share(q: float) -> None:
    with pytest.raises(BadInput, match="share from 0 to 1"):
        fed(Quantiles(), maps()).compute().quantile(q)


def test_nothing_has_no_quantile() -> None:
    with pytest.raises(BadInput, match="no values were seen"):
        Quantiles().compute().quantile(0.5)


# -- memory -----------------------------------------------------------------------------------------------------------


def tensors(thing: Any) -> Iterator[Tensor]:
    """All that are in lists, tuples and attributes."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors(part)
    elif hasattr(thing, "__dict__"):
        yield from tensors(list(vars(thing).values()))


def held(statistic: Any) -> int:
    """Bytes behind all tensors of the state."""
    return sum(one.untyped_storage().nbytes() for one in tensors(statistic))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "features"])
def test_what_is_held_does_not_grow_with_the_data_set(name: str) -> None:
    values, statistic, sizes = maps(8), MAKERS[name](), {}
    for batch in range(1000):
        indices = torch.arange(batch * 8, batch * 8 + 8)
        statistic.update(statistic.look(values + batch % 3, indices), indices)
        sizes[batch + 1] = held(statistic)
    limit = sizes[100] if name != "quantiles" else sizes[100] + 4 * 32 * 6 * 4  # a level for each doubling
    assert sizes[1000] <= limit


@pytest.mark.parametrize(("n", "size"), [(4, (40, 40)), (4, (1, 1)), (1, (5, 4))])
@pytest.mark.parametrize("name", MAKERS)
def test_what_was_seen_holds_nothing_of_the_map(name: str, n: int, size: tuple[int, int]) -> None:
    """Not a view of it either: the model may write into its map next."""
    values = maps(n, size=size)
    for statistic in (MAKERS[name](), fed(MAKERS[name](), maps(4, size=(40, 40)))):
        looked = list(tensors(statistic.look(values, torch.arange(len(values)))))
        assert looked
        for tensor in looked:
            assert tensor.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()
            assert tensor.untyped_storage().nbytes() <= 4 * max(tensor.numel() * tensor.element_size(), 64)
