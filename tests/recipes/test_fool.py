"""`tl.fool`: attacks against plain loops, changes that stay within eps in 8 bits, and success seen by a fresh pass."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.canvas import Draw
from torchloupe_core.checks.snapshot import Snapshot
from torchloupe_core.errors import BadInput, BadTarget, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.methods.fooling import rounded
from torchloupe_core.spec import Spec
from torchloupe_core.specimens import SPECIMENS

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PLAIN: dict[str, Any] = {"progress": False}


def specimen() -> Handle:
    handle, _ = SPECIMENS["plain"]()
    return Handle(handle.module.double(), handle.spec).with_spec(mean=MEAN, std=STD)


def pixels(n: int, side: int = 32) -> Tensor:
    return torch.rand(n, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normalised(x: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN, dtype=x.dtype), torch.tensor(STD, dtype=x.dtype)
    return (x - mean[:, None, None]) / std[:, None, None]


@functools.cache
def scenes() -> Any:
    return tl.demo_scenes(24, seed=41)


@functools.cache
def attacked(method: str, levels: int) -> tl.Fooled:
    steps = {"steps": 10} if method == "pgd" else {}
    return tl.fool("demo/mislabelled", scenes().images, method=method, eps=levels / 255, **steps, **PLAIN)


# -- the attacks ------------------------------------------------------------------------------------------------------


def reference(handle: Handle, x0: Tensor, labels: list[int], sign: int, norm: str, eps: float, start: Tensor) -> Tensor:
    """PGD on the cross-entropy, one image and one step after the other."""
    found = []
    for image, label, first in zip(x0, labels, start, strict=True):
        x = first.clone()
        for _ in range(7):
            leaf = x[None].clone().requires_grad_(True)
            loss = sign * F.cross_entropy(handle.module(normalised(leaf)), torch.tensor([label]))
            (gradient,) = torch.autograd.grad(loss, leaf)
            if norm == "linf":
                x = x + 0.01 * gradient[0].sign()
                x = torch.minimum(torch.maximum(x, image - eps), image + eps)
            else:
                x = x + 0.01 * gradient[0] / gradient[0].norm()
                away = x - image
                x = image + away * min(1.0, eps / away.norm().item())
            x = x.clamp(0, 1)
        found.append(x)
    return torch.stack(found)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.04)])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_is_a_plain_loop(norm: Any, eps: float, targeted: bool) -> None:
    handle, x0 = specimen(), pixels(3)
    with torch.no_grad():
        own = handle.module(normalised(x0)).argmax(1)
    labels = ((own + 1) % 4 if targeted else own).tolist()
    made = tl.fool(
        handle,
        normalised(x0),
        labels if targeted else None,
        norm=norm,
        eps=eps,
        steps=7,
        step_size=0.01,
        eight_bit=False,
        **PLAIN,
    )
    expected = reference(handle, x0, labels, -1 if targeted else 1, norm, eps, x0)
    torch.testing.assert_close(made.images, expected.float(), atol=1e-6, rtol=0)
    assert (expected - x0).abs().max() > 0.002
    assert made.losses.shape == (3, 7) and (made.losses[:, -1] < made.losses[:, 0]).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.5)])
def test_restarts_begin_at_random_places_and_the_best_is_kept(norm: Any, eps: float) -> None:
    handle, x0 = specimen(), pixels(2)
    options: dict[str, Any] = {"norm": norm, "eps": eps, "steps": 7, "step_size": 0.01, "eight_bit": False, **PLAIN}
    made = tl.fool(handle, normalised(x0), restarts=2, seed=5, **options)
    own = made.before.argmax(1).tolist()
    candidates = [reference(handle, x0, own, 1, norm, eps, x0)]
    for start in range(2):
        draw = Draw(5, 2 * start, 2 * start + 2)
        if norm == "linf":
            noise = (2 * draw.uniform(3, 32, 32) - 1) * eps
        else:
            direction = draw(3, 32, 32)
            noise = direction / direction.flatten(1).norm(dim=1)[:, None, None, None] * eps * draw.uniform(1, 1, 1)
        assert noise.abs().max() <= eps
        candidates.append(reference(handle, x0, own, 1, norm, eps, (x0 + noise.double()).clamp(0, 1)))
    for row in range(2):
        with torch.no_grad():
            logits = [handle.module(normalised(each[row : row + 1]))[0] for each in candidates]
        leads = [max(z[k] for k in range(len(z)) if k != own[row]) - z[own[row]] for z in logits]
        best = made.diagnostics["start"][row]
        assert leads[best] >= max(leads) - 1e-6
        torch.testing.assert_close(made.images[row], candidates[best][row].float(), atol=1e-5, rtol=0)


def test_fgsm_is_one_step_along_the_sign() -> None:
    handle, x0 = specimen(), (pixels(2) * 255).round() / 255
    made = tl.fool(handle, normalised(x0), method="fgsm", eps=3 / 255, **PLAIN)
    leaf = x0.clone().requires_grad_(True)
    logits = handle.module(normalised(leaf))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1), reduction="sum"), leaf)
    expected = (x0 + 3 / 255 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(made.images, expected.float(), atol=1e-6, rtol=0)
    assert made.method == "fgsm" and made.goals[0] == f"-prob:{handle.name_of(int(logits[0].argmax()))}"


# -- eight bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1 / 255, 5.9 / 255, 8 / 255])
def test_rounding_stays_within_a_box(eps: float) -> None:
    given = (pixels(2, 6) * 255).round() / 255
    images = (given + (2 * torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(2)) - 1) * eps).clamp(0, 1)
    found = rounded(images, given, "linf", eps) * 255
    assert torch.equal(found, found.round()) and found.min() >= 0 and found.max() <= 255
    levels = (found - given * 255).round()
    assert levels.abs().max() <= int(eps * 255 + 1e-6)
    exact = (images - given) * 255
    assert (levels - exact).abs().max() <= 0.5 + (eps * 255) % 1 + 1e-6


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.3, 0.5])
def test_rounding_stays_within_a_ball_and_gives_up_as_little_as_it_must(eps: float) -> None:
    given = (pixels(3, 6).clamp(0.2, 0.8) * 255).round() / 255
    moved = torch.randn(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moved = moved * eps / moved.flatten(1).norm(dim=1)[:, None, None, None]
    levels = ((rounded(given + moved, given, "l2", eps) - given) * 255).round()
    exact = moved * 255
    for row in range(3):  # one value after the other, the most doubtful first
        whole = exact[row].flatten().round()
        while whole.square().sum() > (eps * 255) ** 2:
            doubt = torch.where(whole != 0, whole.abs() - exact[row].flatten().abs(), -1.0)
            place = int(doubt.argmax())
            whole[place] -= whole[place].sign()
        assert torch.equal(levels[row].flatten(), whole)
    assert (levels.flatten(1).norm(dim=1) <= eps * 255 + 1e-9).all()


def saved(image: Tensor) -> np.ndarray[Any, Any]:
    """What is in a file of the image."""
    buffer = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(buffer, "PNG")
    return np.asarray(Image.open(buffer)).astype(int)


@pytest.mark.parametrize("levels", [2, 8])
def test_the_change_in_the_saved_picture_is_never_above_eps(levels: int) -> None:
    made = attacked("pgd", levels)
    for before, after, scene in zip(made.given, made.images, scenes().images, strict=True):
        assert np.abs(saved(before) - saved(after)).max() == levels
        assert np.array_equal(saved(before), scene.permute(1, 2, 0).numpy())
    ball = tl.fool("demo/mislabelled", scenes().images[:6], norm="l2", eps=0.7, steps=8, **PLAIN)
    for before, after in zip(ball.given, ball.images, strict=True):
        assert 0.6 * 255 < np.linalg.norm((saved(before) - saved(after)).ravel()) <= 0.7 * 255
    assert ball.distances[:, 1].max() <= 0.7 + 1e-6 and made.distances[:, 0].max() <= levels / 255 + 1e-6


def test_success_is_what_the_model_sees_in_the_saved_picture() -> None:
    model, made = tl.load("demo/mislabelled"), attacked("pgd", 8)
    files = torch.stack([torch.from_numpy(saved(one)).byte().permute(2, 0, 1) for one in made.images])
    for row, (then, now) in enumerate(zip(model.predict(scenes().images), model.predict(files), strict=True)):
        assert made.success[row].item() == (then[0].name != now[0].name)
        assert made.seen(row) == (then[0].name, now[0].name)
        assert made.after[row].max().item() == pytest.approx(now[0].probability, abs=1e-4)
    assert made.rate == made.success.float().mean().item() and made.rate > 0.3


def test_rates_grow_with_eps_and_pgd_is_above_fgsm() -> None:
    rates = [attacked("pgd", levels).rate for levels in (2, 4, 8)]
    assert rates == sorted(rates) and rates[0] < rates[2]
    assert attacked("pgd", 8).rate >= attacked("fgsm", 8).rate + 0.1
    robust = tl.fool("demo", scenes().images, eps=8 / 255, steps=10, **PLAIN)
    assert robust.rate < attacked("pgd", 8).rate  # it was trained against such changes


# -- targets ----------------------------------------------------------------------------------------------------------


def test_a_class_by_any_name() -> None:
    model = tl.load("demo/mislabelled")
    image = scenes().images[:1]
    own = model.predict(image)[0][0].index
    index = (own + 1) % 12
    name = model.classes[index]  # type: ignore[index]
    found = [
        tl.fool(model, image, target, eps=0.1, steps=4, **PLAIN)
        for target in (name, index, f"logit:{name}", tl.prob(index), [name])
    ]
    for one in found:
        assert torch.equal(one.images, found[0].images) and one.aims.tolist() == [index]
    assert found[0].success.tolist() == [found[0].seen(0)[1] == name]
    with pytest.raises(BadInput, match=rf"image 0 is seen as '{model.classes[own]}' already"):  # type: ignore[index]
        tl.fool(model, image, own, **PLAIN)
    for target, error, message in [
        ("layer3:1", BadTarget, "fooled into seeing a class"),
        ("-logit:fish", BadTarget, "fooled into seeing a class"),
        ("logit:fihs", UnknownName, "fish"),
        (12, UnknownName, "0 to 11"),
        ([1, 2], BadInput, "2 targets for 1 images"),
    ]:
        with pytest.raises(error, match=message):
            tl.fool(model, image, target, **PLAIN)


class Sure(nn.Module):
    """So sure of the brighter half that its probability has no gradient in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4000.0))

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[3] // 2
        return self.scale * torch.stack([x[..., :half].mean((1, 2, 3)), x[..., half:].mean((1, 2, 3))], 1)


