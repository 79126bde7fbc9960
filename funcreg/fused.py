"""The fused step: a whole chain and the addition to the parameters, in few compiled kernels over packed leaves.

A call goes down once. Here its trees are read and checked. A `Plan` (`plan`) for trees like these runs kernels; it is
made of a record of the chain (`recording`), cut into groups of leaves that are treated alike (`grouping`) and turned
into graphs (`lowering`), and has memory for results (`memory`).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcreg import undocumented
from funcreg._typing import Hyper, Mask, Params, Scalar, State, Updates
from funcreg.lowering import Compiler, say_once
from funcreg.memory import Memory
from funcreg.penalty import Penalty
from funcreg.plan import Plan
from funcreg.recording import placeholder, record
from funcreg.regularizing import check_penalty
from funcreg.transform import Transform, nonnegative
from funcreg.tree import (
    apply_updates,
    check_alike,
    check_params,
    compute,
    leaves_like,
    reader,
    restored,
    structure,
    tree_leaves,
    tree_map,
    tree_paths,
)

#: Structures of trees for which a step keeps a plan.
_PLANS = 32


def fuse(tx: Transform, donate: bool = False, *, backend: str | Callable[..., Any] = "inductor") -> FusedStep:
    r"""Compile `update` and `apply_updates` into one step, `step(params, grads, state) -> (params, state)`.

    On the first call the chain is recorded, leaves that are treated alike are packed together, and few kernels are
    compiled for all of them, whatever the number of leaves. What is a tensor (a counter, a strength held as a tensor)
    is read at every step; what is Python (a mask, a float, a closure) is read once. The step records no autograd
    history: to differentiate through training steps, call `tx.update` and `apply_updates`. Called inside `vmap` or
    `grad`, a step that does not donate is these plain functions. Results differ from theirs by rounding.

    A step pickles and copies as the call that made it, and then compiles anew.

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


@dataclass
class _Inputs:
    """What a plan computes with in one call."""

    plan: Plan
    specs: tuple[Any, Any]  # Structures of parameters and state.
    count: int  # Number of parameters.
    arguments: list[Any]
    contiguous: tuple[bool, bool]  # Whether parameters and state, and gradients, are.
    memory: Memory | None = None  # In which parameters and state lie, if they lie where the plan likes them.
    gradients: Memory | None = None

    def locate(self) -> _Inputs:
        """Find the memory in which the leaves lie."""
        plan, arguments = self.plan, self.arguments
        if self.contiguous[0]:
            self.memory = plan.results.find([arguments[i].data_ptr() for i in plan.kept])
        if self.contiguous[1]:
            self.gradients = plan.gradients.find([arguments[i].data_ptr() for i in plan.read])
        return self

    def without_arguments(self) -> _Inputs:
        """The same for later calls: it keeps no tensor alive."""
        return _Inputs(self.plan, self.specs, self.count, [], self.contiguous)

    def resolved(self) -> _Inputs:
        """The same with numbers as they are, where views are negated or conjugated."""
        self.arguments = [x.resolve_conj().resolve_neg() for x in self.arguments]
        return self


@dataclass
class _Examined:
    """A call that was checked, and what tells whether later ones need to be checked again."""

    inputs: _Inputs
    readers: list[Callable[[Any], list[Any] | None]]
    matches: Callable[..., bool]  # Whether arguments are like these but for their numbers and where they lie.
    has_views: bool  # Whether one is negated or conjugated.
    kept: list[int] | None  # Addresses of donated leaves and of captured tensors.
    donated: _Spans

    def inputs_like(self, trees: Sequence[Any]) -> _Inputs | None:
        """The inputs of a call with other trees; None if it has to be checked."""
        arguments: list[Any] = []
        for read, tree in zip(self.readers, trees, strict=True):
            leaves = read(tree)
            if leaves is None:
                return None
            arguments += leaves
        before = self.inputs
        arguments += before.plan.captured
        if not self.matches(*arguments):
            return None
        if self.kept is not None:
            grads = arguments[before.count : 2 * before.count]
            fixed = arguments[: before.count] + arguments[2 * before.count :]
            if list(map(Tensor.data_ptr, fixed)) != self.kept or self.donated.overlap(grads) is not None:
                return None
        inputs = _Inputs(before.plan, before.specs, before.count, arguments, before.contiguous).locate()
        return inputs.resolved() if self.has_views else inputs


