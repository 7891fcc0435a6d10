"""Attention maps of timm's and torchvision's models against matrices taken out by hand, and the families refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import torchloupe as tl
from torchloupe_core.errors import NotApplicable
from torchloupe_core.handle import Handle

METHODS = ("attention_rollout", "attention_relevance")
# name, options: prefix tokens, tokens that are read
MODELS: dict[str, tuple[str, dict[str, Any], int, slice]] = {
    "class token": ("vit_tiny_patch16_224", {}, 1, slice(0, 1)),
    "mean of patches": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1, slice(1, None)),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}, 2, slice(0, 2)),
    "registers, mean": ("vit_little_patch16_reg4_gap_256", {}, 4, slice(4, None)),
    "registers, class token": ("vit_tiny_patch16_224", {"reg_tokens": 4}, 5, slice(0, 1)),
    "relative bias": ("beit_base_patch16_224", {"embed_dim": 48, "num_heads": 2}, 1, slice(1, None)),
    "rotary": ("eva02_tiny_patch14_224", {}, 1, slice(1, None)),
}


def model(kind: str, *, fused: bool = True) -> Handle:
    """Two blocks on 4 x 6 patches."""
    torch.manual_seed(0)
    name, options, _, _ = MODELS[kind]
    side = 14 if "patch14" in name else 16
    handle = tl.load(f"timm/{name}", pretrained=False, img_size=(4 * side, 6 * side), depth=2, num_classes=5, **options)
    for part in handle.module.modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm)):  # timm begins with small weights, so attention with even rows
            nn.init.normal_(part.weight, std=0.15)
        if type(part).__name__ == "LayerScale":
            nn.init.ones_(part.gamma)
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return handle


def batch(handle: Handle) -> Tensor:
    assert handle.spec.input_size is not None
    return torch.randn(2, *handle.spec.input_size, generator=torch.Generator().manual_seed(1))


def matrices_of(handle: Handle, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits and what goes into `attn_drop`, in one graph: the model must not be fused."""
    found: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda module, arguments, output: found.append(arguments[0]))
        for name, part in handle.module.named_modules()
        if name.endswith("attn_drop")
    ]
    logits = handle.module(x)
    for hook in hooks:
        hook.remove()
    return logits, found


def rollout(matrices: list[Tensor]) -> Tensor:
    r = torch.eye(matrices[0].shape[-1])
    for matrix in matrices:
        r = (0.5 * matrix.mean(0) + 0.5 * torch.eye(len(r))) @ r
    return r


def relevance(matrices: list[Tensor], gradients: list[Tensor]) -> Tensor:
    r = torch.eye(matrices[0].shape[-1])
    for matrix, gradient in zip(matrices, gradients, strict=True):
        r = r + (gradient * matrix).clamp(min=0).mean(0) @ r
    return r


@pytest.mark.parametrize("kind", MODELS)
def test_maps_are_loops_over_matrices_taken_out_by_hand(kind: str) -> None:
    _, _, prefix, read = MODELS[kind]
    plain = model(kind, fused=False)
    x = batch(plain)
    logits, matrices = matrices_of(plain, x)
    assert len(matrices) == 2
    gradients = torch.autograd.grad(logits[:, 3].sum(), matrices)
    for handle in (plain, model(kind)):
        found = {method: tl.explain(handle, x, target=3, method=method) for method in METHODS}
        for i in range(len(x)):
            own = [m[i].detach() for m in matrices]
            for method, r in (
                ("attention_rollout", rollout(own)),
                ("attention_relevance", relevance(own, [g[i] for g in gradients])),
            ):
                expected = r[read].mean(0)[prefix:].view(4, 6)
                assert expected.std() > 1e-5
                torch.testing.assert_close(found[method].values[i], expected, atol=1e-6, rtol=1e-3)
                torch.testing.assert_close(found[method].scores[i], logits[i, 3].detach(), atol=1e-5, rtol=1e-4)


def test_a_learned_query_that_pools_is_the_last_step() -> None:
    torch.manual_seed(0)
    handle = tl.load("timm/vit_base_patch16_siglip_224", pretrained=False, img_size=64, depth=2, num_classes=5)
    for part in handle.module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    x, vit, entered = batch(handle), handle.module, []
    hook = vit.attn_pool.register_forward_hook(lambda module, arguments, output: entered.append(arguments[0]))
    logits, matrices = matrices_of(handle, x)
    hook.remove()
    pool, t = vit.attn_pool, entered[0]
    q = pool.q_norm(pool.q(pool.latent.expand(2, -1, -1)).view(2, 1, pool.num_heads, -1).transpose(1, 2))
    k, v = pool.kv(t).view(2, t.shape[1], 2, pool.num_heads, -1).permute(2, 0, 3, 1, 4)
    last = (q @ pool.k_norm(k).mT * pool.scale).softmax(-1)
    pooled = pool.proj((last @ v).transpose(1, 2).reshape(2, 1, -1))
    pooled = (pooled + pool.mlp(pool.norm(pooled)))[:, 0]
    again = vit.head(vit.fc_norm(pooled))
    torch.testing.assert_close(again, logits)
    *slopes, slope = torch.autograd.grad(again[:, 3].sum(), [*matrices, last])
    rolled = tl.explain(handle, x, target=3, method="attention_rollout").values
    related = tl.explain(handle, x, target=3, method="attention_relevance").values
    for i in range(2):
        expected = (last[i].mean(0) @ rollout([m[i] for m in matrices]))[0].view(4, 4).detach()
        torch.testing.assert_close(rolled[i], expected, atol=1e-7, rtol=1e-4)
        before = relevance([m[i] for m in matrices], [g[i] for g in slopes])
        expected = ((last[i] * slope[i]).clamp(min=0).mean(0) @ before)[0].view(4, 4).detach()
        torch.testing.assert_close(related[i], expected, atol=1e-9, rtol=1e-3)


