"""A program at work: the buffers in which leaves lie, and the calls of compiled kernels."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import mmap
import operator
import platform
import sys
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from funcreg.kernels import Buffer, Kernel, compose, over_temporaries, with_scratch, without_nan
from funcreg.looks import Likeness, Looks, addresses, look, prepare
from funcreg.packing import Packing, sizes_known
from funcreg.recording import Record, Value, undisturbed
from funcreg.tree import copier, reader, restored

#: Sets of parameters and state that a step knows at once. It takes others too, but has to copy them together.
_SETS = 8
#: Entries from which a leaf is computed with where it lies: a call of a kernel then costs less than gathering it.
_SIZES = {"cpu": (40_000, 1_000_000)}
_SIZES_ELSEWHERE = (4_000_000, (1 << 31) - 1)
#: Sizes of what a module computes with, and None for those that may be any from call to call.
_Told = tuple[int | None, ...]
#: Bytes of results, on a CPU, that are more than its caches keep until the next step.
_BEYOND_CACHES = 1 << 24


class Compiler:
    """`torch.compile` for kernels: one for all that read the same, and none where it does not work."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._backend = backend
        self._made: dict[Any, _Compiled] = {}
        self.compiles, self.compiles_cpp = backend != "eager", backend == "inductor"

    def __call__(
        self, module: fx.GraphModule, key: Any, told: _Told = (), flat: bool = False, past_caches: bool = False
    ) -> Callable[..., Any]:
        """What runs a module: with sizes told, on all tensors of such, and if flat, piece by piece."""
        if not self.compiles:
            return _in_pieces(module) if flat else module
        key = (module.code, key, told, flat, past_caches)
        if key not in self._made:
            self._made[key] = _Compiled(module, self._backend, told, flat, past_caches)
        return self._made[key]


#: Leaves from which it takes long to look at them all.
_MANY = 100
#: Entries of a vector that code without a compiler computes with at once: what it makes then stays in a cache.
_PIECE = 262144


def _in_pieces(module: fx.GraphModule) -> Callable[..., Any]:
    """An elementwise module, piece by piece; what it returns are sums."""
    careful, quick = _PieceByPiece(module), without_nan(module)
    if quick is None:
        return careful
    quick = _PieceByPiece(quick)

    def run(*args: Any) -> Any:
        if args[0].device.type != "cpu":  # Where a look at a result is a wait for it.
            return careful(*args)
        results = quick(*args)
        return careful(*args) if any([x != x for x in map(Tensor.item, results)]) else results

    return run


class _PieceByPiece:
    """An elementwise module that never computes with more entries than a cache holds."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = over_temporaries(module)
        self._near, self._dtypes = with_scratch(self._module)
        self._memory: list[Tensor] = []

    def _scratch(self, entries: int) -> list[Tensor]:
        if self._dtypes and (not self._memory or len(self._memory[0]) < entries):
            with torch.inference_mode(False):
                cpu = torch.device("cpu")
                self._memory = [empty(entries, dtype, cpu, i) for i, dtype in enumerate(self._dtypes)]
        return [x if len(x) == entries else x[:entries] for x in self._memory]

    def __call__(self, *args: Any) -> Any:
        if args[0].device.type != "cpu":
            return self._module(*args)
        entries = args[0].numel()
        if entries <= _PIECE:
            return self._near.forward(*args, *self._scratch(entries))
        columns = [x.split(_PIECE) if x.ndim else itertools.repeat(x) for x in args]
        rows = [self._near.forward(*row, *self._scratch(len(row[0]))) for row in zip(*columns, strict=False)]
        return tuple([functools.reduce(torch.add, parts) for parts in zip(*rows, strict=True)])


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn, unless this was said before."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


class _Compiled:
    """A compiled module, or the module itself if compilation fails.

    The backend is given the module itself. `torch.compile` would first run it to see what it does, and then look at
    its arguments before every call, which differ in nothing but their numbers of entries.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        backend: str | Callable[..., Any],
        told: _Told,
        flat: bool,
        past_caches: bool,
    ) -> None:
        self._module, self._told, self._flat = module, told, flat
        self._backend = functools.partial(_inductor, past_caches=past_caches) if backend == "inductor" else backend
        self._run: Callable[..., Any] | None = None
        #: Which argument has the shape that all others have, and which of its sizes code is told of in each call.
        self._vector, self._dims = 0, ()
        #: What is right for some shapes only, with those, and what was found to be right for one.
        self._made: list[tuple[_Sizes, Callable[..., Any]]] = []
        self._known: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if self._run is None:
            return self._plainly(*args) if _forbidden() else self._first(args)
        if not self._dims:
            return self._run(*args)
        return self._run(*args, *[args[self._vector].shape[i] for i in self._dims])

    def _first(self, args: tuple[Any, ...]) -> Any:
        graph = fx.Graph()  # Its own: backends write into what they are given.
        graph.output(graph.graph_copy(self._module.graph, {}))
        try:
            sizes = _Sizes(args, self._told)
            for i in sizes.dims:
                with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                    graph.placeholder(f"s{i}")
            with undisturbed():
                run = _backend(self._backend)(fx.GraphModule(torch.nn.Module(), graph), sizes.like(args))
            result = run(*args, *[args[sizes.vector].shape[i] for i in sizes.dims])
        except Exception as error:  # Nothing is written before a module is compiled.
            say_once(
                "fuse runs without compiled kernels, with equal results, because compilation failed: "
                + " ".join(str(error).split())[:300]
            )
            self._run, self._dims = self._plainly, ()
            return self._run(*args)
        self._vector, self._dims = sizes.vector, sizes.dims
        if self._made or sizes.taken_for_granted:
            self._made.append((sizes, run))
            self._run = self._by_shape
        else:
            self._run = run
        return result

    def _by_shape(self, *args: Any) -> Any:
        shape = args[self._vector].shape
        if shape not in self._known:
            right = [run for sizes, run in self._made if sizes.hold(shape)]
            if not right:
                return self._first(args[: len(args) - len(self._dims)])
            self._known[shape] = right[0]
        return self._known[shape](*args)

    @functools.cached_property
    def _plainly(self) -> Callable[..., Any]:
        return _in_pieces(self._module) if self._flat else self._module


