"""Quantus' metrics of maps. Under the LGPL, and installed by users alone.

What differs from calling Quantus oneself, in all of them:

- A feature is a pixel, all its channels, or a square of them; Quantus counts each channel's number as one. What stands
  in for it is a baseline of ours, zero unless given; Quantus' "black" is the image's own lowest number.
- The score is the value of any target, a class's probability where its logit was explained.
- Maps are neither scaled nor made positive, as Quantus does with most, and by the largest value of all images at once.
  Where a metric is of magnitudes or depends on a map's scale, its docstring says what is taken.
- Each image gets a number of its own: curves become their mean height.

Left out: `SensitivityN` correlates over images, not over subsets of pixels; of one size `faithfulness_correlation` is
what its paper defines. `Completeness` asks two floats to be the same; `completeness_gap` says how far they are apart.
`InputInvariance` is of models that begin with a convolution, yes or no; `input_invariance` is of any, and by how much.
`Consistency` compares the signs of a map's first five pixels. `IROF` fails on images of several channels, and needs
numpy's `trapz`, which numpy 2.4 has no longer. `Focus` needs mosaics of images of known classes.
"""

from __future__ import annotations

from torchloupe_adapters.quantus import faithfulness, maps, randomisation, robustness

__all__ = ["faithfulness", "maps", "randomisation", "robustness"]