def test_a_sure_model_is_asked_for_the_margin() -> None:
    handle = Handle(Sure(), Spec(input_size=(3, 8, 8), classes=("left", "right"), mean=(0.0,) * 3, std=(1.0,) * 3))
    image = torch.full((1, 3, 8, 8), 128 / 255)
    image[..., :4] += 10 / 255
    made = tl.fool(handle, image, eps=8 / 255, **PLAIN)
    assert made.goals == ("-margin:left",) and made.rate == 1.0
    assert tl.fool(handle, image, "right", eps=8 / 255, **PLAIN).goals == ("margin:right",)
    assert tl.fool(handle, image, eps=4 / 255, **PLAIN).rate == 0.0  # ten levels are more than twice four
    assert tl.fool(handle, image, eps=5 / 255, **PLAIN).rate == 0.0  # and five make it even
    assert tl.fool(handle, image, eps=6 / 255, **PLAIN).rate == 1.0


# -- results and errors -----------------------------------------------------------------------------------------------


def test_what_comes_back(tmp_path: Path) -> None:
    made = attacked("pgd", 8)
    assert made.images.shape == (24, 3, 64, 64) and made.before.shape == made.after.shape == (24, 12)
    torch.testing.assert_close(made.before.sum(1), torch.ones(24))
    assert torch.equal(made.difference, made.images - made.given) and made.size == (64, 64)
    assert (made.method, made.norm, made.eps, made.stopped) == ("pgd", "linf", 8 / 255, "")
    assert made.options["steps"] == 10 and made.forwards >= 24 * 12 and made.aims.tolist() == [-1] * 24
    again = tl.open(made.save(tmp_path / "fooled"))
    assert isinstance(again, tl.Fooled) and torch.equal(again.images, made.images) and again.goals == made.goals
    last = made[-1]
    assert len(last) == 1 and torch.equal(last.images[0], made.images[-1]) and last.goals == made.goals[-1:]
    assert last.diagnostics["start"] == [0]
    drawing, axes = made.figure(most=2), made.plot(most=2)[1]
    assert drawing is not None and axes.shape == (2, 3)
    titles = [one.get_title(loc="left") for one in axes[0]]
    assert titles[0].startswith(made.seen(0)[0]) and titles[1] == "difference x15.9"
    assert titles[2].startswith(made.seen(0)[1])


