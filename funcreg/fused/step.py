"""The fused step: a whole chain and the addition to the parameters, in few compiled kernels over packed leaves.

A call goes down once. Here its trees are read and checked. A `Plan` (`plan`) for trees like these runs kernels; it is
made of a record of the chain (`recording`), cut into groups of leaves that are treated alike (`grouping`) and turned
into graphs (`lowering`), and has memory for results (`memory`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcreg.core import undocumented
from funcreg.core._typing import Hyper, Mask, Params, State, Updates
from funcreg.core.checks import check_params, check_written, filled
from funcreg.core.construction import Remembering, remembered
from funcreg.core.frozen import frozen_beside_others
from funcreg.core.leafwise import apply_updates, without_autocast
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import flags
from funcreg.core.tree import leaves_like, reader, restored, structure, tree_leaves, tree_map, tree_paths
from funcreg.core.wording import type_of
from funcreg.fused.freshness import Freshness
from funcreg.fused.lowering import Compiler, say_once
from funcreg.fused.plan import Call, Plan
from funcreg.fused.recording import Record, lack_numbers, placeholder, record
from funcreg.fused.shards import OnShards, is_spread
from funcreg.regularizers.penalty import Penalty
from funcreg.transforms.factory_checks import check_selection, nonnegative
from funcreg.transforms.regularizing import check_gradient, check_penalty
from funcreg.transforms.transform import Transform, fits, is_scheduled

#: Structures of trees for which a step keeps a plan.
_PLANS = 32
#: Some trees or their structures, and their leaves.
_Trees = Sequence[Any]
_Columns = Sequence[list[Any]]


# Calls


class _Donated:
    """Leaves that a step writes into, apart from each other: where they begin and end in memory.

    Raises:
        ValueError: Two of them share memory.
    """

    def __init__(self, names: Sequence[str], leaves: Sequence[Tensor]) -> None:
        spans = sorted([(x.data_ptr(), x.data_ptr() + _reach(x), i) for i, x in enumerate(leaves) if x.numel()])
        for (_, end, first), (begin, _, second) in pairwise(spans):
            if begin < end:
                raise ValueError(
                    f"{names[first]} and {names[second]} share memory and cannot be donated. Are weights tied? "
                    "step.init(params) gives copies that share nothing."
                )
        self._begins, self._ends = [begin for begin, _, _ in spans] or [0], [end for _, end, _ in spans] or [0]
        self._names = [names[i] for _, _, i in spans]

    def overlap(self, begins: Sequence[int], sizes: Sequence[int]) -> tuple[int, str] | None:
        """Which of some other tensors, at these addresses, shares memory with which of these."""
        if not begins or min(begins) >= self._ends[-1] or max(begins) + max(sizes) <= self._begins[0]:
            return None  # As gradients and packed memory mostly lie.
        for i, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            before = bisect.bisect_left(self._begins, begin + size) - 1  # They are apart: none reaches further.
            if before >= 0 and self._ends[before] > begin and size:
                return i, self._names[before]
        return None

    def shared(self, tensors: Sequence[Any]) -> tuple[int, str] | None:
        """Which of some other tensors shares memory with which of these."""
        return self.overlap([x.data_ptr() for x in tensors], list(map(_reach, tensors)))


class _Checked:
    """A call that was checked, and what tells whether a later one needs to be checked again.

    Its arguments are some parameters, as many gradients if it is a step, and all else.
    """

    def __init__(
        self, plan: Plan, trees: _Trees, specs: _Trees, arguments: list[Any], count: int, donated: _Donated | None
    ) -> None:
        self.plan, self.specs, self.count, self._donated = plan, specs, count, donated
        self._readers = list(map(reader, trees))
        self._matches = undocumented.tensor_checks(arguments)
        self._has_views = any([x.is_neg() or x.is_conj() for x in arguments])
        # Leaves that begin where those of a vector do lie in it only if they are contiguous.
        lie_in_order = lambda part: all([arguments[i].is_contiguous() for i in part.positions])
        self._parts = list(filter(lie_in_order, plan.parts("parameter", "state", "gradient")))
        if donated is not None:
            addresses = list(map(Tensor.data_ptr, arguments))
            self._others = addresses[:count] + addresses[2 * count :]
            self._gradients = addresses[count : 2 * count]  # Where they are known to lie apart from donated leaves.
            self._sizes = list(map(_reach, arguments[count : 2 * count]))

    def call(self, trees: _Trees) -> Call | None:
        """The call on other trees; None if they have to be checked."""
        arguments: list[Any] = []
        for read, tree in zip(self._readers, trees, strict=True):
            leaves = read(tree)
            if leaves is None:
                return None
            arguments += leaves
        arguments += self.plan.captured
        if not self._matches(*arguments):
            return None
        addresses = list(map(Tensor.data_ptr, arguments))
        if self._donated is not None:
            begin, end = self.count, 2 * self.count
            if addresses[:begin] + addresses[end:] != self._others:
                return None
            gradients = addresses[begin:end]
            if gradients != self._gradients and self._donated.overlap(gradients, self._sizes):
                return None
            self._gradients = gradients
        return self.located(arguments, addresses)

    def located(self, arguments: list[Any], addresses: list[int]) -> Call:
        """A call with arguments that begin at some addresses, and the vectors in which they lie."""
        if self._has_views:
            arguments = [x.resolve_conj().resolve_neg() for x in arguments]
        found = {part: part.find(addresses) for part in self._parts}
        return Call(arguments, {part: vector for part, vector in found.items() if vector is not None})


class _Planned(Remembering):
    """A function of trees, plans for trees of known structures, and the last call that was checked."""

    #: The leaves of what is computed from trees, or an error that says what is wrong with these.
    _results: Callable[..., list[Any]]

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        if not isinstance(backend, str) and not callable(backend):
            raise TypeError(f"backend is {backend!r}; expected the name of a backend of torch.compile, or a function")
        self._compiler = Compiler(backend)
        self._plans: dict[Any, Plan | None] = {}  # None where the function could not be recorded.
        self._last: _Checked | None = None

    def _plan_of(self, found: Record, columns: _Columns) -> Plan:
        """The plan of a record of `_results`, of trees with these leaves."""
        raise NotImplementedError

    def _plan(self, trees: _Trees, columns: _Columns, specs: _Trees) -> Plan | None:
        """The plan for trees like these, made if they are new; None if that is impossible."""
        key = (tuple(specs), *(tuple(map(_like, column)) for column in columns))
        _check_memory(trees[0], columns[0])
        try:
            known = self._plans.get(key)
            if key in self._plans and (known is None or known.is_valid):
                return known
            if len(self._plans) >= _PLANS:  # Trees, or numbers among extra arguments, that differ at every call.
                del self._plans[next(iter(self._plans))]
            stand_ins = [[placeholder(x) if isinstance(x, Tensor) else x for x in column] for column in columns]
            function = lambda *_: self._results(*map(restored, specs, stand_ins))
            made = self._plan_of(record(function, *(x for column in stand_ins for x in column)), columns)
        except Exception as error:
            self._results(*trees)
            say_once(f"this is computed leaf by leaf, which is slow for many leaves: {type(error).__name__}: {error}")
            made = None
        try:
            self._plans[key] = made
        except TypeError:  # An extra argument without a hash, which was said.
            return None
        return made

    def _check(
        self, plan: Plan, trees: _Trees, columns: _Columns, specs: _Trees, donated: _Donated | None = None
    ) -> tuple[_Checked, Call]:
        """A call on trees that were checked; later ones are compared with it."""
        arguments = [*(x for column in columns for x in column if isinstance(x, Tensor)), *plan.captured]
        checked = _Checked(plan, trees, specs, arguments, len(columns[0]), donated)
        self._last = checked if len(trees) == len(columns) else None  # With extra arguments, each call is checked.
        return checked, checked.located(arguments, list(map(Tensor.data_ptr, arguments)))


def _check_memory(params: Params, leaves: list[Any]) -> None:
    """Raise an error for parameters without numbers."""
    are_meta = [x.is_meta for x in leaves]
    if any(are_meta):
        raise ValueError(
            f"leaf '{tree_paths(params)[are_meta.index(True)]}' is on the meta device, without memory to step in; "
            "expected parameters that have numbers, as after module.to_empty(device=...) and its initialization"
        )


def _like(x: Any) -> tuple[Any, ...]:
    """What a plan is made for."""
    return (type(x), x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) else (type(x), x)


class FusedStep(_Planned):
    """A compiled training step; see `fuse`.

    Args:
        tx: The transform.
        donate: Whether the step may write into what it is given.
        backend: Backend of `torch.compile`.
        loose: Whether it writes into parameters of modules, which may require a gradient and stay where they are.
    """

    def __init__(
        self, tx: Transform, donate: bool, backend: str | Callable[..., Any] = "inductor", loose: bool = False
    ) -> None:
        if not isinstance(tx, Transform):
            raise TypeError(f"fuse got {type_of(tx)}; expected a Transform, as in fuse(adamw(1e-3))")
        if tx.examples:
            raise TypeError(
                f"fuse got {tx!r}, which takes gradients of single examples; a fused step takes gradients like the "
                "parameters. Make the update of differentially_private_aggregate first and fuse what comes after it, "
                "or compile a function around update and apply_updates with torch.compile."
            )
        flags(donate=donate)
        super().__init__(backend)
        self._tx, self._donate, self._loose = tx, donate, loose
        self._on_shards = OnShards(tx, donate, loose, lambda local: FusedStep(local, donate, backend, loose))
        self._compiled: Any = None  # Of a chain that cannot be recorded.
        self._freshness = Freshness()  # Of what `gradients` gave out.

    def init(self, params: Params, **extra: Any) -> tuple[Params, State]:
        """Parameters and state for this step to own: copies that need no gradient, packed as the step likes them.

        Each leaf has a storage of its own, so that it saves at its own size.

        They are all moved by the step. Of a module with frozen parameters give it those that require a gradient; a
        warning names frozen ones beside others.

        Args:
            params: Tree of parameters.
            extra: Extra arguments like those of the step, if a transform needs some.
        """
        check_params(params)
        self._warn_of_frozen(params)
        params = tree_map(lambda w: w.detach(), params)
        if is_spread(params):
            return self._on_shards.init(params, _with_tensors(extra))
        with torch.inference_mode(False), torch.no_grad():
            trees = (params, params, self._tx.init(params), _with_tensors(extra))[: 4 if extra else 3]
            columns, specs = zip(*map(structure, trees), strict=True)
            try:
                inside = undocumented.is_transformed(lambda: columns[0]) or lack_numbers(columns[0])
                plan = None if inside else self._plan(trees, columns, specs)
            except TypeError:  # A transform lacks an extra argument; the step will tell, if it lacks it too.
                plan = None
            made = [list(map(_copied, columns[0])), columns[1], list(map(_copied, columns[2]))]
            if plan is not None:
                made = plan.packed(made, "parameter", "state")
        return restored(specs[0], made[0]), restored(specs[2], made[2])

    def _warn_of_frozen(self, params: Params) -> None:
        """Warn of frozen parameters beside others, of which the step would make parameters like these."""
        frozen = frozen_beside_others(tree_leaves(params))
        if not any(frozen):
            return
        rows = zip(tree_paths(params), frozen, self._spared(params), strict=True)
        names = [name for name, held, spared in rows if held and not spared]
        if names:
            warn_user(
                f"init got {listed(names)} with requires_grad=False beside others that require a gradient. backward() "
                "writes no gradient for what is frozen, and with gradients of zero a penalty takes it to zero, weight "
                "decay shrinks it. Leave it out, {name: w for name, w in model.named_parameters() if w.requires_grad}, "
                "or hold it, chain(freeze(mask), ...)."
            )

    def _spared(self, params: Params) -> list[bool]:
        """For each parameter whether it makes no difference what its gradient holds."""
        return [False] * len(tree_leaves(params)) if self._tx.spares is None else self._tx.spares(params)

    def packed_state(self, params: Params, grads: Updates, state: State, **extra: Any) -> State:
        """The state as the step likes it beside parameters that stay where they are; what it moves is copied."""
        if is_spread(params):
            return self._on_shards.packed_state(params, state, _with_tensors(extra))
        if lack_numbers(tree_leaves((params, grads, state))) or _has_objects(extra):
            return state
        trees = (params, grads, state, _with_tensors(extra))[: 4 if extra else 3]
        columns, specs = zip(*map(structure, trees), strict=True)
        with torch.inference_mode(False), torch.no_grad():
            plan = self._plan(trees, columns, specs)
            return state if plan is None else restored(specs[2], plan.packed(columns[:3], "state")[2])

    def gradients(self, params: Params) -> Updates:
        """Zeros like parameters of `init`, in memory where the step reads gradients without copying them together.

        Write gradients into them, as `backward()` does if they are the `grad` of module parameters, and set them to
        zero by `zero_grad(set_to_none=False)`: by default `zero_grad` takes them away. A step warns, once, where they
        are what they were at the two steps before.

        Raises:
            ValueError: `init` made no parameters like these.
        """
        if is_spread(params):
            return self._on_shards.gradients(params)
        leaves, spec = structure(params)
        kinds = [like[1:] for like in map(_like, leaves)]  # Whether they are `Parameter` or not.
        for (specs, known, *_), plan in self._plans.items():
            if specs[0] != spec or [like[1:] for like in known] != kinds:
                continue
            made = [torch.zeros_like(x, requires_grad=False, memory_format=torch.contiguous_format) for x in leaves]
            self._freshness = Freshness()
            return restored(spec, made if plan is None else plan.packed([leaves, made], "gradient")[1])
        raise ValueError("gradients got parameters that this step's init did not make; call init first")

    def __call__(self, params: Params, grads: Updates, state: State, **extra: Any) -> tuple[Params, State]:
        """New parameters and state; with donation, in the tensors of the old ones."""
        # What compiles a whole training step compiles this one too. Modes see no operations of kernels.
        if undocumented.is_compiling() or (undocumented.is_traced() and not is_spread(params)):
            return self._stored(params, state, self._plain(params, grads, state, extra))
        if undocumented.has_tangents() or undocumented.is_transformed(lambda: tree_leaves((params, grads, state))):
            if self._donate:
                raise ValueError(
                    "a donating step was called inside vmap or grad, which cannot write in place. For members with "
                    "hyperparameters of their own, fuse(ensemble(...)); else fuse without donate=True."
                )
            return self._plain(params, grads, state, extra)
        return self._step(params, grads, state, extra)

    def _plain(self, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
        updates, new = self._tx.update(grads, state, params, **extra)
        return apply_updates(params, updates), new

    def _stored(self, params: Params, state: State, new: tuple[Params, State]) -> tuple[Params, State]:
        """What the plain functions made, in the old leaves if these are donated."""
        if not self._donate:
            return new
        with torch.no_grad():
            # All are copied before one is written: they may share memory.
            leaves = [x.clone() for x in leaves_like((params, state), new)]
            for old, leaf in zip(tree_leaves((params, state)), leaves, strict=True):
                old.copy_(leaf)
        return params, state

    @without_autocast
    @torch.no_grad()
    def _step(self, params: Params, grads: Updates, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
        checked = self._last
        call = None if extra or checked is None else checked.call((params, grads, state))
        if checked is None or call is None:
            if is_spread(params):
                return self._on_shards.call(params, grads, state, _with_tensors(extra))
            grads = self._filled(params, grads, state)
            if lack_numbers(tree_leaves((params, grads, state))) or _has_objects(extra):
                return self._stored(params, state, self._plain(params, grads, state, extra))
            trees = (params, grads, state, _with_tensors(extra))[: 4 if extra else 3]
            check_params(params)
            columns, specs = zip(*map(structure, trees), strict=True)
            if self._donate:
                check_written(_names(params, state), [*columns[0], *columns[2]])
            plan, donated = self._plan(trees, columns, specs), None
            if self._donate:
                captured = [] if plan is None else plan.captured
                donated = _check_donated(params, grads, state, columns, captured, self._loose)
            if plan is None:
                return self._leaf_by_leaf(params, grads, state, extra)
            shares = lambda x: donated is not None and isinstance(x, Tensor) and donated.shared([x])
            given = [[x.clone() if shares(x) else x for x in column] for column in columns[3:]]
            checked, call = self._check(plan, trees[:3], (*columns[:3], *given), specs, donated)
        if not self._freshness.is_told:
            self._check_gradients_are_new(call, checked, params)
        places, results = checked.plan.places, checked.plan.run(call)
        if not self._donate:
            count = checked.count
            return restored(checked.specs[0], results[:count]), restored(checked.specs[2], results[count:])
        for place, new in zip(places, results, strict=False):  # None if they are in place.
            call.arguments[place].copy_(new)
        if not results:  # Kernels write past autograd, which has to know that what it saved is not what it was.
            written = places[: checked.count] if self._loose else places
            torch.autograd.graph.increment_version([call.arguments[i] for i in written])
        return params, state

    def _filled(self, params: Params, grads: Updates, state: State) -> Updates:
        """Gradients like the parameters, or an error that says what came in their place."""
        try:
            return filled(params, grads, self._tx.spares, ("params", "grads"))
        except (TypeError, ValueError) as error:
            if fits(params, state) or fits(grads, state):
                raise ValueError(
                    "step got a tree of parameters where the state is expected; expected step(params, grads, state). "
                    "Are they in the order of update(grads, state, params)?"
                ) from error
            raise

    def _results(self, params: Params, grads: Updates, state: State, extra: Any = None) -> list[Any]:
        new = leaves_like((params, state), self._plain(params, grads, state, extra or {}))
        for i, (old, leaf) in enumerate(zip(tree_leaves((params, state)), new, strict=True)):
            if isinstance(old, Tensor) and isinstance(leaf, Tensor) and old.shape != leaf.shape:
                raise ValueError(
                    f"{_names(params, state)[i]} came out of the step with shape {tuple(leaf.shape)}; expected "
                    f"{tuple(old.shape)}, as before"
                )
        return new

    def _plan_of(self, found: Record, columns: _Columns) -> Plan:
        count = len(columns[0])
        written = [*found.inputs[:count], *found.inputs[2 * count : 2 * count + len(columns[2])]]
        if len(found.outputs) != len(written):
            numbers = listed([repr(x) for x in columns[2] if not isinstance(x, Tensor)])
            raise ValueError(f"state holds {numbers} where tensors come out; set tensors, or by tree_set(state, ...)")
        # Where old numbers go to new places, places are not written before all are read.
        pairs = zip(found.outputs, written, strict=True)
        in_place = self._donate and not any([value.may_alias and value is not place for value, place in pairs])
        return Plan(found, count, count, written, in_place, self._compiler, loose=self._loose and in_place)

    def _leaf_by_leaf(self, params: Params, grads: Updates, state: State, extra: Any) -> tuple[Params, State]:
        """A step of a chain that cannot be recorded. All is read before anything is written."""
        try:
            if self._compiled is None:
                with undocumented.imports_may_warn():
                    self._compiled = torch.compile(self._plain, backend=self._compiler.backend)
            new = self._compiled(params, grads, state, extra)
        except Exception as error:
            new = self._plain(params, grads, state, extra)  # The compiler wraps what tracing raises.
            self._compiled = self._plain
            say_once(f"fuse runs this chain without a compiler: {' '.join(str(error).split())[:300]}")
        return self._stored(params, state, new)

    def _check_gradients_are_new(self, call: Call, checked: _Checked, params: Params) -> None:
        """Warn where nothing was written into gradients of `gradients` since the last calls."""
        parts = [part for part in checked.plan.parts("gradient") if part in call.vectors and part.starts[-1]]
        read = [i for part in parts for i in part.positions if call.arguments[i].numel()]
        if not read:
            return

        def spared() -> list[bool]:
            all_of = self._spared(params)
            return [all_of[i - checked.count] for i in read]

        vectors = [id(call.vectors[part]) for part in parts]
        stale = self._freshness.stale(vectors, [call.arguments[i] for i in read], spared)
        if stale:
            places = {read[i] - checked.count for i in stale}
            names = [name for i, name in enumerate(tree_paths(params)) if i in places]
            say_once(
                f"nothing was written into the gradients of step.gradients at {listed(names)} since the last step, "
                "which was taken with the same numbers, as the one before. Something put other tensors into the grad "
                "of the parameters, so that backward() writes elsewhere: zero_grad() does by default, use "
                "zero_grad(set_to_none=False); so does DistributedDataParallel(gradient_as_bucket_view=True). Or the "
                "module has other parameters by now, as after load_state_dict(assign=True)."
            )


def _check_donated(
    params: Params, grads: Updates, state: State, columns: Any, captured: list[Tensor], loose: bool
) -> _Donated:
    """Where donated leaves lie, or an error: they cannot be written into, or share memory with what is read."""
    owned, names = [*columns[0], *columns[2]], _names(params, state)
    for name, leaf in zip(names, owned, strict=True):
        if leaf.is_neg() or leaf.is_conj():
            raise ValueError(f"{name} is a negated or conjugated view and cannot be donated; pass a copy of it")
        if leaf.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name} was made in inference mode and cannot be donated outside of it; pass a copy of it, clone()"
            )
        if leaf.requires_grad and not loose:
            raise ValueError(f"{name} requires grad and cannot be donated. step.init(params) gives copies that can.")
        reach = 0  # Of the dimensions with smaller strides.
        for stride, size in sorted(zip(leaf.stride(), leaf.shape, strict=True)) if leaf.numel() else ():
            if size > 1 and stride <= reach:
                raise ValueError(f"{name} is an expanded tensor, whose entries share memory, and cannot be donated")
            reach += (size - 1) * stride
    donated = _Donated(names, owned)
    if (found := donated.shared(columns[1])) is not None:
        raise ValueError(
            f"grads '{tree_paths(grads)[found[0]]}' shares memory with params or state, {found[1]}, which are "
            "donated and so overwritten. Pass a copy of it."
        )
    if (found := donated.shared(captured)) is not None:
        raise ValueError(
            f"a tensor of shape {tuple(captured[found[0]].shape)} that the chain holds shares memory with "
            f"{found[1]}, which is donated and so overwritten at every step. Is it an anchor made of these "
            "parameters? Give the chain a copy: tensor.clone()."
        )
    return donated


@remembered
def value_and_grad(
    penalty: Penalty,
    *hyper: Hyper,
    strength: Hyper = 1.0,
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
        strength: :math:`\lambda`: number of at least 0, tensor, or a tree of them like the parameters.
        mask: Leaves on which the penalty acts; the gradient of the others is 0.
        backend: Backend of `torch.compile`.
        options: Static options of the penalty, such as `dim`.

    Raises:
        TypeError: `penalty` is not a penalty, takes other hyperparameters, or has no gradient, as `l0`; or a
            hyperparameter is a schedule.

    Example:
        >>> f = value_and_grad(l1, strength=0.5, backend="eager")
        >>> f({"weight": torch.tensor([3.0, -1.0])})
        (tensor(2.), {'weight': tensor([ 0.5000, -0.5000])})
    """
    check_penalty(penalty, hyper, options)
    check_gradient(penalty)
    check_selection(mask)
    nonnegative(strength=strength)
    if is_scheduled(strength, *hyper):
        raise TypeError(
            "value_and_grad got a function as the strength or a hyperparameter; expected numbers, tensors or trees of "
            "them. It counts no steps, so that a schedule has no place: give a tensor, which is read at every call."
        )

    def plain(params: Params) -> tuple[Tensor, Params]:
        value = penalty.weighted_value(params, strength, *hyper, mask=mask, **options)
        return value, penalty.weighted_grad(params, strength, *hyper, mask=mask, **options)

    return _ValueAndGrad(plain, backend)


