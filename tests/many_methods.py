"""A comparison of as many methods and metrics as a user may well ask for, made up."""

from __future__ import annotations

import torch

from torchloupe_core.comparison import Comparison

METHODS = (
    "cam",
    "grad_cam",
    "torchcam.smooth_grad_cam++",
    "grad_cam.grad_cam_elementwise",
    "captum.integrated_gradients",
    "captum.guided_backprop",
    "captum.deep_lift_shap",
    "rise",
    "zennit.epsilon_plus_flat",
    "lime.image",
    "shap.partition",
    "sobol",
)
FLOORS = ("random", "centre", "edges")
METRICS = (
    "insertion",
    "deletion",
    "average_drop",
    "infidelity",
    "max_sensitivity",
    "pointing",
    "iou",
    "sparsity",
    "randomisation",
)
M, K, N, S = len(METHODS) + len(FLOORS), len(METRICS), 20, 6


def comparison() -> Comparison:
    """Each method is better than the one before it by insertion, and worse by deletion; the images are green."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(M, K, N, generator=generator)
    rising = torch.arange(M)[:, None] / M
    values[:, 0] = values[:, 1] = rising + 0.05 * values[:, 0]
    values[7, 4] = values[-3:, -1] = torch.nan
    agreement = torch.eye(M).expand(3, M, M).clone()
    agreement[1, 0, 1] = agreement[1, 1, 0] = -0.25
    maps = torch.rand(M, S, 24, 32, generator=generator)
    maps[::2] -= 0.5
    seconds = torch.cat([torch.logspace(-3, 0, len(METHODS)), torch.zeros(3)])
    return Comparison(
        method="compare",
        backend="native",
        seed=0,
        seconds=0.0,
        forwards=0,
        versions={"torchloupe": "0"},
        options={},
        methods=METHODS + FLOORS,
        baselines=FLOORS,
        metrics=METRICS,
        better=("higher", *["lower"] * 4, *["higher"] * 3, "lower"),
        values=values,
        cost_seconds=seconds,
        cost_forwards=torch.ones(M),
        cost_backwards=torch.zeros(M),
        memory=torch.full((M,), torch.nan),
        layers=("layer4",) * 4 + ("",) * (M - 4),
        agreement=agreement,
        maps=maps,
        images=torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(S, 3, 24, 32),
        targets=tuple(f"logit:a rather long name of <class> {n}" for n in range(N)),
        refused={"captum.lrp": "a layer has no rule", "rise, max_sensitivity": "its maps are random"},
        notes={"cam": ["the same maps as grad_cam up to scale"], "captum.guided_backprop": ["hardly looks", "alike"]},
        skipped={"broken.jpg": "cannot identify image file"},
        recommended="cam",
    )
