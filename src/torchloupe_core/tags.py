"""What a method may need of a model, as data. `Method.needs` uses these words; `torchloupe methods` prints them."""

from __future__ import annotations

__all__ = ["NEEDS"]

NEEDS = {
    "attention": "attention over all tokens in one block after another, and nothing else between tokens",
    "gradient": "the target is differentiable with respect to the input or a layer",
    "layer": "a spatial layer, named with layer= or the last that reaches the output",
    "pooled_linear": "global average pooling, then one linear layer; the target is made of logits",
    "relu": "torch.nn.ReLU modules for every rectification",
    "segments": "superpixels, from scikit-image or given with segments=",
}
