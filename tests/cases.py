"""The tables: one row for each penalty and each transform. A row is under every law of the suite."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import funcreg as fr
from funcreg.core.construction import remembered
from funcreg.core.leafwise import reduce_leaves, total
from funcreg.core.undocumented import is_traced, is_transformed

#: Where tests compute: `FUNCREG_DEVICE=cuda pytest` runs them on a GPU; `cpu:0` rehearses that on the CPU.
DEVICE = os.environ.get("FUNCREG_DEVICE", "cpu")

if DEVICE != "cpu":
    # A factory call of a test means the device under test. Before the first of them: rows of tables hold tensors.
    torch.set_default_device(DEVICE)

cpu_only = pytest.mark.skipif(torch.device(DEVICE).type != "cpu", reason="it holds for the CPU alone")


# Trees


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, drawn on the CPU and moved: the same on every device."""
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(DEVICE)


def uniform(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers between 0 and 1, drawn on the CPU and moved."""
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu").to(DEVICE)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a seed."""
    return normal(torch.Generator().manual_seed(seed), *shape)


def tensors(shapes: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Normal numbers of these shapes, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: normal(generator, *shape).to(dtype) for name, shape in shapes.items()}


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, device=DEVICE)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=DEVICE)


def stacked(trees: list[Any]) -> Any:
    return fr.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def known(number: Any) -> Tensor:
    """Numbers in a tensor of the CPU, where they are checked: elsewhere reading them would wait for a device."""
    return torch.tensor(number, device="cpu")


def draw(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Any]:
    """A nested tree of a matrix, vectors and a filter bank, with zeros among the entries."""
    return _tree(_with_zeros, ((4, 3), (4,), (3, 2, 2, 2), (5,)), seed, dtype, scale)


def draw_fours(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Any]:
    """A tree like that of `draw`, without zeros, whose leaves have last dimensions of four."""
    return _tree(normal, ((3, 4), (4,), (2, 2, 1, 4), (4,)), seed, dtype, scale)


def nearby(z: Any, seed: int, size: float) -> Any:
    """A tree that is moved by one like that of `draw`."""
    return fr.tree_map(lambda a, d: a + size * d, z, draw(seed))


def squares(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a linear model."""
    return (x @ params["w"] + params.get("b", 0.0) - y).square().mean() / 2


def _with_zeros(generator: torch.Generator, *shape: int) -> Tensor:
    x = normal(generator, *shape)
    return torch.where(uniform(generator, *shape, dtype=torch.float32) < 0.1, 0.0, x)


def _tree(numbers: Callable[..., Tensor], shapes: Any, seed: int, dtype: torch.dtype, scale: float) -> dict[str, Any]:
    # Tensors that are made inside a transform of torch.func or a mode belong to it.
    drawn = _leaves.__wrapped__ if is_traced() or is_transformed() else _leaves
    weight, bias, filters, vector = [leaf.clone() for leaf in drawn(numbers, shapes, seed, dtype, scale)]
    return {"head": Layer(weight, bias), "body": {"filters": filters, "scale": (vector,)}}


@functools.lru_cache(maxsize=4096)
def _leaves(numbers: Callable[..., Tensor], shapes: Any, seed: int, dtype: torch.dtype, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * numbers(generator, *shape)).to(dtype) for shape in shapes]


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in fr.tree_leaves(tree)])


def assert_equal(a: Any, b: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Trees of one structure whose leaves agree in value, dtype and shape."""
    paths = fr.tree_paths(a)
    assert paths == fr.tree_paths(b)
    for path, x, y in zip(paths, fr.tree_leaves(a), fr.tree_leaves(b), strict=True):
        if not _agree(x, y, rtol, atol):
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, at=path: f"{at}: {m}")


def _agree(x: Any, y: Any, rtol: float, atol: float) -> bool:
    """Whether two plain tensors agree; what says why they do not is slow."""
    if type(x) is not Tensor or type(y) is not Tensor or x.layout != torch.strided or y.layout != torch.strided:
        return False
    alike = (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device)
    return alike and torch.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True)


# Penalties


def _sum_of_norms(dims: Callable[[Tensor], tuple[int, ...]], root: bool = False) -> Callable[[Tensor], Tensor]:
    def value(w: Tensor) -> Tensor:
        inside = dims(w)
        norms = torch.linalg.vector_norm(w, dim=inside) if inside else w.abs()
        return norms.sum() * math.prod(w.shape[d] for d in inside) ** (0.5 if root else 0.0)

    return value


def _rows(w: Tensor) -> tuple[int, ...]:
    return tuple(range(1, w.ndim))


def _columns(w: Tensor) -> tuple[int, ...]:
    return (0,)


def _all(w: Tensor) -> tuple[int, ...]:
    return tuple(range(w.ndim))


@fr.penalty(
    gradient=lambda w, width: w.clamp(-width, width),
    proximal=lambda w, step, width: w - step * (w / (1 + step)).clamp(-width, width),
)
def huber(w: Tensor, width: Any) -> Tensor:
    """A penalty as a user writes it, with nothing but its two rules."""
    return torch.where(w.abs() <= width, w.square() / 2, width * (w.abs() - width / 2))


def _joint_prox(params: Any, step: Any) -> Any:
    norm = fr.global_norm(params)
    factor = torch.relu(norm - step) / torch.where(norm == 0, 1.0, norm)
    return fr.tree_map(lambda w: (w * factor).to(w.dtype) + 0.0, params)


def _joint_grad(params: Any) -> Any:
    norm = fr.global_norm(params)
    return fr.tree_map(lambda w: (w / torch.where(norm == 0, 1.0, norm)).to(w.dtype), params)


joint = fr.Penalty(fr.global_norm, _joint_grad, _joint_prox)
"""A penalty on trees: one norm couples all leaves, which live or die together."""


class Given:
    """A penalty, or a constraint, with its hyperparameters and options."""

    penalty: fr.Penalty
    hyper: tuple[float, ...]
    options: dict[str, Any]

    def value(self, params: Any, **kwargs: Any) -> Tensor:
        return self.penalty(params, *self.hyper, **self.options, **kwargs)

    def grad(self, params: Any, **kwargs: Any) -> Any:
        return self.penalty.grad(params, *self.hyper, **self.options, **kwargs)

    def prox(self, params: Any, step: Any, **kwargs: Any) -> Any:
        return self.penalty.prox(params, step, *self.hyper, **self.options, **kwargs)


@dataclass(frozen=True)
class PenaltyCase(Given):
    penalty: fr.Penalty
    equation: Callable[[Tensor], Tensor] | None  # On one leaf; None where leaves are coupled.
    hyper: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    smooth: bool = False  # No step takes all to zero.
    least_ndim: int = 0  # Leaves of fewer dimensions are bad input.
    complex: bool = True  # Takes complex leaves.
    metric: bool = True  # Has a proximal operator in a diagonal metric.
    inner_steps: int | None = None  # What stands in for one unless told otherwise.
    nonconvex: str = ""  # Why laws of convex penalties do not hold.
    uncompiled: str = ""  # Why it is not compiled in one graph.
    unshaped: str = ""  # Why it does not take leaves of every shape.
    ruleless: str = ""  # Why it has no residual of its own, but that of its proximal operator.
    centre: float = 0.0  # Where each entry has its kink or least value.
    unweighted: str = ""  # Why no tree of weights multiplies it.
    batch: Callable[[float], list[float]] = lambda h: [h, h / 2, h / 3]  # Values of a hyperparameter for members.
    tied: str = ""  # Why its proximal operator is not smooth in a step from 0 at entries of exactly zero.


PENALTIES: dict[str, PenaltyCase] = {
    "l1": PenaltyCase(fr.l1, lambda w: w.abs().sum()),
    "l2": PenaltyCase(fr.l2, lambda w: (w * w.conj()).real.sum(), smooth=True),
    "half_l2": PenaltyCase(fr.half_l2, lambda w: 0.5 * (w * w.conj()).real.sum(), smooth=True),
    "elastic": PenaltyCase(
        fr.elastic, lambda w: 0.18 * w.abs().sum() + 0.06 * (w * w.conj()).real.sum(), hyper=(0.3, 0.6)
    ),
    "group_lasso": PenaltyCase(fr.group_lasso, _sum_of_norms(_rows)),
    "group_lasso of columns": PenaltyCase(fr.group_lasso, _sum_of_norms(_columns), options={"dim": 0}, least_ndim=1),
    "group_lasso of leaves": PenaltyCase(fr.group_lasso, _sum_of_norms(_all), options={"dim": None}),
    "group_lasso by size": PenaltyCase(
        fr.group_lasso, _sum_of_norms(_rows, root=True), options={"weights": "sqrt_size"}
    ),
    "sparse_group_lasso": PenaltyCase(
        fr.sparse_group_lasso,
        lambda w: 0.5 * (0.4 * w.abs().sum() + 0.6 * _sum_of_norms(_rows, root=True)(w)),
        hyper=(0.5, 0.4),
        options={"weights": "sqrt_size"},
    ),
    "a user's": PenaltyCase(
        huber,
        lambda w: torch.nn.functional.huber_loss(w, torch.zeros_like(w), reduction="sum", delta=0.7),
        hyper=(0.7,),
        smooth=True,
        complex=False,
    ),
    "a user's on trees": PenaltyCase(joint, None, metric=False, unweighted="all leaves share one norm"),
}


# Transforms


@dataclass(frozen=True)
class Seen:
    """What one leaf has seen: all its gradients so far, itself at each step, and the norm of each step's gradients."""

    gs: list[Tensor]
    ws: list[Tensor]
    norms: list[Tensor]

    @property
    def g(self) -> Tensor:
        return self.gs[-1]

    @property
    def w(self) -> Tensor:
        return self.ws[-1]

    @property
    def n(self) -> int:
        return len(self.gs)


@dataclass(frozen=True)
class TransformCase:
    make: Callable[..., fr.Transform]  # From a factor of its main hyperparameter to the transform.
    # The update of a leaf in plain torch, from closed forms over all that it has seen, and the factor; None where
    # a test of its own has the equation.
    equation: Callable[[Seen, float], Tensor] | None
    differentiable: bool = True  # Its updates have a useful derivative in the gradients.
    drops: str = ""  # Why an extra argument that nobody takes is no error.
    shared: str = ""  # Why a tensor of its state, besides counters, belongs to several leaves.
    wide: str = ""  # Why its updates of sixteen-bit leaves are float32.
    newer: str = ""  # Why torch 2.9 does not compile a map in which it is made.

    def updates_like(self, params: Any) -> Any:
        """A tree that its updates have the dtypes of."""
        return fr.tree_map(lambda w: w.float() if w.dtype == torch.bfloat16 and self.wide else w, params)


def _mean(gs: list[Tensor], b: float, power: int = 1, first: float = 0.0) -> Tensor:
    n = len(gs)
    return b**n * first + (1 - b) * sum((b ** (n - 1 - i) * g**power for i, g in enumerate(gs)), torch.zeros(()))


def _hat(gs: list[Tensor], b: float, power: int = 1) -> Tensor:
    return _mean(gs, b, power) / (1 - b ** len(gs))


def _adam(s: Seen, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, root: float = 0.0) -> Tensor:
    return _hat(s.gs, b1) / ((_hat(s.gs, b2, 2) + root).sqrt() + eps)


def _nadam(s: Seen, b1: float) -> Tensor:
    ahead = b1 * _mean(s.gs, b1) / (1 - b1 ** (s.n + 1)) + (1 - b1) * s.g / (1 - b1**s.n)
    return ahead / (_hat(s.gs, 0.999, 2).sqrt() + 1e-8)


def _amsgrad(s: Seen) -> Tensor:
    largest = torch.stack([_hat(s.gs[: i + 1], 0.999, 2) for i in range(s.n)]).amax(0)
    return _hat(s.gs, 0.9) / (largest.sqrt() + 1e-8)


def _trace(gs: list[Tensor], b: float) -> Tensor:
    return sum((b ** (len(gs) - 1 - i) * g for i, g in enumerate(gs)), torch.zeros(()))


def _trust(u: Tensor, w: Tensor) -> Tensor:
    size, step = w.square().sum().sqrt(), u.square().sum().sqrt()
    return u * size / step if size * step != 0 else u


def _unit(w: Tensor) -> Tensor:
    return w.square().sum(tuple(range(1, w.ndim)), keepdim=True).sqrt() if w.ndim > 1 else w.abs()


def _soft(w: Tensor, t: Any) -> Tensor:
    return w.sign() * (w.abs() - t).clamp(min=0)


def _group(w: Tensor, t: Any) -> Tensor:
    return torch.where(_unit(w) > t, w * (1 - t / _unit(w)), torch.zeros_like(w))


