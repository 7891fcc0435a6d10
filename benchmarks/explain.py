"""What attribution costs beyond the passes it needs, and beside other libraries: ratios of times, on one core.

    python benchmarks/explain.py                  every row, about a quarter of an hour
    python benchmarks/explain.py cam saliency     the rows whose name begins so
    python benchmarks/explain.py against          other libraries, called as their own instructions say

Rollout reads attention matrices that the bare pass, with fused attention, never writes down.

Each row is the median of `ours / bare` over rounds in which both run once, so that a change of the machine's speed hits
both. F is one forward pass, FB a forward and backward pass to the input with frozen parameters. Memory is the
growth of the process's peak over what it held before, in a fresh process for each side. Weights are random: costs do
not depend on them. Other libraries get a model as it is loaded, with parameters that want gradients, and so do we
there; where theirs enlarges the maps to the images, so do we.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import Row, Rows, Work, asked, grown, memory, ratio, run
from networks import BATCH, CLASS, SIZE, backward, forward, network, noise
from torch import Tensor, nn

import torchloupe as tl

FAMILY = ("cam", "grad_cam", "grad_cam++", "xgrad_cam", "hires_cam", "layer_cam", "eigen_cam")
GRADIENTS = {"saliency": 1.1, "input_x_gradient": 1.1, "guided_backprop": 1.1, "guided_grad_cam": 1.2}
SEGMENTS = (torch.arange(SIZE) * 50 // SIZE).expand(SIZE, SIZE)  # vertical strips
SAMPLES = 128


def explaining(module: nn.Module, images: Tensor, method: str, **options: Any) -> Callable[[], tl.Attribution]:
    handle = tl.wrap(module)
    return lambda: tl.explain(handle, images, target=CLASS, method=method, progress=False, **options)


# -- beside bare passes -----------------------------------------------------------------------------------------------


def against_forward(method: str) -> Rows:
    module, images = network(), noise()
    yield ratio(explaining(module, images, method), lambda: forward(module, images), unit="F", goal=1.1)


def against_backward(method: str, goal: float) -> Rows:
    module, images = network(), noise()
    yield ratio(explaining(module, images, method), lambda: backward(module, images), unit="FB", goal=goal)


def tokens(method: str, bare: Callable[[nn.Module, Tensor], Tensor], **rest: Any) -> Rows:
    module, images = network("vit_b_16"), noise(4)
    yield ratio(explaining(module, images, method), lambda: bare(module, images), **rest)


def channels() -> Rows:
    module, image = network("resnet18"), noise(1)
    yield ratio(explaining(module, image, "ablation_cam"), lambda: forward(module, image), unit="F", goal=5)


def path(steps: int = 32) -> Rows:
    """Integrated gradients of one image against the bare loop at the same batch size."""
    module, image = network(), noise(1)

    def bare() -> None:
        for start in range(0, steps, BATCH):
            scale = torch.arange(start, min(start + BATCH, steps)).add(0.5).div(steps)
            backward(module, image * scale[:, None, None, None])

    ours = explaining(module, image, "integrated_gradients", steps=steps, batch_size=BATCH)
    yield ratio(ours, bare, unit="of the loop", goal=1.05)


def masked(method: str, goal: float, n: int = SAMPLES, **options: Any) -> Rows:
    """A perturbation method against n bare forward passes in the same batches."""
    module = network()
    ours = explaining(module, noise(1), method, batch_size=BATCH, **options)
    yield ratio(ours, forwards(module, n), unit="of its forwards", goal=goal)


def all_classes() -> Rows:
    """RISE with the outputs kept, and then the map of another class from them."""
    module = network()
    ours = explaining(module, noise(1), "rise", n_masks=SAMPLES, classes=True, batch_size=BATCH)
    yield ratio(lambda: ours().of(CLASS + 1), forwards(module, SAMPLES), unit="of its forwards", goal=1.05)


def forwards(module: nn.Module, n: int) -> Work:
    batch = noise(BATCH)

    def bare() -> None:
        for start in range(0, n, BATCH):
            forward(module, batch[: min(BATCH, n - start)])

    return bare


def precision(method: str) -> Rows:
    """The fast copy against the exact model, and how far its map lies from the exact one's."""
    module, images = network(), noise()
    fast = tl.wrap(module).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    works = (lambda: tl.explain(fast, images, target=CLASS, method=method), explaining(module, images, method))
    yield ratio(*works, unit="of float32", goal=0.5)
    quick, exact = (work().values.flatten(1) for work in works)
    apart = (quick - exact).norm(dim=1) / exact.norm(dim=1)
    yield Row("apart", apart.mean().item(), "of the exact map's norm")


