"""The compiled boundary from outside: faults that were found there, each as the right behaviour."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, assert_equal, cpu_only, normal
from hypothesis import assume, given
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import funcreg as fr
from funcreg.core import undocumented
from funcreg.fused import plan as plans
from funcreg.fused import recording

#: Links of a chain are fused here by themselves.
pytestmark = pytest.mark.filterwarnings("ignore:fuse got .* steps go uphill")

#: Seconds in which anything that is not stuck has ended.
LONG = 120


both = pytest.mark.parametrize("donate", [False, True])
compilers = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def square(value: float = 1.0) -> dict[str, torch.Tensor]:
    """Leaves of one shape, and one beside them."""
    value = float(value)
    return {"a": torch.arange(9.0).reshape(3, 3) * value, "b": torch.full((3, 3), value), "c": torch.ones(4) * value}


def plain(tx: fr.Transform, params: Any, grads: Any, state: Any, **extra: Any) -> Any:
    """One step of the plain functions, on copies."""
    params, grads, state, extra = copy.deepcopy((params, grads, state, extra))
    updates, state = tx.update(grads, state, params, **extra)
    return fr.apply_updates(params, updates), state


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert_equal(found, expected, rtol=tolerance, atol=tolerance)


def check(tx: fr.Transform, step: Any, params: Any, grads: Any, state: Any, **extra: Any) -> Any:
    """One step, compared with the plain functions."""
    expected = plain(tx, params, grads, state, **extra)
    results = step(params, grads, state, **extra)
    close(results, expected)
    return results


def anchored(anchor: Any) -> fr.Transform:
    return fr.chain(fr.trace(0.9), fr.add_penalty(fr.anchored_l2, anchor, strength=0.5), fr.scale(-0.1))


def run(code: str, *flags: str, **environment: str) -> str:
    """What a script prints in a process of its own."""
    found = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=4 * LONG,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def in_threads(*works: Callable[[], Any]) -> None:
    """Do these at the same time; what one of them raises is raised."""
    raised: list[BaseException] = []

    def doing(work: Callable[[], Any]) -> Callable[[], None]:
        def do() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        return do

    threads = [threading.Thread(target=doing(work), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * LONG)
        assert not thread.is_alive()
    flags: dict[str, Any] = vars(torch.fx._symbolic_trace)
    tracing = flags.get("_is_fx_tracing_flag", False)  # Later versions have one for each thread.
    if tracing:
        flags["_is_fx_tracing_flag"] = False
    if raised:
        raise raised[0]
    assert not tracing, "from now on, torch takes every call of a compiled function for one inside a tracer"


# Kernels that raise


class Raising:
    """A backend whose kernels compute, write, and then raise."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        writes = any(["copy_" in str(node.target) for node in graph.graph.nodes])

        def kernel(*args: Any) -> Any:
            made = graph(*args)
            if writes:
                self.runs += 1
                raise RuntimeError("the kernel failed")
            return made

        return kernel


@both
def test_a_kernel_that_wrote_and_then_raised_is_not_run_again(donate):
    backend = Raising()
    step = fr.fuse(fr.chain(fr.trace(0.9), fr.scale(-0.1)), donate=donate, backend=backend)
    params, state = step.init(square())
    before = copy.deepcopy((params, state))
    once = plain(fr.chain(fr.trace(0.9), fr.scale(-0.1)), params, square(), state)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        step(params, square(), state)
    assert backend.runs == 1
    if donate:  # One kernel wrote all leaves, once.
        close((params, state), once)
    else:
        assert_equal((params, state), before)


@both
def test_a_kernel_of_a_chain_that_cannot_be_recorded_raises_and_the_update_comes_once(donate):
    def backend(graph, inputs):
        def kernel(*args):
            graph(*args)
            raise RuntimeError("the kernel failed")

        return kernel

    tx = fr.stateless(lambda u, p: fr.tree_map(lambda x: x + 0 * torch.rand_like(x), u))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That it is slow, and runs without a compiler.
        step = fr.fuse(tx, donate=donate, backend=backend)
        params, state = step.init(square())
        before = copy.deepcopy(params)
        after, _ = step(params, square(), state)
    close(after, fr.tree_map(lambda w, g: w + g, before, square()))


@both
def test_a_chain_that_cannot_be_recorded_steps_where_torch_cannot_compile_either(donate, monkeypatch):
    def fails(*args, **kwargs):
        raise FileNotFoundError("no directory for a cache, which torch makes when it imports its compiler")

    monkeypatch.setattr(torch, "compile", fails)
    tx = fr.stateless(lambda u, p: fr.tree_map(lambda x: x + 0 * torch.rand_like(x), u))
    step = fr.fuse(tx, donate=donate)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        params, state = step.init(square())
        before = copy.deepcopy(params)
        after, _ = step(params, square(), state)
    assert "fuse runs this chain without a compiler: no directory for a cache" in str(said[-1].message)
    close(after, fr.tree_map(lambda w, g: w + g, before, square()))


@both
def test_a_compilation_that_fails_has_changed_nothing(donate):
    def backend(graph, inputs):
        def kernel(*args):
            raise AssertionError("never called")

        for x in inputs:
            assert not isinstance(x, torch.Tensor) or type(x) is not torch.Tensor
        raise RuntimeError("no compiler here, either")

    tx = fr.chain(fr.scale_by_adam(), fr.scale(-0.1))
    step = fr.fuse(tx, donate=donate, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params, state = step.init(square())
        for n in range(3):
            params, state = check(tx, step, params, square(n), state)


# Tensors that were changed in place between steps

#: What becomes of a square matrix `x`; `other` is a leaf like it.
CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "t_": lambda x, other: x.t_(),
    "unsqueeze_": lambda x, other: x.unsqueeze_(0),
    "data": lambda x, other: setattr(x, "data", 2 * x.data + 1),
    "data, transposed": lambda x, other: setattr(x, "data", x.data.T),
    "data of another leaf": lambda x, other: setattr(x, "data", other.data),
    "data of another dtype": lambda x, other: setattr(x, "data", x.data.double()),
    "data, expanded": lambda x, other: setattr(x, "data", torch.ones(1).expand(3, 3)),
    "set_": lambda x, other: x.set_(torch.full((3, 3), 5.0)),
    "set_ to another leaf": lambda x, other: x.set_(other),
    "resize_": lambda x, other: x.resize_(2, 2),
    "as_strided_": lambda x, other: x.as_strided_((3, 3), (1, 3)),
    "share_memory_": lambda x, other: x.share_memory_(),
    "requires_grad_": lambda x, other: x.requires_grad_(),
    "swap": lambda x, other: torch.utils.swap_tensors(x, other),
    "neg bit": lambda x, other: setattr(x, "data", negated(x.data)),
}
PLACES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "parameter": lambda params, grads, state, anchor: (params["a"], params["b"]),
    "moment": lambda params, grads, state, anchor: (state[0].trace["a"], state[0].trace["b"]),
    "gradient": lambda params, grads, state, anchor: (grads["a"], grads["b"]),
    "gradient, like a parameter": lambda params, grads, state, anchor: (grads["a"], params["b"]),
    "captured": lambda params, grads, state, anchor: (anchor["a"], anchor["b"]),
    "captured, like a parameter": lambda params, grads, state, anchor: (anchor["a"], params["b"]),
}
# Compiled kernels, too, for what they read, and for what they write over: a gradient is read by both steps alike.
LOOKED_AT = [
    pytest.param(where, donate, backend, marks=marks, id=f"{name}-{donate}-{backend}")
    for name, where in PLACES.items()
    for backend, marks in (("eager", ()), ("inductor", pytest.mark.slow))
    for donate in (False, True)
    if not donate or backend == "eager" or name in ("parameter", "moment")
]


@cpu_only
@pytest.mark.filterwarnings("ignore:this is computed leaf by leaf")  # Which is said once, of any of these.
@pytest.mark.parametrize(("where", "donate", "backend"), LOOKED_AT)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tensors_changed_in_place_after_a_step_are_read_as_they_are_or_refused(change, where, donate, backend):
    anchor = square(3.0)
    tx = anchored(anchor)
    step = fr.fuse(tx, donate=donate, backend=backend)
    params, state = step.init(square())
    grads = square(0.5)
    params, state = check(tx, step, params, grads, state)
    try:
        change(*where(params, grads, state, anchor))
    except RuntimeError:  # Torch itself refuses, as of memory that it did not allocate.
        return
    try:
        expected = plain(tx, params, grads, state)
    except Exception:
        expected = None
    before = copy.deepcopy(fr.tree_map(torch.Tensor.detach, (params, grads, state, anchor)))
    try:
        results = step(params, grads, state)
    except (ValueError, TypeError, RuntimeError):
        assert_equal(fr.tree_map(torch.Tensor.detach, (params, grads, state, anchor)), before)
        return
    assert expected is not None, "the plain functions raise an error"
    close(results, expected)
    if not donate:
        assert_equal(fr.tree_map(torch.Tensor.detach, (params, grads, state, anchor)), before)


