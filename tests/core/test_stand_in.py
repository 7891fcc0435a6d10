"""A stand-in gives libraries the layer's maps and the target's value, whatever the model's own layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchloupe as tl
from torchloupe_core.query import Query
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.stand_in import StandIn, map_by


def asked(specimen: str, target: str = "logit:dog", layer: str | None = None) -> Query:
    handle, inputs = SPECIMENS[specimen]()
    return Query(handle, inputs, handle.bind(target, inputs), layer=layer)


def by_gradient(model: StandIn) -> Tensor:
    """HiResCAM, the way a library would do it."""
    seen: list[Tensor] = []
    model.layer.register_forward_hook(lambda module, given, output: seen.append(output))
    scores = model(model.part.inputs).sum()
    (gradient,) = torch.autograd.grad(scores, seen[0])
    return (gradient * seen[0]).sum(1)


@pytest.mark.parametrize("specimen", SPECIMENS)
def test_its_output_is_the_target_and_its_layer_sees_the_maps(specimen: str) -> None:
    query = asked(specimen)
    layer = query.resolved_layer()
    seen: list[Tensor] = []
    model = StandIn(query, layer)
    model.layer.register_forward_hook(lambda module, given, output: seen.append(output.detach()))
    with query.handle.borrow():
        values = model(query.inputs)
        with query.handle.watch(layer, shape=query.shape) as watch:
            watch(query.inputs)
            expected = watch.map(layer)
    assert values.shape == (len(query.inputs), 1)
    torch.testing.assert_close(values[:, 0].cpu(), query.handle.score(query.inputs, "logit:dog"))
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("specimen", SPECIMENS)
def test_what_becomes_of_its_layer_becomes_of_the_models(specimen: str) -> None:
    """Maps exchanged in the stand-in reach the rest of the model where they belong: as Ablation-CAM does it."""
    query = asked(specimen)
    layer = query.resolved_layer()
    layout = query.handle.layer(layer, query.shape).layout
    assert layout is not None

    class Without(torch.nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            changed = maps.clone()
            changed[:, 2] = 0
            return changed

    def zeroed(raw: Tensor) -> Tensor:
        changed = raw.clone()
        changed.select(layout.channel_dim, 2)[:, layout.prefix :] = 0
        return changed

    with query.handle.borrow():
        model = StandIn(query, layer)
        model.layer = Without()
        found = model(query.inputs)[:, 0]
        expected = query.handle.read(query.inputs, query.targets, exchange={layer: zeroed})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("specimen", ["residual", "vit_registers"])
def test_the_gradient_at_its_layer_is_that_of_the_models(specimen: str) -> None:
    query = asked(specimen)
    with query.handle.borrow():
        found = map_by(query, by_gradient)
    expected = tl.explain(query.handle, query.inputs, target="logit:dog", method="hires_cam")
    torch.testing.assert_close(found.values, expected.values)
    assert found.layer == expected.layer
    assert found.scores is not None
    torch.testing.assert_close(found.scores, expected.scores)


def test_what_follows_in_place_does_not_reach_the_maps_a_library_keeps() -> None:
    """As it would where no graph is made: libraries keep a tensor without copying it."""
    query = asked("inplace", layer="conv3")  # an in-place ReLU follows
    kept: list[Tensor] = []
    with query.handle.borrow():
        model = StandIn(query, "conv3")
        model.layer.register_forward_hook(lambda module, given, output: kept.append(output.detach()))
        model(query.inputs)
        with query.handle.watch("conv3", shape=query.shape) as watch:
            watch(query.inputs)
    torch.testing.assert_close(kept[0], watch.map("conv3"))
    assert (kept[0] < 0).any()


def test_one_image_stands_for_all_its_variants_and_each_image_for_itself() -> None:
    handle, inputs = SPECIMENS["plain"]()
    query = Query(handle, inputs, handle.bind(["logit:ant", "logit:bee", "logit:cat"], inputs))
    logits = handle.logits(handle.module(inputs)).detach()
    with handle.borrow():
        together = StandIn(query, "relu2")(inputs)[:, 0]
        variants = StandIn(query.only(1, 2), "relu2")(inputs)[:, 0]
    torch.testing.assert_close(together, logits.diagonal())
    torch.testing.assert_close(variants, logits[:, 1])


def test_a_layer_whose_patches_count_no_more_is_refused_and_another_named() -> None:
    query = asked("vit_registers", layer="blocks.2")
    with pytest.raises(tl.errors.NotApplicable, match=r"only the class token counts.*layer="), query.handle.borrow():
        map_by(query, by_gradient)


def test_a_target_that_reads_nothing_after_the_layer_is_refused() -> None:
    handle, inputs = SPECIMENS["plain"]()
    with pytest.raises(tl.errors.NotApplicable, match="conv1"), handle.borrow():
        map_by(Query(handle, inputs, handle.bind("conv1:2", inputs), layer="relu2"), by_gradient)
