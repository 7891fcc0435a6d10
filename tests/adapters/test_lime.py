"""lime: against the library as its users call it, with colour pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torchloupe as tl
from torchloupe_core.specimens import SPECIMENS

pytest.importorskip("lime")

SEGMENTS = torch.arange(32 * 32).view(32, 32) // 8 % 4 + 4 * (torch.arange(32) // 16)[:, None]  # 8 of 16 x 8 pixels


def test_the_weights_are_those_the_library_gives_its_users() -> None:
    from lime.lime_image import LimeImageExplainer

    handle, inputs = SPECIMENS["plain"]()
    found = tl.explain(
        handle, inputs, target=2, method="lime.image", segments=SEGMENTS, n_samples=40, seed=7, baseline=0.3
    )
    torch.testing.assert_close(found.scores, handle.score(inputs, "logit:2"))
    for index, image in enumerate(inputs):

        def logits(pictures: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return handle.module(torch.from_numpy(pictures).permute(0, 3, 1, 2)).double().numpy()

        way = LimeImageExplainer(random_state=np.random.RandomState(7))
        told = way.explain_instance(
            image.permute(1, 2, 0).numpy(),
            logits,
            labels=(2,),
            top_labels=None,
            hide_color=0.3,
            num_samples=40,
            segmentation_fn=lambda picture: SEGMENTS.numpy(),
        )
        weights = torch.zeros(8)
        for segment, weight in told.local_exp[2]:
            weights[segment] = float(weight)
        torch.testing.assert_close(found.values[index], weights[SEGMENTS], rtol=1e-4, atol=1e-6)
        assert abs(found.diagnostics["r2"][index] - told.score) < 1e-4


def test_options_out_of_range_are_refused() -> None:
    handle, inputs = SPECIMENS["plain"]()
    for options in ({"n_samples": 1}, {"kernel_width": 0.0}, {"n_segments": 1}):
        with pytest.raises(tl.errors.BadInput, match=next(iter(options))):
            tl.explain(handle, inputs, method="lime.image", **options)


def test_it_draws_no_bars_and_leaves_its_own_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    import lime.lime_image

    before = lime.lime_image.tqdm
    handle, inputs = SPECIMENS["plain"]()
    tl.explain(handle, inputs, method="lime.image", segments=SEGMENTS, n_samples=10, progress=False)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
    assert lime.lime_image.tqdm is before is not iter
