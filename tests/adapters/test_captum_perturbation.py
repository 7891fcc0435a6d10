"""Occlusion and ablation of segments, against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum_nets import SIZE, Linear, Net, X, quarters, wrapped
from torch import nn

import torchloupe as tl
from torchloupe_core.baselines import filling
from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.query import Query


@pytest.fixture(scope="module")
def linear() -> Handle:
    return wrapped(Linear())


@pytest.fixture(scope="module")
def net() -> Handle:
    return wrapped(Net())


def test_occlusion_averages_over_the_windows_a_pixel_lies_in(linear: Handle) -> None:
    weight = linear.module.fc.weight.detach()[0].view(SIZE)
    effect = (X * weight).sum(1)  # of each pixel
    window, stride = 3, 2
    total, count = torch.zeros(5, 8, 10), torch.zeros(8, 10)
    for top in (0, 2, 4, 6):  # the last ones reach beyond the edge
        for left in (0, 2, 4, 6, 8):
            square = (slice(top, top + window), slice(left, left + window))
            total[:, *square] += effect[:, *square].sum((1, 2))[:, None, None]
            count[square] += 1
    found = tl.explain(linear, X, target=0, method="occlusion", window=window, stride=stride)
    assert found.values.shape == (5, 8, 10)
    torch.testing.assert_close(found.values, total / count, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 9}, {"window": 3, "stride": 4}, {"stride": 0}])
def test_occlusion_refuses_windows_that_leave_gaps(linear: Handle, options: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="1 <= stride <= window <= 8"):
        tl.explain(linear, X, method="occlusion", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_a_last_batch_that_is_not_full_counts_as_the_others(net: Handle, batch_size: int) -> None:
    """20 windows; the score comes from the first of all passes."""
    expected = torch.zeros(2, 8, 10)
    for top in range(0, 8, 2):
        for left in range(0, 10, 2):
            covered = X[:2].clone()
            covered[:, :, top : top + 2, left : left + 2] = 0.3
            fallen = net.score(X[:2], 1) - net.score(covered, 1)
            expected[:, top : top + 2, left : left + 2] = fallen[:, None, None]
    found = tl.explain(
        net, X[:2], target=1, method="occlusion", window=2, stride=2, baseline=0.3, batch_size=batch_size
    )
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-4)
    assert found.forwards == 2 * (20 + 1)
    torch.testing.assert_close(found.scores, net.score(X[:2], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("baseline", [None, 0.4, torch.full(SIZE, -0.7)])
def test_feature_ablation_against_a_loop(net: Handle, batch_size: int, baseline: Any) -> None:
    filling = torch.as_tensor(0.0 if baseline is None else baseline)
    expected = torch.zeros(3, 8, 10)
    for label in quarters().unique():
        inside = quarters() == label
        without = torch.where(inside, filling, X[:3])
        expected[:, inside] = (net.score(X[:3], 2) - net.score(without, 2))[:, None]
    found = tl.explain(
        net,
        X[:3],
        target=2,
        method="feature_ablation",
        segments=quarters(),
        baseline=baseline,
        batch_size=batch_size,
    )
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-4)
    assert found.forwards == 3 * (4 + 1)
    torch.testing.assert_close(found.scores, net.score(X[:3], 2), atol=1e-5, rtol=1e-5)


def test_feature_ablation_takes_segments_and_a_target_for_each_image(net: Handle) -> None:
    each = torch.stack([quarters(), quarters().flip(0), torch.zeros(8, 10, dtype=torch.long)])
    targets = ["logit:0", "conv2:3", "-logit:1"]
    found = tl.explain(net, X[:3], target=targets, method="feature_ablation", segments=each)
    for index, target in enumerate(targets):
        alone = tl.explain(net, X[index], target=target, method="feature_ablation", segments=each[index])
        torch.testing.assert_close(found.values[index], alone.values[0], atol=1e-6, rtol=1e-4)
    whole = net.score(X[2], "-logit:1") - net.score(torch.zeros(1, *SIZE), "-logit:1")
    torch.testing.assert_close(found.values[2], whole.expand(8, 10), atol=1e-5, rtol=1e-4)
    own = tl.explain(net, X[:1], target=0, method="feature_ablation", n_segments=4)
    assert 2 <= len(own.values.unique()) <= 8


@pytest.mark.parametrize(
    ("options", "says"),
    [({"segments": torch.zeros(4, 4, dtype=torch.long)}, "segments are integers"), ({"n_segments": 1}, "at least 2")],
)
def test_feature_ablation_refuses_senseless_segments(net: Handle, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        tl.explain(net, X, target=0, method="feature_ablation", **options)


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion", "feature_ablation", "lime", "deep_lift"])
@pytest.mark.parametrize("baseline", ["blur", "mean"])
def test_soft_baselines_serve_every_method_that_covers(method: str, baseline: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    model, images = tl.wrap(module, input_size=(3, 16, 16)), torch.randn(2, 3, 16, 16)
    query = Query(model, images, model.bind(0, images))
    named = tl.explain(model, images, target=0, method=method, baseline=baseline).values
    for index, given in enumerate(filling(query, baseline)):
        alone = tl.explain(model, images[index : index + 1], target=0, method=method, baseline=given).values
        torch.testing.assert_close(named[index : index + 1], alone)
    assert not torch.allclose(named, tl.explain(model, images, target=0, method=method).values)
