"""Every specimen, and models of timm and torchvision with random weights, keep what every source promises."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import torchloupe as tl
from torchloupe_core.checks import Source
from torchloupe_core.handle import Handle
from torchloupe_core.layout import Layout
from torchloupe_core.specimens import SPECIMENS
from torchloupe_core.trace import Layer


@functools.cache
def _source(specimen: str) -> Source:
    return tl.checks.source(*SPECIMENS[specimen]())


@pytest.mark.parametrize("check", tl.checks.checks_of("source"))
@pytest.mark.parametrize("specimen", SPECIMENS)
def test_contract(specimen: str, check: str) -> None:
    tl.checks.checks_of("source")[check](_source(specimen))


@pytest.mark.parametrize("specimen", SPECIMENS)
def test_specimens_are_deterministic_and_small(specimen: str) -> None:
    torch.manual_seed(5)
    (first, images), (second, same) = SPECIMENS[specimen](), SPECIMENS[specimen]()
    other, _ = SPECIMENS[specimen](seed=1)
    assert torch.equal(images, same)
    weights = [
        torch.cat([p.detach().flatten() for p in handle.module.parameters()]) for handle in (first, second, other)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert len(weights[0]) < 20_000


def test_making_a_specimen_draws_nothing_from_the_global_random_state() -> None:
    before = torch.get_rng_state()
    SPECIMENS["residual"]()
    assert torch.equal(before, torch.get_rng_state())


def test_features_of_the_specimens() -> None:
    expected = {
        "plain": "relu2",
        "residual": "layer2",
        "concat": "norm",
        "depthwise": "act4",
        "inplace": "relu",
        "nhwc": "norm",
        "vit_registers": "blocks.2.norm1",
        "grayscale": "relu2",
    }
    assert {name: SPECIMENS[name]()[0].features for name in SPECIMENS} == expected


def _broken(change: dict[str, object], specimen: str = "nhwc") -> Source:
    handle, inputs = SPECIMENS[specimen]()
    return tl.checks.source(handle.with_spec(**change), inputs)


def _require_failure(check: str, source: Source, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        tl.checks.checks_of("source")[check](source)


def test_forward_order_sees_layers_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _broken({}, "plain")
    trace = source.handle.trace(source.shape)
    monkeypatch.setattr(trace, "layers", dict(reversed(trace.layers.items())))
    _require_failure("forward_order", source, "not in forward order")


def test_forward_order_sees_a_layer_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _broken({}, "plain")
    trace = source.handle.trace(source.shape)
    monkeypatch.setattr(trace, "layers", dict(list(trace.layers.items())[1:]))
    _require_failure("forward_order", source, "conv1")


def test_maps_sees_a_wrong_size() -> None:
    layouts = {"norm": Layout("nhwc", 16, (4, 16))}
    _require_failure("maps", _broken({"layouts": layouts}), "layer 'norm' states a map of")


def test_maps_sees_a_wrong_grid_of_tokens() -> None:
    layouts = {"norm": Layout("tokens", 16, (5, 5), prefix=5)}
    _require_failure("maps", _broken({"layouts": layouts}, "vit_registers"), "layer 'norm' states a map of")


def test_orientation_sees_exchanged_rows_and_columns() -> None:
    class Turned(nn.Module):
        """Tokens in column order, which nothing but the image itself can tell."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm, self.head = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(x).transpose(2, 3).flatten(2).transpose(1, 2)
            return self.head(self.norm(tokens).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    handle = tl.wrap(Turned().eval(), input_size=(3, 32, 32))
    _require_failure("orientation", tl.checks.source(handle), "does not move most in its upper right quarter")


def test_orientation_sees_tokens_in_the_order_of_pooling() -> None:
    """As Hiera's: every second row and column first. Told so, the map is right."""

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.order, self.head = nn.Conv2d(3, 16, 4, 4), nn.Identity(), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            patches = self.patches(x).unflatten(2, (4, 2)).unflatten(4, (4, 2))  # [N, C, 4, 2, 4, 2]
            tokens = self.order(patches.permute(0, 3, 5, 2, 4, 1).flatten(1, 4))
            return self.head(tokens.mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    handle = tl.wrap(Unrolled().eval(), input_size=(3, 32, 32))
    _require_failure("orientation", tl.checks.source(handle), "'order'.* does not move most in its upper left quarter")
    told = handle.with_spec(layouts={"order": Layout("tokens", 16, (8, 8), unrolled=((2, 2),))})
    tl.checks.checks_of("source")["orientation"](tl.checks.source(told))


@pytest.mark.parametrize(
    ("name", "words"), [("gap", "no positions"), ("fc", "no positions"), ("blocks.1.attn.proj", "a part of attention")]
)
def test_features_sees_a_layer_that_cannot_say_where(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    source = _broken({}, "vit_registers" if "attn" in name else "plain")
    monkeypatch.setattr(Handle, "features_at", lambda self, shape, before=None: name)
    _require_failure("features", source, words)


def test_features_sees_patches_that_no_longer_count(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _broken({}, "vit_registers")
    monkeypatch.setattr(Handle, "features_at", lambda self, shape, before=None: "norm")
    _require_failure("features", source, "have no gradient")


def test_predicts_sees_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    guesses = Handle.predict
    monkeypatch.setattr(
        Handle, "predict", lambda self, images, k: [list(reversed(g)) for g in guesses(self, images, k)]
    )
    _require_failure("predicts", _broken({}, "plain"), "does not name the largest logit")


def test_predicts_sees_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    guesses = Handle.predict(*SPECIMENS["plain"](), k=3)
    source = _broken({"classes": ("a", "b", "c", "d", "e")}, "plain")
    monkeypatch.setattr(Handle, "predict", lambda self, images, k: guesses)
    _require_failure("predicts", source, "not that of its class")


def test_units_sees_a_score_that_is_not_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    score = Handle.score
    monkeypatch.setattr(Handle, "score", lambda self, images, target: score(self, images, target) + 1)
    _require_failure("units", _broken({}, "plain"), "its map says")


def test_units_needs_a_layer_that_depends_on_the_image() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
            nn.init.zeros_(self.scaled.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.scaled(x).mean((2, 3)))  # type: ignore[no-any-return]

    handle = tl.wrap(Constant().eval(), input_size=(3, 16, 16))
    _require_failure("units", tl.checks.source(handle), "no spatial layer whose map depends on the image")


@pytest.mark.parametrize("check", ["cam", "grad_cam", "saliency", "units"])
def test_maps_of_attribution_see_nothing(check: str) -> None:
    source = _broken({}, "plain")

    def vacuous(*arguments: object, **options: object) -> tl.Attribution:
        found = tl.explain(*arguments, **options)  # type: ignore[arg-type]
        return tl.Attribution(**{**vars(found), "values": found.values * 0})

    empty = Source(source.handle, source.inputs, vacuous)
    _require_failure(check, empty, "misses the logit" if check == "cam" else "zero everywhere")


def test_check_source_names_every_broken_promise() -> None:
    layouts = {"norm": Layout("nhwc", 16, (4, 16))}
    with pytest.raises(AssertionError) as caught:
        tl.checks.check_source(_broken({"layouts": layouts}).handle)
    assert "maps: model channelslast" in str(caught.value)
    tl.checks.check_source(SPECIMENS["plain"]()[0])


MODELS = [
    "timm/resnet18",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/mobilenetv3_small_050",
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x0_5",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_ecosystems(name: str) -> None:
    torch.manual_seed(0)
    tl.checks.check_source(tl.load(name, pretrained=False))


def test_layers_print_as_their_names() -> None:
    handle, _ = SPECIMENS["plain"]()
    assert all(isinstance(layer, Layer) and str(layer) == name for name, layer in handle.layers.items())