def transformer() -> nn.Module:
    """A tiny one of torchvision's; its own head begins all zeros."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    vit = torchvision.models.VisionTransformer(**sizes, num_classes=5).eval()
    nn.init.normal_(vit.heads.head.weight)
    for block in vit.encoder.layers:
        nn.init.normal_(block.self_attention.in_proj_weight, std=0.4)
    return vit  # type: ignore[no-any-return]


def test_torchvision_s_transformer_and_the_weights_it_can_return() -> None:
    vit, x = transformer(), torch.randn(2, 3, 32, 32)
    t = torch.cat([vit.class_token.expand(2, -1, -1), vit._process_input(x)], 1) + vit.encoder.pos_embedding
    matrices: list[Tensor] = []
    for block in vit.encoder.layers:
        y = block.ln_1(t)
        matrices.append(block.self_attention(y, y, y, need_weights=True, average_attn_weights=False)[1].detach())
        t = block(t)
    found = tl.explain(tl.wrap(vit, input_size=(3, 32, 32)), x, target=0, method="attention_rollout")
    for i in range(2):
        expected = rollout([m[i] for m in matrices])[0, 1:].view(4, 4)
        torch.testing.assert_close(found.values[i], expected, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(found.scores, vit(x)[:, 0].detach(), atol=1e-5, rtol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_torchvision_s_transformer_and_timm_s_with_the_same_weights(method: str) -> None:
    vit, x = transformer(), torch.randn(2, 3, 32, 32)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 2, "embed_dim": 16, "mlp_ratio": 2}
    twin = timm.models.VisionTransformer(**sizes, num_classes=5).eval()
    own = vit.state_dict()
    first = {"cls_token": own.pop("class_token"), "pos_embed": own.pop("encoder.pos_embedding")}
    rest = [name for name in twin.state_dict() if name not in first]
    twin.load_state_dict({**first, **dict(zip(rest, own.values(), strict=True))})
    ours, theirs = (
        tl.explain(tl.wrap(one, input_size=(3, 32, 32)), x, target=1, method=method).values for one in (vit, twin)
    )
    assert ours.std() > 0
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm/swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, "windows"),
        ("torchvision/swin_t", {}, "windows"),
        ("torchvision/maxvit_t", {}, "was seen"),  # by einsum
        ("timm/xcit_nano_12_p16_224", {"depth": 1}, r"\[1, 4, 32, 32\]"),
        ("timm/pit_ti_224", {"depth": (1, 1, 1)}, r"\[1, 2, 730, 730\], \[1, 4, 197, 197\]"),
        ("timm/levit_128s", {}, r"\[1, 8, 49, 196\]"),
        ("timm/hiera_tiny_224", {}, "merged tokens"),
        ("timm/cait_xxs24_224", {"depth": 1}, "class attention"),
        ("timm/convit_tiny", {}, "mixed by other layers"),  # gated with positions, after the softmax
        ("timm/vit_dlittle_patch16_reg1_gap_256", {"depth": 2}, "side by side"),  # differential
        ("timm/vit_small_patch16_18x2_224", {"depth": 1}, "side by side"),  # parallel
        ("timm/mixer_s32_224", {}, "was seen"),
        ("timm/mobilevit_xxs", {}, r"\[4, 4, 256, 256\]"),
        ("timm/resnet18", {}, "was seen"),
    ],
)
def test_refuses(name: str, options: dict[str, Any], words: str) -> None:
    handle = tl.load(name, pretrained=False, **options)
    for method in METHODS:
        with pytest.raises(NotApplicable, match=f"{words}.*Use grad_cam or saliency"):
            tl.explain(handle, batch(handle)[:1], target=0, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_comes_close(method: str) -> None:
    handle = model("class token")
    x = batch(handle)
    full = tl.explain(handle, x, target=3, method=method).values
    half = tl.explain(handle, x, target=3, method=method, dtype=torch.bfloat16).values
    assert (half - full).abs().max() < 0.1 * full.max()
