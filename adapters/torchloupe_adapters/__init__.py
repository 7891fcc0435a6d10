"""One file or folder per ecosystem, named after it: the only places that import those ecosystems.

The tables below say where built-in methods and model sources ("load", "recognise") live; a module is imported on first
use.
"""

from __future__ import annotations

from torchloupe_core import registry

__all__ = ["METHODS", "SHORT_NAMES"]

_ATTENTION = "torchloupe_core.methods.attention"
_CAM = "torchloupe_core.methods.cam"
_CAM_MASKS = "torchloupe_core.methods.cam_masks"
_INFLUENCE = "torchloupe_core.methods.influence.functions"
_LAST_LAYER = "torchloupe_core.methods.influence.last_layer"
_CAPTUM = (
    "deconvolution",
    "deep_lift",
    "feature_ablation",
    "gradient_shap",
    "guided_backprop",
    "input_x_gradient",
    "integrated_gradients",
    "kernel_shap",
    "lime",
    "lrp",
    "occlusion",
    "saliency",
    "smooth_grad",
    "var_grad",
)

_METRICS = {
    "complexity": ("complexity", "sparsity"),
    "faithfulness": ("average_drop", "average_increase", "deletion", "insertion", "road"),
    "localised": ("average_precision", "corloc", "energy_pointing", "iou", "pointing", "segmentation"),
    "sanity": ("completeness_gap", "input_invariance", "randomisation", "randomisation_rise", "seed_stability"),
}

_GRAD_CAM = (
    "ablation_cam",
    "eigen_cam",
    "eigen_grad_cam",
    "fem",
    "finer_cam",
    "grad_cam",
    "grad_cam++",
    "grad_cam_elementwise",
    "hires_cam",
    "kpca_cam",
    "layer_cam",
    "random_cam",
    "score_cam",
    "seg_eigen_cam",
    "shapley_cam",
    "xgrad_cam",
)

_TORCHCAM = (
    "cam",
    "finer_cam",
    "grad_cam",
    "grad_cam++",
    "is_cam",
    "layer_cam",
    "score_cam",
    "smooth_grad_cam++",
    "ss_cam",
    "xgrad_cam",
)

_CAPTUM_METRICS = ("infidelity", "max_sensitivity")

_QUANTUS = (
    "attribution_localisation",
    "auc",
    "avg_sensitivity",
    "complexity",
    "effective_complexity",
    "efficient_mprt",
    "faithfulness_correlation",
    "faithfulness_estimate",
    "infidelity",
    "local_lipschitz_estimate",
    "max_sensitivity",
    "monotonicity",
    "monotonicity_correlation",
    "mprt",
    "non_sensitivity",
    "pixel_flipping",
    "pointing_game",
    "random_logit",
    "region_perturbation",
    "relative_input_stability",
    "relative_output_stability",
    "relevance_mass_accuracy",
    "relevance_rank_accuracy",
    "road",
    "selectivity",
    "sparseness",
    "sufficiency",
    "top_k_intersection",
)

_ZENNIT = (
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
)

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
    ("explain", "sobol"): "torchloupe_core.methods.sobol",
    ("explain", "guided_grad_cam"): "torchloupe_core.methods.guided",
    **{("explain", f"captum.{name}"): "torchloupe_adapters.captum" for name in (*_CAPTUM, "grad_cam")},
    **{("explain", f"grad_cam.{name}"): "torchloupe_adapters.grad_cam" for name in _GRAD_CAM},
    **{("explain", f"torchcam.{name}"): "torchloupe_adapters.torchcam" for name in _TORCHCAM},
    **{("explain", f"zennit.{name}"): "torchloupe_adapters.zennit" for name in _ZENNIT},
    ("explain", "lime.image"): "torchloupe_adapters.lime",
    ("explain", "shap.partition"): "torchloupe_adapters.shap",
    ("engine", "ray.data"): "torchloupe_adapters.ray",
    ("features", "lancedb.table"): "torchloupe_adapters.lancedb",
    ("visualize", "lucent"): "torchloupe_adapters.lucent",
    ("visualize", "native"): "torchloupe_core.methods.optimize",
    ("dream", "deepdream"): "torchloupe_core.methods.dream",
    **{("fool", name): "torchloupe_core.methods.fooling" for name in ("fgsm", "pgd")},
    **{("influence", name): _INFLUENCE for name in ("arnoldi", "cg", "exact", "gradient_dot", "lissa", "self")},
    **{("influence", name): "torchloupe_core.methods.influence.kfac" for name in ("ekfac", "kfac")},
    **{("influence", name): "torchloupe_core.methods.influence.checkpoints" for name in ("tracin", "trak")},
    **{
        ("influence", f"captum.{name}"): "torchloupe_adapters.captum.influence"
        for name in ("arnoldi", "naive", "tracin", "tracin_fast")
    },
    **{
        ("influence", f"dattri.{name}"): "torchloupe_adapters.dattri"
        for name in ("arnoldi", "cg", "datainf", "explicit", "tracin", "trak")
    },
    ("influence", "kronfluence.ekfac"): "torchloupe_adapters.kronfluence",
    **{("influence", name): _LAST_LAYER for name in ("feature_cosine", "representer")},
    **{("compare", name): f"torchloupe_core.metrics.{home}" for home, names in _METRICS.items() for name in names},
    **{("compare", f"captum.{name}"): "torchloupe_adapters.captum.metrics" for name in _CAPTUM_METRICS},
    **{("compare", f"quantus.{name}"): "torchloupe_adapters.quantus" for name in _QUANTUS},
    ("segment", "opencv.grabcut"): "torchloupe_adapters.opencv",
    ("table", "pandas.frame"): "torchloupe_adapters.pandas",
    ("embed", "sklearn.pca"): "torchloupe_adapters.sklearn",
    ("embed", "sklearn.tsne"): "torchloupe_adapters.sklearn",
    ("embed", "umap.umap"): "torchloupe_adapters.umap",
    ("embed", "opentsne.tsne"): "torchloupe_adapters.opentsne",
    ("assign", "scipy.linear_sum_assignment"): "torchloupe_adapters.scipy",
    ("render", "jinja2.render"): "torchloupe_adapters.jinja2",
    **{
        (verb, source): f"torchloupe_adapters.{source}"
        for verb in ("load", "recognise")
        for source in ("demo", "timm", "torchvision")
    },
}

SHORT_NAMES = {
    "explain": {
        **{name: f"captum.{name}" for name in _CAPTUM},
        **{name: f"torchcam.{name}" for name in _TORCHCAM if ("explain", name) not in METHODS},
        **{name: f"grad_cam.{name}" for name in _GRAD_CAM if ("explain", name) not in METHODS},
        **{name: f"zennit.{name}" for name in _ZENNIT},
    },
    "compare": {name: f"captum.{name}" for name in _CAPTUM_METRICS},
    "engine": {"ray": "ray.data"},
    "embed": {"pca": "sklearn.pca", "tsne": "sklearn.tsne", "umap": "umap.umap"},
}

registry.offer(METHODS)
registry.synonym("explain", {"lime.image": "lime"})
for _verb, _table in SHORT_NAMES.items():
    registry.alias(_verb, _table)
