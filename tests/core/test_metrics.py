"""Metrics of maps against closed forms, plain loops and second libraries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from judged import Additive, case_of, noise
from torchloupe_core.baselines import blurred
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.metrics.alike import proportional, ranks, spearman, ssim, top_overlap
from torchloupe_core.metrics.case import Case, as_probability
from torchloupe_core.metrics.complexity import complexity, sparsity
from torchloupe_core.metrics.faithfulness import area, average_drop, average_increase, curve, deletion, insertion, road
from torchloupe_core.metrics.floors import FLOORS, floors
from torchloupe_core.metrics.imputation import imputed
from torchloupe_core.metrics.localised import average_precision, corloc, energy_pointing, iou, pointing, segmentation
from torchloupe_core.metrics.sanity import completeness_gap, randomised
from torchloupe_core.query import Query
from torchloupe_core.registry import Method
from torchloupe_core.specimens import SPECIMENS


@pytest.fixture
def additive() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images, and the true contributions of their pixels."""
    weights, inputs = noise(1, 8, 8).double(), noise(3, 1, 8, 8, seed=1).double()
    return Additive(weights), inputs, (inputs * weights).sum(1)


# -- insertion and deletion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 8])
def test_the_curves_of_a_plain_loop(additive: Any, step: int) -> None:
    model, inputs, maps = additive
    case = case_of(model, inputs, maps)
    removed, put_in = (curve(case, step, baseline, removing=way) for baseline, way in ((0.0, True), ("blur", False)))
    soft = blurred(inputs)
    for index in range(3):
        order = sorted(range(64), key=lambda pixel: -maps[index].flatten()[pixel].item())
        for point in range(-(-64 // step) + 1):
            reached = order[: point * step]
            less, more = inputs[index].flatten().clone(), soft[index].flatten().clone()
            less[reached] = 0.0
            more[reached] = inputs[index].flatten()[reached]
            for values, image in ((removed, less), (put_in, more)):
                expected = model(image.view(1, 1, 8, 8))[0, 0].item()
                assert values[index, point].item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(removed[:, 0], put_in[:, -1])  # both are the image itself


def test_the_area_is_that_of_the_published_code() -> None:
    curves = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    expected = (curves.sum(1) - curves[:, 0] / 2 - curves[:, -1] / 2) / 11
    torch.testing.assert_close(area(curves), expected)
    torch.testing.assert_close(area(torch.full((2, 7), 0.3)), torch.full((2,), 0.3))  # a model that never moves


def test_true_contributions_are_best(additive: Any) -> None:
    model, inputs, maps = additive
    best = case_of(model, inputs, maps)
    for seed in range(3):
        other = case_of(model, inputs, noise(3, 8, 8, seed=seed))
        assert (deletion(best) < deletion(other)).all()
        assert (insertion(best, baseline=0.0) > insertion(other, baseline=0.0)).all()
    with pytest.raises(BadInput, match="step is a number of pixels, at least 1; got 0"):
        deletion(best, step=0)


def test_insertion_begins_where_the_model_sees_nothing() -> None:
    """The published blur leaves small scenes recognisable; it is widened until they are not."""
    model, scenes = tl.load("demo"), tl.demo_scenes(8, seed=1)
    targets = [tl.prob(int(label)) for label in scenes.true_labels]
    inputs = model.inputs(scenes.images)
    case = Case(Query(model, inputs, model.bind(targets, inputs)), torch.rand(8, 64, 64))
    with model.borrow():
        assert case.score_variants(blurred(inputs)).mean() > 0.9 * case.scores().mean()
        found, blind = insertion(case, step=512), case.shared["blind"]
        grey = torch.stack([(one - one.mean((1, 2), keepdim=True)).abs().max() < 1e-6 for one in blind])
        assert (grey | (case.score_variants(blind) <= case.scores() / 2)).all() and grey.sum() <= 2
        alone = torch.cat([insertion(case.only(row, row + 1), step=512) for row in range(8)])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)  # whatever other images are there
        published = insertion(case, step=512, baseline="blur")
        assert (published > 0.8).all()


def test_probabilities_stand_in_for_logits_alone() -> None:
    for text, judged in {"logit:3": "prob:3", "logit:3-logit:1": "logit:3-logit:1", "margin:2": "margin:2"}.items():
        assert str(as_probability(tl.target(text))) == judged


# -- the image through its own map ------------------------------------------------------------------------------------


def test_drop_and_increase(additive: Any) -> None:
    model, inputs, maps = additive
    case = case_of(model, inputs, maps, "prob:0")
    flat = maps.flatten(1)
    shown = (flat - flat.amin(1, keepdim=True)) / (flat.amax(1, keepdim=True) - flat.amin(1, keepdim=True))
    before = model(inputs).softmax(1)[:, 0]
    after = model(inputs * shown.view(3, 1, 8, 8)).softmax(1)[:, 0]
    torch.testing.assert_close(average_drop(case).double(), ((before - after) / before).clamp(min=0), atol=1e-6, rtol=0)
    assert average_increase(case).tolist() == (after > before).float().tolist()


# -- road -------------------------------------------------------------------------------------------------------------


def test_removed_pixels_are_the_weighted_mean_of_their_neighbours() -> None:
    image, removed = noise(2, 3, 9, 7), torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    found = imputed(image, removed, 0.0, torch.Generator())
    torch.testing.assert_close(found.where(~removed[:, None], 0), image.where(~removed[:, None], 0))
    weights = {
        (a, b): (1 / 6 if a == 0 or b == 0 else 1 / 12) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)
    }
    for n in range(2):
        places = removed[n].nonzero().tolist()
        matrix, right = np.zeros((len(places), len(places))), np.zeros((len(places), 3))
        for row, (y, x) in enumerate(places):
            for (dy, dx), weight in weights.items():
                if 0 <= y + dy < 9 and 0 <= x + dx < 7:
                    matrix[row, row] += weight
                    if [y + dy, x + dx] in places:
                        matrix[row, places.index([y + dy, x + dx])] -= weight
                    else:
                        right[row] += weight * image[n, :, y + dy, x + dx].numpy()
        expected = np.linalg.solve(matrix, right)
        mine = np.stack([found[n, :, y, x].numpy() for y, x in places])
        np.testing.assert_allclose(mine, expected, atol=2e-3)


