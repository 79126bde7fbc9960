"""Total variation of images: neighbours along several dimensions at once, whose differences share one norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcreg.core._typing import Scalar
from funcreg.core.leafwise import euclidean
from funcreg.regularizers.composition import Structure
from funcreg.regularizers.cones import back, backs, by_parts, dot, nearest, slope, slopes, turned
from funcreg.regularizers.lifting import penalty
from funcreg.regularizers.penalties import group_dims
from funcreg.regularizers.singular_values import forward_once, whole

Dims: TypeAlias = int | tuple[int, ...] | None

# Differences


def _lie(w: Tensor, dim: Dims) -> tuple[int, ...]:
    """The dimensions along which neighbours lie: by default the last two, or the only one."""
    if w.is_complex():
        raise ValueError("a leaf is complex; expected real numbers, whose neighbours have an order")
    if dim is None:
        dim = tuple(range(-min(w.ndim, 2), 0))
    if not isinstance(dim, (int, tuple, list)):
        raise ValueError(f"dim is {dim!r}; expected an int, or a tuple of those along which neighbours lie")
    return group_dims(w, dim)


def _inside(w: Tensor, *, dim: Dims = None) -> tuple[int, ...]:
    return _lie(w, dim)


def _norms(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """At each entry the norm of its differences to the next ones."""
    return euclidean(torch.stack([slope(w, d) for d in dims], -1), (w.ndim,)).squeeze(-1)


def _gradient(w: Tensor, *, dim: Dims = None) -> Tensor:
    dims = _lie(w, dim)
    if not w.numel() or not dims:
        return torch.zeros_like(w)
    norms = _norms(w, dims)
    safe = torch.where(norms == 0, torch.ones_like(norms), norms)
    # Also of the derivative there is nothing where entries are equal.
    found = [back(torch.where(norms == 0, torch.zeros_like(w), slope(w, d) / safe), d) for d in dims]
    return sum(found[1:], found[0])


# The nearest image


def _prox_of_images(w: Tensor, h: Tensor, step: Scalar, dim: Dims) -> Tensor:
    dims = _lie(w, dim)
    if not w.numel() or not dims:
        return w.clone()
    order = [*[d for d in range(w.ndim) if d not in dims], *dims]
    last = tuple(range(-len(dims), 0))
    x, metric = (each.permute(order).to(torch.float64) for each in (w, h))
    jump = torch.as_tensor(step, dtype=torch.float64, device=w.device)
    if jump.ndim:
        jump = jump.expand([1 if d in dims else n for d, n in enumerate(w.shape)]).permute(order)
    z = _in_units(x, metric, jump, last)
    back = [order.index(d) for d in range(w.ndim)]
    return z.permute(back).to(w.dtype) + 0.0


def _in_units(x: Tensor, h: Tensor, jump: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Images of mean 0 and size 1 in a metric of size 1 are solved for."""
    count = math.prod([x.shape[d] for d in dims])
    mean = (h * x).sum(dims, keepdim=True) / h.sum(dims, keepdim=True)
    size, top = (x - mean).abs().amax(dims, keepdim=True).detach(), h.amax(dims, keepdim=True).detach()
    size = torch.where(size == 0, torch.ones_like(size), size)
    # From some jump on, the image is its mean.
    z = mean + size * _exact((x - mean) / size, h / top, (jump / (size * top)).clamp(max=count), dims)
    still = x.detach() + (z - z.detach())  # Without a step the image itself, with the derivative of what moves.
    return torch.where(jump == 0, still, z)


# Both operations read numbers, to see when they are done, and so are one each for whatever traces or batches them.


def nearest_images(x: Tensor, h: Tensor, ndim: int) -> Tensor:
    """The images near to others, `(..., *shape)`, in a metric that is divided by the jump."""
    return by_parts(nearest, *_batch(ndim, x, h)).reshape(x.shape)


def turned_images(force: Tensor, z: Tensor, h: Tensor, jump: Tensor, ndim: int) -> Tensor:
    """How images move by a force."""
    return by_parts(turned, *_batch(ndim, force, z, h, jump)).reshape(z.shape)


def _batch(ndim: int, *images: Tensor) -> list[Tensor]:
    return [x.reshape(-1, *x.shape[x.ndim - ndim :]) for x in images]


