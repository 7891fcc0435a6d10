"""Quantus' metrics: those of ours that it has too, it as its users call it, and what it leaves behind."""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import captum.metrics
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from judged import Additive, case_of, noise
from torchloupe_adapters.quantus import faithfulness, maps, randomisation, robustness
from torchloupe_adapters.quantus.asked import evaluated, seen
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.metrics import complexity, localised, sanity
from torchloupe_core.metrics import faithfulness as native
from torchloupe_core.metrics.alike import ranks, spearman, ssim
from torchloupe_core.metrics.case import Case
from torchloupe_core.metrics.imputation import imputed
from torchloupe_core.query import Query
from torchloupe_core.registry import find

quantus = pytest.importorskip("quantus")

ALL = sorted(entry.name for entry in tl.methods("compare") if entry.backend == "quantus")
QUICK: dict[str, dict[str, Any]] = {
    "quantus.faithfulness_correlation": {"n_samples": 12},
    "quantus.faithfulness_estimate": {"step": 512},
    "quantus.infidelity": {"patch_size": 16},
    "quantus.monotonicity": {"step": 512},
    "quantus.monotonicity_correlation": {"step": 512, "n_samples": 3},
    "quantus.non_sensitivity": {"patch_size": 16},
    "quantus.pixel_flipping": {"step": 512},
    "quantus.region_perturbation": {"patch_size": 16},
    "quantus.road": {"shares": (0.2, 0.5)},
    "quantus.selectivity": {"patch_size": 16},
    "quantus.sufficiency": {"threshold": 0.99},
}
ASKING = {
    "avg_sensitivity",
    "efficient_mprt",
    "local_lipschitz_estimate",
    "max_sensitivity",
    "mprt",
    "random_logit",
    "relative_input_stability",
    "relative_output_stability",
}