def test_road_prefers_the_truth(additive: Any) -> None:
    model, inputs, maps = additive
    true, inverse = road(case_of(model, inputs, maps)), road(case_of(model, inputs, -maps))
    torch.testing.assert_close(true, -inverse, atol=0.05, rtol=0)  # but for the noise
    assert (true > 0).all()
    with pytest.raises(BadInput, match="shares are parts of the pixels"):
        road(case_of(model, inputs, maps), shares=(0.0,))


# -- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_as_its_own_map_is_perfect_and_its_inverse_is_nothing(additive: Any) -> None:
    model, inputs, _ = additive
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 1:6] = True
    oracle, wrong = (case_of(model, inputs, maps.float(), masks=masks) for maps in (masks, ~masks))
    for metric in (pointing, energy_pointing, iou, average_precision, corloc):
        assert metric(oracle).tolist() == [1.0] * 3
        assert (metric(wrong) < 0.3).all()
    with pytest.raises(NotApplicable, match="needs masks="):
        pointing(case_of(model, inputs, masks.float()))


def test_a_box_counts_where_it_overlaps_the_objects_box() -> None:
    """Against plain counting, over boxes of several sizes beside the object's."""
    masks = torch.zeros(1, 20, 20, dtype=torch.bool)
    masks[0, 4:14, 5:15] = torch.eye(10, dtype=torch.bool) | torch.eye(10, dtype=torch.bool).flip(0)  # hollow
    for shift in range(8):
        values = torch.full((1, 20, 20), 0.1)
        values[0, 4 + shift : 14 + shift, 5:15] = 1.0
        values[0, 0, 19] = 0.9  # a lighter region of its own
        case = case_of(nn.Flatten(), torch.zeros(1, 1, 20, 20), values, masks=masks)
        inter = 10 * max(0, min(14, 20, 14 + shift) - max(4, 4 + shift))
        expected = inter / (100 + 10 * (min(20, 14 + shift) - 4 - shift) - inter)
        assert corloc(case).item() == float(expected > 0.5), shift
        assert corloc(case, iou=0.1).item() == float(expected > 0.1), shift
    assert corloc(replace(case, maps=-values)).item() == 0  # which says nothing is there
    assert corloc(replace(case, masks=torch.zeros_like(masks))).isnan().all()
    with pytest.raises(BadInput, match="iou is from 0 to below 1; got 1"):
        corloc(case, iou=1)
    with pytest.raises(BadInput, match="threshold is a share of the maximum"):
        corloc(case, threshold=2.0)


