"""Muon: steps along orthogonalized momentum, with optax's names and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params, Scalar, Schedule, Updates
from funcreg.core.construction import remembered
from funcreg.core.leafwise import compute, euclidean, increment, zeros
from funcreg.core.ranges import flags, scalars, whole_number
from funcreg.core.tree import Path, at_leaf, dotted, flatten, leaf_paths, tree_map, tree_paths
from funcreg.transforms.chains import chain, with_link
from funcreg.transforms.combine import partition
from funcreg.transforms.factory_checks import below_one, dtypes, finite, finite_nonnegative, positive
from funcreg.transforms.moments import average, corrected_mean, stored
from funcreg.transforms.optimizers import adamw
from funcreg.transforms.regularizing import add_decayed_weights
from funcreg.transforms.scaling import scale_by_learning_rate
from funcreg.transforms.transform import Transform, counter, memoryless, public_state

#: Coefficients of the polynomial a x + b x^3 + c x^5 of singular values, one triple for all steps, or one for each.
Coefficients: TypeAlias = tuple[float, float, float] | Sequence[Sequence[float]]

_STANDARD = (3.4445, -4.7750, 2.0315)
#: Known coefficients by name.
PRESETS: dict[str, Coefficients] = {
    "standard": _STANDARD,
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
#: How a matrix is scaled before the first step.
Preconditioning: TypeAlias = Literal["frobenius", "spectral", "aol", "schatten"]
_PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")


@dataclass(frozen=True)
class MuonDimensionNumbers:
    r"""Which dimensions of a leaf are the two of a matrix; over all others it is a batch of matrices.

    The default is optax's, for weights that multiply from the right, `x @ w`. The weights of `torch.nn.Linear` have
    their outputs first: `MuonDimensionNumbers(1, 0)`, and `MuonDimensionNumbers((1, 2, 3), 0)` for convolutions. For
    matrices it decides nothing but the factor :math:`\sqrt{\max(1, \text{out} / \text{in})}` of a step.

    Args:
        reduction_axis: Dimension, or dimensions, that a product sums over: the inputs.
        output_axis: Dimension, or dimensions, of the outputs.

    Example:
        >>> MuonDimensionNumbers(reduction_axis=(1, 2, 3), output_axis=0)
        MuonDimensionNumbers(reduction_axis=(1, 2, 3), output_axis=0)
    """

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


#: Dimension numbers for all leaves, a tree of them like the parameters or a prefix, or a function that makes it.
DimensionNumbers: TypeAlias = MuonDimensionNumbers | Any | Callable[[Params], Any]


def _numbers(given: DimensionNumbers | None, params: Params) -> list[MuonDimensionNumbers | None]:
    """The dimension numbers of each leaf, None where there are none."""
    found = given(params) if callable(given) else given
    return [_at(found, path) for path in leaf_paths(params)]


def _at(found: Any, path: Path) -> MuonDimensionNumbers | None:
    node = found
    for depth, key in enumerate(path):
        if node is None or isinstance(node, MuonDimensionNumbers):
            return node
        try:
            node = getattr(node, key) if hasattr(node, "_fields") and isinstance(key, str) else node[key]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(
                f"weight_dimension_numbers lacks '{dotted(path[: depth + 1])}'; expected a tree like the parameters, "
                "with MuonDimensionNumbers, or None, for leaves"
            ) from error
    if node is not None and not isinstance(node, MuonDimensionNumbers):
        raise TypeError(
            f"weight_dimension_numbers at '{dotted(path)}' is {node!r}; expected MuonDimensionNumbers, or None"
        )
    return node


class _Layout(NamedTuple):
    """How a leaf becomes a batch of matrices, inputs times outputs."""

    order: tuple[int, ...]
    sizes: tuple[int, int, int]  # Batch, inputs, outputs.

    def matrices(self, w: Tensor) -> Tensor:
        return w.permute(self.order).reshape(self.sizes)

    def restored(self, matrices: Tensor, like: Tensor) -> Tensor:
        back = [self.order.index(d) for d in range(like.ndim)]
        return matrices.reshape([like.shape[d] for d in self.order]).permute(back)


def _layout(w: Tensor, numbers: MuonDimensionNumbers | None) -> _Layout:
    if numbers is None:
        if w.ndim != 2:
            raise ValueError(
                f"it has shape {tuple(w.shape)}; expected a matrix. Leave it out with masked, take muon, which gives "
                "it to Adam, or say by weight_dimension_numbers which of its dimensions make a matrix"
            )
        numbers = MuonDimensionNumbers()
    axes = [(d,) if isinstance(d, int) else tuple(d) for d in (numbers.reduction_axis, numbers.output_axis)]
    if w.ndim < 2 or any([not -w.ndim <= d < w.ndim for d in (*axes[0], *axes[1])]):
        raise ValueError(f"it has shape {tuple(w.shape)}, which {numbers} do not fit")
    inputs, outputs = ([d % w.ndim for d in dims] for dims in axes)
    if set(inputs) & set(outputs):
        raise ValueError(f"{numbers} name a dimension twice of a leaf of shape {tuple(w.shape)}")
    batch = [d for d in range(w.ndim) if d not in inputs and d not in outputs]
    sizes = [math.prod([w.shape[d] for d in dims]) for dims in (batch, inputs, outputs)]
    return _Layout((*batch, *inputs, *outputs), (sizes[0], sizes[1], sizes[2]))


# Newton-Schulz steps


def _orthogonalized(
    x: Tensor, coefficients: list[tuple[float, float, float]], preconditioning: Preconditioning, eps: Scalar
) -> Tensor:
    """Matrices whose singular values are near 1, from a batch of matrices."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if preconditioning == "frobenius":
        x = x / (euclidean(x, (1, 2)) + eps)
    elif preconditioning == "spectral":
        x = x / (torch.linalg.matrix_norm(x, ord=2, keepdim=True) + eps)
    for i, (a, b, c) in enumerate(coefficients):
        gram = x @ x.mH
        if i == 0 and preconditioning in ("aol", "schatten"):
            # Almost orthogonal layers divide each row by the root of its sum in the Gram matrix.
            size = gram.abs().sum(-1, keepdim=True) if preconditioning == "aol" else euclidean(gram, (1, 2))
            shrink = size.clamp(min=1e-8) ** -0.5
            x, gram = x * shrink, gram * shrink * shrink.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _steps(ns_coeffs: Coefficients, ns_steps: int) -> list[tuple[float, float, float]]:
    """The coefficients of each step."""
    ns_steps = whole_number("ns_steps", ns_steps)
    given: Any = ns_coeffs
    if not isinstance(given, (tuple, list)) or not given:
        raise TypeError(f"ns_coeffs is {ns_coeffs!r}; expected three numbers, or three for each step")
    single = isinstance(given[0], (int, float))
    rows = [given] if single else list(given)
    if any([not isinstance(row, (tuple, list)) or len(row) != 3 for row in rows]):
        raise ValueError(f"ns_coeffs is {ns_coeffs!r}; expected three numbers, or three for each step")
    for row in rows:
        finite(ns_coeffs=row)
    if single:
        return [(row[0], row[1], row[2]) for row in rows] * ns_steps
    if len(rows) > ns_steps:
        raise ValueError(f"ns_coeffs has {len(rows)} rows; expected at most ns_steps of them, which is {ns_steps}")
    return [(row[0], row[1], row[2]) for row in rows]