def _forbidden() -> bool:
    """Whether `TORCH_COMPILE_DISABLE` forbids to compile."""
    from torch._dynamo import config

    return bool(_untyped(config).disable)


class _Sizes:
    """What a compiler is told of the arguments of a module: with sizes told, all that have dimensions have these.

    Sizes are arguments of their own, too: Inductor keeps what it takes for granted about those, with what it made.
    """

    def __init__(self, args: tuple[Tensor, ...], told: _Told) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        self._known = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._known if told else None)
        self.vector = 0
        shape: Any = ()
        if told:
            self.vector = next(i for i, x in enumerate(args) if x.ndim)
            # A stack of one leaf is computed with as one of many: 1 would be told to the compiler.
            found = args[self.vector].shape
            sizes = [max(2, size) if known is None else known for size, known in zip(found, told, strict=True)]
            varying = [DimDynamic.DYNAMIC if known is None else DimDynamic.STATIC for known in told]
            context: Any = StatelessSymbolicContext(dynamic_sizes=varying)
            shape = self._mode.from_tensor(torch.empty(sizes, device="meta"), symbolic_context=context).shape
        self._shape = shape
        self._symbols = {i: shape[i].node.expr for i, known in enumerate(told) if known is None}
        #: Which sizes of vectors are unknown.
        self.dims = tuple(self._symbols)

    def like(self, args: tuple[Tensor, ...]) -> list[Any]:
        """Arguments without numbers, of which no two share memory, and sizes.

        What kernels write overlaps nothing else: it is memory of the step's own, or donated and looked at.
        """
        with self._mode:
            made: list[Any] = [self._like(x) for x in args]
        return made + [self._shape[i] for i in self.dims]

    def _like(self, x: Tensor) -> Tensor:
        if self._shape and x.ndim:
            return torch.empty(self._shape, dtype=x.dtype, device=x.device)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    @property
    def taken_for_granted(self) -> bool:
        """Whether the compiler took something for granted about sizes."""
        return bool(self._known.guards)

    def hold(self, shape: Sequence[int]) -> bool:
        """Whether that is so for a shape."""
        there = {symbol: shape[i] for i, symbol in self._symbols.items()}
        return all([bool(guard.expr.subs(there)) for guard in self._known.guards])


#: From the number of a buffer and of an input of its homes to the numbers of the leaves that lie there.
_Places = dict[tuple[int, int], list[int]]


def _untyped(x: Any) -> Any:
    """What torch has, but not its types."""
    return x