def test_a_photograph_goes_through_preprocessing(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.asarray(scenes().images[0].permute(1, 2, 0))).resize((90, 120)).save(path)
    made = tl.fool("demo", path, eps=4 / 255, steps=2, **PLAIN)
    assert made.images.shape == (1, 3, 64, 64)
    assert ((made.images - made.given) * 255).round().abs().max() == 4


def test_no_trace_is_left_and_the_seed_decides() -> None:
    handle, x0 = specimen(), normalised(pixels(2))
    handle.module.train()
    before = Snapshot(handle.module, x0)
    one, again, other = (
        tl.fool(handle, x0, restarts=1, steps=3, eps=0.1, seed=seed, batch_size=size, **PLAIN)
        for seed, size in ((0, None), (0, 1), (1, None))
    )
    assert before.differences() == []
    torch.testing.assert_close(one.images, again.images, atol=1 / 255, rtol=0)
    assert not torch.equal(one.losses, other.losses) or one.diagnostics["start"] == [0, 0]


class Failing(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.conv, self.fc, self.what = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), what

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        y = self.fc(self.conv(x).mean((2, 3)))
        return self.what(y) if CALLS[0] == 6 else y


CALLS = [0]


def failing(what: Any) -> Handle:
    torch.manual_seed(0)
    handle = Handle(Failing(what), Spec(input_size=(3, 12, 12), mean=(0.5,) * 3, std=(0.5,) * 3))
    handle.trace()
    CALLS[0] = 0
    return handle