class _ValueAndGrad(_Planned):
    """A function from parameters to a scalar and a tree like them, in few kernels."""

    def __init__(self, plain: Callable[[Params], tuple[Tensor, Params]], backend: str | Callable[..., Any]) -> None:
        super().__init__(backend)
        self._plain = plain

    def __call__(self, params: Params) -> tuple[Tensor, Params]:
        if undocumented.is_traced() or undocumented.is_transformed(lambda: tree_leaves(params)) or is_spread(params):
            return self._plain(params)
        return self._pass(params)

    @without_autocast
    @torch.no_grad()
    def _pass(self, params: Params) -> tuple[Tensor, Params]:
        checked = self._last
        call = None if checked is None else checked.call((params,))
        if checked is None or call is None:
            check_params(params)
            leaves, spec = structure(params)
            plan = None if lack_numbers(leaves) else self._plan((params,), (leaves,), (spec,))
            if plan is None:
                return self._plain(params)
            checked, call = self._check(plan, (params,), (leaves,), (spec,))
        *slopes, value = checked.plan.run(call)
        return value, restored(checked.specs[0], slopes)

    def _results(self, params: Params) -> list[Any]:
        value, slopes = self._plain(params)
        return [*tree_leaves(slopes), value]

    def _plan_of(self, found: Record, columns: _Columns) -> Plan:
        return Plan(found, len(columns[0]), 0, [*found.inputs, None], False, self._compiler, keeps=True)


