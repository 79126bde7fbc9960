"""A program at work: the buffers in which leaves lie, and the calls of compiled kernels."""

from __future__ import annotations

import math
import mmap
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from funcreg.kernels import Buffer, Kernel, compose
from funcreg.packing import Packing
from funcreg.recording import Record, Value
from funcreg.tree import reader

#: Entries from which a leaf is computed with where it lies: a call of a kernel then costs less than gathering it.
_LARGE = {"cpu": 2000_000}
_LARGE_ELSEWHERE = 4_000_000


class Compiler:
    """`torch.compile` for kernels: one for all that read the same, and none where it does not work."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._backend = backend
        self._made: dict[Any, _Compiled] = {}

    def __call__(self, module: fx.GraphModule, key: Any, dynamic: bool) -> Callable[..., Any]:
        if self._backend == "eager":
            return module
        key = (module.code, key)
        if key not in self._made:
            self._made[key] = _Compiled(module, self._backend, dynamic)
        return self._made[key]


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn, unless this was said before."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


class _Compiled:
    """A compiled module, or the module itself if compilation fails.

    `torch.compile` looks at its arguments before every call, to see if it may use what it compiled; that takes longer
    than a kernel for a few thousand entries. Here arguments differ in nothing but their numbers of entries, so that
    later calls go straight to what the backend made.
    """

    def __init__(self, module: fx.GraphModule, backend: str | Callable[..., Any], dynamic: bool) -> None:
        self._module, self._backend, self._dynamic = module, backend, dynamic
        self._run: Callable[..., Any] | None = None
        self._order: list[int] = []

    def __call__(self, *args: Any) -> Any:
        if self._run is None:
            return self._first(args)
        if not self._order:
            return self._run(*args)
        args = (*args, args[0].numel())  # The last one is what place -1 picks.
        return self._run(*[args[i] for i in self._order])

    def _first(self, args: tuple[Any, ...]) -> Any:
        from torch._dynamo import lookup_backend

        backend = lookup_backend(self._backend) if isinstance(self._backend, str) else self._backend
        made: list[tuple[Callable[..., Any], list[Any]]] = []
        returned: list[Any] = []

        def watched(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            run = backend(module, inputs)
            made.append((run, list(inputs)))

            def call(*given: Any) -> Any:
                returned[:] = out = run(*given)
                return out

            return call

        compiled = torch.compile(self._module, backend=watched, dynamic=self._dynamic, fullgraph=True)
        try:
            result = compiled(*args)
        except Exception as error:  # Nothing is written before a module is compiled.
            told = str(error).strip().splitlines()
            say_once(
                "fuse runs without compiled kernels, with equal results, because torch.compile failed: "
                f"{type(error).__name__}{': ' + told[0] if told else ''}"
            )
            self._run = self._module
            return self._module(*args)
        self._run = compiled
        if len(made) == 1 and len(returned) == len(result) and all(map(operator.is_, returned, result)):
            self._straight(*made[0], args)
        return result

    def _straight(self, run: Callable[..., Any], inputs: list[Any], args: tuple[Any, ...]) -> None:
        """Find each input of compiled code among the arguments; if that is not clear, leave the call as it is."""
        places = {id(arg): i for i, arg in enumerate(args)}
        if len(places) < len(args):
            return
        entries = args[0].numel() if args else 0
        order: list[int] = []
        for x in inputs:
            if id(x) in places:
                order.append(places[id(x)])
            elif isinstance(x, (int, torch.SymInt)) and self._dynamic and int(x) == entries > 1:
                order.append(-1)
            else:
                return
        if order:
            self._run, self._order = run, order


class Slab:
    """Memory for all that kernels write, and the leaves that are views of it."""

    def __init__(self, plan: Plan) -> None:
        self.buffers: dict[tuple[int, int], Tensor] = {}
        self._memory: list[Tensor] = []
        views: dict[int, Tensor] = {}
        together: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, slot in plan.kept:
            together.setdefault((id(plan.program.buffers[number].group), slot), []).append((number, slot))
        for i, keys in enumerate(together.values()):
            buffers = [plan.program.buffers[number] for number, _ in keys]
            slot, like = keys[0][1], buffers[0].homes[0].inputs[keys[0][1]]
            sizes = [math.prod(buffer.shapes[slot]) for buffer in buffers]
            memory = empty(sum(sizes), like.dtype, like.device, i)
            self._memory.append(memory)
            for key, buffer, part in zip(keys, buffers, memory.split(sizes), strict=True):
                self.buffers[key] = part.view(buffer.shapes[slot])
                views.update(zip(plan.kept[key], _leaves(buffer, slot, self.buffers[key]), strict=True))
        self.views = [views[position] for position in plan.owned]
        self.ids = tuple(map(id, self.views))
        self.places = {view.data_ptr() for view in self.views if view.numel()}
        views.clear()
        self._counts = self._count()

    def _count(self) -> tuple[int, int]:
        stored = sum([torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in self._memory])
        return sum(map(sys.getrefcount, self.views)), stored

    def free(self) -> bool:
        """Whether nobody else holds a leaf, or a view of one."""
        return self._count() == self._counts


_HUGE = 1 << 22


def empty(entries: int, dtype: torch.dtype, device: torch.device, number: int = 0) -> Tensor:
    """Memory for a vector: a large one on a CPU in huge pages where there are some, because a step reads it all."""
    size = entries * dtype.itemsize
    if device.type == "cpu" and size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Vectors that are read side by side begin at different places of a page, or stores would delay loads.
        offset = number % 16 * 832
        memory = mmap.mmap(-1, size + offset, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # A kernel without huge pages.
            return torch.empty(entries, dtype=dtype)
        return torch.frombuffer(memory, dtype=dtype, count=entries, offset=offset)
    return torch.empty(entries, dtype=dtype, device=device)


def _leaves(buffer: Buffer, slot: int, data: Tensor) -> list[Tensor]:
    """A buffer as the leaves in it."""
    shapes = [home.inputs[slot].shape for home in buffer.homes]
    if buffer.group.flat:
        return [x.view(shape) for x, shape in zip(data.split([math.prod(s) for s in shapes]), shapes, strict=True)]
    return [x.view(shape) for x, shape in zip(data if len(shapes) > 1 else [data], shapes, strict=True)]


_like = operator.attrgetter("shape", "dtype", "device")
_requires_grad = operator.attrgetter("requires_grad")


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What picks the entries at some places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda entries: [entries[i] for i in places]


def _guards(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """A fast look at whether tensors have the shapes, strides, dtypes and devices of these."""
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (ImportError, TypeError):  # Another version of torch: every call looks for itself.
        return None


class Plan:
    """A program for trees of one structure, with what is needed to call it.

    Arguments are parameters, gradients, state and extra tensors, in one list; results are parameters and state.
    """

    def __init__(
        self, found: Record, packing: Packing, params: int, results: int, in_place: bool, compiler: Compiler
    ) -> None:
        self.program = compose(packing, in_place, lambda device: _LARGE.get(device.type, _LARGE_ELSEWHERE))
        self._in_place, self._params, self._results = in_place, params, results
        self._loose = packing.loose
        self._slabs: list[Slab] = []
        self._scratch: dict[tuple[int, int], Tensor] = {}
        numbers: dict[Value, int | Tensor] = {value: i for i, value in enumerate(found.inputs)}
        numbers.update(found.captured)
        #: For each input of each buffer, which arguments, or captured tensors, it is made of.
        self._sources = [
            [[numbers[home.inputs[slot]] for home in buffer.homes] for slot in range(len(buffer.shapes))]
            for buffer in self.program.buffers
        ]
        self._gather = {
            (number, slot): self._gatherer(number, slot, len(found.inputs))
            for number, slots in enumerate(self._sources)
            for slot in range(len(slots))
        }
        #: What kernels write: from buffer and input to the positions of the results that lie there.
        self.kept: dict[tuple[int, int], list[int]] = {}
        for number, buffer in enumerate(self.program.buffers):
            home = buffer.homes[0]
            for slot in sorted({home.inputs.index(place) for place, _ in home.writes}):
                arguments = self._sources[number][slot]
                self.kept[number, slot] = [i if i < params else i - params for i in arguments]  # type: ignore
        self.owned = sorted([position for positions in self.kept.values() for position in positions])
        self._pick = _picker(self.owned)
        #: Gradients that kernels read where they lie.
        single = [x[0] for slots in self._sources for x in slots if len(x) == 1]
        self._direct = [x - params for x in single if isinstance(x, int) and params <= x < 2 * params]
        self._readers: list[Callable[[Any], list[Any] | None]] = []
        self._alike: Callable[..., bool] | None = None
        self._others: list[tuple[int, Any]] = []
        self._stages = [
            (
                scalars and (compiler(scalars.module, "scalars", dynamic=False), scalars),
                [call for kernel in kernels for call in self._calls(kernel, compiler)],
            )
            for scalars, kernels in self.program.stages
        ]
        needed = {value for _, kernels in self.program.stages for kernel in kernels for value in kernel.scalars}
        needed.update(value for scalars, _ in self.program.stages if scalars for value in scalars.takes)
        needed.update(self._loose.values())
        self._given = [(value, numbers[value]) for value in needed if value in numbers]

    def _calls(self, kernel: Kernel, compiler: Compiler) -> list[Any]:
        """The calls of a kernel: what runs, the buffer, what is read and written there, scalars and results."""
        calls = []
        for number, results in kernel.buffers:
            buffer = self.program.buffers[number]
            entries = math.prod(buffer.shapes[0])
            dtypes = tuple([value.dtype for value in buffer.homes[0].inputs])
            key = (dtypes, min(entries, 2) if buffer.group.flat else tuple(buffer.shapes))
            run = compiler(kernel.module, key, dynamic=buffer.group.flat) if entries else kernel.module
            calls.append((run, number, kernel.reads, kernel.writes, kernel.scalars, results))
        return calls

    def slab(self) -> Slab:
        """Buffers that nobody uses."""
        for slab in self._slabs:
            if slab.free():
                return slab
        slab = Slab(self)
        self._slabs.append(slab)
        return slab

    def find(self, leaves: Sequence[Tensor]) -> Slab | None:
        """The memory in which parameters and state lie, if they lie where a step put them."""
        if not self.owned:
            return None
        picked = self._pick(leaves)
        for slab in self._slabs:
            if all(map(operator.is_, picked, slab.views)):
                return slab
        return None

    def remember(self, params: Any, grads: Any, state: Any, columns: Sequence[list[Any]]) -> None:
        """Learn to read trees like these without a look at each of their tensors."""
        self._readers = [reader(tree) for tree in (params, grads, state)]
        self._alike = _guards(columns[1])
        leaves = [*columns[0], *columns[2]]
        self._others = [(i, _like(leaves[i])) for i in range(self._results) if i not in set(self.owned)]

    def read(self, *trees: Any) -> tuple[list[list[Any]], Slab] | None:
        """Leaves and memory of trees that a step has made, with gradients like those before."""
        if self._alike is None:
            return None
        columns: list[list[Any]] = []
        for read, tree in zip(self._readers, trees, strict=True):
            leaves = read(tree)
            if leaves is None:
                return None
            columns.append(leaves)
        leaves = [*columns[0], *columns[2]]
        slab = self.find(leaves)
        if slab is None or not self._alike(*columns[1]):
            return None
        for i, like in self._others:
            if not isinstance(leaves[i], Tensor) or _like(leaves[i]) != like:
                return None
        return columns, slab

    def suspicious(self, columns: Sequence[list[Any]], slab: Slab) -> bool:
        """Whether a gradient that is used where it lies, or a parameter that came to need one, forbids donation."""
        lying = map(Tensor.data_ptr, [columns[1][i] for i in self._direct])
        return any(map(_requires_grad, columns[0])) or not slab.places.isdisjoint(lying)

    def run(self, arguments: list[Any], slab: Slab | None) -> list[Tensor]:
        """Results: views of buffers, or in place the parameters and the state that were given."""
        out = None if self._in_place else self.slab()
        values: dict[Value, Any] = {}
        for value, source in self._given:
            values[value] = arguments[source] if isinstance(source, int) else source
        bound: dict[tuple[int, int], Tensor] = {} if slab is None else dict(slab.buffers)
        for scalars, calls in self._stages:
            if scalars is not None:
                run, told = scalars
                values.update(zip(told.makes, run(*[values[value] for value in told.takes]), strict=True))
            for run, number, reads, writes, taken, results in calls:
                inputs = []
                for slot in reads:
                    data = bound.get((number, slot))
                    if data is None:
                        data = bound[number, slot] = self._gather[number, slot](arguments)
                    inputs.append(data)
                inputs += [values[value] for value in taken]
                if out is not None:
                    inputs += [out.buffers[number, slot] for slot in writes]
                made = run(*inputs)
                if results:
                    values.update(zip(results, made, strict=True))
        return self._finished(arguments, values, bound, slab, out)

    def _finished(
        self, arguments: list[Any], values: dict[Value, Any], bound: Any, slab: Slab | None, out: Slab | None
    ) -> list[Tensor]:
        params = self._params
        if out is None:
            results = [*arguments[:params], *arguments[2 * params : params + self._results]]
            new = [values[value] for value in self._loose.values()]
            # A result that is an argument may be written before it is read.
            new = [x.clone() if value.node is None else x for x, value in zip(new, self._loose.values(), strict=True)]
            for position, x in zip(self._loose, new, strict=True):
                results[position].copy_(x)
            if slab is None:
                for (number, slot), positions in self.kept.items():
                    self._scattered(number, slot, bound[number, slot], [results[i] for i in positions])
            return results
        results: list[Any] = [None] * self._results
        for position, view in zip(self.owned, out.views, strict=True):
            results[position] = view
        for position, value in self._loose.items():
            x = values[value]
            results[position] = x.clone() if value.node is None else x
        return results

    def _gatherer(self, number: int, slot: int, arguments: int) -> Callable[[list[Any]], Tensor]:
        """What makes an input of a kernel of leaves: where they lie if it is one, else copied together."""
        buffer, sources = self.program.buffers[number], self._sources[number][slot]
        captured = [x for x in sources if isinstance(x, Tensor)]
        pick = _picker([x if isinstance(x, int) else arguments + i for i, x in enumerate(sources)])
        if captured:  # All homes of a group take the same kind of input.
            pick = lambda entries: captured
        flat = buffer.group.flat
        if len(sources) == 1:
            return lambda entries: pick(entries)[0].reshape(-1) if flat else pick(entries)[0].contiguous()
        join = torch.cat if flat else torch.stack
        vectors = not flat or all([len(home.inputs[slot].shape) == 1 for home in buffer.homes])

        def gather(entries: list[Any]) -> Tensor:
            leaves = pick(entries)
            scratch = self._scratch.get((number, slot))
            if scratch is None:
                scratch = empty(math.prod(buffer.shapes[slot]), leaves[0].dtype, leaves[0].device)
                self._scratch[number, slot] = scratch = scratch.view(buffer.shapes[slot])
            join(leaves if vectors else [x.reshape(-1) for x in leaves], out=scratch)
            return scratch

        return gather

    def _scattered(self, number: int, slot: int, data: Tensor, leaves: list[Tensor]) -> None:
        """Write what a kernel wrote into copies of leaves back into the leaves."""
        if len(leaves) == 1 and data.data_ptr() == leaves[0].data_ptr():
            return
        for leaf, view in zip(leaves, _leaves(self.program.buffers[number], slot, data), strict=True):
            leaf.copy_(view)
