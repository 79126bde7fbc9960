"""The laws of schedules for what regularizes, and the equations of each."""

from __future__ import annotations

import pytest
import torch
from cases import assert_equal, draw
from test_schedules import COUNTS, double, values
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.testing import assert_close

import funcreg as fr

RATE = fr.warmup_cosine_decay_schedule(0.0, 0.1, 5, 30, 0.01)
# From a height to a schedule that is linear in it.
CASES = {
    "cubic_ramp": lambda v: fr.cubic_ramp_schedule(v, 20),
    "cubic_ramp late, in jumps": lambda v: fr.cubic_ramp_schedule(v, 20, 3, 0.1 * v, update_every=6),
    "cyclic triangles": lambda v: fr.cyclic_schedule(0.1 * v, v, 8),
    "cyclic that halves": lambda v: fr.cyclic_schedule(0.1 * v, v, 8, decay_rate=0.5),
    "cyclic with a plateau": lambda v: fr.cyclic_schedule(0.0, v, 10, rise=0.3, fall=0.0),
    "cyclic restarts": lambda v: fr.cyclic_schedule(0.0, v, 10, rise=0.0, interpolate_type="cosine"),
    "relative": lambda v: fr.relative_schedule(v, RATE),
    "relative to a function": lambda v: fr.relative_schedule(
        v, lambda count: 1 / (1.0 + double(count)), peak_value=2.0
    ),
    "relative to a number": lambda v: fr.relative_schedule(v, 0.1),
}

every_schedule = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_tensor_counts_as_an_int_does(make, dtype):
    schedule = make(0.7)
    assert_close(values(schedule, torch.tensor(COUNTS, dtype=dtype)), values(schedule), rtol=1e-14, atol=1e-16)


@every_schedule
def test_vmap_over_counts_is_a_loop(make):
    schedule = make(0.7)
    mapped = vmap(lambda count: double(schedule(count)))(torch.tensor(COUNTS))
    assert_close(mapped, values(schedule), rtol=1e-14, atol=1e-16)


@every_schedule
def test_one_compilation_serves_all_counts(make):
    schedule, counter = make(0.7), CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda count: double(1.0) * schedule(count), fullgraph=True, backend=counter)
    assert_close(values(compiled, torch.tensor(COUNTS, dtype=torch.int32)), values(schedule), rtol=1e-14, atol=1e-14)
    assert counter.frame_count == 1


@every_schedule
def test_its_height_may_be_batched_and_differentiated(make):
    heights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    for count in (0, 6, 30):
        unit = double(make(1.0)(count))
        assert_close(vmap(lambda v, n=count: make(v)(n))(heights), heights * unit, rtol=1e-12, atol=1e-15)
        assert_close(vmap(grad(lambda v, n=count: make(v)(n)))(heights), unit.expand(3), rtol=1e-12, atol=1e-15)


@every_schedule
def test_between_its_turns_it_only_rises_or_only_falls(make):
    schedule = make(0.7)
    found, at_turns = values(schedule, range(200)), values(schedule, [0, *schedule.turns])
    if schedule.turns:
        assert at_turns.amin() <= found.amin() + 1e-12
        assert at_turns.amax() >= found.amax() - 1e-12


@pytest.mark.filterwarnings("ignore:fuse got .* steps go uphill")
@every_schedule
def test_it_prints_as_it_was_written_and_drives_strengths_thresholds_and_decays(make):
    schedule, params = make(0.3), draw()
    assert repr(schedule).split("(")[0] in vars(fr)
    for transform in (
        lambda s: fr.add_penalty(fr.l1, strength=s),
        fr.soft_threshold,
        fr.add_decayed_weights,
        lambda s: fr.prox_sgd(0.1, fr.l1, strength=s),
    ):
        tx = transform(schedule)
        step = fr.fuse(tx, backend="eager")
        (fast, inner), slow, state = step.init(params), params, tx.init(params)
        for count in range(3):
            alone = transform(float(schedule(count)))
            updates, state = tx.update(draw(count), state, slow)
            assert_equal(updates, alone.update(draw(count), alone.init(slow), slow)[0], rtol=1e-12, atol=1e-13)
            slow = fr.apply_updates(slow, updates)
            fast, inner = step(fast, draw(count), inner)
        assert_equal(fast, slow, rtol=1e-12, atol=1e-13)


