"""What a penalty is: value, gradient and proximal operator, written once."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.arguments import ABOVE_0, AT_LEAST_0, FINITE_ABOVE_0, LACKING, TakesHyper, check_hyper, say_shared
from funcreg.core.checks import check_alike, check_params
from funcreg.core.leafwise import beside, compute, compute_wide, product, times, without_autocast
from funcreg.core.masks import kept_by, on_mask
from funcreg.core.ranges import check_sign, flags
from funcreg.core.tree import dotted, map_with_path, tree_leaves, tree_map
from funcreg.core.undocumented import dynamo_asks, is_compiling
from funcreg.core.wording import type_of
from funcreg.regularizers.composition import (
    Structure,
    Term,
    sum_gradient,
    sum_in_metric,
    sum_proximal,
    sum_residual,
    sum_value,
)
from funcreg.regularizers.descent import approach, check_inner_steps

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])


def remembering(init: Callable[P, None]) -> Callable[P, None]:
    """Let what is begun know its class and the arguments, as which it pickles."""

    @functools.wraps(init)
    def begin(*args: P.args, **kwargs: P.kwargs) -> None:
        made: Any = args[0]
        if not hasattr(made, "_made"):  # Else it is called by the one of a class below.
            made._made = type(made), args[1:], kwargs
        init(*args, **kwargs)

    return begin


def remembering_rule(decorator: F) -> F:
    """Let penalties that a decorator makes of rules pickle as what it was called with, and the rule."""

    def remember(made: Penalty, options: dict[str, Any], rule: Any) -> Penalty:
        made._made = _decorated, (called, options, rule), {}
        return made

    @functools.wraps(decorator)
    def called(*rules: Any, **options: Any) -> Any:
        made = decorator(*rules, **options)
        if isinstance(made, Penalty):
            return remember(made, options, rules[0])
        return lambda rule: remember(made(rule), options, rule)

    decorated: Any = called  # Of the type of the decorator, which `wraps` does not tell.
    return decorated


class Penalty(TakesHyper):
    r"""Value, gradient and proximal operator of a penalty :math:`g` on trees of parameters.

    `p(params, *hyper)` is the value, a 0-dim tensor summed over all leaves; `p.grad(params, *hyper)` the gradient,
    the subgradient of least norm at a kink; `p.prox(params, step, *hyper)` is
    :math:`\arg\min_z \frac{1}{2} \|z - w\|^2 + \text{step} \cdot g(z)`, and `p.prox_dual(params, step, *hyper)` that of
    the conjugate of a convex :math:`g`. Each takes a `mask` and looks at its leaves alone. Most penalties are written
    on one leaf, with the decorator `penalty`; one that couples leaves is made from three functions on trees.

    `p.given(*hyper, **options)` is the penalty of given hyperparameters; such penalties are scaled and added,
    `0.1 * l1 + elastic.given(0.1, 0.5) / 2`. A sum has a value and a gradient; it has a proximal operator where that is
    exact, and raises an error that says why where it is not.

    `weights * p` is :math:`\sum_i c_i g(w_i)` in all its forms, for a tree of weights like the parameters or a prefix
    of one. Each weight is a number for its leaf, or a tensor that broadcasts against the leaf: any for a separable
    penalty, one number for each group for a penalty of groups (of shape `(n, 1)` for rows). A penalty that couples a
    leaf otherwise takes a number for each leaf, and one that couples leaves a single number. 0 leaves entries alone.

    A penalty pickles by its name if it stands at the top of a module under it, else as the call that made it: rules
    that are functions of a module, and not lambdas, can then be read back.

    Args:
        value: From `(params, *hyper, **options)` to a scalar.
        gradient: From the same to a tree like the parameters.
        proximal: From `(params, step, *hyper, **options)` to a tree like the parameters. One that finds the minimum in
            a metric, too, takes `metric=None`: a tree of positive tensors like the parameters. Leaves that a mask
            leaves out are not in the trees that these get: `tree_map` and `tree_leaves` pass their places by.
        residual: From `(params, grads, strength, *hyper, **options)` to the element of least norm of
            :math:`\nabla f + \text{strength} \cdot \partial g`; by default the residual of the proximal operator.
        bounds: From the name of a hyperparameter to the least and greatest number it may be.
        rule: The function whose name, documentation and signature these are; by default `value`.
        structure: What sums with this penalty may rely on; by default nothing, so that a sum has no proximal operator.
        weighted: From `(params, weights, *hyper, **options)` to the value with each term times its weight; by default
            one number times the value.
        weigh: From the same to the weights, or an error where terms have no such weights; by default a single number
            may multiply the penalty, and no tree. Steps that are trees are its business too.
        in_metric: From `(params, *hyper, **options)` to whether `proximal` finds the minimum in a metric; by default
            whether it takes one.
        inner_steps: For a convex penalty that does not: the steps of a descent that `prox` then takes if it is not
            told how many. None for an error.
        separable: Whether it is a sum over entries; None if its value on a leaf tells.
        couples_leaves: Whether the proximal point of one leaf depends on others.
        has_gradient: Whether the gradient tells anything; False where it is 0 everywhere, as that of `l0`, so that
            descent along it would do nothing.
        convex: Whether it is convex, which `prox_dual` needs; or a function of its hyperparameters and options to that.

    Example:
        One norm over a whole tree, which zeroes all of its leaves at once:

        >>> def joint_prox(params, step):
        ...     norm = global_norm(params)
        ...     return tree_map(lambda w: w * torch.relu(norm - step) / norm, params)
        >>> joint = Penalty(global_norm, lambda params: tree_map(lambda w: w / global_norm(params), params), joint_prox)
        >>> params = {"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])}
        >>> joint(params), joint.prox(params, 6.0)
        (tensor(5.), {'weight': tensor([0.]), 'bias': tensor([0.])})

        A sum, whose first term acts on matrices alone:

        >>> both = 0.1 * l1.given(mask=matrices) + elastic.given(alpha=0.2, rho=0.5)
        >>> both
        0.1 * l1.given(mask=matrices) + elastic.given(0.2, 0.5)
        >>> both({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([4.0])})
        tensor(2.2500)
        >>> both.prox({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([0.1])}, 1.0)
        {'weight': tensor([[2.5455]]), 'bias': tensor([0.])}

        A weight for each entry, and none for the bias:

        >>> weighted = {"weight": torch.tensor([[1.0, 10.0]]), "bias": 0.0} * l1
        >>> params = {"weight": torch.tensor([[3.0, -2.0]]), "bias": torch.tensor([4.0])}
        >>> weighted(params), weighted.prox(params, 0.5)
        (tensor(23.), {'weight': tensor([[2.5000, 0.0000]]), 'bias': tensor([4.])})
    """

    _made: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # What pickle calls, with which arguments.

    @remembering
    def __init__(
        self,
        value: Callable[..., Tensor],
        gradient: Callable[..., Params],
        proximal: Callable[..., Params],
        *,
        residual: Callable[..., Params] | None = None,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        rule: Callable[..., Any] | None = None,
        structure: Structure | None = None,
        weighted: Callable[..., Tensor] | None = None,
        weigh: Callable[..., Hyper] | None = None,
        in_metric: Callable[..., bool] | None = None,
        inner_steps: int | None = None,
        separable: bool | None = False,
        couples_leaves: bool = True,
        has_gradient: bool = True,
        convex: bool | Callable[..., bool] = True,
    ) -> None:
        flags(couples_leaves=couples_leaves, has_gradient=has_gradient)
        if not callable(convex):
            flags(convex=convex)
        if separable is not None:
            flags(separable=separable)
        rule = value if rule is None else rule
        self._value, self._gradient, self._proximal, self._residual = value, gradient, proximal, residual
        self._weighted, self._weigh = weighted, weigh
        takes = "metric" in inspect.signature(proximal).parameters
        self._in_metric, self._inner_steps = in_metric or (lambda *hyper, **options: takes), inner_steps
        self.separable, self.couples_leaves, self.has_gradient = separable, couples_leaves, has_gradient
        self._convex = convex
        self.structure = structure or Structure()
        self.__name__ = rule.__name__
        self.__qualname__ = getattr(rule, "__qualname__", rule.__name__)
        self.__doc__ = rule.__doc__
        self.__module__ = rule.__module__
        parameters = list(inspect.signature(rule).parameters.values())[1:]
        self._hyper = tuple(p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)
        self._options = frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        self.bounds = dict(bounds or {})
        self.__signature__ = inspect.Signature(
            [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters]
        )

    kind = "penalty"

    def __bool__(self) -> bool:
        if dynamo_asks():
            return True
        raise TypeError(
            f"the {self.kind} {self.__name__} has no truth value. Write a + b for `a and b`; to ask whether there is "
            "one, write `is not None`."
        )

    def __repr__(self) -> str:
        if self.made_by is not None:
            return super().__repr__()
        return f"<{self.kind} {self.__name__}({', '.join(('params', *(p.name for p in self._hyper)))})>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = sys.modules.get(self.__module__)
        for part in self.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is self:
            return self.__qualname__
        return super().__reduce_ex__(protocol) if self.made_by is not None else (_made_again, self._made)

    @without_autocast
    def __call__(self, params: Params = LACKING, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> Tensor:
        """The value, summed over all leaves: a 0-dim tensor, float32 at least."""
        self._check_given(params=params)
        values, options = self.bind(*hyper, **options)
        check_params(params)
        chosen = kept_by(mask, params)
        if values:
            say_shared(self, chosen, values)
        return self._value(chosen, *values, **options)

    @without_autocast
    def grad(self, params: Params = LACKING, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> Params:
        """The gradient, the subgradient of least norm at a kink: a tree like the parameters."""
        self._check_given("grad", params=params)
        values, options = self.bind(*hyper, **options)
        check_params(params)
        rest = None if mask is None else tree_map(torch.zeros_like, params)
        return on_mask(mask, params, lambda chosen: self._gradient(chosen, *values, **options), rest)

    @without_autocast
    def prox(
        self,
        params: Params = LACKING,
        step: Hyper = LACKING,
        *hyper: Hyper,
        metric: Params | None = None,
        inner_steps: int | None = None,
        mask: Mask | None = None,
        **options: Any,
    ) -> Params:
        r"""The proximal operator, :math:`\arg\min_z \frac{1}{2} \sum_i h_i (z_i - w_i)^2 + \text{step} \cdot g(z)`.

        Args:
            params: The tree :math:`w`.
            step: Number of at least 0, tensor, or tree of them, as finely cut as weights; 0 is the identity.
            hyper: Hyperparameters of the penalty.
            metric: Tree of positive tensors :math:`h` like the parameters; by default all ones.
            inner_steps: For a convex penalty without a closed form in a metric: the number of steps, at least 1, of a
                descent that finds the point there with the proximal operator without a metric. 100 give 7 to 12 digits
                where the metric of a leaf spans two orders of magnitude. None for the penalty's own rule.
            mask: Leaves on which the penalty acts; the others stay as they are.
            options: Static options of the penalty.

        Raises:
            ValueError: There is no rule in a metric, and no `inner_steps`.
        """
        self._check_given("prox", params=params, step=step)
        values, options = self.bind(*hyper, **options)
        check_params(params)
        check_hyper("step", step, AT_LEAST_0)
        check_inner_steps(inner_steps)
        if metric is not None:
            check_alike(params, metric, ("params", "metric"))
            map_with_path(lambda path, h: check_sign(f"metric at '{dotted(path)}'" if path else "metric", h), metric)

        def act(chosen: Params) -> Params:
            own = self.weigh(chosen, step, *values, **options) if self.weighable else step
            if metric is None:
                return self._proximal(chosen, own, *values, **options)
            # Where nothing holds an entry, 0 / 0 would hide that no step is taken; -0.0 would turn the step around. Its
            # inverse is far from overflow, so that rules may sum it.
            h = kept_by(mask, params, metric)
            h = compute_wide(lambda h: h.clamp(min=torch.finfo(h.dtype).tiny ** 0.8), h)
            count = inner_steps
            if count is None:
                if self._in_metric(chosen, *values, **options):
                    return self._proximal(chosen, own, *values, metric=h, **options)
                count = self._inner_steps
            if count is None:
                raise ValueError(
                    f"{self.__name__} has no closed proximal operator in a metric: it couples entries, and gives no "
                    "rule for one. Give inner_steps=, the number of steps of a descent that finds the minimum of a "
                    "convex penalty, or leave metric= out. In a penalty of your own, give @penalty a metric= rule, or "
                    "let the value return one term for each entry."
                )
            plain = lambda x, size: self._proximal(x, size, *values, **options)
            landed = approach(plain, chosen, chosen, h, own, count, apart=not self.couples_leaves)
            return compute(lambda w, z: z, chosen, landed)

        return on_mask(mask, params, act, params)

    @without_autocast
    def prox_dual(
        self, params: Params = LACKING, step: Hyper = LACKING, *hyper: Hyper, mask: Mask | None = None, **options: Any
    ) -> Params:
        r"""The proximal operator of the conjugate :math:`g^*(z) = \sup_w \langle z, w \rangle - g(w)`.

        It is :math:`w - \text{step} \cdot \operatorname{prox}_{g / \text{step}}(w / \text{step})` for a convex penalty,
        by the decomposition of Moreau. Primal-dual methods take it: that of `l1` is a projection on the hypercube,
        that of a constraint a proximal step of its support function.

        Args:
            params: The tree :math:`w`.
            step: Number above 0, tensor, or tree of them, as finely cut as those of `prox`.
            hyper: Hyperparameters of the penalty.
            mask: Leaves on which the penalty acts; the others stay as they are.
            options: Static options of the penalty.

        Raises:
            ValueError: The penalty is not convex.
        """
        self._check_given("prox_dual", params=params, step=step)
        if not self.is_convex(*hyper, **options):
            raise ValueError(
                f"{self.__name__} is not known to be convex; expected a convex penalty such as l1. The conjugate of "
                "another one is that of its convex envelope, which its own proximal operator does not tell."
            )
        check_hyper("step", step, FINITE_ABOVE_0)
        check_params(params)

        def act(chosen: Params) -> Params:
            spread = product(chosen, step, 1.0)
            inverse = tree_map(lambda s: 1 / s, spread)
            scaled = compute_wide(lambda w, c: w / c, chosen, hyper=(spread,))
            landed = self.prox(scaled, inverse, *hyper, **options)
            return compute(lambda w, z, c: w - c * z, chosen, landed, hyper=(spread,))

        return on_mask(mask, params, act, params)

    @without_autocast
    def residual(
        self,
        params: Params,
        grads: Params,
        *hyper: Hyper,
        strength: Hyper = 1.0,
        mask: Mask | None = None,
        **options: Any,
    ) -> Params:
        r"""The element of least norm of :math:`\nabla f(w) + \text{strength} \cdot \partial g(w)`: 0 at a solution."""
        values, options = self.bind(*hyper, **options)
        check_params(params)
        check_alike(params, grads, ("params", "grads"))
        check_hyper("strength", strength, AT_LEAST_0)

        def act(chosen: Params) -> Params:
            slopes = kept_by(mask, params, grads)
            own = self.weigh(chosen, strength, *values, **options) if self.weighable else strength
            if self._residual is not None:
                return self._residual(chosen, slopes, own, *values, **options)
            moved = compute(lambda w, g: w - g, chosen, slopes)
            landed = self._proximal(moved, own, *values, **options)
            return compute(lambda w, z: w - z, chosen, landed)

        return on_mask(mask, params, act, grads)

    @property
    def has_residual(self) -> bool:
        """Whether the residual is that of a rule of its own, in the units of the gradient."""
        return self._residual is not None

    def in_metric(self, params: Params, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> bool:
        """Whether the proximal operator of such parameters has a rule of its own in a metric."""
        values, options = self.bind(*hyper, **options)
        chosen = kept_by(mask, params)
        return self._in_metric(chosen, *values, **options)

    def is_convex(self, *hyper: Hyper, **options: Any) -> bool:
        """Whether it is convex, as it says of itself."""
        return self._convex(*hyper, **options) if callable(self._convex) else self._convex

    @property
    def weighable(self) -> bool:
        """Whether weights that are trees may multiply this penalty."""
        return self._weigh is not None

    def weigh(self, params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Hyper:
        """Weights as they multiply the terms of this penalty, or an error that says at which leaf they do not."""
        if is_single(weights):
            return weights
        if self._weigh is None or not self.weighable:
            raise _one_number(self, weights)
        values, options = self.bind(*hyper, **options)
        return self._weigh(params, weights, *values, **options)

    @without_autocast
    def weighted_value(
        self, params: Params, weights: Hyper, /, *hyper: Hyper, mask: Mask | None = None, **options: Any
    ) -> Tensor:
        """The value of `weights * self`."""
        values, options = self.bind(*hyper, **options)
        check_params(params)
        chosen = kept_by(mask, params)
        if values:
            say_shared(self, chosen, values)
        own = self.weigh(chosen, weights, *values, **options)
        if self._weighted is not None:
            return self._weighted(chosen, own, *values, **options)
        value = self._value(chosen, *values, **options)
        return times(beside(own, value), value).to(value.dtype)

    @without_autocast
    def weighted_grad(
        self, params: Params, weights: Hyper, /, *hyper: Hyper, mask: Mask | None = None, **options: Any
    ) -> Params:
        """The gradient of `weights * self`."""
        values, options = self.bind(*hyper, **options)
        check_params(params)
        rest = None if mask is None else tree_map(torch.zeros_like, params)

        def act(chosen: Params) -> Params:
            own = self.weigh(chosen, weights, *values, **options)
            return compute(lambda g, c: times(c, g), self._gradient(chosen, *values, **options), hyper=(own,))

        return on_mask(mask, params, act, rest)

    def given(self, *hyper: Hyper, strength: Hyper = 1.0, mask: Mask | None = None, **options: Any) -> Penalty:
        """This penalty with its hyperparameters and options, times a number or weights, on the leaves of a mask.

        It takes nothing more, and may be added to others. `0.1 * l1` is `l1.given(strength=0.1)`, and so with a tree
        of weights; code that is compiled writes the second if the number is a tensor.
        """
        self._check_names(options)
        missing = [p.name for p in self._hyper[len(hyper) :] if p.default is p.empty and p.name not in options]
        if missing:
            raise TypeError(
                f"{self.__name__} still takes {', '.join(missing)}; a penalty that is scaled or added has its "
                f"hyperparameters, as in 0.1 * {self.__name__}.given({', '.join(missing)})"
            )
        values, options = self.bind(*hyper, **options)
        if any([callable(leaf) for value in (strength, *values) for leaf in tree_leaves(value)]):
            raise TypeError(
                f"{self.__name__} is given a function; expected numbers, tensors or trees of them. A schedule goes to "
                "what takes the penalty, as strength= or as a hyperparameter there."
            )
        if not isinstance(strength, float) or not strength >= 0:
            # A compiler would trace how the name of a sum is written.
            name = "the strength" if is_compiling() else f"the strength of {self.__name__}"
            check_hyper(name, strength, AT_LEAST_0)
        if not is_single(strength) and not self.weighable:
            raise _one_number(self, strength)
        one = isinstance(strength, (int, float)) and strength == 1
        return Sum((Term(self, () if one else (strength,), values, tuple(options.items()), mask),))

    def __add__(self, other: Penalty) -> Penalty:
        if not isinstance(other, Penalty):
            what = "a tensor" if isinstance(other, Tensor) else f"the {type(other).__name__} {other!r}"
            raise TypeError(
                f"unsupported operands for +, {self.__name__} and {what}; expected penalties. In a loss stands "
                f"the value, {self._as_called()}(params); a chain has add_penalty or proximal for a link."
            )
        return Sum((*_terms(self), *_terms(other)))

    def __radd__(self, other: Any) -> Penalty:
        return self if _begins_a_sum(other) else self + other

    def __mul__(self, strength: Hyper) -> Penalty:
        if isinstance(strength, Penalty):
            raise TypeError(
                f"{self.__name__} is multiplied by {strength.__name__}; expected a number, or a tree of weights. "
                f"A sum is {self.__name__} + {strength.__name__}."
            )
        return self.given(strength=strength)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Hyper) -> Penalty:
        if isinstance(divisor, Penalty):
            raise TypeError(
                f"{self.__name__} is divided by {divisor.__name__}; expected a number above 0, or a tree of such"
            )
        self.given(strength=divisor)  # For its errors, which name what came and not its inverse.
        check_hyper("the divisor" if is_compiling() else f"the divisor of {self.__name__}", divisor, ABOVE_0)
        return self.given(strength=tree_map(lambda c: 1 / c, divisor))


class Sum(Penalty):
    """Terms added up: a penalty that takes no hyperparameters."""

    # In attributes alone, without a look at signatures: sums are also made inside compiled functions.
    def __init__(self, terms: tuple[Term, ...]) -> None:
        self.terms = terms
        self._hyper, self._options, self.bounds, self._inner_steps = (), frozenset(), {}, None
        self.structure = Structure(parts=lambda: terms)
        self.separable = all([term.penalty.separable is True for term in terms])
        self.couples_leaves = any([term.penalty.couples_leaves for term in terms])
        self.has_gradient = all([term.penalty.has_gradient for term in terms])
        self._convex = all([term.penalty.is_convex(*term.hyper, **dict(term.options)) for term in terms])

    @property
    def __name__(self) -> str:
        return " + ".join([term.title() for term in self.terms])

    def __repr__(self) -> str:
        return self.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Sum, (self.terms,)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.Signature([inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)])

    @property
    def project(self) -> NoReturn:
        raise AttributeError(
            f"{self!r} has no attribute 'project'; prox(params, 1.0) is the nearest point, if its terms are constraints"
        )

    def _value(self, params: Params) -> Tensor:
        return sum_value(self.terms, params)

    def _gradient(self, params: Params) -> Params:
        return sum_gradient(self.terms, params)

    def _proximal(self, params: Params, step: Hyper, metric: Params | None = None) -> Params:
        return sum_proximal(self.terms, params, step, metric)

    def in_metric(self, params: Params, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> bool:
        self.bind(*hyper, **options)
        chosen = kept_by(mask, params)
        return sum_in_metric(self.terms, chosen)

    def _in_metric(self, params: Params) -> bool:
        return True  # Or its own rule says why not.

    def _residual(self, params: Params, grads: Params, strength: Hyper) -> Params:
        return sum_residual(self.terms, params, grads, strength)

    @property
    def weighable(self) -> bool:
        return all([term.penalty.weighable for term in self.terms])

    def _weighted(self, params: Params, weights: Hyper) -> Tensor:
        return sum_value([term.times(weights) for term in self.terms], params)

    def _weigh(self, params: Params, weights: Hyper) -> Hyper:
        for term in self.terms:
            term.times(weights).check(params)
        return weights


def _begins_a_sum(x: Any) -> bool:
    """Whether it is the 0 with which `sum` begins."""
    return type(x) is int and x == 0


def _made_again(function: Callable[..., Penalty], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Penalty:
    return function(*args, **kwargs)


def _decorated(decorator: Callable[..., Any], options: dict[str, Any], rule: Callable[..., Any]) -> Penalty:
    return decorator(**options)(rule)


def is_single(weights: Hyper) -> bool:
    """Whether weights are a single number."""
    return isinstance(weights, (int, float)) or (isinstance(weights, Tensor) and not weights.ndim)


def _one_number(penalty: Penalty, weights: Hyper) -> TypeError:
    came = f"a tensor of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type_of(weights)
    return TypeError(
        f"the strength of {penalty.__name__} is {came}; expected a number or a tensor without dimensions, because this "
        "penalty is not known to be a sum over leaves. The leaves on which it acts are given(mask=...); groups that "
        "span leaves have weights=."
    )


def _terms(whole: Penalty) -> tuple[Term, ...]:
    return whole.terms if isinstance(whole, Sum) else _terms(whole.given())
