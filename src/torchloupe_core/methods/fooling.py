"""Small changes that make a model see something else, by gradient, and what is left of them in 8 bits.

An attack maximises a target, as `prob:fish` or `-prob:tree`, among images near to the given one. Only the direction of
the gradient counts, so that these are the steps along the cross-entropy: its gradient is that of the probability over
the probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchloupe_core.atoms import Output
from torchloupe_core.descent import Norm, steepest
from torchloupe_core.errors import BadInput, BadTarget, NotApplicable
from torchloupe_core.handle import Handle
from torchloupe_core.images import Pixels
from torchloupe_core.making import commissioned, made_of
from torchloupe_core.methods.optimize import native
from torchloupe_core.pixels import Near
from torchloupe_core.registry import method
from torchloupe_core.targets import Target, TargetLike, as_targets, margin, prob
from torchloupe_core.task import Made

__all__ = ["LEVELS", "Attack", "aims_of", "fgsm", "goal", "lead", "pgd", "rounded", "seen"]

LEVELS = 255
SURE, FAINT = 1e-6, 1e-20  # what a probability in single precision still has a gradient of
STRIDE = 2.5  # the steps of PGD together are that many times eps long (Madry et al. 2018, section 5)


@dataclass(frozen=True)
class Attack:
    """Images `[N, C, H, W]` in [0, 1] to change by at most eps, and the target to maximise for each."""

    handle: Handle
    images: Tensor
    goals: Sequence[Target]
    norm: Norm
    eps: float
    seed: int = 0
    batch_size: int | None = None
    interruptible: bool = False
    report: Callable[..., None] = lambda done, total, note="": None

    def run(self, *, steps: int, step_size: float, random: bool = False, first: int = 0) -> Made:
        """The images after steps along the gradient, each brought back into the ball."""
        options: dict[str, Any] = {"seed": self.seed, "interruptible": self.interruptible, "report": self.report}
        task = commissioned(
            self.handle,
            self.goals,
            init=Pixels(self.images),
            parametrization=Near(self.eps, self.norm, random),
            transforms="none",
            read="post",
            steps=steps,
            lr=step_size,
            optimizer=steepest(self.norm),
            first=first,
            **options,
        )
        return made_of(task, native, self.batch_size)


@method(
    "fool",
    "fgsm",
    needs=("gradient",),
    cost="1 forward + 1 backward",
    paper="Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples",
)
def fgsm(attack: Attack) -> list[Made]:
    """One step as far as the change may go: under L-infinity every number by eps, along the gradient's sign."""
    return [attack.run(steps=1, step_size=attack.eps)]


@method(
    "fool",
    "pgd",
    needs=("gradient",),
    cost="(1 + restarts) x steps (20) x (forward + backward)",
    paper="Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks",
    random=True,
)
def pgd(attack: Attack, *, steps: int = 20, step_size: float | None = None, restarts: int = 0) -> list[Made]:
    """Projected gradient descent from the image itself, and from `restarts` random places near it.

    step_size: of one step, in units of eps' norm; 2.5 eps / steps unless given.
    """
    size = STRIDE * attack.eps / steps if step_size is None and steps > 0 else step_size or 0.0
    found = [attack.run(steps=steps, step_size=size)]
    for start in range(restarts):
        if found[-1].interrupted:
            break
        found.append(attack.run(steps=steps, step_size=size, random=True, first=start * len(attack.images)))
    return found


def rounded(images: Tensor, given: Tensor, norm: str, eps: float) -> Tensor:
    """Images as multiples of 1/255, no further from those given, which are such, than eps; `[N, C, H, W]` double.

    Under L-infinity a number goes to the nearest level within eps. Under L2 all go to the nearest level, and then, of
    those that were rounded up, as many as it takes, first the most doubtful, one level back.
    """
    start, moved = (given.double() * LEVELS).round(), (images.double() - given.double()) * LEVELS
    whole = moved.round()
    if norm == "linf":
        most = int(eps * LEVELS + 1e-6)
        return ((start + whole.clamp(-most, most)).clamp(0, LEVELS)) / LEVELS
    whole = (start + whole).clamp(0, LEVELS) - start
    flat, exact = whole.flatten(1), moved.flatten(1)
    up = flat.abs() - exact.abs()  # by how much rounding lengthened each
    saved = torch.where(up > 0, 2 * flat.abs() - 1, 0.0)
    order = up.argsort(dim=1, descending=True, stable=True)
    excess = flat.square().sum(1, keepdim=True) - (eps * LEVELS) ** 2
    before = saved.gather(1, order).cumsum(1) - saved.gather(1, order)  # saved by those that come earlier
    back = torch.zeros_like(flat).scatter(1, order, ((before < excess) & (saved.gather(1, order) > 0)).to(flat))
    return (start + (flat - back * flat.sign()).view_as(start)) / LEVELS