def _operation(schema: str, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of images and of how many dimensions they have as an operation of torch."""
    name = f"funcreg::{f.__name__}"
    if hasattr(torch.ops.funcreg, f.__name__):  # The module is loaded once more, as in notebooks; torch takes one each.
        return getattr(torch.ops.funcreg, f.__name__)
    torch.library.define(name, schema)
    torch.library.impl(name, "default", f)
    torch.library.register_fake(name, lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format))

    def mapped(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        *images, ndim = given
        front = [  # Images of all members are images.
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(images, in_dims, strict=False)
        ]
        return operation(*front, ndim), 0

    torch.library.register_vmap(name, mapped)
    operation: Callable[..., Tensor] = getattr(torch.ops.funcreg, f.__name__)
    return operation


_nearest = _operation("(Tensor x, Tensor h, int ndim) -> Tensor", nearest_images)
_turned = _operation("(Tensor force, Tensor z, Tensor h, Tensor jump, int ndim) -> Tensor", turned_images)


class _Turn(torch.autograd.Function):
    """How images move by a force, which is symmetric, and linear in the force; of all else it has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(force: Tensor, z: Tensor, h: Tensor, jump: Tensor, ndim: int) -> Tensor:
        return _turned(force, z, h, jump, ndim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, ctx.ndim = inputs
        ctx.save_for_backward(*inputs[1:4])
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _turn(*grad_outputs, *ctx.saved_tensors, ctx.ndim), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        forward_once()
        return _turn(grad_inputs[0], *ctx.saved_tensors, ctx.ndim)


@whole
def _turn(force: Tensor, z: Tensor, h: Tensor, jump: Tensor, ndim: int) -> Tensor:
    made: Any = _Turn.apply(force, z, h, jump, ndim)
    return made


def _exact(x: Tensor, h: Tensor, jump: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The image of least objective, to rounding."""
    jump = jump.expand_as(x)
    fixed, metric, force = x.detach().contiguous(), h.detach().contiguous(), jump.detach().contiguous()
    z = _nearest(fixed, metric / torch.where(force == 0, torch.ones_like(force), force), len(dims))
    z = torch.where(force == 0, fixed, z)
    center, v = z, slopes(z, len(dims))
    apart = dot(v, v) > 0
    # Each of these steps has one more derivative.
    for _ in range(3):
        v = slopes(z, len(dims))
        left = apart & (dot(v, v) > 0)
        norm = torch.where(left, dot(v, v), torch.ones_like(z)).sqrt()
        turn = torch.where(left, v / norm, torch.zeros_like(v))
        step = _turn(h * (x - z) - jump * backs(turn), center, metric, force, len(dims))
        # Where two regions are equal to rounding, a step by the second derivative leads nowhere; its derivative stays.
        with torch.no_grad():
            before, after = (_worth(image, x, h, jump, dims) for image in (z, z + step))
            good = after <= before * (1 + 1e-9)
        z = z + torch.where(good, step, step - step.detach())
    return z


def _worth(z: Tensor, x: Tensor, h: Tensor, jump: Tensor, dims: tuple[int, ...]) -> Tensor:
    v = slopes(z, len(dims))
    return (h * (z - x).square() / 2 + jump * dot(v, v).sqrt()).sum(dims, keepdim=True)


def _proximal(w: Tensor, step: Scalar, *, dim: Dims = None) -> Tensor:
    return _prox_of_images(w, torch.ones_like(w), step, dim)


def _metric(w: Tensor, h: Tensor, step: Scalar, *, dim: Dims = None) -> Tensor:
    return _prox_of_images(w, h, step, dim)


@penalty(
    gradient=_gradient,
    proximal=_proximal,
    metric=_metric,
    structure=Structure(groups=_inside),
    separable=False,
)
def isotropic_total_variation(w: Tensor, *, dim: Dims = None) -> Tensor:
    r"""Total variation of images, :math:`\sum_{ij} \sqrt{(w_{i+1,j} - w_{ij})^2 + (w_{i,j+1} - w_{ij})^2}`.

    It makes regions of images equal, with edges of any direction: filters of a first layer, weights of pixels or of
    places on a grid. Each difference is to the next entry, and 0 at the end. Along one dimension it is
    `total_variation`. Where an entry equals the next ones, the gradient has nothing of it.

    The proximal operator is exact to rounding at any size, with exactly equal regions: an interior point method ends at
    a duality gap of 1e-14 of the objective after twenty to forty steps, each of which solves the linear equations of
    neighbours. It computes in float64, and takes a tenth of a second for a filter, a second for an image of 128 x 128
    entries and seven for 256 x 256: work grows a little faster than the number of entries, in volumes with its square.
    What is not found to 1e-8 in a hundred steps, or has an entry that is not finite, becomes NaN. Derivatives are those
    of the image by the implicit function theorem. Where a metric differs by four orders of magnitude and more between
    regions, the objective is known to 1e-9, and the entries of the least metric, on which it hardly depends, to less.

    Args:
        dim: Dimensions of an image, along which neighbours lie; by default the last two, or the only one of a vector.

    Raises:
        ValueError: A leaf has no such dimension, or is complex.

    Example:
        >>> params = {"filter": torch.tensor([[0.0, 0.0, 3.0], [0.0, 3.0, 3.0], [3.0, 3.0, 3.0]])}
        >>> isotropic_total_variation(params)
        tensor(8.4853)
        >>> isotropic_total_variation.prox(params, 0.25)["filter"][0]
        tensor([0.2357, 0.2357, 2.8821])

        A noisy photograph becomes smooth, but for its edges:

        >>> photograph = torch.ones(32, 32).triu() + 0.1 * torch.randn(32, 32)
        >>> smooth = isotropic_total_variation.prox(photograph, 0.15)
        >>> (smooth - torch.ones(32, 32).triu()).abs().mean() < 0.05
        tensor(True)

    References:
        Rudin, Osher & Fatemi, *Nonlinear total variation based noise removal algorithms*, 1992.
        Chambolle, *An algorithm for total variation minimization and applications*, 2004.
    """
    dims = _lie(w, dim)
    if not w.numel() or not dims:
        return torch.zeros_like(w)
    return _norms(w, dims).sum(dims, keepdim=True)
