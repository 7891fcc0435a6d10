"""Penalties on activations that compare the images of a batch: diversity and alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchloupe_core.handle import Reading

__all__ = ["Alignment", "Diversity", "Term", "similarity", "unlikeness"]

REACH = 4  # how many neighbours on are compared in alignment
TINY = 1e-12  # under roots and fractions: an image that excites nothing resembles nothing


@dataclass(frozen=True)
class Term:
    """A penalty read from layers, times a weight. group: how many images in a row are compared with each other."""

    layers: tuple[str, ...]
    weight: float
    group: int

    def penalty(self, reading: Reading) -> Tensor:
        """Each image's share, `[N]`."""
        shares = [
            torch.cat([self.share(maps) for maps in torch.split(reading.map(layer), self.group)])
            for layer in self.layers
        ]
        return self.weight * torch.stack(shares).sum(0)

    def share(self, maps: Tensor) -> Tensor:
        """Of each image of a group `[n, C, h, w]`, `[n]`."""
        raise NotImplementedError


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
    grams = (flat @ flat.transpose(1, 2)).flatten(1)  # [n, C * C]
    return grams @ grams.T
