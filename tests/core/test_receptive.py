"""Receptive fields: the recurrence as a loop, and the support of the gradient of every position of small models."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearised import Truth
from torchloupe_core import receptive
from torchloupe_core.errors import BadInput, NotApplicable, UnknownName
from torchloupe_core.handle import Handle
from torchloupe_core.layout import Layout
from torchloupe_core.receptive import fields
from torchloupe_core.spec import Spec

SIZE = (4, 18, 13)


class Model(nn.Module):
    """Parts, and a function of them and the input, whose result is the layer `out`."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run, self.out = run, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self, x))


def handle(run: Callable[..., Tensor], size: tuple[int, int, int] = SIZE, **parts: nn.Module) -> Handle:
    return Handle(Model(run, **parts).eval(), Spec(input_size=size))


def conv(before: int = 4, after: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, **{"padding": kernel // 2, **options})


# -- in theory --------------------------------------------------------------------------------------------------------

Step = tuple[int, int, int, int]  # kernel, stride, padding, dilation


def recurrence(steps: list[Step]) -> tuple[int, int, int]:
    """Size, stride and padding, backwards from the last layer (Araujo, Norris and Sim 2019)."""
    size, stride, padding = 1, 1, 0
    for k, s, p, d in reversed(steps):
        kernel = d * (k - 1) + 1
        size, stride, padding = s * size + kernel - s, s * stride, s * padding + p
    return size, stride, padding


def stack(down: list[Step], across: list[Step], size: tuple[int, int]) -> Handle:
    """Convolutions and poolings, one after the other."""
    layers: list[nn.Module] = []
    for place, pair in enumerate(zip(down, across, strict=True)):
        kernel, stride, padding, dilation = zip(*pair, strict=True)
        pools = place % 2 and all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
        if pools:
            layers.append(nn.MaxPool2d(kernel, stride, padding, dilation))
        else:
            layers.append(nn.Conv2d(2, 2, kernel, stride, padding, dilation))
    return handle(lambda self, x: self.body(x), (2, *size), body=nn.Sequential(*layers))


def random_steps(seed: int) -> list[Step]:
    numbers = random.Random(seed)
    steps = []
    for _ in range(numbers.randint(1, 5)):
        kernel, dilation = numbers.randint(1, 4), numbers.randint(1, 2)
        steps.append((kernel, numbers.randint(1, 3), numbers.randint(0, dilation * (kernel - 1)), dilation))
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_the_recurrence(seed: int) -> None:
    down = random_steps(seed)
    across = [(k + seed % 2, s, p, d) for k, s, p, d in down]
    model = stack(down, across, (260, 250))
    field = fields(model, "out").of()
    assert field.regular and not field.measured
    for ours, expected in zip(
        (field.size, field.stride, field.padding), zip(recurrence(down), recurrence(across), strict=True), strict=True
    ):
        assert (ours if isinstance(ours, tuple) else (ours, ours)) == expected
        assert isinstance(ours, tuple) == (expected[0] != expected[1])
    size, stride, padding = recurrence(down)
    top, _, bottom, _ = field.box(2, 0)
    assert (top, bottom) == (2 * stride - padding, 2 * stride - padding + size)


def test_the_theory_does_not_depend_on_the_size_of_the_image() -> None:
    steps = [(3, 2, 1, 1), (3, 2, 1, 1), (3, 2, 1, 1), (3, 1, 1, 1), (3, 1, 1, 1)]
    model = stack(steps, steps, (8, 64))
    field = fields(model, "out").of()
    assert field.grid == (1, 8)
    assert (field.size, field.stride, field.padding) == recurrence(steps)
    alone = fields(model, "out", shape=(2, 8, 8)).of()
    assert alone.grid == (1, 1)
    assert (alone.size, alone.stride, alone.padding) == recurrence(steps)


def test_a_skip_is_the_union_and_channels_of_a_concatenation_differ() -> None:
    parts = {"wide": conv(4, 3, 5), "narrow": conv(4, 2, 1), "next": conv(5, 5, groups=5)}
    model = handle(lambda self, x: self.next(torch.cat([self.wide(x), self.narrow(x)], 1)), **parts)
    found = fields(model, "out")
    assert found.distinct
    assert [found.of(channel).size for channel in range(5)] == [7, 7, 7, 3, 3]
    assert (found.of().size, found.of().padding, found.of(4).padding) == (7, 3, 1)
    skip = handle(lambda self, x: x + self.wide(x), wide=conv(4, 4, 5))
    assert (fields(skip, "out").of().size, fields(skip, "out").distinct) == (5, False)


def test_many_boxes_at_once() -> None:
    parts = {"wide": conv(4, 3, 5), "narrow": conv(4, 2, 1)}
    found = fields(handle(lambda self, x: torch.cat([self.wide(x), self.narrow(x)], 1), **parts), "out")
    channels, rows, cols = torch.tensor([0, 4, 2]), torch.tensor([0, 17, 5]), torch.tensor([12, 3, 6])
    singles = zip(channels.tolist(), rows.tolist(), cols.tolist(), strict=True)
    for one, place in enumerate(singles):
        field = found.of(place[0])
        assert tuple(found.boxes(channels, rows, cols)[one].tolist()) == field.box(*place[1:])
        assert tuple(found.boxes(channels, rows, cols, clipped=True)[one].tolist()) == field.clipped(*place[1:]).box


def test_what_is_cut_off_is_said() -> None:
    field = fields(handle(lambda self, x: self.conv(x), conv=conv(kernel=5)), "out").of()
    assert field.box(0, 12) == (-2, 10, 3, 15)
    assert field.clipped(0, 12) == ((0, 10, 3, 13), (2, 0, 0, 2))
    assert field.clipped(9, 6) == (field.box(9, 6), (0, 0, 0, 0))


# -- against the gradient ---------------------------------------------------------------------------------------------


def attention(self: Any, x: Tensor) -> Tensor:
    """Over all positions, with a residual."""
    tokens = self.embed(x).flatten(2).transpose(1, 2)
    query, key, value = self.qkv(tokens).chunk(3, -1)
    found = F.scaled_dot_product_attention(query, key, value) + tokens
    return found.transpose(1, 2).unflatten(2, (6, 4))


def attention_to_the_past(self: Any, x: Tensor) -> Tensor:
    tokens = self.embed(x).flatten(2).mT
    return F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True).mT.unflatten(2, (6, 4))


def attention_by_a_mask(self: Any, x: Tensor) -> Tensor:
    """Each token to itself and the one after, by a mask of numbers as well as by one of truth values."""
    tokens = self.embed(x).flatten(2).mT[:, None]
    allowed = torch.eye(24, dtype=torch.bool) | torch.eye(24, dtype=torch.bool).roll(1, 1)
    hidden = torch.zeros(24, 24).masked_fill(~allowed, -torch.inf).to(x.dtype)
    first = F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=allowed)
    return (first + F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=hidden))[:, 0].mT.unflatten(
        2, (6, 4)
    )


