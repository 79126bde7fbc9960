"""What funcreg uses of torch that torch does not document, item by item: why, and what happens without it.

Everything else in the package is public. Each item has a test that takes it away and finds equal results.
"""

from __future__ import annotations

import copy
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

#: `torch.func` keeps its levels there.
functorch: Any = getattr(torch._C, "_functorch", None)
current_level: Callable[[], int | None] | None = getattr(functorch, "maybe_current_level", None)
count_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
#: A function of the arguments of a graph.
Compiled = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def dispatch_mode() -> Any:
    """`TorchDispatchMode`, which sees every operation, of a chain or a forward pass.

    Without it a chain is not recorded, and `torch.compile` compiles its plain functions leaf by leaf; no channels are
    found; and rules on shards run on whole leaves. Without `_push_mode` and `_pop_mode` it is that of torch.
    """
    from torch.utils import _python_dispatch
    from torch.utils._python_dispatch import TorchDispatchMode

    push, pop = [getattr(_python_dispatch, name, None) for name in ("_push_mode", "_pop_mode")]
    if push is None or pop is None:
        return TorchDispatchMode

    class Mode(TorchDispatchMode):
        """A mode of this thread alone.

        That of torch sets flags of the process, and puts them back as it found them. Where threads are in modes at
        the same time, one of the user's own among them, the flags would stay set, and `torch.compile` of torch 2.9
        would leave all functions uncompiled from there on, without a word.
        """

        def __enter__(self) -> Any:
            push(self)
            return self

        def __exit__(self, *raised: Any) -> None:
            pop()

    return Mode


def compile_directly(
    graph: fx.GraphModule, inputs: Sequence[Tensor], backend: Any, any_size: bool, options: dict[str, Any] | None = None
) -> Compiled:
    """Hand a graph of ATen operations to the backend itself, Inductor with options of `torch.compile`.

    `torch.compile` would trace the graph once more, and check its arguments before every call, which costs more than
    most kernels take. Without `make_fx` or the backends' own functions, `torch.compile` is used.
    """
    from torch._dynamo import lookup_backend
    from torch.fx.experimental.proxy_tensor import make_fx

    with _as_torch_compile():
        # Backends trace a graph themselves: all that is traced here is what stands for arguments, which have a size.
        identity = make_fx(lambda *args: args, tracing_mode="symbolic" if any_size else "fake")(*inputs)
        examples = [node.meta["val"] for node in identity.graph.find_nodes(op="placeholder")]
        graph = fx.GraphModule(torch.nn.Module(), copy.deepcopy(graph.graph))  # Which a backend may change.
        if backend == "inductor":
            from torch._inductor import compile as inductor

            with _own_processor_checks():
                compiled: Any = inductor(graph, examples, options={"cpp.vec_isa_ok": True, **(options or {})})
                return compiled
        return (lookup_backend(backend) if isinstance(backend, str) else backend)(graph, examples)


#: Taken in a child of the process, where a thread that is not there may hold the lock of `torch.compile`.
_own_lock = threading.RLock()
_process = os.getpid()


@contextmanager
def _as_torch_compile() -> Iterator[None]:
    """Take turns with `torch.compile`, and let other threads call what it made: tracing sets flags of the process.

    Without the lock and the flag of `torch.compile`, there is a lock for the steps alone.
    """
    from torch._dynamo import convert_frame

    lock = getattr(convert_frame, "compile_lock", _own_lock) if os.getpid() == _process else _own_lock
    session = getattr(torch.compiler, "_compile_session_context", nullcontext)
    with lock, session():
        yield


@contextmanager
def _own_processor_checks() -> Iterator[None]:
    """Let Inductor forget that `cpp.vec_isa_ok` told it to skip trial compilations, which take longer than kernels.

    Other compilations in the process then make these trials as ever. Without this they are skipped there, too.
    """
    from torch._inductor import cpu_vec_isa

    known: Any = getattr(cpu_vec_isa, "valid_vec_isa_list", None)
    before = known.cache_info().currsize if hasattr(known, "cache_info") else 1
    try:
        yield
    finally:
        if not before:
            known.cache_clear()


def compilation_is_forbidden() -> bool:
    """Whether `TORCH_COMPILE_DISABLE` is set, which `torch.compile` obeys; backends that are called directly do not."""
    from torch._dynamo import config

    return bool(getattr(config, "disable", False))


@contextmanager
def imports_may_warn() -> Iterator[None]:
    """Let torch import its compiler where warnings are errors: some of its modules warn of themselves."""
    if not any(action == "error" for action, *_ in warnings.filters):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_compiling() -> bool:
    """Whether this call is being compiled or exported.

    `torch.compiler.is_compiling` alone is also true while another thread compiles something of its own.
    """
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and is_traced())


def is_traced() -> bool:
    """Whether operations are recorded and not computed: by `torch.compile`, or by a mode that sees each of them.

    Numbers are not read then. Without the count of modes, reading one ends a recording: see `dispatch_mode`.
    """
    if torch.compiler.is_dynamo_compiling() or count_modes is None:
        return torch.compiler.is_compiling()
    return count_modes() > 0


def read_once(call: Function) -> Function:
    """Let the compiler run a function as it reads code, and take what it returns as a constant.

    What `torch.compiler.assume_constant_result` marks, without its import of the whole compiler. Without the mark,
    `torch.compile` reads the function itself, which may be more than it can read.
    """
    call.__dict__["_dynamo_marked_constant"] = True
    return call


