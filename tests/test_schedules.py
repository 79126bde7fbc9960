"""The laws of schedules: each test holds for every row of the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference.twins import SCHEDULES
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.testing import assert_close

import funcreg as fr

REFERENCE = json.loads((Path(__file__).parent / "reference" / "optax.json").read_text())
COUNTS = REFERENCE["counts"]

pytestmark = pytest.mark.filterwarnings("ignore:this schedule stays")  # Some rows have no steps.

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def double(value):
    return torch.as_tensor(value, dtype=torch.float64)


def values(schedule, counts=COUNTS):
    return torch.stack([double(schedule(count)) for count in counts])


def test_every_row_has_reference_numbers():
    assert set(SCHEDULES) == set(REFERENCE["schedules"])


@every_schedule
def test_values_are_those_of_optax(name):
    assert_close(values(SCHEDULES[name](fr)), double(REFERENCE["schedules"][name]), rtol=1e-12, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_tensor_counts_as_an_int_does(name, dtype):
    schedule = SCHEDULES[name](fr)
    assert_close(values(schedule, torch.tensor(COUNTS, dtype=dtype)), values(schedule), rtol=0, atol=0)


@every_schedule
def test_vmap_over_counts_is_a_loop(name):
    schedule = SCHEDULES[name](fr)
    assert_close(vmap(schedule)(torch.tensor(COUNTS)).double(), values(schedule), rtol=1e-14, atol=0)


@every_schedule
def test_one_compilation_serves_all_counts(name):
    schedule, counter = SCHEDULES[name](fr), CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda count: double(1.0) * schedule(count), fullgraph=True, backend=counter)
    assert_close(values(compiled, torch.tensor(COUNTS, dtype=torch.int32)), values(schedule), rtol=1e-14, atol=1e-14)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "make",
    [
        fr.constant_schedule,
        lambda v: fr.linear_schedule(v, 0.1 * v, 20),
        lambda v: fr.polynomial_schedule(0.1 * v, v, 2, 20, 2),
        lambda v: fr.exponential_decay(v, 5, 0.7, end_value=0.5 * v),
        lambda v: fr.piecewise_constant_schedule(v, {5: 0.5}),
        lambda v: fr.cosine_decay_schedule(v, 20, alpha=0.1),
        lambda v: fr.warmup_constant_schedule(0.1 * v, v, 20),
        lambda v: fr.warmup_cosine_decay_schedule(0.1 * v, v, 3, 20, 0.01 * v),
        lambda v: fr.piecewise_interpolate_schedule("cosine", v, {5: 0.5, 20: 0.1}),
        lambda v: fr.linear_onecycle_schedule(20, v),
        lambda v: fr.cosine_onecycle_schedule(20, v),
        lambda v: fr.warmup_exponential_decay_schedule(0.1 * v, v, 3, 20, 0.5, end_value=0.4 * v),
        lambda v: fr.sgdr_schedule([{"init_value": 0.1 * v, "peak_value": v, "warmup_steps": 3, "decay_steps": 9}] * 3),
        lambda v: fr.join_schedules([fr.constant_schedule(v), fr.linear_schedule(0.9 * v, 0.1 * v, 10)], [4]),
    ],
)
def test_the_height_of_a_schedule_may_be_batched_and_differentiated(make):
    heights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    for count in (0, 6, 30):
        unit = double(make(1.0)(count))
        assert_close(vmap(lambda v, n=count: make(v)(n))(heights), heights * unit, rtol=1e-14, atol=0)
        assert_close(vmap(grad(lambda v, n=count: make(v)(n)))(heights), unit.expand(3), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.linear_schedule(0.0, 0.1, 0),
        lambda: fr.warmup_constant_schedule(0.0, 0.1, 0),
        lambda: fr.exponential_decay(0.0, 0, 0.5),
    ],
)
def test_a_schedule_that_never_leaves_its_first_value_says_so(make):
    with pytest.warns(UserWarning, match=r"stays at its first value, 0.0, .* number of steps is 0"):
        make()


def test_a_decay_of_rate_0_is_constant_whatever_its_end():
    assert fr.exponential_decay(1.0, 2, 0.0, end_value=0.1)(5) == 1.0
    assert fr.warmup_exponential_decay_schedule(0.0, 1.0, 2, 2, 0.0, end_value=0.5)(9) == 1.0


def test_a_warm_up_of_no_steps_before_another_schedule_is_over():
    assert fr.warmup_cosine_decay_schedule(0.0, 0.1, 0, 10)(0) == 0.1
    assert fr.warmup_exponential_decay_schedule(0.0, 0.1, 0, 10, 0.5)(0) == 0.1
    assert fr.linear_schedule(0.1, 0.1, 0)(5) == 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fr.cosine_decay_schedule(1.0, 0), "decay_steps is 0; expected a positive"),
        (lambda: fr.cosine_decay_schedule(1.0, -5), "decay_steps is -5; expected a positive"),
        (lambda: fr.warmup_cosine_decay_schedule(0.0, 1.0, 10, 10), "decay_steps is 10 and warmup_steps 10; expected"),
        (lambda: fr.warmup_cosine_decay_schedule(0.0, 1.0, 10, 5), "decay_steps counts the warm-up too"),
        (
            lambda: fr.piecewise_constant_schedule(1.0, {3: 0.5, 7: -0.1}),
            r"boundaries_and_scales\[7\] is -0.1; expected",
        ),
        (lambda: fr.join_schedules([fr.constant_schedule(1.0)], [3]), "1 schedules got 1 boundaries; expected 0"),
        (lambda: fr.join_schedules([fr.constant_schedule(1.0)] * 3, [3]), "3 schedules got 1 boundaries; expected 2"),
        (lambda: fr.join_schedules([fr.constant_schedule(1.0)] * 3, [9, 3]), r"boundaries are \[9, 3\]; expected"),
    ],
)
def test_what_cannot_be_a_schedule_is_said_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
