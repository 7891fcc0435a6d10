"""What a method may need of a model, as data. `Method.needs` uses these words; `torchloupe methods` prints them."""

from __future__ import annotations

__all__ = ["NEEDS"]

NEEDS = {
    "attention": "attention over all tokens in one block after another, and nothing else between tokens",
    "checkpoints": "states of the model's training, given with checkpoints=",
    "gradient": "the target is differentiable with respect to the input or a layer",
    "layer": "a spatial layer, named with layer= or the last that reaches the output",
    "linear_head": "a linear layer at the end, whose outputs are the logits",
    "nchw": "a layer laid out [N, C, h, w]",
    "pooled_linear": "global average pooling, then one linear layer; the target is made of logits",
    "rectified": "at least one ReLU, module or function",
    "relu": "torch.nn.ReLU modules for every rectification",
    "rules": "a rule of the method's for every layer, and nothing nonlinear between layers",
    "segments": "superpixels, from scikit-image or given with segments=",
}
