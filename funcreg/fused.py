"""The fused step: a whole chain and the addition to the parameters, in few compiled kernels over packed leaves.

A step is recorded once for trees of one structure (`recording`), cut into groups of leaves that are treated alike
(`packing`) and composed of kernels (`kernels`), which `torch.compile` compiles. Here are the buffers and the calls.
"""

from __future__ import annotations

import bisect
import functools
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from funcreg._typing import Hyper, Mask, Params, Scalar, State, Updates
from funcreg.execution import Compiler, Plan, Slab, lying, say_once
from funcreg.packing import pack
from funcreg.penalty import Penalty
from funcreg.recording import record, stand_in, undisturbed
from funcreg.regularizing import check_penalty
from funcreg.transform import Transform, nonnegative
from funcreg.tree import (
    apply_updates,
    check_alike,
    check_params,
    compute,
    leaves_like,
    restored,
    structure,
    tree_leaves,
    tree_map,
    tree_paths,
)

_like = operator.attrgetter("shape", "dtype", "device")
#: Structures of trees for which a step keeps a plan.
_PLANS = 32
#: Memory that a step makes use of again belongs to one call at a time.
_ONE_AT_A_TIME = threading.RLock()


def fuse(tx: Transform, donate: bool = False, *, backend: str | Callable[..., Any] = "inductor") -> FusedStep:
    r"""Compile `update` and `apply_updates` into one step, `step(params, grads, state) -> (params, state)`.

    On the first call the chain is recorded, leaves that are treated alike are packed together, and few kernels are
    compiled for all of them, whatever the number of leaves. What is a tensor (a counter, a strength held as a tensor)
    is read at every step; what is Python (a mask, a float, a closure) is read once. The step records no autograd
    history: to differentiate through training steps, call `tx.update` and `apply_updates`. Called inside `vmap` or
    `grad`, a step that does not donate is these plain functions. Results differ from theirs by rounding, and where a
    parameter is infinite: a proximal point is written as it is, and not as the parameter plus the way there.

    Args:
        tx: The transform; its updates are added to the parameters.
        donate: Whether the step may write the new parameters and state into the tensors it was given. It then
            allocates nothing that lasts, and returns the same tensors; nobody else may be using them.
        backend: Backend of `torch.compile`; `"eager"` and `"aot_eager"` need no compiler.

    Raises:
        TypeError: `tx` is not a transform.

    Example:
        >>> step = fuse(chain(scale(-0.1), soft_threshold(0.25)), donate=True, backend="aot_eager")
        >>> params, state = step.init({"weight": torch.tensor([1.0, -0.3])})
        >>> params, state = step(params, {"weight": torch.tensor([0.5, -0.5])}, state)
        >>> params
        {'weight': tensor([0.7000, 0.0000])}
    """
    return FusedStep(tx, donate, backend)


