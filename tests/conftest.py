"""One thread for all tests: tiny models gain nothing from more, and lose much on a busy machine."""

from __future__ import annotations

import torch

import torchloupe_adapters  # noqa: F401  (says where methods live, whichever tests run)

torch.set_num_threads(1)
