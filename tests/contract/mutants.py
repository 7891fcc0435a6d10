"""Methods that each break one promise of the contract, with the check that must see it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchloupe_core.errors import NotApplicable
from torchloupe_core.methods.cam import layer_gradient
from torchloupe_core.query import Map, Query
from torchloupe_core.registry import Method

MUTANTS: list[Any] = []
LITTER: list[Callable[[], object]] = []  # what clears away the damage done to the process

Attribute = Callable[..., Map]


def mutant(
    check: str, words: str, *, specimen: str = "plain", guarded: bool = True, **tags: Any
) -> Callable[[Attribute], Attribute]:
    """Adds a method that `check` must fail with `words`; guarded=False takes the guard away."""

    def register(function: Attribute) -> Attribute:
        tags.setdefault("random", False)
        entry = Method("explain", f"mutant.{function.__name__}", "mutant", function, **tags)
        MUTANTS.append(pytest.param(entry, check, words, specimen, guarded, id=function.__name__))
        return function

    return register


def gradients(query: Query) -> Tensor:
    """What an honest method computes: input times gradient, `[N, C, H, W]`."""

    def product(part: Query) -> Tensor:
        inputs = part.inputs.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(part.score(inputs).sum(), inputs)
        return gradient * part.inputs

    return torch.cat(query.each(product))


def honest(query: Query) -> Map:
    return Map(gradients(query).sum(1))


def model(query: Query) -> nn.Module:
    return query.handle.module


# -- the result -------------------------------------------------------------------------------------------------------


@mutant("shapes", "values have shape")
def keeps_the_channel_dimension(query: Query) -> Map:
    return Map(gradients(query))


@mutant("shapes", "values have shape")
def forgets_an_image(query: Query) -> Map:
    return Map(gradients(query).sum(1)[1:])


@mutant("shapes", "values have shape")
def is_larger_than_the_image(query: Query) -> Map:
    return Map(gradients(query).sum(1).repeat(1, 2, 1))


@mutant("shapes", "standard_error is not")
def is_sure_of_the_batch_alone(query: Query) -> Map:
    values = gradients(query).sum(1)
    return Map(values, standard_error=values.abs().mean(0))


@mutant("shapes", "standard_error is not")
def is_more_than_sure(query: Query) -> Map:
    values = gradients(query).sum(1)
    return Map(values, standard_error=values)


@mutant("shapes", "per_channel has shape")
def gives_one_share_for_all_channels(query: Query) -> Map:
    return Map(gradients(query).sum(1), gradients(query).sum(1))


@mutant("finite", "NaN or infinity")
def divides_by_zero(query: Query) -> Map:
    values = gradients(query).sum(1)
    return Map(values / values.relu().amin((1, 2), keepdim=True))


@mutant("finite", "is zero everywhere")
def knows_the_first_image_only(query: Query) -> Map:
    values = gradients(query).sum(1)
    values[1:] = 0
    return Map(values)


@mutant("finite", "some values are negative", signed=False)
def claims_to_be_unsigned(query: Query) -> Map:
    return honest(query)


@mutant("seeds", "draws from a global random state")
def draws_from_torch(query: Query) -> Map:
    return Map(gradients(query).sum(1) + torch.rand(()))


@mutant("seeds", "draws from a global random state", random=True)
def draws_from_numpy(query: Query) -> Map:
    return Map(gradients(query).sum(1) * float(np.random.random()))


@mutant("seeds", "draws from a global random state", random=True)
def draws_from_python(query: Query) -> Map:
    return Map(gradients(query).sum(1) * random.random())


@mutant("seeds", "another seed gives the same result", random=True)
def ignores_the_seed(query: Query) -> Map:
    noise = torch.rand(query.inputs.shape[2:], generator=torch.Generator().manual_seed(7))
    return Map(gradients(query).sum(1) * noise)


@mutant("seeds", "tag it random=True")
def does_not_say_that_it_is_random(query: Query) -> Map:
    return Map(gradients(query).sum(1) * torch.rand(query.inputs.shape[2:], generator=query.generator()))


@mutant("batch_size", "batch_size=1 gives another result")
def depends_on_how_batches_are_cut(query: Query) -> Map:
    parts = query.each(lambda part: gradients(part).sum(1))
    return Map(torch.cat([part / part.abs().max() for part in parts]))


@mutant("images_alone", "image 0 alone instead of in its batch")
def depends_on_the_other_images(query: Query) -> Map:
    values = gradients(query).sum(1)
    return Map(values - values.mean(0) / 2)


@mutant("targets", "image 0, where image 1 has another target")
def mixes_the_targets(query: Query) -> Map:
    return Map(gradients(query).sum(1) * len(set(query.targets)))


@mutant("targets", "image 1 with its own target")
def asks_the_first_target_of_all(query: Query) -> Map:
    query.targets = [query.targets[0]] * len(query.targets)
    return honest(query)


@mutant("targets", "one target for the batch instead of the same listed")
def counts_the_questions(query: Query) -> Map:
    counts_the_questions.asked = getattr(counts_the_questions, "asked", 0) + 1  # type: ignore[attr-defined]
    return Map(gradients(query).sum(1) * counts_the_questions.asked)  # type: ignore[attr-defined]


@mutant("layers", "does not state the layer", needs=("layer",))
def does_not_say_which_layer(query: Query) -> Map:
    return Map(layer_gradient(query, query.resolved_layer())[1].sum(1))


@mutant("layers", "a layer that does not exist raises nothing", needs=("layer",))
def reads_the_layer_it_likes(query: Query) -> Map:
    layer = query.handle.features_at(query.shape)
    return Map(layer_gradient(query, layer)[1].sum(1), layer=layer)


# -- nothing left behind ----------------------------------------------------------------------------------------------


@mutant("leaves_nothing", r"forward hooks, a hook table, of module 'conv1' changed", guarded=False)
def leaves_a_hook(query: Query) -> Map:
    model(query).conv1.register_forward_hook(lambda *_: None)
    return honest(query)


@mutant("leaves_nothing", "backward hooks, a hook table", guarded=False)
def leaves_a_backward_hook(query: Query) -> Map:
    model(query).conv1.register_full_backward_hook(lambda *_: None)
    return honest(query)


@mutant("leaves_nothing", "hooks on parameter 'fc.weight' changed", guarded=False)
def leaves_a_hook_on_a_parameter(query: Query) -> Map:
    model(query).fc.weight.requires_grad_(True).register_hook(lambda gradient: None)
    return honest(query)


@mutant("leaves_nothing", "global forward hooks of all modules changed")
def leaves_a_global_hook(query: Query) -> Map:
    removable = nn.modules.module.register_module_forward_hook(lambda *_: None)
    LITTER.append(removable.remove)
    return honest(query)


@mutant("leaves_nothing", "attribute 'training' of module '.*' changed from True to False", guarded=False)
def switches_to_eval_for_good(query: Query) -> Map:
    model(query).eval()
    return honest(query)


@mutant("train_mode", "left behind after an answer of a model in train mode", guarded=False)
def forgets_train_mode(query: Query) -> Map:
    model(query).eval()
    return honest(query)


@mutant("leaves_nothing", r"requires_grad of parameter 'conv1.weight' changed from True to False", guarded=False)
def leaves_parameters_frozen(query: Query) -> Map:
    model(query).requires_grad_(False)
    return honest(query)


@mutant("leaves_nothing", r"\.grad of parameter 'conv1.weight' changed", guarded=False)
def accumulates_gradients(query: Query) -> Map:
    with torch.enable_grad():
        query.score(query.inputs).sum().backward()
    return honest(query)


@mutant("leaves_nothing", r"\.grad of parameter '.*' is another object", guarded=False)
def zeroes_gradients(query: Query) -> Map:
    model(query).zero_grad()
    return honest(query)


@mutant("leaves_nothing", "parameter 'fc.bias' changed")
def writes_to_a_parameter(query: Query) -> Map:
    model(query).fc.bias.add_(1)
    return honest(query)


@mutant("leaves_nothing", "parameter 'fc.bias' is another object", guarded=False)
def exchanges_a_parameter(query: Query) -> Map:
    layer = model(query).fc
    layer.bias = nn.Parameter(layer.bias.detach().clone())
    return honest(query)


@mutant("leaves_nothing", "buffer 'bn1.running_mean' changed", specimen="residual", guarded=False)
def changes_a_buffer(query: Query) -> Map:
    model(query).bn1.running_mean.mul_(0.9)
    return honest(query)


@mutant("leaves_nothing", "buffer 'bn1.running_mean' is another object", specimen="residual", guarded=False)
def exchanges_a_buffer(query: Query) -> Map:
    layer = model(query).bn1
    layer.running_mean = layer.running_mean.clone()
    return honest(query)


@mutant(
    "leaves_nothing",
    "attribute 'activations' of module '' is new|attribute 'activations' of module .* is new",
    guarded=False,
)
def stores_on_the_module(query: Query) -> Map:
    model(query).activations = [query.inputs]
    return honest(query)


@mutant("leaves_nothing", "attribute '_modules' of module .* changed", guarded=False)
def exchanges_a_module(query: Query) -> Map:
    model(query).relu1 = nn.Softplus()
    return honest(query)


class OtherReLU(nn.ReLU):
    pass


@mutant("leaves_nothing", "the class of module 'relu1' is another object", guarded=False)
def exchanges_a_class(query: Query) -> Map:
    model(query).relu1.__class__ = OtherReLU
    return honest(query)


@mutant("leaves_nothing", "torch's random state changed", guarded=False)
def seeds_torch(query: Query) -> Map:
    torch.manual_seed(query.seed)
    return honest(query)


@mutant("leaves_nothing", "numpy's random state changed", guarded=False)
def seeds_numpy(query: Query) -> Map:
    np.random.seed(query.seed)
    return honest(query)


@mutant("leaves_nothing", "Python's random state changed", guarded=False)
def seeds_python(query: Query) -> Map:
    random.seed(query.seed)
    return honest(query)


@mutant("leaves_nothing", "grad mode changed from True to False", guarded=False)
def switches_gradients_off(query: Query) -> Map:
    values = honest(query)
    torch.set_grad_enabled(False)
    LITTER.append(lambda: torch.set_grad_enabled(True))
    return values


@mutant("leaves_nothing", "cudnn's flags changed")
def changes_cudnn(query: Query) -> Map:
    before = torch.backends.cudnn.benchmark
    LITTER.append(lambda: setattr(torch.backends.cudnn, "benchmark", before))
    torch.backends.cudnn.benchmark = not before
    return honest(query)


@mutant("errors", "was swallowed")
def swallows_errors(query: Query) -> Map:
    try:
        return honest(query)
    except RuntimeError:
        return Map(torch.ones(len(query.inputs), *query.size))


@mutant("errors", "came out as ValueError")
def renames_errors(query: Query) -> Map:
    try:
        return honest(query)
    except RuntimeError as error:
        raise ValueError("it failed") from error


@mutant("interrupts", "was swallowed")
def swallows_everything(query: Query) -> Map:
    try:
        return honest(query)
    except BaseException:
        return Map(torch.ones(len(query.inputs), *query.size))


def _hooked_without_finally(query: Query) -> Map:
    handle = model(query).conv1.register_forward_hook(lambda *_: None)
    values = honest(query)
    handle.remove()
    return values


@mutant("errors", "left behind after an exception inside the model.*forward hooks", guarded=False)
def cleans_up_on_success_only(query: Query) -> Map:
    return _hooked_without_finally(query)


@mutant("interrupts", "left behind after Ctrl-C inside the model.*forward hooks", guarded=False)
def cleans_up_after_exceptions_only(query: Query) -> Map:
    handle = model(query).conv1.register_forward_hook(lambda *_: None)
    try:
        return honest(query)
    except Exception:
        handle.remove()
        raise
    finally:
        import sys

        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            handle.remove()


@mutant("errors", "the same question after an exception inside the model")
def remembers_failures(query: Query) -> Map:
    try:
        return Map(gradients(query).sum(1) * getattr(query.handle, "_scale", 1.0))
    except RuntimeError:
        query.handle._scale = 2.0  # type: ignore[attr-defined]
        raise


# -- callers and models in any state ----------------------------------------------------------------------------------


@mutant("callers", "a caller inside torch.no_grad", guarded=False)
def trusts_the_callers_grad_mode(query: Query) -> Map:
    inputs = query.inputs.detach().requires_grad_(True)
    with query.handle.watch(through=True) as watch:
        (gradient,) = torch.autograd.grad(watch(inputs)[:, 0].sum(), inputs)
    return Map(gradient.sum(1))


@mutant("frozen", "a frozen model makes it fail", guarded=False)
def differentiates_parameters(query: Query) -> Map:
    values = honest(query)
    with torch.enable_grad():
        torch.autograd.grad(query.score(query.inputs).sum(), model(query).fc.weight)
    return values


@mutant("train_mode", "a model in train mode gives another result", specimen="residual", guarded=False)
def trusts_the_train_flags(query: Query) -> Map:
    return honest(query)


@mutant("double", "a float64 model makes it fail")
def insists_on_float32(query: Query) -> Map:
    return Map(gradients(query).sum(1) @ torch.eye(query.size[1]))


# -- refusals ---------------------------------------------------------------------------------------------------------


@mutant("refusals", "it must refuse this model, which lacks relu: there is no", specimen="depthwise", needs=("relu",))
def claims_relu(query: Query) -> Map:
    return honest(query)


@mutant("refusals", "some rectifications are functions", specimen="mixed", needs=("relu",))
def claims_relu_modules(query: Query) -> Map:
    return honest(query)


@mutant("refusals", "lacks pooled_linear: more follows", specimen="concat", needs=("pooled_linear",))
def claims_pooling(query: Query) -> Map:
    return honest(query)


@mutant("refusals", "lacks layer: no spatial layer", specimen="flat", needs=("layer",))
def claims_a_layer(query: Query) -> Map:
    return honest(query)


@mutant("refusals", "refuses a model that has all it needs", needs=("relu",))
def refuses_everything(query: Query) -> Map:
    raise NotApplicable("not this one; use saliency")


@mutant("refusals", "names nothing that would work", specimen="depthwise", needs=("relu",))
def refuses_without_a_hint(query: Query) -> Map:
    raise NotApplicable("not this one")


@mutant("leaves_nothing", "left behind after a refusal", specimen="depthwise", needs=("relu",), guarded=False)
def leaves_eval_mode_when_it_refuses(query: Query) -> Map:
    model(query).eval()
    raise NotApplicable("not this one; use saliency")
