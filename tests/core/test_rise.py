"""RISE: its masks against torch's own interpolation, and the maps of models whose answer is known."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.baselines import blurred
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.methods import rise as module
from torchloupe_core.methods.rise import RandomMasks
from torchloupe_core.query import Query


def masks(
    n: int, cells: int = 7, p: float = 0.5, size: tuple[int, int] = (32, 48), seed: int = 0, *, antithetic: bool = False
) -> RandomMasks:
    generator = torch.Generator().manual_seed(seed)
    return RandomMasks(n, cells, p, size, generator, like=torch.zeros(1), antithetic=antithetic)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "size"), [(7, (32, 48)), (7, (224, 224)), (3, (10, 7)), (1, (8, 8)), (8, (5, 5))])
def test_masks_are_the_enlarged_and_shifted_grids(cells: int, size: tuple[int, int]) -> None:
    made = masks(12, cells, size=size)
    found = made[0:12]
    assert len(made) == 12
    assert found.shape == (12, *size)
    cell = [math.ceil(length / cells) for length in size]
    enlarged = F.interpolate(
        made._grids[:, None].float(), [(cells + 1) * one for one in cell], mode="bilinear", align_corners=False
    )[:, 0]
    for index in range(12):
        row, column = (int(shift[index]) for shift in made._shifts)
        assert 0 <= row < cell[0]
        assert 0 <= column < cell[1]
        expected = enlarged[index, row : row + size[0], column : column + size[1]]
        torch.testing.assert_close(found[index], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_masks_are_p_at_every_pixel_on_average(p: float) -> None:
    made = masks(20_000, 4, p, (12, 16))
    mean = torch.cat([made[start : start + 1000] for start in range(0, 20_000, 1000)]).mean(0)
    # The standard error of a Bernoulli mean is at most 0.0035; interpolated cells vary less.
    torch.testing.assert_close(mean, torch.full((12, 16), p), atol=5 * 0.0035, rtol=0)


def test_shifts_are_uniform_over_a_cell() -> None:
    made = masks(20_000, 7, size=(32, 48))  # cells of 5 x 7
    for shift, cell in zip(made._shifts, (5, 7), strict=True):
        counts = torch.bincount(shift, minlength=cell)
        assert len(counts) == cell
        assert (counts - 20_000 / cell).abs().max() < 5 * (20_000 / cell) ** 0.5


def test_masks_do_not_depend_on_how_they_are_sliced() -> None:
    made = masks(20)
    whole = made[0:20]
    torch.testing.assert_close(torch.cat([made[0:3], made[3:4], made[4:20]]), whole, atol=1e-6, rtol=0)
    assert torch.equal(masks(20)[0:20], whole)
    torch.testing.assert_close(masks(13)[0:13], whole[:13])  # a shorter run has the same masks
    assert not torch.equal(masks(20, seed=1)[0:20], whole)
    assert whole.min() >= 0
    assert whole.max() <= 1 + 1e-6


# -- maps -------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two outputs linear in the pixels: weights, and a constant."""

    def __init__(self, size: tuple[int, int] = (16, 24), constant: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        coarse = torch.randn(1, 1, 3, 4, generator=generator)
        smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)[0, 0]
        self.weight, self.constant = nn.Parameter(smooth / 100), constant

    def forward(self, x: Tensor) -> Tensor:
        first = (x.sum(1) * self.weight).sum((1, 2))
        return torch.stack([first, torch.full_like(first, self.constant)], 1)


SIZE = (3, 16, 24)
X = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1)) + 0.5


def asked(constant: float = 0.0) -> Handle:
    return tl.wrap(Linear(constant=constant), input_size=SIZE)


def explained(target: Any, *, constant: float = 0.0, n_masks: int = 2000, **options: Any) -> tl.Attribution:
    return tl.explain(asked(constant), X, target=target, method="rise", n_masks=n_masks, **options)


