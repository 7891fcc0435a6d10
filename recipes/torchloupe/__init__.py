"""Look inside any vision model: one interface, one call per question.

    import torchloupe as tl

    model = tl.load("demo")
    scenes = tl.demo_scenes(4)
    tl.explain(model, scenes.images, method="grad_cam").plot()

Names are loaded on first use, so `import torchloupe` costs nothing and imports no ecosystem.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchloupe import checks, errors
    from torchloupe._accentuate import accentuate, caricature
    from torchloupe._activations import activations
    from torchloupe._audit import audit
    from torchloupe._clean import clean
    from torchloupe._compare import compare
    from torchloupe._descents import descents
    from torchloupe._dream import dream
    from torchloupe._embed import embed
    from torchloupe._examples import examples
    from torchloupe._explain import explain
    from torchloupe._facets import facets
    from torchloupe._features import features
    from torchloupe._fool import fool
    from torchloupe._influence import influence
    from torchloupe._interactions import class_prototype, directions, interactions, spectrum
    from torchloupe._invert import invert
    from torchloupe._models import load, wrap
    from torchloupe._neighbors import neighbors
    from torchloupe._receptive import receptive_field
    from torchloupe._recommend import recommend
    from torchloupe._scan import scan
    from torchloupe._style import stylize, texture
    from torchloupe._tables import methods
    from torchloupe._train_stylizer import train_stylizer
    from torchloupe._validate_influence import validate_influence
    from torchloupe._visualize import visualize
    from torchloupe._weights import weights
    from torchloupe_adapters.demo.scenes import demo_scenes
    from torchloupe_core import parametrizations, regularizers, transforms
    from torchloupe_core.activations import Activations
    from torchloupe_core.audit import Audit
    from torchloupe_core.comparison import Comparison
    from torchloupe_core.embedding import Embedding
    from torchloupe_core.evengrid import Grid
    from torchloupe_core.examples import Examples
    from torchloupe_core.features import FeatureSet
    from torchloupe_core.filters import Filters
    from torchloupe_core.fooled import Fooled
    from torchloupe_core.gallery import Gallery
    from torchloupe_core.handle import Handle
    from torchloupe_core.influence import Influence
    from torchloupe_core.layout import Layout
    from torchloupe_core.maco import MaCo
    from torchloupe_core.neighbors import Neighbors
    from torchloupe_core.prior import Prior
    from torchloupe_core.receptive import ReceptiveField
    from torchloupe_core.results import Attribution
    from torchloupe_core.results import open_result as open
    from torchloupe_core.scans import Scan
    from torchloupe_core.spec import Spec
    from torchloupe_core.stylizer import Stylizer
    from torchloupe_core.suspects import Suspects
    from torchloupe_core.targets import (
        Target,
        box_score,
        channel,
        direction,
        interpolate,
        layer,
        logit,
        margin,
        neuron,
        prob,
        region,
        sigmoid,
        similarity,
    )
    from torchloupe_core.targets import parse as target
    from torchloupe_core.validation import Validation
    from torchloupe_core.visualization import Visualization

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Attribution",
    "Audit",
    "Comparison",
    "Embedding",
    "Examples",
    "FeatureSet",
    "Filters",
    "Fooled",
    "Gallery",
    "Grid",
    "Handle",
    "Influence",
    "Layout",
    "MaCo",
    "Neighbors",
    "Prior",
    "ReceptiveField",
    "Scan",
    "Spec",
    "Stylizer",
    "Suspects",
    "Target",
    "Validation",
    "Visualization",
    "accentuate",
    "activations",
    "audit",
    "box_score",
    "caricature",
    "channel",
    "checks",
    "class_prototype",
    "clean",
    "compare",
    "demo_scenes",
    "descents",
    "direction",
    "directions",
    "dream",
    "embed",
    "errors",
    "examples",
    "explain",
    "facets",
    "features",
    "fool",
    "influence",
    "interactions",
    "interpolate",
    "invert",
    "layer",
    "load",
    "logit",
    "margin",
    "methods",
    "neighbors",
    "neuron",
    "open",
    "parametrizations",
    "prob",
    "receptive_field",
    "recommend",
    "region",
    "regularizers",
    "scan",
    "sigmoid",
    "similarity",
    "spectrum",
    "stylize",
    "target",
    "texture",
    "train_stylizer",
    "transforms",
    "validate_influence",
    "visualize",
    "weights",
    "wrap",
]

_TARGETS = "torchloupe_core.targets"
_HOMES = {
    "Activations": "torchloupe_core.activations",
    "Attribution": "torchloupe_core.results",
    "Embedding": "torchloupe_core.embedding",
    "Audit": "torchloupe_core.audit",
    "Comparison": "torchloupe_core.comparison",
    "Examples": "torchloupe_core.examples",
    "FeatureSet": "torchloupe_core.features",
    "Filters": "torchloupe_core.filters",
    "Fooled": "torchloupe_core.fooled",
    "Grid": "torchloupe_core.evengrid",
    "Handle": "torchloupe_core.handle",
    "Influence": "torchloupe_core.influence",
    "Layout": "torchloupe_core.layout",
    "Neighbors": "torchloupe_core.neighbors",
    "Gallery": "torchloupe_core.gallery",
    "MaCo": "torchloupe_core.maco",
    "Prior": "torchloupe_core.prior",
    "ReceptiveField": "torchloupe_core.receptive",
    "Scan": "torchloupe_core.scans",
    "Spec": "torchloupe_core.spec",
    "Suspects": "torchloupe_core.suspects",
    "Validation": "torchloupe_core.validation",
    "Stylizer": "torchloupe_core.stylizer",
    "Visualization": "torchloupe_core.visualization",
    "accentuate": "torchloupe._accentuate",
    "activations": "torchloupe._activations",
    "caricature": "torchloupe._accentuate",
    "checks": "torchloupe.checks:",
    "class_prototype": "torchloupe._interactions",
    "clean": "torchloupe._clean",
    "demo_scenes": "torchloupe_adapters.demo.scenes",
    "embed": "torchloupe._embed",
    "descents": "torchloupe._descents",
    "directions": "torchloupe._interactions",
    "dream": "torchloupe._dream",
    "errors": "torchloupe.errors:",
    "audit": "torchloupe._audit",
    "compare": "torchloupe._compare",
    "recommend": "torchloupe._recommend",
    "examples": "torchloupe._examples",
    "explain": "torchloupe._explain",
    "features": "torchloupe._features",
    "facets": "torchloupe._facets",
    "fool": "torchloupe._fool",
    "interactions": "torchloupe._interactions",
    "influence": "torchloupe._influence",
    "invert": "torchloupe._invert",
    "load": "torchloupe._models",
    "methods": "torchloupe._tables",
    "neighbors": "torchloupe._neighbors",
    "open": "torchloupe_core.results:open_result",
    "parametrizations": "torchloupe_core.parametrizations:",
    "receptive_field": "torchloupe._receptive",
    "scan": "torchloupe._scan",
    "regularizers": "torchloupe_core.regularizers:",
    "spectrum": "torchloupe._interactions",
    "stylize": "torchloupe._style",
    "target": f"{_TARGETS}:parse",
    "texture": "torchloupe._style",
    "train_stylizer": "torchloupe._train_stylizer",
    "transforms": "torchloupe_core.transforms:",
    "validate_influence": "torchloupe._validate_influence",
    "visualize": "torchloupe._visualize",
    "weights": "torchloupe._weights",
    "wrap": "torchloupe._models",
    **dict.fromkeys(("Target", "channel", "direction", "interpolate", "layer", "neuron"), _TARGETS),
    **dict.fromkeys(("box_score", "logit", "margin", "prob", "region", "sigmoid", "similarity"), _TARGETS),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchloupe' has no attribute {name!r}")
    home, colon, inside = _HOMES[name].partition(":")
    importlib.import_module("torchloupe_adapters")  # says where methods live: a result opened here can be segmented
    module = importlib.import_module(home)
    found = module if colon and not inside else getattr(module, inside or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