class _Spans:
    """Where some tensors, which are apart, begin and end in memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans = sorted([(*_span(x), i) for i, x in enumerate(tensors) if x.numel()])
        self._begins, self._ends, self._which = zip(*spans, strict=True) if spans else ((), (), ())

    def overlap(self, tensors: Sequence[Tensor]) -> tuple[int, int] | None:
        """Which of some other tensors shares memory with which of these."""
        if not self._begins:
            return None
        for i, (begin, end) in enumerate(map(_span, tensors)):
            before = bisect.bisect_left(self._begins, end) - 1  # They are apart: no earlier one reaches further.
            if before >= 0 and self._ends[before] > begin and begin < end:
                return i, self._which[before]
        return None


class FusedStep:
    """A compiled training step; see `fuse`."""

    def __init__(self, tx: Transform, donate: bool, backend: str | Callable[..., Any]) -> None:
        if not isinstance(tx, Transform):
            raise TypeError(f"fuse got a {type(tx).__name__}; expected a Transform, as in fuse(adamw(1e-3))")
        self._tx, self._donate = tx, donate
        self._compiler = Compiler(backend)
        self._plans: dict[Any, Plan | None] = {}  # None where the chain could not be recorded.
        self._last: _Examined | None = None
        self._versions: list[int] = []  # Of gradients of `gradients`, at the last call.

    def __repr__(self) -> str:
        return f"fuse({self._tx!r}{', donate=True' * self._donate})"

    def __getstate__(self) -> Any:
        return self._tx, self._donate, self._compiler.backend

    def __setstate__(self, made_of: Any) -> None:
        FusedStep.__init__(self, *made_of)

    def init(self, params: Params, **extra: Any) -> tuple[Params, State]:
        """Parameters and state for this step to own: copies that need no gradient, packed as the step likes them.

        Each leaf has a storage of its own, so that it saves at its own size.

        Args:
            params: Tree of parameters.
            extra: Extra arguments like those of the step, if a transform needs some.
        """
        check_params(params)
        params = tree_map(lambda w: w.detach(), params)
        with torch.inference_mode(False), torch.no_grad():
            trees = (params, params, self._tx.init(params), _with_tensors(extra))
            columns, specs = zip(*map(structure, trees), strict=True)
            try:
                plan = self._plan(trees, columns, specs)
            except TypeError:  # A transform lacks an extra argument; the step will tell, if it lacks it too.
                plan = None
            leaves = [*columns[0], *columns[2]]
            copied = [
                w.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
                if isinstance(w, Tensor)
                else w
                for w in leaves
            ]
            if plan is not None:
                memory = plan.results.take()
                for i, leaf in zip(plan.results.layout.positions, plan.results.lend(memory), strict=True):
                    copied[i] = leaf.copy_(leaves[i])
        count = len(columns[0])
        return restored(specs[0], copied[:count]), restored(specs[2], copied[count:])

    def gradients(self, params: Params) -> Updates:
        """Zeros like parameters of `init`, in memory where the step reads gradients without copying them together.

        Write gradients into them, as `backward()` does if they are the `grad` of module parameters, and set them to
        zero by `zero_grad(set_to_none=False)`: by default `zero_grad` takes them away. A step warns, once, where
        nothing was written into them since the step before.

        Raises:
            ValueError: `init` made no parameters like these.
        """
        leaves, spec = structure(params)
        likes = tuple(map(_like, leaves))
        for (specs, known, *_), plan in self._plans.items():
            if specs[0] != spec or known != likes:
                continue
            made = [torch.zeros_like(x, requires_grad=False, memory_format=torch.contiguous_format) for x in leaves]
            if plan is not None:
                memory = plan.gradients.take()
                for i, leaf in zip(plan.gradients.layout.positions, plan.gradients.lend(memory), strict=True):
                    made[i] = leaf.zero_()
            self._versions = []
            return restored(spec, made)
        raise ValueError("gradients got parameters that this step's init did not make; call init first")

    def __call__(self, params: Params, grads: Updates, state: State, **extra: Any) -> tuple[Params, State]:
        """New parameters and state; with donation, in the tensors of the old ones."""
        if torch.compiler.is_compiling():  # What compiles a whole training step compiles this one too.
            return self._plain(params, grads, state, extra)
        if undocumented.is_transformed(lambda: tree_leaves((params, grads, state))):
            if self._donate:
                raise ValueError(
                    "a donating step was called inside vmap or grad, which cannot write in place. For members with "
                    "hyperparameters of their own, fuse(ensemble(...)); else fuse without donate=True."
                )
            return self._plain(params, grads, state, extra)
        with torch.no_grad(), without_autocast():
            last = self._last
            inputs = None if extra or last is None else last.inputs_like((params, grads, state))
            if inputs is None:
                inputs = self._examine(params, grads, state, extra)
            if inputs is None:
                return self._leaf_by_leaf(params, grads, state, extra)
            if inputs.gradients is not None:
                self._check_gradients_are_new(inputs)
            results = inputs.plan.run(inputs.arguments, inputs.memory, inputs.gradients)
            if not self._donate:
                first, second = inputs.specs
                return restored(first, results[: inputs.count]), restored(second, results[inputs.count :])
            for place, new in zip(inputs.plan.places, results, strict=False):  # None if they are in place.
                inputs.arguments[place].copy_(new)
            return params, state

    def _plain(self, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
        check_params(params)
        check_alike(params, grads, ("params", "grads"))
        updates, new = self._tx.update(grads, state, params, **extra)
        return apply_updates(params, updates), new

    def _examine(self, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> _Inputs | None:
        """The inputs of a call, after all checks; None if the chain cannot be recorded."""
        trees = (params, grads, state, _with_tensors(extra))
        columns, specs = zip(*map(structure, trees), strict=True)
        plan = self._plan(trees, columns, specs)
        captured = [] if plan is None else plan.captured
        donated = [*columns[0], *columns[2]] if self._donate else []
        if self._donate:
            _check_donated(params, grads, state, columns, captured)
        if plan is None:
            return None
        given = [x for x in columns[3] if isinstance(x, Tensor)]
        spans = _Spans(donated)
        given = [x.clone() if spans.overlap([x]) else x for x in given]
        arguments = [*columns[0], *columns[1], *columns[2], *given, *captured]
        contiguous = all([arguments[i].is_contiguous() for i in plan.kept]), all([x.is_contiguous() for x in columns[1]])
        inputs = _Inputs(plan, (specs[0], specs[2]), len(columns[0]), arguments, contiguous).locate()
        has_views = any([x.is_neg() or x.is_conj() for x in arguments])
        if not extra:
            kept = [x.data_ptr() for x in (*donated, *captured)] if self._donate else None
            readers = [reader(tree) for tree in (params, grads, state)]
            matches = undocumented.tensor_checks(arguments)
            self._last = _Examined(inputs.without_arguments(), readers, matches, has_views, kept, spans)
        return inputs.resolved() if has_views else inputs

    def _check_gradients_are_new(self, inputs: _Inputs) -> None:
        """Warn where nothing was written into gradients of `gradients` since the last call."""
        grads = inputs.arguments[inputs.count : 2 * inputs.count]
        versions = [id(inputs.gradients), *undocumented.versions(grads)]
        if versions == self._versions:
            say_once(
                "nothing was written into the gradients of step.gradients since the last step, which was taken with "
                "the same numbers. By default zero_grad() takes them away from the parameters of a module, so that "
                "backward() writes elsewhere; use zero_grad(set_to_none=False)."
            )
        self._versions = versions

    def _plan(self, trees: Any, columns: Any, specs: Any) -> Plan | None:
        """The plan for trees like these, made if they are new, or None if the chain could not be recorded."""
        check_params(trees[0])
        check_alike(trees[0], trees[1], ("params", "grads"))
        likes = [tuple([_like(x) if isinstance(x, Tensor) else (type(x), x) for x in column]) for column in columns]
        kinds = [(type(x), x.layout) for column in columns for x in column if isinstance(x, Tensor)]
        key = (specs, *likes, *kinds)
        try:
            hash(key)
        except TypeError as error:
            say_once(f"fuse compiles this chain leaf by leaf, which is slow: among the extra arguments is an {error}")
            return None
        if key not in self._plans:
            if len(self._plans) >= _PLANS:  # Trees, or numbers among extra arguments, that differ at every call.
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._recorded(trees, columns, specs)
        return self._plans[key]

    def _recorded(self, trees: Any, columns: Any, specs: Any) -> Plan | None:
        try:
            stand_ins = [[placeholder(x) if isinstance(x, Tensor) else x for x in column] for column in columns]
            params, grads, state, extra = (restored(spec, x) for spec, x in zip(specs, stand_ins, strict=True))
            results = lambda *_: leaves_like((params, state), self._plain(params, grads, state, extra))
            found = record(results, *(x for column in stand_ins for x in column))
            count = len(columns[0])
            written = [*found.inputs[:count], *found.inputs[2 * count : 2 * count + len(columns[2])]]
            same = [place.shape == value.shape for place, value in zip(written, found.outputs, strict=True)]
            if all(same):
                # Where old numbers go to new places, places are not written before all are read.
                pairs = zip(found.outputs, written, strict=True)
                moved = any([value.may_alias and value is not place for value, place in pairs])
                return Plan(found, count, count, written, self._donate and not moved, self._compiler)
        except Exception as error:
            # If the call is at fault, the plain functions say how, and which leaf.
            self._plain(*trees)
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
    def _compiled_leaf_by_leaf(self) -> Callable[..., Any]:
        """The plain functions, compiled, or themselves where that fails."""

        def results(params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> list[Tensor]:
            return leaves_like((params, state), self._plain(params, grads, state, extra))

        # Code of its own, to which compiled code is tied, up to a limit of versions.
        own = types.FunctionType(
            results.__code__.replace(), globals(), results.__name__, results.__defaults__, results.__closure__
        )
        compiled: Any = torch.compile(own, backend=self._compiler.backend)

        def run(*arguments: Any) -> list[Tensor]:
            nonlocal compiled
            if compiled is not own:
                try:
                    with undocumented.imports_may_warn():
                        return compiled(*arguments)
                except Exception as error:
                    made = own(*arguments)  # The compiler wraps what tracing raises; this says it as it is.
                    compiled = own
                    say_once(f"fuse runs this chain without a compiler: {' '.join(str(error).split())[:300]}")
                    return made
            return own(*arguments)

        return run

    def _leaf_by_leaf(self, params: Params, grads: Updates, state: State, extra: Any) -> tuple[Params, State]:
        """A step of a chain that cannot be recorded. All is read before anything is written."""
        new = self._compiled_leaf_by_leaf(params, grads, state, extra)
        (first, one), (second, other) = structure(params), structure(state)
        if not self._donate:
            return restored(one, new[: len(first)]), restored(other, new[len(first) :])
        for old, leaf in zip([*first, *second], [x.clone() for x in new], strict=True):
            old.copy_(leaf)
        return params, state


def _check_donated(params: Params, grads: Updates, state: State, columns: Any, captured: list[Tensor]) -> None:
    """Raise an error for leaves that cannot be written into, or share memory with what is read."""
    owned, names = [*columns[0], *columns[2]], _names(params, state)
    for name, leaf in zip(names, owned, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} is {leaf!r}; expected a tensor, into which the next one can be written")
        if leaf.is_neg() or leaf.is_conj():
            raise ValueError(f"{name} is a negated or conjugated view and cannot be donated; pass a copy of it")
        if leaf.requires_grad:
            raise ValueError(f"{name} requires grad and cannot be donated. step.init(params) gives copies that can.")
    _check_apart(names, owned)
    spans = _Spans(owned)
    if (found := spans.overlap(columns[1])) is not None:
        raise ValueError(
            f"grads '{tree_paths(grads)[found[0]]}' shares memory with params or state, {names[found[1]]}, which are "
            "donated and so overwritten. Pass a copy of it."
        )
    if (found := spans.overlap(captured)) is not None:
        raise ValueError(
            f"a tensor of shape {tuple(captured[found[0]].shape)} that the chain holds shares memory with "
            f"{names[found[1]]}, which is donated and so overwritten at every step. Is it an anchor made of these "
            "parameters? Give the chain a copy: tensor.clone()."
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

    return _ValueAndGrad(plain, Compiler(backend))


class _ValueAndGrad:
    """A function from parameters to a scalar and a tree like them, in few kernels."""

    def __init__(self, plain: Callable[[Params], tuple[Tensor, Params]], compiler: Compiler) -> None:
        self._plain, self._compiler = plain, compiler
        self._plans: dict[Any, Plan | None] = {}
        self._last: _Examined | None = None

    def __call__(self, params: Params) -> tuple[Tensor, Params]:
        if torch.compiler.is_compiling() or undocumented.is_transformed(lambda: tree_leaves(params)):
            return self._plain(params)
        with torch.no_grad(), without_autocast():
            inputs = None if self._last is None else self._last.inputs_like((params,))
            if inputs is None:
                inputs = self._examine(params)
            if inputs is None:
                return self._plain(params)
            *slopes, value = inputs.plan.run(inputs.arguments, None)
            return value, restored(inputs.specs[0], slopes)

    def _examine(self, params: Params) -> _Inputs | None:
        """The inputs of a call, after all checks; None if the penalty cannot be recorded."""
        check_params(params)
        leaves, spec = structure(params)
        key = (spec, *map(_like, leaves))
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._recorded(params, leaves, spec)
        plan = self._plans[key]
        if plan is None:
            return None
        inputs = _Inputs(plan, (spec, None), len(leaves), [*leaves, *plan.captured], (False, False))
        has_views = any([x.is_neg() or x.is_conj() for x in inputs.arguments])
        matches = undocumented.tensor_checks(inputs.arguments)
        self._last = _Examined(inputs.without_arguments(), [reader(params)], matches, has_views, None, _Spans([]))
        return inputs.resolved() if has_views else inputs

    def _recorded(self, params: Params, leaves: list[Tensor], spec: Any) -> Plan | None:
        try:
            stand_ins = [placeholder(x) for x in leaves]

            def results(*_: Tensor) -> list[Tensor]:
                value, slopes = self._plain(restored(spec, stand_ins))
                return [*tree_leaves(slopes), value]

            found = record(results, *stand_ins)
            return Plan(found, len(leaves), 0, [*found.inputs, None], False, self._compiler, keeps=True)
        except Exception as error:
            self._plain(params)  # If the call is at fault, the plain functions say how.
            say_once(f"value_and_grad computes leaf by leaf, without a compiler: {type(error).__name__}: {error}")
            return None


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Operations in the dtype of their arguments."""
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _like(x: Tensor) -> tuple[Any, ...]:
    """What a plan is made for."""
    return x.shape, x.dtype, x.device


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


def _with_tensors(extra: dict[str, Any]) -> dict[str, Any]:
    """Extra arguments with tensors for numbers, which change from step to step."""
    return tree_map(lambda x: torch.tensor(x, dtype=torch.float64, device="cpu") if isinstance(x, float) else x, extra)