@cpu_only
@pytest.mark.parametrize("place", ["parameter", "moment"])
def test_leaves_that_came_to_share_memory_are_refused_after_good_steps(place):
    tx = fr.trace(0.9)
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init(square())
    for _ in range(2):
        params, state = step(params, square(), state)
    leaves = params if place == "parameter" else state.trace
    leaves["a"].data = leaves["b"].data
    before = copy.deepcopy((params, state))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'(trace\.)?a' and .*'(trace\.)?b' share memory"):
            step(params, square(), state)
    assert_equal((params, state), before)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_that_came_to_have_another_dtype_or_shape(backend, shape):
    rate = torch.tensor(0.1)
    tx = fr.prox_sgd(rate, fr.l1, strength=0.1)
    step = fr.fuse(tx, backend=backend)
    params, state = step.init(square())
    params, state = check(tx, step, params, square(), state)
    rate.data = torch.full(shape, 0.5, dtype=torch.float64)
    try:
        plain(tx, params, square(), state)
    except Exception:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            step(params, square(), state)
        return
    check(tx, step, params, square(), state)


# Tensors that the chain holds, or is given, in memory that is donated


ALIASES: dict[str, Callable[[Any, Any], Any]] = {
    "the parameters": lambda params, state: params,
    "detached": lambda params, state: fr.tree_map(torch.Tensor.detach, params),
    "one of them": lambda params, state: {**square(3.0), "b": params["b"]},
    "a view": lambda params, state: {**square(3.0), "a": params["a"].T},
    "part of one": lambda params, state: {**square(3.0), "b": params["a"][1:2].expand(3, 3)},
    "a moment": lambda params, state: {**square(3.0), "a": state[0].trace["b"]},
    "a number": lambda params, state: {"a": 0.0, "b": params["c"][2], "c": 0.0},
}


