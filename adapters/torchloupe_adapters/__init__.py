"""One file per ecosystem, named after it: the only places that import those ecosystems.

The tables below say where built-in methods and model sources ("load", "recognise") live; a module is imported on first
use.
"""

from __future__ import annotations

from torchloupe_core import registry

__all__ = ["METHODS", "SHORT_NAMES"]

_ATTENTION = "torchloupe_core.methods.attention"
_CAM = "torchloupe_core.methods.cam"
_CAM_MASKS = "torchloupe_core.methods.cam_masks"
_CAPTUM = "torchloupe_adapters.captum"

METHODS = {
    **{
        ("explain", name): _CAM
        for name in ("cam", "eigen_cam", "grad_cam", "grad_cam++", "hires_cam", "layer_cam", "xgrad_cam")
    },
    ("explain", "ablation_cam"): _CAM_MASKS,
    ("explain", "attention_relevance"): _ATTENTION,
    ("explain", "attention_rollout"): _ATTENTION,
    ("explain", "score_cam"): _CAM_MASKS,
    ("explain", "rise"): "torchloupe_core.methods.rise",
    ("explain", "captum.saliency"): _CAPTUM,
    ("explain", "captum.input_x_gradient"): _CAPTUM,
    ("explain", "captum.integrated_gradients"): _CAPTUM,
    ("explain", "captum.guided_backprop"): _CAPTUM,
    ("explain", "captum.occlusion"): _CAPTUM,
    ("explain", "captum.lime"): _CAPTUM,
    ("segment", "opencv.grabcut"): "torchloupe_adapters.opencv",
    **{
        (verb, source): f"torchloupe_adapters.{source}"
        for verb in ("load", "recognise")
        for source in ("demo", "timm", "torchvision")
    },
}

SHORT_NAMES = {
    "explain": {
        name: f"captum.{name}"
        for name in ("saliency", "input_x_gradient", "integrated_gradients", "guided_backprop", "occlusion", "lime")
    }
}

registry.offer(METHODS)
for _verb, _table in SHORT_NAMES.items():
    registry.alias(_verb, _table)