def test_what_a_map_cuts_out_is_compared_with_the_mask() -> None:
    pytest.importorskip("cv2")
    model, scenes = tl.load("demo"), tl.demo_scenes(3, seed=3)
    inputs = model.inputs(scenes.images)
    masks = scenes.masks[:, 0]
    case = Case(Query(model, inputs, model.bind("logit:0", inputs)), masks.float(), masks=masks)
    found = segmentation(case)
    cut = tl.explain(model, scenes.images, target="logit:0")
    mine = replace(cut, values=masks.float(), layer=None).segment()
    expected = (mine & masks).sum((1, 2)) / (mine | masks).sum((1, 2))
    assert found.tolist() == pytest.approx(expected.tolist()) and found.max() > 0.9
    flat = masks.float().index_fill(0, torch.tensor([1]), 2.0)
    assert segmentation(replace(case, maps=flat)).tolist() == pytest.approx([found[0].item(), 0, found[2].item()])


def test_average_precision_is_scikit_learns() -> None:
    from sklearn.metrics import average_precision_score

    maps = torch.randint(0, 12, (4, 9, 9), generator=torch.Generator().manual_seed(0)).float()  # with many equal values
    masks = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    case = case_of(nn.Flatten(), torch.zeros(4, 1, 9, 9), maps, masks=masks)
    expected = [
        average_precision_score(m.flatten(), v.flatten()) for m, v in zip(masks.numpy(), maps.numpy(), strict=True)
    ]
    assert average_precision(case).tolist() == pytest.approx(expected, abs=1e-6)


# -- the map alone ----------------------------------------------------------------------------------------------------


def test_sparsity_and_complexity_of_simple_maps() -> None:
    even, one = torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    one[0, 1, 2] = -3.0  # a sign says nothing of how much
    case = {name: case_of(nn.Flatten(), torch.zeros(1, 1, 4, 4), maps) for name, maps in (("even", even), ("one", one))}
    assert sparsity(case["even"]).item() == pytest.approx(0, abs=1e-6)
    assert sparsity(case["one"]).item() == pytest.approx(15 / 16)
    assert complexity(case["even"]).item() == pytest.approx(np.log(16), rel=1e-6)
    assert complexity(case["one"]).item() == pytest.approx(0, abs=1e-6)
    mixed = torch.tensor([[[1.0, 3.0]]])
    pair = case_of(nn.Flatten(), torch.zeros(1, 1, 1, 2), mixed)
    assert sparsity(pair).item() == pytest.approx(0.25)  # half the mean difference over the mean: 2 / (4 x 2)


# -- what metrics promise ---------------------------------------------------------------------------------------------


def test_metrics_that_do_not_mind_the_scale() -> None:
    """The registry tells which answers a map shares with its multiples; the others are asked about each."""
    model, scenes = tl.load("demo"), tl.demo_scenes(3, seed=4)
    inputs = model.inputs(scenes.images)
    found = tl.explain(model, scenes.images, target="prob:2", method="integrated_gradients", steps=4)
    query, masks = Query(model, inputs, model.bind("prob:2", inputs)), scenes.masks[:, 0]
    assert found.per_channel is not None
    one, other = (Case(query, k * found.upsample(), attributed=k * found.per_channel, masks=masks) for k in (1.0, 8.0))
    names = []
    for metric in tl.methods("compare"):
        if metric.any_scale and not metric.name.startswith("quantus."):
            names.append(metric.name)
            with model.borrow():
                assert metric.run(one).tolist() == pytest.approx(metric.run(other).tolist(), rel=1e-5), metric.name
    assert len(names) == 14 and {"deletion", "pointing", "corloc", "captum.infidelity"} < set(names)