@functools.cache
def _written_early(past_caches: bool) -> Any:
    """What makes Inductor write a result before it sums: one loop then does both, and reads what both read once."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class WrittenEarly(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for copy in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
                place, value = copy.args
                if list(place.users) == [copy] and value.op == "call_function":
                    value.append(copy)

        def uuid(self) -> Any:
            # Inductor keeps what it made, and is to know what `_streaming` did to it.
            return f"funcreg: written early, read ahead{', past caches' * past_caches}"

    return WrittenEarly()


#: Bytes from what a loop reads to what it asks for meanwhile.
_AHEAD = 1024


@contextlib.contextmanager
def _streaming(past_caches: bool) -> Iterator[None]:
    """Let loops of Inductor on a CPU ask for memory before they read it, and write results past the caches if told.

    A processor looks ahead by itself, but not over the end of a page, and not far where many vectors are read at once.
    Stores first read what they are to overwrite, unless they go past the caches; the barrier at the end of a parallel
    loop orders these before all that comes after it.
    """
    from torch._inductor.codegen import cpp

    kernel = _untyped(cpp.CppVecKernel)
    load, store = kernel._get_vec_load_line, kernel._get_store_line

    def load_line(self: Any, var: Any, index: Any, *rest: Any, **options: Any) -> Any:
        line = load(self, var, index, *rest, **options)
        if self.tail_size is not None or index == 0:
            return line
        place = f"reinterpret_cast<const char*>({var} + {_untyped(cpp).cexpr_index(index)})"
        return f"(__builtin_prefetch({place} + {_AHEAD}), {line})"

    def store_line(self: Any, value: Any, var: Any, index: Any, dtype: torch.dtype, *rest: Any, **options: Any) -> Any:
        code = store(self, value, var, index, dtype, *rest, **options)
        text, before, bits = code.getvalue().strip(), f"{value}.store(", 32 * self.tiling_factor
        whole = dtype == torch.float32 and self.tail_size is None and bits in (256, 512)
        if not whole or not text.startswith(before) or "\n" in text:
            return code
        place, past = text.removeprefix(before).removesuffix(");"), type(code)()
        aligned = f"reinterpret_cast<uintptr_t>({place}) % {bits // 8} == 0"
        past.writeline(f"if ({aligned}) _mm{bits}_stream_ps({place}, {value}); else {text}")
        return past

    kernel._get_vec_load_line = load_line
    if past_caches:
        kernel._get_store_line = store_line
    try:
        yield
    finally:
        kernel._get_vec_load_line, kernel._get_store_line = load, store


@contextlib.contextmanager
def _without_trials() -> Iterator[None]:
    """Let Inductor take the vectors of a processor for granted, and do without what it would try to compile first.

    These are instructions for matrices, of no use here. To try them takes longer than all else of a first call.
    """
    from torch._inductor import cpu_vec_isa

    kinds, known = _untyped(cpu_vec_isa.VecISA), _untyped(cpu_vec_isa.valid_vec_isa_list)
    if known.cache_info().currsize:
        yield
        return
    check = kinds.check_build
    kinds.check_build = lambda self, code: False
    try:
        yield
    finally:
        kinds.check_build = check
        known.cache_clear()  # For others, it is tried.
        for kind in vars(cpu_vec_isa).values():
            forget = getattr(getattr(kind, "__bool__", None), "cache_clear", None)
            if forget is not None:
                forget()


def _inductor(module: fx.GraphModule, inputs: Any, past_caches: bool = False) -> Callable[..., Any]:
    """Inductor for loops over much memory, without checks of what is known: shapes, and the vectors of a processor.

    If compilation fails, it is done with these checks, and then, as another version may have other insides, as Inductor
    does it.
    """
    from torch._inductor import compile_fx as inductor

    compile_fx = _untyped(inductor.compile_fx)
    known = {"size_asserts": False}
    ours = {**known, "post_grad_custom_post_pass": _written_early(past_caches)}
    for trials, patches in ((_without_trials(), {**ours, "cpp.vec_isa_ok": True}), (contextlib.nullcontext(), ours)):
        with contextlib.suppress(Exception), trials, _streaming(past_caches):
            return compile_fx(module, inputs, config_patches=patches)
    return compile_fx(module, inputs, config_patches=known)


def _backend(named: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that compiles a graph."""
    if isinstance(named, str):
        from torch._dynamo import lookup_backend

        return lookup_backend(named)
    return named