def _row_means(w: Tensor) -> Tensor:
    return w.mean(tuple(range(1, w.ndim)), keepdim=True) if w.ndim > 1 else torch.zeros_like(w)


def _fista(s: Seen, rate: float, threshold: float) -> Tensor:
    x, t = s.ws[0], 1.0
    y = x
    for w, g in zip(s.ws, s.gs, strict=True):
        x, before = _soft(w - rate * g, threshold), x
        t, previous = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        y = x + (previous - 1) / t * (x - before)
    return y - s.w


def falling(count: Any) -> Any:
    """A schedule, 1, 1/2, 1/3 ..."""
    return 1 / (1 + fr.linear_schedule(0.0, 10.0, 10)(count))


HEAD = {"head": True, "body": False}


def _cautious(u: Tensor, w: Tensor, decay: float) -> Tensor:
    return u + decay * w * (u * w >= 0)


def _average(s: Seen, b: float) -> Tensor:
    m = s.ws[0]
    for w in s.ws:
        m = b * m + (1 - b) * w
    return m


DOWN = fr.linear_schedule(0.5, 0.1, 4)


def _clipped_descent(h: float = 1.0) -> fr.Transform:
    return fr.chain(fr.clip_by_global_norm(1.0), fr.trace(0.5), fr.add_decayed_weights(0.1 * h), fr.scale(-0.1))


def _clipped_descent_equation(s: Seen, h: float) -> Tensor:
    clipped = [g * min(1.0, 1 / float(norm)) for g, norm in zip(s.gs, s.norms, strict=True)]
    return -0.1 * (_trace(clipped, 0.5) + 0.1 * h * s.w)


TRANSFORMS: dict[str, TransformCase] = {
    "identity": TransformCase(lambda h=1.0: fr.identity(), lambda s, h: s.g),
    "set_to_zero": TransformCase(lambda h=1.0: fr.set_to_zero(), lambda s, h: 0 * s.g, differentiable=False),
    "stateless": TransformCase(
        lambda h=1.0: fr.stateless(lambda u, p: fr.tree_map(lambda u, w: u - w, u, p)), lambda s, h: s.g - s.w
    ),
    "scale": TransformCase(lambda h=1.0: fr.scale(-0.5 * h), lambda s, h: -0.5 * h * s.g),
    "scale_by_schedule": TransformCase(lambda h=1.0: fr.scale_by_schedule(falling), lambda s, h: s.g / s.n),
    "scale_by_learning_rate": TransformCase(
        lambda h=1.0: fr.scale_by_learning_rate(0.5 * h), lambda s, h: -0.5 * h * s.g
    ),
    "scale_by_learning_rate on a schedule": TransformCase(
        lambda h=1.0: fr.scale_by_learning_rate(lambda count: h * falling(count)), lambda s, h: -h * s.g / s.n
    ),
    "trace": TransformCase(lambda h=1.0: fr.trace(0.5 * h), lambda s, h: _trace(s.gs, 0.5 * h)),
    "trace nesterov": TransformCase(
        lambda h=1.0: fr.trace(0.5 * h, nesterov=True), lambda s, h: s.g + 0.5 * h * _trace(s.gs, 0.5 * h)
    ),
    "ema": TransformCase(lambda h=1.0: fr.ema(0.5 * h), lambda s, h: _hat(s.gs, 0.5 * h)),
    "ema not debiased": TransformCase(lambda h=1.0: fr.ema(0.5 * h, debias=False), lambda s, h: _mean(s.gs, 0.5 * h)),
    "scale_by_adam": TransformCase(lambda h=1.0: fr.scale_by_adam(eps=0.1 * h), lambda s, h: _adam(s, eps=0.1 * h)),
    "scale_by_adam below the root": TransformCase(
        lambda h=1.0: fr.scale_by_adam(0.5, 0.75, 0.1, 0.2 * h), lambda s, h: _adam(s, 0.5, 0.75, 0.1, 0.2 * h)
    ),
    "scale_by_adam nesterov": TransformCase(
        lambda h=1.0: fr.scale_by_adam(b1=0.5 * h, nesterov=True), lambda s, h: _nadam(s, 0.5 * h)
    ),
    "scale_by_amsgrad": TransformCase(lambda h=1.0: fr.scale_by_amsgrad(), lambda s, h: _amsgrad(s)),
    "scale_by_rms": TransformCase(
        lambda h=1.0: fr.scale_by_rms(eps=0.1 * h), lambda s, h: s.g / (_mean(s.gs, 0.9, 2) + 0.1 * h).sqrt()
    ),
    "scale_by_rms corrected": TransformCase(
        lambda h=1.0: fr.scale_by_rms(eps=0.1 * h, eps_in_sqrt=False, bias_correction=True),
        lambda s, h: s.g / (_hat(s.gs, 0.9, 2).sqrt() + 0.1 * h),
    ),
    "scale_by_stddev": TransformCase(
        lambda h=1.0: fr.scale_by_stddev(eps=0.1 * h, initial_scale=0.3),
        lambda s, h: s.g / (_mean(s.gs, 0.9, 2, 0.3) - _mean(s.gs, 0.9) ** 2 + 0.1 * h).sqrt(),
    ),
    "scale_by_rss": TransformCase(
        lambda h=1.0: fr.scale_by_rss(0.1 * h),
        lambda s, h: s.g / (0.1 * h + 1e-7 + torch.stack(s.gs).square().sum(0)).sqrt(),
    ),
    "scale_by_sign": TransformCase(
        lambda h=1.0: fr.scale_by_sign(), lambda s, h: s.g / s.g.abs().clamp(min=1e-300), differentiable=False
    ),
    "scale_by_lion": TransformCase(
        lambda h=1.0: fr.scale_by_lion(),
        lambda s, h: torch.sign(0.9 * _mean(s.gs[:-1], 0.99) + 0.1 * s.g),
        differentiable=False,
    ),
    "scale_by_trust_ratio": TransformCase(
        lambda h=1.0: fr.scale_by_trust_ratio(trust_coefficient=h), lambda s, h: h * _trust(s.g, s.w)
    ),
    "clip": TransformCase(lambda h=1.0: fr.clip(0.5 * h), lambda s, h: s.g.clamp(-0.5 * h, 0.5 * h)),
    "clip_by_global_norm": TransformCase(
        lambda h=1.0: fr.clip_by_global_norm(h), lambda s, h: s.g * min(1.0, h / float(s.norms[-1]))
    ),
    "clip_by_block_rms": TransformCase(
        lambda h=1.0: fr.clip_by_block_rms(0.5 * h),
        lambda s, h: s.g / (s.g.square().mean().sqrt() / (0.5 * h)).clamp(min=1),
    ),
    "adaptive_grad_clip": TransformCase(
        lambda h=1.0: fr.adaptive_grad_clip(0.5 * h, axis=...),
        lambda s, h: s.g * (0.5 * h * _unit(s.w).clamp(min=1e-3) / _unit(s.g).clamp(min=1e-9)).clamp(max=1),
    ),
    "zero_nans": TransformCase(lambda h=1.0: fr.zero_nans(), lambda s, h: s.g.nan_to_num()),
    "centralize": TransformCase(lambda h=1.0: fr.centralize(), lambda s, h: s.g - _row_means(s.g)),
    "keep_params_nonnegative": TransformCase(
        lambda h=1.0: fr.keep_params_nonnegative(), lambda s, h: torch.maximum(s.g, -s.w)
    ),
    "add_decayed_weights": TransformCase(
        lambda h=1.0: fr.add_decayed_weights(0.1 * h), lambda s, h: s.g + 0.1 * h * s.w
    ),
    "add_decayed_weights on a schedule": TransformCase(
        lambda h=1.0: fr.add_decayed_weights(lambda count: h * falling(count)), lambda s, h: s.g + h * s.w / s.n
    ),
    "add_penalty": TransformCase(
        lambda h=1.0: fr.add_penalty(fr.elastic, 0.5, 0.25, strength=0.1 * h),
        lambda s, h: s.g + 0.05 * h * (0.25 * s.w.sign() + 0.75 * s.w),
    ),
    "add_penalty with a hyperparameter on a schedule": TransformCase(
        lambda h=1.0: fr.add_penalty(fr.elastic, falling, 0.25, strength=0.1 * h),
        lambda s, h: s.g + 0.1 * h / s.n * (0.25 * s.w.sign() + 0.75 * s.w),
    ),
    "proximal": TransformCase(
        lambda h=1.0: fr.proximal(fr.group_lasso, 0.8 * h), lambda s, h: _group(s.w + s.g, 0.8 * h) - s.w
    ),
    "soft_threshold": TransformCase(
        lambda h=1.0: fr.soft_threshold(0.4 * h), lambda s, h: _soft(s.w + s.g, 0.4 * h) - s.w
    ),
    "soft_threshold on a schedule": TransformCase(
        lambda h=1.0: fr.soft_threshold(lambda count: h * falling(count)), lambda s, h: _soft(s.w + s.g, h / s.n) - s.w
    ),
    "add_cautious_weight_decay": TransformCase(
        lambda h=1.0: fr.add_cautious_weight_decay(0.1 * h),
        lambda s, h: _cautious(s.g, s.w, 0.1 * h),
        differentiable=False,  # It jumps where a gradient is 0.
    ),
    "add_independent_weight_decay": TransformCase(
        lambda h=1.0: fr.add_independent_weight_decay(0.1 * h), lambda s, h: s.g - 0.1 * h * s.w
    ),
    "add_independent_weight_decay along a schedule": TransformCase(
        lambda h=1.0: fr.add_independent_weight_decay(0.1 * h, DOWN, mask=fr.matrices),
        lambda s, h: s.g - 0.1 * h * (1 - 0.2 * (s.n - 1)) * s.w if s.w.ndim > 1 else s.g,
    ),
    "add_corrected_weight_decay": TransformCase(
        lambda h=1.0: fr.add_corrected_weight_decay(0.1 * h, DOWN),
        lambda s, h: s.g + 0.1 * h * (1 - 0.2 * (s.n - 1)) * s.w,
    ),
    "add_corrected_weight_decay of a schedule whose maximum is given": TransformCase(
        lambda h=1.0: fr.add_corrected_weight_decay(0.1 * h, falling, max_rate=2.0),
        lambda s, h: s.g + 0.1 * h / (2 * s.n) * s.w,
    ),
    "add_proximal_weight_decay": TransformCase(
        lambda h=1.0: fr.add_proximal_weight_decay(3.0 * h, falling),
        lambda s, h: (s.w + s.g) / (1 + 3 * h / s.n) - s.w,
    ),
    "add_weight_decay_to_anchor": TransformCase(
        lambda h=1.0: fr.add_weight_decay_to_anchor(0.1 * h), lambda s, h: s.g + 0.1 * h * (s.w - s.ws[0])
    ),
    "add_weight_decay_to_anchor that is given": TransformCase(
        lambda h=1.0: fr.add_weight_decay_to_anchor(lambda count: h * falling(count), anchor=0.25),
        lambda s, h: s.g + h / s.n * (s.w - 0.25),
    ),
    "add_weight_decay_to_ema": TransformCase(
        lambda h=1.0: fr.add_weight_decay_to_ema(0.1 * h, ema_decay=0.5),
        lambda s, h: s.g + 0.1 * h * (s.w - _average(s, 0.5)),
    ),
    "add_l1_weight_decay_to_anchor": TransformCase(
        lambda h=1.0: fr.add_l1_weight_decay_to_anchor(0.1 * h), lambda s, h: s.g + 0.1 * h * (s.w - s.ws[0]).sign()
    ),
    "add_l1_weight_decay_to_ema": TransformCase(
        lambda h=1.0: fr.add_l1_weight_decay_to_ema(0.1 * h, ema_decay=0.5),
        lambda s, h: s.g + 0.1 * h * (s.w - _average(s, 0.5)).sign(),
    ),
    "with_weight_decay": TransformCase(
        lambda h=1.0: fr.with_weight_decay(fr.adam(0.1, eps=0.1), "cautious", 0.5 * h, mask=fr.matrices),
        lambda s, h: -0.1 * (_cautious(_adam(s, eps=0.1), s.w, 0.5 * h) if s.w.ndim > 1 else _adam(s, eps=0.1)),
        differentiable=False,
    ),
    "with_weight_decay on a schedule": TransformCase(
        lambda h=1.0: fr.with_weight_decay(fr.sgd(DOWN, momentum=0.5), "corrected", h),
        lambda s, h: -0.1 * (6 - s.n) * (_trace(s.gs, 0.5) + h * (1 - 0.2 * (s.n - 1)) * s.w),
    ),
    "chain": TransformCase(_clipped_descent, _clipped_descent_equation),
    "named_chain": TransformCase(
        lambda h=1.0: fr.named_chain(("momentum", fr.trace(0.5 * h)), ("step", fr.scale(-0.1))),
        lambda s, h: -0.1 * _trace(s.gs, 0.5 * h),
    ),
    "masked": TransformCase(
        lambda h=1.0: fr.masked(fr.trace(0.5 * h), fr.matrices),
        lambda s, h: _trace(s.gs, 0.5 * h) if s.w.ndim > 1 else s.g,
    ),
    "freeze": TransformCase(
        lambda h=1.0: fr.chain(
            fr.add_decayed_weights(0.1 * h), fr.freeze(fr.matrices), fr.add_decayed_weights(0.1 * h)
        ),
        lambda s, h: 0 * s.g if s.w.ndim > 1 else s.g + 0.2 * h * s.w,
        differentiable=False,
    ),
    "partition": TransformCase(
        lambda h=1.0: fr.partition(
            {True: fr.trace(0.5 * h), False: fr.add_decayed_weights(0.1 * h)}, lambda params: fr.matrices(params)
        ),
        lambda s, h: _trace(s.gs, 0.5 * h) if s.w.ndim > 1 else s.g + 0.1 * h * s.w,
    ),
    "apply_if_finite": TransformCase(
        lambda h=1.0: fr.apply_if_finite(fr.trace(0.5 * h), 2), lambda s, h: _trace(s.gs, 0.5 * h)
    ),
    "sgd": TransformCase(lambda h=1.0: fr.sgd(0.1 * h, 0.5), lambda s, h: -0.1 * h * _trace(s.gs, 0.5)),
    "adam": TransformCase(lambda h=1.0: fr.adam(0.1 * h, eps=0.1), lambda s, h: -0.1 * h * _adam(s, eps=0.1)),
    "adamw": TransformCase(
        lambda h=1.0: fr.adamw(0.1, weight_decay=0.5 * h, mask=fr.matrices, eps=0.1),
        lambda s, h: -0.1 * (_adam(s, eps=0.1) + (0.5 * h * s.w if s.w.ndim > 1 else 0)),
    ),
    "nadamw": TransformCase(
        lambda h=1.0: fr.nadamw(0.1 * h, weight_decay=0.5), lambda s, h: -0.1 * h * (_nadam(s, 0.9) + 0.5 * s.w)
    ),
    "amsgrad": TransformCase(lambda h=1.0: fr.amsgrad(0.1 * h), lambda s, h: -0.1 * h * _amsgrad(s)),
    "lion": TransformCase(
        lambda h=1.0: fr.lion(0.1 * h, weight_decay=0.5),
        lambda s, h: -0.1 * h * (torch.sign(0.9 * _mean(s.gs[:-1], 0.99) + 0.1 * s.g) + 0.5 * s.w),
        differentiable=False,
    ),
    "rmsprop": TransformCase(
        lambda h=1.0: fr.rmsprop(0.1 * h, eps=0.1),
        lambda s, h: -0.1 * h * s.g / (_mean(s.gs, 0.9, 2) + 0.1).sqrt(),
    ),
    "adagrad": TransformCase(
        lambda h=1.0: fr.adagrad(0.1 * h),
        lambda s, h: -0.1 * h * s.g / (0.1 + 1e-7 + torch.stack(s.gs).square().sum(0)).sqrt(),
    ),
    "lamb": TransformCase(
        lambda h=1.0: fr.lamb(0.1 * h, eps=0.1), lambda s, h: -0.1 * h * _trust(_adam(s, eps=0.1), s.w)
    ),
    "prox_sgd": TransformCase(
        lambda h=1.0: fr.prox_sgd(0.1, fr.l1, strength=h, momentum=0.5),
        lambda s, h: _soft(s.w - 0.1 * _trace(s.gs, 0.5), 0.2 * h) - s.w,
    ),
    "prox_sgd with a momentum that may change": TransformCase(
        lambda h=1.0: fr.prox_sgd(0.1, fr.l1, strength=h, momentum=torch.tensor(0.5, device=DEVICE)),
        lambda s, h: _soft(s.w - 0.1 * _trace(s.gs, 0.5), 0.2 * h) - s.w,
    ),
    "prox_sgd on schedules": TransformCase(
        lambda h=1.0: fr.prox_sgd(lambda count: h * falling(count), fr.group_lasso, strength=falling),
        lambda s, h: _group(s.w - h * s.g / s.n, h / s.n**2) - s.w,
    ),
    "prox_adam": TransformCase(
        lambda h=1.0: fr.prox_adam(0.1, fr.l1, strength=h, eps=0.1, weight_decay=0.5),
        lambda s, h: (
            _soft(s.w - 0.1 * (_adam(s, eps=0.1) + 0.5 * s.w), 0.1 * h / (_hat(s.gs, 0.999, 2).sqrt() + 0.1)) - s.w
        ),
    ),
    "prox_adam masked": TransformCase(
        lambda h=1.0: fr.prox_adam(0.1, fr.l1, strength=h, eps=0.1, mask=fr.matrices),
        lambda s, h: (
            _soft(
                s.w - 0.1 * _adam(s, eps=0.1),
                0.1 * h / (_hat(s.gs, 0.999, 2).sqrt() + 0.1) if s.w.ndim > 1 else 0.0,
            )
            - s.w
        ),
    ),
    "prox_adam of groups": TransformCase(
        lambda h=1.0: fr.prox_adam(0.1, fr.sparse_group_lasso, 1.0, 0.5, strength=h, eps=0.1), None
    ),
    "fista": TransformCase(
        lambda h=1.0: fr.fista(0.1, fr.l1, strength=h, restart=False), lambda s, h: _fista(s, 0.1, 0.1 * h)
    ),
    "fista with restart": TransformCase(lambda h=1.0: fr.fista(0.1, fr.l1, strength=h), None),
}