@both
@compilers
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_captured_tensors_in_donated_memory_are_refused(alias, donate, backend):
    params, state = fr.fuse(anchored(square()), backend="eager").init(square())
    tx = anchored(alias(params, state))
    step = fr.fuse(tx, donate=donate, backend=backend)
    before = copy.deepcopy((params, state))
    if not donate:
        for _ in range(2):  # What is not written over may be anchored to.
            after = check(tx, step, params, square(0.5), state)
            assert_equal((params, state), before)
        check(tx, step, after[0], square(0.5), after[1])
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shape \(.*that the chain holds shares memory with.*clone"):
            step(params, square(0.5), state)
    assert_equal((params, state), before)
    others = copy.deepcopy((params, state))  # The same step on copies is right.
    for _ in range(2):
        others = check(tx, step, others[0], square(0.5), others[1])


@pytest.mark.parametrize("of", ["parameter", "moment", "view"])
def test_a_captured_tensor_that_came_to_alias_donated_memory_is_refused(of):
    anchor = square(3.0)
    tx = anchored(anchor)
    step = fr.fuse(tx, donate=True, backend="eager")
    params, state = step.init(square())
    for _ in range(2):
        params, state = check(tx, step, params, square(0.5), state)
    anchor["a"].data = {"parameter": params["a"], "moment": state[0].trace["b"], "view": params["b"].T}[of].data
    before = copy.deepcopy((params, state))
    with pytest.raises(ValueError, match="that the chain holds shares memory"):
        step(params, square(0.5), state)
    assert_equal((params, state), before)
    anchor["a"].data = torch.full((3, 3), 4.0)
    check(tx, step, params, square(0.5), state)


def with_extra() -> fr.Transform:
    def update(updates, state, params, *, target):
        pulled = fr.tree_map(lambda u, w, t: -0.1 * (u + w - t), updates, params, target)
        return pulled, fr.tree_map(lambda s, t: s + t, state, target)

    return fr.Transform(lambda params: fr.tree_map(torch.zeros_like, params), update)


@both
@compilers
@pytest.mark.parametrize("of", ["parameters", "state", "views", "gradients", "negated"])
def test_extra_arguments_may_alias_donated_memory(of, donate, backend):
    tx = with_extra()
    step = fr.fuse(tx, donate=donate, backend=backend)
    params, state = step.init(square(), target=square())
    grads = square(0.5)
    targets = {
        "parameters": lambda: params,
        "state": lambda: state,
        "views": lambda: {"a": params["b"].T, "b": params["a"][:1].expand(3, 3), "c": state["c"].flip(0)},
        "gradients": lambda: grads,
        "negated": lambda: fr.tree_map(negated, square(2.0)),
    }
    for _ in range(3):
        params, state = check(tx, step, params, grads, state, target=targets[of]())


def test_an_autograd_graph_notices_that_a_donated_leaf_was_written():
    step = fr.fuse(fr.sgd(0.1), donate=True, backend="eager")
    params, state = step.init(square())
    for _ in range(2):
        factor = torch.ones(3, 3, requires_grad=True)
        value, before = (factor * params["a"]).sum(), params["a"].clone()
        params, state = step(params, square(), state)
        try:
            value.backward()
        except RuntimeError as error:
            assert "inplace" in str(error)  # noqa: PT017
        else:
            close(factor.grad, before)


# Bits of tensors


def negated(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, in memory with the other sign."""
    if x.is_complex():
        return torch.conj_physical(x).conj()
    found = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert found.is_neg()
    return found


@both
@compilers
@pytest.mark.parametrize("kind", ["negative", "conjugate"])
@pytest.mark.parametrize("place", ["params", "grads", "state", "captured", "extra"])
@pytest.mark.parametrize("first", ["plain", "with the bit"])
def test_negative_and_conjugate_bits_are_heeded(place, kind, first, donate, backend):
    number = (lambda x, k: torch.complex(x * k, x + k)) if kind == "conjugate" else (lambda x, k: x * (1 + k))
    draw_one = lambda k: {name: number(x, k) for name, x in square().items()}
    anchor = draw_one(3)

    def update(updates, state, params, *, extra):
        moved = fr.tree_map(lambda u, w, a, e: -0.1 * (u + w - a) * e, updates, params, anchor, extra)
        return moved, fr.tree_map(lambda s, u: 0.9 * s + u, state, updates)

    tx = fr.Transform(lambda params: fr.tree_map(torch.ones_like, params), update)
    step = fr.fuse(tx, donate=donate, backend=backend)
    params, state = step.init(draw_one(1), extra=draw_one(4))
    grads, extra = draw_one(2), draw_one(4)
    if first == "plain":
        params, state = check(tx, step, params, grads, state, extra=extra)
    trees: dict[str, Any] = {"params": params, "grads": grads, "state": state, "captured": anchor, "extra": extra}
    trees[place]["a"] = negated(trees[place]["a"])
    if donate and place in ("params", "state"):
        before = copy.deepcopy((params, state))
        with pytest.raises(ValueError, match=rf"{place} 'a' is a negated or conjugated view.*copy"):
            step(params, grads, state, extra=extra)
        assert_equal((params, state), before)
        return
    params, state = check(tx, step, params, grads, state, extra=extra)


@both
@compilers
def test_a_learning_rate_with_a_negative_bit(donate, backend):
    rate = torch.tensor([1 + 0.25j]).conj().imag[0]
    assert rate.is_neg()
    assert rate == -0.25
    tx = fr.chain(fr.trace(0.9), fr.stateless(lambda u, p: fr.tree_map(lambda x: x * rate, u)))
    step = fr.fuse(tx, donate=donate, backend=backend)
    params, state = step.init(square())
    for _ in range(3):
        params, state = check(tx, step, params, square(), state)


def test_gradients_of_penalties_at_negated_parameters():
    f = fr.value_and_grad(fr.elastic, 0.3, 0.6, backend="aot_eager")
    for params in (square(), fr.tree_map(negated, square()), square()):
        close(f(params), (fr.elastic(square(), 0.3, 0.6), fr.elastic.grad(square(), 0.3, 0.6)))


# Threads and processes


class Stopping:
    """A backend that waits while it compiles, until it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.begun.set()
        assert self.go.wait(LONG)
        return graph


def test_a_step_does_not_wait_for_the_first_call_of_another():
    stopping = Stopping()
    known = fr.fuse(fr.adam(0.1), backend="aot_eager")
    known(*[known.init(square())[0], square(), known.init(square())[1]])

    def first():
        step = fr.fuse(fr.adam(0.1), backend=stopping)
        params, state = step.init(square())
        check(fr.adam(0.1), step, params, square(), state)

    def second():
        assert stopping.begun.wait(LONG)
        try:
            for step in (known, fr.fuse(fr.adam(0.1), backend="eager")):  # What compiles, too, takes turns with it.
                params, state = step.init(square())
                check(fr.adam(0.1), step, params, square(), state)
            assert not stopping.go.is_set()
        finally:
            stopping.go.set()

    in_threads(first, second)


def test_functions_are_compiled_after_two_threads_have_recorded_at_the_same_time():
    begun, ended = (threading.Event(), threading.Event()), (threading.Event(), threading.Event())

    def record(mine: int) -> None:
        def update(grads: Any, state: Any, params: Any) -> Any:
            begun[mine].set()
            assert begun[1 - mine].wait(LONG)
            assert not mine or ended[0].wait(LONG)  # The one that began first ends first.
            return fr.tree_map(lambda g: -0.1 * g, grads), state

        assert not mine or begun[0].wait(LONG)
        step = fr.fuse(fr.Transform(lambda params: (), update), backend="eager")
        step(*[step.init(square())[0], square(), ()])
        ended[mine].set()

    in_threads(lambda: record(0), lambda: record(1))
    counter = CompileCounterWithBackend("eager")
    torch.compile(lambda x: x + 1, backend=counter, fullgraph=True)(torch.ones(2, device=DEVICE))
    assert counter.frame_count == 1
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def test_functions_are_compiled_after_a_mode_of_another_thread_outlasted_a_recording():
    begun, entered, ended = threading.Event(), threading.Event(), threading.Event()

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def records() -> None:
        def update(grads: Any, state: Any, params: Any) -> Any:
            begun.set()
            assert entered.wait(LONG)
            return fr.tree_map(lambda g: -0.1 * g, grads), state

        step = fr.fuse(fr.Transform(lambda params: (), update), backend="eager")
        step(*[step.init(square())[0], square(), ()])
        ended.set()

    def counts() -> None:
        assert begun.wait(LONG)
        with Mode():
            entered.set()
            assert ended.wait(LONG)

    in_threads(records, counts)
    counter = CompileCounterWithBackend("eager")
    torch.compile(lambda x: x + 1, backend=counter, fullgraph=True)(torch.ones(2, device=DEVICE))
    assert counter.frame_count == 1
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def unseen(graph: Any, inputs: Any) -> Any:
    """A backend whose kernels no mode sees, as those of Inductor."""

    def kernel(*args: Any) -> Any:
        assert not any([isinstance(x, FakeTensor) for x in args]), "a kernel reads memory that is not there"
        with torch.utils._python_dispatch._disable_current_modes():
            return graph(*args)

    return kernel


@both
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("entered", [False, True])
def test_no_kernel_reads_fake_tensors(entered, warm, donate):
    tx = fr.prox_adam(0.1, fr.l1, strength=0.1)
    step, f = fr.fuse(tx, donate=donate, backend=unseen), fr.value_and_grad(fr.l1, backend=unseen)
    params, state = step.init(square())
    if warm:
        params, state = step(params, square(2.0), state)
    before, mode = copy.deepcopy((params, state)), FakeTensorMode(allow_non_fake_inputs=True)
    fakes, grads = [fr.tree_map(mode.from_tensor, tree) for tree in (params, square(2.0))]
    with mode if entered else nullcontext():
        results = [step(fakes, grads, step.init(fakes)[1])[0], f(fakes)]
        if entered and not donate:
            results.append(step(params, square(2.0), state)[0])  # Numbers that the mode tells nobody.
    assert all([isinstance(x, FakeTensor) for x in fr.tree_leaves(results)])
    assert_equal((params, state), before)
    check(tx, step, params, square(2.0), state)


def test_a_mode_that_records_operations_sees_those_of_a_fused_step():
    step, f = fr.fuse(fr.prox_adam(0.1, fr.l1, strength=0.1), backend=unseen), fr.value_and_grad(fr.l1, backend=unseen)
    params, state = step.init(square())
    both_of = lambda params, grads, state: (step(params, grads, state), f(params))
    graph = make_fx(both_of)(params, square(), state)
    others = fr.tree_map(lambda w: 3 * w.cos(), params)
    expected = both_of(others, square(-2.0), state)
    assert_close(graph(others, square(-2.0), state), expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_function_inside_of_a_chain_leaves_the_recorder_to_python():
    pull = torch.compile(lambda u, w: u + 0.1 * w.abs() * w, backend="eager")
    tx = fr.chain(fr.stateless(lambda updates, params: fr.tree_map(pull, updates, params)), fr.sgd(0.1))
    step = fr.fuse(tx, backend="eager")
    params, state = step.init(square())
    check(tx, step, params, square(2.0), state)
    read = [recording._Recorder.__torch_dispatch__, recording._Recorder._argument, recording._Placeholder.__new__]
    assert not any([_debug_get_cache_entry_list(f.__code__) for f in read])


@cpu_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.distributed
def test_a_process_forked_during_a_first_call_steps():
    code = """
import copy, os, signal, threading, warnings
import torch, funcreg as fr
warnings.simplefilter("ignore")
begun, go = threading.Event(), threading.Event()
main = os.getpid()

def backend(graph, inputs):
    if os.getpid() == main:
        begun.set()
        assert go.wait(100)
    return graph

params = {"a": torch.ones(3, 3), "b": torch.ones(3, 3)}
waiting = fr.fuse(fr.adam(0.1), backend=backend)
shared, shared_state = waiting.init(params)
other = fr.fuse(fr.adam(0.1), backend="aot_eager")
warm = fr.fuse(fr.adam(0.1), backend="aot_eager")
held, state = warm.init(params)
held, state = warm(held, params, state)
before = copy.deepcopy(held)
thread = threading.Thread(target=lambda: waiting(shared, params, shared_state))
thread.start()
assert begun.wait(100)
child = os.fork()
if child == 0:
    signal.alarm(60)
    for step in (waiting, other, warm):
        p, s = step.init(params)
        p, s = step(p, params, s)
        assert torch.allclose(p["a"], torch.full((3, 3), 0.9)), p
    fr.tree_map(lambda x: x.fill_(7.0), held)
    os._exit(0)
_, status = os.waitpid(child, 0)
go.set()
thread.join()
assert torch.equal(held["a"], before["a"])  # A child writes into memory of its own.
print(status)
"""
    assert run(code).strip() == "0"


@both
def test_a_step_while_another_thread_compiles_something_else(donate):
    stopping, tx = Stopping(), fr.adam(0.1)
    step = fr.fuse(tx, donate=donate, backend="eager")
    f = fr.value_and_grad(fr.l1, backend="eager")
    params, state = step.init(square())
    held = fr.tree_map(lambda w: w.requires_grad_(), square())

    def compiles():
        torch.compile(lambda x: x.sin() + 1, backend=stopping)(torch.ones(3))

    def steps():
        assert stopping.begun.wait(LONG)
        try:
            after, _ = check(tx, step, params, square(), state)
            assert (after["a"].data_ptr() == params["a"].data_ptr()) == donate
            assert not any([slope.requires_grad for slope in fr.tree_leaves(f(held)[1])])
        finally:
            stopping.go.set()

    in_threads(compiles, steps)


@both
@compilers
def test_two_trainings_through_one_step_at_the_same_time(donate, backend):
    tx = fr.chain(fr.clip_by_global_norm(2.0), fr.scale_by_adam(), fr.scale(-0.1))
    step = fr.fuse(tx, donate=donate, backend=backend)
    start = threading.Barrier(2)

    def training(k):
        def train():
            params, state = step.init({"w": torch.full((50, 40), float(k)), "b": torch.full((300,), float(k))})
            expected = copy.deepcopy((params, state))
            start.wait(LONG)
            for i in range(60):
                grads = {"w": torch.full((50, 40), float(k + i % 7)), "b": torch.full((300,), -float(k))}
                params, state = step(params, grads, state)
                expected = plain(tx, expected[0], grads, expected[1])
                close((params, state), expected, 1e-4)

        return train

    in_threads(training(1), training(-3))


@both
def test_trainings_of_different_trees_through_one_step_at_the_same_time(donate):
    tx = fr.chain(fr.trace(0.5), fr.scale(-0.1))
    step = fr.fuse(tx, donate=donate, backend="eager")
    forms = [
        {"w": torch.ones(3)},
        [torch.ones(3), torch.ones(3)],
        torch.ones(2, 3),
        {"w": torch.ones(5), "v": torch.ones(())},
    ]
    start = threading.Barrier(len(forms))

    def training(form):
        def train():
            params, state = step.init(form)
            expected = copy.deepcopy((params, state))
            start.wait(LONG)
            for _ in range(300):
                params, state = step(params, form, state)
                expected = plain(tx, expected[0], form, expected[1])
                close((params, state), expected, 1e-4)

        return train

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(*map(training, forms))
    finally:
        sys.setswitchinterval(before)


def test_penalties_of_different_trees_in_threads():
    f = fr.value_and_grad(fr.l1, backend="eager")
    forms = [{"w": torch.ones(3)}, [torch.ones(3), torch.ones(3)], torch.ones(2, 3)]

    def work(form):
        def values():
            for _ in range(300):
                value, slopes = f(form)
                assert value == sum(x.numel() for x in fr.tree_leaves(form))
                close(slopes, form)

        return values

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(*map(work, forms))
    finally:
        sys.setswitchinterval(before)


@compilers
def test_four_steps_compile_at_the_same_time(backend):
    chains = {
        "adam": lambda: fr.adam(0.1),
        "prox": lambda: fr.prox_sgd(0.1, fr.group_lasso, strength=0.1),
        "clipped": lambda: fr.chain(fr.clip_by_global_norm(1.0), fr.lion(0.1)),
        "lamb": lambda: fr.lamb(0.1),
    }

    def first_call(make):
        def call():
            tx = make()
            step = fr.fuse(tx, backend=backend)
            params, state = step.init(square())
            start.wait(LONG)
            for n in range(3):
                params, state = check(tx, step, params, square(n - 1.5), state)

        return call

    start = threading.Barrier(len(chains))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        in_threads(*map(first_call, chains.values()))
    finally:
        sys.setswitchinterval(before)


@cpu_only
@pytest.mark.slow
@pytest.mark.distributed
def test_compilations_of_others_are_left_alone_while_a_step_compiles(tmp_path):
    code = """
import pathlib, sys, threading, types
import torch, torch._inductor.compile_fx, torch._inductor.codegen.cpp, torch._inductor.codecache
from torch._inductor import config, cpu_vec_isa

def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("torch._inductor") and module is not None:
            for key, value in list(vars(module).items()):
                if isinstance(value, (types.FunctionType, type)):
                    found[name, key] = value
                if isinstance(value, type):
                    for inner, method in list(vars(value).items()):
                        if callable(method):
                            found[name, key, inner] = method
    return found

def user(x):
    return (x * 1.2345678).sin() + x.exp().clamp(max=7.654321)

def compiled(x):
    found = torch.compile(user)(x)
    assert torch.allclose(found, user(x), atol=1e-5)

x = torch.linspace(-1, 1, 1000)
if sys.argv[1:] == ["alone"] or WITHOUT:
    compiled(x)
else:
    import funcreg as fr
    mine = threading.get_ident()
    inside, done, known = threading.Event(), threading.Event(), {}

    def during(graph):  # Inductor calls it in the midst of each compilation.
        if threading.get_ident() != mine and not inside.is_set():
            known["during"] = snapshot()
            inside.set()
            done.wait(5)  # The other compilation comes now, or takes its turn.

    before = snapshot()

    def first_call():
        config.post_grad_custom_post_pass = during
        step = fr.fuse(fr.adamw(0.1))
        params, state = step.init({"w": torch.ones(30, 40), "b": torch.ones(40)})
        params, state = step(params, {"w": torch.ones(30, 40), "b": torch.ones(40)}, state)

    thread = threading.Thread(target=first_call)
    thread.start()
    assert inside.wait(100)
    try:
        compiled(x)
    finally:
        done.set()
    thread.join()
    changed = [key for key, value in before.items() if known["during"].get(key) is not value]
    assert not changed, changed
    after = snapshot()
    changed = [key for key, value in before.items() if after.get(key) is not value]
    assert not changed, changed
    assert config.cpp.vec_isa_ok is None
sources = [p.read_text() for p in pathlib.Path(config_dir).rglob("*.cpp")]
(kernel,) = [text for text in sources if "1.2345678" in text]
print(kernel[kernel.index("extern"):])
"""
    code = code.replace("config_dir", "__import__('os').environ['TORCHINDUCTOR_CACHE_DIR']")
    # Kernels are named by their text: another text than before would be a second kernel in the same place.
    place = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    place["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"  # The second process compiles as the first did.
    texts = [run(code.replace("WITHOUT", str(alone)), **place) for alone in (True, False)]
    assert texts[0] == texts[1]
    if "Vectorized" not in texts[0]:
        pytest.skip("this processor has no vectors")


@pytest.mark.skipif(
    not hasattr(torch.compiler, "_compile_session_context"),
    reason="while this torch compiles anything, compiled functions cannot be called in other threads",
)
@pytest.mark.slow
@compilers
def test_others_call_compiled_functions_while_a_step_is_made(backend):
    mine = torch.compile(lambda x: x.sin() + 1, backend="aot_eager")
    x = torch.ones(3)
    mine(x)
    done = threading.Event()

    def steps():
        try:
            for n in range(8):
                step = fr.fuse(fr.chain(fr.scale_by_adam(), fr.scale(-0.1)), backend=backend)
                params, state = step.init({f"w{n}": torch.ones(n + 2), "v": torch.ones(2, 2)})
                step(params, params, state)
        finally:
            done.set()

    def calls():
        while not done.is_set():
            close(mine(x), x.sin() + 1)

    in_threads(steps, calls)


# Memory that results lie in


def leaves_of(tree: Any) -> dict[str, torch.Tensor]:
    return dict(zip(fr.tree_paths(tree), fr.tree_leaves(tree), strict=True))


@cpu_only
@both
def test_leaves_are_saved_at_their_own_size(donate):
    tx = fr.adam(0.1)
    step = fr.fuse(tx, donate=donate, backend="eager")
    params = {"w": torch.ones(1000, 300), "b": torch.ones(10)}
    params, state = step.init(params)
    for n in range(3):
        # Results of steps that do not donate share a storage for the parameters and one for each moment.
        for leaf in (params["b"], state[0].mu["b"], state[0].nu["b"]) if donate or not n else ():
            stored = io.BytesIO()
            torch.save(leaf, stored)
            assert len(stored.getvalue()) < 4000
            assert leaf.untyped_storage().nbytes() == 40
            assert leaf.storage_offset() == 0
        stored = io.BytesIO()
        torch.save((params, state), stored)
        stored.seek(0)
        close(torch.load(stored), (params, state))
        params, state = step(params, copy.deepcopy(params), state)


@cpu_only
@both
def test_safetensors_take_trees_of_steps(donate, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    step = fr.fuse(fr.adam(0.1), donate=donate, backend="eager")
    params, state = step.init({**square(), "none": torch.zeros(0, 3), "one": torch.ones(())})
    for _ in range(3):
        trees = leaves_of({"params": params, "state": state})
        safetensors.save_file(trees, tmp_path / "trees.safetensors")
        close(safetensors.load_file(tmp_path / "trees.safetensors"), trees)
        params, state = step(params, copy.deepcopy(params), state)


@cpu_only
def test_leaves_load_into_modules_and_copy_and_pickle():
    model = torch.nn.Linear(3, 2)
    step = fr.fuse(fr.adam(0.1), backend="eager")
    params, state = step.init(dict(model.named_parameters()))
    params, state = step(params, fr.tree_map(torch.ones_like, params), state)
    model.load_state_dict(params)
    close(dict(model.named_parameters()), params)
    for made in (copy.deepcopy((params, state)), pickle.loads(pickle.dumps((params, state)))):
        close(made, (params, state))


@cpu_only
@pytest.mark.distributed
def test_memory_is_released_when_all_trees_are_gone():
    code = """
import gc, torch, funcreg as fr

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def alive():
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

def train(step, tree, count):
    params, state = step.init(tree)
    for _ in range(count):
        params, state = step(params, tree, state)

n = 1_000_000
step = fr.fuse(fr.adam(0.1), backend="aot_eager")
train(step, {"w": torch.ones(2, 500), "b": torch.ones(1000)}, 3)
before, tensors = resident(), alive()
train(step, {"w": torch.ones(4, n), "b": torch.ones(n)}, 5)
gc.collect()
print(resident() - before, alive() - tensors)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("the system does not say what memory is resident")
    # Without this, temporaries stay with the allocator of the C library.
    grown, tensors = map(int, run(code, MALLOC_MMAP_THRESHOLD_="65536").split())
    assert tensors < 1000
    assert grown < 10_000_000  # Half of one copy of the parameters.


def test_weak_references_to_dropped_results_see_nothing():
    step = fr.fuse(fr.adam(0.1), backend="eager")
    params, state = step.init(square())
    for _ in range(6):
        refs = [weakref.ref(leaf) for leaf in fr.tree_leaves((params, state))]
        params, state = step(params, square(), state)
        assert [ref() for ref in refs] == [None] * len(refs)


def saved_by_autograd(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    factor = torch.ones_like(x, requires_grad=True)
    value = (factor * x).sum()

    def read() -> torch.Tensor:
        factor.grad = None
        value.backward(retain_graph=True)
        assert factor.grad is not None
        return factor.grad

    return read


def through_dlpack(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    capsule = torch.utils.dlpack.to_dlpack(x)
    found: list[torch.Tensor] = []

    def read() -> torch.Tensor:
        if not found:
            found.append(torch.from_dlpack(capsule))
        return found[0]

    return read


def through_numpy(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    array = x.cpu().numpy()  # On the CPU, which these cases are for, without a copy.
    return lambda: torch.from_numpy(array)


def through_storage(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    storage, offset, shape, stride = x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    return lambda: torch.empty(0).set_(storage, offset, shape, stride)


HOLDERS: dict[str, Callable[[torch.Tensor], Callable[[], torch.Tensor]]] = {
    "the tensor": lambda x: lambda: x,
    "a view": lambda x: (lambda view, shape: lambda: view.view(shape))(x.view(-1), x.shape),
    "a detached view": lambda x: (lambda view: lambda: view)(x.detach()),
    "numpy": through_numpy,
    "dlpack": through_dlpack,
    "autograd": saved_by_autograd,
    "storage": through_storage,
}


@cpu_only
@pytest.mark.parametrize(("of", "which"), [("init", "a"), ("results", "c"), ("moments", "a")])
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_what_holds_a_result_keeps_its_numbers(hold, of, which):
    step = fr.fuse(fr.trace(0.9), backend="eager")
    params, state = step.init(square())
    if of != "init":
        for _ in range(3):
            params, state = step(params, square(), state)
    leaf = (state.trace if of == "moments" else params)[which]
    before = leaf.clone()
    read = hold(leaf)
    del leaf
    for _ in range(10):
        params, state = step(params, square(), state)
        assert torch.equal(read(), before)
    del step, params, state
    gc.collect()
    torch.ones(1000).sum()
    assert torch.equal(read(), before)


def test_trees_outlive_their_step():
    step = fr.fuse(fr.adam(0.1), backend="eager")
    params, state = step.init(square())
    trees = [(params, state)]
    for _ in range(3):
        trees.append(step(*[trees[-1][0], square(), trees[-1][1]]))
    before = copy.deepcopy(trees)
    del step, params, state
    gc.collect()
    others = [torch.full((3, 3), 5.0) for _ in range(20)]
    assert_equal(trees, before)
    assert len(others) == 20


def test_all_trees_of_a_run_may_be_kept():
    step = fr.fuse(fr.trace(0.5), backend="eager")
    params, state = step.init(square())
    kept, copies = [], []
    for _ in range(12):
        params, state = step(params, square(), state)
        kept.append((params, state))
        copies.append(copy.deepcopy((params, state)))
    assert_equal(kept, copies)
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in fr.tree_leaves(kept))
    assert all([end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)])


# Undocumented torch, taken away


def _with_inductor(take: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Take something away once Inductor is imported: it would keep what is there in its place for good."""
    return lambda patch: importlib.import_module("torch._inductor.compile_fx") and take(patch)


def missing(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Modules that cannot be imported."""
    return lambda patch: [patch.setitem(sys.modules, name, None) for name in names] and None


def without(module: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A module without one of its attributes."""
    return lambda patch: patch.delattr(f"{module}.{name}")


def changed(module: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A function that takes other arguments."""

    def refuse() -> None:
        """Nothing can be given."""

    return lambda patch: patch.setattr(f"{module}.{name}", refuse)


class Other:
    """Another object than before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Anything may be given."""


class Lacking:
    """The settings of Dynamo without one of them."""

    def __init__(self, name: str) -> None:
        self._name, self._all = name, torch._dynamo.config

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._all, name)


def replaced(module: str, name: str, new: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(f"{module}.{name}", new)


def no_versions(patch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> int:
        raise AttributeError("_version")

    patch.setattr(torch.Tensor, "_version", property(refuse), raising=False)


GUARDS, MODES = "torch._C._dynamo.guards", "torch.utils._python_dispatch"
PROXIES, FUNCTORCH = "torch.fx.experimental.proxy_tensor", "torch._C._functorch"
TAKEN = {
    "no guards": missing("torch._C._dynamo", GUARDS),
    "no TensorGuards": without(GUARDS, "TensorGuards"),
    "other TensorGuards": changed(GUARDS, "TensorGuards"),
    "TensorGuards without a check": replaced(GUARDS, "TensorGuards", Other),
    "no dispatch modes": missing(MODES),
    "no TorchDispatchMode": without(MODES, "TorchDispatchMode"),
    "no stack of dispatch modes": without(MODES, "_push_mode"),
    "no proxies": missing(PROXIES),
    "no make_fx": _with_inductor(without(PROXIES, "make_fx")),
    "another make_fx": _with_inductor(changed(PROXIES, "make_fx")),
    "no lookup_backend": without("torch._dynamo", "lookup_backend"),
    "another lookup_backend": changed("torch._dynamo", "lookup_backend"),
    "no lock of torch.compile": without("torch._dynamo.convert_frame", "compile_lock"),
    "no session of torch.compile": lambda patch: patch.delattr(
        torch.compiler,
        "_compile_session_context",
        raising=False,  # Torch 2.9 has none.
    ),
    "no level": without(FUNCTORCH, "maybe_current_level"),
    "another level": replaced(FUNCTORCH, "maybe_current_level", lambda of: of),
    "no functorch": missing(FUNCTORCH),
    "no switch against compilation": lambda patch: patch.setattr(torch._dynamo, "config", Lacking("disable")),
    "no versions": no_versions,
    "no copy of many tensors": without("torch", "_foreach_copy_"),
}


@pytest.mark.parametrize("name", ["set_code_exec_strategy", "_FrameAction", "_FrameExecStrategy"])
def test_without_what_keeps_the_compiler_from_a_function_it_is_as_it_was(name, monkeypatch):
    without("torch._C._dynamo.eval_frame", name)(monkeypatch)
    f = lambda x: x + 1
    assert undocumented.never_traced(f) is f
    assert f(1) == 2


@pytest.mark.filterwarnings("ignore:this is computed leaf by leaf", "ignore:fuse runs")
@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_without_what_torch_does_not_document_results_are_equal(take, monkeypatch):
    import torch._dynamo  # noqa: F401  # Torch itself imports what is taken away.

    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.trace(0.9), fr.scale(-0.1))
    take(monkeypatch)
    for donate in (False, True):
        step = fr.fuse(tx, donate=donate, backend="aot_eager" if donate else "eager")
        params, state = step.init(square())
        for n in range(3):
            params, state = check(tx, step, params, square(n), state)
    f = fr.value_and_grad(fr.l1, backend="eager")
    for _ in range(2):
        close(f(params), (fr.l1(params), fr.l1.grad(params)))


def test_without_functorch_strengths_of_members_are_not_read_and_results_are_equal(monkeypatch):
    params, strengths = torch.ones(3, 2), torch.tensor([0.5, 2.0, float("inf")])
    values = [vmap(lambda w, alpha: fr.elastic(w, alpha, 0.5))(params, s) for s in (strengths, strengths[[0, 1, 1]])]
    monkeypatch.setattr(undocumented, "functorch", None)
    for s, value in zip((strengths, strengths[[0, 1, 1]]), values, strict=True):
        assert_equal(vmap(lambda w, alpha: fr.elastic(w, alpha, 0.5))(params, s), value)


@pytest.mark.parametrize("take", ["no level", "no functorch"])
def test_without_the_level_of_functorch_steps_inside_vmap_are_plain(take, monkeypatch):
    TAKEN[take](monkeypatch)
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    assert_equal(
        vmap(lambda w: step(w, 2 * w, fr.sgd(0.1).init(w))[0])(torch.ones(3, 2)), torch.full((3, 2), 0.8), 1e-6
    )
    with pytest.raises(ValueError, match="inside vmap or grad"):
        vmap(lambda w: fr.fuse(fr.sgd(0.1), donate=True)(w, 2 * w, fr.sgd(0.1).init(w))[0])(torch.ones(3, 2))


INDUCTOR = {
    "no Inductor of that name": without("torch._inductor", "compile"),
    "another signature": changed("torch._inductor", "compile"),
    "processor checks without a cache": lambda patch: uncached(patch),
    "no make_fx": _with_inductor(without(PROXIES, "make_fx")),
}


def uncached(patch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    known = cpu_vec_isa.valid_vec_isa_list
    patch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: known())


@pytest.mark.slow
@pytest.mark.parametrize("take", INDUCTOR.values(), ids=INDUCTOR)
def test_without_what_inductor_does_not_document_results_are_equal(take, monkeypatch):

    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.scale_by_adam(), fr.scale(-0.1))
    take(monkeypatch)
    step = fr.fuse(tx, donate=True)
    params, state = step.init(square())
    for n in range(3):
        params, state = check(tx, step, params, square(n), state)


def test_nothing_else_of_torch_is_undocumented():
    from pathlib import Path

    private = ("torch._C", "torch._dynamo", "torch._inductor", "torch._subclasses", "torch._functorch", "torch.utils._")
    private += ("_dynamo_marked", "_torchdynamo")
    for path in Path(fr.__file__).parent.rglob("*.py"):
        if path.name != "undocumented.py":
            text = path.read_text()
            assert not [name for name in private if name in text], path.name


def test_what_the_compiler_reads_once_is_marked_as_torch_marks_it():
    def call() -> int:
        return 1

    def other() -> int:
        return 1

    assert vars(undocumented.read_once(call)) == vars(torch.compiler.assume_constant_result(other))


def test_processor_checks_of_others_are_made_as_ever():
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    with undocumented._own_processor_checks():
        cpu_vec_isa.valid_vec_isa_list()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0
    known = cpu_vec_isa.valid_vec_isa_list()
    with undocumented._own_processor_checks():
        assert cpu_vec_isa.valid_vec_isa_list() is known
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 1


# Warnings


@cpu_only
@pytest.mark.slow
@pytest.mark.distributed
def test_steps_compile_where_warnings_are_errors():
    code = """
import torch, funcreg as fr
tx = fr.chain(fr.scale_by_adam(), fr.scale(-0.1))
for backend in ("eager", "aot_eager", "inductor"):  # Each imports more of torch than the one before.
    step = fr.fuse(tx, backend=backend)
    f = fr.value_and_grad(fr.l1, backend=backend)
    params, state = step.init({"a": torch.ones(3, 3), "b": torch.ones(4)})
    for _ in range(2):
        params, state = step(params, {"a": torch.ones(3, 3), "b": torch.ones(4)}, state)
        f(params)
    (plan,) = [plan for plan in step._plans.values()]
    assert plan is not None
    print(backend, round(float(params["a"][0, 0]), 4), sorted(fr.fused.lowering._said))
"""
    assert run(code, "-W", "error") == "eager 0.8 []\naot_eager 0.8 []\ninductor 0.8 []\n"


def training(step, to_none, steps=5):
    """An ordinary loop over a module whose gradients are those of the step."""
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    params, state = step.init(dict(model.named_parameters()))
    grads = step.gradients(params)
    for name, parameter in model.named_parameters():
        parameter.data, parameter.grad = params[name], grads[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            model.zero_grad(set_to_none=to_none)
            model(x).square().sum().backward()
            params, state = step(params, grads, state)
    return [str(each.message) for each in said], model(x).square().sum()


def test_gradients_without_entries_are_not_missed():
    step = fr.fuse(fr.sgd(0.1), backend="eager")
    params, state = step.init({"w": torch.ones(3, device=DEVICE), "e": torch.zeros(0, 2, device=DEVICE)})
    grads = step.gradients(params)
    for n in range(3):
        grads["w"].fill_(n)
        params, state = step(params, {"w": grads["w"], "e": torch.zeros(0, 2, device=DEVICE)}, state)


def test_gradients_that_zero_grad_took_away_are_noticed_once():
    step = fr.fuse(fr.sgd(0.01), donate=True, backend="eager")
    said, _ = training(step, to_none=True)
    assert len(said) == 1
    assert "zero_grad(set_to_none=False)" in said[0]


@pytest.mark.parametrize("make", [lambda: fr.sgd(0.01), lambda: fr.adam(0.01)])
def test_a_right_loop_of_a_module_warns_of_nothing_and_trains(make):
    said, loss = training(fr.fuse(make(), donate=True, backend="eager"), to_none=False, steps=40)
    assert said == []
    start = training(fr.fuse(make(), donate=True, backend="eager"), to_none=False, steps=0)[1]
    assert loss < start


def test_gradients_that_are_zero_are_no_reason_to_warn():
    step = fr.fuse(fr.adam(0.01), donate=True, backend="eager")
    params, state = step.init(square())
    mine = step.gradients(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            fr.tree_map(torch.Tensor.zero_, mine)
            step(params, mine, state)
        for _ in range(4):
            fr.tree_map(lambda g, w: torch.add(w, 1.0, out=g), mine, square())
            step(params, mine, state)


def by_numpy(g, x):
    g.cpu().numpy()[...] = x.cpu().numpy()  # The same memory: it lies there already.


def by_dlpack(g, x):
    torch.from_dlpack(g).copy_(x)


def by_data(g, x):
    g.data.copy_(x)


def by_memory(g, x):
    ctypes.memmove(g.data_ptr(), x.data_ptr(), x.nbytes)


@pytest.mark.parametrize("write", [by_numpy, by_dlpack, by_data, by_memory])
@pytest.mark.parametrize("signs", [False, True])
def test_gradients_that_are_written_past_torch_are_no_reason_to_warn(write, signs):
    step = fr.fuse(fr.sgd(0.01), donate=True, backend="eager")
    params, state = step.init({"a": torch.ones(4, 5, device="cpu"), "b": torch.ones(7, device="cpu")})
    mine = step.gradients(params)
    expected = {name: w.clone() for name, w in params.items()}
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(5):
        for name, g in mine.items():
            x = torch.randn(g.shape, generator=generator, device="cpu")
            write(g, x.sign() if signs else x)
            expected[name] -= 0.01 * (x.sign() if signs else x)
        params, state = step(params, mine, state)  # Warnings are errors.
    assert_equal(params, expected, 1e-6)


def test_gradients_that_stay_what_they_are_are_noticed_at_the_second_such_step_in_a_row():
    step = fr.fuse(fr.sgd(0.01), backend="eager")
    params, state = step.init({"a": torch.ones(3)})
    mine = step.gradients(params)
    for turn in (True, False, True, False, True, False):  # Every other one is new.
        if turn:
            mine["a"].fill_(1.0)
        params, state = step(params, mine, state)
    with pytest.warns(UserWarning, match="nothing was written into the gradients"):
        step(params, mine, state)


# Gradients that are None


SPARED: dict[str, Callable[[], fr.Transform]] = {
    "masked": lambda: fr.chain(
        fr.masked(fr.sgd(0.1), fr.select("a") | fr.select("b")), fr.masked(fr.set_to_zero(), fr.select("c"))
    ),
    "frozen": lambda: fr.chain(fr.adam(0.1), fr.freeze(fr.select("c"))),
    "proximal": lambda: fr.prox_sgd(0.1, fr.l1, mask=~fr.select("c")),
    "labels": lambda: fr.partition({"on": fr.adam(0.1), "off": fr.set_to_zero()}, {"a": "on", "b": "on", "c": "off"}),
    "chain": lambda: fr.chain(fr.masked(fr.trace(0.9), ~fr.select("c")), fr.scale(-0.1), fr.freeze(fr.select("c"))),
}


@both
@pytest.mark.parametrize("make", SPARED.values(), ids=SPARED)
def test_none_stands_for_gradients_of_leaves_that_stay(make, donate):
    tx = make()
    step = fr.fuse(tx, donate=donate, backend="eager")
    params, state = step.init(square())
    given = [{**square(0.5), "c": None}, {**square(0.5), "c": torch.zeros(4)}, {**square(0.5), "c": None}]
    for grads in given:
        expected = plain(tx, params, grads, state)
        params, state = step(params, grads, state)
        close((params, state), expected)
    before = copy.deepcopy((params, state))
    for _ in range(2):
        with pytest.raises(ValueError, match="grads 'b' is None"):
            step(params, {**square(), "b": None}, state)
    assert_equal((params, state), before)


@pytest.mark.parametrize("make", [lambda: fr.adam(0.1), lambda: fr.masked(fr.scale_by_adam(), fr.select("c"))])
def test_none_elsewhere_is_refused_by_the_name_of_its_leaf(make):
    step = fr.fuse(make(), donate=True, backend="eager")
    params, state = step.init(square())
    before = copy.deepcopy((params, state))
    for _ in range(2):
        with pytest.raises(ValueError, match="grads 'c' is None"):
            step(params, {**square(), "c": None}, state)
    assert_equal((params, state), before)


# Copies of steps


@both
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    ("make", "backend"),
    [
        pytest.param(copy.deepcopy, "aot_eager", marks=pytest.mark.slow),
        (copy.deepcopy, "eager"),
        (copy.copy, "eager"),
        (lambda step: pickle.loads(pickle.dumps(step)), "eager"),
    ],
)
def test_copies_of_steps_step_alike(make, backend, used, donate):
    tx = fr.chain(fr.scale_by_adam(b1=0.8), fr.add_decayed_weights(torch.tensor(0.1), mask=fr.matrices), fr.scale(-0.1))
    step = fr.fuse(tx, donate=donate, backend=backend)
    params, state = step.init(square())
    if used:
        params, state = step(params, square(), state)
    other = make(step)
    assert repr(other) == repr(step)
    theirs = copy.deepcopy((params, state))
    for n in range(3):
        theirs = other(theirs[0], square(n), theirs[1])
        params, state = check(tx, step, params, square(n), state)
    close((params, state), theirs)


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_of_compiled_penalties_compute_alike(make):
    f = fr.value_and_grad(fr.elastic, 0.3, 0.6, strength=torch.tensor(2.0), mask=fr.matrices, backend="aot_eager")
    expected = f(square())
    close(make(f)(square()), expected)


def test_steps_print_as_they_were_written():
    tx = fr.chain(fr.scale_by_adam(b1=0.8), fr.scale(-0.1))
    assert repr(fr.fuse(tx)) == "fuse(chain(scale_by_adam(b1=0.8), scale(-0.1)))"
    assert repr(fr.fuse(tx, donate=True)) == "fuse(chain(scale_by_adam(b1=0.8), scale(-0.1)), donate=True)"
    step = fr.fuse(tx, donate=True, backend="eager")
    again = eval(repr(step), vars(fr))
    assert repr(again) == repr(step)
    assert again._compiler.backend == "eager"


# Modes


@both
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["inside first", "outside first"])
def test_autocast_changes_nothing(order, backend, donate):
    tx = fr.chain(fr.add_penalty(fr.orthogonality, strength=0.1), fr.scale_by_adam(), fr.scale(-0.1))
    start = {"a": normal(torch.Generator().manual_seed(0), 5, 4, dtype=torch.float32), "c": torch.ones(4, 4)}
    step = fr.fuse(tx, donate=donate, backend=backend)
    params, state = step.init(start)
    f = fr.value_and_grad(fr.orthogonality, backend=backend)
    for n in range(4):
        expected = plain(tx, params, start, state)
        slopes = fr.orthogonality(start), fr.orthogonality.grad(start)
        with torch.autocast(
            torch.device(DEVICE).type, dtype=torch.bfloat16, enabled=(n % 2 == 0) == (order == "inside first")
        ):
            params, state = step(params, start, state)
            close(f(start), slopes)
        close((params, state), expected)


MODES_OF_TORCH: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "meta": lambda: torch.device("meta"),
}


@both
@pytest.mark.parametrize(
    "order",
    ["inside first", *[pytest.param(name, marks=pytest.mark.slow) for name in ("outside first", "init outside")]],
)
@pytest.mark.parametrize("mode", MODES_OF_TORCH.values(), ids=MODES_OF_TORCH)
def test_modes_of_torch_change_nothing(mode, order, donate):
    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.scale_by_adam(), fr.scale(-0.1))
    # Traced by a compiler inside of the mode, or outside of it.
    step = fr.fuse(tx, donate=donate, backend="eager" if order == "init outside" else "aot_eager")
    start, grads = square(), [square(n + 0.5) for n in range(4)]
    expected = copy.deepcopy(start), tx.init(start)
    if order == "inside first":
        with mode():
            params, state = step.init(start)
    else:
        params, state = step.init(start)
    for n, each in enumerate(grads):
        expected = plain(tx, expected[0], each, expected[1])
        if n % 2 == (order == "outside first"):
            with mode():
                params, state = step(params, each, state)
        else:
            params, state = step(params, each, state)
        close((params, state), expected)


@both
def test_tensors_of_inference_mode_are_stepped_or_refused_as_they_are(donate):
    tx = fr.adam(0.1)
    step = fr.fuse(tx, donate=donate, backend="eager")
    with torch.inference_mode():
        params = square()
        state = tx.init(params)
        expected = plain(tx, params, square(), state)
        before = fr.tree_map(torch.clone, (params, state))
    try:
        close(step(params, square(), state), expected)
    except (ValueError, RuntimeError):
        assert_equal((params, state), before)


def test_a_donating_step_after_a_pure_one_in_inference_mode():
    tx = fr.adam(0.1)
    pure, donating = fr.fuse(tx, backend="eager"), fr.fuse(tx, donate=True, backend="eager")
    params, state = pure.init(square())
    with torch.inference_mode():
        params, state = pure(params, square(), state)
    before = copy.deepcopy((params, state))
    try:
        check(tx, donating, params, square(), state)
    except (ValueError, RuntimeError):
        assert_equal((params, state), before)


@both
def test_the_default_dtype_changes_nothing(donate):
    tx = fr.chain(fr.clip_by_global_norm(1.0), fr.scale_by_adam(), fr.scale(-0.1), fr.soft_threshold(0.01))
    start, grads = square(), square(0.5)
    expected = plain(tx, start, grads, tx.init(start))
    step = fr.fuse(tx, donate=donate, backend="aot_eager")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        params, state = step.init(start)
        close(step(params, grads, state), expected)
        close(fr.value_and_grad(fr.l1, backend="aot_eager")(start), (fr.l1(start), fr.l1.grad(start)))
    finally:
        torch.set_default_dtype(before)


# Inside transformations of functions


@pytest.mark.parametrize("make", [lambda: fr.adam(0.1), lambda: fr.prox_sgd(0.1, fr.l1, strength=0.1)])
def test_pure_steps_inside_transformations_are_the_plain_functions(make):
    tx, step = make(), fr.fuse(make(), backend="eager")
    start = {"a": torch.linspace(-1.0, 2.0, 6).view(2, 3), "b": torch.ones(2)}

    def loss(take):
        def value(params):
            state = tx.init(params)
            for _ in range(2):
                params, state = take(params, fr.tree_map(lambda w: w * w, params), state)
            return sum(w.sum() for w in params.values())

        return value

    plainly = lambda p, g, s: (lambda out: (fr.apply_updates(p, out[0]), out[1]))(tx.update(g, s, p))
    step(*[step.init(start)[0], start, step.init(start)[1]])
    close(grad(loss(step))(start), grad(loss(plainly))(start))
    close(jvp(loss(step), (start,), (start,)), jvp(loss(plainly), (start,), (start,)))
    stacked = fr.tree_map(lambda w: torch.stack([w, 2 * w, -w]), start)
    close(vmap(loss(step))(stacked), vmap(loss(plainly))(stacked))
    close(vmap(grad(loss(step)))(stacked), vmap(grad(loss(plainly)))(stacked))


@pytest.mark.parametrize("transform", [vmap, grad, lambda f: lambda w: jvp(f, (w,), (w,))], ids=["vmap", "grad", "jvp"])
def test_donating_steps_inside_transformations_are_refused(transform):
    step = fr.fuse(fr.sgd(0.1), donate=True, backend="eager")
    params, state = step.init(torch.ones(3))
    params, _ = step(params, torch.ones(3), state)
    for _ in range(2):
        with pytest.raises(ValueError, match="a donating step was called inside vmap or grad"):
            transform(lambda w: step(w, w, state)[0].sum())(params)


@pytest.mark.parametrize("transform", [vmap, grad, lambda f: lambda w: jvp(f, (w,), (w,))], ids=["vmap", "grad", "jvp"])
def test_a_step_begins_inside_transformations(transform):
    tx = fr.adam(0.1)
    step = fr.fuse(tx, backend="eager")

    def trained(init, take):
        def value(w):
            params, state = init({"w": w})
            return (take(params, params, state)[0]["w"] * w).sum()

        return value

    plainly = lambda p, g, s: (fr.apply_updates(p, tx.update(g, s, p)[0]), s)
    expected = transform(trained(lambda p: ({"w": p["w"].detach()}, tx.init(p)), plainly))(torch.ones(3, 2).sum(1) / 2)
    close(transform(trained(step.init, step))(torch.ones(3, 2).sum(1) / 2), expected)


@pytest.mark.parametrize("leaves", [1, 3])
def test_dual_tensors_are_stepped_as_by_the_plain_functions_or_refused(leaves):
    tx = fr.sgd(0.1)
    step = fr.fuse(tx, backend="eager")
    start = {f"w{i}": torch.ones(5) for i in range(leaves)}
    params, state = step.init(start)
    with forward_ad.dual_level():
        grads = {**start, "w0": forward_ad.make_dual(torch.ones(5), torch.full((5,), 2.0))}
        try:
            after, _ = step(params, grads, state)
        except (RuntimeError, NotImplementedError):
            after = None
        if after is not None:
            _, tangent = forward_ad.unpack_dual(after["w0"])
            assert tangent is not None
            close(tangent, torch.full((5,), -0.2))
    check(tx, step, params, start, state)


# Trees of every kind


KINDS = {
    "no entries": {"a": torch.zeros(0), "b": torch.zeros(0, 3), "c": torch.ones(2)},
    "only no entries": {"a": torch.zeros(0), "b": torch.zeros(2, 0)},
    "no dimensions": {"a": torch.tensor(2.0), "b": torch.tensor(-3.0)},
    "one entry": {"a": torch.ones(1), "b": torch.ones(1, 1), "c": torch.tensor(1.0)},
    "one leaf": torch.arange(5.0),
    "one number": torch.tensor(3.0),
    "dtypes": {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.float64), "c": torch.ones(3, dtype=torch.bfloat16)},
    "halves": {"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(2, 2, dtype=torch.bfloat16)},
    "complex": {"a": torch.tensor([1 + 2j, -3j]), "b": torch.ones(2, 2, dtype=torch.complex64), "c": torch.ones(3)},
    "strided": {
        "a": torch.arange(6.0).view(2, 3).T,
        "b": torch.arange(8.0)[::2],
        "c": torch.ones(2, 3, 4).permute(2, 0, 1),
    },
    "channels last": {
        "a": torch.arange(16.0).view(1, 4, 2, 2).to(memory_format=torch.channels_last),
        "b": torch.ones(2),
    },
    "parameters": {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.ones(3)},
    "none among them": {"a": torch.ones(3), "b": None, "c": [None, torch.ones(2)]},
    "nested": [(), {"x": (torch.ones(2), [torch.ones(1)])}, torch.ones(0)],
}
CHAINS: dict[str, Callable[[], fr.Transform]] = {
    "adam": lambda: fr.adam(0.1),
    "clipped": lambda: fr.chain(fr.clip_by_global_norm(1.0), fr.trace(0.9), fr.scale(-0.1)),
    "prox": lambda: fr.prox_sgd(0.1, fr.l1, strength=0.1),
}


WAYS = {
    "donated": (True, True),
    "from init": (False, True),
    "donated as they are": (True, False),
    "as they are": (False, False),
}
#: One chain goes through the tracer of the compilers as well: each kind of tree, each number of kernels.
TAKEN_WAYS = [
    pytest.param(make, *way, "aot_eager" if (name, how) == ("clipped", "donated") else "eager", id=f"{name}-{how}")
    for name, make in CHAINS.items()
    for how, way in WAYS.items()
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "donate", "owned", "backend"), TAKEN_WAYS)
@pytest.mark.parametrize("tree", KINDS.values(), ids=KINDS)
def test_trees_of_every_kind_are_stepped_as_by_the_plain_functions(tree, make, owned, backend, donate):
    tx, tree = make(), copy.deepcopy(tree)
    step = fr.fuse(tx, donate=donate, backend=backend)
    params, state = step.init(tree) if owned else (tree, tx.init(tree))
    if donate and any([leaf.requires_grad for leaf in fr.tree_leaves(params)]):
        with pytest.raises(ValueError, match="requires grad"):
            step(params, fr.tree_map(lambda w: w.detach().clone(), params), state)
        return
    for n in range(2):
        grads = fr.tree_map(lambda w, n=n: (w.detach() * (n - 0.5) + 0.25).to(w.dtype), tree)
        expected = plain(tx, fr.tree_map(torch.Tensor.detach, params), grads, state)
        params, state = step(params, grads, state)
        half = any([leaf.dtype in (torch.float16, torch.bfloat16) for leaf in fr.tree_leaves(params)])
        close((params, state), expected, 2e-2 if half else 1e-5)


# Anything


SHAPES = [(), (0,), (1,), (3,), (17,), (2, 3), (3, 2), (3, 3), (1, 1), (2, 0), (2, 2, 2), (40,)]
BLOCKS: dict[str, Callable[[], fr.Transform]] = {
    "adam": lambda: fr.scale_by_adam(),
    "trace": lambda: fr.trace(0.9),
    "nesterov": lambda: fr.trace(0.5, nesterov=True),
    "decay": lambda: fr.add_decayed_weights(0.1),
    "decay of matrices": lambda: fr.add_decayed_weights(torch.tensor(0.1), mask=fr.matrices),
    "clip": lambda: fr.clip_by_global_norm(1.0),
    "clip entries": lambda: fr.clip(0.5),
    "scale": lambda: fr.scale(0.5),
    "l1": lambda: fr.add_penalty(fr.l1, strength=0.1),
    "rows": lambda: fr.add_penalty(fr.group_lasso, strength=0.1),
    "anchored": lambda: fr.add_penalty(fr.anchored_l2, 0.5, strength=torch.tensor(0.1)),
    "sign": lambda: fr.scale_by_sign(),
    "trust": lambda: fr.scale_by_trust_ratio(),
    "schedule": lambda: fr.scale_by_schedule(lambda count: 1 / (1 + count)),
    "masked": lambda: fr.masked(fr.trace(0.9), lambda params: fr.tree_map(lambda w: w.numel() > 3, params)),
    "meeting": lambda: fr.stateless(_meeting),
    "moved": lambda: fr.Transform(_two_copies, lambda u, s, p: (u, (s[1], fr.tree_map(lambda x: x + 1, s[0])))),
    "frozen": lambda: fr.freeze(lambda params: fr.tree_map(lambda w: w.ndim == 1, params)),
    "rate": lambda: fr.scale_by_learning_rate(torch.tensor(0.1)),
    "threshold": lambda: fr.soft_threshold(0.05),
    "finite": lambda: fr.apply_if_finite(fr.trace(0.9), 2),
}
BLOCKS = {name: make for name, make in BLOCKS.items() if name != "sign" or hasattr(fr, "scale_by_sign")}
BLOCKS = {name: make for name, make in BLOCKS.items() if name != "clip entries" or hasattr(fr, "clip")}


def _two_copies(params: Any) -> Any:
    return fr.tree_map(torch.zeros_like, params), fr.tree_map(torch.ones_like, params)


def _meeting(updates: Any, params: Any) -> Any:
    """Each leaf by the sum of one other."""
    leaves = fr.tree_leaves(updates)
    sums = iter([leaf.sum().real.float() for leaf in leaves[1:] + leaves[:1]])
    return fr.tree_map(lambda u: (u / (1 + next(sums).abs())).to(u.dtype), updates)


@st.composite
def trainings(draw_one: Any) -> Any:
    shapes = draw_one(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    dtypes = draw_one(
        st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=len(shapes), max_size=len(shapes))
    )
    names = draw_one(st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=5))
    backend = draw_one(st.sampled_from(["eager", "eager", "aot_eager"]))
    flags = [draw_one(st.booleans()) for _ in range(4)]
    return shapes, dtypes, names, backend, flags, draw_one(st.integers(0, 1000))


@given(trainings())
@pytest.mark.slow
def test_fused_steps_are_the_plain_ones(training):
    shapes, dtypes, names, backend, (donate, packed, owned, small), seed = training
    generator = torch.Generator().manual_seed(seed)
    tree = lambda: {
        f"w{i}": normal(generator, *shape, dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "in this chain")  # The order of links is drawn.
        tx = fr.chain(*[BLOCKS[name]() for name in names], fr.scale(-0.1))
    try:
        tx.update(tree(), tx.init(tree()), tree())
    except ValueError as error:  # A mask that chooses nothing is one.
        assume("chooses no leaf" not in str(error))
        raise
    with pytest.MonkeyPatch.context() as patch:
        if small:  # Leaves of a dozen entries are large.
            patch.setattr(plans, "SEPARATE", {"cpu": (13, 20)})
        step = fr.fuse(tx, donate=donate, backend=backend)
        start = tree()
        expected = copy.deepcopy(start), tx.init(start)
        params, state = step.init(start)
        if not owned:
            params, state = copy.deepcopy((params, state))
        mine = step.gradients(params) if packed else None
        for _ in range(3):
            grads = tree()
            expected = plain(tx, expected[0], grads, expected[1])
            if mine is not None:
                fr.tree_map(lambda g, x: g.copy_(x), mine, grads)
            before = copy.deepcopy((params, grads, state))
            given = grads if mine is None else mine
            after = step(params, given, state)
            assert_equal(given, before[1])
            if not donate:
                assert_equal((params, state), (before[0], before[2]))
            close(after, expected, 1e-4)
            params, state = after
