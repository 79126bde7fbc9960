"""Looks at many tensors at once: whether they lie where they lay, and who holds them.

A question to a tensor takes Python 50 ns, so that questions would be most of a step on a thousand small tensors. In
`looks.cpp` the same questions take a tenth of that. It is compiled in the background, beside the kernels of a first
step, and kept where Inductor keeps what it compiles; until then, and where it does not compile, Python asks.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import hashlib
import operator
import subprocess
import sys
import sysconfig
import tempfile
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_requires_grad, _gradient = operator.attrgetter("requires_grad"), operator.attrgetter("grad")
_use_count = operator.methodcaller("_use_count")


def addresses(tensors: Sequence[Tensor]) -> array[int]:
    """Where in memory tensors begin."""
    return array("Q", map(Tensor.data_ptr, tensors))


class Looks:
    """What may be asked of lists of tensors, in Python."""

    def same(self, found: Sequence[Any], known: Sequence[Any]) -> bool:
        """Whether two lists hold the same objects."""
        return len(found) == len(known) and all(map(operator.is_, found, known))

    def same_tree(self, found: Any, known: Any) -> list[Any] | None:
        """What a tree has where a known one has an ellipsis, if all else in it is the very same, by depth.

        None if it is not, or if to read the tree is faster than to find out.
        """
        return None

    def moved(self, tensors: list[Tensor], known: array[int], first: int) -> bool:
        """Whether one begins elsewhere than at these addresses, or one of the first ones is not contiguous."""
        return addresses(tensors) != known or not all(map(Tensor.is_contiguous, tensors[:first]))

    def need_gradient(self, tensors: list[Tensor]) -> bool:
        """Whether one requires grad."""
        return any(map(_requires_grad, tensors))

    def begin_inside(self, tensors: list[Tensor], spans: array[int]) -> bool:
        """Whether one begins inside one of some spans of memory, given as begin and end in turn."""
        begin = sorted(addresses(tensors))
        ends = [bisect.bisect_left(begin, end) for end in spans]
        return ends[::2] != ends[1::2]

    def alike(self, tensors: list[Any], known: Likeness) -> bool:
        """Whether tensors differ from others in nothing but their numbers and where they lie."""
        return known.guards(*tensors)

    def held(self, tensors: list[Tensor], known: array[int], first: int) -> tuple[int, int, bool] | None:
        """How many references there are to tensors in Python and in C++, and whether they are spoilt; None if unknown.

        They are if one has moved or requires grad, or if one of the first ones has a gradient. One may count more than
        another does, but always as many more.
        """
        spoilt = self.moved(tensors, known, first) or self.need_gradient(tensors)
        spoilt = spoilt or any([gradient is not None for gradient in map(_gradient, tensors[:first])])
        return sum(map(sys.getrefcount, tensors)), sum(map(_use_count, tensors)), spoilt

    def join(self, tensors: Sequence[Tensor], out: Tensor) -> bool:
        """Copy tensors end to end, if that is faster here than by `torch.cat`; whether it was done."""
        return False


class Likeness:
    """What tensors are like, but for their numbers and where they lie."""

    def __init__(self, tensors: list[Tensor]) -> None:
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        from torch._C._dynamo.guards import TensorGuards

        # Its types say symbolic numbers; plain ones are what it is given everywhere.
        guards: Any = TensorGuards
        self.guards = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        #: The same in numbers of C++, once there is some, and tensors that the guards let through.
        self.numbers: array[int] | None = None


_PYTHON = Looks()
#: Bytes that one thread copies before two would have begun.
_FEW = 1 << 20


class _Cpp(Looks):
    """What may be asked of lists of tensors, in C++."""

    def __init__(self, library: Path) -> None:
        self._code = code = ctypes.PyDLL(str(library))
        objects, memory = ctypes.py_object, ctypes.c_void_p
        for name, types in {
            "same": [objects, objects],
            "same_tree": [objects, objects, objects],
            "moved": [objects, memory, ctypes.c_ssize_t],
            "need_gradient": [objects],
            "begin_inside": [objects, memory, ctypes.c_ssize_t],
            "alike": [objects, memory, ctypes.c_ssize_t],
            "held": [objects, memory, ctypes.c_ssize_t, memory],
            "join": [objects, objects],
        }.items():
            function = getattr(code, name)
            function.argtypes, function.restype = types, ctypes.c_bool
        code.described.argtypes, code.described.restype = [objects, memory, ctypes.c_ssize_t], ctypes.c_ssize_t
        code.begin.argtypes, code.begin.restype = [objects, objects, ctypes.c_ssize_t], None
        code.begin(torch._C.TensorBase, Tensor, _to_impl())

    def same(self, found: Sequence[Any], known: Sequence[Any]) -> bool:
        return self._code.same(found, known)

    def same_tree(self, found: Any, known: Any) -> list[Any] | None:
        others: list[Any] = []
        return others if self._code.same_tree(found, known, others) else None

    def moved(self, tensors: list[Tensor], known: array[int], first: int) -> bool:
        return self._code.moved(tensors, known.buffer_info()[0], first)

    def need_gradient(self, tensors: list[Tensor]) -> bool:
        return self._code.need_gradient(tensors)

    def begin_inside(self, tensors: list[Tensor], spans: array[int]) -> bool:
        return self._code.begin_inside(tensors, *spans.buffer_info())

    def alike(self, tensors: list[Any], known: Likeness) -> bool:
        if known.numbers is not None:
            return self._code.alike(tensors, *known.numbers.buffer_info())
        if not super().alike(tensors, known):
            return False
        count = self._code.described(tensors, 0, 0)
        if count >= 0:
            known.numbers = array("q", bytes(8 * count))
            self._code.described(tensors, *known.numbers.buffer_info())
        return True

    def held(self, tensors: list[Tensor], known: array[int], first: int) -> tuple[int, int, bool] | None:
        found = array("q", [0, 0, 0])
        if not self._code.held(tensors, known.buffer_info()[0], first, found.buffer_info()[0]):
            return None
        return found[0], found[1], bool(found[2])

    def join(self, tensors: Sequence[Tensor], out: Tensor) -> bool:
        return out.nbytes <= _FEW and self._code.join(tensors, out)


def _to_impl() -> int:
    """Bytes from where a tensor begins in Python to its pointer to what it is in C++."""
    tensors = [torch.empty(2), torch.nn.Parameter(torch.empty(2)), torch.empty(3)[1:]]
    word = ctypes.sizeof(ctypes.c_void_p)
    at = lambda x, offset: ctypes.c_void_p.from_address(id(x) + offset).value
    for offset in range(word, 8 * word, word):
        if all([at(x, offset) == x._cdata for x in tensors]):
            return offset
    raise OSError("tensors of this version of torch are of another form")


#: Who may be asked; the last one is the fastest.
_found: list[Looks] = [_PYTHON]


def look() -> Looks:
    """Who is asked now."""
    return _found[-1]


@functools.cache
def prepare() -> threading.Thread | None:
    """Begin to compile the questions, unless that was done; the thread in which they are, if it takes time.

    Where they do not compile, Python goes on to ask.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        compiler, folder = get_cpp_compiler(), Path(cache_dir()) / "funcreg"
        source, root = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
        text = source.read_text()
    except (ImportError, OSError, RuntimeError):  # Another version of torch, no place for what is made, no compiler.
        return None
    command = [compiler, "-std=c++20", "-O2", "-DNDEBUG", "-shared", "-fPIC"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{sysconfig.get_path('include')}", f"-I{root / 'include'}", str(source)]
    command += [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10"]
    command += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    made_for = [text, *command, torch.version.git_version, str(sysconfig.get_config_var("SOABI"))]
    library = folder / f"looks-{hashlib.sha256(repr(made_for).encode()).hexdigest()[:32]}.so"
    if library.exists():
        _load(library)
        return None
    thread = threading.Thread(target=_compile, args=(command, library), daemon=True)
    thread.start()
    return thread


def _compile(command: list[str], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
            made.replace(library)  # All at once: another process may be waiting for it.
    except (OSError, subprocess.SubprocessError):  # A compiler that cannot, or a folder that is read only.
        return
    _load(library)


def _load(library: Path) -> None:
    try:
        _found.append(_Cpp(library))
    except OSError:  # Of another machine, or a version of torch whose tensors are of another form.
        return