def _copied(x: Any) -> Any:
    """A contiguous copy of a tensor, with its numbers as they are in memory."""
    return x.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg() if isinstance(x, Tensor) else x


def _names(params: Params, state: State) -> list[str]:
    """What errors call the leaves of both."""
    return [f"params '{name}'" for name in tree_paths(params)] + [f"state '{name}'" for name in tree_paths(state)]


def _reach(leaf: Tensor) -> int:
    """Bytes from the first to the last entry of a tensor."""
    if not leaf.numel():
        return 0
    last = sum([(size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True)])
    return (last + 1) * leaf.element_size()


def _with_tensors(extra: dict[str, Any]) -> dict[str, Any]:
    """Extra arguments with tensors for numbers, which change from step to step."""
    return tree_map(lambda x: torch.tensor(x, dtype=torch.float64, device="cpu") if isinstance(x, float) else x, extra)


def _has_objects(extra: dict[str, Any]) -> bool:
    """Whether extra arguments hold functions or objects, which may say something else at every step."""
    objects = [x for x in tree_leaves(extra) if not isinstance(x, (Tensor, int, float, complex, str, type(None)))]
    if objects:
        say_once(
            f"fuse runs this chain without a compiler: an extra argument is {type_of(objects[0])}, which may "
            "change from step to step. What is a tensor or a number is compiled."
        )
    return bool(objects)
