"""Arrays, lists and data sets are taken as tensors; what does not fit together is named, with a remedy."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from cases import DEVICE
from sklearn.datasets import load_diabetes
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Subset, TensorDataset

import funcreg as fr


def squares(w, x, y):
    return (x @ w - y).square().mean() / 2


def arrays(dtype=np.float64):
    x, y = load_diabetes(return_X_y=True)
    return (x * len(x) ** 0.5).astype(dtype), ((y - y.mean()) / 50).astype(dtype)


def start(dtype=torch.float64):
    return torch.zeros(10, dtype=dtype, device=DEVICE)


def tensors(dtype=torch.float64):
    return tuple(torch.tensor(a, dtype=dtype, device=DEVICE) for a in arrays())


class Frame:
    """What pandas gives: an array that nobody may write into."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        array = self._array.copy()
        array.flags.writeable = False
        return array


STRENGTHS = [0.5, 0.1]
CALLS = {
    "minimize": lambda w, data: fr.minimize(squares, w, fr.l1, strength=0.1, args=data).params,
    "path": lambda w, data: fr.regularization_path(squares, w, fr.l1, strengths=STRENGTHS, args=data).params,
    "choice": lambda w, data: fr.cross_validate(squares, w, fr.l1, data=data, strengths=STRENGTHS, folds=3).scores,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("wrapped", [np.asarray, Frame, lambda a: a[::-1][::-1], lambda a: a.astype(">f8")],
                         ids=["numpy", "frame", "view", "big-endian"])  # fmt: skip
def test_arrays_are_what_their_tensors_are(call, wrapped):
    x, y = arrays()
    assert torch.equal(call(start(), (wrapped(x), wrapped(y))), call(start(), tensors()))


@every_call
@pytest.mark.parametrize(("of", "dtype"), [(np.float64, torch.float32), (np.float32, torch.float64)])
def test_arrays_have_the_dtype_of_the_parameters(call, of, dtype):
    found = call(start(dtype), arrays(of))
    assert found.dtype == dtype
    torch.testing.assert_close(found, call(start(dtype), tensors(dtype)), rtol=1e-4, atol=1e-5)


def test_backward_strides_do_not_matter():
    x, y = arrays()
    found = CALLS["minimize"](start(), (x[::-1], y[::-1]))
    torch.testing.assert_close(found, CALLS["minimize"](start(), tensors()), rtol=0, atol=1e-8)


def test_classes_of_numpy_stay_whole_numbers():
    x, y = arrays()
    loss = lambda p, x, y: torch.nn.functional.cross_entropy(x @ p, y)
    params = torch.zeros(10, 2, dtype=torch.float64, device=DEVICE)
    assert fr.minimize(loss, params, fr.l1, strength=0.1, args=(x, (y > 0).astype(np.int64))).converged


def test_lists_of_numbers_are_data():
    x, y = arrays()
    found = fr.cross_validate(squares, start(), fr.l1, data=(x.tolist(), y.tolist()), strengths=STRENGTHS)
    expected = fr.cross_validate(squares, start(), fr.l1, data=tensors(), strengths=STRENGTHS)
    assert torch.equal(found.scores, expected.scores)
    result = fr.sweep({"w": start()}, lambda p, x, y: squares(p["w"], x, y), fr.sgd, {"learning_rate": [0.1, 0.2]},
                      (x.tolist(), y.tolist()), epochs=1)  # fmt: skip
    assert result.member()["w"].dtype == torch.float64


def test_sets_of_tensors_are_data():
    data = TensorDataset(*tensors())
    part = Subset(data, range(100, 300))
    choose = lambda data: fr.cross_validate(squares, start(), fr.l1, data=data, strengths=STRENGTHS).scores
    assert torch.equal(choose(data), choose(tensors()))
    assert torch.equal(choose(part), choose(tuple(t[100:300] for t in tensors())))


def test_flags_and_numbers_in_args_stay():
    def loss(w, x, kind, share):
        assert kind == "mean" or isinstance(kind, np.str_)
        return share * (x * w - 1).square().sum()

    assert fr.minimize(loss, start(), fr.l1, args=(2.0, np.str_("mean"), np.float64(0.5))).converged


def test_nothing_is_said_of_arrays_that_nobody_may_write_into():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS["minimize"](start(), tuple(map(Frame, arrays())))


# What does not fit


def held(x, y):
    return lambda w: (x @ w - y).square().mean()


single = start(torch.float32)
WRONG = {
    "dtypes": (
        lambda: fr.minimize(squares, single, fr.l1, args=tensors()),
        r"float32: params; .*float64: args at '0', args at '1'.*x.double\(\)",
    ),
    "dtypes of a path": (lambda: fr.regularization_path(squares, single, fr.l1, args=tensors()), "float32: params"),
    "dtypes of a choice": (lambda: fr.cross_validate(squares, single, fr.l1, data=tensors()), "float32: params"),
    "whole numbers": (
        lambda: fr.minimize(squares, single, fr.l1, args=(torch.ones(4, 10, dtype=torch.int64), torch.ones(4))),
        "int64: args at '0'.*whole numbers",
    ),
    "a loss that holds arrays": (lambda: fr.minimize(held(*arrays()), start(), fr.l1), "It holds 'x', 'y', no tensor"),
    "a loss that holds tensors": (lambda: fr.minimize(held(*tensors()), single, fr.l1), "'x', held by the loss"),
    "a partial loss": (
        lambda: fr.minimize(functools.partial(squares, x=tensors()[0], y=tensors()[1]), single, fr.l1),
        "'x', held by the loss",
    ),
    "lists in args": (
        lambda: fr.minimize(squares, start(), fr.l1, args=([[1.0] * 10], [1.0])),
        "There are lists: args at '0'",
    ),
    "texts": (
        lambda: fr.minimize(squares, start(), fr.l1, args=(np.array([["a"]]), np.ones(1))),
        "args at '0' is a ndarray of <U1",
    ),
    "objects": (
        lambda: fr.cross_validate(squares, start(), fr.l1, data=(np.array([[None]]), np.ones(1))),
        "data at '0' is a ndarray of object",
    ),
    "numbers beside bools": (
        lambda: fr.cross_validate(squares, start(), fr.l1, data=(np.array([[1.5, True]], dtype=object), np.ones(1))),
        r"of numbers beside bools becomes one by astype\(float\)",
    ),
    "too few args": (
        lambda: fr.minimize(squares, start(), fr.l1),
        r"the loss is squares\(w, x, y\).*missing a required argument: 'x'",
    ),
    "too many args": (
        lambda: fr.cross_validate(lambda w: w.sum(), start(), fr.l1, data=tensors()),
        "params and 2 more",
    ),
    "no function": (lambda: fr.minimize(torch.nn.MSELoss, start(), fr.l1), "expected a function of the parameters"),
    "a module for a loss": (
        lambda: fr.minimize(torch.nn.Linear(10, 1), start(), fr.l1, args=tensors()),
        r"failed: TypeError.*Linear takes inputs, and no parameters; expected .*functional_call\(model, params",
    ),
    "a loss of torch": (
        lambda: fr.regularization_path(mse_loss, {"w": start()}, fr.l1, args=tensors()[:1]),
        "mse_loss takes inputs, and no parameters",
    ),
    "params of numpy": (lambda: fr.minimize(squares, np.zeros(10), fr.l1, args=tensors()), r"torch.as_tensor"),
    "a loader": (
        lambda: fr.cross_validate(squares, start(), fr.l1, data=DataLoader(TensorDataset(*tensors()))),
        "loader.dataset",
    ),
    "one tensor": (lambda: fr.cross_validate(squares, start(), fr.l1, data=tensors()[0]), r"write \(x,\)"),
    "a number in data": (
        lambda: fr.cross_validate(lambda w, x, y, c: 0, start(), fr.l1, data=(*tensors(), 0.5)),
        "0.5 at '2'.*belongs in the loss",
    ),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(call, said):
    with pytest.raises(TypeError, match=said):
        call()


def test_unequal_rows_are_named():
    x, y = tensors()
    with pytest.raises(ValueError, match="442 at '0', 5 at '1'"):
        fr.cross_validate(squares, start(), fr.l1, data=(x, y[:5]))
    with pytest.raises(ValueError, match="different lengths"):
        fr.cross_validate(squares, start(), fr.l1, data=([[1.0], [1.0, 2.0]], [0.0, 1.0]))


@pytest.mark.parametrize("call", [
    lambda w, x, y: fr.minimize(squares, w, fr.l1, args=(x[:, :4], y)),
    lambda w, x, y: fr.minimize(lambda w, x, y: mse_loss(x @ w["v"], y), {"w": w}, fr.l1, args=(x, y)),
])  # fmt: skip
def test_what_has_another_cause_is_left_as_it_is(call):
    with pytest.raises((RuntimeError, KeyError)) as caught:
        call(start(), *tensors())
    assert "the loss failed" not in str(caught.value)
