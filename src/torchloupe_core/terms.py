"""Penalties on activations that compare images, with each other or with a given one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.atoms import COSINE_FLOOR, NORM_EPSILON
from torchloupe_core.handle import Reading

__all__ = ["Alignment", "Caricature", "Diversity", "Nearness", "Term", "similarity", "unlikeness"]

REACH = 4  # how many neighbours on are compared in alignment
TINY = 1e-12  # under roots and fractions: an image that excites nothing resembles nothing


@dataclass(frozen=True)
class Term:
    """A penalty read from layers, times a weight. group: how many images in a row are compared with each other."""

    layers: tuple[str, ...]
    weight: float = 1.0
    group: int = 1

    def penalty(self, reading: Reading, reference: Mapping[str, Tensor]) -> Tensor:
        """Each image's share, `[N]`. reference: the layers' maps for images to compare with, where there are any."""
        shares = [
            torch.cat([self.share(maps) for maps in torch.split(reading.map(layer), self.group)])
            for layer in self.layers
        ]
        return self.weight * torch.stack(shares).sum(0)

    def share(self, maps: Tensor) -> Tensor:
        """Of each image of a group `[n, C, h, w]`, `[n]`."""
        raise NotImplementedError

    def only(self, start: int, stop: int) -> Term:
        """The term for some of the images; the same where it holds nothing of single images."""
        return self


@dataclass(frozen=True)
class Diversity(Term):
    """How alike the images of one target are in what excites the layer, so that they come to show different things."""

    def share(self, maps: Tensor) -> Tensor:
        return similarity(maps)


@dataclass(frozen=True)
class Alignment(Term):
    """How unlike neighbours are, position by position, so that the same things come to lie in the same places."""

    def share(self, maps: Tensor) -> Tensor:
        return unlikeness(maps)


@dataclass(frozen=True)
class Nearness(Term):
    """How far the layers' activations are from those of the image given, relative to these (Hamblin 2024).

    `mean((a - a0)^2) / mean(a0^2)`, with the same transforms at each step.
    """

    def penalty(self, reading: Reading, reference: Mapping[str, Tensor]) -> Tensor:
        shares = []
        for layer in self.layers:
            given = reference[layer]
            scale = given.square().mean((1, 2, 3)).clamp(min=TINY)
            shares.append((reading.map(layer) - given).square().mean((1, 2, 3)) / scale)
        return self.weight * torch.stack(shares).sum(0)


@dataclass(frozen=True)
class Caricature(Term):
    """The negative of how much the layers' activations are those of the image given, and more of them.

    The mean over positions of `dot * max(0.1, cosine) ** power`, as of a direction, which here is each position's own
    activation for the image given (Olah et al. 2018, The Building Blocks of Interpretability).
    """

    power: float = 1.0

    def penalty(self, reading: Reading, reference: Mapping[str, Tensor]) -> Tensor:
        return -self.weight * torch.stack([self._along(reading.map(one), reference[one]) for one in self.layers]).sum(0)

    def _along(self, maps: Tensor, given: Tensor) -> Tensor:
        dot = (maps * given).sum(1)  # [N, h, w]
        norms = (maps.square().sum(1) + NORM_EPSILON).sqrt() * (given.square().sum(1) + NORM_EPSILON).sqrt()
        return (dot * (dot / norms).clamp(min=COSINE_FLOOR) ** self.power).mean((1, 2))


def similarity(maps: Tensor) -> Tensor:
    """`[n]`: the sum of cosines between the Gram matrix of each image of `maps [n, C, h, w]` and those of the others.

    The mean is the diversity objective of Olah 2017: n - 1 where all are alike, 0 where no two share a channel.
    """
    products = _gram_products(maps.flatten(2))  # [n, n]
    norms = products.diagonal().clamp(min=TINY).sqrt()
    cosines = products / (norms[:, None] * norms)
    return cosines.sum(1) - cosines.diagonal()


def unlikeness(maps: Tensor) -> Tensor:
    """`[n]`: for each image of `maps [n, C, h, w]` the mean squared differences to the four that follow, by halves.

    The sum is the alignment objective of Lucid: `sum_d sum_i mean((a_i - a_{i+d})^2) / 2^d`, d from 1 to 4.
    """
    flat, total = maps.flatten(1), maps.new_zeros(len(maps))
    for distance in range(1, min(REACH, len(maps) - 1) + 1):
        apart = (flat[:-distance] - flat[distance:]).square().mean(1) / 2**distance
        total = total + torch.nn.functional.pad(apart, (0, distance))
    return total


def _gram_products(flat: Tensor) -> Tensor:
    """`[n, n]`: inner products of the Gram matrices of `flat [n, C, p]`, without writing these down if that is more.

    `<A A^T, B B^T> = |A^T B|^2`.
    """
    n, channels, places = flat.shape
    if n * places**2 < channels * (places + n):
        every = flat.transpose(1, 2).reshape(n * places, channels)
        return (every @ every.T).square().view(n, places, n, places).sum((1, 3))
    products: Tensor = _Products.apply(flat)
    return products


class _Products(torch.autograd.Function):
    """Inner products of the `F F^T`; these are symmetric, so each way back is one product where autograd takes two."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        grams = flat @ flat.transpose(1, 2)
        ctx.save_for_backward(flat, grams)
        return grams.flatten(1) @ grams.flatten(1).T

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        flat, grams = ctx.saved_tensors
        back = (2 * (given + given.T) @ grams.flatten(1)).view_as(grams)
        found: Tensor = back @ flat
        return found
