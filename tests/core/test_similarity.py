"""The cosine with a reference's embedding, and sigmoid: closed forms on tiny modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from output_models import REFERENCE, SIZE, Embedder, X, handle, outputs_of
from PIL import Image
from torch import Tensor

import torchloupe as tl
from torchloupe_core.errors import BadInput, BadTarget, UnknownName
from torchloupe_core.similarity import Similarity


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def test_similarity_is_the_cosine_of_embeddings() -> None:
    model = handle(Embedder)
    net = model.module
    with torch.no_grad():
        maps, other = net.conv(X), net.conv(REFERENCE[None])
        for layer, a, b in (
            (None, net(X), net(REFERENCE[None])),
            ("conv", maps.mean((2, 3)), other.mean((2, 3))),
            ("fc.in", maps.relu().mean((2, 3)), other.relu().mean((2, 3))),
            ("fc", net(X), net(REFERENCE[None])),
        ):
            torch.testing.assert_close(model.score(X, tl.similarity(REFERENCE, layer)), cosine(a, b))
            torch.testing.assert_close(model.score(X, tl.similarity(b[0], layer)), cosine(a, b))
            torch.testing.assert_close(model.score(X, tl.similarity(b, layer) * 2), 2 * cosine(a, b))
    assert float(model.score(REFERENCE, tl.similarity(REFERENCE))) == pytest.approx(1)


def test_a_reference_comes_as_images_do(tmp_path: Path) -> None:
    model = handle(Embedder)
    values = torch.randint(0, 255, (*SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(values.numpy())
    picture.save(tmp_path / "one.png")
    expected = model.score(X, tl.similarity(model.inputs(picture)))
    for given in (picture, values.numpy(), values.permute(2, 0, 1), tmp_path / "one.png", str(tmp_path / "one.png")):
        torch.testing.assert_close(model.score(X, tl.similarity(given)), expected)
    text = str(tl.similarity(tmp_path / "one.png", "fc.in"))
    torch.testing.assert_close(
        tl.explain(model, X, target=text, method="saliency").scores, model.score(X, tl.similarity(picture, "fc.in"))
    )
    picture.save(tmp_path / "two.png")
    for given, says in ((tmp_path, "one image; got 2"), (tmp_path / "no.png", "no such image"), (X, "got 3")):
        with pytest.raises(BadInput, match=says):
            model.score(X, tl.similarity(given))


def test_an_image_in_memory_is_known_by_its_pixels() -> None:
    image = REFERENCE.clone()
    target, same, other = tl.similarity(image), tl.similarity(image.clone()), tl.similarity(image + 1)
    assert target == same and hash(target) == hash(same) and str(target) == str(same)
    assert target != other and str(target) != str(other)
    assert str(target).startswith("similarity:image#") and len(str(target)) == 29
    model = handle(Embedder)
    before = model.score(X, target)
    image.zero_()  # the target holds a copy
    torch.testing.assert_close(model.score(X, target), before)
    assert len({str(tl.similarity(one)) for one in (X[0], X[0].double(), X[0].view(3, 12, 8), X[0].half())}) == 4
    found = tl.explain(model, X[:1], target=target, method="saliency")
    assert found.target == str(target)


def test_once_bound_a_reference_is_its_embedding() -> None:
    model = handle(Embedder)
    (bound,) = model.bind(tl.similarity(REFERENCE), X[:1])
    ((_, atom),) = bound.terms
    assert isinstance(atom, Similarity)
    vector = atom.reference
    torch.testing.assert_close(torch.tensor(vector), outputs_of(model, REFERENCE[None])[0])
    again = tl.target(str(tl.Target(bound.terms)))
    torch.testing.assert_close(model.score(X, again), model.score(X, tl.similarity(REFERENCE)), rtol=0, atol=0)


def test_zero_embeddings_are_similar_to_nothing() -> None:
    model = handle(Embedder)
    with torch.no_grad():
        model.module.fc.weight.zero_()
        model.module.fc.bias.zero_()
    assert model.score(X, tl.similarity([1, 0, 0, 0])).tolist() == [0, 0, 0]
    assert tl.explain(model, X, target=tl.similarity([1, 0, 0, 0]), method="saliency").values.isfinite().all()
    for reference in (REFERENCE, [0, 0, 0, 0]):
        with pytest.raises(BadInput, match="zero everywhere"):
            model.score(X, tl.similarity(reference))


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        (tl.similarity([1, 2, 3]), BadTarget, "has 3 numbers; the model's has 4"),
        (tl.similarity([1, 2, 3, 4], "conv"), BadTarget, "has 4 numbers; the model's has 5"),
        (tl.similarity(REFERENCE, "cnv"), UnknownName, "'conv'"),
        (tl.similarity(torch.zeros(2, 3)), BadInput, r"\[N, C, H, W\]"),
    ],
)
def test_references_that_do_not_fit(target: tl.Target, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        handle(Embedder).score(X, target)


def test_maps_of_a_similarity_equal_hand_written_autograd() -> None:
    model = handle(Embedder)
    net = model.module
    for layer in (None, "fc.in"):
        embed = net if layer is None else lambda x: net.conv(x).relu().mean((2, 3))
        x = X.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cosine(embed(x), embed(REFERENCE[None]).detach()).sum(), x)
        found = tl.explain(model, X, target=tl.similarity(REFERENCE, layer), method="saliency").per_channel
        assert found is not None
        torch.testing.assert_close(found, gradient)
    features = net.conv(X).detach().requires_grad_(True)
    value = cosine(features.mean((2, 3)), net.conv(REFERENCE[None]).mean((2, 3)).detach())
    (gradient,) = torch.autograd.grad(value.sum(), features)
    found = tl.explain(model, X, target=tl.similarity(REFERENCE, "conv"), method="grad_cam", layer="conv").values
    torch.testing.assert_close(found, (gradient.mean((2, 3), keepdim=True) * features).sum(1).detach())


# -- several labels at once -------------------------------------------------------------------------------------------


def test_sigmoid_is_the_probability_of_a_class_by_itself() -> None:
    model = handle(Embedder, classes=("a", "b", "c", "d"))
    torch.testing.assert_close(model.score(X, "sigmoid:b"), 1 / (1 + (-outputs_of(model)[:, 1]).exp()))
    x = X.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.module(x)[:, 1].sigmoid().sum(), x)
    found = tl.explain(model, X, target=tl.sigmoid("b"), method="saliency").per_channel
    assert found is not None
    torch.testing.assert_close(found, gradient)