class Slab:
    """Memory for some inputs of all buffers, and the leaves that are views of it.

    Under `~number`, with the number of the first buffer of a flat group, there are also all of its buffers as one.
    """

    def __init__(self, buffers: Sequence[Buffer], places: _Places) -> None:
        self.buffers: dict[tuple[int, int], Tensor] = {}
        self.leaves: list[Any] = []  # What a step returned, views and other leaves.
        self._memory: list[Tensor] = []
        #: How many hold the memory, and the leaves, while nobody else does.
        self._used_alone: int | None = None
        self._alone: dict[Looks, tuple[int, ...] | None] = {}
        views: dict[int, Tensor] = {}
        together: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, slot in places:
            together.setdefault((id(buffers[number].group), slot), []).append((number, slot))
        for i, keys in enumerate(together.values()):
            slot, like = keys[0][1], buffers[keys[0][0]].homes[0].inputs[keys[0][1]]
            sizes = [math.prod(buffers[number].shapes[slot]) for number, _ in keys]
            # On a GPU every buffer begins where wide loads may: kernels copy others at every call.
            padded = sizes if like.device.type == "cpu" else [-(-size // 64) * 64 for size in sizes]
            self._memory.append(empty(sum(padded), like.dtype, like.device, i))
            if padded is sizes and buffers[keys[0][0]].group.flat:
                self.buffers[~keys[0][0], slot] = self._memory[-1]
            for key, part, size in zip(keys, self._memory[-1].split(padded), sizes, strict=True):
                buffer = buffers[key[0]]
                self.buffers[key] = part[:size].view(buffer.shapes[slot])
                views.update(zip(places[key], _leaves(buffer, slot, self.buffers[key]), strict=True))
        # As views autograd would keep more of them, and to ask them would take longer.
        self.views = [views[number].detach() for number in sorted(views)]
        #: For plans, the trees that their results are, with an ellipsis for other leaves.
        self.trees: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._addresses = addresses(self.views)
        self._storages = [x.untyped_storage() for x in self._memory]
        self._spans = array("Q", [end for x in self._memory for end in (x.data_ptr(), x.data_ptr() + x.nbytes)])

    def moved(self, first: int) -> bool:
        """Whether a leaf lies elsewhere since `w.data = x`, or one of the first ones otherwise since `w.t_()`.

        Both leave it the same tensor; moments are not transposed.
        """
        return look().moved(self.views, self._addresses, first)

    def _used(self) -> int:
        counts = [torch._C._storage_Use_Count(x._cdata) for x in self._storages]
        return sum(counts) + sum(map(sys.getrefcount, self._storages))

    def left(self) -> bool:
        """Whether fewer tensors than before lie in this memory."""
        return self._used_alone is not None and self._used() < self._used_alone

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether one of these begins in this memory."""
        return look().begin_inside(tensors, self._spans)

    def free(self, first: int) -> tuple[bool, bool]:
        """Whether nobody else holds a leaf, or a view of one, since this was first asked, and whether one is spoilt.

        It cannot be a result once more: it lies elsewhere or requires grad, or one of the first ones got a gradient.
        """
        by, used = look(), self._used()
        if self._used_alone is None:
            self._used_alone = used
        held, spoilt = self._held(by, first)
        if by not in self._alone:  # Another one may have looked before.
            if any([self._held(other, first)[0] != alone for other, alone in self._alone.items()]):
                return False, spoilt
            self._alone[by] = held
        return used == self._used_alone and held is not None and held == self._alone[by], spoilt

    def _held(self, by: Looks, first: int) -> tuple[tuple[int, int] | None, bool]:
        """How often others than trees of ours hold leaves, if that is known, and whether one is spoilt."""
        found = by.held(self.views, self._addresses, first)
        if found is None:
            return None, True
        references, uses, spoilt = found
        return (references - len(self.trees) * len(self.views), uses), spoilt


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
    return [x.view(shape) for x, shape in zip(data if buffer.group.stacked else [data], shapes, strict=True)]


_like = operator.attrgetter("shape", "dtype", "device")


def _signature(values: Sequence[Value], any_shape: bool = False) -> tuple[Any, ...]:
    """What code that was compiled for some values is right for."""
    return tuple([(value.dtype, value.device, None if any_shape else value.shape) for value in values])


def lying(leaves: Sequence[Tensor]) -> Tensor | None:
    """The vector of which leaves are views, if they lie in one piece of memory, one after another."""
    first = leaves[0]
    place, size = first.data_ptr(), first.element_size()
    for leaf in leaves:
        if leaf.data_ptr() != place or not leaf.is_contiguous() or leaf.is_conj() or leaf.is_neg():
            return None
        place += leaf.numel() * size
    entries, storage = (place - first.data_ptr()) // size, first.untyped_storage()
    inside = place <= storage.data_ptr() + storage.nbytes()  # Neighbours in memory may still be strangers.
    return first.as_strided((entries,), (1,)) if inside else None


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What picks the entries at some places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda entries: [entries[i] for i in places]


def _stack(leaves: Sequence[Tensor], out: Tensor) -> None:
    torch.stack(tuple(leaves), out=out)


def _end_to_end(leaves: Sequence[Tensor], out: Tensor) -> None:
    torch.cat([x.reshape(-1) for x in leaves], out=out)


def _joiner(shapes: Sequence[tuple[int, ...]]) -> Callable[[Sequence[Tensor], Tensor], None]:
    """What copies leaves of some shapes into a vector, end to end.

    Neighbours that differ in their first dimension alone are put together as they are: to see each leaf as a vector
    first takes longer than to copy a small one.
    """
    runs: list[tuple[slice, slice, tuple[int, ...]]] = []
    start = entries = 0
    for tail, run in itertools.groupby(shapes, key=lambda shape: shape[1:]):
        heads = [shape[0] for shape in run]
        size = sum(heads) * math.prod(tail)
        runs.append((slice(start, start + len(heads)), slice(entries, entries + size), (sum(heads), *tail)))
        start, entries = start + len(heads), entries + size
    if 2 * len(runs) > len(shapes) > 1:
        return _end_to_end

    def join(leaves: Sequence[Tensor], out: Tensor) -> None:
        for some, part, shape in runs:
            torch.cat(tuple(leaves[some]), out=out[part].view(shape))

    return join


def _likeness(tensors: list[Tensor]) -> Likeness | None:
    """What gradients are compared with, if this version of torch can."""
    try:
        return Likeness(tensors)
    except (ImportError, TypeError):  # Every call looks for itself.
        return None


def _wholes(keys: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(~number, slot) for number, slot in keys]


class Plan:
    """A program for trees of one structure, with what is needed to call it.

    Arguments are parameters, gradients, state and extra tensors, in one list; results are parameters and state.
    Of each of the four, `specs` has the structure, and `likes` the shape, dtype and device of each leaf.
    """

    def __init__(
        self,
        found: Record,
        packing: Packing,
        specs: Sequence[Any],
        likes: Sequence[list[Any]],
        in_place: bool,
        compiler: Compiler,
        slabs: dict[Any, list[Slab]],
        sizes: tuple[int, int] | None = None,
    ) -> None:
        if compiler.compiles_cpp and sum(map(len, likes)) >= _MANY:
            prepare()
        self.specs, self.seen, self.likes, self.in_place = specs, specs, likes, in_place
        params, results = len(likes[0]), len(found.outputs)
        limits = lambda device: sizes or _SIZES.get(device.type, _SIZES_ELSEWHERE)
        self.program = compose(packing, in_place, limits, products=compiler.compiles)
        self._params, self._results = params, results
        self._loose = packing.loose
        self._aliases = {position for position, value in packing.loose.items() if value.alias}
        dtypes = [like[1] for like in (*likes[0], *likes[2])]
        self._dtypes = {position: dtypes[position] for position in packing.loose if position < len(dtypes)}
        self._scratch: dict[Any, Tensor] = {}
        self._most: dict[Any, int] = {}  # Entries of the largest use of what many calls share.
        self._shared: set[tuple[int, int]] = set()
        numbers: dict[Value, int | Tensor] = {value: i for i, value in enumerate(found.inputs)}
        numbers.update(found.captured)
        #: For each input of each buffer, which arguments, or captured tensors, it is made of.
        self._sources = [
            [[numbers[home.inputs[slot]] for home in buffer.homes] for slot in range(len(buffer.shapes))]
            for buffer in self.program.buffers
        ]
        #: What kernels write: from buffer and input to the positions of the results that lie there.
        self.kept: _Places = {}
        self._read: _Places = {
            (number, slot): mine
            for number, slots in enumerate(self._sources)
            for slot, arguments in enumerate(slots)
            if (mine := [x for x in arguments if isinstance(x, int) and params <= x < 2 * params])
        }
        self._gradients: Slab | None = None
        for number, buffer in enumerate(self.program.buffers):
            home = buffer.homes[0]
            for slot in sorted({home.inputs.index(place) for place, _ in home.writes}):
                arguments = self._sources[number][slot]
                numbered = [x for x in arguments if isinstance(x, int)]
                self.kept[number, slot] = [i if i < params else i - params for i in numbered]
        self._lying = {**self.kept, **self._read}
        self._gather = {
            (number, slot): self._gatherer(number, slot, len(found.inputs))
            for number, slots in enumerate(self._sources)
            for slot in range(len(slots))
        }
        self._past_caches = (
            not in_place and platform.machine() in ("x86_64", "AMD64") and self._written() > _BEYOND_CACHES
        )
        #: Shared with plans that differ in nothing but what else they take, such as gradients of another dtype.
        layout: list[Any] = [*likes[0], *likes[2]]
        for (number, slot), there in self.kept.items():
            buffer = self.program.buffers[number]
            layout.append((number, slot, buffer.group.flat, buffer.shapes[slot], *there))
        self._slabs = slabs.setdefault(tuple(layout), [])
        self.owned = sorted([position for positions in self.kept.values() for position in positions])
        self._pick = _picker(self.owned)
        self._parameters = sum([position < params for position in self.owned])
        self._loosely = sorted(set(range(results)).difference(self.owned))
        self._readers: list[Callable[[Any], list[Any] | None]] = []
        self._likeness: Likeness | None = None
        self._others: list[tuple[int, Any]] = []
        self._arrange: Callable[[list[Any]], Any] = tuple
        self._copy: Callable[[Any, list[Any]], Any] = lambda old, new: old
        self._places: list[int] | None = None  # Of other leaves, in the order in which they are found.
        self._bindings: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._stages = [
            (
                scalars and (compiler(scalars.module, _signature(scalars.takes)), scalars),
                [call for kernel in kernels for call in self._calls(kernel, compiler)],
            )
            for scalars, kernels in self.program.stages
        ]
        needed = {value for _, kernels in self.program.stages for kernel in kernels for value in kernel.scalars}
        needed.update(value for scalars, _ in self.program.stages if scalars for value in scalars.takes)
        needed.update(self._loose.values())
        self._given = [(value, numbers[value]) for value in needed if value in numbers]
        for group in packing.groups:
            for home in group.homes:
                home.nodes.clear()
        found.forget()

    def _written(self) -> int:
        """Bytes of results that kernels write."""
        sizes = 0
        for number, slot in self.kept:
            buffer = self.program.buffers[number]
            sizes += math.prod(buffer.shapes[slot]) * buffer.homes[0].inputs[slot].dtype.itemsize
        return sizes

    def _calls(self, kernel: Kernel, compiler: Compiler) -> list[Any]:
        """The calls of a kernel: what runs, what is read and written in which buffers, scalars and results."""
        calls = []
        for numbers, results in kernel.calls:
            buffers = [self.program.buffers[number] for number in numbers]
            entries = math.prod(buffers[0].shapes[0])
            pieces = kernel.flat and buffers[0].homes[0].inputs[0].device.type == "cpu"
            told: _Told = ()
            if kernel.kin:
                told = (None, *sizes_known(buffers[0].shapes[0][1:]))
            elif pieces:
                told = (entries if entries < 2 else None,)
            shapes = () if told else tuple([tuple(buffer.shapes) for buffer in buffers])
            like = [_signature(buffer.homes[0].inputs, any_shape=bool(told)) for buffer in buffers]
            key = (*like, _signature(kernel.scalars), shapes)
            run = kernel.module
            if entries or not kernel.flat:
                run = compiler(kernel.module, key, told, pieces, self._past_caches)
            reads = [(number, slot) for number, slots in zip(numbers, kernel.reads, strict=True) for slot in slots]
            writes = [(number, slot) for number, slots in zip(numbers, kernel.writes, strict=True) for slot in slots]
            calls.append((run, reads, writes, kernel.scalars, results))
        return calls

    def _stages_of_wholes(self) -> tuple[list[Any], dict[Value, Tensor]]:
        """Stages for gradients that lie as kernels read them: one call for all buffers of a flat group.

        Also the values of what the calls return that are no longer made.
        """
        stages, blank = [], {}
        for (scalars, calls), (_, kernels) in zip(self._stages, self.program.stages, strict=True):
            rest, merged = iter(calls), []
            for kernel in kernels:
                mine = [next(rest) for _ in kernel.calls]
                reads = [key for _, reads, *_ in mine for key in reads]
                known = all([len(self._lying.get(key, ())) == len(self._sources[key[0]][key[1]]) for key in reads])
                near = self.program.buffers[kernel.calls[0][0][0]].homes[0].inputs[0].device.type == "cpu"
                if len(mine) > 1 and kernel.flat and known and near:
                    _, reads, writes, taken, results = mine[0]
                    entries = [math.prod(self.program.buffers[numbers[0]].shapes[0]) for numbers, _ in kernel.calls]
                    run = mine[entries.index(max(entries))][0]  # Not what was compiled for one entry, or for none.
                    mine = [(run, _wholes(reads), _wholes(writes), taken, results)]
                    for _, parts in kernel.calls[1:]:  # Sums over one buffer, which are now in the first.
                        blank.update(
                            (value, torch.zeros((), dtype=value.dtype, device=value.device)) for value in parts
                        )
                merged += mine
            stages.append((scalars, merged))
        return stages, blank

    def slab(self, given: Slab | None = None) -> Slab:
        """Memory that nobody uses, least of all that of what is given: what results have left, or new."""
        found: Slab | None = None
        for slab in [slab for slab in self._slabs if slab is not given]:
            if found is not None and len(self._slabs) <= 2:
                break
            free, spoilt = slab.free(self._parameters)
            if free:
                if found is not None or spoilt:  # One is enough.
                    self._slabs.remove(slab)
                else:
                    found = slab
            elif slab.left():
                self._slabs.remove(slab)
        if found is not None:
            return found
        with torch.inference_mode(False), torch.no_grad():
            slab = Slab(self.program.buffers, self.kept)
        views = dict(zip(self.owned, slab.views, strict=True))
        slab.leaves = [views.get(position) for position in range(self._results)]
        del views  # Who holds leaves from now on holds results.
        slab.free(self._parameters)
        self._slabs.append(slab)
        del self._slabs[:-_SETS]
        return slab

    def gradients(self) -> list[Tensor]:
        """Zeros for gradients, which lie as kernels read them."""
        with torch.inference_mode(False), torch.no_grad():
            slab = Slab(self.program.buffers, self._read)
        lying = dict(zip(sorted(i for numbers in self._read.values() for i in numbers), slab.views, strict=True))
        empty_ones = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self.likes[1]]
        slab.leaves = [lying.get(self._params + i, x).zero_() for i, x in enumerate(empty_ones)]
        self._gradients = slab
        self._bindings.clear()
        return slab.leaves

    def find(self, leaves: list[Any]) -> Slab | None:
        """The memory in which parameters and state lie, if they lie where a step put them."""
        if not self.owned:
            return None
        by = look()
        for slab in reversed(self._slabs):
            if leaves[self.owned[0]] is not slab.views[0]:
                continue
            if not by.same(leaves, slab.leaves):
                if not by.same(self._pick(leaves), slab.views):
                    continue
                for i in self._loosely:
                    slab.leaves[i] = leaves[i]
            return None if slab.moved(self._parameters) else slab
        return None

    def ours(self, grads: list[Any]) -> bool:
        """Whether gradients are those of `gradients`, and lie where they did."""
        mine = self._gradients
        return mine is not None and look().same(grads, mine.leaves) and not mine.moved(len(mine.views))

    def recall(self, params: Any) -> list[Any] | None:
        """Leaves of parameters like those before."""
        leaves = self._readers[0](params)
        if leaves is None or self._likeness is None or not look().alike(leaves, self._likeness):
            return None
        return leaves

    def remember_params(self, params: Any, spec: Any, leaves: list[Tensor]) -> None:
        """Learn to read parameters like these without a look at each of them."""
        self._readers, self._likeness = [reader(params)], _likeness(leaves)
        self._returns(lambda new: (new[-1], restored(spec, new[:-1])))

    def remember(self, params: Any, grads: Any, state: Any, columns: Sequence[list[Any]], specs: Any) -> None:
        """Learn to read trees like these without a look at each of their tensors."""
        self.seen = specs
        self._readers = [reader(tree) for tree in (params, grads, state)]
        self._likeness = _likeness(columns[1])
        leaves, count = [*columns[0], *columns[2]], len(columns[0])
        self._others = [(i, _like(leaves[i])) for i in self._loosely]
        self._returns(lambda new: (restored(specs[0], new[:count]), restored(specs[2], new[count:])))

    def _returns(self, arrange: Callable[[list[Any]], Any]) -> None:
        """Learn of what trees results are the leaves."""
        self._arrange, self._places = arrange, None
        self._copy = copier(arrange(list(range(self._results))), self._loosely)
        for slab in self._slabs:
            slab.trees.pop(self, None)

    def _tree(self, slab: Slab) -> Any:
        """What results in some memory are the leaves of, with an ellipsis for other leaves."""
        if self not in slab.trees:
            there = dict(zip(self.owned, slab.views, strict=True))
            slab.trees[self] = self._arrange([there.get(i, ...) for i in range(self._results)])
        return slab.trees[self]

    def arranged(self, slab: Slab, results: list[Any]) -> Any:
        """Trees of results, which lie in some memory."""
        return self._copy(self._tree(slab), results)

    def _recognized(self, params: Any, state: Any) -> Slab | None:
        """The memory in which parameters and state lie, if they are just what a step returned, but for other leaves."""
        by = look()
        for slab in reversed(self._slabs):
            others = by.same_tree((params, state), self._tree(slab))
            if others is None:
                continue
            if self._places is None:
                numbers = list(range(self._results))
                known = set(self.owned)
                dots = [i if i in known else ... for i in numbers]
                self._places = by.same_tree(self._arrange(numbers), self._arrange(dots))
            for i, x in zip(self._places or (), others, strict=True):
                slab.leaves[i] = x
            return slab
        return None

    def read(self, params: Any, grads: Any, state: Any) -> tuple[list[list[Any]], Slab, bool] | None:
        """Leaves and memory of trees that a step has made, with gradients like those before or `ours`, and if ours."""
        if self._likeness is None:
            return None
        gradients = self._readers[1](grads)
        if gradients is None:
            return None
        slab = self._recognized(params, state)
        if slab is None:
            mine, moments = self._readers[0](params), self._readers[2](state)
            slab = None if mine is None or moments is None else self.find([*mine, *moments])
            if slab is None:
                return None
        elif slab.moved(self._parameters):
            return None
        ours = self.ours(gradients)
        if not ours and not look().alike(gradients, self._likeness):
            return None
        leaves = slab.leaves
        for i, like in self._others:
            if not isinstance(leaves[i], Tensor) or _like(leaves[i]) != like:
                return None
        return [leaves[: self._params], gradients, leaves[self._params :]], slab, ours

    def suspicious(self, columns: Sequence[list[Any]], slab: Slab, ours: bool) -> bool:
        """Whether gradients that lie in donated memory, or parameters that came to need one, forbid donation."""
        return look().need_gradient(columns[0]) or (not ours and slab.holds(columns[1]))

    def run(self, arguments: list[Any], slab: Slab | None, out: Slab | None, ours: bool = False) -> list[Tensor]:
        """Results in some memory; none if they are in place, in the parameters and the state given."""
        values: dict[Value, Any] = {}
        for value, source in self._given:
            given = arguments[source] if isinstance(source, int) else source
            values[value] = given.contiguous() if given.ndim else given
        stages, blank, alone = self._bound(slab, out, ours)
        values.update(blank)
        # What is gathered in this call, for all stages and the end: first what needs a look alone, while that is fast.
        bound = {key: gather(arguments) for key, gather in alone.items()}
        for scalars, calls in stages:
            if scalars is not None:
                run, told = scalars
                values.update(zip(told.makes, run(*[values[value] for value in told.takes]), strict=True))
            for run, reads, missing, taken, writes, results in calls:
                inputs = reads.copy()
                for i, key, gather, shared in missing:
                    data = bound.get(key)
                    if data is None:
                        data = gather(arguments)
                        if not shared:
                            bound[key] = data
                    inputs[i] = data
                made = run(*inputs, *[values[value] for value in taken], *writes)
                if results:
                    values.update(zip(results, made, strict=True))
        return self._finished(arguments, values, bound, slab, out)

    def _bound(
        self, slab: Slab | None, out: Slab | None, ours: bool
    ) -> tuple[list[Any], dict[Value, Tensor], dict[tuple[int, int], Any]]:
        """Stages with what is read and written in some memory, and what must be gathered, by place in the call.

        Also what makes inputs of single leaves.
        """
        # Memory that is let go of takes what is known of it along.
        known = self._bindings.setdefault(slab or self, weakref.WeakKeyDictionary()).setdefault(out or self, {})
        if ours in known:
            return known[ours]
        buffers: dict[tuple[int, int], Tensor] = {} if slab is None else dict(slab.buffers)
        stages, blank = self._stages, {}
        if ours and self._gradients is not None:
            buffers.update(self._gradients.buffers)
            if slab is not None:
                stages, blank = self._stages_of_wholes()
        found: list[Any] = []
        alone: dict[tuple[int, int], Any] = {}
        for scalars, calls in stages:
            bound = []
            for run, reads, writes, taken, results in calls:
                given = [buffers.get(key) for key in reads]
                missing = [
                    (i, key, self._gather[key], key in self._shared) for i, key in enumerate(reads) if given[i] is None
                ]
                alone.update((key, gather) for _, key, gather, _ in missing if len(self._sources[key[0]][key[1]]) == 1)
                targets = [] if out is None else [out.buffers[key] for key in writes]
                bound.append((run, given, missing, taken, targets, results))
            found.append((scalars, bound))
        known[ours] = found, blank, alone
        return known[ours]

    def _finished(
        self, arguments: list[Any], values: dict[Value, Any], bound: Any, slab: Slab | None, out: Slab | None
    ) -> list[Tensor]:
        loose: dict[int, Tensor] = {}
        for position, value in self._loose.items():
            x = values[value]
            # A copy of what may share memory with an argument, which may be written before it is read.
            alias = position in self._aliases
            loose[position] = x.clone(memory_format=torch.contiguous_format) if alias else x
            if self._dtypes.get(position, x.dtype) != x.dtype:
                loose[position] = loose[position].to(self._dtypes[position])
        if out is None:
            place = lambda i: arguments[i if i < self._params else i + self._params]
            for position, x in loose.items():
                place(position).copy_(x)
            if slab is None:
                for (number, slot), positions in self.kept.items():
                    self._scattered(number, slot, bound[number, slot], [place(i) for i in positions])
            return []
        for position in self._loosely:
            out.leaves[position] = loose[position]
        return list(out.leaves)

    def _gatherer(self, number: int, slot: int, arguments: int) -> Callable[[list[Any]], Tensor]:
        """What makes an input of a kernel of leaves: where they lie if it is one, else copied together."""
        buffer, sources = self.program.buffers[number], self._sources[number][slot]
        captured = [x for x in sources if isinstance(x, Tensor)]
        pick = _picker([x if isinstance(x, int) else arguments + i for i, x in enumerate(sources)])
        if captured:  # All homes of a group take the same kind of input.
            pick = lambda entries: captured
        flat = buffer.group.flat
        if len(sources) == 1:
            first, shape = sources[0], (-1,) if flat else buffer.shapes[slot]
            if isinstance(first, int):
                return lambda entries: entries[first].contiguous().view(shape)
            return lambda entries: first.contiguous().view(shape)
        shape, like = buffer.shapes[slot], buffer.homes[0].inputs[slot]
        join = _joiner([home.inputs[slot].shape for home in buffer.homes]) if flat else _stack
        kept, size = (number, slot) in self.kept or not flat, math.prod(buffer.shapes[slot])
        # What is only read is copied together for one call of a flat kernel after the other, in the same memory.
        key = (number, slot) if kept else (slot, like.dtype, like.device)
        if not kept:
            self._shared.add((number, slot))
            self._most[key] = max(self._most.get(key, 0), size)

        scratches, most, in_place = self._scratch, self._most, self.in_place  # No cycle, which would outlive the plan.

        def gather(entries: list[Any]) -> Tensor:
            leaves = pick(entries)
            if flat and not (kept and in_place) and (there := lying(leaves)) is not None:
                return there
            memory = scratches.get(key)
            if memory is None:
                with torch.inference_mode(False):
                    scratches[key] = memory = empty(most.get(key, size), like.dtype, like.device)
            scratch = memory[:size].view(shape)
            if not look().join(leaves, scratch):
                join(leaves, scratch)
            return scratch

        return gather

    def _scattered(self, number: int, slot: int, data: Tensor, leaves: list[Tensor]) -> None:
        """Write what a kernel wrote into copies of leaves back into the leaves."""
        if len(leaves) == 1 and data.data_ptr() == leaves[0].data_ptr():
            return
        for leaf, view in zip(leaves, _leaves(self.program.buffers[number], slot, data), strict=True):
            leaf.copy_(view)
