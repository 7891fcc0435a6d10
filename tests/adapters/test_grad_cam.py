"""pytorch-grad-cam: its methods against their formulas, and against the library as its users call it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.specimens import SPECIMENS

peer = pytest.importorskip("pytorch_grad_cam")


class Squares(nn.Module):
    """A convolution `features`; the output is half the sum of its squares over each group of channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).square().sum((2, 3)).unflatten(1, (3, 2)).sum(2) / 2


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def squares() -> tl.Handle:
    return tl.wrap(Squares().eval(), input_size=(3, 8, 8))


def values(model: tl.Handle, method: str, inputs: Tensor = X, **options: Any) -> Tensor:
    found: Tensor = tl.explain(model, inputs, method=f"grad_cam.{method}", layer="features", **options).values
    return found


def test_shapley_cam_takes_off_half_the_hessian() -> None:
    """Of half the squares the gradient is the map itself, and the Hessian one: half of the weight is left."""
    model = squares()
    whole = tl.explain(model, X, target=1, method="grad_cam", layer="features").values
    torch.testing.assert_close(values(model, "shapley_cam", target=1), whole / 2, rtol=1e-4, atol=1e-5)


def test_shapley_cam_is_grad_cam_behind_a_linear_head() -> None:
    handle, inputs = SPECIMENS["plain"]()
    found, expected = (tl.explain(handle, inputs, method=name).values for name in ("shapley_cam", "grad_cam"))
    torch.testing.assert_close(found, expected)


def test_finer_cam_is_grad_cam_of_the_weighed_differences() -> None:
    handle, inputs = SPECIMENS["residual"]()
    with handle.watch("layer2", leaf="layer2", through=True, shape=(3, 32, 32)) as watch, torch.enable_grad():
        logits = watch(inputs)
        total = torch.zeros(())
        for row in logits:
            order = (row - row[3]).abs().argsort()[1:4]
            share = row.softmax(0)[order]
            total = total + (share * (row[3] - 0.5 * row[order])).sum() / share.sum()
        (gradient,) = torch.autograd.grad(total, watch["layer2"])
        expected = (gradient.mean((2, 3), keepdim=True) * watch["layer2"]).sum(1).detach()
    found = tl.explain(handle, inputs, target=3, method="grad_cam.finer_cam", alpha=0.5)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["prob:dog", "0.5*logit:dog", "logit:dog-logit:cat", "layer1:2"])
def test_finer_cam_refuses_what_is_not_one_logit(target: str) -> None:
    handle, inputs = SPECIMENS["residual"]()
    with pytest.raises(tl.errors.NotApplicable, match="grad_cam"):
        tl.explain(handle, inputs, target=target, method="grad_cam.finer_cam")


def test_fem_against_a_loop() -> None:
    model, k = squares(), 1.0
    maps = model.module.features(X).detach().numpy()
    expected = np.zeros((2, 8, 8), np.float32)
    for n in range(2):
        for channel in maps[n]:
            unusual = (channel > channel.mean() + k * channel.std()).mean()
            expected[n] += unusual * channel
    torch.testing.assert_close(values(model, "fem", target=0, k=k), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_elementwise_and_eigen_grad_against_their_formulas() -> None:
    model = squares()
    maps = model.module.features(X).detach()
    product = maps.square()  # of gradient and map, in the target's two channels
    product[:, 2:] = 0
    torch.testing.assert_close(values(model, "grad_cam_elementwise", target=0), product.sum(1), rtol=1e-4, atol=1e-5)
    found = values(model, "eigen_grad_cam", target=0)
    rows = (product - product.mean((2, 3), keepdim=True)).flatten(2).transpose(1, 2)
    _, _, directions = torch.linalg.svd(rows)
    expected = (rows @ directions[:, 0, :, None])[..., 0]
    towards = (directions[:, 0] * product.mean((2, 3))).sum(1, keepdim=True).sign()
    torch.testing.assert_close(found.flatten(1), expected * towards, rtol=1e-3, atol=1e-3)


def test_kernel_pca_with_a_linear_kernel_is_eigen_cam_up_to_its_length() -> None:
    model = squares()
    linear, eigen = values(model, "kpca_cam", target=0, kernel="linear"), values(model, "eigen_cam", target=0)
    torch.testing.assert_close(linear, eigen, rtol=1e-3, atol=1e-3)
    with pytest.raises(tl.errors.BadInput, match="sigmoid"):
        values(model, "kpca_cam", target=0, kernel="round")


def test_the_random_map_depends_on_the_seed_and_on_nothing_else() -> None:
    model = squares()
    first, again, other = (values(model, "random_cam", target=0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(("method", "kind"), [("grad_cam", "GradCAM"), ("layer_cam", "LayerCAM"), ("fem", "FEM")])
def test_scaled_and_resized_it_is_what_the_library_gives_its_users(method: str, kind: str) -> None:
    """On tokens, with the reshaping its users write by hand."""
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    handle, inputs = SPECIMENS["vit_registers"]()
    found = tl.explain(handle, inputs, target=2, method=f"grad_cam.{method}")
    mine = scale_cam_image(found.values.clamp(min=0).numpy(), (48, 32))

    def reshaped(tokens: Tensor) -> Tensor:
        return tokens[:, 5:].transpose(1, 2).unflatten(2, (4, 6))

    module = handle.module.requires_grad_(True)
    cam = getattr(peer, kind)(module, [module.get_submodule(str(found.layer))], reshape_transform=reshaped)
    theirs = cam(inputs, [ClassifierOutputTarget(2)] * len(inputs))
    assert np.abs(theirs - scale_cam_image(mine)).max() < 1e-4


def test_channels_of_signed_maps_are_set_to_zero_however_many_at_once() -> None:
    """The library's own layer sets them to the least value less 1e7, and less again for each other in the batch."""
    handle, inputs = SPECIMENS["vit_registers"]()
    found = [
        tl.explain(handle, inputs, target=2, method="grad_cam.ablation_cam", batch_size=size).values for size in (1, 16)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    ours = tl.explain(handle, inputs, target=2, method="ablation_cam")
    sign = ours.scores.sign()[:, None, None]
    torch.testing.assert_close(found[0], ours.values * sign, rtol=1e-3, atol=1e-4)


def test_it_draws_no_bars_and_leaves_its_own_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    import tqdm

    handle, inputs = SPECIMENS["plain"]()
    for method in ("ablation_cam", "score_cam"):
        tl.explain(handle, inputs, method=f"grad_cam.{method}", progress=False)
    assert peer.ablation_cam.tqdm is peer.score_cam.tqdm is tqdm
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_half_precision_models_are_read() -> None:
    handle, inputs = SPECIMENS["plain"]()
    exact = tl.explain(handle, inputs, target=1, method="grad_cam.grad_cam").values
    for method in ("grad_cam.grad_cam", "grad_cam.score_cam", "grad_cam.ablation_cam"):
        found = tl.explain(handle, inputs, target=1, method=method, dtype=torch.bfloat16).values
        assert found.isfinite().all()
        if method == "grad_cam.grad_cam":
            assert (found - exact).abs().max() < 0.05 * exact.abs().max()