def test_the_ramp_of_pruning_is_that_of_the_paper():
    schedule = fr.cubic_ramp_schedule(0.9, 40, 10, 0.1, update_every=8)
    for count in range(60):
        n = min(max(count - 10, 0), 40)
        n = n if n == 40 else n // 8 * 8
        expected = 0.9 + (0.1 - 0.9) * (1 - n / 40) ** 3
        assert float(schedule(count)) == pytest.approx(expected, rel=1e-12)
    assert float(fr.cubic_ramp_schedule(0.9, 10, update_every=4)(10)) == pytest.approx(0.9)


@pytest.mark.parametrize(("mode", "rate"), [("triangular", 1.0), ("triangular2", 0.5)])
def test_triangles_are_those_of_torch(mode, rate):
    optimizer = torch.optim.SGD([torch.ones(1)], 0.1, momentum=0.9)
    other = torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.1, 0.8, step_size_up=3, step_size_down=5, mode=mode, cycle_momentum=False
    )
    schedule = fr.cyclic_schedule(0.1, 0.8, 8, rise=3 / 8, decay_rate=rate)
    for count in range(30):
        assert float(schedule(count)) == pytest.approx(other.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        other.step()


def test_restarts_along_a_cosine_are_those_of_torch():
    optimizer = torch.optim.SGD([torch.ones(1)], 0.8)
    other = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7, eta_min=0.1)
    schedule = fr.cyclic_schedule(0.1, 0.8, 7, rise=0.0, interpolate_type="cosine")
    for count in range(30):
        assert float(schedule(count)) == pytest.approx(other.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        other.step()


def test_what_is_relative_to_a_rate_keeps_its_share_of_it():
    schedule = fr.relative_schedule(1e-3, RATE)
    for count in COUNTS:
        assert float(schedule(count)) == pytest.approx(1e-2 * float(RATE(count)), rel=1e-12)


def test_a_threshold_relative_to_the_rate_is_the_proximal_step_of_a_strength():
    params = draw()
    relative = fr.chain(fr.sgd(RATE), fr.soft_threshold(fr.relative_schedule(0.3 * 0.1, RATE)))
    exact = fr.prox_sgd(RATE, fr.l1, strength=0.3)
    found, expected = params, params
    states = relative.init(params), exact.init(params)
    for n in range(10):
        updates, first = relative.update(draw(n), states[0], found)
        found = fr.apply_updates(found, updates)
        updates, second = exact.update(draw(n), states[1], expected)
        expected, states = fr.apply_updates(expected, updates), (first, second)
    assert_equal(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fr.cubic_ramp_schedule(0.9, 0), ValueError, "transition_steps is 0; expected a positive number"),
        (lambda: fr.cubic_ramp_schedule(0.9, 9, update_every=0), ValueError, "update_every is 0; expected a positive"),
        (lambda: fr.cubic_ramp_schedule("0.9", 9), TypeError, "end_value is '0.9'; expected a number"),
        (lambda: fr.cubic_ramp_schedule(0.9, "9"), TypeError, "transition_steps is '9'"),
        (lambda: fr.cyclic_schedule(0.0, 1.0, 0), ValueError, "cycle_steps is 0; expected a positive number"),
        (lambda: fr.cyclic_schedule(0.0, 1.0, 9, 1.5), ValueError, "rise is 1.5; expected a number from 0 to 1"),
        (lambda: fr.cyclic_schedule(0.0, 1.0, 9, 0.7, 0.6), ValueError, "rise is 0.7 and fall 0.6; expected shares"),
        (lambda: fr.cyclic_schedule(0.0, 1.0, 9, decay_rate=2.0), ValueError, "decay_rate is 2.0; expected a number"),
        (lambda: fr.cyclic_schedule(0.0, 1.0, 9, interpolate_type="x"), ValueError, "'x'; expected one of linear, cos"),
        (lambda: fr.relative_schedule(1.0, lambda c: 1), ValueError, "greatest value is not known; give it as peak"),
        (lambda: fr.relative_schedule(1.0, fr.constant_schedule(0.0)), ValueError, "peak_value is 0.0; expected a num"),
        (lambda: fr.relative_schedule(1.0, "0.1"), TypeError, "is '0.1'; expected a number"),
        (lambda: fr.relative_schedule(1.0, fr.sgd(0.1)), TypeError, "is the transform sgd"),
        (lambda: fr.linear_onecycle_schedule(0, 1.0), ValueError, "transition_steps is 0; expected a positive number"),
        (
            lambda: fr.linear_onecycle_schedule(100, 1.0, 0.9),
            ValueError,
            "pct_start is 0.9, step 90 of 100, where pct_f",
        ),
        (lambda: fr.linear_onecycle_schedule(2, 1.0, pct_final=1.0), ValueError, "pct_final is 1.0, step 2 of 2"),
        (lambda: fr.cosine_onecycle_schedule(9, 1.0, 1.0), ValueError, "pct_start is 1.0, step 9 of 9, where trans"),
        (lambda: fr.cubic_ramp_schedule(0.0, 0.9, 10), ValueError, "0.9; expected a number of steps. Are arguments"),
        (lambda: fr.cosine_decay_schedule(0.1, 0.5), ValueError, "decay_steps is 0.5; expected a number of steps"),
        (lambda: fr.cosine_onecycle_schedule(9, 1.0, 1.5), ValueError, "pct_start is 1.5; expected a number from 0"),
        (lambda: fr.cosine_onecycle_schedule(9, 1.0, div_factor=0), ValueError, "div_factor is 0; expected a number"),
        (lambda: fr.piecewise_interpolate_schedule("cubic", 1.0), ValueError, "interpolate_type is 'cubic'; expected"),
        (lambda: fr.piecewise_interpolate_schedule("linear", 1.0, {3: -1.0}), ValueError, r"scales\[3\] is -1.0; exp"),
        (lambda: fr.piecewise_interpolate_schedule("linear", 1.0, [3]), TypeError, "scales is a list; expected a dict"),
        (lambda: fr.sgdr_schedule([]), ValueError, "cosine_kwargs is empty"),
        (lambda: fr.sgdr_schedule({"init_value": 0.0}), TypeError, "expected a list of dicts, one for each cycle"),
        (lambda: fr.sgdr_schedule([3]), TypeError, r"cosine_kwargs\[0\] is 3; expected a dict"),
        (lambda: fr.sgdr_schedule([{"init_value": 0.0}]), TypeError, r"cosine_kwargs\[0\] lacks 'peak_value'"),
        (lambda: fr.sgdr_schedule([{"peak": 0.0}]), TypeError, r"cosine_kwargs\[0\] has 'peak'; expected the argum"),
    ],
)
def test_what_cannot_be_a_schedule_is_said_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_schedules_that_turn_below_0_are_refused_where_they_may_not():
    for schedule in (
        fr.cubic_ramp_schedule(-0.1, 10),
        fr.cyclic_schedule(0.1, -0.1, 10),
        fr.relative_schedule(-0.1, RATE),
        fr.piecewise_interpolate_schedule("linear", -0.1, {5: 1.0}),
        fr.sgdr_schedule([{"init_value": 0.1, "peak_value": -0.1, "warmup_steps": 3, "decay_steps": 9}]),
        fr.warmup_exponential_decay_schedule(0.1, -0.1, 5, 5, 0.5),
    ):
        with pytest.raises(ValueError, match=r"at step \d+ is -[\d.e-]+; expected a .*number of at least 0"):
            fr.soft_threshold(schedule)