@public_state
class MuonState(NamedTuple):
    """The state of `scale_by_muon`.

    Example:
        >>> scale_by_muon().init(torch.zeros(1, 2))
        MuonState(steps=tensor(0, dtype=torch.int32), mu=tensor([[0., 0.]]))
    """

    steps: Tensor  # Number of updates made, int32.
    mu: Params  # Moving average of updates.


@remembered
def scale_by_muon(
    ns_coeffs: Coefficients = _STANDARD,
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: DimensionNumbers | None = None,
) -> Transform:
    r"""Replace the mean of updates by a matrix with its singular vectors and singular values near 1.

    For :math:`m = U S V^\top` this is about :math:`U V^\top`, the steepest step in the spectral norm, by a few steps
    of :math:`x \leftarrow a x + b (x x^\top) x + c (x x^\top)^2 x`. `torch.optim.Muon` takes them in bfloat16.

    Args:
        ns_coeffs: Three numbers :math:`a, b, c`, or three for each step.
        ns_steps: Number of steps; with numbers for each of them, the greatest number.
        beta: Decay of the mean.
        eps: Added to the norm that a matrix is divided by.
        mu_dtype: Dtype in which the mean is kept; by default that of the parameter, float32 for 16-bit ones.
        nesterov: Whether the mean looks one step ahead.
        adaptive: Whether the result is multiplied by its scalar product with the mean, about its nuclear norm.
        preconditioning: What a matrix is divided by first: `"frobenius"` or `"spectral"` for a norm, `"aol"` for one
            number a row, from its Gram matrix, `"schatten"` for the Schatten 4-norm. The last two spare a step.
        weight_dimension_numbers: Which dimensions of a leaf make a matrix: `MuonDimensionNumbers`, a tree of them like
            the parameters or a prefix, or a function that makes it. By default leaves are matrices.

    Raises:
        ValueError: A leaf is no matrix, or its dimension numbers do not fit.

    Example:
        >>> tx, params = scale_by_muon(), {"weight": torch.zeros(2, 2)}
        >>> tx.update({"weight": torch.tensor([[5.0, 0.0], [0.0, 3.0]])}, tx.init(params), params)[0]
        {'weight': tensor([[0.9701, 0.0000],
                [0.0000, 0.7091]])}

    References:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024.
        Bernstein & Newhouse, *Old optimizer, new norm: an anthology*, 2024.
    """
    below_one(beta=beta)
    finite_nonnegative(eps=eps)
    beta, eps = scalars(beta=beta, eps=eps)
    dtypes(mu_dtype=mu_dtype)
    flags(nesterov=nesterov, adaptive=adaptive)
    steps_of = _steps(ns_coeffs, ns_steps)
    if preconditioning not in _PRECONDITIONINGS:
        raise ValueError(f"preconditioning is {preconditioning!r}; expected one of {', '.join(_PRECONDITIONINGS)}")

    def init(params: Params) -> MuonState:
        by_layout(lambda layout, w: w, params, params)  # A leaf that is no matrix is said here.
        return MuonState(counter(params), zeros(params, mu_dtype))

    def update(updates: Updates, state: MuonState, params: Params) -> tuple[Updates, MuonState]:
        steps = increment(state.steps)
        mu = average(state.mu, updates, beta)
        mean = corrected_mean(mu, updates, beta, steps, nesterov)

        def orthogonal(layout: _Layout, m: Tensor, eps: Scalar) -> Tensor:
            x = layout.restored(_orthogonalized(layout.matrices(m), steps_of, preconditioning, eps), m)
            return (m.conj() * x).sum() * x if adaptive else x

        made = by_layout(orthogonal, mean, params, eps)
        return tree_map(lambda u, x: x.to(u.dtype), updates, made), MuonState(steps, stored(mu, state.mu))

    def by_layout(f: Callable[..., Tensor], tree: Params, params: Params, *hyper: Hyper) -> Params:
        return _by_layout(f, tree, params, weight_dimension_numbers, *hyper)

    return Transform(init, update, state=MuonState)


