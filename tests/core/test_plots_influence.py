"""The drawing of influence: what lies where, and what is said about it."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
import torch
from torch.utils.data import TensorDataset

import torchloupe as tl
from torchloupe_core.plots_influence import HARMFUL, HELPFUL
from torchloupe_core.specimens import CLASSES, SPECIMENS

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def found() -> tl.Influence:
    handle, inputs = SPECIMENS["plain"]()
    generator = torch.Generator().manual_seed(1)
    train = TensorDataset(
        torch.randn(12, 3, 32, 32, generator=generator), torch.randint(0, 5, (12,), generator=generator)
    )
    return tl.influence(handle, train, TensorDataset(inputs, torch.tensor([0, 1, 2])), check=6)


def texts(figure: Any) -> list[Any]:
    (axes,) = figure.axes
    return list(axes.texts)


def test_each_row_has_its_test_image_helpers_and_harmers(found: tl.Influence) -> None:
    figure = found.figure(k=3)
    shown = [one.get_text() for one in texts(figure)]
    for row in range(3):
        seen = CLASSES[int(found.predictions[row])]
        assert f"sees {seen} {found.confidences[row]:.0%}" in shown and f"is {CLASSES[row]}" in shown
    helpful, harmful = found.top(3), found.top(3, "harmful")
    by_colour = {
        colour: [one.get_text() for one in texts(figure) if one.get_color() == colour] for colour in (HELPFUL, HARMFUL)
    }
    for ranking, colour, sign in ((helpful, HELPFUL, 1), (harmful, HARMFUL, -1)):
        expected = [f"{score:+.2g}" for score in ranking.scores.flatten().tolist() if score * sign > 0]
        assert [one for one in by_colour[colour] if one[0] in "+-"] == expected
    pictures = 3 + sum(int((part.scores * sign > 0).sum()) for part, sign in ((helpful, 1), (harmful, -1)))
    assert len(figure.axes[0].images) == pictures


def test_a_label_that_is_not_what_is_seen_stands_out(found: tl.Influence) -> None:
    figure = found[0].figure(k=3)
    seen = CLASSES[int(found.predictions[0])]
    labels = [one for one in texts(figure) if one.get_text() in CLASSES]
    assert labels and all((one.get_fontweight() == "bold") == (one.get_text() != seen) for one in labels)


def test_the_heading_says_through_what_and_how_far_to_trust_it(found: tl.Influence) -> None:
    title = found.figure()._suptitle.get_text()  # type: ignore[attr-defined]
    assert "cg: 3 test images, 12 training images" in title and "through fc (65 parameters)" in title
    assert f"rank correlation with 6 refits {found.diagnostics['spot_check']['spearman']:.2f}" in title
    assert "2 of 3 test images" in found.figure(most=2)._suptitle.get_text()  # type: ignore[attr-defined]


def test_images_by_themselves_are_drawn_in_rows() -> None:
    handle, inputs = SPECIMENS["plain"]()
    alone = tl.influence(handle, TensorDataset(inputs, torch.tensor([0, 1, 2])), inputs, method="self", check=0)
    figure = alone.figure()
    assert len(figure.axes[0].images) == 3
    first = int(alone.top(1).indices[0, 0])
    assert texts(figure)[1].get_text() == f"{alone.scores[0, first]:.2g}  #{first}"


def test_relative_scores_are_over_the_gradients_norm(found: tl.Influence) -> None:
    relative = found.relative()
    torch.testing.assert_close(relative.scores * found.gradient_norms.float(), found.scores)
    title = relative.figure()._suptitle.get_text()  # type: ignore[attr-defined]
    assert "scores over the norm of its gradient" in title and "refits" not in title
    assert relative.units.endswith("over the norm of its gradient") and relative.about == found.about
