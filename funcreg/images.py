"""Total variation of images: neighbours along several dimensions at once, whose differences share one norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from funcreg._typing import Scalar
from funcreg.composition import Structure
from funcreg.equations import solved
from funcreg.penalties import group_dims
from funcreg.penalty import penalty
from funcreg.tree import euclidean

Dims: TypeAlias = int | tuple[int, ...] | None

#: Entries of the largest image for which as many linear equations are solved.
LARGEST = 1024
#: Widths of the rounded kinks, one for each step of Newton's method.
_WIDTHS = tuple(10.0 ** (-k / 2) for k in range(17)) + (1e-8,) * 3
#: Parts of a step of Newton's method that are tried.
_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 0.0)
#: Below this a difference of neighbours is none; sizes of images are 1.
_LEVEL = 3e-6


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


def _end(x: Tensor, d: int) -> Tensor:
    return torch.zeros_like(x.narrow(d, 0, 1))


def _slope(x: Tensor, d: int) -> Tensor:
    """The next entry along a dimension minus this one; 0 at the end."""
    size = x.shape[d]
    return torch.cat([x.narrow(d, 1, size - 1) - x.narrow(d, 0, size - 1), _end(x, d)], d)


def _back(p: Tensor, d: int) -> Tensor:
    """The transpose of `_slope`."""
    held = torch.cat([p.narrow(d, 0, p.shape[d] - 1), _end(p, d)], d)
    return torch.cat([_end(p, d), held.narrow(d, 0, p.shape[d] - 1)], d) - held


def _norms(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """At each entry the norm of its differences to the next ones."""
    return euclidean(torch.stack([_slope(w, d) for d in dims], -1), (w.ndim,)).squeeze(-1)


def _gradient(w: Tensor, *, dim: Dims = None) -> Tensor:
    dims = _lie(w, dim)
    if not w.numel() or not dims:
        return torch.zeros_like(w)
    norms = _norms(w, dims)
    safe = torch.where(norms == 0, torch.ones_like(norms), norms)
    # Also of the derivative there is nothing where entries are equal.
    turn = [torch.where(norms == 0, torch.zeros_like(w), _slope(w, d) / safe) for d in dims]
    return _backs(turn, dims)


# The nearest image


Image: TypeAlias = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


def _prox_of_images(w: Tensor, h: Tensor, step: Scalar, dim: Dims) -> Tensor:
    dims = _lie(w, dim)
    if not w.numel() or not dims:
        return w.clone()
    if math.prod([w.shape[d] for d in dims]) > LARGEST:
        shape = " x ".join([str(w.shape[d]) for d in dims])
        raise ValueError(
            f"isotropic_total_variation got an image of {shape} entries; its proximal operator, and certificates, take "
            f"images of up to {LARGEST}, for which they are exact. Its gradient takes any: add_penalty(...), or a term "
            "in the loss. total_variation along one dimension has no limit."
        )
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


def _slopes(x: Tensor, dims: tuple[int, ...]) -> list[Tensor]:
    return [_slope(x, d) for d in dims]


def _backs(p: list[Tensor], dims: tuple[int, ...]) -> Tensor:
    found = [_back(each, d) for each, d in zip(p, dims, strict=True)]
    return sum(found[1:], found[0])


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    found = [x * y for x, y in zip(a, b, strict=True)]
    return sum(found[1:], found[0])


class _Equations:
    """Linear equations of images, as many as they have entries."""

    def __init__(self, h: Tensor, jump: Tensor, dims: tuple[int, ...]) -> None:
        self._h, self._jump, self._dims = h, jump, dims
        self._shape = [h.shape[d] for d in dims]
        count = math.prod(self._shape)
        self.unit = torch.eye(count, dtype=h.dtype, device=h.device)
        self._images = self.unit.reshape(count, *self._shape)
        self._leaning = _slopes(self._images, dims)

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(-len(self._dims))

    def image(self, rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:-1], *self._shape)

    def solved(self, bend: list[list[Tensor]], force: Tensor, within: Tensor | None = None) -> Tensor:
        """What moves by a force against a metric and the second derivative of norms, constant where images must be."""
        beside = lambda x: x.unsqueeze(-len(self._dims) - 1)
        pulls = [_dot([beside(x) for x in row], self._leaning) for row in bend]
        stiff = self.flat(beside(self._h) * self._images + beside(self._jump) * _backs(pulls, self._dims))
        rows = self.flat(force)
        if within is not None:
            stiff = within @ stiff @ within + self.unit - within
            rows = (within * rows.unsqueeze(-2)).sum(-1)
        return self.image(solved(stiff, rows))

    def connected(self, joined: Tensor) -> Tensor:
        """For each pair of entries whether a way leads from one to the other, of entries equal to the next ones."""
        x = self._images
        ways = [torch.cat([_end(x, d), x.narrow(d, 0, x.shape[d] - 1)], d) for d in self._dims]
        there = joined.unsqueeze(-1).to(self.unit.dtype) * self.flat(sum(ways[1:], ways[0]))
        near = self.unit + there + there.mT
        for _ in range(max(1, (self.unit.shape[0] - 1).bit_length())):
            near = ((near @ near) > 0).to(self.unit.dtype)
        return near


def _exact(x: Tensor, h: Tensor, jump: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The image of least objective, to rounding, if what is equal in it was found."""
    equations = _Equations(h.detach(), jump.detach(), dims)
    z = _near(x.detach(), h.detach(), jump.detach(), dims, equations)
    joined = equations.flat(_dot(_slopes(z, dims), _slopes(z, dims)).sqrt() < _LEVEL)
    regions = equations.connected(joined)
    first = regions.argmax(-1)
    alike = lambda image: equations.image(equations.flat(image).gather(-1, first))
    within = regions / regions.sum(-1, keepdim=True)
    z = alike(equations.image((within * equations.flat(z).unsqueeze(-2)).sum(-1)))
    # Entries that differed by little may have come to be equal by another way.
    apart = equations.image(~joined) & (_dot(_slopes(z, dims), _slopes(z, dims)) > 0)
    equations = _Equations(h, jump, dims)
    # Each step of Newton's method has one more derivative.
    for _ in range(3):
        v = _slopes(z, dims)
        norm = torch.where(apart, _dot(v, v), torch.ones_like(z)).sqrt()
        turn = [torch.where(apart, each / norm, torch.zeros_like(z)) for each in v]
        free = torch.where(apart, 1 / norm, torch.zeros_like(z))
        bend = [[free * ((i == j) * 1.0 - a * b) for j, b in enumerate(turn)] for i, a in enumerate(turn)]
        step = alike(equations.solved(bend, h * (x - z) - jump * _backs(turn, dims), within))
        # Where two regions are equal to rounding, the second derivative is none.
        with torch.no_grad():
            before, after = (_worth(image, x, h, jump, 0.0, dims) for image in (z, z + step))
            good = after <= before + 1e-9 * (1 + before)
        z = z + torch.where(good, step, torch.zeros_like(step))
    return z


