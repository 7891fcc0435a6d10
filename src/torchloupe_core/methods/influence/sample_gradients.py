"""The gradient of each image by itself, of many at once.

Linear layers and convolutions: their gradient is a sum of products of what they read and what comes back to them, so
one forward and one backward pass of a batch hold the gradients of all its images. Normalisation layers likewise. For
other parameters the model is differentiated as a function, image by image in one vectorised call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchloupe_core.errors import BadInput
from torchloupe_core.handle import Handle
from torchloupe_core.methods.influence.pieces import Call, Piece, pieces_of

__all__ = ["SampleGradients"]

Cotangents = Callable[[Tensor], Tensor]  # of logits [N, K], `[N, m, K]`: what to multiply the Jacobian with
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
CLOSE = 1e-3
NO_SUM = (
    "the model gives another output for an image in a batch, or at another time, so its loss is no sum over images: "
    "batch normalisation without running statistics, or dropout that does not heed eval mode"
)


@dataclass
class SampleGradients:
    """The gradients of a model's logits with respect to the named parameters, P numbers in all, image by image.

    To be used while the model is borrowed. captured: the modules whose inputs and outputs suffice.
    """

    handle: Handle
    names: Sequence[str]
    captured: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        modules = dict(self.handle.module.named_modules())
        self.modules = {piece.module: modules[piece.module] for piece in self.pieces}
        known = (piece for piece in self.pieces if piece.matrix or _is_norm(self.modules[piece.module], piece))
        self.captured = frozenset(piece.module for piece in known)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The parameters, module by module."""
        return pieces_of(self.handle, self.names)

    @property
    def size(self) -> int:
        """P."""
        return sum(piece.size for piece in self.pieces)

    @property
    def parameters(self) -> Tensor:
        """`[P]`, their values."""
        return self.packed({name: self._tensor(name).detach() for name in self.names})

    def packed(self, tensors: Any) -> Tensor:
        """`[..., P]` of tensors by parameter name."""
        return torch.cat([piece.packed(tensors) for piece in self.pieces], -1)

    def unpacked(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors by parameter name that `[P]` numbers stand for."""
        parts = torch.split(vector, [piece.size for piece in self.pieces])
        return {
            name: one
            for piece, part in zip(self.pieces, parts, strict=True)
            for name, one in zip(piece.names, piece.unpacked(part), strict=True)
        }

    def spread(self, by_name: Callable[[str], float]) -> Tensor:
        """`[P]`: a number for each parameter, from one for its tensor's name."""
        return self.packed({name: torch.full_like(self._tensor(name), by_name(name)) for name in self.names})

    def rows(self, inputs: Tensor, cotangents: Cotangents) -> tuple[Tensor, Tensor]:
        """`[N, m, P]`: m combinations of the gradients of each image's logits, and the logits `[N, K]`."""
        calls, others, logits = self.apart(inputs, cotangents)
        several = len(calls[0].gots) if calls else next(iter(others.values())).shape[1]
        found = logits.new_empty(len(logits), several, self.size)  # filled in place: copies cost as much as products
        sizes = [piece.size for piece in self.pieces]
        places = dict(zip((piece.module for piece in self.pieces), torch.split(found, sizes, -1), strict=True))
        for module, rows in others.items():
            places[module].copy_(rows)
        begun = set(others)
        for call in calls:
            place, again = places[call.piece.module], call.piece.module in begun
            for m, rows in enumerate(call.gradients()):
                place[:, m] = place[:, m] + rows if again else rows
            begun.add(call.piece.module)
        return found, logits

    def verify(self, inputs: Tensor, cotangents: Cotangents) -> None:
        """Compares the first and the last of some images with a backward pass of each alone.

        Where a layer's parameters are used beside it, or it mixes images, all is done as a function. Raises `BadInput`
        where that does not agree either: the model's output for an image depends on the others, or on chance.
        """
        ends = sorted({0, len(inputs) - 1})
        logits = self._logits(inputs)
        wanted = cotangents(logits)
        alone = torch.cat([self._logits(inputs[end : end + 1]) for end in ends])
        if bool((alone - logits[ends]).abs().max() > CLOSE * logits.abs().max()):
            raise BadInput(NO_SUM)
        expected = torch.stack([self._summed_alone(inputs, wanted, end) for end in ends])
        for captured in dict.fromkeys((self.captured, frozenset[str]())):
            self.captured = captured
            try:
                found = self.rows(inputs, lambda _: wanted)[0].sum(1)[ends]
            except RuntimeError:
                if not captured:
                    raise
                continue
            if bool(((found - expected).norm(dim=1) <= CLOSE * expected.norm(dim=1)).all()):
                return
        raise BadInput(NO_SUM)

    def summed(self, inputs: Tensor, cotangents: Cotangents) -> Tensor:
        """`[P]`: the sum over images and combinations, from one backward pass."""
        with self.free(), torch.enable_grad(), self._watched(inputs) as watch:
            logits = self.handle.logits(watch(inputs))
            return self.derivative((cotangents(logits.detach()).sum(1) * logits).sum())

    def derivative(self, value: Tensor) -> Tensor:
        """`[P]`: of a number whose graph was made inside `free`."""
        found = torch.autograd.grad(value, [self._tensor(name) for name in self.names], allow_unused=True)
        return self.packed(
            {
                name: torch.zeros_like(self._tensor(name)) if one is None else one
                for name, one in zip(self.names, found, strict=True)
            }
        )

    def apart(
        self, inputs: Tensor, cotangents: Cotangents, *, rest: bool = True
    ) -> tuple[list[Call], dict[str, Tensor], Tensor]:
        """The calls of linear layers and convolutions, `[N, m, size]` of the other modules by name, and the logits.

        rest: whether the other modules are wanted.
        """
        others = [piece for piece in self.pieces if piece.module not in self.captured]
        found = self._function_rows(inputs, cotangents, others) if rest and others else {}
        pieces = [piece for piece in self.pieces if piece.module in self.captured and (rest or piece.matrix)]
        places, backs, logits = self._passed(inputs, cotangents, pieces)
        calls = []
        for place, (piece, given) in enumerate(places):
            module, gots = self.modules[piece.module], tuple(back[place] for back in backs)
            if piece.matrix:
                calls.append(Call(piece, module, given, gots, len(logits)))
                continue
            whitened = _whitened(module, given)
            rows = torch.stack([_norm_gradients(module, whitened, got, len(logits)) for got in gots], 1)
            found[piece.module] = rows + found.get(piece.module, 0)
        return calls, found, logits

    def _passed(
        self, inputs: Tensor, cotangents: Cotangents, pieces: Sequence[Piece]
    ) -> tuple[list[tuple[Piece, Tensor]], list[tuple[Tensor, ...]], Tensor]:
        """One forward and m backward passes: each call of a piece's module with what it read, and what came back."""
        shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
        calls = [(piece, name) for piece in pieces for name in self._calls(piece.module, shape)]
        places = [place for _, name in calls for place in (name, f"{name}.in")]
        with (
            self.free(),
            torch.enable_grad(),
            self.handle.watch(*places, through=True, shape=shape) as watch,
        ):
            logits = self.handle.logits(watch(inputs))
            outputs = [watch[name] for _, name in calls]
            wanted = cotangents(logits.detach())
            if not outputs:
                return [], [], logits.detach()
            backs = [
                torch.autograd.grad(
                    logits, outputs, wanted[:, m], retain_graph=m + 1 < wanted.shape[1], materialize_grads=True
                )
                for m in range(wanted.shape[1])
            ]
            reads = [(piece, watch[f"{name}.in"].detach()) for piece, name in calls]
        return reads, backs, logits.detach()

    def _function_rows(self, inputs: Tensor, cotangents: Cotangents, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """`[N, m, size]` of some modules, with the model as a function of their parameters."""
        tensors = {name: self._tensor(name).detach() for piece in pieces for name in piece.names}

        def logits_of(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return self.handle.logits(functional_call(self.handle.module, parameters, (image[None].clone(),)))[0]

        def of_one(image: Tensor, wanted: Tensor) -> Any:
            back = vjp(partial(logits_of, image=image), tensors)[1]
            return vmap(back)(wanted)[0]

        wanted = cotangents(self._logits(inputs))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no vectorised form
            found = vmap(of_one, randomness="different")(inputs, wanted)
        return {piece.module: piece.packed(found).detach() for piece in pieces}

    def _calls(self, module: str, shape: tuple[int, int, int]) -> list[str]:
        """The places of a module in a forward pass, one for each time it runs."""
        times = self.handle.layer(module, shape).calls
        return [module] if times == 1 else [f"{module}#{n + 1}" for n in range(times)]

    def _summed_alone(self, inputs: Tensor, wanted: Tensor, image: int) -> Tensor:
        return self.summed(inputs[image : image + 1], lambda _: wanted[image : image + 1])

    def _logits(self, inputs: Tensor) -> Tensor:
        with torch.no_grad(), self._watched(inputs) as watch:
            return self.handle.logits(watch(inputs))

    def _watched(self, inputs: Tensor) -> Any:
        return self.handle.watch(shape=(inputs.shape[1], inputs.shape[2], inputs.shape[3]))

    def free(self) -> _Free:
        """Inside, the parameters take part in graphs."""
        return _Free([self._tensor(name) for name in self.names])

    def _tensor(self, name: str) -> Tensor:
        return self.handle.module.get_parameter(name)


class _Free:
    """Inside, parameters of a borrowed model take part in graphs."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = [one for one in parameters if not one.requires_grad]

    def __enter__(self) -> None:
        for one in self.parameters:
            one.requires_grad_(True)

    def __exit__(self, *error: object) -> None:
        for one in self.parameters:
            one.requires_grad_(False)


def _is_norm(module: nn.Module, piece: Piece) -> bool:
    """Whether it is a normalisation layer as torch makes them, with both its parameters chosen."""
    known = next((kind for kind in NORMS if isinstance(module, kind)), None)
    if known is None or [one.rpartition(".")[2] for one in piece.names] != ["weight", "bias"]:
        return False
    plain = type(module).forward is known.forward or type(module).forward is nn.modules.batchnorm._BatchNorm.forward
    return plain and getattr(module, "running_mean", 0) is not None


def _whitened(module: nn.Module, given: Tensor) -> Tensor:
    """What a normalisation layer multiplies its weight with."""
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(given, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return nn.functional.group_norm(given, module.num_groups, eps=module.eps)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return nn.functional.batch_norm(given, module.running_mean, module.running_var, eps=module.eps)
    raise TypeError(type(module).__name__)


def _norm_gradients(module: nn.Module, whitened: Tensor, back: Tensor, images: int) -> Tensor:
    """`[N, size]`: of weight and bias, summed over positions."""
    if isinstance(module, nn.LayerNorm):
        positions = list(range(1, back.ndim - len(module.normalized_shape)))
    else:
        positions = list(range(2, back.ndim))
    both = [product.sum(positions) if positions else product for product in (back * whitened, back)]
    return torch.cat([one.flatten(1) for one in both], 1).view(images, -1, both[0][0].numel() * 2).sum(1)