def windows(self: Any, x: Tensor) -> Tensor:
    """Attention in shifted windows of 3 x 4 with the mask that keeps opposite borders apart."""
    n, c, h, w = x.shape
    x = torch.roll(x, (-1, -2), (2, 3))
    region = x.new_zeros(h, w)
    bands = (slice(0, -3), slice(-3, -1), slice(-1, None)), (slice(0, -4), slice(-4, -2), slice(-2, None))
    for number, (rows, cols) in enumerate(itertools.product(*bands)):
        region[rows, cols] = number
    cut = region.view(h // 3, 3, w // 4, 4).transpose(1, 2).reshape(-1, 12)
    mask = (cut[:, None] != cut[:, :, None]).to(x) * -100.0
    tokens = x.view(n, c, h // 3, 3, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, 12, c)
    scores = (tokens @ tokens.transpose(-1, -2) + mask).softmax(-1)
    found = (scores @ tokens).view(n, h // 3, w // 4, 3, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
    return torch.roll(found, (1, 2), (2, 3))


def written_in_place(self: Any, x: Tensor) -> Tensor:
    """A shift of half the channels by one row, into a tensor of zeros, then a convolution written over a quarter."""
    y = self.first(x)
    out = torch.zeros_like(y)
    out[:, :2, 1:] = y[:, :2, :-1]
    out[:, 2:] = y[:, 2:]
    out[:, 3:] += self.second(y)[:, :1]
    return out.relu_()


def squeeze_excite(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))


def shuffled(self: Any, x: Tensor) -> Tensor:
    y = torch.cat([self.a(x), self.b(x)], 1)
    return y.view(len(y), 2, 2, *y.shape[2:]).transpose(1, 2).flatten(1, 2)


CASES: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module]]] = {
    "dilation": (lambda self, x: self.b(self.a(x)), {"a": conv(stride=2), "b": conv(dilation=3, padding=3)}),
    "stride beyond kernel": (lambda self, x: self.b(self.a(x)), {"a": conv(kernel=2, stride=3), "b": conv()}),
    "pooling that leaves a pixel": (lambda self, x: self.a(F.max_pool2d(x, 2)), {"a": conv(kernel=5)}),
    "ceil_mode": (lambda self, x: self.a(F.avg_pool2d(x, 3, 2, ceil_mode=True)), {"a": conv()}),
    "transposed": (lambda self, x: self.b(self.a(x)), {"a": conv(stride=2), "b": nn.ConvTranspose2d(4, 4, 4, 2, 1)}),
    "transposed with holes": (lambda self, x: self.b(self.a(x)), {"a": nn.ConvTranspose2d(4, 4, 2, 3), "b": conv()}),
    "groups": (lambda self, x: self.b(torch.cat([self.a(x), x], 1)), {"a": conv(), "b": conv(8, 8, groups=4)}),
    "channel shuffle": (shuffled, {"a": conv(4, 2), "b": conv(4, 2, 5)}),
    "nn.ChannelShuffle": (
        lambda self, x: self.b(torch.cat([self.a(x), x], 1)),
        {"a": conv(), "b": nn.ChannelShuffle(2)},
    ),
    "pixel shuffle": (lambda self, x: self.b(F.pixel_shuffle(self.a(x), 2)), {"a": conv(), "b": conv(1)}),
    "pixel unshuffle": (lambda self, x: self.b(F.pixel_unshuffle(x[..., :12], 2)), {"b": conv(16)}),
    "space to depth": (
        lambda self, x: self.b(torch.cat([x[:, :, 0::2, :12:2], x[:, :, 1::2, 1::2]], 1)),
        {"b": conv(8, groups=2)},
    ),
    "nearest": (lambda self, x: self.b(F.interpolate(self.a(x), scale_factor=2)), {"a": conv(stride=2), "b": conv()}),
    "bilinear": (lambda self, x: self.a(F.interpolate(x, (11, 30), mode="bilinear")), {"a": conv()}),
    "bicubic": (lambda self, x: F.interpolate(self.a(x), (17, 10), mode="bicubic", antialias=True), {"a": conv()}),
    "adaptive pooling": (lambda self, x: F.adaptive_avg_pool2d(self.a(x), (5, 4)), {"a": conv()}),
    "global pooling": (lambda self, x: self.a(x).mean((2, 3), keepdim=True), {"a": conv()}),
    "pooling of rows": (lambda self, x: x * self.a(x).mean(3, keepdim=True), {"a": conv()}),
    "zeros around": (lambda self, x: self.a(F.pad(x, (2, 1, 0, 1))), {"a": conv(stride=2, padding=0)}),
    "cropped": (lambda self, x: self.a(F.pad(x, (-2, -1, -3, 1))), {"a": conv()}),
    "reflected": (lambda self, x: self.a(x), {"a": conv(padding_mode="reflect", kernel=5)}),
    "replicated": (lambda self, x: self.a(x), {"a": conv(padding_mode="replicate", kernel=5)}),
    "circular": (lambda self, x: self.a(x), {"a": conv(padding_mode="circular")}),
    "zero channels": (lambda self, x: torch.cat([self.a(x), x], 1) + F.pad(x, (0, 0, 0, 0, 1, 3)), {"a": conv()}),
    "squeeze-excite": (squeeze_excite, {"first": conv(stride=2), "gate": conv(kernel=1)}),
    "group normalisation": (lambda self, x: self.b(self.a(x)), {"a": conv(), "b": nn.GroupNorm(2, 4)}),
    "instance normalisation": (lambda self, x: self.b(self.a(x)), {"a": conv(), "b": nn.InstanceNorm2d(4)}),
    "over channels": (lambda self, x: F.normalize(torch.cat([self.a(x), x], 1)), {"a": conv()}),
    "response normalisation": (lambda self, x: F.local_response_norm(torch.cat([self.a(x), x], 1), 3), {"a": conv()}),
    "glu": (lambda self, x: F.glu(torch.cat([self.a(x), x], 1), 1), {"a": conv()}),
    "picked": (lambda self, x: torch.cat([self.a(x), x], 1)[:, torch.tensor([7, 0, 5])].flip(2), {"a": conv()}),
    "halves in place": (written_in_place, {"first": conv(), "second": conv(kernel=5)}),
    "attention": (attention, {"embed": conv(kernel=3, stride=3, padding=0), "qkv": nn.Linear(4, 12)}),
    "attention to what came before": (attention_to_the_past, {"embed": conv(stride=3, padding=0)}),
    "attention by a mask": (attention_by_a_mask, {"embed": conv(stride=3, padding=0)}),
    "shifted windows": (lambda self, x: windows(self, self.a(x)[..., :12]), {"a": conv(kernel=1)}),
    "a matrix over rows": (lambda self, x: self.b(self.a(x).mT).mT, {"a": conv(), "b": nn.Linear(18, 15)}),
    "unfolded": (
        lambda self, x: F.unfold(self.a(x), 2, stride=2).unflatten(2, (9, 6)),
        {"a": conv(kernel=1)},
    ),
    "einsum": (lambda self, x: torch.einsum("nchw,cd->ndhw", self.a(x), torch.rand(4, 3).to(x)), {"a": conv()}),
    "a weight made of the image": (
        lambda self, x: F.conv2d(x, (self.a(x).mean() * torch.rand(3, 4, 1, 1).to(x))),
        {"a": conv()},
    ),
    "on another device": (lambda self, x: self.a(x) + torch.arange(13, device=x.device).to(x.device), {"a": conv()}),
    "its course depends on numbers": (lambda self, x: self.a(x) if x.abs().sum() > 0 else x, {"a": conv()}),
}


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_position_reads_what_its_gradient_shows(name: str, values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, parts = CASES[name]
    torch.manual_seed(0)
    model = handle(run, **parts)
    monkeypatch.setattr(receptive, "_quick", lambda: not values)
    truth, found = Truth(model, ["out"], SIZE), fields(model, "out")
    assert not found.measured
    channels = [*range(found.channels)] if found.distinct else [0]
    for channel in (None, *channels):
        field = found.of(channel)
        for row, col in itertools.product(*map(range, field.grid)):
            expected, (box, cut) = truth.support("out", row, col, channel), field.clipped(row, col)
            assert box == expected, (channel, row, col)
            outer = field.box(row, col)
            if box != (0, 0, 0, 0):
                assert tuple(outer[n] + cut[n] * (1, 1, -1, -1)[n] for n in range(4)) == box
    if not found.distinct:
        assert truth.support("out", 0, 0, 0) == truth.support("out", 0, 0)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeeze-excite", "group normalisation", "instance normalisation", "attention"])
def test_without_gates_the_field_is_local(name: str) -> None:
    run, parts = CASES[name]
    model = handle(run, **parts)
    whole, local = fields(model, "out").of(), fields(model, "out", without_gates=True).of()
    assert (whole.stride, whole.padding, whole.regular) == (0, 0, True) and whole.size == SIZE[1:]
    assert whole.box(0, 0) == whole.box(3, 2) == (0, 0, *SIZE[1:])
    expected = {"squeeze-excite": (3, 2, 1), "attention": (3, 3, 0)}.get(name, (3, 1, 1))
    assert (local.size, local.stride, local.padding) == expected and local.without_gates


def test_a_gate_that_does_not_see_the_whole_map_stays() -> None:
    model = handle(lambda self, x: x * torch.sigmoid(self.gate(x)), gate=conv(kernel=7))
    assert fields(model, "out", without_gates=True).of().size == 7
    run, parts = CASES["shifted windows"]
    with_, without = (fields(handle(run, **parts), "out", without_gates=one).of() for one in (False, True))
    assert with_.box(4, 5) == without.box(4, 5) == (4, 2, 7, 6) and not with_.regular


def test_a_layer_that_sees_nothing_but_the_whole_map_has_it_without_gates_too() -> None:
    model = handle(lambda self, x: self.a(x).mean((2, 3), keepdim=True), a=conv())
    assert fields(model, "out", without_gates=True).of().box(0, 0) == (0, 0, *SIZE[1:])


def test_concatenated_channels_of_different_fields_are_gated_alike() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1)
        return y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))

    model = handle(run, a=conv(), b=conv(kernel=9), gate=conv(8, 8, 1))
    local = fields(model, "out", without_gates=True)
    assert (local.of(0).size, local.of(7).size) == (3, 9)