# -- beside other libraries -------------------------------------------------------------------------------------------


def loaded(name: str = "resnet18") -> nn.Module:
    return network(name).requires_grad_(True)


def library(name: str) -> Rows:
    """pytorch-grad-cam, with its resizing; its masks of channels are for one image, 512 of them."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    kind = {"grad_cam": "GradCAM", "ablation_cam": "AblationCAM", "score_cam": "ScoreCAM"}[name]
    one, other = loaded(), loaded()
    images = noise(BATCH if name == "grad_cam" else 1)
    ours = explaining(one, images, name)

    def theirs() -> None:
        with getattr(pytorch_grad_cam, kind)(model=other, target_layers=[other.layer4[-1]]) as cam:
            cam(input_tensor=images, targets=[ClassifierOutputTarget(CLASS)] * len(images))

    yield ratio(lambda: ours().upsample(), theirs, rounds=5 if name == "grad_cam" else 1)


def torch_cam() -> Rows:
    from torchcam.methods import GradCAM

    one, other, images = loaded(), loaded(), noise()

    def theirs() -> None:
        with GradCAM(other, "layer4") as extractor:
            extractor(CLASS, other(images))

    yield ratio(explaining(one, images, "grad_cam"), theirs)


def captum_grad_cam() -> Rows:
    from captum.attr import LayerGradCam

    one, other, images = loaded(), loaded(), noise()
    theirs = LayerGradCam(other, other.layer4)
    yield ratio(explaining(one, images, "grad_cam"), lambda: theirs.attribute(images, target=CLASS))


def captum_path() -> Rows:
    from captum.attr import IntegratedGradients

    one, other, image = loaded(), loaded(), noise(1)
    theirs = IntegratedGradients(other)
    ours = explaining(one, image, "integrated_gradients", steps=32, batch_size=BATCH)
    bare = lambda: theirs.attribute(image, target=CLASS, n_steps=32, internal_batch_size=BATCH)  # noqa: E731
    yield ratio(ours, bare, rounds=3)


def lime_image() -> Rows:
    from lime.lime_image import LimeImageExplainer

    one, other, image = loaded(), loaded(), noise(1)
    picture = image[0].permute(1, 2, 0).double().numpy()

    def predict(pictures: Any) -> Any:
        return forward(other, torch.from_numpy(pictures).permute(0, 3, 1, 2).float()).softmax(1).numpy()

    def theirs() -> None:
        LimeImageExplainer(random_state=0).explain_instance(
            picture,
            predict,
            top_labels=1,
            hide_color=0,
            num_samples=SAMPLES,
            batch_size=BATCH,
            segmentation_fn=lambda _: SEGMENTS.numpy(),
        )

    ours = explaining(one, image, "lime", n_samples=SAMPLES, segments=SEGMENTS, batch_size=BATCH)
    yield ratio(ours, theirs, rounds=2)


def shap_partition() -> Rows:
    import shap

    one, other, image = loaded(), loaded(), noise(1)
    picture = image[0].permute(1, 2, 0).numpy()
    predict = lambda x: forward(other, torch.from_numpy(x).permute(0, 3, 1, 2).float()).numpy()  # noqa: E731
    explainer = shap.Explainer(predict, shap.maskers.Image(0, picture.shape))
    ours = explaining(one, image, "kernel_shap", n_samples=SAMPLES, segments=SEGMENTS, batch_size=BATCH)
    theirs = partial(explainer, picture[None], max_evals=SAMPLES, batch_size=BATCH, outputs=[CLASS], silent=True)
    yield ratio(ours, theirs, rounds=2)


# -- memory -----------------------------------------------------------------------------------------------------------


def captum_in_memory() -> int:
    from captum.attr import LayerGradCam

    module, images = loaded("resnet50"), noise(16)
    forward(module, images[:1])
    method = LayerGradCam(module, module.layer4)
    return grown(lambda: method.attribute(images, target=CLASS))


def own_in_memory(method: str) -> int:
    module, images = network(), noise(16)
    forward(module, images[:1])
    tl.wrap(module).trace((3, SIZE, SIZE))
    return grown(explaining(module, images, method, batch_size=16))


class Tiny(nn.Module):
    """So small that the masks, not the activations, would fill the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def rise_in_memory(n: int) -> int:
    handle = tl.wrap(Tiny(), input_size=(3, SIZE, SIZE))
    options = {"target": 1, "method": "rise", "batch_size": BATCH, "progress": False}
    tl.explain(handle, noise(1), n_masks=64, **options)
    return grown(lambda: tl.explain(handle, noise(1), n_masks=n, **options))