class FusedStep:
    """A compiled training step; see `fuse`."""

    def __init__(self, tx: Transform, donate: bool, backend: str | Callable[..., Any]) -> None:
        if not isinstance(tx, Transform):
            raise TypeError(f"fuse got a {type(tx).__name__}; expected a Transform, as in fuse(adamw(1e-3))")
        self._tx, self._donate = tx, donate
        self._compiler = Compiler(backend)
        self._plans: dict[Any, Plan | None] = {}  # None where the chain could not be recorded.
        self._slabs: dict[Any, list[Slab]] = {}
        self._last: Plan | None = None
        self._owned: list[Any] = []  # Weak references: the tensors are the caller's.

        def pure(params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
            updates, new = tx.update(grads, state, params, **extra)
            return apply_updates(params, updates), new

        self._pure = pure

        def in_place(params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> list[Tensor]:
            new = leaves_like((params, state), pure(params, grads, state, extra))
            new = [leaf + 0 if leaf.dtype != torch.bool else leaf.clone() for leaf in new]  # All are read first.
            scalars = []
            for old, leaf in zip(tree_leaves((params, state)), new, strict=True):
                if old.ndim:
                    old.copy_(leaf)
                else:
                    scalars.append(leaf)
            return scalars

        self._plainly = in_place if donate else pure
        self._compiles = True
        self._backend = backend

    def init(self, params: Params, **extra: Any) -> tuple[Params, State]:
        """Parameters and state for this step to own: copies that need no gradient, packed as the step likes them.

        Args:
            params: Tree of parameters.
            extra: Extra arguments like those of the step, if a transform needs some.
        """
        check_params(params)
        params = tree_map(lambda w: w.detach(), params)
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad():
            trees = (params, params, self._tx.init(params), _tensors(extra))
            columns, specs = zip(*map(structure, trees), strict=True)
            try:
                plan = self._plan(trees, columns, specs)
            except TypeError:  # A transform lacks an extra argument; the step will tell, if it lacks it too.
                plan = None
            leaves = [*columns[0], *columns[2]]
            new = (
                {i: view.copy_(leaves[i]) for i, view in zip(plan.owned, plan.slab().views, strict=True)}
                if plan
                else {}
            )
            copied = [
                new[i] if i in new else w.clone(memory_format=torch.contiguous_format) if isinstance(w, Tensor) else w
                for i, w in enumerate(leaves)
            ]
        count = len(columns[0])
        return restored(specs[0], copied[:count]), restored(specs[2], copied[count:])

    def gradients(self, params: Params) -> Updates:
        """Zeros like parameters of `init`, in memory where the step reads gradients without copying them together.

        Write gradients into them, as `backward()` does if they are the `grad` of module parameters.

        Raises:
            ValueError: `init` made no parameters like these.
        """
        leaves, spec = structure(params)
        likes = [_like(x) for x in leaves]
        for (specs, known, *_), plan in self._plans.items():
            if specs[0] == spec and known == tuple(likes):
                return restored(spec, plan.gradients() if plan is not None else map(torch.zeros_like, leaves))
        raise ValueError("gradients got parameters that this step's init did not make; call init first")

    def __call__(self, params: Params, grads: Updates, state: State, **extra: Any) -> tuple[Params, State]:
        """New parameters and state; with donation, in the tensors of the old ones."""
        inside = not torch.compiler.is_compiling() and maybe_current_level() is not None
        if inside and self._donate:
            raise ValueError(
                "a donating step was called inside vmap or grad, which cannot write in place. For members with "
                "hyperparameters of their own, fuse(ensemble(...)); else fuse without donate=True."
            )
        if inside or torch.compiler.is_compiling():  # What compiles a whole training step compiles this one too.
            check_params(params)
            check_alike(params, grads, ("params", "grads"))
            return self._pure(params, grads, state, extra)
        with _ONE_AT_A_TIME, torch.no_grad():
            skip = extra or self._last is None or _autocast()
            read = None if skip or self._last is None else self._last.read(params, grads, state)
            if read is not None and self._last is not None:
                plan, (columns, slab, ours) = self._last, read
                specs = plan.seen
            else:
                trees = (params, grads, state, _tensors(extra))
                columns, specs = zip(*map(structure, trees), strict=True)
                plan = None if _autocast() else self._plan(trees, columns, specs)
                slab = plan and plan.find([*columns[0], *columns[2]])
                ours = plan is not None and plan.ours(columns[1])
                columns = [columns[0], _plain(columns[1]), columns[2], _plain(columns[3])]
            if self._donate and (plan is None or slab is None or read is None or plan.suspicious(columns, slab, ours)):
                self._check_donated(params, grads, state, columns, slab)
            if plan is None:
                return self._step_unpacked(params, grads, state, extra)
            if plan is not self._last:
                plan.remember(params, grads, state, columns, specs)
                self._last = None if extra else plan  # Which is read without a look at extra arguments.
            tensors = [*columns[0], *columns[1], *columns[2]]
            if extra:
                inside = {x.untyped_storage().data_ptr() for x in tensors} if self._donate else set()
                given = [x for x in columns[3] if isinstance(x, Tensor)]
                tensors += [x.clone() if x.untyped_storage().data_ptr() in inside else x for x in given]
            out = None if plan.in_place else plan.slab(slab)
            results = plan.run(tensors, slab, out, ours)
            if self._donate:
                if not plan.in_place:
                    for old, new in zip([*columns[0], *columns[2]], results, strict=True):
                        old.copy_(new)
                return params, state
            if out is not None and read is not None:
                return plan.arranged(out, results)
            count = len(columns[0])
            return restored(specs[0], results[:count]), restored(specs[2], results[count:])

    def _plan(self, trees: Any, columns: Any, specs: Any) -> Plan | None:
        """The plan for trees like these, made if they are new, or None if the chain could not be recorded."""
        check_params(trees[0])
        check_alike(trees[0], trees[1], ("params", "grads"))
        likes = [[_like(x) if isinstance(x, Tensor) else (type(x), x) for x in column] for column in columns]
        kinds = [(type(x), x.layout) for column in columns for x in column if isinstance(x, Tensor)]
        key = (specs, *map(tuple, likes), *kinds)
        try:
            hash(key)
        except TypeError as error:
            say_once(f"fuse compiles this chain leaf by leaf, which is slow: among the extra arguments is an {error}")
            return None
        if key not in self._plans:
            if len(self._plans) >= _PLANS:  # Trees, or numbers among extra arguments, that differ at every call.
                del self._plans[next(iter(self._plans))]
                used = [plan._slabs for plan in self._plans.values() if plan is not None]
                self._slabs = {key: slabs for key, slabs in self._slabs.items() if any(slabs is x for x in used)}
            with undisturbed():
                self._plans[key] = self._recorded(trees, columns, specs, likes)
        return self._plans[key]

    def _recorded(self, trees: Any, columns: Any, specs: Any, likes: Any) -> Plan | None:
        try:
            twins = [[stand_in(x) if isinstance(x, Tensor) else x for x in column] for column in columns]
            params, grads, state, extra = (restored(spec, leaves) for spec, leaves in zip(specs, twins, strict=True))

            def results(*tensors: Tensor) -> list[Tensor]:
                return leaves_like((params, state), self._pure(params, grads, state, extra))

            found = record(results, *(x for column in twins for x in column))
            count = len(columns[0])
            written = [*found.inputs[:count], *found.inputs[2 * count : 2 * count + len(columns[2])]]
            same = [place.shape == value.shape for place, value in zip(written, found.outputs, strict=True)]
            if all(same):
                # Where old numbers go to new places, places are not written before all are read.
                pairs = zip(found.outputs, written, strict=True)
                moved = any([value.alias and value is not place for value, place in pairs])
                packing = pack(found, count, count, written)
                return Plan(found, packing, specs, likes, self._donate and not moved, self._compiler, self._slabs)
        except Exception as error:
            # If the call is at fault, the plain functions say how, and which leaf.
            self._pure(*trees)
            say_once(
                f"fuse compiles this chain leaf by leaf, which is slow for many leaves: {type(error).__name__}: {error}"
            )
            return None
        which = same.index(False)
        raise ValueError(
            f"{_names(trees[0], trees[2])[which]} came out of the step with shape {found.outputs[which].shape}; "
            f"expected {written[which].shape}, as before"
        )

    @functools.cached_property
    def _unpacked(self) -> Callable[..., Any]:
        """The plain functions, compiled leaf by leaf."""
        return torch.compile(_with_code_of_its_own(self._plainly), backend=self._backend)

    def _step_unpacked(self, params: Params, grads: Updates, state: State, extra: Any) -> tuple[Params, State]:
        result: Any
        try:
            if self._compiles:
                result = self._unpacked(params, grads, state, extra)
            else:
                result = self._plainly(params, grads, state, extra)
        except Exception as error:
            # The compiler wraps what tracing raises; the plain functions say it as it is.
            result = self._plainly(params, grads, state, extra)
            self._compiles = False
            say_once(f"fuse runs this chain without a compiler: {' '.join(str(error).split())[:300]}")
        if not self._donate:
            return result
        # Out of the graph: compiled code loses what is written into a float64 input without dimensions.
        for old, new in zip((leaf for leaf in tree_leaves((params, state)) if not leaf.ndim), result, strict=True):
            old.copy_(new)
        return params, state

    def _check_donated(self, params: Params, grads: Updates, state: State, columns: Any, slab: Slab | None) -> None:
        owned = [*columns[0], *columns[2]]
        for name, leaf in zip(_names(params, state), owned, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} is {leaf!r}; expected a tensor, into which the next one can be written")
            if leaf.is_neg() or leaf.is_conj():
                raise ValueError(f"{name} is a negated or conjugated view and cannot be donated; pass a copy of it")
            if leaf.requires_grad:
                raise ValueError(
                    f"{name} requires grad and cannot be donated. step.init(params) gives copies that can."
                )
        known = len(owned) == len(self._owned) and all([x is ref() for x, ref in zip(owned, self._owned, strict=True)])
        if slab is None and not known:
            _check_apart(_names(params, state), owned)
            self._owned = [weakref.ref(x) for x in owned]
        spans = sorted([_span(leaf) for leaf in owned if leaf.numel()])
        for name, leaf in zip(tree_paths(grads), columns[1], strict=True):
            start, end = _span(leaf)
            before = bisect.bisect_left(spans, (end, 0)) - 1  # They are apart: no other reaches further.
            if before >= 0 and spans[before][1] > start and leaf.numel():
                raise ValueError(
                    f"grads '{name}' shares memory with params or state, which are donated and so overwritten. "
                    "Pass a copy of it."
                )


def value_and_grad(
    penalty: Penalty,
    *hyper: Hyper,
    strength: Scalar = 1.0,
    mask: Mask | None = None,
    backend: str | Callable[..., Any] = "inductor",
    **options: Any,
) -> Callable[[Params], tuple[Tensor, Params]]:
    r"""Compile a penalty's value and gradient into one pass, :math:`w \mapsto (\lambda g(w), \lambda \nabla g(w))`.

    For a training loop that differentiates its loss without the penalty, and adds the penalty's own gradient. Leaves
    are packed as in `fuse`, so that it costs a pass over the parameters, whatever their number.

    Args:
        penalty: A penalty :math:`g` such as `l1`.
        hyper: Its hyperparameters: numbers, tensors or trees. Tensors are read at every call.
        strength: :math:`\lambda`: number of at least 0, or 0-dim tensor.
        mask: Leaves on which the penalty acts; the gradient of the others is 0.
        backend: Backend of `torch.compile`.
        options: Static options of the penalty, such as `dim`.

    Raises:
        TypeError: `penalty` is not a penalty, or takes other hyperparameters.

    Example:
        >>> f = value_and_grad(l1, strength=0.5, backend="eager")
        >>> f({"weight": torch.tensor([3.0, -1.0])})
        (tensor(2.), {'weight': tensor([ 0.5000, -0.5000])})
    """
    nonnegative(strength=strength)
    check_penalty(penalty, hyper, options)

    def plain(params: Params) -> tuple[Tensor, Params]:
        slopes = penalty.grad(params, *hyper, mask=mask, **options)
        value = strength * penalty(params, *hyper, mask=mask, **options)
        return value, compute(lambda g, s: s * g, slopes, hyper=(strength,))

    return _Passes(plain, Compiler(backend))


class _Passes:
    """A function from parameters to a scalar and a tree like them, in few kernels."""

    def __init__(self, plain: Callable[[Params], tuple[Tensor, Params]], compiler: Compiler) -> None:
        self._plain, self._compiler = plain, compiler
        self._plans: dict[Any, Plan | None] = {}
        self._last: Plan | None = None

    def __call__(self, params: Params) -> tuple[Tensor, Params]:
        if torch.compiler.is_compiling() or maybe_current_level() is not None or _autocast():
            return self._plain(params)
        with _ONE_AT_A_TIME, torch.no_grad():
            leaves = None if self._last is None else self._last.recall(params)
            if leaves is None:
                leaves = self._prepare(params)
            if self._last is None:
                return self._plain(params)
            out = self._last.slab()
            return self._last.arranged(out, self._last.run(leaves, None, out))

    def _prepare(self, params: Params) -> list[Tensor]:
        """Make or find the plan for parameters; their leaves."""
        check_params(params)
        leaves, spec = structure(params)
        likes = [_like(x) for x in leaves]
        key = (spec, tuple(likes))
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                del self._plans[next(iter(self._plans))]
            try:
                with undisturbed():
                    self._plans[key] = self._plan(leaves, spec, likes)
            except Exception as error:
                self._plain(params)  # If the call is at fault, the plain functions say how.
                say_once(f"value_and_grad computes leaf by leaf, without a compiler: {error}")
                self._plans[key] = None
        self._last = self._plans[key]
        if self._last is not None:
            self._last.remember_params(params, spec, leaves)
        return leaves

    def _plan(self, leaves: list[Tensor], spec: Any, likes: Any) -> Plan:
        twins = [stand_in(x) for x in leaves]

        def results(*tensors: Tensor) -> list[Tensor]:
            value, slopes = self._plain(restored(spec, twins))
            return [*tree_leaves(slopes), value]

        found = record(results, *twins)
        packing = pack(found, len(leaves), 0, [*found.inputs, None])
        # Parameters of a fused step lie one after another: in this order they are one vector.
        sizes = None
        for group in packing.groups:
            group.homes.sort(key=lambda home: leaves[home.leaves[0]].data_ptr())
            if group.flat and lying([leaves[home.leaves[0]] for home in group.homes]) is not None:
                sizes = (sys.maxsize, sys.maxsize)
        return Plan(found, packing, (spec,), (likes, [], []), False, self._compiler, {}, sizes)


def _names(params: Params, state: State) -> list[str]:
    """What errors call the leaves of both."""
    return [f"params '{name}'" for name in tree_paths(params)] + [f"state '{name}'" for name in tree_paths(state)]


def _span(leaf: Tensor) -> tuple[int, int]:
    """Where in memory a tensor begins and ends."""
    last = sum([(size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True)])
    return leaf.data_ptr(), leaf.data_ptr() + (last + 1) * leaf.element_size()


def _check_apart(names: list[str], leaves: list[Tensor]) -> None:
    """Raise an error for two leaves, or two entries of one, in the same memory."""
    spans = []
    for name, leaf in zip(names, leaves, strict=True):
        if not leaf.numel():
            continue
        reach = 0  # Of the dimensions with smaller strides.
        for stride, size in sorted(zip(leaf.stride(), leaf.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise ValueError(f"{name} is an expanded tensor, whose entries share memory, and cannot be donated")
            reach += (size - 1) * stride
        spans.append((*_span(leaf), name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"{first} and {second} share memory and cannot be donated. Are weights tied? "
                "step.init(params) gives copies that share nothing."
            )


def _autocast() -> bool:
    """Whether operations choose a dtype of their own, which no plan knows of."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _plain(column: list[Any]) -> list[Any]:
    """Tensors whose memory holds their numbers: neither negated nor conjugated."""
    return [x.resolve_conj().resolve_neg() if isinstance(x, Tensor) else x for x in column]


def _tensors(extra: dict[str, Any]) -> dict[str, Any]:
    """Extra arguments with tensors for numbers, which change from step to step."""
    return tree_map(lambda x: torch.tensor(x, dtype=torch.float64, device="cpu") if isinstance(x, float) else x, extra)


def _with_code_of_its_own(f: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with its own code object, to which compiled code is tied, up to a limit of versions."""
    assert isinstance(f, types.FunctionType)
    return types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
