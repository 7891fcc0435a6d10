"""Attention rollout and relevance against closed forms and plain loops, and the models they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchloupe as tl
from torchloupe_core.attention import ExplicitAttention, plain_attention
from torchloupe_core.errors import BadInput, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.specimens import SPECIMENS, Tokens

SIDE, CELLS = 32, 16  # 4 x 4 patches of 8 pixels
X = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def weights(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices `[N, heads, L, L]` and the values of a specimen's attention, written out."""
    n, length = x.shape[:2]
    q, k, v = attn.qkv(x).view(n, length, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1), v


def by_hand(model: Any, x: Tensor, blocks: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Tokens after some blocks of the specimen `Tokens`, and the matrices met, in one graph that keeps them."""
    t = model.patches(x).flatten(2).transpose(1, 2) + model.positions
    t, matrices = torch.cat([model.prefix.expand(len(x), -1, -1), t], 1), []
    for block in model.blocks[:blocks]:
        matrix, v = weights(block.attn, block.norm1(t))
        matrices.append(matrix)
        t = t + block.attn.proj((matrix @ v).transpose(1, 2).flatten(2))
        t = t + block.mlp(block.norm2(t))
    return t, matrices


def rollout(matrices: Sequence[Tensor], join: Callable[[Tensor], Tensor] = lambda a: a.mean(0)) -> Tensor:
    """R `[L, L]` of one image, from its matrices `[heads, L, L]`."""
    r = torch.eye(matrices[0].shape[-1])
    for matrix in matrices:
        a = join(matrix) + torch.eye(len(r))
        r = (a / a.sum(-1, keepdim=True)) @ r
    return r


def relevance(matrices: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    r = torch.eye(matrices[0].shape[-1])
    for matrix, gradient in zip(matrices, gradients, strict=True):
        r = r + (gradient * matrix).clamp(min=0).mean(0) @ r
    return r


@pytest.mark.parametrize(
    ("heads", "join"), [("mean", lambda a: a.mean(0)), ("max", lambda a: a.amax(0)), ("min", lambda a: a.amin(0))]
)
def test_rollout_is_a_loop_over_explicit_matrices(heads: str, join: Callable[[Tensor], Tensor]) -> None:
    handle, x = SPECIMENS["vit_registers"]()
    _, matrices = by_hand(handle.module, x)
    expected = torch.stack([rollout([m[i] for m in matrices], join)[0, 5:].view(4, 6) for i in range(len(x))]).detach()
    found = tl.explain(handle, x, target=1, method="attention_rollout", heads=heads)
    torch.testing.assert_close(found.values, expected, atol=1e-7, rtol=1e-4)
    assert found.options == {"heads": heads}


def test_relevance_is_a_loop_over_matrices_and_their_gradients() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    model = handle.module
    for target, read in (("logit:1", lambda logits: logits[:, 1]), ("prob:2", lambda logits: logits.softmax(1)[:, 2])):
        t, matrices = by_hand(model, x)
        gradients = torch.autograd.grad(read(model.head(model.norm(t)[:, 0])).sum(), matrices)
        found = tl.explain(handle, x, target=target, method="attention_relevance")
        for i in range(len(x)):
            r = relevance([m[i] for m in matrices], [g[i] for g in gradients])
            torch.testing.assert_close(found.values[i], r[0, 5:].view(4, 6).detach(), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("target", ["blocks.1:3@2,4", "blocks.1:3", "norm:2@2,4"])
def test_a_unit_has_the_rows_of_the_tokens_it_reads(target: str) -> None:
    handle, x = SPECIMENS["vit_registers"]()
    model = handle.module
    t, matrices = by_hand(model, x, 3 if "norm" in target else 2)
    maps = (model.norm(t) if "norm" in target else t)[:, 5:].transpose(1, 2).view(3, -1, 4, 6)
    channel = int(target.split(":")[1][0])
    value = maps[:, channel, 2, 4] if "@" in target else maps[:, channel].mean((1, 2))
    gradients = torch.autograd.grad(value.sum(), matrices)
    rows = [5 + 2 * 6 + 4] if "@" in target else list(range(5, 29))
    found = tl.explain(handle, x, target=target, method="attention_relevance")
    for i in range(len(x)):
        r = relevance([m[i] for m in matrices], [g[i] for g in gradients])[rows].mean(0)
        torch.testing.assert_close(found.values[i], r[5:].view(4, 6).detach(), atol=1e-7, rtol=1e-3)


def test_rollout_knows_no_target_and_scores_it_all_the_same() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    found = {name: tl.explain(handle, x, target=name, method="attention_rollout") for name in ("logit:0", "blocks.0:2")}
    assert torch.equal(found["logit:0"].values, found["blocks.0:2"].values)
    for name, one in found.items():
        torch.testing.assert_close(one.scores, handle.score(x, name))


def test_targets_of_different_depth_in_one_batch() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    names = ["logit:0", "blocks.0:2", "blocks.1:3@2,4"]
    together = tl.explain(handle, x, target=names, method="attention_relevance")
    for index, name in enumerate(names):
        alone = tl.explain(handle, x[index : index + 1], target=name, method="attention_relevance")
        torch.testing.assert_close(together.values[index], alone.values[0], atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(together.scores[index], alone.scores[0])


def test_one_forward_pass_answers() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    for method in ("attention_rollout", "attention_relevance"):
        tl.explain(handle, x, target=0, method=method)
        assert tl.explain(handle, x, target=0, method=method).forwards == len(x)


def test_the_pass_goes_no_further_than_the_target_reads() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    tl.explain(handle, x, target="blocks.0:2", method="attention_relevance")
    ran: list[str] = []
    for name in ("blocks.0.attn", "blocks.1.attn"):
        handle.module.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    tl.explain(handle, x, target="blocks.0:2", method="attention_relevance")
    assert ran == ["blocks.0.attn"]


def test_nothing_before_the_first_matrix_is_differentiated() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    tl.explain(handle, x, target=0, method="attention_relevance")
    seen: dict[str, bool] = {}
    for name in ("patches", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "head"):
        part = handle.module.get_submodule(name)
        part.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.requires_grad}))
    tl.explain(handle, x, target=0, method="attention_rollout")
    assert not any(seen.values())
    tl.explain(handle, x, target=0, method="attention_relevance")
    assert seen == {"patches": False, "blocks.0.attn.qkv": False, "blocks.1.attn.qkv": True, "head": True}


def test_uniform_attention_has_a_closed_form() -> None:
    """Rows of (J/L + I)/2, multiplied through B blocks, hold (1 - 2^-B)/L off the diagonal."""
    handle, x = SPECIMENS["vit_registers"]()
    for block in handle.module.blocks:
        nn.init.zeros_(block.attn.q_norm.weight)
    found = tl.explain(handle, x, target=0, method="attention_rollout")
    torch.testing.assert_close(found.values, torch.full((3, 4, 6), (1 - 2**-3) / 29))


# -- models of one's own ----------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1), 0.5, False) @ v


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch dimension, as torch's own multi-head attention with weights has them."""
    a, b, c = (part.flatten(0, 1) for part in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(a, b.mT) / a.shape[-1] ** 0.5, -1), c).view_as(v)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def mixed_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1).flip(1) @ v


def difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(q, k, v) - 0.5 * fused(k, q, v)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT


class Net(nn.Module):
    """Blocks `t + attend(t)` on patches, with a class token unless pooled; `between` runs between two blocks."""

    def __init__(self, attend: Attend = fused, *, pooled: bool = False, blocks: int = 2, dim: int = 12) -> None:
        super().__init__()
        self.attend, self.pooled = attend, pooled
        self.patches, self.first = nn.Conv2d(3, dim, 8, 8), nn.Parameter(torch.randn(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, CELLS, dim))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(blocks))
        self.between: nn.Module = nn.Identity()
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 4)

    def block(self, t: Tensor, index: int) -> Tensor:
        n, length, _ = t.shape
        q, k, v = self.qkv[index](t).view(n, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        return t + self.attend(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patches(x).flatten(2).transpose(1, 2) + self.pos
        if not self.pooled:
            t = torch.cat([self.first.expand(len(t), -1, -1), t], 1)
        for index in range(len(self.qkv)):
            t = self.between(t) if index == 1 else t
            t = self.block(t, index)
        t = self.norm(t)
        return self.head(t.mean(1) if self.pooled else t[:, 0])  # type: ignore[no-any-return]


def wrapped(module: nn.Module) -> Handle:
    return tl.wrap(module.eval(), input_size=(3, SIDE, SIDE))


def net(attend: Attend = fused, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(attend, **options)


@pytest.mark.parametrize("method", ["attention_rollout", "attention_relevance"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("attend", [unfused, folded])
def test_fused_and_unfused_attention_give_one_map(attend: Attend, pooled: bool, method: str) -> None:
    maps = [tl.explain(wrapped(net(one, pooled=pooled)), X, target=1, method=method).values for one in (fused, attend)]
    assert maps[0].std() > 0
    torch.testing.assert_close(maps[0], maps[1], atol=1e-7, rtol=1e-4)


def test_pooled_tokens_have_the_mean_row() -> None:
    model = net(pooled=True)
    matrices: list[Tensor] = []
    model.attend = lambda q, k, v: (matrices.append(w := (q @ k.mT / 6**0.5).softmax(-1)), w @ v)[1]
    gradients = torch.autograd.grad(model(X)[:, 2].sum(), matrices)
    model.attend = fused
    handle = wrapped(model)
    rolled = tl.explain(handle, X, target=2, method="attention_rollout").values
    related = tl.explain(handle, X, target=2, method="attention_relevance").values
    for i in range(len(X)):
        expected = rollout([m[i] for m in matrices]).mean(0).view(4, 4).detach()
        torch.testing.assert_close(rolled[i], expected, atol=1e-7, rtol=1e-4)
        expected = relevance([m[i] for m in matrices], [g[i] for g in gradients]).mean(0).view(4, 4).detach()
        torch.testing.assert_close(related[i], expected, atol=1e-7, rtol=1e-4)


class One(nn.Module):
    """The class token attends to all tokens alike: `logit = w . (t_0 + mean_j t_j)`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.tokens, self.head = nn.Conv2d(3, 6, 8, 8), nn.Identity(), nn.Linear(6, 4, bias=False)

    def embedded(self, x: Tensor) -> Tensor:
        return self.tokens(F.pad(self.patches(x).flatten(2).transpose(1, 2), (0, 0, 1, 0)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        t = self.embedded(x)
        t = t + F.scaled_dot_product_attention(t[:, None] * 0, t[:, None] * 0, t[:, None])[:, 0]
        return self.head(t[:, 0])  # type: ignore[no-any-return]


def test_relevance_of_one_uniform_block_is_what_each_value_adds_to_the_logit() -> None:
    model = One()
    found = tl.explain(wrapped(model), X, target=3, method="attention_relevance").values
    adds = F.conv2d(model.patches(X), model.head.weight[3][None, :, None, None])[:, 0] / (CELLS + 1)
    torch.testing.assert_close(found, adds.relu().detach(), atol=1e-7, rtol=1e-4)


def test_a_class_token_that_looks_for_bright_patches_finds_them() -> None:
    class Looking(One):
        def forward(self, x: Tensor) -> Tensor:
            bright = F.pad(F.avg_pool2d(x, 8).mean(1).flatten(1), (1, 0))[:, None, :, None]
            t = self.embedded(x)
            t = t + fused(torch.ones_like(bright), 5 * bright, t[:, None])[:, 0]
            return self.head(t[:, 0])  # type: ignore[no-any-return]

    x = torch.zeros(3, 3, SIDE, SIDE)
    for index, (row, column) in enumerate([(0, 1), (2, 3), (3, 0)]):
        x[index, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    found = tl.explain(wrapped(Looking()), x, target=0, method="attention_rollout").values
    assert found.flatten(1).argmax(1).tolist() == [1, 11, 12]


class Swap(nn.Module):
    """Each token takes a little of the one before it."""

    def forward(self, t: Tensor) -> Tensor:
        return t + 0.1 * t.roll(1, 1)


class Beside(Net):
    """Two attentions read the same tokens."""

    def forward(self, x: Tensor) -> Tensor:
        t = self.patches(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.block(t, 0) + self.block(t, 1)).mean(1))  # type: ignore[no-any-return]


class Merging(Net):
    """Half the tokens go on."""

    def forward(self, x: Tensor) -> Tensor:
        t = self.patches(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.block(self.block(t, 0)[:, ::2], 1)).mean(1))  # type: ignore[no-any-return]


def with_between(part: nn.Module) -> Net:
    model = net()
    model.between = part
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: net(mixed_heads), "was seen"),
        (lambda: net(over_queries), "was seen"),
        (lambda: net(difference), "side by side"),
        (lambda: net(dropping), "misses the model's own"),
        (lambda: net(over_channels), "not the patches"),
        (lambda: with_between(Swap()), "mixed by other layers"),
        (lambda: Beside(pooled=True), "side by side"),
        (lambda: Merging(pooled=True), r"\[1, 2, 16, 16\], \[1, 2, 8, 8\]"),
        (lambda: SPECIMENS["nhwc"]()[0].module, r"\[4, 2, 16, 16\]"),
        (lambda: SPECIMENS["residual"]()[0].module, "was seen"),
    ],
)
@pytest.mark.parametrize("method", ["attention_rollout", "attention_relevance"])
def test_refuses_where_the_matrices_are_not_all(build: Callable[[], nn.Module], words: str, method: str) -> None:
    with pytest.raises(NotApplicable, match=f"{words}.*Use grad_cam or saliency"):
        tl.explain(wrapped(build()), X, target=0, method=method)


def test_refuses_a_mixing_that_only_some_blocks_have() -> None:
    class Some(Net):
        def block(self, t: Tensor, index: int) -> Tensor:
            self.attend = mixed_heads if index == 1 else fused
            return super().block(t, index)

    with pytest.raises(NotApplicable, match="heads are mixed"):
        tl.explain(wrapped(Some(blocks=3)), X, target=0, method="attention_rollout")


def test_refuses_targets_that_no_row_stands_for() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    for target, words in (
        ("patches:1", "before the first attention"),
        ("logit:0+blocks.0:1", "after different blocks"),
        ("logit:0+patches:1", "before the first attention"),
    ):
        with pytest.raises(NotApplicable, match=words):
            tl.explain(handle, x, target=target, method="attention_relevance")
    tl.explain(handle, x, target="logit:0+0.5*norm:1", method="attention_relevance")


def test_heads_are_joined_in_known_ways_only() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    with pytest.raises(BadInput, match="'mean', 'max', 'min'; got 'median'"):
        tl.explain(handle, x, target=0, method="attention_rollout", heads="median")


# -- fused attention step by step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.randn(5, 7)},
        {"attn_mask": torch.rand(2, 1, 5, 7) > 0.3},
        {"enable_gqa": True},
        {"enable_gqa": True, "scale": 2.0, "attn_mask": torch.randn(2, 4, 5, 7)},
    ],
)
def test_step_by_step_is_torch_s_own(options: dict[str, Any]) -> None:
    groups = 2 if options.get("enable_gqa") else 4
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, groups, 7, 6), torch.randn(2, groups, 7, 3)
    expected, matrices = F.scaled_dot_product_attention(q, k, v, **options), []
    with ExplicitAttention(lambda matrix: (matrices.append(matrix), matrix)[1]):
        found = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, expected)
    assert matrices[0].shape == (2, 4, 5, 7)
    torch.testing.assert_close(matrices[0].sum(-1), torch.ones(2, 4, 5))


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_torch_s_own_multi_head_attention(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    _, expected = layer(x, x, x, average_attn_weights=False)
    matrices: list[Tensor] = []
    with torch.no_grad():
        plain = layer(x, x, x, **options)[0]
        with ExplicitAttention(lambda matrix: (matrices.append(matrix), matrix)[1]):
            seen = layer(x, x, x, **options)[0]
    torch.testing.assert_close(seen, plain)
    torch.testing.assert_close(matrices[0].view(3, 2, 5, 5), expected)


def test_what_is_exchanged_is_used() -> None:
    v = torch.randn(2, 1, 4, 3)
    with ExplicitAttention(lambda matrix: torch.eye(4).expand_as(matrix)):
        assert torch.equal(fused(v, v, v), v)
        assert torch.equal(unfused(v, v, v), v)


def test_an_error_inside_leaves_the_mode() -> None:
    handle, x = SPECIMENS["vit_registers"]()
    tl.explain(handle, x, target=0, method="attention_relevance")
    handle.module.blocks[1].mlp.register_forward_hook(lambda *arguments: 1 / 0)
    for method in ("attention_rollout", "attention_relevance"):
        with pytest.raises(ZeroDivisionError):
            tl.explain(handle, x, target=0, method=method)
        assert torch._C._len_torch_function_stack() == 0


def test_what_was_found_out_is_found_out_once() -> None:
    model = Tokens()
    handle = tl.wrap(model.eval(), input_size=(3, 32, 48), prefix=5)
    with handle.borrow():
        first = plain_attention(handle, (3, 32, 48))
        before = handle.forwards
        assert plain_attention(handle, (3, 32, 48)) is first
    assert handle.forwards == before
    assert (first.prefix, first.grid, first.read) == (5, (4, 6), (0,))