def _near(x: Tensor, h: Tensor, jump: Tensor, dims: tuple[int, ...], equations: _Equations) -> Tensor:
    r"""The image with kinks that are rounded, :math:`\sqrt{\|v\|^2 + \epsilon^2}`, less and less.

    Newton's method for the image and its dual together, which the rounding slows down far less than that for the image.

    References:
        Chan, Golub & Mulet, *A nonlinear primal-dual method for total variation-based image restoration*, 1999.
    """
    z, p = x, [torch.zeros_like(x) for _ in dims]
    for width in _WIDTHS:
        v = _slopes(z, dims)
        s = (_dot(v, v) + width**2).sqrt()
        rows = list(enumerate(zip(p, v, strict=True)))
        bend = [[((i == j) * 1.0 - (a * w + b * u) / (2 * s)) / s for j, (b, w) in rows] for i, (a, u) in rows]
        turn = equations.solved(bend, h * (x - z) - jump * _backs([each / s for each in v], dims))
        dv = _slopes(turn, dims)
        along = _dot(v, dv) / s
        p = [(a + da - b * along) / s for a, da, b in zip(v, dv, p, strict=True)]
        beyond = _dot(p, p).sqrt().clamp(min=1.0)
        z, p = _lowest(z, turn, x, h, jump, width, dims), [each / beyond for each in p]
    return z


def _lowest(z: Tensor, turn: Tensor, x: Tensor, h: Tensor, jump: Tensor, width: float, dims: tuple[int, ...]) -> Tensor:
    """Of some points along a direction the one of least objective, with kinks that are rounded."""
    lengths = torch.tensor(_LENGTHS, dtype=z.dtype, device=z.device).reshape(-1, *[1] * z.ndim)
    points = z + lengths * turn
    worth = _worth(points, x, h, jump, width, dims)
    return points.gather(0, worth.argmin(0, keepdim=True).expand(1, *z.shape)).squeeze(0)


def _worth(z: Tensor, x: Tensor, h: Tensor, jump: Tensor, width: float, dims: tuple[int, ...]) -> Tensor:
    v = _slopes(z, dims)
    return (h * (z - x).square() / 2 + jump * (_dot(v, v) + width**2).sqrt()).sum(dims, keepdim=True)


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

    The proximal operator takes images of up to 1024 entries and is exact to rounding, with exactly equal regions: some
    twenty steps of Newton's method find the edges, each of which solves as many linear equations as an image has
    entries, so that work grows with the cube of these: some 30 ms for a small image, a second or two for 32 x 32. It
    computes in float64. Value and gradient take images of any size. An image with an entry that is not finite becomes
    NaN.

    Args:
        dim: Dimensions of an image, along which neighbours lie; by default the last two, or the only one of a vector.

    Raises:
        ValueError: A leaf has no such dimension, or is complex, or an image is too large for the proximal operator.

    Example:
        >>> params = {"filter": torch.tensor([[0.0, 0.0, 3.0], [0.0, 3.0, 3.0], [3.0, 3.0, 3.0]])}
        >>> isotropic_total_variation(params)
        tensor(8.4853)
        >>> isotropic_total_variation.prox(params, 0.25)["filter"][0]
        tensor([0.2357, 0.2357, 2.8821])

    References:
        Rudin, Osher & Fatemi, *Nonlinear total variation based noise removal algorithms*, 1992.
        Chambolle, *An algorithm for total variation minimization and applications*, 2004.
    """
    dims = _lie(w, dim)
    if not w.numel() or not dims:
        return torch.zeros_like(w)
    return _norms(w, dims).sum(dims, keepdim=True)