def growth(ours: str, bare: str, goal: float) -> Rows:
    yield memory(ours, bare, goal=goal)


APART = {
    **{name: partial(own_in_memory, name) for name in FAMILY},
    "captum": captum_in_memory,
    "rise 500": partial(rise_in_memory, 500),
    "rise 8000": partial(rise_in_memory, 8000),
}
STRIPS = {"n_samples": SAMPLES, "segments": SEGMENTS}
PARTS: dict[str, Callable[[], Rows]] = {
    **{name: partial(against_forward, name) for name in FAMILY},
    "attention_rollout (vit_b_16)": partial(tokens, "attention_rollout", forward, unit="F", goal=1.5),
    "attention_relevance (vit_b_16)": partial(tokens, "attention_relevance", backward, unit="FB", goal=1.1),
    "ablation_cam, 512 channels (resnet18)": channels,
    **{name: partial(against_backward, name, goal) for name, goal in GRADIENTS.items()},
    "integrated_gradients, 32 steps": path,
    "rise, one class": partial(masked, "rise", 1.01, n_masks=SAMPLES),
    "rise, all classes": all_classes,
    "lime": partial(masked, "lime", 1.03, **STRIPS),
    "kernel_shap": partial(masked, "kernel_shap", 1.03, **STRIPS),
    "occlusion": partial(masked, "occlusion", 1.03, n=257, window=28, stride=14),
    **{f"bfloat16 and channels_last, {name}": partial(precision, name) for name in ("grad_cam", "saliency")},
    "against pytorch-grad-cam: grad_cam, 8 images (resnet18)": partial(library, "grad_cam"),
    "against pytorch-grad-cam: ablation_cam (resnet18)": partial(library, "ablation_cam"),
    "against pytorch-grad-cam: score_cam (resnet18)": partial(library, "score_cam"),
    "against torch-cam: grad_cam, 8 images (resnet18)": torch_cam,
    "against captum: grad_cam, 8 images (resnet18)": captum_grad_cam,
    "against captum: integrated_gradients, 32 steps (resnet18)": captum_path,
    "against lime: lime of 128 samples (resnet18)": lime_image,
    "against shap: kernel_shap of 128 samples, its partition of as many (resnet18)": shap_partition,
    **{f"memory, {name} against captum's Grad-CAM": partial(growth, name, "captum", 0.5) for name in FAMILY},
    "memory, rise of 8000 masks against 500": partial(growth, "rise 8000", "rise 500", 1.1),
}

if __name__ == "__main__":
    run(PARTS, asked(__doc__), APART)