def never_traced(function: Function) -> Function:
    """Let `torch.compile` run a function as it is, with all that it calls, also where it traces what calls it.

    What `torch.compiler.disable` wraps, without its import of the whole compiler and its cost at each call. Without it,
    a function of the user's own that is compiled inside of a chain makes the compiler trace the recorder, and warn.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    names = ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
    mark, strategy, action = [getattr(frames, name, None) for name in names]
    if mark is not None and strategy is not None and action is not None:
        mark(function.__code__, strategy(action.SKIP, action.SKIP))
    return function


#: Where `torch.compile` keeps the function that it compiled.
ORIGINAL = "_torchdynamo_orig_callable"


def compiled_from(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that `torch.compile` made this one of; None of others.

    Without it, a copy of a module has a copy of what `torch.compile` made, with equal results.
    """
    return vars(function).get(ORIGINAL)


def dynamo_asks() -> bool:
    """Whether `torch.compile` runs this call itself: up to torch 2.11 it asks whether what it calls is true.

    Without it, a selection that a user's function calls inside compiled code raises an error there.
    """
    if torch.compiler.is_dynamo_compiling():  # It reads the code of this call.
        return False
    context = getattr(getattr(torch, "_guards", None), "TracingContext", None)
    return context is not None and context.try_get() is not None


def is_transformed(leaves: Callable[[], list[Any]] = list) -> bool:
    """Whether a `vmap`, `grad` or `jvp` of `torch.func` is at work, whose tensors have no memory to read or write.

    Without the level that `torch.func` keeps, leaves are asked for their memory.
    """
    if current_level is not None:
        return current_level() is not None
    return any([isinstance(x, Tensor) and not _has_memory(x) for x in leaves()])


def _has_memory(x: Tensor) -> bool:
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def count_maps() -> int:
    """How many `vmap` of `torch.func` are at work.

    Without the stack that torch keeps of its transforms none is told, and members of a user's own `vmap` inside of one
    of `sweep` draw the same numbers.
    """
    transforms: Any = getattr(getattr(torch, "_functorch", None), "pyfunctorch", None)
    found = getattr(transforms, "retrieve_all_functorch_interpreters", list)()
    kinds: Any = getattr(functorch, "TransformType", None)
    return sum([kinds is not None and each.key() == kinds.Vmap for each in found])


def has_tangents() -> bool:
    """Whether forward-mode derivatives may be at work, which writing into a result would lose."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def without_levels(w: Tensor) -> Tensor:
    """The tensor inside those that `torch.func.grad` wraps around it. Without it, such numbers are not read."""
    while functorch is not None and functorch.is_gradtrackingtensor(w):
        w = functorch.get_unwrapped(w)
    return w


def all_members(w: Tensor) -> Tensor:
    """The tensor inside those that `torch.func` wraps around it, batches as a whole. Without it, none is read."""
    while functorch is not None and functorch.is_functorch_wrapped_tensor(w):
        w = functorch.get_unwrapped(w)
    return w


def is_batched(w: Tensor) -> bool:
    """Whether a tensor stands for a batch inside `vmap`. Without it, each is asked for its memory."""
    return functorch.is_functorch_wrapped_tensor(w) if functorch is not None else not _has_memory(w)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was written to. Without it, gradients that nothing was written into go unnoticed."""
    return [0 if x.is_inference() else getattr(x, "_version", 0) for x in tensors]


def copy_all(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into places, in one launch for many on a GPU. Without it, one after the other."""
    together = getattr(torch, "_foreach_copy_", None)
    if together is not None and places:
        together(list(places), list(values))
        return
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def tensor_checks(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A check whether tensors differ from these in nothing but their numbers and where they lie.

    `TensorGuards` reads type, dtype, device, shape, strides, `requires_grad` and the negative and conjugate bits of a
    tensor in 70 ns. Without it, Python reads them in a microsecond.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        guards: Any = TensorGuards  # Its types say symbolic numbers; plain ones are what it is given everywhere.
        return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (ImportError, AttributeError, TypeError):
        known = list(map(described, tensors))
        return lambda *others: known == list(map(described, others))


def described(x: Any) -> Any:
    """Everything about a tensor but its numbers and where they lie."""
    if not isinstance(x, Tensor):
        return type(x)
    bits = (x.requires_grad, x.is_neg(), x.is_conj(), x.is_inference())
    return type(x), x.shape, x.dtype, x.device, x.layout, x.stride() if x.layout is torch.strided else None, bits


#: Functions by which an error is told apart: what calls a compiled function, and what draws until bounds hold.
CALLS_COMPILED, DRAWS_AGAIN = "compile_wrapper", "_no_grad_trunc_normal_"


def raised_in(error: Exception, name: str) -> bool:
    """Whether an error was raised inside of a function of torch. Without its name, the text is that of other errors."""
    return any([frame.name == name for frame in traceback.extract_tb(error.__traceback__)])


def forward_depth() -> int:
    """How many forward derivatives of `torch.func` are taken of each other.

    Torch leaves terms out of the forward derivative of a forward derivative of a custom function. Without the count,
    such derivatives are wrong, and nobody says so.
    """
    transforms: Any = getattr(getattr(torch, "_functorch", None), "eager_transforms", None)
    return int(getattr(transforms, "JVP_NESTING", 0))