# -- measured ---------------------------------------------------------------------------------------------------------


def test_what_is_not_understood_is_measured_and_says_so() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3).to(x), list(x.shape), align_corners=False)
        return self.b(F.grid_sample(self.a(x), grid, align_corners=False))

    model = handle(run, (4, 12, 12), a=conv(), b=conv(stride=2))
    before, after = fields(model, "a").of(), fields(model, "out").of()
    assert before.measured is None and before.size == 3
    assert after.measured is not None and "grid_sampler_2d" in after.measured
    assert after.box(0, 0)[:2] == (0, 0)
    assert all(size >= 5 for size in ([after.size] if isinstance(after.size, int) else after.size))
    assert after.stride == 2
    top, left, bottom, right = after.box(3, 3)
    assert top <= 4 and left <= 4 and bottom >= 9 and right >= 9
    with pytest.raises(NotApplicable, match="grid_sampler_2d"):
        fields(model, "out", without_gates=True)


def test_a_layer_cut_off_from_the_image() -> None:
    model = handle(lambda self, x: self.a(torch.ones_like(x)), a=conv())
    with pytest.raises(NotApplicable, match="'out' does not depend on the image"):
        fields(model, "out")


# -- names and places -------------------------------------------------------------------------------------------------


def test_calls_and_inputs_of_modules() -> None:
    model = handle(lambda self, x: self.relu(self.b(self.relu(self.a(x)))), a=conv(), b=conv(), relu=nn.ReLU())
    sizes = {name: fields(model, name).of().size for name in ("relu#1", "relu#2", "relu", "b.in", "b", "a.in")}
    assert sizes == {"relu#1": 3, "relu#2": 5, "relu": 5, "b.in": 3, "b": 5, "a.in": 1}