class Curved(nn.Module):
    """A convolution, ReLU, a linear layer; in double precision with `double`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(17)
            self.conv, self.fc = nn.Conv2d(channels, 5, 3), nn.Linear(5 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))  # type: ignore[no-any-return]


def curved(channels: int = 1, **more: Any) -> Case:
    """Four images of 8 x 8 pixels, two classes asked about, and maps of noise."""
    targets = [tl.logit(label) for label in (0, 2, 0, 2)]
    return case_of(Curved(channels), noise(4, channels, 8, 8, seed=1), noise(4, 8, 8, seed=2), targets, **more)


def masked() -> Case:
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[0, 2:5, 1:6] = masks[1, :, :3] = masks[2, 7, 7] = masks[3, 1:7, 1:7] = True
    return curved(masks=masks)


def users(case: Case, kind: str, *, explain: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Quantus as its users call it: on the model itself and on arrays, maps as they are unless told otherwise."""
    settings = {"normalise": False, "abs": False, "return_aggregate": False, "disable_warnings": True}
    masks = None if case.masks is None else case.masks[:, None].numpy()
    classes = [int(bound.terms[0][1].label) for bound in case.query.targets]  # type: ignore[attr-defined]
    np.random.seed(case.query.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(quantus, kind)(**{**settings, **options})(
            model=case.query.handle.module,
            x_batch=case.query.inputs.numpy(),
            y_batch=np.array(classes),
            a_batch=case.maps[:, None].double().numpy(),
            s_batch=masks,
            channel_first=True,
            explain_func=explain,
            softmax=False,
        )
    return found if isinstance(found, dict) else torch.tensor(np.array(found, dtype=float)).float()


def alike(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-4, rtol=1e-4)


# -- ours and Quantus' ------------------------------------------------------------------------------------------------


def test_complexity_is_quantus() -> None:
    case = curved()
    alike(complexity.sparsity(case), users(case, "Sparseness", abs=True))
    alike(complexity.complexity(case), users(case, "Complexity", abs=True))
    alike(complexity.sparsity(case), maps.sparseness(case))
    alike(complexity.complexity(case), maps.complexity(case))
    tiny = curved()
    tiny.maps = case.maps * 1e-8  # as small as gradients may be; Quantus adds 1e-7 to each
    alike(maps.sparseness(tiny), maps.sparseness(case))
    assert (users(tiny, "Sparseness", abs=True) - maps.sparseness(case)).abs().max() > 0.2


def test_maps_stay_as_they_are() -> None:
    """Quantus divides by their sum in place."""
    case = curved()
    found = case.maps.double().abs()
    evaluated(case, "Complexity", seen(case), found)
    assert torch.equal(found, case.maps.double().abs())


def test_pointing_is_quantus() -> None:
    case = masked()
    case.maps[0, 3, 3] = case.maps[3, 0, 0] = 9.0
    assert (
        localised.pointing(case).tolist() == users(case, "PointingGame").tolist() == maps.pointing_game(case).tolist()
    )
    assert maps.pointing_game(case)[0] == 1 and maps.pointing_game(case)[3] == 0


def test_energy_pointing_is_quantus() -> None:
    """Of positive values. With signs, a relevance mass is any number, so ours of that name is of magnitudes."""
    case = masked()
    alike(localised.energy_pointing(case), maps.attribution_localisation(case))
    signed = users(case, "RelevanceMassAccuracy")
    assert ((signed < 0) | (signed > 1)).any()
    magnitudes = maps.relevance_mass_accuracy(case)
    case.maps = case.maps.abs()
    alike(magnitudes, localised.energy_pointing(case))
    alike(localised.energy_pointing(case), users(case, "RelevanceMassAccuracy"))
    alike(localised.energy_pointing(case), maps.relevance_mass_accuracy(case))


def test_iou_follows_from_quantus_rank_accuracy() -> None:
    """With r k of k pixels inside a mask of k, the overlap is r k and the union (2 - r) k."""
    case = masked()
    rank = maps.relevance_rank_accuracy(case)
    alike(rank, users(case, "RelevanceRankAccuracy"))
    alike(localised.iou(case), rank / (2 - rank))
    alike(maps.top_k_intersection(case, k=15)[:1], rank[:1])  # a mask of 15 pixels
    alike(maps.top_k_intersection(case, k=7), users(case, "TopKIntersection", k=7))


def test_auc_is_of_ranks() -> None:
    """How often a pixel inside is above one outside. Average precision is another area, of the same order."""
    case = masked()
    inside = case.truth().flatten(1)
    places, count = ranks(case.maps) + 1, inside.sum(1)
    expected = ((places * inside).sum(1) - count * (count + 1) / 2) / (count * (64 - count))
    alike(maps.auc(case), expected)
    alike(maps.auc(case), users(case, "AUC"))
    case.maps = case.truth().float()
    assert maps.auc(case).tolist() == localised.average_precision(case).tolist() == [1.0] * 4


def test_an_empty_mask_says_nothing() -> None:
    case = masked()
    assert case.masks is not None
    case.masks[1] = False
    assert users(case, "PointingGame")[1] == 1  # Quantus writes NaN into truth values
    for metric in (maps.pointing_game, maps.auc, maps.relevance_mass_accuracy, maps.attribution_localisation):
        assert metric(case).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("step", [4, 8])
def test_deletion_is_pixel_flipping(step: int) -> None:
    """But for the image as it is, where our curve begins."""
    case = curved()
    heights = native.curve(case, step, 0.0, removing=True)
    alike(heights[:, 1:], users(case, "PixelFlipping", features_in_step=step, perturb_baseline=0.0))
    alike(faithfulness.pixel_flipping(case, step=step), native.area(heights[:, 1:]))
    several = curved(3)
    heights = native.curve(several, step, "mean", removing=True)
    alike(faithfulness.pixel_flipping(several, step=step, baseline="mean"), native.area(heights[:, 1:]))
    steps = 64 // step
    whole = (heights[:, 0] + heights[:, 1]) / 2 / steps  # the first step
    found = faithfulness.pixel_flipping(several, step=step, baseline="mean") * (steps - 1) / steps + whole
    alike(found, native.deletion(several, step=step, baseline="mean"))


def test_squares_are_quantus() -> None:
    case = curved(3)
    lost = users(case, "RegionPerturbation", patch_size=2, perturb_baseline=0.0)
    alike(faithfulness.region_perturbation(case, patch_size=2), lost.mean(1))
    alike(faithfulness.region_perturbation(case, patch_size=2, n_regions=5), lost[:, :5].mean(1))
    left = users(case, "Selectivity", patch_size=2, perturb_baseline=0.0)
    alike(faithfulness.selectivity(case, patch_size=2), native.area(left))
    alike(left, case.scores()[:, None] - lost)
    alike(faithfulness.selectivity(case, patch_size=8), case.score_variants(torch.zeros_like(case.query.inputs)))


def test_what_falls_more_is_better() -> None:
    """Quantus states the contrary."""
    weights = noise(1, 8, 8)
    inputs = torch.ones(2, 1, 8, 8)
    true = case_of(Additive(weights), inputs, weights.expand(2, -1, -1))
    other = case_of(Additive(weights), inputs, noise(2, 8, 8, seed=5))
    assert quantus.RegionPerturbation.score_direction.value == "lower"
    assert find("compare", "quantus.region_perturbation").better == "higher"
    found, without = (faithfulness.region_perturbation(case, patch_size=2) for case in (true, other))
    assert (found > without + 1).all()


def test_correlations_are_quantus() -> None:
    case = curved()
    found = users(case, "FaithfulnessEstimate", features_in_step=4, perturb_baseline=0.0)
    alike(faithfulness.faithfulness_estimate(case, step=4), found)
    found = users(case, "FaithfulnessCorrelation", nr_runs=9, subset_size=5, perturb_baseline=0.0)
    alike(faithfulness.faithfulness_correlation(case, n_samples=9, subset_size=5), found)


def test_correlations_of_true_contributions_are_one() -> None:
    weights, inputs = noise(3, 8, 8), noise(2, 3, 8, 8, seed=1)
    case = case_of(Additive(weights), inputs, (inputs * weights).sum(1))
    alike(faithfulness.faithfulness_estimate(case, step=4), torch.ones(2))
    alike(faithfulness.faithfulness_correlation(case, n_samples=9, subset_size=5), torch.ones(2))
    assert faithfulness.infidelity(case, patch_size=2).max() < 1e-6
    case.maps = -3 * case.maps  # at its best scale
    assert faithfulness.infidelity(case, patch_size=2).max() < 1e-6


def test_the_value_rises_as_what_is_for_it_comes_in() -> None:
    weights, inputs = noise(1, 8, 8).abs(), noise(2, 1, 8, 8, seed=1).abs()
    inputs[1] = -inputs[1]  # all is against it
    case = case_of(Additive(weights), inputs, (inputs * weights).sum(1))
    assert users(case, "Monotonicity", features_in_step=8).tolist() == [1, 1]  # of any map: it changes nothing
    assert faithfulness.monotonicity(case).tolist() == [1, 0]


def test_uncertainty_of_a_sum_is_that_of_its_weights() -> None:
    """With all pixels half grey, the mean square change is the weight's square times that of the grey."""
    weights, inputs = noise(1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    case = case_of(Additive(weights), inputs, weights.expand(2, -1, -1))
    found = faithfulness.monotonicity_correlation(case, step=1, n_samples=60)
    assert (found > 0.97).all()
    direct = users(case, "MonotonicityCorrelation", abs=True, nr_samples=20)
    alike(faithfulness.monotonicity_correlation(case, step=1, n_samples=20), direct)


def test_greys_are_between_black_and_white() -> None:
    """Drawn once for each image and time; the first image's value is below 1e-5, which Quantus alone stumbles over."""
    weights, inputs = noise(3, 4, 4), noise(2, 3, 4, 4, seed=1)
    inputs[0, 0, 0, 0] -= ((inputs[0] * weights).sum() - 1e-6) / weights[0, 0, 0]
    handle = tl.wrap(Additive(weights), input_size=(3, 4, 4), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    case = Case(Query(handle, inputs, handle.bind("logit:0", inputs)), noise(2, 4, 4, seed=2))
    assert case.scores()[0].abs() < 1e-5 < case.scores()[1].abs()
    rng, order = np.random.RandomState(0), case.maps.abs().flatten(1).argsort(1)
    sums, moved = torch.zeros(2, 8), torch.zeros(2, 8)
    for group in range(8):
        chosen = order[:, 2 * group : 2 * group + 2]
        sums[:, group] = case.maps.abs().flatten(1).gather(1, chosen).sum(1)
        for _ in range(3):
            grey = torch.from_numpy(rng.uniform(0, 1, 2)).float()
            shown = handle.spec.normalised(grey[:, None, None, None].expand(2, 3, 4, 4)) - inputs
            change = (shown * weights).sum(1).flatten(1).gather(1, chosen).sum(1)
            moved[:, group] += change**2 / 3
    alike(faithfulness.monotonicity_correlation(case, step=2, n_samples=3), spearman(sums, moved))


def test_infidelity_is_captums_of_squares() -> None:
    """Each square away from a picture of ones, in order. `captum.infidelity` draws noise instead."""
    case = curved(2)
    place = iter(torch.eye(16).view(16, 1, 1, 4, 4).repeat_interleave(2, 3).repeat_interleave(2, 4))

    def perturbed(cover: Tensor) -> tuple[Tensor, Tensor]:
        hole = next(place).expand_as(cover)
        return hole, cover - hole

    expected = captum.metrics.infidelity(
        lambda cover: case.query.score(case.query.inputs * cover),
        perturbed,
        torch.ones(4, 1, 8, 8),
        case.maps[:, None],
        n_perturb_samples=16,
        max_examples_per_batch=4,
        normalize=True,
    )
    alike(faithfulness.infidelity(case, patch_size=2), expected.detach())


def test_what_neither_map_nor_model_minds() -> None:
    weights = noise(1, 8, 8)
    weights[:, :4, :4] = 0  # one square of four
    case = case_of(Additive(weights), torch.ones(2, 1, 8, 8), weights.expand(2, -1, -1).clone())
    assert faithfulness.non_sensitivity(case, patch_size=4).tolist() == [0, 0]
    case.maps[1] = (weights == 0).float()
    assert faithfulness.non_sensitivity(case, patch_size=4).tolist() == [0, 4]
    tiny = case_of(case.query.handle.module, case.query.inputs, 1e-6 * case.maps)
    assert faithfulness.non_sensitivity(tiny, patch_size=4).tolist() == [0, 4]
    fine = users(case, "NonSensitivity", abs=True, eps=0.01, perturb_baseline=0.0)
    peaks = case.maps.abs().flatten(1).amax(1)
    assert (peaks >= 1).all()  # so that relative to the peak no more pixels count
    assert faithfulness.non_sensitivity(case, patch_size=1)[1] == fine[1]


def test_imputation_is_quantus() -> None:
    """Pixel by pixel within the tolerance of our solver, 1e-4 of the residual; what the model makes of them to 1e-4."""
    case = curved(3)
    image, hidden = case.query.inputs[0], torch.rand(8, 8, generator=torch.Generator().manual_seed(4)) < 0.6
    fill = quantus.functions.perturb_func.noisy_linear_imputation
    theirs = torch.from_numpy(fill(arr=image.numpy(), indices=np.flatnonzero(hidden.numpy()), noise=0.0))
    ours = imputed(image[None], hidden[None], 0.0, torch.Generator())[0]
    torch.testing.assert_close(ours, theirs.float(), atol=1e-3, rtol=0)
    model = case.query.handle.module
    alike(model(ours[None]).softmax(1), model(theirs.float()[None]).softmax(1))


def test_road_is_quantus() -> None:
    """Which says how many images keep their class; ours says at how many shares, and native `road` by how much."""
    case = curved()
    shares = tuple(share / 100 for share in range(5, 100, 10))
    kept = users(case, "ROAD", percentages=[100 * share for share in shares], noise=0.0)
    found = faithfulness.road(case, shares=shares, noise=0.0)
    assert 0 < found.mean() < 1 and found.mean().item() == pytest.approx(np.mean(list(kept.values())), abs=1e-6)
    with pytest.raises(IndexError):
        users(curved(3), "ROAD")
    for index, several in enumerate(faithfulness.road(curved(3), shares=shares, noise=0.0)):
        case = curved(3)
        ordered, model = case.maps[index].flatten().argsort(descending=True), case.query.handle.module
        label = int(case.query.targets[index].terms[0][1].label)  # type: ignore[attr-defined]
        stays = []
        for share in shares:
            hidden = torch.zeros(64, dtype=torch.bool)
            hidden[ordered[: int(64 * share)]] = True
            filled = imputed(case.query.inputs[index : index + 1], hidden.view(1, 8, 8), 0.0, torch.Generator())
            stays.append(float(model(filled).argmax() == label))
        assert several.item() == pytest.approx(np.mean(stays))


def test_one_map_that_says_nothing_takes_nothing_from_the_others() -> None:
    case, less = curved(), curved()
    less.maps[1] = 2.0
    less.maps[0] -= 100  # in the same order
    expected = faithfulness.road(case)
    expected[1] = torch.nan
    torch.testing.assert_close(faithfulness.road(less), expected, equal_nan=True)


def test_completeness_is_quantus() -> None:
    """Which asks whether two floats are the same: yes for whole numbers, where our gap is 0."""
    weights = torch.randint(-4, 5, (1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    inputs = torch.randint(-4, 5, (4, 1, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    shares = inputs * weights
    shares[2, 0, 3, 3] += 1
    case = case_of(Additive(weights), inputs, shares.sum(1), attributed=shares)
    yes = users(case, "Completeness", perturb_baseline=0.0)
    assert yes.tolist() == (sanity.completeness_gap(case) == 0).float().tolist() == [1, 1, 0, 1]


# -- the method asked again -------------------------------------------------------------------------------------------


def slope(module: nn.Module, inputs: Tensor, *, times_input: bool = False) -> Tensor:
    """The gradient of the first output, over channels."""
    x = inputs.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(module(x)[:, 0].sum(), x)
    return (found * x.detach() if times_input else found).sum(1)


def again_by(
    explained: Callable[..., Tensor],
    own: Handle,
    inputs: Tensor,
    images: list[int],
    *,
    handle: Handle | None = None,
    seed: int | None = None,
) -> Tensor:
    return explained((handle or own).module, inputs)


def as_arrays(explained: Callable[..., Tensor], model: nn.Module, inputs: Any, targets: Any) -> Any:
    return explained(model, torch.from_numpy(inputs).float())[:, None].numpy()


def test_sensitivity_is_captums() -> None:
    """Of the same draw; `captum.max_sensitivity` draws by torch."""
    case = curved(2, again=lambda inputs, images, **_: inputs.sum(1) ** 2)
    case.maps = case.query.inputs.sum(1) ** 2

    def drawn(inputs: Tensor, radius: float) -> tuple[Tensor, ...]:
        return (inputs + torch.from_numpy(np.random.uniform(-radius, radius, inputs.shape)).float(),)

    np.random.seed(0)
    expected = captum.metrics.sensitivity_max(
        lambda inputs: (inputs[0].sum(1) ** 2,),
        case.query.inputs,
        perturb_func=drawn,
        perturb_radius=0.1,
        n_perturb_samples=6,
        max_examples_per_batch=4,
    )
    found = robustness.max_sensitivity(case, radius=0.1, n_samples=6)
    alike(found, expected)
    mean = robustness.avg_sensitivity(case, radius=0.1, n_samples=6)
    assert (mean < found).all() and (mean > found / 6).all()


def test_maps_that_are_the_input_change_as_it_does() -> None:
    case = curved(again=lambda inputs, images, **_: 5 * inputs.sum(1))
    case.maps = 5 * case.query.inputs.sum(1)
    own = case.query.inputs.flatten(1).norm(dim=1)
    alike(robustness.local_lipschitz_estimate(case), 1 / own)
    alike(robustness.relative_input_stability(case), torch.ones(4))
    np.random.seed(0)
    outputs, largest = case.query.handle.module, torch.zeros(4)
    for _ in range(3):
        moved = case.query.inputs + torch.from_numpy(np.random.uniform(-0.1, 0.1, (4, 64))).float().view(4, 1, 8, 8)
        change = ((moved - case.query.inputs) / case.query.inputs).flatten(1).norm(dim=1)
        largest = largest.maximum(change / (outputs(moved) - outputs(case.query.inputs)).norm(dim=1))
    found = robustness.relative_output_stability(case, radius=0.1, n_samples=3)
    torch.testing.assert_close(found, largest.detach(), rtol=1e-3, atol=0)
    assert robustness.relative_output_stability(case, radius=9.0).isfinite().all()  # whatever is predicted then
    few = robustness.max_sensitivity(case, images=2)
    assert few.isnan().tolist() == [False, False, True, True]


def test_efficient_randomisation_is_quantus() -> None:
    """The same formula, of the same maps; each draws weights of its own."""
    after, changed = noise(4, 8, 8, seed=9) ** 3, []

    def again(inputs: Tensor, images: list[int], *, handle: Handle | None = None, seed: int | None = None) -> Tensor:
        if handle is not None:
            changed.append(handle)
        return curved().maps if handle is None else after

    case = curved(again=again)
    alike(randomisation.efficient_mprt(case), sanity.randomisation_rise(case))
    own = case.query.handle.module
    assert len(changed) == 2 and all(one.module is not own for one in changed)
    for one in changed:
        assert not any(
            torch.equal(new, old) for new, old in zip(one.module.parameters(), own.parameters(), strict=True)
        )
    expected = spearman(case.maps.abs(), after.abs())
    alike(randomisation.mprt(case), expected)  # at every layer, and none for the model as it is
    after[0] = 0.5  # a constant map has nothing of the other
    alike(randomisation.mprt(case), expected.where(torch.arange(4) > 0, 0.0))
    case.maps[1] = 0.5
    alike(randomisation.mprt(case), expected.where(torch.arange(4) > 1, 0.0))
    case.maps[1] = curved().maps[1]
    after[0] = -case.maps[0]
    expected[0] = 1.0
    theirs = users(
        case,
        "MPRT",
        abs=True,
        return_average_correlation=True,
        explain=lambda model, inputs, targets: (case.maps if model is own else after)[:, None].numpy(),
    )
    alike(theirs, (2 * expected + 1) / 3)  # of two layers, and the model as it is


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "independent"])
def test_layers_are_drawn_anew_in_order(order: str) -> None:
    changed: list[list[bool]] = []
    case = curved(2)
    before = {name: value.clone() for name, value in case.query.handle.module.state_dict().items()}

    def again(inputs: Tensor, images: list[int], *, handle: Handle | None = None, seed: int | None = None) -> Tensor:
        if handle is not None:
            now = handle.module.state_dict()
            changed.append([not torch.equal(now[name], before[name]) for name in ("conv.weight", "fc.weight")])
        return slope((handle or case.query.handle).module, inputs)

    case.again = again
    case.maps = slope(case.query.handle.module, case.query.inputs)
    found = randomisation.mprt(case, layer_order=order)
    assert found.isfinite().all() and (found < 0.9).all()
    assert (
        changed
        == {
            "top_down": [[False, True], [True, True]],
            "bottom_up": [[True, False], [True, True]],
            "independent": [[True, False], [False, True]],
        }[order]
    )
    assert all(torch.equal(value, before[name]) for name, value in case.query.handle.module.state_dict().items())


def test_input_invariance_is_quantus() -> None:
    """Which shifts the bias of a first convolution, and says yes or no to 1e-4; ours, of any model, says by how much.

    Quantus leaves the first number of an image unshifted: one that this model does not read.
    """
    for times_input, yes in ((False, True), (True, False)):
        case = curved(2)
        handle, explained = case.query.handle, partial(slope, times_input=times_input)
        handle.module.conv.weight.data[:, 0, 0, 0] = 0
        case.maps = explained(handle.module, case.query.inputs)
        case.again = partial(again_by, explained, handle)
        found = users(case, "InputInvariance", input_shift=-1.0, explain=partial(as_arrays, explained))
        assert found.tolist() == [float(yes)] * 4
        assert ((sanity.input_invariance(case, shift=-1.0) < 1e-4) == yes).all()


def test_another_target_is_another_images() -> None:
    """By the structural similarity of pictures; Quantus alone takes their rows for one line."""
    by_target = {0: noise(4, 13, 13, seed=5), 2: noise(4, 13, 13, seed=6)}
    labels = [0, 2, 0, 2]

    def again(inputs: Tensor, images: list[int], **_: Any) -> Tensor:
        return torch.stack([by_target[labels[image]][place] for place, image in enumerate(images)])

    images = noise(4, 1, 13, 13)  # wider than the window of the similarity
    targets = [tl.logit(label) for label in labels]
    case = case_of(nn.Flatten(), images, again(images, [0, 1, 2, 3]), targets, again=again)
    alike(randomisation.random_logit(case), ssim(case.maps, again(images, [1, 0, 1, 0])))
    one = case_of(nn.Flatten(), case.query.inputs, case.maps, again=again)
    with pytest.raises(NotApplicable, match="all images have the target logit:0"):
        randomisation.random_logit(one)


def test_images_with_similar_maps_are_of_one_class() -> None:
    class ByMean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    inputs = signs[:, None, None, None].expand(5, 1, 8, 8).clone()
    near, far = noise(8, 8).abs(), noise(8, 8, seed=1).abs()
    found = torch.stack([near, near, far, far, 20 * near]) + 0.01 * noise(5, 8, 8, seed=2)
    case = case_of(ByMean(), inputs, found)
    share = faithfulness.sufficiency(case, threshold=0.1)
    assert share[:4].tolist() == [1, 1, 0, 0] and share[4].isnan()
    with pytest.raises(NotApplicable, match="compares images with each other"):
        faithfulness.sufficiency(case_of(ByMean(), inputs[:1], found[:1]))


def test_a_part_of_a_case_asks_about_its_own_images() -> None:
    asked: list[list[int]] = []
    case = masked()
    case.again = lambda inputs, images, **_: asked.append(images) or inputs  # type: ignore[func-returns-value]
    part = case.only(2, 4)
    assert part.again is not None and len(part) == 2
    part.again(part.query.inputs, [1, 0])
    assert asked == [[3, 2]]


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_runs_on_the_demo_model_and_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    scenes, model = tl.demo_scenes(4, seed=3), tl.load("demo")
    model.module.train()
    for parameter in model.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    filters, handlers, level = list(warnings.filters), list(logging.root.handlers), logging.root.level
    before = Snapshot(model.module, scenes.images)
    found = tl.compare(
        model,
        scenes.images,
        methods=["grad_cam", "captum.integrated_gradients"],
        target=[int(label) for label in scenes.true_labels],
        metrics=ALL,
        masks=scenes.masks[:, 0],
        options={**QUICK, "captum.integrated_gradients": {"steps": 8}},
        progress=False,
    )
    assert before.differences() == [] and capsys.readouterr().out == ""
    assert (list(warnings.filters), list(logging.root.handlers), logging.root.level) == (filters, handlers, level)
    assert set(found.refused) <= {f"{name}, {metric}" for name in found.methods for metric in ALL}
    for place, name in enumerate(ALL):
        assert found.values[:2, place].isfinite().any(1).all(), (name, found.refused)
        assert found.values[2:, place].isnan().all() == (name.removeprefix("quantus.") in ASKING), name
    beaten = {"pixel_flipping", "selectivity", "region_perturbation", "infidelity", "road", "auc", "sparseness"}
    for name in (f"quantus.{one}" for one in beaten):
        values = found.values[:, ALL.index(name)].mean(1)
        better = values[1] > values[2] if found.better[ALL.index(name)] == "higher" else values[1] < values[2]
        assert better, name  # integrated gradients than noise


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        (faithfulness.faithfulness_correlation, {"n_samples": 5, "subset_size": 9}),
        (faithfulness.monotonicity_correlation, {"n_samples": 2}),
        (faithfulness.selectivity, {"patch_size": 2}),
        (faithfulness.road, {}),
    ],
)
def test_the_number_of_images_at_once_does_not_matter(metric: Callable[..., Tensor], options: dict[str, Any]) -> None:
    one, all_of_them = curved(2), curved(2)
    one.query = Query(one.query.handle, one.query.inputs, one.query.targets, batch_size=1)
    found = metric(one, **options)
    assert found.isfinite().all()
    alike(found, metric(all_of_them, **options))


def test_targets_that_are_no_class() -> None:
    case = case_of(Curved(2), noise(2, 2, 8, 8), noise(2, 8, 8, seed=1), "conv:1")
    with case.query.handle.borrow():
        heights = native.curve(case, 8, 0.0, removing=True)
        alike(faithfulness.pixel_flipping(case), native.area(heights[:, 1:]))
        with pytest.raises(NotApplicable, match="which class is predicted, and conv:1 is no class; road is of any"):
            faithfulness.road(case)


def test_a_softmax_inside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantus takes out the last one of a model, and logs it by a handler that it puts on the root."""
    probable = nn.Sequential(Curved(1), nn.Softmax(1))
    case = case_of(probable, noise(4, 1, 8, 8, seed=1), noise(4, 8, 8, seed=2), again=lambda x, i, **_: noise(4, 8, 8))
    plain = case_of(Curved(1), noise(4, 1, 8, 8, seed=1), noise(4, 8, 8, seed=2), "prob:0", again=case.again)
    alike(faithfulness.pixel_flipping(case), faithfulness.pixel_flipping(plain))
    monkeypatch.setattr(logging.root, "handlers", [])
    assert randomisation.efficient_mprt(case).isfinite().all()
    assert logging.root.handlers == [] and len(list(probable.modules())) == 5


def test_what_quantus_has_against_a_map_is_said() -> None:
    case = curved()
    case.maps = torch.zeros(4, 8, 8)
    with pytest.raises(
        NotApplicable, match=r"Quantus' PixelFlipping makes nothing of these maps: .*equal to zero"
    ) as told:
        faithfulness.pixel_flipping(case)
    assert isinstance(told.value.__cause__, AssertionError)


@pytest.mark.slow
def test_the_first_use_leaves_randomness_as_it_is() -> None:
    """Importing Quantus draws from Python's."""
    script = (
        "import logging, random, sys, warnings, numpy as np, torch, torchloupe as tl\n"
        "from torchloupe_adapters.quantus.asked import library\n"
        "look = lambda: (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), "
        "list(warnings.filters), list(logging.root.handlers), torch.get_num_threads())\n"
        "random.seed(0)\nbefore = look()\nassert 'quantus' not in sys.modules\nlibrary()\n"
        "assert 'quantus' in sys.modules and look() == before\n"
    )
    root = Path(__file__).parents[2]
    tree = os.pathsep.join(str(root / storey) for storey in ("src", "adapters", "recipes"))
    environment = {**os.environ, "PYTHONPATH": tree}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Failing(Curved):
    """Runs as long as images have a corner."""

    def forward(self, x: Tensor) -> Tensor:
        if not x[:, 0, 0, 0].all():
            np.random.rand(), random.random(), torch.rand(1)
            warnings.simplefilter("error")
            raise ValueError("of the model's own")
        return super().forward(x)


def test_errors_of_the_model_and_the_method_are_their_own() -> None:
    filters = list(warnings.filters)
    failing = case_of(Failing(1), noise(4, 1, 8, 8), noise(4, 8, 8, seed=1))
    before = Snapshot(failing.query.handle.module, failing.query.inputs)
    with pytest.raises(ValueError, match=r"^of the model's own") as told:
        faithfulness.pixel_flipping(failing)
    assert not isinstance(told.value, NotApplicable)
    assert before.differences() == [] and list(warnings.filters) == filters

    def again(*_: Any, **__: Any) -> Tensor:
        np.random.rand(), random.random(), torch.rand(1)
        raise KeyError("of the method's own")

    case = curved(again=again)
    before = Snapshot(case.query.handle.module, case.query.inputs)
    for metric in (robustness.max_sensitivity, randomisation.mprt):
        with pytest.raises(KeyError, match="of the method's own"):
            metric(case)
    assert before.differences() == []


def test_nothing_is_held_on_to() -> None:
    """Quantus' caches keep every module they have seen."""
    case = curved(again=lambda inputs, images, **_: noise(4, 8, 8, seed=7))
    faithfulness.pixel_flipping(case)
    randomisation.efficient_mprt(case)
    kept = weakref.ref(case.query.handle.module)
    del case
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda case: faithfulness.pixel_flipping(case, step=3), "a divisor of the image's 64; got 3"),
        (lambda case: faithfulness.monotonicity(case, step=0), "step is a number of pixels"),
        (lambda case: faithfulness.selectivity(case, patch_size=0), "patch_size is at least 1; got 0"),
        (lambda case: faithfulness.infidelity(case, patch_size=3), "squares of 3 pixels do not fill images of 8 x 8"),
        (lambda case: faithfulness.non_sensitivity(case, patch_size=5), "squares of 5 pixels"),
        (lambda case: faithfulness.faithfulness_correlation(case, subset_size=64), "less than the image's 64 pixels"),
        (lambda case: faithfulness.road(case, shares=()), "shares are parts of the pixels"),
        (lambda case: maps.top_k_intersection(case, k=64), "fewer than the image's 64; got 64"),
        (lambda case: robustness.max_sensitivity(case, radius=0.0), "size of changes above 0"),
        (lambda case: randomisation.mprt(case, images=0), "images is how many are asked again"),
        (lambda case: randomisation.mprt(case, layer_order="sideways"), "layer_order is"),
    ],
)
def test_bad_input_is_said(call: Callable[[Case], Tensor], message: str) -> None:
    case = masked()
    case.again = lambda inputs, images, **_: case.maps
    with pytest.raises(BadInput, match=message):
        call(case)


def test_baselines_are_not_asked_again() -> None:
    for metric in (robustness.max_sensitivity, randomisation.mprt, randomisation.random_logit):
        with pytest.raises(NotApplicable, match="nothing to ask again"):
            metric(curved())
    with pytest.raises(NotApplicable, match="needs masks="):
        maps.pointing_game(curved())
