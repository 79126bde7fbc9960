"""What users have, arrays, lists and data sets, as tensors; and what to say where tensors do not fit together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from funcreg.core._typing import Params
from funcreg.core.masks import listed
from funcreg.core.tree import dotted, leaf_paths, map_with_path, tree_leaves, tree_map, tree_paths
from funcreg.core.undocumented import is_batched, is_transformed
from funcreg.core.wording import type_of

#: What torch raises of matrices that are singular or not positive definite.
LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]  # It is documented, but not listed.

# Arrays


def is_array(x: Any) -> bool:
    """Whether this is an array of numpy, pandas, jax ... and no tensor."""
    return hasattr(x, "__array__") and not isinstance(x, (Tensor, type))


def is_sparse_matrix(x: Any) -> bool:
    """Whether this is a sparse matrix of scipy."""
    return hasattr(x, "tocoo") and not isinstance(x, (Tensor, type))


def as_tensors(tree: Any, name: str, params: Params) -> Any:
    """A tree whose arrays are tensors: beside the parameters and, of floating point, in their dtype.

    An array has the dtype of the library that made it, a tensor that which its user chose: it stays as it is. Sparse
    rows (CSR), through which torch does not differentiate, become sparse coordinates, as do sparse matrices of scipy.

    Args:
        tree: Tree of arrays, tensors and whatever else.
        name: What errors call it.
        params: Parameters, for dtype and device.

    Raises:
        TypeError: An array holds no numbers.
    """
    in_rows = lambda x: isinstance(x, Tensor) and x.layout is torch.sparse_csr
    if not any([is_array(x) or is_sparse_matrix(x) or in_rows(x) for x in tree_leaves(tree)]):
        return tree
    tree = tree_map(lambda x: _coordinates(x, params) if is_sparse_matrix(x) else x, tree)
    made = map_with_path(lambda path, x: _tensor(x, at(name, path), params) if is_array(x) else x, tree)
    try:
        return tree_map(lambda x: x.to_sparse() if in_rows(x) else x, made)
    except RuntimeError as error:
        raise TypeError(f"{name} holds sparse rows (CSR), which torch.func cannot read; give x.to_sparse()") from error


def _coordinates(x: Any, params: Params) -> Tensor:
    """A sparse matrix of scipy as a tensor of coordinates."""
    rows = x.tocsr(copy=True)
    rows.sum_duplicates()  # And sorts them. Inside of torch.func torch cannot, nor read what it would check.
    found = rows.tocoo()
    places = torch.stack([torch.as_tensor(at).long() for at in (found.row, found.col)])
    entries, shape = _beside(torch.as_tensor(found.data), params), tuple(found.shape)
    places = places.to(entries.device)
    return torch.sparse_coo_tensor(places, entries, shape, check_invariants=not is_transformed(), is_coalesced=True)


def at(name: str, path: tuple[Any, ...]) -> str:
    return f"{name} at '{dotted(path)}'" if path else name


def _tensor(x: Any, name: str, params: Params) -> Any:
    array = x.__array__()
    if array.dtype.kind not in "biufc":
        if not array.shape:
            return x  # A text or a date, which a loss may take for an option.
        raise TypeError(
            f"{name} is {type_of(x)} of {array.dtype}; expected numbers. Encode texts, dates and categories, "
            "and fill in what is missing, first; a frame of numbers beside bools becomes one by astype(float)."
        )
    # Torch warns of arrays that it may not write into, and refuses those that are stored backwards.
    borrowed = array.flags.writeable and array.dtype.isnative and all([stride >= 0 for stride in array.strides])
    try:
        return _beside(torch.as_tensor(array if borrowed else array.astype(array.dtype.newbyteorder("="))), params)
    except TypeError as error:
        raise TypeError(f"{name} is {type_of(x)} of {array.dtype}, which torch does not have") from error


def _beside(x: Tensor, params: Params) -> Tensor:
    dtypes = [w.dtype for w in tree_leaves(params)]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes and x.is_floating_point() else x.dtype
    return x.to(tree_leaves(params)[0].device if dtypes else x.device, dtype)


# Data


def as_data(data: Any, params: Params, name: str = "data") -> tuple[Any, ...]:
    """Data as a tuple of trees of tensors with one row an example.

    Args:
        data: Tuple or list of tensors, arrays, lists of numbers, or trees of them; a `TensorDataset`, or a part of one.
        params: Parameters, for the dtype and device of what is no tensor.
        name: What errors call it.

    Raises:
        TypeError: There is something else.
        ValueError: The numbers of rows differ.
    """
    if isinstance(data, torch.utils.data.Subset):
        rows = torch.as_tensor(data.indices, device="cpu")
        return tree_map(lambda x: x[rows.to(x.device)], as_data(data.dataset, params, name))
    if isinstance(data, torch.utils.data.TensorDataset):
        data = data.tensors
    if not isinstance(data, (tuple, list)) or not data:
        raise TypeError(f"{name} is {type_of(data)}; expected a tuple of tensors, (inputs, *targets).{_hint(data)}")
    parts = [_of_numbers(x, at(name, (k,)), params) for k, x in enumerate(data)]
    tensors = as_tensors(tuple(parts), name, params)
    sparse = [place for place, x in zip(tree_paths(tensors), tree_leaves(tensors), strict=True) if _is_sparse(x)]
    if sparse:
        raise TypeError(
            f"{name} is sparse at '{sparse[0]}', of which torch takes no rows for folds and batches; expected dense "
            "tensors, x.to_dense() or x.toarray()."
        )
    counts: dict[str, int] = {}
    for place, x in zip(tree_paths(tensors), tree_leaves(tensors), strict=True):
        if not isinstance(x, Tensor) or not x.ndim:
            raise TypeError(
                f"{name} has {_brief(x)} at '{place}'; expected a tensor with one row an example. What is the same for "
                "all belongs in the loss."
            )
        counts[place] = len(x)
    if len(set(counts.values())) > 1:
        came = ", ".join(f"{count} at '{place}'" for place, count in counts.items())
        raise ValueError(f"{name} have different numbers of rows: {came}")
    return tensors


def _is_sparse(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is not torch.strided


def _hint(data: Any) -> str:
    if isinstance(data, torch.utils.data.DataLoader):
        return " A call makes its own batches: give it the tensors that the loader reads, or loader.dataset."
    if isinstance(data, Tensor) or is_array(data):
        return " Of one tensor, write (x,)."
    return " Collect a dataset into tensors, one row an example." if hasattr(data, "__getitem__") else ""


def _of_numbers(x: Any, name: str, params: Params) -> Any:
    """A list of numbers, or of lists of them, as a tensor; other lists are trees."""
    if type(x) not in (list, tuple) or not x:
        return x
    kinds = {type(leaf) for leaf in tree_leaves(x)}
    if not kinds or not kinds <= {int, float, bool}:
        return x
    try:
        dtype = torch.float64 if float in kinds else torch.int64 if int in kinds else torch.bool
        return _beside(torch.tensor(x, dtype=dtype, device="cpu"), params)
    except ValueError as error:
        raise ValueError(
            f"{name} is a list whose rows have different lengths; expected as many numbers in each"
        ) from error


def _brief(x: Any) -> str:
    if isinstance(x, Tensor):
        return "a tensor without dimensions"
    return repr(x) if isinstance(x, (int, float, str, bool)) else type_of(x)


# What does not fit together


def explained(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of parameters, and whatever else, whose errors say which tensors have other dtypes or devices.

    Raises:
        TypeError: It is no function.
    """
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(f"loss is {loss!r}; expected a function of the parameters, and of args, to a scalar")

    def call(params: Params, *args: Any) -> Any:
        try:
            return loss(params, *args)
        except LinAlgError as error:
            raise outside(error) from error
        except (RuntimeError, TypeError, AttributeError) as error:
            followed = _held_and_followed(error, loss)
            if followed:
                raise TypeError(followed) from error
            cause = _under_vmap(error) or misfit(error, {"params": params, "args": args}, loss)
            cause = cause or _of_inputs(error, loss)
            if not cause:
                raise
            raise TypeError(f"the loss failed: {first_line(error)}. {cause}") from error

    return call


