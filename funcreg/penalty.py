"""What a penalty is: value, gradient and proximal operator, written once."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcreg._typing import Hyper, Mask, Params
from funcreg.checks import check_alike, check_params, fits, leaf_name, shared_leaf
from funcreg.composition import Structure, Term, sum_gradient, sum_in_metric, sum_proximal, sum_residual, sum_value
from funcreg.construction import Remembering
from funcreg.descent import approach, check_inner_steps
from funcreg.leafwise import (
    compute,
    compute_leaves,
    compute_wide,
    product,
    reduce_leaves,
    times,
    total,
    without_autocast,
)
from funcreg.masks import keep, mask_leaves, merge
from funcreg.notices import warn_user
from funcreg.ranges import check_range, check_sign, concrete, flags
from funcreg.tree import dotted, flatten, map_with_path, tree_leaves, tree_map
from funcreg.undocumented import dynamo_asks, is_compiling

P = TypeVar("P", bound="Penalty")
_AT_LEAST_0 = (0.0, math.inf)
#: In the place of an argument that did not come.
LACKING: Any = inspect.Parameter.empty


class Penalty(Remembering):
    r"""Value, gradient and proximal operator of a penalty :math:`g` on trees of parameters.

    `p(params, *hyper)` is the value, a 0-dim tensor summed over all leaves; `p.grad(params, *hyper)` the gradient,
    the subgradient of least norm at a kink; `p.prox(params, step, *hyper)` is
    :math:`\arg\min_z \frac{1}{2} \|z - w\|^2 + \text{step} \cdot g(z)`, and `p.prox_dual(params, step, *hyper)` that of
    the conjugate of a convex :math:`g`. Each takes a `mask` and looks at its leaves alone. Most penalties are written
    on one leaf, with the decorator `penalty`; one that couples leaves is made from three functions on trees.

    `p.given(*hyper, **options)` is the penalty of given hyperparameters; such penalties are scaled and added,
    `0.1 * l1 + elastic.given(0.1, 0.5)`. A sum has a value and a gradient; it has a proximal operator where that is
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
            a metric, too, takes `metric=None`: a tree of positive tensors like the parameters.
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
        options = {
            "residual": residual,
            "bounds": bounds,
            "rule": rule,
            "structure": structure,
            "weighted": weighted,
            "weigh": weigh,
            "in_metric": in_metric,
            "inner_steps": inner_steps,
            "separable": separable,
            "couples_leaves": couples_leaves,
            "has_gradient": has_gradient,
            "convex": convex,
        }
        self._made: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
        self._made = type(self), (value, gradient, proximal), options
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

    def made_from(self: P, decorator: Callable[..., Any], options: dict[str, Any], rule: Callable[..., Any]) -> P:
        """This penalty, which pickles as what a decorator makes of a rule."""
        self._made = _decorated, (decorator, options, rule), {}
        return self

    @without_autocast
    def __call__(self, params: Params = LACKING, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> Tensor:
        """The value, summed over all leaves: a 0-dim tensor, float32 at least."""
        self._check_given(params=params)
        values, options = self.bind(*hyper, **options)
        check_params(params)
        chosen = params if mask is None else keep(params, mask_leaves(mask, params))
        if values:
            _say_shared(self, chosen, values)
        return self._value(chosen, *values, **options)

    @without_autocast
    def grad(self, params: Params = LACKING, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> Params:
        """The gradient, the subgradient of least norm at a kink: a tree like the parameters."""
        self._check_given("grad", params=params)
        values, options = self.bind(*hyper, **options)
        check_params(params)
        rest = None if mask is None else tree_map(torch.zeros_like, params)
        return _on(mask, params, lambda chosen: self._gradient(chosen, *values, **options), rest)

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
        _check("step", step, _AT_LEAST_0)
        check_inner_steps(inner_steps)
        if metric is not None:
            check_alike(params, metric, ("params", "metric"))
            map_with_path(lambda path, h: check_sign(f"metric at '{dotted(path)}'" if path else "metric", h), metric)

        def act(chosen: Params) -> Params:
            own = self.weigh(chosen, step, *values, **options) if self.weighable else step
            h = _like(metric, mask, params)
            if h is None:
                return self._proximal(chosen, own, *values, **options)
            # Where nothing holds an entry, 0 / 0 would hide that no step is taken; -0.0 would turn the step around. Its
            # inverse is far from overflow, so that rules may sum it.
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

        return _on(mask, params, act, params)

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
        _check("step", step, (sys.float_info.min, math.inf))
        check_params(params)

        def act(chosen: Params) -> Params:
            spread = product(chosen, step, 1.0)
            inverse = tree_map(lambda s: 1 / s, spread)
            scaled = compute_wide(lambda w, c: w / c, chosen, hyper=(spread,))
            landed = self.prox(scaled, inverse, *hyper, **options)
            return compute(lambda w, z, c: w - c * z, chosen, landed, hyper=(spread,))

        return _on(mask, params, act, params)

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
        _check("strength", strength, _AT_LEAST_0)

        def act(chosen: Params) -> Params:
            slopes = _like(grads, mask, params)
            own = self.weigh(chosen, strength, *values, **options) if self.weighable else strength
            if self._residual is not None:
                return self._residual(chosen, slopes, own, *values, **options)
            moved = compute(lambda w, g: w - g, chosen, slopes)
            landed = self._proximal(moved, own, *values, **options)
            return compute(lambda w, z: w - z, chosen, landed)

        return _on(mask, params, act, grads)

    @property
    def has_residual(self) -> bool:
        """Whether the residual is that of a rule of its own, in the units of the gradient."""
        return self._residual is not None

    def in_metric(self, params: Params, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> bool:
        """Whether the proximal operator of such parameters has a rule of its own in a metric."""
        values, options = self.bind(*hyper, **options)
        chosen = params if mask is None else keep(params, mask_leaves(mask, params))
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
        if _single(weights):
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
        chosen = params if mask is None else keep(params, mask_leaves(mask, params))
        if values:
            _say_shared(self, chosen, values)
        own = self.weigh(chosen, weights, *values, **options)
        if self._weighted is not None:
            return self._weighted(chosen, own, *values, **options)
        value = self._value(chosen, *values, **options)
        return times(own, value).to(value.dtype)

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

        return _on(mask, params, act, rest)

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
            _check(name, strength, _AT_LEAST_0)
        if not _single(strength) and not self.weighable:
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

    def bind(self, *hyper: Hyper, **options: Any) -> tuple[tuple[Hyper, ...], dict[str, Any]]:
        """Hyperparameters in their order and options, or an error that says what this penalty takes."""
        if len(hyper) > len(self._hyper):
            raise TypeError(f"{self._takes()}; got {len(hyper)} hyperparameters. {self._how_strong()}")
        values = list(hyper)
        if options:  # Most calls have none, and traced code pays for each look at them.
            self._check_names(options)
        for parameter in self._hyper[len(hyper) :]:
            value = options.pop(parameter.name, parameter.default)
            if value is inspect.Parameter.empty:
                packed = any(isinstance(given, tuple) for given in values)
                raise TypeError(
                    f"{self._takes()}; {parameter.name} is missing"
                    + (". Is a * missing before a tuple?" if packed else "")
                )
            values.append(value)
        if options:
            twice = [name for name in options if name not in self._options]
            if twice:
                raise TypeError(f"{self._takes()}; got {', '.join(twice)} by position and by name")
        for parameter, value in zip(self._hyper, values, strict=True):
            bounds = self.bounds.get(parameter.name)
            if bounds is None or type(value) is not float or not bounds[0] <= value <= bounds[1]:
                _check(f"{parameter.name} of {self.__name__}", value, bounds)
        weights = options.get("weights") if options else None
        for tensor in weights if isinstance(weights, (list, tuple)) else (weights,):
            if isinstance(tensor, Tensor):
                _check(f"weights of {self.__name__}", tensor, _AT_LEAST_0)
        return tuple(values), options

    def _check_given(self, form: str = "", **given: Any) -> None:
        """Raise an error, with the right way to write it, for arguments that did not come."""
        lacking = [name for name, value in given.items() if value is LACKING]
        if not lacking:
            return
        name, row = self._as_called(), ", ".join([*given, *[p.name for p in self._hyper]])
        call = f"{name}.{form}" if form else name
        hint = "" if form else f". What takes a {self.kind} as an argument gets it as it is, {self.__name__}, uncalled."
        hint = ". The step is the learning rate times the strength." if lacking == ["step"] else hint
        raise TypeError(f"{call} lacks {' and '.join(lacking)}; expected {call}({row}){hint}")

    def _check_names(self, options: Collection[str]) -> None:
        known = {p.name for p in self._hyper} | self._options
        unknown = [name for name in options if name not in known]
        if unknown:
            hint = _other_name(unknown[0], known) or self._of_two_strengths(unknown)
            if not hint and _STRENGTHS.intersection(unknown):
                hint = f". {self._how_strong()}"
            raise TypeError(f"{self._takes()}; got {', '.join(unknown)}{hint}")

    def _of_two_strengths(self, names: Collection[str]) -> str:
        """How `elastic` takes what Keras calls l1 and l2."""
        if self.__name__ != "elastic" or not {"l1", "l2"}.issuperset(names):
            return ""
        call = "elastic(params, *elastic_from_keras(l1=1e-3, l2=1e-4))"
        return f". Two strengths of their own become alpha and rho by a converter, as in {call}."

    def _takes(self) -> str:
        takes = f"{self.__name__} takes {', '.join(p.name for p in self._hyper) or 'no hyperparameters'}"
        return takes + (f" and the keywords {', '.join(sorted(self._options))}" if self._options else "")

    def _how_strong(self) -> str:
        name = self._as_called()
        return (
            f"Its strength is a factor, 1e-4 * {name}(params), also of the step, {name}.prox(params, 1e-4 * rate); or "
            f"strength=1e-4 where it is an argument, as in regularize(optimizer, {self.__name__}, strength=1e-4)."
        )

    def _as_called(self) -> str:
        """The name, such that a call or an attribute may follow."""
        return f"({self.__name__})" if " " in self.__name__ else self.__name__

    def without_defaults(self, values: tuple[Hyper, ...]) -> tuple[Hyper, ...]:
        """Hyperparameters without the last ones that are what they would be anyway."""
        kept = len(values)
        while kept and self._hyper[kept - 1].default is values[kept - 1]:
            kept -= 1
        return values[:kept]


#: What a strength is called elsewhere.
_STRENGTHS = {"alpha", "l1", "l1_lambda", "lam", "lamb", "lambd", "lambda_", "lmbda", "reg", "strength", "weight_decay"}


class Sum(Penalty):
    """Terms added up: a penalty that takes no hyperparameters."""

    # In attributes alone, without a look at signatures: sums are also made inside compiled functions.
    def __init__(self, terms: tuple[Term, ...]) -> None:
        self._addends = terms
        self._hyper, self._options, self.bounds, self._inner_steps = (), frozenset(), {}, None
        self.structure = Structure(parts=lambda: terms)
        self.separable = all([term.penalty.separable is True for term in terms])
        self.couples_leaves = any([term.penalty.couples_leaves for term in terms])
        self.has_gradient = all([term.penalty.has_gradient for term in terms])
        self._convex = all([term.penalty.is_convex(*term.hyper, **dict(term.options)) for term in terms])

    @property
    def __name__(self) -> str:
        return " + ".join([term.title() for term in self._addends])

    def __repr__(self) -> str:
        return self.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Sum, (self._addends,)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.Signature([inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)])

    def _value(self, params: Params) -> Tensor:
        return sum_value(self._addends, params)

    def _gradient(self, params: Params) -> Params:
        return sum_gradient(self._addends, params)

    def _proximal(self, params: Params, step: Hyper, metric: Params | None = None) -> Params:
        return sum_proximal(self._addends, params, step, metric)

    def in_metric(self, params: Params, *hyper: Hyper, mask: Mask | None = None, **options: Any) -> bool:
        self.bind(*hyper, **options)
        chosen = params if mask is None else keep(params, mask_leaves(mask, params))
        return sum_in_metric(self._addends, chosen)

    def _in_metric(self, params: Params) -> bool:
        return True  # Or its own rule says why not.

    def _residual(self, params: Params, grads: Params, strength: Hyper) -> Params:
        return sum_residual(self._addends, params, grads, strength)

    @property
    def weighable(self) -> bool:
        return all([term.penalty.weighable for term in self._addends])

    def _weighted(self, params: Params, weights: Hyper) -> Tensor:
        return sum_value([term.times(weights) for term in self._addends], params)

    def _weigh(self, params: Params, weights: Hyper) -> Hyper:
        for term in self._addends:
            term.times(weights).check(params)
        return weights


def _begins_a_sum(x: Any) -> bool:
    """Whether it is the 0 with which `sum` begins."""
    return type(x) is int and x == 0


def _made_again(function: Callable[..., Penalty], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Penalty:
    return function(*args, **kwargs)


def _decorated(decorator: Callable[..., Any], options: dict[str, Any], rule: Callable[..., Any]) -> Penalty:
    return decorator(**options)(rule)


def _check(name: str, value: Hyper, bounds: tuple[float, float] | None) -> None:
    """Raise an error if a number of a hyperparameter is none, or outside of its bounds, as far as it is known."""
    if isinstance(value, (dict, list, tuple)):  # By the walk over trees, which knows every kind of node.
        map_with_path(lambda path, leaf: _check(f"{name} at '{dotted(path)}'", leaf, bounds), value)
        return
    if bounds is not None:
        least, greatest = bounds
        if isinstance(value, Tensor) and not value.ndim and value.is_floating_point():
            known = concrete(value)
            if known is None or least <= float(known) <= greatest:
                return
        above_0 = least == sys.float_info.min
        check_range(name, value, 0.0 if above_0 else least, greatest, open_low=above_0)
    elif not isinstance(value, Tensor) or not (value.ndim or value.is_complex()):
        check_range(name, value, -math.inf)


#: What other libraries call hyperparameters and options.
_ELSEWHERE = {"l1_ratio": "rho", "lam": "alpha", "lambda_": "alpha", "axis": "dim", "dims": "dim", "weight": "weights"}


def _other_name(name: str, known: Collection[str]) -> str:
    own = _ELSEWHERE.get(name)
    return f". {name} of other libraries is {own} here." if own in known else ""


def _say_shared(penalty: Penalty, params: Params, values: tuple[Hyper, ...]) -> None:
    """Warn of an anchor in the memory of parameters of a module, which moves along where these are written into."""
    if all([isinstance(value, (int, float)) for value in values]) or not torch.is_grad_enabled():
        return
    name = shared_leaf(params, values)
    if name is not None and any([type(w) is torch.nn.Parameter and w.requires_grad for w in tree_leaves(params)]):
        warn_user(
            f"{penalty.__name__} got a tensor that shares memory with {leaf_name('params', name)}, as state_dict() and "
            "detach() give them: an optimizer that writes into the parameter moves both, and the penalty has no effect "
            "on it. Give a copy, as by w.detach().clone() or copy.deepcopy(model.state_dict())."
        )


def _single(weights: Hyper) -> bool:
    """Whether weights are a single number."""
    return isinstance(weights, (int, float)) or (isinstance(weights, Tensor) and not weights.ndim)


def _one_number(penalty: Penalty, weights: Hyper) -> TypeError:
    came = f"a tensor of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
    return TypeError(
        f"the strength of {penalty.__name__} is {came}; expected a number or a tensor without dimensions, because this "
        "penalty is not known to be a sum over leaves. The leaves on which it acts are given(mask=...); groups that "
        "span leaves have weights=."
    )


def _terms(whole: Penalty) -> tuple[Term, ...]:
    return whole._addends if isinstance(whole, Sum) else _terms(whole.given())


def _like(tree: Params | None, mask: Mask | None, params: Params) -> Params | None:
    return tree if mask is None or tree is None else keep(tree, mask_leaves(mask, params))


def _on(mask: Mask | None, params: Params, act: Callable[[Params], Params], rest: Params) -> Params:
    """`act` on the leaves that a mask keeps; the other leaves are those of `rest`."""
    if mask is None:
        return act(params)
    bools = mask_leaves(mask, params)
    return merge(rest, act(keep(params, bools)), bools)


def penalty(
    value: Callable[..., Tensor] | None = None,
    /,
    *,
    gradient: Callable[..., Tensor] | None = None,
    proximal: Callable[..., Tensor] | None = None,
    metric: Callable[..., Tensor] | None = None,
    residual: Callable[..., Tensor] | None = None,
    separable: bool | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    structure: Structure | None = None,
    inner_steps: int | None = None,
    has_gradient: bool = True,
    convex: bool | Callable[..., bool] = True,
) -> Callable[[Callable[..., Tensor]], Penalty]:
    r"""Lift rules on one leaf to a `Penalty` on trees: the decorated function is the value.

    Positional arguments after the leaf are hyperparameters: numbers, tensors, or trees like the parameters.
    Keyword-only arguments are static options. A rule sees float32 at least; gradients and proximal points come
    back in the dtype of the leaf.

    The value may return one term for each entry, group or leaf; the penalty is the sum of the terms. One term for
    each entry makes the penalty separable, and the proximal operator in a diagonal metric :math:`h` is then its
    own rule with `step / h`. The same terms are what `weights * penalty` weighs: entries of a separable penalty,
    groups where `structure` tells of groups (terms then keep the reduced dimensions), else leaves.

    Args:
        value: Nothing. It is what is decorated, and without its rules an error.
        gradient: `(w, *hyper, **options)` to the gradient, 0 at a kink of a norm.
        proximal: `(w, step, *hyper, **options)` to :math:`\arg\min_z \frac{1}{2} \|z - w\|^2 + \text{step} \cdot g(z)`.
        metric: `(w, metric, step, *hyper, **options)` to the same with
            :math:`\frac{1}{2} \sum_i h_i (z_i - w_i)^2`; not needed for a separable penalty.
        residual: `(w, g, strength, *hyper, **options)` to the element of least norm of
            :math:`g + \text{strength} \cdot \partial`; by default the residual of the proximal operator.
        separable: Whether the penalty is a sum over entries; by default it is where the value has one term for each.
        bounds: From the name of a hyperparameter to the least and greatest number it may be.
        structure: What sums with this penalty may rely on; see `Structure`.
        inner_steps: For a convex penalty without `metric`: the steps of a descent that stand in for it.
        has_gradient: Whether the gradient tells anything; False where it is 0 everywhere.
        convex: Whether it is convex; or a function of its hyperparameters and options to that.

    Example:
        >>> def huber_gradient(w, width):
        ...     return w.clamp(-width, width)
        >>> def huber_prox(w, step, width):
        ...     return w - step * (w / (1 + step)).clamp(-width, width)
        >>> @penalty(gradient=huber_gradient, proximal=huber_prox, bounds={"width": (0, float("inf"))})
        ... def huber(w, width):
        ...     return torch.where(w.abs() <= width, w.square() / 2, width * (w.abs() - width / 2))
        >>> params = {"weight": torch.tensor([0.5, -3.0])}
        >>> huber(params, 1.0), huber.grad(params, 1.0), huber.prox(params, 1.0, 1.0)
        (tensor(2.6250), {'weight': tensor([ 0.5000, -1.0000])}, {'weight': tensor([ 0.2500, -2.0000])})
    """

    if value is not None or gradient is None or proximal is None:
        raise TypeError(
            "penalty lacks its rules; expected @penalty(gradient=..., proximal=...) above the value, two functions of "
            "one leaf. A value alone needs no penalty: a function of the parameters is a term of the loss as it is."
        )
    slope, landing = gradient, proximal  # Which are there.
    given = {
        "gradient": gradient,
        "proximal": proximal,
        "metric": metric,
        "residual": residual,
        "separable": separable,
        "bounds": bounds,
        "structure": structure,
        "inner_steps": inner_steps,
        "has_gradient": has_gradient,
        "convex": convex,
    }
    flags(has_gradient=has_gradient)
    if not callable(convex):
        flags(convex=convex)
    if separable is not None:
        flags(separable=separable)

    def lift(value: Callable[..., Tensor]) -> Penalty:
        def tree_value(params: Params, *hyper: Hyper, **options: Any) -> Tensor:
            # Summed leaf by leaf: the terms of one are in a cache, and those of all would be a second set of weights.
            return total(reduce_leaves(lambda w, *row: value(w, *row, **options), params, hyper=hyper))

        def tree_weighted(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Tensor:
            if _single(weights):
                plain = tree_value(params, *hyper, **options)
                return times(weights, plain).to(plain.dtype)
            rule = lambda w, c, *row: _weighted_terms(w, c, value(w, *row, **options))
            return total(reduce_leaves(rule, params, hyper=(weights, *hyper)))

        def tree_weigh(params: Params, weights: Hyper, /, *hyper: Hyper, **options: Any) -> Hyper:
            own = compute_leaves(lambda w, *row: one_a_term(w, *row, **options), params, hyper=(weights, *hyper))
            return flatten(params)[1](own)

        def one_a_term(w: Tensor, c: Any, *hyper: Any, **options: Any) -> Any:
            """A weight, if each term of the value of a leaf has one number of it; without dimensions if all have."""
            if not isinstance(c, Tensor) or not c.ndim or of_entries(w, *hyper, **options):
                return c
            inside = None if structure is None or structure.groups is None else structure.groups(w, **options)
            shape = [1 if inside is None or d in inside else n for d, n in enumerate(w.shape)]
            if not fits(c, shape):
                one = math.prod(shape) == 1
                expected = "one number for each leaf" if one else f"one for each group, {tuple(shape)}"
                raise ValueError(
                    f"a strength or step has shape {tuple(c.shape)}; expected {expected}, because "
                    f"{value.__name__} couples entries of this leaf of shape {tuple(w.shape)}"
                )
            return c.reshape(()) if inside is None else c

        def of_entries(w: Tensor, *hyper: Any, **options: Any) -> bool:
            return value(w, *hyper, **options).shape == w.shape if separable is None else separable

        def tree_gradient(params: Params, *hyper: Hyper, **options: Any) -> Params:
            return compute(lambda w, *row: slope(w, *row, **options), params, hyper=hyper)

        def tree_proximal(
            params: Params, step: Hyper, *hyper: Hyper, metric: Params | None = None, **options: Any
        ) -> Params:
            if metric is None:
                return compute(lambda w, *row: landing(w, *row, **options), params, hyper=(step, *hyper))
            return compute(
                lambda w, h, step, *row: in_metric(w, h, step, *row, **options), params, metric, hyper=(step, *hyper)
            )

        def in_metric(w: Tensor, h: Tensor, step: Any, *hyper: Any, **options: Any) -> Tensor:
            if metric is not None:
                return metric(w, h, step, *hyper, **options)
            return landing(w, step / h, *hyper, **options)

        def tree_in_metric(params: Params, *hyper: Hyper, **options: Any) -> bool:
            if metric is not None or separable is not None:
                return metric is not None or separable is True
            apart: list[bool] = []
            compute_leaves(lambda w, *row: apart.append(of_entries(w, *row, **options)) or w, params, hyper=hyper)
            return all(apart)

        def tree_residual(params: Params, grads: Params, strength: Hyper, *hyper: Hyper, **options: Any) -> Params:
            rule = residual
            assert rule is not None
            return compute(lambda w, g, *row: rule(w, g, *row, **options), params, grads, hyper=(strength, *hyper))

        return Penalty(
            tree_value,
            tree_gradient,
            tree_proximal,
            residual=None if residual is None else tree_residual,
            bounds=bounds,
            rule=value,
            structure=structure,
            weighted=tree_weighted,
            weigh=tree_weigh,
            in_metric=tree_in_metric,
            inner_steps=inner_steps,
            separable=separable,
            couples_leaves=False,
            has_gradient=has_gradient,
            convex=convex,
        ).made_from(penalty, given, value)

    return lift


def _weighted_terms(w: Tensor, c: Any, terms: Tensor) -> Tensor:
    """Terms of the value of a leaf, each times its weight."""
    if isinstance(c, Tensor) and c.ndim and terms.ndim != w.ndim:
        raise ValueError(
            f"weights of shape {tuple(c.shape)} got terms of shape {tuple(terms.shape)}; expected terms that keep the "
            f"dimensions of a leaf of shape {tuple(w.shape)}, with 1 for those inside a group"
        )
    return times(c, terms).to(terms.dtype)