def seen(handle: Handle, images: Tensor, size: int) -> Tensor:
    """`[N, K]`: the logits of images `[N, C, H, W]` in [0, 1], from a forward pass, in single precision on the CPU."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    found = []
    with handle.watch(shape=shape) as watch:
        for part in torch.split(images, size):
            inputs = handle.spec.normalised(part.to(handle.device)).to(handle.dtype)
            found.append(handle.logits(watch(inputs)).float().cpu())
    return torch.cat(found)


def aims_of(
    handle: Handle, target: TargetLike | Sequence[TargetLike] | None, images: Tensor, before: Tensor
) -> list[int | None]:
    """The class each image is to be seen as, None where any other than its own will do.

    before: the logits of the images. Raises `BadInput` for a class that is seen already, `BadTarget` for no class.
    """
    if before.shape[1] < 2:
        raise NotApplicable("this model has one output, so nothing else can be seen; fool needs two classes")
    if not bool(before.isfinite().all()):
        raise BadInput("the model's output holds NaN or infinity for the images as they are")
    if target is None:
        return [None] * len(images)
    if isinstance(target, Sequence) and not isinstance(target, str):
        target = [_class(handle, one) for one in target]
    else:
        target = _class(handle, target)
    bound = handle.bind(target, images)
    aims = [next(int(atom.label) for _, atom in one.terms if isinstance(atom, Output)) for one in bound]
    for index, (aim, row) in enumerate(zip(aims, before, strict=True)):
        if int(row.argmax()) == aim:
            raise BadInput(
                f"image {index} is seen as {handle.name_of(aim)!r} already ({row.softmax(0)[aim].item():.0%}); name "
                "another class, or none for any other"
            )
    return list(aims)


def goal(handle: Handle, loss: str, aim: int | None, logits: Tensor) -> Target:
    """What to maximise for an image with logits `[K]` to be seen as `aim`, or as anything but what it is.

    The margin in place of a probability that is so sure that rounding leaves no gradient of it.
    """
    if loss not in ("prob", "margin"):
        raise BadInput(f'loss is "prob" or "margin"; got {loss!r}')
    own, shares = int(logits.argmax()), logits.softmax(0)
    sure = (shares[own] > 1 - SURE) if aim is None else shares[aim] < FAINT
    of = margin if loss == "margin" or bool(sure) else prob
    label = own if aim is None else aim
    name = handle.name_of(label)
    found = of(name if (handle.classes or ()).count(name) == 1 else label)
    return -found if aim is None else found


def lead(logits: Tensor, aims: Sequence[int | None], before: Tensor) -> Tensor:
    """`[N]`: how far the class aimed at is ahead of all others, or the first other one ahead of the class before."""
    own = before.argmax(1)
    marked = torch.tensor([int(own[row]) if aim is None else aim for row, aim in enumerate(aims)])
    values = logits.gather(1, marked[:, None])[:, 0]
    others = logits.scatter(1, marked[:, None], float("-inf")).amax(1)
    sign = torch.tensor([-1.0 if aim is None else 1.0 for aim in aims])
    return sign * (values - others)


def _class(handle: Handle, target: TargetLike) -> Target:
    """A class however it is named, as a target of the model's output."""
    if isinstance(target, str) and target in (handle.classes or ()):
        return prob(target)
    (found,) = as_targets(target, 1)
    (weight, atom), *more = found.terms
    if more or weight != 1 or not isinstance(atom, Output):
        raise BadTarget(f"a model is fooled into seeing a class, as 'fish' or logit:fish; got {found}")
    return prob(atom.label)