def _by_layout(
    f: Callable[..., Tensor], tree: Params, params: Params, numbers: DimensionNumbers | None, *hyper: Hyper
) -> Params:
    """Map a function of the layout of a leaf as matrices, the leaf, and hyperparameters."""
    leaves, rebuild = flatten(tree)
    made: list[Tensor] = []
    for path, leaf, found in zip(tree_paths(params), leaves, _numbers(numbers, params), strict=True):
        try:
            layout = _layout(leaf, found)
        except ValueError as error:
            raise ValueError(f"{at_leaf(path)}{error}") from error
        made.append(compute(lambda *row, layout=layout: f(layout, *row), leaf, hyper=hyper))
    return rebuild(made)


@remembered
def muon(
    learning_rate: Hyper | Schedule,
    ns_coeffs: Coefficients | str = _STANDARD,
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Hyper | Schedule = 0.0,
    weight_decay_mask: Mask | None = None,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: Hyper | Schedule = 0.0,
    adam_learning_rate: Hyper | Schedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbers | None = None,
    consistent_rms: Scalar | None = None,
) -> Transform:
    r"""Muon for matrices, AdamW for all else, :math:`w' = w - \eta (c \, U V^\top + \lambda w)`.

    :math:`U V^\top` is what `scale_by_muon` makes of the momentum, and :math:`c` is
    :math:`\sqrt{\max(1, \text{out} / \text{in})}`. By default matrices are laid out as in optax, inputs first. For
    the weights of torch, outputs first, give `muon_weight_dimension_numbers`, as the example does: then :math:`c` is
    that of `torch.optim.Muon`, which is this without Nesterov's step but for its sums in bfloat16, and whose
    `"match_rms_adamw"` is `consistent_rms=0.2`. With Nesterov's step this one corrects the means for their first value.

    Args:
        learning_rate: :math:`\eta`.
        ns_coeffs: Three numbers, or three for each step, or the name of known ones: `"standard"` or `"dion"`.
        ns_steps: Number of Newton-Schulz steps; with numbers for each of them, the greatest number.
        beta: Decay of the mean of gradients.
        eps: Added to the norm that a matrix is divided by, and Adam's :math:`\epsilon`.
        weight_decay: :math:`\lambda` of the matrices.
        weight_decay_mask: Matrices that decay; True means apply.
        mu_dtype: Dtype in which means are kept.
        nesterov: Whether means look one step ahead.
        adaptive: Whether a step is multiplied by its scalar product with the mean.
        preconditioning: What a matrix is divided by first; see `scale_by_muon`.
        adam_b1: Decay of Adam's mean.
        adam_b2: Decay of Adam's mean square.
        adam_eps_root: Added below Adam's root.
        adam_weight_decay: :math:`\lambda` of the other leaves.
        adam_learning_rate: :math:`\eta` of the other leaves; None for the same.
        muon_weight_dimension_numbers: Which dimensions of a leaf make a matrix: `MuonDimensionNumbers`, a tree of them
            like the parameters or a prefix, or a function that makes it; None in it for leaves that go to Adam. By
            default leaves of two dimensions are matrices, and no others. Embeddings and heads are better left to Adam.
        consistent_rms: Number by which :math:`c` is :math:`\sqrt{\max(\text{in}, \text{out})}` times it instead, so
            that steps are as large as those of Adam with 0.2.

    Example:
        >>> params = {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)}
        >>> outputs_first = {"weight": MuonDimensionNumbers(1, 0), "bias": None}
        >>> tx = muon(0.1, muon_weight_dimension_numbers=outputs_first)
        >>> grads = {"weight": torch.tensor([[3.0], [4.0]]), "bias": torch.tensor([3.0, 4.0])}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'weight': tensor([[-0.0591],
                [-0.0788]]), 'bias': tensor([-0.1474, -0.1474])}

    References:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024.
        Liu et al., *Muon is scalable for LLM training*, 2025.
    """
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in PRESETS:
            raise ValueError(f"ns_coeffs is {ns_coeffs!r}; expected numbers, or one of {', '.join(PRESETS)}")
        ns_coeffs = PRESETS[ns_coeffs]
    if consistent_rms is not None:
        positive(consistent_rms=consistent_rms)
        (consistent_rms,) = scalars(consistent_rms=consistent_rms)
    given = muon_weight_dimension_numbers
    numbers = _of_matrices if given is None else given

    def labels(params: Params) -> Params:
        return flatten(params)[1](["adam" if found is None else "muon" for found in _numbers(numbers, params)])

    matrices = chain(
        scale_by_muon(
            ns_coeffs,
            ns_steps,
            beta,
            eps,
            mu_dtype,
            nesterov=nesterov,
            adaptive=adaptive,
            preconditioning=preconditioning,
            weight_dimension_numbers=numbers,
        ),
        shaped_as_matrices(numbers, consistent_rms),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )
    others = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        adam_weight_decay,
        nesterov=nesterov,
    )
    return with_link(partition({"muon": matrices, "adam": others}, labels))


def _of_matrices(params: Params) -> Params:
    """Dimension numbers of leaves with two dimensions, and none of others."""
    return tree_map(lambda w: MuonDimensionNumbers() if w.ndim == 2 else None, params)


@remembered
def shaped_as_matrices(numbers: DimensionNumbers, consistent_rms: Scalar | None) -> Transform:
    r"""Multiply each matrix by :math:`\sqrt{\max(1, \text{out} / \text{in})}`, so that all shapes learn alike.

    With `consistent_rms` it is that times :math:`\sqrt{\max(\text{in}, \text{out})}`.
    """

    def scaled(layout: _Layout, u: Tensor, rms: Scalar) -> Tensor:
        _, inputs, outputs = layout.sizes
        if consistent_rms is not None:
            return u * (math.sqrt(max(inputs, outputs)) * rms)
        return u * math.sqrt(max(1.0, outputs / max(inputs, 1)))

    rms = 0.0 if consistent_rms is None else consistent_rms
    return memoryless(lambda updates, params: _by_layout(scaled, updates, params, numbers, rms), stages=["scales"])