def test_a_constant_model_gives_that_constant_and_zero_gives_zero() -> None:
    found = explained(1, constant=3.0, cells=4).values
    assert found.shape == (2, 16, 24)
    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=0.3, rtol=0)
    assert abs(found.mean().item() - 3) < 0.05
    assert torch.equal(explained(1).values, torch.zeros(2, 16, 24))


def test_the_map_is_equation_6_over_explicit_masks() -> None:
    found = explained(0, n_masks=50, cells=3, p=0.4, seed=7).values
    made = RandomMasks(50, 3, 0.4, (16, 24), torch.Generator().manual_seed(7), like=X)[0:50]
    model = Linear()
    expected = torch.zeros(2, 16, 24)
    for image in range(2):
        for mask in made:
            with torch.no_grad():
                expected[image] += model(X[image : image + 1] * mask)[0, 0] * mask / (50 * 0.4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_linear_model_is_recovered() -> None:
    """Pixel by pixel the covariance with a linear model follows its weights, blurred by the masks."""
    ones = torch.ones(1, *SIZE)
    found = tl.explain(asked(), ones, target=0, method="rise", n_masks=4000, cells=6).values[0]
    weight = asked().module.weight.detach()
    correlation = torch.corrcoef(torch.stack([found.flatten(), weight.flatten()]))[0, 1]
    assert correlation > 0.9


def test_the_seed_decides_and_the_batch_size_does_not() -> None:
    first = explained(0, n_masks=100, seed=3, batch_size=7)
    for batch_size in (1, 64, 100, None):
        again = explained(0, n_masks=100, seed=3, batch_size=batch_size)
        torch.testing.assert_close(again.values, first.values, atol=1e-5, rtol=1e-4)
    assert (explained(0, n_masks=100, seed=4).values - first.values).abs().max() > 0.01
    assert first.seed == 3
    assert {key: first.options[key] for key in ("n_masks", "cells", "p")} == {"n_masks": 100, "cells": 7, "p": 0.5}
    assert 200 <= first.forwards <= 204  # and the score of each image


def test_each_image_is_explained_as_if_alone() -> None:
    both = explained(["logit:0", "margin:0"], n_masks=60, constant=2.0)
    for index, target in enumerate(("logit:0", "margin:0")):
        model = asked(constant=2.0)
        alone = tl.explain(model, X[index], target=target, method="rise", n_masks=60)
        torch.testing.assert_close(both.values[index], alone.values[0], atol=1e-5, rtol=1e-4)


def test_margin_is_the_difference_of_two_maps() -> None:
    margin = explained("margin:0", constant=2.0, n_masks=60).values
    difference = explained("logit:0-logit:1", constant=2.0, n_masks=60).values
    torch.testing.assert_close(margin, difference)


def test_covered_pixels_become_the_baseline() -> None:
    colour = torch.tensor([0.1, 0.2, 0.3])[:, None, None].expand(SIZE)
    shown = tl.explain(asked(), colour, target=0, method="rise", n_masks=40, baseline=colour)
    made = RandomMasks(40, 7, 0.5, (16, 24), torch.Generator().manual_seed(0), like=X)[0:40]
    with torch.no_grad():
        value = Linear()(colour[None])[0, 0]  # nothing changes, whatever is covered
    torch.testing.assert_close(shown.values[0], value * made.sum(0) / 20, atol=1e-5, rtol=1e-4)
    half = tl.explain(asked(), X[:1], target=0, method="rise", n_masks=40, baseline=0.5).values
    assert not torch.allclose(half, tl.explain(asked(), X[:1], target=0, method="rise", n_masks=40).values)


def test_masks_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    enlarge, most = RandomMasks.__getitem__, 0

    def counted(self: RandomMasks, chosen: slice) -> Tensor:
        nonlocal most
        slice_of_masks = enlarge(self, chosen)
        made.append(weakref.ref(slice_of_masks))
        most = max(most, sum(len(one) for ref in made if (one := ref()) is not None))
        return slice_of_masks

    monkeypatch.setattr(module.RandomMasks, "__getitem__", counted)
    explained(0, n_masks=500, batch_size=5)
    assert len(made) == 2 * (100 + 32)  # for the model in batches of 5, for the sums in blocks of 16
    assert most <= 2 * (5 + 16)  # of each the present one, and the one before it until it is replaced


def test_half_precision_models_do_not_lose_the_sum() -> None:
    found = explained(1, constant=3.0, cells=4, dtype=torch.bfloat16, batch_size=2, n_masks=1500).values
    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=0.3, rtol=0)


