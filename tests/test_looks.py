"""What is asked of many tensors at once is answered in C++ as it is in Python."""

from __future__ import annotations

import operator
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from funcreg import looks
from funcreg.looks import Likeness, Looks, addresses

WHOLE = torch.arange(12.0).view(3, 4)


class Marked(torch.Tensor):
    """A tensor of another type."""


def with_gradient() -> torch.Tensor:
    w = torch.ones(3, requires_grad=True)
    w.sum().backward()
    return w


#: What makes a tensor each.
TENSORS = {
    "vector": lambda: torch.ones(3),
    "whole": lambda: WHOLE,
    "row": lambda: WHOLE[1],
    "column": lambda: WHOLE[:, 1],
    "transposed": lambda: WHOLE.t(),
    "of one row": lambda: WHOLE[:1].t(),
    "beyond": lambda: torch.ones(13)[12:],
    "number": lambda: torch.tensor(2.0),
    "empty": lambda: torch.empty(0, 3),
    "empty part": lambda: WHOLE[3:],
    "float64": lambda: torch.ones(3, dtype=torch.float64),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "bool": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "leaf": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "with a gradient": with_gradient,
    "with a past": lambda: torch.ones(3, requires_grad=True) * 2,
    "gradient of none": lambda: with_gradient().detach(),
    "other type": lambda: torch.ones(3).as_subclass(Marked),
    "meta": lambda: torch.ones(3, device="meta"),
    "expanded": lambda: torch.ones(1).expand(3),
}
each = pytest.mark.parametrize("name", TENSORS)


python = Looks()
SPAN = addresses([WHOLE.view(-1)[2:3], WHOLE.view(-1)[8:9]])


@each
@pytest.mark.parametrize("first", [0, 1, 3])
def test_tensors_that_moved_are_those_of_python(name, first, cpp):
    tensors = [torch.ones(2), TENSORS[name](), torch.ones(3)]
    known = addresses(tensors)
    other = [tensors[0], torch.ones(2), tensors[2]]
    assert cpp.moved(tensors, known, first) == python.moved(tensors, known, first)
    assert cpp.moved(other, known, first)
    spoilt = lambda by, tensors: by.held(tensors, known, first)[2]
    assert spoilt(cpp, tensors) == spoilt(python, tensors)
    assert spoilt(cpp, other)


@each
def test_tensors_that_need_a_gradient_or_begin_in_memory_are_those_of_python(name, cpp):
    tensors = [torch.ones(2), TENSORS[name]()]
    assert cpp.need_gradient(tensors) == python.need_gradient(tensors)
    assert cpp.begin_inside(tensors, SPAN) == python.begin_inside(tensors, SPAN)


def test_spans_end_before_their_end(cpp):
    for i, inside in enumerate([False, False, *[True] * 6, False]):
        for by in (python, cpp):
            assert by.begin_inside([WHOLE.view(-1)[i : i + 1]], SPAN) == inside


@each
def test_tensors_are_alike_as_in_python(name, cpp):
    likeness = Likeness([torch.ones(2), TENSORS[name]()])
    assert cpp.alike([torch.zeros(2), TENSORS[name]()], likeness)  # From now on it is known in numbers.
    assert likeness.numbers is not None
    for other in TENSORS.values():
        found = [torch.zeros(2), other()]
        assert cpp.alike(found, likeness) == python.alike(found, likeness)
        assert not cpp.alike(found[:1], likeness)
        assert not cpp.alike([*found, torch.zeros(2)], likeness)


def references(by, tensors):
    return by.held(tensors, addresses(tensors), 0)[:2]


@each
def test_who_holds_a_tensor_is_counted_as_in_python(name, cpp):
    tensors = [TENSORS[name](), torch.ones(2)]
    before = [references(by, tensors) for by in (python, cpp)]
    names = [tensors[0], tensors[0], tensors[1]]
    after = [references(by, tensors) for by in (python, cpp)]
    growth = [tuple(map(operator.sub, b, a)) for a, b in zip(before, after, strict=True)]
    assert growth[0] == growth[1]
    assert growth[0][0] == len(names)


def test_what_autograd_holds_is_counted_as_in_python(cpp):
    w, x = torch.ones(2), torch.ones(2, requires_grad=True)
    before = [references(by, [w]) for by in (python, cpp)]
    y = w * x  # Which keeps w for its derivative.
    after = [references(by, [w]) for by in (python, cpp)]
    growth = [tuple(map(operator.sub, b, a)) for a, b in zip(before, after, strict=True)]
    assert y.requires_grad
    assert growth[0] == growth[1] != (0, 0)