# Constraints


@dataclass(frozen=True)
class ConstraintCase(Given):
    penalty: fr.Constraint
    violation: Callable[[Tensor], Tensor]  # How far one leaf is from allowed, 0 in the set.
    member: Callable[[Tensor], Tensor]  # An allowed leaf made from any leaf, not the nearest one.
    hyper: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    least_ndim: int = 0  # Leaves of fewer dimensions are bad input.
    complex: bool = True  # Takes complex leaves.
    metric: bool = True  # Has a projection in a diagonal metric.
    nonconvex: str = ""  # Why projections may move points apart.
    uncompiled: str = ""  # Why it is left out of compilation into one graph.
    finite: str = ""  # Why an infinite entry has no projection.
    ranked: str = ""  # Why entries beside a NaN stay, though they depend on it.
    batch: Callable[[float], list[float]] = lambda h: [h, h / 2, h / 3]  # Values of a hyperparameter for members.

    def project(self, params: Any, **kwargs: Any) -> Any:
        return self.penalty.project(params, *self.hyper, **self.options, **kwargs)


def _size(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    return w.abs().square().sum(dims, keepdim=True).sqrt() if dims else w.abs()


def _shorter(w: Tensor, dims: tuple[int, ...], radius: float) -> Tensor:
    """Halfway into a ball, so that the boundary is never met."""
    return w * radius / (radius + _size(w, dims))


def _zeros_but(w: Tensor, k: int) -> Tensor:
    """A leaf with all but `k` entries set to zero, the first of each run of four."""
    kept = torch.arange(4, device=w.device) < k
    return w * kept.repeat(max(1, w.numel() // 4))[: w.numel()].reshape(w.shape)


def _beyond(x: Tensor, bound: float) -> Tensor:
    return (x - bound).clamp(min=0).amax() if x.numel() else x.sum()


def _centred(w: Tensor, total: float) -> Tensor:
    return w - w.mean() + total / w.numel() if w.numel() else w


CONSTRAINTS: dict[str, ConstraintCase] = {
    "nonnegative": ConstraintCase(fr.nonnegative, lambda w: _beyond(-w, 0.0), lambda w: w.abs(), complex=False),
    "box": ConstraintCase(
        fr.box,
        lambda w: _beyond((w - 0.2).abs(), 0.5),
        lambda w: 0.2 + 0.5 * w.sin(),
        hyper=(-0.3, 0.7),
        complex=False,
    ),
    "linf_ball": ConstraintCase(
        fr.linf_ball, lambda w: _beyond(w.abs(), 0.5), lambda w: 0.5 * w / (1 + w.abs()), hyper=(0.5,)
    ),
    "l2_ball": ConstraintCase(
        fr.l2_ball,
        lambda w: _beyond(_size(w, _all(w)), 0.7),
        lambda w: _shorter(w, _all(w), 0.7),
        hyper=(0.7,),
    ),
    "l2_ball of columns": ConstraintCase(
        fr.l2_ball,
        lambda w: _beyond(_size(w, _columns(w)), 0.7),
        lambda w: _shorter(w, _columns(w), 0.7),
        hyper=(0.7,),
        options={"dim": 0},
        least_ndim=1,
    ),
    "max_norm": ConstraintCase(
        fr.max_norm,
        lambda w: _beyond(_size(w, _rows(w)), 0.7),
        lambda w: _shorter(w, _rows(w), 0.7),
        hyper=(0.7,),
    ),
    "l2_sphere": ConstraintCase(
        fr.l2_sphere,
        lambda w: _beyond((_size(w, _all(w)) - 0.7).abs(), 0.0) if w.numel() else w.sum(),
        lambda w: 0.7 * w / _size(w, _all(w)),
        hyper=(0.7,),
        metric=False,
        nonconvex="a sphere is hollow",
    ),
    "min_max_norm": ConstraintCase(
        fr.min_max_norm,
        lambda w: _beyond((_size(w, _rows(w)) - 0.5).abs(), 0.2) if w.numel() else w.sum(),
        lambda w: 0.5 * w / _size(w, _rows(w)),
        hyper=(0.3, 0.7),
        metric=False,
        nonconvex="a ball with a hole",
    ),
    "l1_ball": ConstraintCase(
        fr.l1_ball,
        lambda w: _beyond(w.abs().sum(), 0.7),
        lambda w: 0.7 * w / (0.7 + w.abs().sum()),
        hyper=(0.7,),
    ),
    "l1_ball of rows": ConstraintCase(
        fr.l1_ball,
        lambda w: _beyond(w.abs().sum(_rows(w)) if w.ndim > 1 else w.abs(), 0.7),
        lambda w: 0.7 * w / (0.7 + (w.abs().sum(_rows(w), keepdim=True) if w.ndim > 1 else w.abs())),
        hyper=(0.7,),
        options={"dim": ...},
    ),
    "simplex": ConstraintCase(
        fr.simplex,
        lambda w: (w.sum() - 1.5).abs() + _beyond(-w, 0.0) if w.numel() else w.sum(),
        lambda w: 1.5 * w.reshape(-1).softmax(0).reshape(w.shape),
        hyper=(1.5,),
        complex=False,
    ),
    "simplex of columns": ConstraintCase(
        fr.simplex,
        lambda w: _beyond((w.sum(0) - 1.5).abs(), 0.0) + _beyond(-w, 0.0) if w.numel() else w.sum(),
        lambda w: 1.5 * w.softmax(0),
        hyper=(1.5,),
        options={"dim": 0},
        least_ndim=1,
        complex=False,
    ),
    "top_k": ConstraintCase(
        fr.top_k,
        lambda w: _beyond((w != 0).sum().double(), 2.0),
        lambda w: _zeros_but(w, 2) if w.numel() <= 4 else torch.zeros_like(w),
        hyper=(2.0,),
        nonconvex="a union of planes",
        ranked="NaN is kept as the greatest",
        batch=lambda k: [k, k - 1, 0.0],
    ),
    "n_m_sparsity": ConstraintCase(
        fr.n_m_sparsity,
        lambda w: _beyond((w.unflatten(-1, (w.shape[-1] // 4, 4)) != 0).sum(-1).double(), 2.0),
        lambda w: _zeros_but(w, 2),
        hyper=(2.0, 4),
        least_ndim=1,
        nonconvex="a union of planes",
        ranked="NaN is kept as the greatest",
        batch=lambda n: [n, n - 1, 0.0],
    ),
    "hyperplane": ConstraintCase(
        fr.hyperplane,
        lambda w: (2 * w.sum() - 0.6).abs() if w.numel() else w.sum(),
        lambda w: _centred(w, 0.3),
        hyper=(2.0, 0.6),
        complex=False,
        finite="the sum of an infinite entry and others is none of their own",
    ),
    "halfspace": ConstraintCase(
        fr.halfspace,
        lambda w: (2 * w.sum() + 0.6).clamp(min=0) if w.numel() else w.sum(),
        lambda w: _centred(w, -0.3) - w.square().mean() if w.numel() else w,
        hyper=(2.0, -0.6),
        complex=False,
        finite="the sum of an infinite entry and others is none of their own",
    ),
}

TRANSFORMS.update(
    {
        "project": TransformCase(
            lambda h=1.0: fr.project(fr.max_norm, 0.5 * h),
            lambda s, h: (s.w + s.g) * (0.5 * h / _unit(s.w + s.g)).clamp(max=1) - s.w,
        ),
        "project on a schedule": TransformCase(
            lambda h=1.0: fr.project(fr.linf_ball, lambda count: h * falling(count)),
            lambda s, h: (s.w + s.g).clamp(-h / s.n, h / s.n) - s.w,
        ),
    }
)


# Singular values


def _values(w: Tensor) -> Tensor:
    return torch.linalg.svdvals(w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1))


def _smaller_gram(w: Tensor) -> Tensor:
    m = w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
    return m @ m.mH if m.shape[0] <= m.shape[1] else m.mH @ m


def _one_less(gram: Tensor) -> Tensor:
    return gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _row_gram(w: Tensor) -> Tensor:
    m = w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
    return m @ m.mH - torch.diag((m @ m.mH).diagonal())


def _cosine_sum(w: Tensor) -> Tensor:
    m = w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
    lengths = m.abs().square().sum(1, keepdim=True).sqrt()
    unit = m / torch.where(lengths == 0, 1.0, lengths)
    return _row_gram(unit).abs().sum() / max(1, len(m) * (len(m) - 1))


def _hoyer(w: Tensor) -> Tensor:
    squares = w.abs().square().sum()
    return w.abs().sum().square() / torch.where(squares == 0, 1.0, squares)


PENALTIES.update(
    {
        "nuclear": PenaltyCase(fr.nuclear, lambda w: _values(w).sum(), metric=False),
        "spectral": PenaltyCase(
            fr.spectral,
            lambda w: _values(w).amax(),
            metric=False,
            ruleless="level singular values have many slopes",
        ),
        "on_singular_values": PenaltyCase(
            fr.on_singular_values(fr.elastic),
            lambda w: 0.18 * _values(w).sum() + 0.06 * _values(w).square().sum(),
            hyper=(0.3, 0.6),
            metric=False,
            ruleless="the slopes beside the singular vectors are not known to an entry",
        ),
    }
)

#: Penalties that have no proximal operator.
GRADIENT_ALONE: dict[str, PenaltyCase] = {
    "orthogonality": PenaltyCase(
        fr.orthogonality, lambda w: _one_less(_smaller_gram(w)).abs().square().sum(), smooth=True
    ),
    "orthogonality_offdiagonal": PenaltyCase(
        fr.orthogonality_offdiagonal, lambda w: _row_gram(w).abs().square().sum(), smooth=True
    ),
    "keras_orthogonal": PenaltyCase(fr.keras_orthogonal, lambda w: 0.3 * _cosine_sum(w), hyper=(0.3,)),
    "keras_orthogonal of columns": PenaltyCase(
        fr.keras_orthogonal,
        lambda w: 0.3 * _cosine_sum(w.flatten(1).T if w.ndim > 1 else w.reshape(1, -1)),
        hyper=(0.3,),
        options={"mode": "columns"},
    ),
    "srip": PenaltyCase(fr.srip, lambda w: (_values(w).square() - 1).abs().amax()),
    "hoyer_square": PenaltyCase(fr.hoyer_square, _hoyer),
}


def _first_values(w: Tensor, total: float) -> Tensor:
    """A matrix of smaller singular values: divided by a bound on their sum."""
    return w * total / (total + _values(w).sum()) if w.numel() else w


def _orthonormal(w: Tensor) -> Tensor:
    m = w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
    m = m.mH if m.shape[0] < m.shape[1] else m
    q = torch.linalg.qr(m)[0]
    return (q if q.shape == (w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)).shape else q.mH).reshape(w.shape)


CONSTRAINTS.update(
    {
        "spectral_ball": ConstraintCase(
            fr.spectral_ball,
            lambda w: _beyond(_values(w), 0.7) if w.numel() else w.sum(),
            lambda w: _first_values(w, 0.7),
            hyper=(0.7,),
            metric=False,
            finite="a matrix with infinite entries has no singular vectors",
        ),
        "nuclear_ball": ConstraintCase(
            fr.nuclear_ball,
            lambda w: _beyond(_values(w).sum(), 0.7) if w.numel() else w.sum(),
            lambda w: _first_values(w, 0.7),
            hyper=(0.7,),
            metric=False,
            finite="a matrix with infinite entries has no singular vectors",
        ),
        "stiefel": ConstraintCase(
            fr.stiefel,
            lambda w: _one_less(_smaller_gram(w)).abs().amax() if w.numel() else w.sum(),
            _orthonormal,
            metric=False,
            nonconvex="a sphere is hollow",
            finite="a matrix with infinite entries has no singular vectors",
        ),
    }
)


# Separable penalties


def _scad(w: Tensor) -> Tensor:
    a, t, size = 5.0, 0.8, w.abs()
    middle = (2 * a * t * size - size.square() - t * t) / (2 * (a - 1))
    return torch.where(size <= t, t * size, torch.where(size <= a * t, middle, t * t * (a + 1) / 2)).sum()


PENALTIES.update(
    {
        "l0": PenaltyCase(fr.l0, lambda w: (w.abs() > 0).double().sum(), nonconvex="jumps at zero"),
        "l_half": PenaltyCase(fr.l_half, lambda w: w.abs().sqrt().sum(), nonconvex="concave away from zero"),
        "l_two_thirds": PenaltyCase(
            fr.l_two_thirds, lambda w: w.abs().pow(2).pow(1 / 3).sum(), nonconvex="concave away from zero"
        ),
        "log_sum": PenaltyCase(
            fr.log_sum, lambda w: (1 + w.abs() / 0.4).log().sum(), hyper=(0.4,), nonconvex="concave away from zero"
        ),
        "mcp": PenaltyCase(
            fr.mcp,
            lambda w: torch.where(w.abs() <= 2.4, 0.8 * w.abs() - w.abs().square() / 6, 0.96).sum(),
            hyper=(0.8, 3.0),
            nonconvex="levels off",
        ),
        "scad": PenaltyCase(
            fr.scad, _scad, hyper=(0.8, 5.0), nonconvex="levels off", batch=lambda h: [h, 0.8 * h, 0.6 * h]
        ),
        "capped_l1": PenaltyCase(
            fr.capped_l1, lambda w: w.abs().clamp(max=0.6).sum(), hyper=(0.6,), nonconvex="levels off"
        ),
        "huber": PenaltyCase(
            fr.huber,
            lambda w: torch.where(w.abs() <= 0.7, w.abs().square() / 2, 0.7 * (w.abs() - 0.35)).sum(),
            hyper=(0.7,),
            smooth=True,
        ),
        "anchored_l1": PenaltyCase(fr.anchored_l1, lambda w: (w - 0.3).abs().sum(), hyper=(0.3,), centre=0.3),
        "anchored_l2": PenaltyCase(
            fr.anchored_l2, lambda w: (w - 0.3).abs().square().sum(), hyper=(0.3,), smooth=True, centre=0.3
        ),
        "ewc": PenaltyCase(
            fr.ewc, lambda w: 0.25 * (w + 0.3).abs().square().sum(), hyper=(-0.3, 0.5), smooth=True, centre=-0.3
        ),
    }
)


def _envelope(sizes: Tensor, gamma: float) -> Tensor:
    return (1 - gamma / 2 * ((2 / gamma) ** 0.5 - sizes).clamp(min=0) ** 2).sum()


PENALTIES.update(
    {
        "etp": PenaltyCase(
            fr.etp,
            lambda w: (1 - (-1.5 * w.abs()).exp()).sum() / (1 - math.exp(-1.5)),
            hyper=(1.5,),
            nonconvex="levels off",
        ),
        "geman": PenaltyCase(
            fr.geman, lambda w: (w.abs() / (w.abs() + 0.7)).sum(), hyper=(0.7,), nonconvex="levels off"
        ),
        "relaxed_mumford_shah": PenaltyCase(
            fr.relaxed_mumford_shah,
            lambda w: torch.where(w.abs() < (0.8 / 0.6) ** 0.5, 0.6 * w.abs().square(), 0.8).sum(),
            hyper=(0.6, 0.8),
            smooth=True,
            nonconvex="levels off",
        ),
        "l0_envelope": PenaltyCase(
            fr.l0_envelope, lambda w: _envelope(w.abs(), 0.6), hyper=(0.6,), nonconvex="levels off"
        ),
        "rank_envelope": PenaltyCase(
            fr.rank_envelope,
            lambda w: _envelope(_values(w), 0.6),
            hyper=(0.6,),
            metric=False,
            ruleless="the slopes beside the singular vectors are not known to an entry",
            nonconvex="levels off",
        ),
        "group_l_half": PenaltyCase(
            fr.group_l_half,
            lambda w: _size(w, _rows(w)).sqrt().sum(),
            metric=False,
            nonconvex="concave away from zero",
        ),
    }
)

CONSTRAINTS.update(
    {
        "group_top_k": ConstraintCase(
            fr.group_top_k,
            lambda w: _beyond((_size(w, _rows(w)) != 0).sum().double(), 2.0),
            lambda w: torch.cat([w[:2], 0 * w[2:]]) if w.ndim else w,
            hyper=(2.0,),
            nonconvex="a union of planes",
            ranked="NaN is kept as the greatest",
            batch=lambda k: [k, k - 1, 0.0],
        ),
        "sparse_simplex": ConstraintCase(
            fr.sparse_simplex,
            lambda w: _beyond((w != 0).sum().double(), 2.0) + (w.sum() - 1.5).abs() if w.numel() else w.sum(),
            lambda w: torch.zeros_like(w).reshape(-1).index_fill(0, w.new_zeros(1).long(), 1.5).reshape(w.shape),
            hyper=(2.0, 1.5),
            complex=False,
            metric=False,
            nonconvex="a union of simplices",
            batch=lambda h: [h, 2.0, 1.0],
        ),
    }
)


# Polytopes


def _even(w: Tensor, total: float) -> Tensor:
    """A matrix of even sums of rows and columns, with something of the leaf in it."""
    m = w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
    if not m.numel():
        return w
    m = m - m.mean(0) - m.mean(1, keepdim=True) + m.mean()
    return (total / m.numel() * (1 + m / (1 + m.abs().amax()))).reshape(w.shape)


def _uneven(w: Tensor, total: float | None) -> Tensor:
    m = w.flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
    if not m.numel():
        return w.sum()
    whole = m.shape[0] if total is None else total
    off = [m.sum(1) - whole / m.shape[0], m.sum(0) - whole / m.shape[1]]
    return torch.cat(off).abs().amax() + _beyond(-m, 0.0)


EQUATIONS = [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 2.0, 0.5]]
INEQUALITIES = [[1.0, 1.0, 0.0, 0.0], [0.0, -1.0, 1.0, 1.0], [-1.0, 0.0, 0.0, -1.0]]


def _left_side(w: Tensor, rows: list[list[float]], offset: list[float]) -> Tensor:
    return w @ torch.tensor(rows, dtype=w.dtype).T - torch.tensor(offset, dtype=w.dtype)


def _solved(w: Tensor) -> Tensor:
    """The first two entries of four are those that solve both equations."""
    if not w.numel():
        return w
    c, d = w[..., 2], w[..., 3]
    both, apart = 0.6 - c - d, -0.2 - 2 * c - 0.5 * d
    return torch.stack([(both + apart) / 2, (both - apart) / 2, c, d], -1)


CONSTRAINTS.update(
    {
        "box_section": ConstraintCase(
            fr.box_section,
            lambda w: (2 * w.sum() - 0.6).abs() + _beyond(-0.3 - w, 0.0) + _beyond(w, 0.7) if w.numel() else w.sum(),
            lambda w: 0.3 / w.numel() + 0.25 * (w - w.mean()) / (1 + (w - w.mean()).abs().amax()) if w.numel() else w,
            hyper=(-0.3, 0.7, 2.0, 0.6),
            complex=False,
            finite="the sum of an infinite entry and others is none of their own",
        ),
        "affine_set": ConstraintCase(
            fr.affine_set,
            lambda w: _left_side(w, EQUATIONS, [0.6, -0.2]).abs().amax() if w.numel() else w.sum(),
            _solved,
            options={"matrix": EQUATIONS, "offset": [0.6, -0.2], "dim": -1},
            least_ndim=1,
            complex=False,
            finite="the sum of an infinite entry and others is none of their own",
        ),
        "polyhedron": ConstraintCase(
            fr.polyhedron,
            lambda w: _left_side(w, INEQUALITIES, [0.5, 0.3, 0.4]).amax().clamp(min=0) if w.numel() else w.sum(),
            lambda w: 0.15 * w / (1 + w.abs()),
            options={"matrix": INEQUALITIES, "offset": [0.5, 0.3, 0.4], "dim": -1},
            least_ndim=1,
            uncompiled="its many steps are traced for long",
            complex=False,
            finite="the sum of an infinite entry and others is none of their own",
        ),
        "polyhedron with equations": ConstraintCase(
            fr.polyhedron,
            lambda w: (w.sum(-1) - 1).abs().amax() + _beyond(-w, 0.0) if w.numel() else w.sum(),
            lambda w: w.softmax(-1) if w.numel() else w,
            options={
                "matrix": [[-1.0 if i == j else 0.0 for j in range(4)] for i in range(4)],
                "equations": ([[1.0, 1.0, 1.0, 1.0]], 1.0),
                "dim": -1,
            },
            uncompiled="its rules are in the graph of another row",
            least_ndim=1,
            complex=False,
            finite="the sum of an infinite entry and others is none of their own",
        ),
        "transport": ConstraintCase(
            fr.transport,
            lambda w: _uneven(w, 1.5),
            lambda w: _even(w, 1.5),
            hyper=(1.5,),
            complex=False,
            metric=False,
            uncompiled="its many steps are traced for long",
            finite="an infinite entry is beyond what its row and column may hold",
        ),
        "birkhoff": ConstraintCase(
            fr.birkhoff,
            lambda w: _uneven(w, None),
            lambda w: _even(w, w.shape[0] if w.ndim else 1.0),
            complex=False,
            metric=False,
            uncompiled="its many steps are traced for long",
            finite="an infinite entry is beyond what its row and column may hold",
        ),
    }
)


# Penalties of groups that span leaves


def _by_rows(params: Any) -> list[dict[str, int | fr.Along]]:
    """Leaves whose first dimensions are equal share their groups."""
    families: dict[int, dict[str, int | fr.Along]] = {}
    for name, leaf in zip(fr.tree_paths(params), fr.tree_leaves(params), strict=True):
        families.setdefault(leaf.shape[0], {})[name] = 0
    return list(families.values())


PENALTIES.update(
    {
        "coupled group_lasso": PenaltyCase(
            fr.coupled(fr.group_lasso, _by_rows), None, unweighted="leaves share norms, and have weights="
        ),
        "coupled sparse_group_lasso by size": PenaltyCase(
            fr.coupled(fr.sparse_group_lasso, _by_rows),
            None,
            hyper=(0.5, 0.4),
            options={"weights": "sqrt_size"},
            unweighted="leaves share norms, and have weights=",
        ),
    }
)


# Groups, vectors and orders


def _norms_of_rows(w: Tensor) -> Tensor:
    return w.abs().square().sum(_rows(w)).sqrt() if w.ndim > 1 else w.abs()


def _mcp_of_norms(n: Tensor, alpha: float, gamma: float) -> Tensor:
    reached = n.clamp(max=gamma * alpha)
    return (alpha * reached - reached**2 / (2 * gamma)).sum()


def _scad_of_norms(n: Tensor, alpha: float, a: float) -> Tensor:
    """The integral of its slope, piece by piece."""
    bent = n.clamp(alpha, a * alpha) - alpha
    return (alpha * n.clamp(max=alpha) + alpha * bent - bent**2 / (2 * (a - 1))).sum()


PENALTIES.update(
    {
        "group_mcp": PenaltyCase(
            fr.group_mcp,
            lambda w: _mcp_of_norms(_norms_of_rows(w), 0.7, 2.0),
            hyper=(0.7, 2.0),
            nonconvex="levels off",
        ),
        "group_scad": PenaltyCase(
            fr.group_scad,
            lambda w: _scad_of_norms(_norms_of_rows(w), 0.7, 5.0),
            hyper=(0.7, 5.0),
            nonconvex="levels off",
            batch=lambda h: [h, 0.8 * h, 0.6 * h],
        ),
        "group_l0": PenaltyCase(
            fr.group_l0, lambda w: (_norms_of_rows(w) != 0).double().sum(), nonconvex="jumps at zero"
        ),
        "linf": PenaltyCase(fr.linf, lambda w: w.abs().max(), uncompiled="its rules are in the graph of another row"),
        "linf of columns": PenaltyCase(
            fr.linf,
            lambda w: w.abs().amax(0).sum(),
            options={"dim": 0, "weights": None},
            least_ndim=1,
            uncompiled="its rules are in the graph of another row",
        ),
        "l1_linf": PenaltyCase(
            fr.l1_linf,
            lambda w: w.abs().reshape((*w.shape[:1], -1)).amax(1).sum() if w.ndim > 1 else w.abs().sum(),
        ),
        "exclusive_lasso": PenaltyCase(
            fr.exclusive_lasso,
            lambda w: w.abs().sum(_rows(w)).square().sum() if w.ndim > 1 else w.abs().square().sum(),
            smooth=True,
        ),
        "exclusive_lasso of leaves": PenaltyCase(
            fr.exclusive_lasso,
            lambda w: w.abs().sum().square(),
            options={"dim": None},
            smooth=True,
            uncompiled="its rules are in the graph of another row",
        ),
        "total_variation": PenaltyCase(
            fr.total_variation,
            lambda w: w.diff(dim=-1).abs().sum(),
            smooth=True,
            least_ndim=1,
            complex=False,
            uncompiled="its rules are in the graph of another row",
        ),
        "total_variation of columns": PenaltyCase(
            fr.total_variation,
            lambda w: w.diff(dim=0).abs().sum(),
            options={"dim": 0},
            uncompiled="its rules are in the graph of another row",
            smooth=True,
            least_ndim=1,
            complex=False,
        ),
        "fused_lasso": PenaltyCase(
            fr.fused_lasso,
            lambda w: 0.3 * w.abs().sum() + 0.2 * w.diff(dim=-1).abs().sum(),
            hyper=(0.5, 0.6),
            least_ndim=1,
            complex=False,
            tied="jumps pull at a zero, and the magnitude holds it",
        ),
        "slope": PenaltyCase(
            fr.slope,
            lambda w: 0.5 * w.abs().sum(),
            hyper=(0.5,),
            metric=False,
            inner_steps=100,
            ruleless="no closed form is known",
        ),
        "oscar": PenaltyCase(
            fr.oscar,
            lambda w: (
                0.3 * w.abs().sum() + 0.1 * torch.maximum(w.abs().reshape(-1, 1), w.abs().reshape(1, -1)).triu(1).sum()
            ),
            hyper=(0.3, 0.1),
            options={"dim": None},
            metric=False,
            inner_steps=100,
            ruleless="no closed form is known",
        ),
        "oscar of rows": PenaltyCase(
            fr.oscar,
            lambda w: (
                sum((PENALTIES["oscar"].equation(row) for row in w), torch.zeros(()).to(w.real))
                if w.ndim > 1
                else 0.3 * w.abs().sum()
            ),
            hyper=(0.3, 0.1),
            options={"dim": ...},
            uncompiled="its rules are in the graph of another row",
            metric=False,
            inner_steps=100,
            ruleless="no closed form is known",
        ),
        "tree_lasso": PenaltyCase(
            fr.tree_lasso,
            lambda w: (
                w.abs().square().sum().sqrt() + w[0].abs().square().sum().sqrt() + w[1:].abs().square().sum().sqrt()
            ),
            options={"groups": (((0,), (1, ...)),)},
            metric=False,
            inner_steps=100,
            unshaped="groups name rows that a leaf may not have",
        ),
        "tree_lasso of one group": PenaltyCase(
            fr.tree_lasso,
            lambda w: w.abs().square().sum().sqrt(),
            options={"groups": ((...,),), "axis": -1},
            metric=False,
            inner_steps=100,
            least_ndim=1,
            uncompiled="its rules are in the graph of another row",
        ),
    }
)


# Sums


PENALTIES.update(
    {
        "a given one": PenaltyCase(
            fr.elastic.given(0.3, rho=0.6), lambda w: 0.18 * w.abs().sum() + 0.06 * (w * w.conj()).real.sum()
        ),
        "a multiple": PenaltyCase(0.7 * fr.group_lasso, lambda w: 0.7 * _sum_of_norms(_rows)(w)),
        "ridge + l1": PenaltyCase(
            0.3 * fr.half_l2 + fr.l1 * 0.8, lambda w: 0.15 * (w * w.conj()).real.sum() + 0.8 * w.abs().sum()
        ),
        "two ridges": PenaltyCase(
            0.3 * (fr.half_l2 + 0.5 * fr.l2), lambda w: 0.3 * (w * w.conj()).real.sum(), smooth=True
        ),
        "groups + elastic": PenaltyCase(
            fr.group_lasso.given(dim=None) + fr.elastic.given(0.3, 0.6),
            lambda w: 0.18 * w.abs().sum() + 0.06 * (w * w.conj()).real.sum() + _sum_of_norms(_all)(w),
        ),
        "nested groups + l1 + ridge": PenaltyCase(
            0.5 * fr.group_lasso.given(dim=None)
            + 0.3 * fr.sparse_group_lasso.given(0.5, 0.4, weights="sqrt_size")
            + fr.l2,
            lambda w: (
                0.5 * _sum_of_norms(_all)(w)
                + 0.15 * (0.4 * w.abs().sum() + 0.6 * _sum_of_norms(_rows, root=True)(w))
                + (w * w.conj()).real.sum()
            ),
            metric=False,  # Groups in groups compose with one step for all entries alone.
        ),
        "a sum on some leaves": PenaltyCase(
            fr.l1.given(mask=fr.matrices) + 0.5 * fr.group_lasso + 0.2 * fr.half_l2.given(mask=fr.matrices),
            lambda w: 0.5 * _sum_of_norms(_rows)(w) + (w.ndim > 1) * (w.abs().sum() + 0.1 * (w * w.conj()).real.sum()),
            least_ndim=2,  # A mask may not choose nothing, as that of matrices does where there is none.
        ),
    }
)

TRANSFORMS.update(
    {
        "add_penalty of a sum": TransformCase(
            lambda h=1.0: fr.add_penalty(fr.l1.given(strength=0.1 * h) + fr.l2, strength=0.5),
            lambda s, h: s.g + 0.05 * h * s.w.sign() + s.w,
        ),
        "prox_adam of a sum": TransformCase(
            lambda h=1.0: fr.prox_adam(0.1, fr.l1.given(strength=h) + 0.5 * fr.half_l2, eps=0.1),
            lambda s, h: (
                _soft(
                    (_hat(s.gs, 0.999, 2).sqrt() + 0.1) * s.w - 0.1 * _hat(s.gs, 0.9),
                    0.1 * h,
                )
                / (_hat(s.gs, 0.999, 2).sqrt() + 0.1 + 0.05)
                - s.w
            ),
        ),
    }
)


# Under noise


def _weighted(s: Seen, rate: float, power: int) -> Tensor:
    return sum((rate * math.sqrt(i + 1) * g**power for i, g in enumerate(s.gs)), torch.zeros(()))


def _rmda(s: Seen, rate: float, strength: float) -> Tensor:
    whole, root = sum(rate * math.sqrt(i + 1) for i in range(s.n)), math.sqrt(s.n)
    return _soft(s.ws[0] - _weighted(s, rate, 1) / root, whole * strength / root)


def _ramda(s: Seen, rate: float, strength: float, eps: float) -> Tensor:
    whole, h = sum(rate * math.sqrt(i + 1) for i in range(s.n)), _weighted(s, rate, 2) ** (1 / 3) + eps
    return _soft(s.ws[0] - _weighted(s, rate, 1) / h, whole * strength / h)


def _ftrl(s: Seen, rate: float, strengths: list[float]) -> Tensor:
    """As McMahan and others write it, but for a start that is not zero."""
    z, n = -s.ws[0] / rate, torch.zeros_like(s.w)
    for g, w in zip(s.gs, s.ws, strict=True):
        sigma = ((n + g * g).sqrt() - n.sqrt()) / rate
        z, n = z + g - sigma * w, n + g * g
    return -_soft(z, sum(strengths)) / ((1 + n.sqrt()) / rate)


TRANSFORMS.update(
    {
        # A tensor for a key, which is the same for all members of a loop.
        "add_noise": TransformCase(lambda h=1.0: fr.add_noise(0.1 * h, 0.55, torch.tensor(3, device=DEVICE)), None),
        "add_noise on a schedule": TransformCase(
            lambda h=1.0: fr.add_noise(lambda count: h * falling(count), 0.0, torch.tensor(4, device=DEVICE)), None
        ),
        "rmda": TransformCase(
            lambda h=1.0: fr.rmda(0.1 * h, fr.l1, strength=0.5), lambda s, h: _rmda(s, 0.1 * h, 0.5) - s.w
        ),
        "rmda with momentum": TransformCase(
            lambda h=1.0: fr.rmda(0.1, fr.l1, strength=0.5 * h, momentum=0.25, mask=fr.matrices),
            lambda s, h: 0.75 * (_rmda(s, 0.1, 0.5 * h * (s.w.ndim > 1)) - s.w),
        ),
        "ramda": TransformCase(
            lambda h=1.0: fr.ramda(0.1, fr.l1, strength=0.5 * h, eps=0.1),
            lambda s, h: _ramda(s, 0.1, 0.5 * h, 0.1) - s.w,
        ),
        "ramda of groups": TransformCase(
            lambda h=1.0: fr.ramda(0.1, fr.sparse_group_lasso, 1.0, 0.5, strength=h, eps=0.1), None
        ),
        "ftrl": TransformCase(
            lambda h=1.0: fr.ftrl(0.5, fr.l1, strength=0.3 * h), lambda s, h: _ftrl(s, 0.5, [0.3 * h] * s.n) - s.w
        ),
        "ftrl of a single round": TransformCase(
            lambda h=1.0: fr.ftrl(0.5, fr.l1, strength=lambda count: h * falling(count)),
            lambda s, h: _ftrl(s, 0.5, [h]) - s.w,
        ),
        "adamprox": TransformCase(
            lambda h=1.0: fr.adamprox(0.1, 30.0 * h, eps=0.1),
            lambda s, h: (s.w - 0.1 * _adam(s, eps=0.1)) / (1 + 3 * h) - s.w,
        ),
        "adamprox on a schedule, masked": TransformCase(
            lambda h=1.0: fr.adamprox(falling, h, eps=0.1, mask=fr.matrices),
            lambda s, h: (s.w - _adam(s, eps=0.1) / s.n) / (1 + (s.w.ndim > 1) * h / s.n) - s.w,
        ),
    }
)

PENALTIES.update(
    {
        "schatten": PenaltyCase(
            fr.schatten,
            lambda w: _values(w).sqrt().sum(),
            options={"p": 0.5},
            metric=False,
            ruleless="the slopes beside the singular vectors are not known to an entry",
            nonconvex="concave away from zero",
        ),
        "spectral_mcp": PenaltyCase(
            fr.spectral_mcp,
            lambda w: torch.where(_values(w) <= 2.4, 0.8 * _values(w) - _values(w).square() / 6, 0.96).sum(),
            hyper=(0.8, 3.0),
            metric=False,
            ruleless="the slopes beside the singular vectors are not known to an entry",
            nonconvex="levels off",
        ),
    }
)


# Proximal steps in a metric


def _proximal_step(s: Seen, direction: Tensor, metric: Tensor, strength: float, rate: float = 0.1) -> Tensor:
    return _soft(s.w - rate * direction, rate * strength / metric) - s.w


def _rss(s: Seen) -> Tensor:
    return (0.2 + 1e-7 + torch.stack(s.gs).square().sum(0)).sqrt()


def _capped(s: Seen, metric: Tensor, strength: float) -> Tensor:
    free = metric.clamp(min=0.1 / 0.09)
    return _proximal_step(s, s.g / free, free, strength)


TRANSFORMS.update(
    {
        "proximal_step of RMSprop": TransformCase(
            lambda h=1.0: fr.proximal_step(fr.scale_by_rms(eps=0.1), 0.1, fr.l1, strength=h),
            lambda s, h: _proximal_step(s, s.g / (v := (_mean(s.gs, 0.9, 2) + 0.1).sqrt()), v, h),
        ),
        "proximal_step of centred RMSprop on schedules": TransformCase(
            lambda h=1.0: fr.proximal_step(
                fr.scale_by_stddev(eps=0.3), lambda count: h * falling(count), fr.l1, strength=falling
            ),
            lambda s, h: _proximal_step(
                s, s.g / (v := (_mean(s.gs, 0.9, 2) - _mean(s.gs, 0.9) ** 2 + 0.3).sqrt()), v, 1 / s.n, h / s.n
            ),
        ),
        "proximal_step of AMSGrad with decay": TransformCase(
            lambda h=1.0: fr.proximal_step(
                fr.scale_by_amsgrad(eps=0.1, eps_root=0.1), 0.1, fr.l1, strength=h, weight_decay=0.5
            ),
            lambda s, h: _proximal_step(
                s,
                _hat(s.gs, 0.9)
                / (v := torch.stack([_hat(s.gs[: i + 1], 0.999, 2) for i in range(s.n)]).amax(0).add(0.1).sqrt() + 0.1)
                + 0.5 * s.w,
                v,
                h,
            ),
        ),
        "proximal_step of AdaGrad, capped": TransformCase(
            lambda h=1.0: fr.proximal_step(fr.scale_by_rss(0.2), 0.1, fr.l1, strength=h, max_step=0.09),
            lambda s, h: _capped(s, _rss(s), h),
        ),
        "proximal_step of one number a leaf": TransformCase(
            lambda h=1.0: fr.proximal_step(fr.scale_by_rss(0.2), 0.1, fr.l1, strength=h, inner_steps=1),
            lambda s, h: _proximal_step(s, s.g / _rss(s).amax(), _rss(s).amax(), h),
        ),
        "proximal_step of groups that all leaves share": TransformCase(
            lambda h=1.0: fr.proximal_step(
                fr.scale_by_adam(eps=0.1), 0.1, joint, strength=h, inner_steps=3, mask=fr.matrices
            ),
            None,
        ),
    }
)


# Factored, orthogonal and mixed steps, and those that see the objective


TAKES_MORE = "it does not read the extra arguments of an update that is defined inside of compiled code"


@remembered
def with_value(tx: fr.Transform, value: float) -> fr.Transform:
    """A transform that takes the value of an objective, always given the same one."""
    return fr.Transform(tx.init, lambda updates, state, params: tx.update(updates, state, params, value=value))


@remembered
def with_objective(tx: fr.Transform) -> fr.Transform:
    """A transform that takes an objective, given a parabola with the gradient that comes, of curvature 1."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def f(there: Any) -> Tensor:
            parabola = lambda x, w, g: g * (x - w) + 0.5 * (x - w) * (x - w)
            return total(reduce_leaves(parabola, there, params, updates))

        return tx.update(updates, state, params, value=0.0, grad=updates, value_fn=f)

    return fr.Transform(tx.init, update)


def _outputs_first(params: Any) -> Any:
    numbers = {2: fr.MuonDimensionNumbers(1, 0), 4: fr.MuonDimensionNumbers((1, 2, 3), 0)}
    return fr.tree_map(lambda w: numbers.get(w.ndim), params)


def _orthogonal(m: Tensor, steps: int = 5, eps: float = 1e-8) -> Tensor:
    """Newton-Schulz steps on the singular values of a matrix."""
    u, sizes, v = torch.linalg.svd(m.flatten(1), full_matrices=False)
    sizes = sizes / (sizes.square().sum().sqrt() + eps)
    for _ in range(steps):
        sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
    return (u * sizes @ v).reshape(m.shape)


def _nesterov(s: Seen, b: float) -> Tensor:
    return b * _mean(s.gs, b) / (1 - b ** (s.n + 1)) + (1 - b) * s.g / (1 - b**s.n)


def _factored(s: Seen, rate: float = 0.8, eps: float = 1e-30) -> Tensor:
    """The update over the root of what Adafactor takes for the mean square."""
    shorter, longer = ([], []) if s.w.ndim < 2 else [[d] for d in ((1, 0) if s.w.ndim == 2 else (3, 0))]
    row = column = 0.0
    for n, g in enumerate(s.gs, start=1):
        kept = 1 - n**-rate
        squares = g * g + eps
        row = kept * row + (1 - kept) * (squares.mean(longer, keepdim=True) if longer else squares)
        column = kept * column + (1 - kept) * (squares.mean(shorter, keepdim=True) if shorter else squares)
    return s.g / (row.sqrt() if not longer else (row / row.mean(shorter, keepdim=True)).sqrt() * column.sqrt())


def _adafactor(s: Seen, rate: float) -> Tensor:
    u = _factored(s)
    size = s.w.square().mean().sqrt().clamp(min=1e-3)
    return -rate * size * u / u.square().mean().sqrt().clamp(min=1)


def _ademamix(s: Seen, b3: float, alpha: float, eps: float) -> Tensor:
    return (_hat(s.gs, 0.9) + alpha * _mean(s.gs, b3)) / (_hat(s.gs, 0.999, 2).sqrt() + eps)


def _adopt(s: Seen, b1: float, b2: float) -> Tensor:
    m, v = torch.zeros_like(s.g), s.gs[0] ** 2
    for n, g in enumerate(s.gs[1:], start=1):
        m = b1 * m + (1 - b1) * (g / v.sqrt().clamp(min=1e-6)).clamp(-(n**0.25), n**0.25)
        v = b2 * v + (1 - b2) * g * g
    return m


def _searched(s: Seen, rate: float) -> Tensor:
    """A step doubles until the slope along it, 1 - rate * step of the first one, is small enough."""
    step = 1.0
    while abs(1 - rate * step) > 0.6:
        step *= 2
    return -rate * step * s.g


def _backtracked(s: Seen, rate: float) -> Tensor:
    step = 1.0
    for _ in s.gs:
        step = min(1.0, 1.5 * step)
        while 0.5 * rate * step > 1 - 1e-4:
            step *= 0.5
    return -rate * step * s.g


# Wrappers


def every_other(step: Any) -> Any:
    """A condition that holds at the second update, the fourth ..."""
    return step % 2 == 1


def _pairs(s: Seen, rate: float) -> Tensor:
    return -rate * (s.gs[-1] + s.gs[-2]) / 2 if s.n % 2 == 0 else 0 * s.g


def _lookahead(s: Seen, rate: float, share: float) -> Tensor:
    slow, u = s.ws[0], s.g
    for i, (w, g) in enumerate(zip(s.ws, s.gs, strict=True)):
        u = -rate * g
        if i % 2 == 1:
            difference = w + u - slow
            u, slow = u - (1 - share) * difference, slow + share * difference
    return u


def _schedule_free(s: Seen, move: Callable[[int, Tensor], Tensor], weights: list[float], b: float = 0.9) -> Tensor:
    """As the paper writes it: z the points of the optimizer, x their average, y between them."""
    z, new = s.ws[0], s.w
    for i, y in enumerate(s.ws):
        x, z = (y - (1 - b) * z) / b, z + move(i, y)
        c = weights[i] / sum(weights[: i + 1])
        new = b * ((1 - c) * x + c * z) + (1 - b) * z
    return new - s.w


def _warmed_rms(s: Seen, h: float) -> Callable[[int, Tensor], Tensor]:
    seen = lambda i: s.gs[: i + 1]
    return lambda i, y: -0.1 * h * min(i / 2, 1) * s.gs[i] / (_hat(seen(i), 0.999, 2).sqrt() + 0.1)


# Other preconditioners and optimizers


def _adamax(s: Seen, eps: float) -> Tensor:
    fading = [0.999 ** (s.n - 1 - i) * (g.abs() + eps) for i, g in enumerate(s.gs)]
    return _hat(s.gs, 0.9) / torch.stack(fading).amax(0)


def _belief_metric(s: Seen, eps: float, root: float = 1e-16) -> Tensor:
    squares = [(g - _mean(s.gs[: i + 1], 0.9)) ** 2 + root / 0.001 for i, g in enumerate(s.gs)]
    return _hat(squares, 0.999).sqrt() + eps


def _yogi(s: Seen, eps: float, first: float) -> Tensor:
    v = torch.full_like(s.g, first)
    for g in s.gs:
        v = v - 0.001 * (v - g**2).sign() * g**2
    return _mean(s.gs, 0.9, first=first) / (1 - 0.9**s.n) / ((v / (1 - 0.999**s.n)).sqrt() + eps)


def _radam_metric(s: Seen, b2: float, eps: float) -> Tensor:
    most = 2 / (1 - b2) - 1
    length = most - 2 * s.n * b2**s.n / (1 - b2**s.n)
    if length < 5:
        return torch.ones_like(s.g)
    r = math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
    return (_hat(s.gs, b2, 2).sqrt() + eps) / r


def _adan(s: Seen, b1: float, b2: float, b3: float, eps: float) -> Tensor:
    changes = [g - last for g, last in zip(s.gs, [s.gs[0], *s.gs[:-1]], strict=True)]
    ahead = [g + (1 - b2) * d for g, d in zip(s.gs, changes, strict=True)]
    return (_hat(s.gs, b1) + (1 - b2) * _hat(changes, b2)) / (_hat(ahead, b3, 2).sqrt() + eps)


def _adadelta(s: Seen, rho: float, eps: float) -> tuple[Tensor, Tensor]:
    """The update and the metric."""
    steps: list[Tensor] = []
    h = torch.ones_like(s.g)
    for i, g in enumerate(s.gs):
        before = _mean(steps, rho, 2) if steps else 0.0
        h = ((_mean(s.gs[: i + 1], rho, 2) + eps) / (before + eps)).sqrt()
        steps.append(g / h)
    return steps[-1], h


def _novograd(s: Seen, decay: float, eps: float) -> Tensor:
    m, v = torch.zeros_like(s.g), s.gs[0].square().sum()
    for i, (g, w) in enumerate(zip(s.gs, s.ws, strict=True)):
        v = 0.25 * v + 0.75 * g.square().sum() if i else v
        m = 0.9 * m + g / (v.sqrt() + eps) + decay * w
    return m


def _sm3(s: Seen, b2: float, eps: float) -> tuple[Tensor, Tensor]:
    """The update and the metric, by slices of each dimension."""
    bound, up, share = torch.zeros_like(s.g), torch.zeros_like(s.g), torch.zeros_like(s.g)
    for g in s.gs:
        sums = b2 * bound + (1 if b2 == 1 else 1 - b2) * g**2
        up = 0.9 * up + 0.1 * g / (sums + eps).sqrt()
        share = 0.9 * share + 0.1 / (sums + eps).sqrt()
        slices = [
            torch.stack([x.amax().expand(x.shape) for x in sums.unbind(d)], d)
            for d in range(s.g.ndim if s.g.ndim > 1 else 0)
        ]
        bound = torch.stack(slices).amin(0) if slices else sums
    return up, 1 / share


def _ahead(s: Seen, alpha: float, beta: float, directions: list[Tensor]) -> Tensor:
    last = directions[-2] if len(directions) > 1 else directions[-1]
    return (alpha + beta) * directions[-1] - beta * last


def _adam_directions(s: Seen, nesterov: bool, eps: float) -> list[Tensor]:
    seen = [Seen(s.gs[: i + 1], s.ws[: i + 1], s.norms[: i + 1]) for i in range(s.n)]
    mean = lambda s: (
        0.9 * _mean(s.gs, 0.9) / (1 - 0.9 ** (s.n + 1)) + 0.1 * s.g / (1 - 0.9**s.n) if nesterov else _hat(s.gs, 0.9)
    )
    return [mean(s) / (_hat(s.gs, 0.999, 2).sqrt() + eps) for s in seen]


def _rprop(s: Seen, rate: float) -> Tensor:
    """As in optax: the step that the gradient before asked for, unless the sign has turned since."""
    size, before = torch.full_like(s.g, rate), torch.zeros_like(s.g)
    update = before
    for g in s.gs:
        turned = (g * before).sign()
        size = torch.where(turned > 0, size * 1.2, torch.where(turned < 0, size * 0.5, size)).clamp(1e-6, 50)
        update = torch.where(turned < 0, 0.0, before)
        before = torch.where(turned < 0, 0.0, size * g.sign())
    return update


def _lars(s: Seen, rate: float) -> Tensor:
    return _trace([-rate * 0.5 * _trust(g + 0.1 * w, w) for g, w in zip(s.gs, s.ws, strict=True)], 0.9)


TRANSFORMS.update(
    {
        "normalize_by_update_norm": TransformCase(
            lambda h=1.0: fr.normalize_by_update_norm(h), lambda s, h: h * s.g / (s.norms[-1] + 1e-6)
        ),
        "reduce_on_plateau": TransformCase(
            lambda h=1.0: with_value(fr.reduce_on_plateau(0.5 * h, patience=2), 3.0),
            lambda s, h: s.g * (0.5 * h if s.n > 2 else 1),
            newer=TAKES_MORE,
        ),
        "scale_by_polyak": TransformCase(
            lambda h=1.0: with_value(fr.scale_by_polyak(0.5 * h), 3.0),
            lambda s, h: s.g * min(1.0, (3 - 0.5 * h) / float(s.norms[-1]) ** 2),
            newer=TAKES_MORE,
        ),
        "polyak_sgd": TransformCase(
            lambda h=1.0: with_value(fr.polyak_sgd(0.1 * h, f_min=0.5), 3.0),
            lambda s, h: -s.g * min(0.1 * h, 2.5 / float(s.norms[-1]) ** 2),
            newer=TAKES_MORE,
        ),
        "scale_by_factored_rms": TransformCase(
            lambda h=1.0: fr.scale_by_factored_rms(min_dim_size_to_factor=2, decay_rate=0.8 * h, epsilon=0.1),
            lambda s, h: _factored(s, 0.8 * h, 0.1),
        ),
        "adafactor": TransformCase(
            lambda h=1.0: fr.adafactor(0.1 * h, min_dim_size_to_factor=2), lambda s, h: _adafactor(s, 0.1 * h)
        ),
        "scale_by_muon": TransformCase(
            lambda h=1.0: fr.masked(
                fr.scale_by_muon(beta=0.5 * h, eps=0.1, weight_dimension_numbers=_outputs_first), fr.matrices
            ),
            lambda s, h: _orthogonal(_nesterov(s, 0.5 * h), eps=0.1) if s.w.ndim > 1 else s.g,
        ),
        "muon": TransformCase(
            lambda h=1.0: fr.muon(0.1 * h, weight_decay=0.5, eps=0.1),
            lambda s, h: (
                -0.1 * h * (_orthogonal(_nesterov(s, 0.95), eps=0.1) + 0.5 * s.w)
                if s.w.ndim == 2
                else -0.1 * h * _nesterov(s, 0.9) / (_hat(s.gs, 0.999, 2).sqrt() + 0.1)
            ),
        ),
        "muon of filters": TransformCase(
            lambda h=1.0: fr.muon(
                0.1 * h, eps=0.1, muon_weight_dimension_numbers=_outputs_first, consistent_rms=0.2, nesterov=False
            ),
            lambda s, h: (
                -0.1
                * h
                * 0.2
                * max(s.w.shape[0], s.w.flatten(1).shape[1]) ** 0.5
                * _orthogonal(_hat(s.gs, 0.95), eps=0.1)
                if s.w.ndim > 1
                else -0.1 * h * _adam(s, eps=0.1)
            ),
        ),
        "scale_by_ademamix": TransformCase(
            lambda h=1.0: fr.scale_by_ademamix(b3=0.5, alpha=3.0 * h, eps=0.1),
            lambda s, h: _ademamix(s, 0.5, 3.0 * h, 0.1),
        ),
        "ademamix": TransformCase(
            lambda h=1.0: fr.ademamix(0.1, b3=0.5 * h, eps=0.1, weight_decay=0.5),
            lambda s, h: -0.1 * (_ademamix(s, 0.5 * h, 5.0, 0.1) + 0.5 * s.w),
        ),
        "ademamix on schedules": TransformCase(
            lambda h=1.0: fr.ademamix(0.1 * h, b3=fr.linear_schedule(0.3, 0.9, 4), alpha=falling, eps=0.1), None
        ),
        "scale_by_simplified_ademamix": TransformCase(
            lambda h=1.0: fr.scale_by_simplified_ademamix(0.5, 0.75, alpha=2.0 * h, eps=0.1),
            lambda s, h: (_trace(s.gs, 0.5) + 2.0 * h * s.g) / (_hat(s.gs, 0.75, 2).sqrt() + 0.1),
        ),
        "simplified_ademamix": TransformCase(
            lambda h=1.0: fr.simplified_ademamix(0.1 * h, 0.5, 0.75, eps=0.1, weight_decay=0.5),
            lambda s, h: -0.1 * h * (_trace(s.gs, 0.5) / (_hat(s.gs, 0.75, 2).sqrt() + 0.1) + 0.5 * s.w),
        ),
        "scale_by_adopt": TransformCase(
            lambda h=1.0: fr.scale_by_adopt(0.5, 0.5 * h), lambda s, h: _adopt(s, 0.5, 0.5 * h)
        ),
        "adopt": TransformCase(lambda h=1.0: fr.adopt(0.1 * h), lambda s, h: -0.1 * h * _adopt(s, 0.9, 0.9999)),
        # In the law of derivatives parameters stay and gradients change, which is a curvature of 0: no step is made.
        "scale_by_lbfgs": TransformCase(
            lambda h=1.0: fr.chain(fr.scale_by_lbfgs(2), fr.scale(-0.1 * h)), None, differentiable=False
        ),
        "lbfgs": TransformCase(
            lambda h=1.0: with_objective(fr.lbfgs(0.3 * h, 2, linesearch=fr.scale_by_zoom_linesearch(2))),
            None,
            differentiable=False,
            newer=TAKES_MORE,
        ),
        "scale_by_zoom_linesearch": TransformCase(
            lambda h=1.0: with_objective(
                fr.chain(fr.sgd(0.3 * h), fr.scale_by_zoom_linesearch(3, curv_rtol=0.6, initial_guess_strategy="one"))
            ),
            lambda s, h: _searched(s, 0.3 * h),
            newer=TAKES_MORE,
        ),
        "scale_by_backtracking_linesearch": TransformCase(
            lambda h=1.0: with_objective(fr.chain(fr.sgd(5.0 * h), fr.scale_by_backtracking_linesearch(3, 1e-4, 0.5))),
            lambda s, h: _backtracked(s, 5.0 * h),
            newer=TAKES_MORE,
        ),
        "selective_transform": TransformCase(
            lambda h=1.0: fr.selective_transform(fr.sgd(0.1 * h), freeze_mask=fr.matrices),
            lambda s, h: -0.1 * h * s.g * (s.w.ndim < 2),
        ),
        "flatten": TransformCase(
            lambda h=1.0: fr.flatten(fr.chain(fr.clip_by_global_norm(1.0 * h), fr.trace(0.5))),
            lambda s, h: _trace([g * min(1.0, h / float(norm)) for g, norm in zip(s.gs, s.norms, strict=True)], 0.5),
            shared="one vector of all leaves",
        ),
        "inject_hyperparams": TransformCase(
            lambda h=1.0: fr.inject_hyperparams(fr.adamw)(0.1 * h, weight_decay=falling),
            lambda s, h: -0.1 * h * (_adam(s) + s.w / s.n),
        ),
        "MultiSteps": TransformCase(
            lambda h=1.0: fr.MultiSteps(fr.sgd(0.1 * h), 2, should_skip_update_fn=fr.skip_not_finite),
            lambda s, h: _pairs(s, 0.1 * h),
        ),
        "MultiSteps of a prox": TransformCase(
            lambda h=1.0: fr.MultiSteps(fr.prox_sgd(0.1, fr.l1, strength=h), 2, use_grad_mean=False),
            lambda s, h: 0 * s.g if s.n % 2 else _soft(s.w - 0.1 * (s.gs[-1] + s.gs[-2]), 0.1 * h) - s.w,
        ),
        "apply_every": TransformCase(
            lambda h=1.0: fr.apply_every(2), lambda s, h: 0 * s.g if s.n % 2 else s.gs[-1] + s.gs[-2]
        ),
        "conditionally_transform": TransformCase(
            lambda h=1.0: fr.conditionally_transform(fr.soft_threshold(0.5 * h), every_other),
            lambda s, h: s.g if s.n % 2 else _soft(s.w + s.g, 0.5 * h) - s.w,
        ),
        "conditionally_mask": TransformCase(
            lambda h=1.0: fr.conditionally_mask(fr.sgd(0.1 * h, 0.5), every_other),
            lambda s, h: 0 * s.g if s.n % 2 else -0.1 * h * _trace(s.gs[1::2], 0.5),
        ),
        "lookahead": TransformCase(
            lambda h=1.0: fr.lookahead(fr.sgd(0.1 * h), 2, 0.25, reset_state=True),
            lambda s, h: _lookahead(s, 0.1 * h, 0.25),
        ),
        "schedule_free": TransformCase(
            lambda h=1.0: fr.schedule_free(fr.sgd(0.1 * h), falling, 0.8),
            lambda s, h: _schedule_free(s, lambda i, y: -0.1 * h * s.gs[i], [1.0] * s.n, 0.8),
        ),
        "schedule_free_sgd": TransformCase(
            lambda h=1.0: fr.schedule_free_sgd(0.1 * h, weight_decay=0.3),
            lambda s, h: _schedule_free(s, lambda i, y: -0.1 * h * (s.gs[i] + 0.3 * y), [1.0] * s.n),
        ),
        "schedule_free_adamw": TransformCase(
            lambda h=1.0: fr.schedule_free_adamw(0.1 * h, 2, eps=0.1),
            lambda s, h: _schedule_free(s, _warmed_rms(s, h), [0.25, *[1.0] * s.n]),
        ),
        "sam": TransformCase(
            lambda h=1.0: fr.sam(fr.sgd(0.1 * h), fr.sgd(0.05)),
            lambda s, h: 0.05 * s.g if s.n % 2 else s.ws[-2] - 0.1 * h * s.g - s.w,
        ),
        "with_extra_args": TransformCase(
            lambda h=1.0: fr.with_extra_args(fr.scale(-0.5 * h)), lambda s, h: -0.5 * h * s.g, drops="it is for that"
        ),
        "with_extra_args_support": TransformCase(
            lambda h=1.0: fr.with_extra_args_support(fr.scale(-0.5 * h)),
            lambda s, h: -0.5 * h * s.g,
            drops="it is for that",
        ),
        "monitor": TransformCase(
            lambda h=1.0: fr.monitor({"norm": fr.global_norm, "mean": fr.measure_with_ema(fr.global_norm, 0.5)}),
            lambda s, h: s.g,
        ),
        "snapshot": TransformCase(lambda h=1.0: fr.snapshot("norm", fr.global_norm), lambda s, h: s.g),
        "multi_transform": TransformCase(
            lambda h=1.0: fr.multi_transform({"all": fr.scale(-1.0 * h)}, "all"), lambda s, h: -h * s.g
        ),
        "scale_by_adamax": TransformCase(
            lambda h=1.0: fr.scale_by_adamax(eps=0.1 * h), lambda s, h: _adamax(s, 0.1 * h)
        ),
        "scale_by_belief": TransformCase(
            lambda h=1.0: fr.scale_by_belief(eps=0.1 * h, eps_root=0.2),
            lambda s, h: _hat(s.gs, 0.9) / _belief_metric(s, 0.1 * h, 0.2),
        ),
        "scale_by_yogi": TransformCase(
            lambda h=1.0: fr.scale_by_yogi(eps=0.1 * h, initial_accumulator_value=0.3),
            lambda s, h: _yogi(s, 0.1 * h, 0.3),
        ),
        "scale_by_radam": TransformCase(
            lambda h=1.0: fr.scale_by_radam(b2=0.9, eps=0.1 * h),
            lambda s, h: _hat(s.gs, 0.9) / _radam_metric(s, 0.9, 0.1 * h),
        ),
        "scale_by_adan": TransformCase(
            lambda h=1.0: fr.scale_by_adan(eps=0.1 * h), lambda s, h: _adan(s, 0.98, 0.92, 0.99, 0.1 * h)
        ),
        "scale_by_adadelta": TransformCase(
            lambda h=1.0: fr.scale_by_adadelta(eps=0.1 * h), lambda s, h: _adadelta(s, 0.9, 0.1 * h)[0]
        ),
        "scale_by_novograd": TransformCase(
            lambda h=1.0: fr.scale_by_novograd(eps=0.1, weight_decay=0.1 * h),
            lambda s, h: _novograd(s, 0.1 * h, 0.1),
        ),
        "scale_by_sm3": TransformCase(
            lambda h=1.0: fr.scale_by_sm3(eps=0.1 * h), lambda s, h: _sm3(s, 1.0, 0.1 * h)[0]
        ),
        "scale_by_sm3 of means": TransformCase(
            lambda h=1.0: fr.scale_by_sm3(b2=0.5 * h, eps=0.1, keep_metric=True),
            lambda s, h: _sm3(s, 0.5 * h, 0.1)[0],
        ),
        "scale_by_param_block_norm": TransformCase(
            lambda h=1.0: fr.scale_by_param_block_norm(2.0 * h),
            lambda s, h: s.g * s.w.square().sum().sqrt().clamp(min=2.0 * h),
        ),
        "scale_by_param_block_rms": TransformCase(
            lambda h=1.0: fr.scale_by_param_block_rms(h),
            lambda s, h: s.g * s.w.square().mean().sqrt().clamp(min=h),
        ),
        "scale_by_optimistic_gradient": TransformCase(
            lambda h=1.0: fr.scale_by_optimistic_gradient(beta=0.5 * h), lambda s, h: _ahead(s, 1.0, 0.5 * h, s.gs)
        ),
        "scale_by_rprop": TransformCase(
            lambda h=1.0: fr.scale_by_rprop(0.1 * h), lambda s, h: _rprop(s, 0.1 * h), differentiable=False
        ),
        "adamax": TransformCase(lambda h=1.0: fr.adamax(0.1 * h, eps=0.1), lambda s, h: -0.1 * h * _adamax(s, 0.1)),
        "adamaxw": TransformCase(
            lambda h=1.0: fr.adamaxw(0.1, weight_decay=0.5 * h, mask=fr.matrices, eps=0.1),
            lambda s, h: -0.1 * (_adamax(s, 0.1) + (0.5 * h * s.w if s.w.ndim > 1 else 0)),
        ),
        "adabelief": TransformCase(
            lambda h=1.0: fr.adabelief(0.1 * h, eps=0.1),
            lambda s, h: -0.1 * h * _hat(s.gs, 0.9) / _belief_metric(s, 0.1),
        ),
        "yogi": TransformCase(lambda h=1.0: fr.yogi(0.1 * h, eps=0.1), lambda s, h: -0.1 * h * _yogi(s, 0.1, 1e-6)),
        "radam": TransformCase(lambda h=1.0: fr.radam(0.1 * h), lambda s, h: -0.1 * h * _hat(s.gs, 0.9)),
        "novograd": TransformCase(
            lambda h=1.0: fr.novograd(0.1 * h, weight_decay=0.1), lambda s, h: -0.1 * h * _novograd(s, 0.1, 1e-6)
        ),
        "adan": TransformCase(
            lambda h=1.0: fr.adan(0.1, eps=0.1, eps_root=0.0, weight_decay=0.5 * h),
            lambda s, h: -0.1 * (_adan(s, 0.98, 0.92, 0.99, 0.1) + 0.5 * h * s.w),
        ),
        "adadelta": TransformCase(lambda h=1.0: fr.adadelta(h, eps=0.1), lambda s, h: -h * _adadelta(s, 0.9, 0.1)[0]),
        "sm3": TransformCase(lambda h=1.0: fr.sm3(0.1 * h), lambda s, h: -0.1 * h * _sm3(s, 1.0, 1e-8)[0]),
        "optimistic_adam": TransformCase(
            lambda h=1.0: fr.optimistic_adam(0.1 * h, 0.05, eps=0.1),
            lambda s, h: -_ahead(s, 0.1 * h, 0.05, _adam_directions(s, True, 0.1)),
        ),
        "optimistic_adam_v2": TransformCase(
            lambda h=1.0: fr.optimistic_adam_v2(0.1 * h, beta=0.5, eps=0.1, nesterov=False),
            lambda s, h: -0.1 * h * _ahead(s, 1.0, 0.5, _adam_directions(s, False, 0.1)),
        ),
        "sign_sgd": TransformCase(
            lambda h=1.0: fr.sign_sgd(0.1 * h), lambda s, h: -0.1 * h * s.g.sign(), differentiable=False
        ),
        "signum": TransformCase(
            lambda h=1.0: fr.signum(0.1 * h), lambda s, h: -0.1 * h * _mean(s.gs, 0.9).sign(), differentiable=False
        ),
        "rprop": TransformCase(lambda h=1.0: fr.rprop(0.1 * h), lambda s, h: -_rprop(s, 0.1 * h), differentiable=False),
        "lars": TransformCase(
            lambda h=1.0: fr.lars(0.1 * h, weight_decay=0.1, trust_coefficient=0.5), lambda s, h: _lars(s, 0.1 * h)
        ),
        "fromage": TransformCase(
            lambda h=1.0: fr.fromage(0.5 * h),
            lambda s, h: (s.w - 0.5 * h * _trust(s.g, s.w)) / math.sqrt(1 + 0.25 * h * h) - s.w,
        ),
        "noisy_sgd": TransformCase(lambda h=1.0: fr.noisy_sgd(0.1 * h, key=torch.tensor(5, device=DEVICE)), None),
        "optimistic_gradient_descent": TransformCase(
            lambda h=1.0: fr.optimistic_gradient_descent(0.1 * h, 0.8, 0.5),
            lambda s, h: -0.1 * h * _ahead(s, 0.8, 0.5, s.gs),
        ),
        "proximal_step of AdaBelief": TransformCase(
            lambda h=1.0: fr.proximal_step(fr.scale_by_belief(eps=0.3), 0.1, fr.l1, strength=h),
            lambda s, h: _proximal_step(s, _hat(s.gs, 0.9) / (v := _belief_metric(s, 0.3)), v, h),
        ),
        "proximal_step of Adadelta": TransformCase(
            lambda h=1.0: fr.proximal_step(fr.scale_by_adadelta(eps=0.1), 0.1, fr.l1, strength=h),
            lambda s, h: _proximal_step(s, *_adadelta(s, 0.9, 0.1), h),
        ),
        "proximal_step of SM3": TransformCase(
            lambda h=1.0: fr.proximal_step(fr.scale_by_sm3(eps=0.1, keep_metric=True), 0.1, fr.l1, strength=h),
            lambda s, h: _proximal_step(s, *_sm3(s, 1.0, 0.1), h),
        ),
    }
)


# A penalty for each kind of leaf


PENALTIES.update(
    {
        "per_leaf": PenaltyCase(
            fr.per_leaf({"*": 0.3 * fr.half_l2 + 0.8 * fr.l1}),
            lambda w: 0.15 * (w * w.conj()).real.sum() + 0.8 * w.abs().sum(),
        ),
    }
)

TRANSFORMS.update(
    {
        "prox_adam of a penalty for each kind of leaf": TransformCase(
            lambda h=1.0: fr.prox_adam(0.1, fr.per_leaf({"*": h * fr.l1}), eps=0.1, mask=fr.matrices),
            lambda s, h: (
                _soft(
                    s.w - 0.1 * _adam(s, eps=0.1),
                    0.1 * h / (_hat(s.gs, 0.999, 2).sqrt() + 0.1) if s.w.ndim > 1 else 0.0,
                )
                - s.w
            ),
        ),
    }
)


# Sixteen bits


_ONE_ROUNDING = "what is rounded before it is added is rounded twice"

TRANSFORMS.update(
    {
        "scale_by_adam with moments in float64": TransformCase(
            lambda h=1.0: fr.scale_by_adam(eps=0.1 * h, mu_dtype=torch.float64, nu_dtype=torch.float64),
            lambda s, h: _adam(s, eps=0.1 * h),
        ),
        "with_master_weights": TransformCase(
            lambda h=1.0: fr.with_master_weights(fr.prox_sgd(0.1, fr.l1, strength=h, momentum=0.5)),
            lambda s, h: _soft(s.w - 0.1 * _trace(s.gs, 0.5), 0.2 * h) - s.w,
            wide=_ONE_ROUNDING,
        ),
        "with_stochastic_rounding": TransformCase(
            lambda h=1.0: fr.with_stochastic_rounding(fr.sgd(0.1 * h, 0.5), torch.tensor(5, device=DEVICE)),
            lambda s, h: -0.1 * h * _trace(s.gs, 0.5),
            wide=_ONE_ROUNDING,
        ),
    }
)


# Images


def _variation(w: Tensor) -> Tensor:
    if w.ndim < 2:
        return w.diff().abs().sum() if w.ndim else 0 * w
    down = torch.nn.functional.pad(w.diff(dim=-2), (0, 0, 0, 1)) if w.shape[-2] else w
    right = torch.nn.functional.pad(w.diff(dim=-1), (0, 1)) if w.shape[-1] else w
    return torch.stack([down, right]).square().sum(0).sqrt().sum()


PENALTIES.update(
    {
        "isotropic_total_variation": PenaltyCase(
            fr.isotropic_total_variation,
            _variation,
            smooth=True,
            complex=False,
            ruleless="no closed form is known",
            uncompiled="its many steps are traced for long",
        ),
    }
)


# Gradients of examples


@remembered
def of_one_example(tx: fr.Transform) -> fr.Transform:
    """A transform of gradients of single examples, with one example."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return tx.update(fr.tree_map(lambda g: g.unsqueeze(0), updates), state, params)

    return fr.Transform(tx.init, update)


def _of_norm_2(s: Seen) -> Tensor:
    return s.g * min(1.0, 2.0 / float(s.norms[-1]))


TRANSFORMS.update(
    {
        "differentially_private_aggregate": TransformCase(
            lambda h=1.0: of_one_example(
                fr.differentially_private_aggregate(2.0, 0.0 * h, torch.tensor(5, device=DEVICE))
            ),
            lambda s, h: _of_norm_2(s),
        ),
        "differentially_private_aggregate with noise": TransformCase(
            lambda h=1.0: of_one_example(
                fr.differentially_private_aggregate(2.0, 0.1 * h, torch.tensor(5, device=DEVICE))
            ),
            None,
        ),
        "dpsgd": TransformCase(
            lambda h=1.0: of_one_example(fr.dpsgd(0.1 * h, 2.0, 0.0, torch.tensor(6, device=DEVICE))),
            lambda s, h: -0.1 * h * _of_norm_2(s),
        ),
    }
)