def test_token_layers_by_their_patches() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([torch.zeros(len(x), 1, 4).to(x), tokens], 1)

    module = Model(run, embed=conv(kernel=4, stride=4, padding=0)).eval()
    layouts = {"out": Layout("tokens", 4, (4, 3), 1)}
    field = fields(Handle(module, Spec(input_size=(4, 16, 12), layouts=layouts)), "out").of()
    assert (field.size, field.stride, field.padding, field.grid) == (4, 4, 0, (4, 3))
    assert field.box(3, 1) == (12, 4, 16, 8)


def test_bad_names_and_places() -> None:
    model = handle(lambda self, x: self.fc(self.conv(x).flatten(2)[:, :, None, :5]), conv=conv(), fc=nn.Linear(5, 5))
    with pytest.raises(UnknownName, match="did you mean 'conv'"):
        fields(model, "cnov")
    with pytest.raises(UnknownName, match="no call 2"):
        fields(model, "conv#2")
    with pytest.raises(BadInput, match="there is no channel 4"):
        fields(model, "conv").of(4)
    with pytest.raises(BadInput, match="there is no channel -1"):
        fields(model, "conv").of(-1)
    for place in ((18, 0), (0, 13), (-1, 0)):
        with pytest.raises(BadInput, match="18x13 map of 'conv'"):
            fields(model, "conv").of().box(*place)
        with pytest.raises(BadInput, match="18x13 map of 'conv'"):
            fields(model, "conv").of().clipped(*place)
    odd = handle(lambda self, x: x[:, :, None], a=nn.Identity())
    with pytest.raises(NotApplicable, match="gives no map"):
        fields(odd, "out")
    with pytest.raises(BadInput, match="input size is not known"):
        fields(Handle(Model(lambda self, x: x)), "out")


# -- no trace ---------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_and_nothing_is_computed() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()
            self.register_buffer("last", torch.zeros(2, 4, 18, 13))

        def forward(self, x: Tensor) -> Tensor:
            self.last.copy_(self.conv(x))  # type: ignore[operator]
            return self.conv(self.last)  # type: ignore[arg-type]

    module = Remembering().train()
    model = Handle(module, Spec(input_size=SIZE))
    before, state = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
    assert fields(model, "conv").of().size == 5
    assert module.training and module.conv.training
    assert not module._forward_hooks and not module.conv._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(hasattr(value, "_torchloupe_reach") for value in (*module.parameters(), *module.buffers()))
    assert torch.equal(torch.get_rng_state(), state) and model.forwards == 0


def test_one_pass_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = handle(lambda self, x: self.b(self.a(x)), a=conv(), b=conv())
    passes = []
    read = receptive._read
    monkeypatch.setattr(receptive, "_read", lambda *given, **named: passes.append(1) or read(*given, **named))
    assert [fields(model, name).of().size for name in ("a", "b", "out")] == [3, 5, 5]
    assert len(passes) == 1
    model.module.b = conv(kernel=5)
    assert fields(model, "out").of().size == 7  # an exchanged layer is noticed
    assert len(passes) == 2
