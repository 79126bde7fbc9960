"""Minima of a smooth loss plus a penalty: no learning rate, a certificate, and derivatives of the solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.checks import check_params
from funcreg.core.inputs import LinAlgError, as_tensors, check_call, check_names, explained, outside
from funcreg.core.leafwise import wide
from funcreg.core.masks import mask_leaves
from funcreg.core.notices import warn_user
from funcreg.core.ranges import check_range, concrete, whole_number
from funcreg.core.sharding import check_whole
from funcreg.core.summaries import solution_line, solution_text
from funcreg.core.tree import structure, tree_leaves, tree_map, tree_paths
from funcreg.core.undocumented import forward_depth, is_compiling
from funcreg.core.wording import type_of
from funcreg.networks.coupled import check_groups_are_whole
from funcreg.regularizers.penalty import Penalty, Sum
from funcreg.solvers.graphs import Graphs, Same, key_of, like
from funcreg.solvers.implicit import Solve
from funcreg.solvers.proximal_newton import first_state, forward_backward
from funcreg.solvers.vectors import Flat, flat_problem
from funcreg.transforms.factory_checks import check_selection
from funcreg.transforms.regularizing import check_penalty, check_strength
from funcreg.transforms.transform import check_fit, public_state

#: What others call what is called otherwise here.
_ELSEWHERE = {
    "strengths": "it solves for one strength=; regularization_path solves for many, and vmap maps it over them",
    "data": "what the loss takes after params are its args=",
    **dict.fromkeys(("max_iter", "maxiter", "n_iter"), "the greatest number of steps is max_steps="),
}
#: Residuals that a dtype reaches where gradients are not far from 1.
_REACHED = {torch.float64: 1e-8, torch.float32: 1e-5}


@public_state
class Solution(NamedTuple):
    """What `minimize` found.

    Example:
        >>> found = minimize(lambda w: (w - 1).square().sum() / 2, torch.zeros(2), l1, strength=0.25)
        >>> found
        Solution(converged in 1 step, residual 0.0e+00, 2 of 2 entries not zero)
        >>> found.params, found.converged
        (tensor([0.7500, 0.7500]), tensor(True))
    """

    params: Params  # With exact zeros.
    residual: Tensor  # Their `kkt_residual`; where a penalty is not convex also the move of a step, see `minimize`.
    steps: Tensor  # Number of proximal steps on the loss and on models of it, int64.
    converged: Tensor  # Whether the residual is at most the tolerance.

    def __repr__(self) -> str:
        return solution_line(self)

    def __str__(self) -> str:
        return solution_text(self)


def minimize(
    loss: Callable[..., Tensor],
    params: Params,
    penalty: Penalty,
    *hyper: Hyper,
    strength: Hyper = 1.0,
    args: tuple[Any, ...] = (),
    mask: Mask | None = None,
    tol: float | None = None,
    max_steps: int = 10_000,
    compile: bool | str | Callable[..., Any] = False,
    **options: Any,
) -> Solution:
    r"""Minimize :math:`f(w) + \lambda g(w)`: proximal gradient steps, and minima of quadratic models of the loss.

    Where all entries, or those that are not zero, are few enough for a Hessian (512), the descent goes to the minimum
    of a model, :math:`f` to second order plus :math:`\lambda g`, which is found by Newton steps on the fixed point of
    the proximal step: for squared errors that is the solution. In between and else, proximal gradient steps have the
    length of Barzilai and Borwein in the metric of the diagonal of the Hessian (if the penalty has a rule in a metric)
    and are taken back where the objective grows. The end is a certificate: `kkt_residual` of at most `tol`. Where the
    loss or the penalty is not convex this is a stationary point, and it depends on `params`.

    For a penalty that is not convex that is not enough: with `l0` or `l_half`, whose slope at zero is infinite, zeros
    are stationary whatever the loss. So a solution is also a fixed point of the proximal step, of the length at which
    the descent ends: `residual` is the greater of `kkt_residual` and of how far that step moves, divided by its length,
    which has the units of the gradient. Where there is no rule for `kkt_residual`, as for `schatten`, it is the latter.

    The solution has derivatives in `strength`, the hyperparameters, `args` and tensors in a penalty, as in
    `c * l1 + d * group_lasso.given()`, by the implicit function theorem: for `torch.func.grad`, `jvp` and `backward`.
    Tensors that the loss, or a user's own rule, holds without getting them as `args` are constants.
    Under `vmap` (over strengths, folds, data) members that are done stop moving. In a function that `torch.compile`
    compiles it is left as it is, with a break in the graph: when to stop depends on numbers.

    Args:
        loss: `loss(params, *args)`, a scalar with a first and second derivative.
        params: Where to begin.
        penalty: A penalty with a proximal operator, or a constraint.
        hyper: Its hyperparameters.
        strength: :math:`\lambda`: number of at least 0, tensor, or a tree of them like the parameters.
        args: What else the loss takes: trees of tensors. Arrays of numpy or pandas become tensors, in the dtype of
            `params`.
        mask: Leaves on which the penalty acts; the others, such as an intercept, are minimized over freely.
        tol: Greatest residual of a solution, at least 0, in units of the gradient. By default 1e-8 in float64,
            1e-5 in float32 and 1e-2 in 16 bits, which are in reach where gradients are not far from 1. Of data in small
            units, whose gradients are not far above these numbers, multiply the loss and the strength, or give less.
        max_steps: Number of steps, on the loss and on its models, after which to give up, at least 0; `converged` is
            then False.
        compile: Whether to compile steps, for calls to come with other numbers in tensors of the same shapes; or a
            backend of `torch.compile`. `"eager"` records steps, and runs them without a compiler. What the loss does
            in Python is then done anew only where it computes something else; a loss of which there is no graph is
            minimized as ever, and a warning says why.
        options: Static options of the penalty, such as `dim`.

    Raises:
        TypeError: `compile` is neither a bool nor a name or function of a backend.
        ValueError: A number is out of range, or the loss is no scalar.

    Example:
        The lasso, and the derivative of its solution in the strength:

        >>> x, y = torch.eye(3, dtype=torch.float64), torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
        >>> def loss(w, x, y):
        ...     return (x @ w - y).square().sum() / 2
        >>> def lasso(strength):
        ...     return minimize(loss, torch.zeros_like(y), l1, strength=strength, args=(x, y)).params
        >>> lasso(torch.tensor(1.0))
        tensor([ 2., -1.,  0.], dtype=torch.float64)
        >>> torch.func.jacrev(lasso)(torch.tensor(1.0, dtype=torch.float64))
        tensor([-1.,  1.,  0.], dtype=torch.float64)

    References:
        Wright, Nowak & Figueiredo, *Sparse reconstruction by separable approximation*, 2009.
        Lee, Sun & Saunders, *Proximal Newton-type methods for minimizing composite functions*, 2014.
        Themelis, Ahookhosh & Patrinos, *On the acceleration of forward-backward splitting via an inexact Newton
        method*, 2019.
        Bertrand et al., *Implicit differentiation for fast hyperparameter selection in non-smooth convex learning*,
        2022.
    """
    check_names("minimize", options, _ELSEWHERE)
    problem = Problem(explained(loss), penalty, hyper, mask, tol, max_steps, options, compile)
    problem.check(params, strength, args)
    check_call(loss, args)
    args = as_tensors(args, "args", params)
    found = problem.solve(params, strength, args)
    problem.say_where_zeros_pass(found, params, args)
    return found


@dataclass(frozen=True)
class Problem:
    """A loss and a penalty, and when they count as minimized."""

    loss: Callable[..., Tensor]
    penalty: Penalty
    hyper: tuple[Hyper, ...]
    mask: Mask | None
    tol: float | None
    max_steps: int
    options: dict[str, Any]
    compile: bool | str | Callable[..., Any]
    quadratic: bool = False  # Whether the loss seems to be, so that it has one Hessian.

    def check(self, params: Params, strength: Hyper, args: tuple[Any, ...]) -> None:
        """Raise an error, before any work, for what is no problem."""
        check_penalty(self.penalty, self.hyper, self.options)
        check_strength(self.penalty, strength)
        check_selection(self.mask)
        check_params(params)
        check_whole("a solver", tree_paths(params), tree_leaves(params))
        check_fit(params, self.mask, strength, *self.hyper)
        check_groups_are_whole(self.penalty, self.mask, params)
        self._check_tolerance(params)
        whole_number("max_steps", self.max_steps, 0)
        for path, w in zip(tree_paths(params), tree_leaves(params), strict=True):
            if w.is_complex():
                raise TypeError(
                    f"leaf '{path}' is {w.dtype}; expected real parameters. Give torch.view_as_real(w) to a "
                    "loss that reads torch.view_as_complex(w); their l1 is group_lasso with dim=-1."
                )
        if not isinstance(args, tuple):
            raise TypeError(f"args is {type_of(args)}; expected a tuple of what the loss takes after params")
        if not (isinstance(self.compile, (bool, str)) or callable(self.compile)):
            raise TypeError(f"compile is {self.compile!r}; expected True, False or a backend of torch.compile")

    def _check_tolerance(self, params: Params) -> None:
        if self.tol is None:
            return
        check_range("tol", self.tol, 0.0)
        kind = _coarsest(params)
        if 0 < self.tol < 8 * torch.finfo(kind).eps:
            warn_user(
                f"tol is {self.tol:g}, and params are {kind}, in which gradients of size 1 are known to "
                f"{torch.finfo(kind).eps:.0e}: residuals below that are chance. By default tol is "
                f"{_REACHED.get(kind, 1e-2):g} here; for less, give params and args in float64.",
            )

    def tolerance(self, params: Params) -> float:
        """The greatest residual of a solution: that which was given, or what the dtype reaches."""
        return _REACHED.get(_coarsest(params), 1e-2) if self.tol is None else self.tol

    def solve(self, params: Params, strength: Hyper, args: tuple[Any, ...]) -> Solution:
        """The solution."""
        # When to stop depends on numbers, which no graph can hold.
        solved = torch.compiler.disable(self._solve) if is_compiling() else self._solve
        return solved(params, strength, args)  # pyright: ignore[reportCallIssue]  # Torch says it takes a function.

    @torch.inference_mode(False)  # Inside of it, torch 2.9 takes every derivative for 0.
    def _solve(self, params: Params, strength: Hyper, args: tuple[Any, ...]) -> Solution:
        start = tree_map(lambda w: w.detach(), params)  # The solution has no derivative in the place of the start.
        given, graphs = (start, strength, self.hyper, args), None
        if self.compile:
            given = (start, *tree_map(lambda x: _as_tensor(x, start), (strength, self.hyper)), args)
            graphs = self._graphs(given)
        flat, tensors = self._flat(params, given)
        flat = replace(flat, graphs=graphs, quadratic=self.quadratic, penalty_is_known=_is_known(self.penalty))
        if forward_depth() > 1:
            raise NotImplementedError(
                "a solution has no forward derivative of a forward derivative, as jacfwd(jacfwd(f)) takes; expected "
                "one of them in reverse: torch.func.hessian(f), or jacfwd(jacrev(f))"
            )
        try:
            x, residual, steps, converged, *_ = Solve.apply(flat, *tensors)
        except LinAlgError as error:
            raise outside(error) from error
        except RuntimeError as error:
            if "unsupported for Sparse" not in str(error):
                raise
            raise TypeError(
                "the loss multiplies a sparse matrix by a matrix, of which torch has no map over members and "
                "directions; expected products with vectors, torch.stack([x @ column for column in w.unbind(1)], 1), "
                "or a dense matrix, x.to_dense()"
            ) from error
        return Solution(flat.tree(x), residual, steps, converged)

    def say_where_zeros_pass(self, found: Solution, params: Params, args: tuple[Any, ...]) -> None:
        """Warn where no step was taken because the gradient, and not only what the penalty leaves of it, is small."""
        steps, residual = concrete(found.steps), concrete(found.residual)
        if self.tol is not None or steps is None or residual is None or int(steps) or not float(residual):
            return
        slopes = tree_leaves(grad(lambda point: self.loss(point, *args))(params))
        size = max([float(g.detach().abs().amax()) for g in slopes if g.numel()])
        # Without a penalty a residual is the gradient, and a start may be the minimum.
        if float(residual) < (1 - 1e-6) * size <= self.tolerance(params):
            warn_user(
                f"the gradient of the loss at params is at most {size:.1g}, below tol={self.tolerance(params):.0e}, so "
                "that params pass for the solution, whatever the strength. Are the data in small units? Multiply the "
                f"loss and the strength by {10 ** -math.floor(math.log10(size)):.0e}, or give a smaller tol.",
            )

    @torch.inference_mode(False)
    def landing(self, params: Params, args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """From a strength to where the first proximal step of the descent lands, as a vector of all parameters."""
        start, one = tree_map(lambda w: w.detach(), params), torch.ones((), device=tree_leaves(params)[0].device)
        given = (start, one, self.hyper, args)
        flat, tensors = self._flat(params, given)
        s = first_state(flat, tensors)[0]

        def land(strength: Tensor) -> Tensor:
            known = [strength if t is one else t for t in tensors]
            return forward_backward(flat, s.x, s.slope, s.rate, s.metric, known)

        return land

    def _flat(self, params: Params, given: tuple[Any, Any, Any, Any]) -> tuple[Flat, list[Tensor]]:
        """The problem on a vector, and the tensors that it was given."""
        tol = self.tolerance(params)
        return flat_problem(self.loss, self.penalty, given, self.mask, self.options, tol, self.max_steps)

    def _graphs(self, given: tuple[Params, Hyper, Any, tuple[Any, ...]]) -> Graphs:
        """Graphs of what computes alike for all numbers in the tensors of a problem."""
        leaves, spec = structure(given)
        numbers, rest = [x for x in leaves if isinstance(x, Tensor)], [x for x in leaves if not isinstance(x, Tensor)]
        mask = None if self.mask is None else tuple(mask_leaves(self.mask, given[0]))
        key = (
            spec,
            tuple(map(like, numbers)),
            key_of([rest, self.options]),
            _key_of_penalty(self.penalty),
            mask,
            self.tolerance(given[0]),
        )
        return Graphs(key, "inductor" if self.compile is True else self.compile, "minimize")


def _as_tensor(x: Any, params: Params) -> Any:
    """A number as a tensor, so that graphs serve for other numbers."""
    like = tree_leaves(params)
    return torch.tensor(x, dtype=wide(like[0].dtype), device=like[0].device) if isinstance(x, float) and like else x


def _key_of_penalty(penalty: Penalty) -> Any:
    """What tells a penalty from others; sums of the same terms are the same."""
    if not isinstance(penalty, Sum):
        return Same(penalty)
    return tuple(
        (_key_of_penalty(term.penalty), key_of([term.factors, term.hyper, term.options]), Same(term.mask))
        for term in penalty.terms
    )


def _is_known(penalty: Penalty) -> bool:
    """Whether it is one of the library's own, or a sum of them: nothing that it computes changes between calls."""
    if isinstance(penalty, Sum):
        return all([_is_known(term.penalty) for term in penalty.terms])
    return penalty.__module__.startswith("funcreg.") and penalty.made_by is None


def _coarsest(params: Params) -> torch.dtype:
    """The dtype with the fewest digits."""
    return max([w.dtype for w in tree_leaves(params)], key=lambda kind: torch.finfo(kind).eps, default=torch.float64)