@pytest.mark.parametrize("baseline", ["blur", "mean"])
def test_covered_pixels_become_the_images_own(baseline: str) -> None:
    images = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(8))
    found = tl.explain(asked(), images, target=0, method="rise", n_masks=40, baseline=baseline)
    hidden = blurred(images) if baseline == "blur" else images.mean((2, 3), keepdim=True)
    made = masks(40, size=(16, 24))[0:40]
    for image, behind, values in zip(images, hidden, found.values, strict=True):
        with torch.no_grad():
            scores = Linear()(image * made[:, None] + behind * (1 - made[:, None]))[:, 0]
        torch.testing.assert_close(values, (scores[:, None, None] * made).sum(0) / 20, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_masks": 0}, "rise needs"),
        ({"cells": 0}, "rise needs"),
        ({"p": 0.0}, "rise needs"),
        ({"p": 1.0}, "rise needs"),
        ({"p": -1}, "rise needs"),
        ({"tolerance": 0}, "tolerance .* got 0"),
        ({"tolerance": -0.1}, "tolerance .* got -0.1"),
        ({"tolerance": float("nan")}, "tolerance .* got nan"),
        ({"antithetic": True, "p": 0.4}, "antithetic .* got p=0.4"),
        ({"antithetic": True, "n_masks": 5}, "even n_masks; got p=0.5, 5"),
        ({"baseline": "grey"}, "baseline .* got 'grey'"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        explained(0, **{"n_masks": 4, **options})


def test_a_baseline_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="baseline"):
        explained(0, n_masks=4, baseline=torch.zeros(2, 5, 5))


# -- how sure the map is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_standard_error_is_that_of_a_mean(antithetic: bool) -> None:
    found = explained(0, n_masks=50, cells=3, seed=7, antithetic=antithetic)
    made = masks(50, 3, size=(16, 24), seed=7, antithetic=antithetic)
    for image in range(2):
        shares = []
        for mask in made[0:50]:
            with torch.no_grad():
                shares.append(Linear()(X[image : image + 1] * mask)[0, 0] * mask / 0.5)
        if antithetic:
            shares = [(one + other) / 2 for one, other in zip(shares[::2], shares[1::2], strict=True)]
        error = torch.stack(shares).std(0) / len(shares) ** 0.5
        torch.testing.assert_close(found.standard_error[image], error, atol=1e-6, rtol=1e-3)
        relative = error.mean() / torch.stack(shares).mean(0).std(correction=0)
        assert found.diagnostics["relative_error"][image] == pytest.approx(relative.item(), rel=1e-3)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_standard_error_is_the_deviation_over_seeds(antithetic: bool) -> None:
    model = asked()
    runs = [
        tl.explain(model, X[0], target=0, method="rise", n_masks=64, cells=4, seed=seed, antithetic=antithetic)
        for seed in range(200)
    ]
    spread = torch.cat([run.values for run in runs]).var(0).mean()
    stated = torch.cat([run.standard_error for run in runs]).square().mean()
    assert stated / spread == pytest.approx(1, abs=0.12)  # 200 seeds know a variance to 10%, positions help a little


def test_the_standard_error_survives_a_large_constant() -> None:
    """Complementary masks see a constant exactly; squares summed from zero would drown the rest in rounding."""
    plain = explained("logit:0", constant=1.1, antithetic=True)
    found = explained("logit:0+1000*logit:1", constant=1.1, antithetic=True)
    torch.testing.assert_close(found.values, plain.values + 1100, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.standard_error, plain.standard_error, atol=1e-5, rtol=1e-2)


def test_one_mask_says_nothing_of_the_error() -> None:
    found = explained(0, n_masks=1)
    assert found.standard_error.isnan().all()
    assert found.values.isfinite().all()


# -- complementary masks ----------------------------------------------------------------------------------------------


def test_antithetic_masks_are_followed_by_their_complements() -> None:
    made = masks(40, antithetic=True)[0:40]
    torch.testing.assert_close(made[1::2], 1 - made[::2])
    assert len({tuple(mask.flatten().tolist()) for mask in made}) == 40


def test_antithetic_masks_halve_the_variance() -> None:
    """At equal forwards, on the embedded model: measured .50 of the variance over six scenes (logits)."""
    scenes = tl.demo_scenes(2, 5)
    target = [tl.logit(int(label)) for label in scenes.true_labels]
    spread = []
    for antithetic in (False, True):
        runs = [
            tl.explain("demo", scenes.images, target=target, method="rise", n_masks=32, seed=n, antithetic=antithetic)
            for n in range(8)
        ]
        spread.append(torch.stack([run.values for run in runs]).var(0).mean())
    assert spread[1] < 0.8 * spread[0]


# -- as many masks as it takes ----------------------------------------------------------------------------------------


def test_it_stops_when_the_map_is_stable() -> None:
    found = explained(0, n_masks=4000, tolerance=0.5, antithetic=True)
    for image, used in enumerate(found.diagnostics["n_masks"]):
        assert used % 128 == 0
        assert 128 < used < 4000
        assert found.diagnostics["relative_error"][image] <= 0.5
        shorter = explained(0, n_masks=used - 128, antithetic=True)
        assert shorter.diagnostics["relative_error"][image] > 0.5
        same = explained(0, n_masks=used, antithetic=True)
        torch.testing.assert_close(found.values[image], same.values[image])
        torch.testing.assert_close(found.standard_error[image], same.standard_error[image])


def test_when_it_stops_does_not_depend_on_the_batch_size() -> None:
    first = explained(0, tolerance=0.5, antithetic=True, batch_size=128)
    for batch_size in (7, 200, None):
        again = explained(0, tolerance=0.5, antithetic=True, batch_size=batch_size)
        assert again.diagnostics["n_masks"] == first.diagnostics["n_masks"]
        torch.testing.assert_close(again.values, first.values, atol=1e-5, rtol=1e-4)


def test_a_stable_image_costs_no_more_forwards() -> None:
    found = explained(["logit:1", "logit:0"], n_masks=1000, tolerance=1e-3, batch_size=32)
    assert found.diagnostics["n_masks"] == [128, 1000]  # a zero map is known exactly
    assert found.diagnostics["relative_error"][0] == 0
    assert found.diagnostics["relative_error"][1] > 1e-3
    assert found.forwards == 1128 + 2
    alone = found[1]
    assert alone.diagnostics["n_masks"] == [1000]


def test_progress_ends_at_the_end() -> None:
    told: list[tuple[int, int]] = []
    heard = Query(asked(), X, asked().bind(0, X), progress=lambda done, total: told.append((done, total)))
    module.rise(heard, n_masks=1000, tolerance=0.9, antithetic=True)
    assert told == sorted(told)
    assert (1000, 2000) in told
    assert told[-1] == (2000, 2000)


# -- other targets of the same run ------------------------------------------------------------------------------------


class Three(nn.Module):
    """Three outputs that are not linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.head = nn.Conv2d(3, 6, 5, stride=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return found


TARGETS = ["logit:1", "prob:2", "margin:0", "0.5*logit:0-prob:1", ["logit:cat", "margin:dog"]]


def of_three(target: Any = 0, **options: Any) -> tl.Attribution:
    model = tl.wrap(Three(), input_size=SIZE, classes=["cat", "dog", "eel"])
    return tl.explain(model, X, target=target, method="rise", **{"n_masks": 40, "cells": 4, "seed": 2, **options})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"n_masks": 500, "tolerance": 0.7, "p": 0.4}])
def test_another_class_is_answered_as_if_asked_anew(target: Any, options: dict[str, Any], tmp_path: Path) -> None:
    run = of_three(classes=True, **options)
    for kept in (run, tl.open(run.save(tmp_path / "run"))):
        assert isinstance(kept, tl.Attribution)
        found = kept.of(target)
        used = set(run.diagnostics["n_masks"])
        anew = of_three(target, **{**options, "tolerance": None, **({"n_masks": used.pop()} if len(used) == 1 else {})})
        assert used <= {anew.options["n_masks"]}
        torch.testing.assert_close(found.values, anew.values)
        torch.testing.assert_close(found.standard_error, anew.standard_error)
        torch.testing.assert_close(found.scores, anew.scores)
        assert found.targets == anew.targets
        assert found.diagnostics["relative_error"] == pytest.approx(anew.diagnostics["relative_error"], rel=1e-4)
        assert found.forwards == 0


def test_the_same_target_is_answered_to_the_bit() -> None:
    run = of_three(["margin:1", "prob:0"], classes=True)
    again = run.of("logit:2").of(run.targets)
    assert torch.equal(again.values, run.values)
    assert torch.equal(again.standard_error, run.standard_error)
    assert torch.equal(run.of("logit:1")[1].values, run[1].of("logit:1").values)


def test_images_that_stopped_at_different_counts_keep_their_own() -> None:
    run = of_three("logit:0", classes=True, n_masks=2000, tolerance=0.6)
    used = run.diagnostics["n_masks"]
    assert len(set(used)) == 2
    assert run.outputs.shape == (2, 1 + max(used), 3)
    for index, one in enumerate(used):
        assert run.outputs[index, : 1 + one].isfinite().all()
        assert run.outputs[index, 1 + one :].isnan().all()
        assert torch.equal(run.of("logit:0").values[index], run.values[index])
        assert torch.equal(run[index].of("logit:0").values[0], run.values[index])


def test_the_outputs_are_those_of_the_image_and_its_variants() -> None:
    run = of_three(classes=True, batch_size=7)
    made = masks(40, 4, size=(16, 24), seed=2)[0:40]
    for index in range(2):
        with torch.no_grad():
            expected = Three()(torch.cat([X[index : index + 1], X[index] * made[:, None]]))
        torch.testing.assert_close(run.outputs[index], expected)
    assert run.outputs.dtype == torch.float32
    assert run.forwards == 2 * 41
    assert of_three().outputs is None


def test_outputs_are_whole_where_memory_ends() -> None:
    class Small(Three):
        most = 10**6

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    model = tl.wrap(Small(), input_size=SIZE)
    options: dict[str, Any] = {"target": 0, "method": "rise", "n_masks": 40, "classes": True, "batch_size": 16}
    roomy = tl.explain(model, X, **options)
    model.module.most = 3
    torch.testing.assert_close(tl.explain(model, X, **options).outputs, roomy.outputs)


def test_what_was_not_kept_is_not_answered() -> None:
    run = of_three(classes=True)
    with pytest.raises(NotApplicable, match=r"'conv'.*logit:"):
        run.of("conv:1")
    with pytest.raises(UnknownName, match="cat"):
        run.of("logit:cart")
    with pytest.raises(UnknownName, match="0 to 2"):
        run.of(3)
    with pytest.raises(BadInput, match="3 targets for 2 images"):
        run.of([0, 1, 2])
    with pytest.raises(NotApplicable, match="classes=True"):
        of_three().of(1)
    with pytest.raises(NotApplicable, match="classes=True"):
        tl.explain(tl.wrap(Three(), input_size=SIZE), X, method="grad_cam", target=0).of(1)


@pytest.mark.parametrize("target", ["conv:1", "0.5*conv:1+logit:0"])
def test_outputs_are_not_kept_where_a_layer_is_asked_about(target: str) -> None:
    with pytest.raises(NotApplicable, match="reads layer 'conv'"):
        of_three(target, classes=True)
    assert of_three(target).standard_error.isfinite().all()
