"""The fused step: a whole chain and the addition to the parameters, in few compiled kernels over packed leaves.

A call goes down once: its trees are read and checked, and the plan for trees like these runs kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcreg.core import undocumented
from funcreg.core._typing import Params, State, Updates
from funcreg.core.checks import check_params, check_written, filled
from funcreg.core.frozen import frozen_beside_others
from funcreg.core.leafwise import apply_updates, without_autocast
from funcreg.core.masks import listed
from funcreg.core.notices import warn_user
from funcreg.core.ranges import flags
from funcreg.core.tree import leaves_like, restored, structure, tree_leaves, tree_map, tree_paths
from funcreg.core.wording import type_of
from funcreg.fused.donation import check_donated, names_of
from funcreg.fused.freshness import Freshness
from funcreg.fused.lowering import say_once
from funcreg.fused.plan import Call, Plan
from funcreg.fused.planned import Checked, Columns, Planned, copied, like
from funcreg.fused.recording import Record, lack_numbers
from funcreg.fused.shards import OnShards, is_spread
from funcreg.transforms.transform import Transform, fits


class FusedStep(Planned):
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
            made = [list(map(copied, columns[0])), columns[1], list(map(copied, columns[2]))]
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
        kinds = [like[1:] for like in map(like, leaves)]  # Whether they are `Parameter` or not.
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
                check_written(names_of(params, state), [*columns[0], *columns[2]])
            plan, donated = self._plan(trees, columns, specs), None
            if self._donate:
                captured = [] if plan is None else plan.captured
                donated = check_donated(params, grads, state, columns, captured, self._loose)
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
                    f"{names_of(params, state)[i]} came out of the step with shape {tuple(leaf.shape)}; expected "
                    f"{tuple(old.shape)}, as before"
                )
        return new

    def _plan_of(self, found: Record, columns: Columns) -> Plan:
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

    def _check_gradients_are_new(self, call: Call, checked: Checked, params: Params) -> None:
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