def outside(error: RuntimeError) -> RuntimeError:
    """What is said of a loss, or its gradient, that fails where a matrix is singular or not positive definite."""
    said = str(error)
    if said.startswith("the loss failed"):
        return error
    return LinAlgError(
        f"the loss failed: {first_line(error)}. Has it no value at params? Expected params at which it is finite and "
        "smooth: logdet(w) and cholesky(w) are not at matrices of zeros."
    )


def _held_and_followed(error: Exception, loss: Any) -> str:
    """Why a function fails that holds what a transform around all of this follows, if that is the cause."""
    if "INTERNAL ASSERT" not in str(error) and "escaped" not in str(error):  # As torch says it.
        return ""
    names = [f"'{name}'" for name, x in _held(loss) if isinstance(x, Tensor) and is_batched(x)]
    what = f"the loss holds {listed(names)}, which" if names else "the loss holds what"
    return (
        f"{what} vmap, or a derivative of torch.func, follows: what it holds is a constant to the solver. Let it take "
        "that after params, and give it in args=(...)."
    )


def _of_inputs(error: Exception, loss: Any) -> str:
    """Why a module, or a loss of torch, fails that was given for a loss of parameters, if that is the cause."""
    name = getattr(loss, "__name__", type(loss).__name__)
    known = isinstance(loss, torch.nn.Module) or str(getattr(loss, "__module__", "")).startswith("torch.nn")
    if not known or not isinstance(error, (TypeError, AttributeError)):
        return ""
    return (
        f"{name} takes inputs, and no parameters; expected a function of the parameters, as lambda params, x, y: "
        "F.mse_loss(functional_call(model, params, (x,)), y)."
    )


def _under_vmap(error: Exception) -> str:
    """Why a function cannot be mapped, if that is the cause."""
    said = str(error)
    if "random" in said and "vmap" in said:
        return RANDOM
    return f"It runs under vmap, for several members or directions at once. {NO_NUMBERS}" if "vmap" in said else ""