def interrupt(y: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_nan_and_ctrl_c_keep_the_last_good_images() -> None:
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options: dict[str, Any] = {"steps": 9, "step_size": 0.005, "eps": 0.1, **PLAIN}
    made = tl.fool(failing(lambda y: y * float("nan")), image, **options)
    assert made.stopped == "the target or its gradient is NaN or infinite after step 4"
    assert made.images.isfinite().all() and made.losses.shape == (1, 4)
    with pytest.raises(KeyboardInterrupt):
        tl.fool(failing(interrupt), image, **options)
    kept = tl.fool(failing(interrupt), image, interruptible=True, **options)
    assert kept.stopped == "interrupted after step 4" and kept.losses.shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.5 / 255}, "less than one level of 8 bits"),
        ({"eps": -1.0}, "eps is above 0"),
        ({"norm": "l1"}, 'norm is "linf" or "l2"'),
        ({"loss": "hinge"}, 'loss is "prob" or "margin"'),
        ({"stepz": 3}, "pgd has no option 'stepz'"),
        ({"method": "fgsm", "steps": 3}, "fgsm has no option 'steps'"),
        ({"steps": 0}, "steps is at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tl.fool("demo", scenes().images[:1], **options, **PLAIN)


def test_what_cannot_be_fooled() -> None:
    handle = specimen()
    with pytest.raises(BadInput, match=r"go from -.* to .*, which is no picture"):
        tl.fool(handle, torch.randn(1, 3, 32, 32, dtype=torch.float64) * 9, **PLAIN)
    bare = handle.with_spec(mean=None, std=None)
    with pytest.raises(BadInput, match="mean and std are not known"):
        tl.fool(bare, normalised(pixels(1)), **PLAIN)
    with pytest.raises(BadInput, match="NaN"):
        tl.fool(handle, torch.full((1, 3, 32, 32), float("nan"), dtype=torch.float64), **PLAIN)
    with pytest.raises(UnknownName, match="fool method"):
        tl.fool(handle, normalised(pixels(1)), method="deepfool", **PLAIN)
    one = Handle(nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), Spec(input_size=(3, 4, 4)))
    with pytest.raises(NotApplicable, match="one output"):
        tl.fool(one, torch.rand(1, 3, 4, 4), **PLAIN)