@each
def test_tensors_are_joined_as_by_cat_or_not_at_all(name, cpp):
    tensors = [TENSORS[name](), torch.ones(2, dtype=TENSORS[name]().dtype), TENSORS[name]()]
    expected = torch.cat([x.cpu().reshape(-1) if x.device.type == "cpu" else torch.ones(3) for x in tensors])
    out = torch.full_like(expected.detach(), 7)
    fits = tensors[0].is_contiguous() and not tensors[0].is_conj() and not tensors[0].is_neg()
    assert cpp.join(tensors, out) == (fits and tensors[0].device.type == "cpu")
    if cpp.join(tensors, out):
        torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "out", [torch.empty(4), torch.empty(6), torch.empty(5, dtype=torch.float64), torch.empty(10)[::2]]
)
def test_tensors_are_not_joined_where_they_do_not_fit(out, cpp):
    assert not cpp.join([torch.ones(2), torch.ones(3)], out)


def test_lists_are_the_same_if_their_objects_are(cpp):
    a, b = object(), 1000.0
    for by in (python, cpp):
        assert by.same([a, b], [a, b])
        assert by.same((a, b), [a, b])
        assert not by.same([a, b], [b, a])
        assert not by.same([a], [a, b])
        assert not by.same([b], [float("1000")])


class Pair(NamedTuple):
    a: object
    b: object


ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)


def test_a_tree_is_the_same_if_its_leaves_are_and_gives_others(cpp):
    known = {"w": ONE, "deep": {"x": (..., [TWO])}, "none": None, "pair": Pair(..., {}), "end": ...}
    like = lambda a, b, c: {"w": ONE, "deep": {"x": (a, [TWO])}, "none": None, "pair": Pair(b, {}), "end": c}
    assert cpp.same_tree(like(1, TWO, "c"), known) == [1, TWO, "c"]
    assert cpp.same_tree(ONE, ONE) == []
    assert cpp.same_tree(ONE, ...) == [ONE]
    assert python.same_tree(like(1, 2, 3), known) is None


@pytest.mark.parametrize(
    ("found", "known"),
    [
        (TWO, ONE),
        (ONE.clone(), ONE),
        ({"w": TWO}, {"w": ONE}),
        ({"w": ONE}, {"v": ONE}),
        ({}, {"w": ONE}),
        ({"w": ONE}, {}),
        ({"w": ONE, "v": TWO}, {"w": ONE}),
        ({"w": ONE}, {"w": ONE, "v": TWO}),
        ({"v": TWO, "w": ONE}, {"w": ONE, "v": TWO}),
        (OrderedDict(w=ONE), {"w": ONE}),
        ({"w": {"x": ONE}}, {"w": {"x": TWO}}),
        ([ONE], [ONE, TWO]),
        ([ONE, TWO], [ONE]),
        ([ONE], (ONE,)),
        ((ONE, TWO), Pair(ONE, TWO)),
        (Pair(ONE, TWO), Pair(ONE, ONE)),
        (ONE, [ONE]),
        (None, ONE),
        ({ONE}, {ONE}),
    ],
)
def test_a_tree_with_another_leaf_key_order_or_type_is_not_the_same(found, known, cpp):
    assert cpp.same_tree(found, known) is None


def test_where_there_is_no_tensor_the_answer_is_the_careful_one(cpp):
    known = addresses([torch.ones(2)])
    for strange in ([None], [1.0], ["w"], {"w": torch.ones(2)}):
        assert cpp.moved(strange, known, 1)
        assert cpp.need_gradient(strange)
        assert cpp.begin_inside(strange, SPAN)
        assert cpp.held(strange, known, 1) is None
        assert not cpp.join(strange, torch.empty(2))


def test_python_is_asked_where_nothing_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "_found", looks._found[:1])
    library = tmp_path / "kept" / "looks.so"
    for command in (["no such compiler"], [sys.executable, "-c", "raise SystemExit(1)"]):
        looks._compile(command, library)
        assert type(looks.look()) is Looks
    assert not library.exists()
    library.write_text("this is no library")
    looks._load(library)
    assert type(looks.look()) is Looks


def test_code_is_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "_found", looks._found[:1])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    prepare = looks.prepare.__wrapped__
    thread = prepare()
    assert thread is not None
    thread.join()
    assert len(list(Path(tmp_path, "funcreg").iterdir())) == 1
    monkeypatch.setattr(looks, "_found", looks._found[:1])
    assert prepare() is None
    assert type(looks.look()) is not Looks