# -- how alike --------------------------------------------------------------------------------------------------------


def test_rank_correlation_is_scipys() -> None:
    from scipy.stats import rankdata, spearmanr

    a = torch.randint(0, 6, (3, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    b = a + noise(3, 5, 5)
    for row in range(3):
        np.testing.assert_allclose(ranks(a)[row].numpy() + 1, rankdata(a[row].flatten()))
        assert spearman(a, b)[row].item() == pytest.approx(
            spearmanr(a[row].flatten(), b[row].flatten()).statistic, abs=1e-6
        )
    assert spearman(a, torch.ones_like(a)).isnan().all()


def test_structural_similarity_is_scikit_images() -> None:
    from skimage.metrics import structural_similarity

    a, b = torch.rand(2, 20, 17, generator=torch.Generator().manual_seed(0)), torch.rand(2, 20, 17)
    scaled = [
        (one - one.amin((1, 2), keepdim=True)) / (one.amax((1, 2), keepdim=True) - one.amin((1, 2), keepdim=True))
        for one in (a, b)
    ]
    for row in range(2):
        expected = structural_similarity(
            scaled[0][row].double().numpy(),
            scaled[1][row].double().numpy(),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ssim(a, b)[row].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(ssim(a, 3 * a + 1), torch.ones(2))


def test_overlap_and_multiples() -> None:
    a = torch.arange(100.0).view(1, 10, 10)
    assert top_overlap(a, a).item() == 1 and top_overlap(a, -a).item() == 0
    shifted = a.roll(5)  # half of the highest tenth moves on
    assert top_overlap(a, shifted).item() == pytest.approx(0.5)
    assert proportional(a, 7 * a) and not proportional(a, -a) and not proportional(a, a + 1)
    assert not proportional(a, torch.zeros_like(a))


# -- the model forgets ------------------------------------------------------------------------------------------------


def test_layers_are_drawn_anew_from_the_last_one() -> None:
    handle, inputs = SPECIMENS["plain"]()
    shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
    before = {name: value.clone() for name, value in handle.module.state_dict().items()}
    owners = [name for name, part in handle.module.named_modules() if list(part.parameters(recurse=False))]
    state = torch.get_rng_state()
    copies = list(randomised(handle, shape, len(owners), 0))
    assert torch.equal(torch.get_rng_state(), state)
    for stage, copy in enumerate(copies):
        changed = [
            name for name in owners if not torch.equal(copy.module.get_submodule(name).weight, before[f"{name}.weight"])
        ]
        assert changed == owners[len(owners) - 1 - stage :]
    assert all(torch.equal(value, handle.module.state_dict()[name]) for name, value in before.items())


def test_completeness_of_true_shares(additive: Any) -> None:
    model, inputs, maps = additive
    shares = (inputs * model.weights).detach()
    whole = case_of(model, inputs, maps, target="prob:0", attributed=shares)
    whole.explained = case_of(model, inputs, maps).query  # the logit
    assert completeness_gap(whole).abs().max() < 1e-6
    half = case_of(model, inputs, maps, attributed=shares / 2)
    torch.testing.assert_close(completeness_gap(half).float(), torch.full((3,), 0.5), atol=1e-6, rtol=0)
    slopes = Method("explain", "slope", "native", lambda query: None, signed=False)
    for more in ({}, {"attributed": shares, "method": slopes}):  # magnitudes of slopes are no shares
        with pytest.raises(NotApplicable, match="does not share"):
            completeness_gap(case_of(model, inputs, maps, **more))


def test_floors_know_the_image_at_most() -> None:
    image = torch.zeros(2, 3, 16, 16)
    image[:, :, :, 8:] = 1.0
    found = floors(image, seed=0)
    assert tuple(found) == FLOORS and all(maps.shape == (2, 16, 16) for maps in found.values())
    assert found["edges"][0, :, [7, 8]].min() > 1 and found["edges"][0, :, :7].max() == 0
    assert found["centre"][0].flatten().argmax().item() in (7 * 16 + 7, 7 * 16 + 8, 8 * 16 + 7, 8 * 16 + 8)
    assert torch.equal(found["random"], floors(image, seed=0)["random"])
