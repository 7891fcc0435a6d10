"""Captum: gradient, relevance, perturbation and surrogate attribution, asked in our target language.

Captum sees one function, "the target's value for these inputs", so every target of ours works with every method of
its. Which image an input belongs to travels as an extra argument, because Captum repeats and reorders inputs.
"""

from torchloupe_adapters.captum import deep_lift, gradients, layers, lrp, perturbation, relu, surrogate

__all__ = ["deep_lift", "gradients", "layers", "lrp", "perturbation", "relu", "surrogate"]