#: Why a loss that is another one at each call has no minimum.
RANDOM = (
    "It draws random numbers, as dropout does, and so has another minimum at each call. Put the module into "
    "eval(), or draw once, before."
)
#: What no function does that vmap maps.
NO_NUMBERS = (
    "There no number can be read from a tensor, as x.item(), float(x) and `if x > 0` do (torch.where chooses), and "
    "nothing can be written into a tensor that members share."
)


def check_names(call: str, options: dict[str, Any], elsewhere: dict[str, str]) -> None:
    """Raise a TypeError for a keyword that another function takes, and say what it is called here."""
    for theirs, ours in elsewhere.items():
        if theirs in options:
            raise TypeError(f"{call} got {theirs}=; {ours}")


def check_call(loss: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise a TypeError if a loss cannot be called with the parameters and these arguments."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # Some functions that are not written in Python have none.
        return
    try:
        signature.bind({}, *args)
    except TypeError as error:
        raise TypeError(
            f"the loss is {getattr(loss, '__name__', 'loss')}{signature}, and was to be called with params and "
            f"{len(args)} more: {error}. What it takes after params comes as a tuple, in this order."
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, without what follows in further lines."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0].rstrip('.')}"


#: A tensor with the name of its tree, and its path there.
_Named = tuple[str, tuple[Any, ...], Any]
_HELD = "held by the loss"


def misfit(error: Exception, trees: dict[str, Any], function: Any = None) -> str:
    """Why a function failed, where it is because of what is no tensor, or of another dtype or device; else empty.

    Args:
        error: What it raised.
        trees: What it was given, by name.
        function: It, for what it holds without getting it; None if that is not to blame.
    """
    said = str(error).lower()
    held = [(_HELD, (name,), x) for name, value in _held(function) for x in _of_held(value)]
    given = [(name, path, x) for name, tree in trees.items() for path, x in _leaves(tree)] + held
    arrays = [f"'{path[0]}'" for name, path, x in held if is_array(x)]
    if arrays and ("numpy" in said or "array" in said or "storage" in said):
        return (
            f"It holds {listed(arrays)}, no tensor: expected what torch.as_tensor makes of it. In args, arrays are "
            "converted."
        )
    others = list(dict.fromkeys(at(name, path[:1]) for name, path, x in given if _is_list(x, path)))
    if others and type(error) is TypeError:
        return f"There are lists: {listed(others)}; expected tensors, as torch.as_tensor makes of them."
    tensors = [each for each in given if isinstance(each[2], Tensor)]
    if "device" in said and len(devices := _grouped(tensors, lambda x: x.device)) > 1:
        return f"{_said(devices)}. Expected tensors on one device; x.to(device) moves them."
    return _of_dtypes(said, tensors) if "type" in said else ""


def _of_dtypes(said: str, tensors: list[_Named]) -> str:
    # Numbers without dimensions take part in any arithmetic.
    dtypes = _grouped([each for each in tensors if each[2].ndim], lambda x: x.dtype)
    floats = {dtype: names for dtype, names in dtypes.items() if dtype.is_floating_point}
    if "output type long" in said:
        return f"{_said(dtypes)}. Such targets are numbers of floating point, not classes: y.float() makes them."
    if "type long" in said or "be long" in said:  # Texts of several versions of torch.
        return f"{_said(dtypes)}. Classes are whole numbers, of int64: y.long() makes them."
    if len(floats) > 1:
        return (
            f"{_said(floats)}. Expected one dtype, as x.float() or x.double() makes; in float64, parameters and all, "
            "solutions have more digits."
        )
    if floats and len(dtypes) > 1:
        return f"{_said(dtypes)}. Matrix products take no whole numbers: x.float() or x.double() converts them."
    return ""


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return list(zip(leaf_paths(tree), tree_leaves(tree), strict=True))


def _is_list(x: Any, path: tuple[Any, ...]) -> bool:
    return isinstance(x, (int, float)) and len(path) > 1 and isinstance(path[-1], int)


def _held(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function uses by name without getting it."""
    while isinstance(function, functools.partial):
        yield from ((f"argument {k}", x) for k, x in enumerate(function.args))
        yield from function.keywords.items()
        function = function.func
    try:
        found = inspect.getclosurevars(function)
    except (TypeError, ValueError):  # Not a function of Python, or one that is not yet complete.
        return
    yield from found.nonlocals.items()
    yield from found.globals.items()


def _of_held(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        return [*value.parameters()][:1]
    return [value] if isinstance(value, Tensor) or is_array(value) else []


def _grouped(tensors: list[_Named], key: Callable[[Tensor], Any]) -> dict[Any, list[str]]:
    """From dtypes or devices to the names of the tensors that have them."""
    found: dict[Any, list[str]] = {}
    for name, path, x in tensors:
        found.setdefault(key(x), []).append(f"'{path[0]}', {_HELD}" if name == _HELD else at(name, path))
    return found


def _said(groups: dict[Any, list[str]]) -> str:
    """Kinds and names, the rarest kind first."""
    rows = sorted(groups.items(), key=lambda row: len(row[1]))
    return "; ".join(f"{kind}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for kind, names in rows)
