"""What transforms and schedules refuse, and what they say: wrong numbers, things that are no numbers, wrong calls."""

from __future__ import annotations

import pickle
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import TRANSFORMS, assert_equal, cpu_only, draw, flat
from torch import nn, tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

import funcreg as fr
from funcreg.core.ranges import check_range, concrete

pytestmark = cpu_only  # Numbers in tensors are checked on the CPU, where reading them waits for no device.
NAN, INF = float("nan"), float("inf")

# From a hyperparameter to what has it, and numbers that it may not be.
NEGATIVE, RATE = (-1, -0.5, NAN), (-1, -0.5, NAN, INF)
FACTOR, DECAY = (NAN, INF, -INF), (-0.1, 1, 1.0, 1.5, NAN, INF)
POSITIVE, SHARE = (0, 0.0, -1, NAN), (-0.1, 1.5, NAN)
HYPER = {
    "scale step_size": (fr.scale, FACTOR),
    "scale_by_learning_rate learning_rate": (fr.scale_by_learning_rate, RATE),
    "trace decay": (fr.trace, DECAY),
    "ema decay": (fr.ema, DECAY),
    "scale_by_adam b1": (lambda x: fr.scale_by_adam(b1=x), DECAY),
    "scale_by_adam b2": (lambda x: fr.scale_by_adam(b2=x), DECAY),
    "scale_by_adam eps": (lambda x: fr.scale_by_adam(eps=x), RATE),
    "scale_by_adam eps_root": (lambda x: fr.scale_by_adam(eps_root=x), RATE),
    "scale_by_amsgrad b2": (lambda x: fr.scale_by_amsgrad(b2=x), DECAY),
    "scale_by_rms decay": (fr.scale_by_rms, DECAY),
    "scale_by_rms eps": (lambda x: fr.scale_by_rms(eps=x), RATE),
    "scale_by_rms initial_scale": (lambda x: fr.scale_by_rms(initial_scale=x), RATE),
    "scale_by_stddev decay": (fr.scale_by_stddev, DECAY),
    "scale_by_rss initial_accumulator_value": (fr.scale_by_rss, RATE),
    "scale_by_rss eps": (lambda x: fr.scale_by_rss(eps=x), RATE),
    "scale_by_lion b1": (fr.scale_by_lion, SHARE),
    "scale_by_lion b2": (lambda x: fr.scale_by_lion(b2=x), DECAY),
    "scale_by_lion smooth_beta": (lambda x: fr.scale_by_lion(mode="smooth", smooth_beta=x), POSITIVE),
    "scale_by_trust_ratio min_norm": (fr.scale_by_trust_ratio, RATE),
    "scale_by_trust_ratio trust_coefficient": (lambda x: fr.scale_by_trust_ratio(trust_coefficient=x), RATE),
    "clip max_delta": (fr.clip, NEGATIVE),
    "clip_by_global_norm max_norm": (fr.clip_by_global_norm, NEGATIVE),
    "clip_by_global_norm eps": (lambda x: fr.clip_by_global_norm(1.0, x), RATE),
    "clip_by_block_rms threshold": (fr.clip_by_block_rms, POSITIVE),
    "adaptive_grad_clip clipping": (fr.adaptive_grad_clip, NEGATIVE),
    "adaptive_grad_clip eps": (lambda x: fr.adaptive_grad_clip(0.1, x), RATE),
    "add_decayed_weights weight_decay": (fr.add_decayed_weights, RATE),
    "add_penalty strength": (lambda x: fr.add_penalty(fr.l1, strength=x), RATE),
    "proximal step": (lambda x: fr.proximal(fr.l1, x), NEGATIVE),
    "soft_threshold threshold": (fr.soft_threshold, NEGATIVE),
    "sgd learning_rate": (fr.sgd, RATE),
    "sgd momentum": (lambda x: fr.sgd(0.1, x), DECAY),
    "adam learning_rate": (fr.adam, RATE),
    "adam b1": (lambda x: fr.adam(0.1, x), DECAY),
    "adamw weight_decay": (lambda x: fr.adamw(0.1, weight_decay=x), RATE),
    "nadamw b2": (lambda x: fr.nadamw(0.1, b2=x), DECAY),
    "amsgrad eps": (lambda x: fr.amsgrad(0.1, eps=x), RATE),
    "lion weight_decay": (lambda x: fr.lion(0.1, weight_decay=x), RATE),
    "rmsprop decay": (lambda x: fr.rmsprop(0.1, x), DECAY),
    "adagrad eps": (lambda x: fr.adagrad(0.1, eps=x), RATE),
    "lamb learning_rate": (fr.lamb, RATE),
    "prox_sgd learning_rate": (lambda x: fr.prox_sgd(x, fr.l1), RATE),
    "prox_sgd strength": (lambda x: fr.prox_sgd(0.1, fr.l1, strength=x), NEGATIVE),
    "prox_sgd momentum": (lambda x: fr.prox_sgd(0.1, fr.l1, momentum=x), DECAY),
    "prox_adam strength": (lambda x: fr.prox_adam(0.1, fr.l1, strength=x), NEGATIVE),
    "prox_adam weight_decay": (lambda x: fr.prox_adam(0.1, fr.l1, weight_decay=x), RATE),
    "prox_adam b1": (lambda x: fr.prox_adam(0.1, fr.l1, b1=x), DECAY),
    "proximal_step max_step": (lambda x: fr.proximal_step(fr.scale_by_adam(), 0.1, fr.l1, max_step=x), POSITIVE),
    "fista learning_rate": (lambda x: fr.fista(x, fr.l1), RATE),
    "fista strength": (lambda x: fr.fista(0.1, fr.l1, strength=x), NEGATIVE),
    "rmda learning_rate": (lambda x: fr.rmda(x, fr.l1), RATE),
    "rmda momentum": (lambda x: fr.rmda(0.1, fr.l1, momentum=x), DECAY),
    "ramda eps": (lambda x: fr.ramda(0.1, fr.l1, eps=x), RATE),
    "ftrl learning_rate": (lambda x: fr.ftrl(x, fr.l1), (*POSITIVE, INF)),
    "ftrl beta": (lambda x: fr.ftrl(0.1, fr.l1, beta=x), (*POSITIVE, INF)),
    "adamprox strength": (lambda x: fr.adamprox(0.1, x), NEGATIVE),
    "normalize_by_update_norm scale_factor": (fr.normalize_by_update_norm, FACTOR),
    "normalize_by_update_norm eps": (lambda x: fr.normalize_by_update_norm(eps=x), RATE),
    "reduce_on_plateau factor": (fr.reduce_on_plateau, (0, 1, 1.5, NAN)),
    "reduce_on_plateau rtol": (lambda x: fr.reduce_on_plateau(rtol=x), SHARE),
    "reduce_on_plateau min_scale": (lambda x: fr.reduce_on_plateau(min_scale=x), SHARE),
    "scale_by_polyak f_min": (fr.scale_by_polyak, FACTOR),
    "scale_by_polyak max_learning_rate": (lambda x: fr.scale_by_polyak(max_learning_rate=x), POSITIVE),
    "polyak_sgd eps": (lambda x: fr.polyak_sgd(eps=x), RATE),
    "scale_by_factored_rms decay_rate": (lambda x: fr.scale_by_factored_rms(decay_rate=x), (*POSITIVE, INF)),
    "scale_by_factored_rms epsilon": (lambda x: fr.scale_by_factored_rms(epsilon=x), RATE),
    "adafactor threshold": (lambda x: fr.adafactor(0.1, clipping_threshold=x), POSITIVE),
    "adafactor weight_decay": (lambda x: fr.adafactor(0.1, weight_decay_rate=x), RATE),
    "scale_by_muon beta": (lambda x: fr.scale_by_muon(beta=x), DECAY),
    "muon eps": (lambda x: fr.muon(0.1, eps=x), RATE),
    "muon consistent_rms": (lambda x: fr.muon(0.1, consistent_rms=x), POSITIVE),
    "scale_by_ademamix b3": (lambda x: fr.scale_by_ademamix(b3=x), DECAY),
    "ademamix alpha": (lambda x: fr.ademamix(0.1, alpha=x), RATE),
    "simplified_ademamix b1": (lambda x: fr.simplified_ademamix(0.1, x), DECAY),
    "adopt b2": (lambda x: fr.adopt(0.1, b2=x), DECAY),
    "adopt eps": (lambda x: fr.adopt(0.1, eps=x), (*POSITIVE, INF)),
    "scale_by_zoom_linesearch slope_rtol": (lambda x: fr.scale_by_zoom_linesearch(3, slope_rtol=x), SHARE),
    "scale_by_zoom_linesearch curv_rtol": (lambda x: fr.scale_by_zoom_linesearch(3, curv_rtol=x), SHARE),
    "scale_by_zoom_linesearch increase_factor": (
        lambda x: fr.scale_by_zoom_linesearch(3, increase_factor=x),
        (0.5, 1, NAN),
    ),
    "scale_by_backtracking_linesearch slope_rtol": (
        lambda x: fr.scale_by_backtracking_linesearch(3, slope_rtol=x),
        SHARE,
    ),
    "scale_by_backtracking_linesearch increase_factor": (
        lambda x: fr.scale_by_backtracking_linesearch(3, increase_factor=x),
        (0.5, NAN),
    ),
    "scale_by_zoom_linesearch tol": (lambda x: fr.scale_by_zoom_linesearch(3, tol=x), RATE),
    "scale_by_zoom_linesearch max_learning_rate": (lambda x: fr.scale_by_zoom_linesearch(3, x), POSITIVE),
    "scale_by_zoom_linesearch approx_dec_rtol": (lambda x: fr.scale_by_zoom_linesearch(3, approx_dec_rtol=x), RATE),
    "scale_by_backtracking_linesearch decrease_factor": (
        lambda x: fr.scale_by_backtracking_linesearch(3, decrease_factor=x),
        (0, 1, 1.5, NAN),
    ),
    "lbfgs learning_rate": (fr.lbfgs, RATE),
    "constant_schedule value": (fr.constant_schedule, FACTOR),
    "linear_schedule init_value": (lambda x: fr.linear_schedule(x, 0.0, 10), FACTOR),
    "polynomial_schedule power": (lambda x: fr.polynomial_schedule(1.0, 0.0, x, 10), (*POSITIVE, INF)),
    "exponential_decay decay_rate": (lambda x: fr.exponential_decay(1.0, 10, x), RATE),
    "exponential_decay end_value": (lambda x: fr.exponential_decay(1.0, 10, 0.5, end_value=x), FACTOR),
    "cosine_decay_schedule alpha": (lambda x: fr.cosine_decay_schedule(1.0, 10, x), FACTOR),
    "cosine_decay_schedule exponent": (lambda x: fr.cosine_decay_schedule(1.0, 10, exponent=x), (*POSITIVE, INF)),
    "warmup_constant_schedule end_value": (lambda x: fr.warmup_constant_schedule(0.0, x, 10), FACTOR),
    "warmup_cosine_decay_schedule peak_value": (lambda x: fr.warmup_cosine_decay_schedule(0.0, x, 3, 10), FACTOR),
    "piecewise_constant_schedule init_value": (fr.piecewise_constant_schedule, FACTOR),
    "piecewise_interpolate_schedule init_value": (lambda x: fr.piecewise_interpolate_schedule("linear", x), FACTOR),
    "linear_onecycle_schedule peak_value": (lambda x: fr.linear_onecycle_schedule(10, x), FACTOR),
    "cosine_onecycle_schedule peak_value": (lambda x: fr.cosine_onecycle_schedule(10, x), FACTOR),
    "warmup_exponential_decay_schedule decay_rate": (
        lambda x: fr.warmup_exponential_decay_schedule(0.0, 1.0, 3, 10, x),
        RATE,
    ),
    "cubic_ramp_schedule end_value": (lambda x: fr.cubic_ramp_schedule(x, 10), FACTOR),
    "cyclic_schedule peak_value": (lambda x: fr.cyclic_schedule(0.0, x, 10), FACTOR),
    "cyclic_schedule decay_rate": (lambda x: fr.cyclic_schedule(0.0, 1.0, 10, decay_rate=x), SHARE),
    "relative_schedule value": (lambda x: fr.relative_schedule(x, 0.1), FACTOR),
    "relative_schedule peak_value": (lambda x: fr.relative_schedule(0.1, 0.1, x), (*POSITIVE, INF)),
    "elastic_from_torch weight_decay": (fr.elastic_from_torch, RATE),
    "elastic_from_keras l2": (lambda x: fr.elastic_from_keras(0.1, x), RATE),
    "elastic_from_sklearn alpha": (fr.elastic_from_sklearn, RATE),
    "elastic_from_sklearn l1_ratio": (lambda x: fr.elastic_from_sklearn(0.1, x), SHARE),
    "elastic_from_sklearn_ridge alpha": (lambda x: fr.elastic_from_sklearn_ridge(x, 10), RATE),
    "elastic_from_sklearn_logistic C": (lambda x: fr.elastic_from_sklearn_logistic(x, 10), POSITIVE),
    "elastic_from_sklearn_logistic l1_ratio": (lambda x: fr.elastic_from_sklearn_logistic(1.0, 10, x), SHARE),
    "elastic_from_glmnet lambda_": (fr.elastic_from_glmnet, RATE),
    "elastic_from_glmnet alpha": (lambda x: fr.elastic_from_glmnet(0.1, x), SHARE),
}
# Those that may be trees like the parameters, with schedules in them, and others that may follow a schedule.
TREES = ["add_decayed_weights weight_decay", "soft_threshold threshold", "sgd learning_rate", "prox_sgd strength"]
SCHEDULED = [
    *["scale step_size", "scale_by_learning_rate learning_rate", "add_penalty strength", "proximal step"],
    *["adam learning_rate", "adamw weight_decay", "lion weight_decay", "lamb learning_rate", "prox_sgd learning_rate"],
    *["prox_adam strength", "prox_adam weight_decay", "proximal_step max_step", "fista learning_rate"],
    *["adafactor weight_decay", "scale_by_ademamix b3", "ademamix alpha", "lbfgs learning_rate"],
    *["fista strength", "rmda learning_rate", "rmda momentum", "adamprox strength"],
]

every_hyperparameter = pytest.mark.parametrize("name", HYPER)


def last(name):
    return name.split()[1]


@every_hyperparameter
def test_a_number_out_of_range_is_refused_by_name_also_in_a_tensor_and_as_numpys(name):
    make, wrong = HYPER[name]
    for x in wrong:
        for form in (x, tensor(float(x)), tensor(float(x), requires_grad=True), np.float32(x), np.array(float(x))):
            with pytest.raises(ValueError, match=rf"^{last(name)} (is|has the entry) \S+; expected a"):
                make(form)


@every_hyperparameter
def test_what_is_no_number_is_refused_by_name(name):
    for thing in (
        "0.1",
        True,
        0.1j,
        fr.identity(),
        torch.optim.SGD,
        nn.Linear(1, 1),
        torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], 0.1), 3),
        np.ones(3),
        {"w": "0.1"},
    ):
        with pytest.raises(TypeError, match=rf"^{last(name)} (is|at 'w' is) .*; expected a"):
            HYPER[name][0](thing)


@pytest.mark.parametrize("name", TREES)
def test_numbers_in_trees_are_refused_with_their_place(name):
    make, _ = HYPER[name]
    with pytest.raises(ValueError, match=rf"^{last(name)} at 'body\.0' is -0\.5; expected a number of at least 0"):
        make({"head": 0.1, "body": (-0.5, lambda count: 0.1)})
    with pytest.raises(ValueError, match=rf"^{last(name)} at 'head' has the entry -2\.0; expected numbers of at least"):
        make({"head": tensor([0.1, -2.0])})


@pytest.mark.parametrize("name", [*TREES, *SCHEDULED])
def test_the_first_value_of_a_schedule_is_checked(name):
    make, wrong = HYPER[name]
    for x in wrong:
        for schedule in (lambda count, x=x: x, lambda count, x=x: tensor(float(x)) + 0 * count):
            with pytest.raises(ValueError, match=rf"^{last(name)} at step 0 is \S+; expected a"):
                make(schedule)
    with pytest.raises(TypeError, match=r"the schedule .* returned '0.1'; expected a number or a tensor"):
        make(lambda count: "0.1")


@every_hyperparameter
def test_what_follows_no_schedule_refuses_one_at_once(name):
    make, _ = HYPER[name]
    if name in (*TREES, *SCHEDULED):
        assert isinstance(make(lambda count: 0.1), fr.Transform)
    else:
        with pytest.raises(TypeError, match=rf"^{last(name)} is the function .*; expected a number or a tensor"):
            make(lambda count: 0.1)


@pytest.mark.slow
@every_hyperparameter
def test_tensors_that_are_not_known_are_not_read(name):
    make, wrong = HYPER[name]
    make = lambda x, make=make: (make(x), x)[1]
    bad = float(wrong[0])
    make(torch.full((), bad, device="meta"))
    vmap(make)(torch.full((2,), bad))
    grad(make)(tensor(bad))
    with FakeTensorMode():
        make(torch.full((), bad))
    torch.compile(make, backend="eager", fullgraph=True)(tensor(bad))


def test_only_plain_tensors_on_the_cpu_are_known():
    assert concrete(tensor(2.0)) == 2.0
    assert concrete(np.float64(2.0)) == 2.0
    assert concrete(lambda count: 0.1) is None
    assert concrete(torch.ones(2, 2).to_sparse()) is None
    seen = []
    vmap(lambda x: (seen.append(concrete(x)), x)[1])(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The tracer is deprecated.
        torch.jit.trace(lambda x: (seen.append(concrete(x)), x + 1)[1], tensor(1.0), check_trace=False)
    assert seen == [None, None]
    check_range("x", tensor([]), 0)
    check_range("x", {"a": None, "b": [1, (2, 3)]}, 0)


@pytest.mark.parametrize("form", [np.float32, np.float64, np.array, lambda x: np.array(x, dtype=np.float32)])
def test_numbers_of_numpy_are_numbers(form):
    params = draw()
    for make in (
        lambda x: fr.sgd(x),
        lambda x: fr.adamw(0.1, x, x, x, x),
        lambda x: fr.clip(x),
        lambda x: fr.sgd({"head": x, "body": 0.1}),
        lambda x: fr.prox_sgd(x, fr.l1, strength=x, momentum=x),
        lambda x: fr.ftrl(x, fr.l1, beta=x),
        lambda x: fr.scale_by_schedule(lambda count: x),
        lambda x: fr.scale_by_learning_rate(fr.constant_schedule(x)),
    ):
        found, expected = (tx.update(draw(1), tx.init(params), params)[0] for tx in (make(form(0.25)), make(0.25)))
        assert_equal(found, expected)


@pytest.mark.parametrize("make", [
    lambda n: fr.apply_if_finite(fr.identity(), n),
    lambda n: fr.lbfgs(memory_size=n),
    lambda n: fr.lookahead(fr.sgd(0.1), n, 0.5),
    lambda n: fr.muon(0.1, ns_steps=n),
    lambda n: fr.prox_adam(0.1, fr.nuclear, inner_steps=n),
    lambda n: fr.reduce_on_plateau(patience=n, cooldown=n, accumulation_size=n),
    lambda n: fr.scale_by_backtracking_linesearch(n),
    lambda n: fr.scale_by_factored_rms(min_dim_size_to_factor=n),
    lambda n: fr.scale_by_zoom_linesearch(n),
])  # fmt: skip
def test_whole_numbers_of_numpy_are_whole_numbers(make):
    assert isinstance(make(np.int64(3)), fr.Transform)
    for wrong in (np.int64(-1), np.float32(2.0), np.True_):
        with pytest.raises((ValueError, TypeError), match="expected a whole number of at least"):
            make(wrong)


# Transforms where others are expected


def test_a_preconditioner_with_a_learning_rate_is_refused():
    for wrong in (
        fr.adam(0.1),
        fr.rmsprop(0.1),
        fr.chain(fr.scale_by_adam(), fr.scale(-0.1)),
        fr.chain(fr.scale_by_adam(), fr.scale(tensor(-0.1))),
        fr.chain(fr.scale_by_adam(), fr.scale({"a": 0.1, "b": -0.1})),
        fr.chain(fr.chain(fr.scale_by_rms()), fr.masked(fr.scale_by_learning_rate(lambda count: 0.1), fr.matrices)),
        fr.named_chain(("a", fr.scale_by_adam()), ("b", fr.scale_by_learning_rate(0.1))),
        fr.chain(fr.freeze(False), fr.adam(0.1)),
        fr.chain(fr.scale_by_adam(), fr.prox_sgd(0.1, fr.l1)),
    ):
        with pytest.raises(
            ValueError, match=r"^preconditioner is (named_)?chain|^preconditioner is [a-z]+\(0.1\)"
        ) as e:
            fr.proximal_step(wrong, 0.1, fr.l1, strength=0.1)
        assert "with a learning rate in them; expected the direction alone, such as scale_by_adam()" in str(e.value)
    fr.proximal_step(fr.chain(fr.clip(1.0), fr.ema(0.9), fr.scale_by_rms(), fr.scale(2.0)), 0.1, fr.l1)


@pytest.mark.parametrize(
    "make", [fr.scale_by_learning_rate, fr.sgd, fr.adam, fr.adamw, fr.nadamw, fr.amsgrad, fr.lion, fr.rmsprop]
    + [fr.adagrad, fr.lamb, fr.adamprox]
    + [lambda rate, f=f: f(rate, fr.l1) for f in (fr.prox_sgd, fr.prox_adam, fr.fista, fr.rmda, fr.ramda, fr.ftrl)],
)  # fmt: skip
def test_no_learning_rate_at_all_is_refused(make):
    with pytest.raises(TypeError, match=r"^learning_rate is None; expected a number"):
        make(None)


def test_options_without_an_effect_are_refused():
    for make in (fr.sgd, fr.rmsprop, lambda rate, **options: fr.prox_sgd(rate, fr.l1, **options)):
        with pytest.raises(ValueError, match="nesterov is True; it has no effect without momentum"):
            make(0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"accumulator_dtype is torch\.bfloat16; it has no effect without momentum"):
        fr.sgd(0.1, accumulator_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"smooth_beta is 3\.0; it has no effect, because mode is 'hard'"):
        fr.scale_by_lion(smooth_beta=3.0)


class Wrong:
    """Things that newcomers pass, and what is said to them."""

    optimizer = torch.optim.SGD([torch.ones(1)], 0.1)

    class Pair(NamedTuple):  # As transformations of optax and TorchOpt are.
        init: Any
        update: Any


CALLS = {
    "a list of transforms": (
        lambda: fr.chain([fr.identity(), fr.scale(2.0)]),
        r"argument 0 of chain is a list; expected a Transform. .* chain\(\*transforms\)\?",
    ),
    "a transform of another library": (
        lambda: fr.chain(Wrong.Pair(fr.sgd(0.1).init, fr.sgd(0.1).update)),
        f"argument 0 of chain is a Pair; expected a Transform. It is one of {__name__}; most of optax is here",
    ),
    "a function that makes a transform": (lambda: fr.chain(fr.scale_by_adam), "of chain is a function.* Is it called"),
    "a function of updates": (lambda: fr.chain(lambda u, p: u), "through stateless"),
    "an optimizer of torch": (lambda: fr.chain(Wrong.optimizer), "of chain is an SGD; .*An optimizer of torch"),
    "pairs in a chain": (lambda: fr.chain(("a", fr.identity())), "go to named_chain"),
    "transforms without names": (
        lambda: fr.named_chain(fr.identity()),
        "argument 0 of named_chain is a Transform; expected a pair of a name and a Transform",
    ),
    "transforms without labels": (
        lambda: fr.partition([fr.sgd(0.1), fr.sgd(0.2)], "a"),
        "partition got transforms as a list; expected a dict from label to transform",
    ),
    "the label None": (
        lambda: fr.partition({"a": fr.sgd(0.1), None: fr.set_to_zero()}, {"w": "a", "v": None}),
        "partition has the label None, which stands for no leaf",
    ),
    "a label without a transform": (
        lambda: fr.partition({"a": fr.sgd}, "a"),
        r"of partition, labelled 'a', is a function; expected a Transform. Is it called",
    ),
    "mask and transform swapped": (lambda: fr.masked(fr.matrices, fr.sgd(0.1)), "masked is the selection matrices; "),
    "a transform for a mask": (
        lambda: fr.add_decayed_weights(0.1, mask=fr.sgd(0.1)),
        r"mask is the transform sgd\(0\.1\); expected a tree of bools, or a function",
    ),
    "names for a mask": (
        lambda: fr.prox_sgd(0.1, fr.l1, mask=["a.weight", "b.weight"]),
        r"mask is a list of strings; expected a tree of bools.*select\('a.weight', 'b.weight'\)",
    ),
    "a module for a mask": (lambda: fr.freeze(nn.Linear(1, 1)), "mask is a module, a Linear; expected a tree of bools"),
    "a number for a mask": (lambda: fr.masked(fr.identity(), 1), "mask is the int 1; expected a tree of bools"),
    "a number for a bool": (lambda: fr.adam(0.1, nesterov=0.9), "nesterov is 0.9; expected True or False"),
    "a name for a dtype": (lambda: fr.adam(0.1, mu_dtype="bfloat16"), "mu_dtype is 'bfloat16'; expected a dtype"),
    "a dtype of integers": (lambda: fr.trace(0.9, False, torch.int32), "accumulator_dtype is torch.int32; expected"),
    "a share of errors": (lambda: fr.apply_if_finite(fr.identity(), 0.5), "is 0.5; expected a whole number"),
    "an axis by name": (lambda: fr.adaptive_grad_clip(0.1, axis="rows"), "axis is 'rows'; expected a dimension"),
    "a transform for a function": (lambda: fr.stateless(fr.identity()), r"stateless got identity\(\); expected a func"),
    "no function": (lambda: fr.Transform(None, None), "init of a Transform is None; expected a function"),
    "numbers of samples": (lambda: fr.elastic_from_sklearn_ridge(1.0, "9"), r"n_samples is '9'; .*len\(x\), or sum"),
    "a list of factors": (lambda: fr.piecewise_constant_schedule(1.0, [1]), "boundaries_and_scales is a list; ex"),
    "a number among schedules": (lambda: fr.join_schedules([0.1, 0.2], [3]), "schedule 0 of join_schedules is 0.1;"),
    "a schedule alone": (lambda: fr.join_schedules(fr.constant_schedule(1.0), []), "expected a list of schedules"),
    "a boundary alone": (lambda: fr.join_schedules([fr.constant_schedule(1.0)], 3), "boundaries is 3; expected a list"),
    "steps in words": (lambda: fr.linear_schedule(1.0, 0.0, "10"), "transition_steps is '10'; expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls_that_cannot_be_meant_say_what_was_expected(case):
    make, message = case
    with pytest.raises(TypeError, match=message):
        make()


VECTOR, COMPLEX = tensor([1.0, 1.0, 1.0]), {"w": torch.ones(2, dtype=torch.complex64)}

# What reached torch, or was taken without an effect, and what is said to it.
RAW = {
    "a first sum per entry": (lambda: fr.adagrad(0.1, VECTOR), "initial_accumulator_value is a tensor of shape"),
    "a first mean square per entry": (lambda: fr.rmsprop(0.1, initial_scale=VECTOR), "initial_scale is a tensor of sh"),
    "a first centred square per entry": (lambda: fr.scale_by_stddev(initial_scale=VECTOR), "initial_scale is a tensor"),
    "a first mean per entry": (
        lambda: fr.scale_by_yogi(initial_accumulator_value=VECTOR),
        "value is a tensor of shape",
    ),
    "step sizes per entry": (
        lambda: fr.rprop(VECTOR),
        r"learning_rate is a tensor of shape \(3,\); expected one number",
    ),
    "least step sizes per entry": (lambda: fr.rprop(0.1, min_step_size=VECTOR), "min_step_size is a tensor of shape"),
    "a norm per entry": (lambda: fr.normalize_by_update_norm(VECTOR), "scale_factor is a tensor of shape"),
    "rates of a joint average": (lambda: fr.rmda([1.0], fr.l1), "learning_rate is a list; expected one number"),
    "rates of a joint metric": (lambda: fr.ramda({"w": 1.0}, fr.l1), "learning_rate is a dict; expected one number"),
    "a tree of variances": (lambda: fr.add_noise([1.0], 0.5, 0), "eta is a list; expected one number"),
    "a list of offsets": (lambda: fr.adafactor(0.1, decay_offset=[1]), "step_offset is a list; expected a number"),
    "a schedule of offsets": (lambda: fr.adafactor(0.1, decay_offset=lambda n: n), "step_offset is the function"),
    "a function for a dtype": (
        lambda: fr.adafactor(0.1, dtype_momentum=float),
        "dtype_momentum is .*; expected a dtype",
    ),
    "a period of nan": (lambda: fr.apply_every(NAN), "k is nan; expected a whole number"),
    "a period of infinity": (lambda: fr.apply_every(INF), "k is inf; expected a whole number"),
    "a rise by name": (lambda: fr.cyclic_schedule(1.0, 2.0, 4, rise="fast"), "rise is 'fast'; expected a number"),
    "a list of kinds": (lambda: fr.cyclic_schedule(1.0, 2.0, 4, interpolate_type=["cosine"]), r"is \['cosine'\]; expe"),
    "a list of modes": (lambda: fr.scale_by_lion(mode=["hard"]), r"mode is \['hard'\]; expected one of hard"),
    "a count of static arguments": (
        lambda: fr.inject_hyperparams(fr.adam, static_args=3),
        "static_args is 3; expected",
    ),
    "no static arguments": (lambda: fr.inject_hyperparams(fr.adam, static_args=None), "static_args is None; expected"),
    "a tensor for a dtype": (lambda: fr.sgd(0.1, accumulator_dtype=VECTOR), "accumulator_dtype is tensor"),
    "complex updates in a box": (
        lambda: fr.clip(1.0).update(COMPLEX, fr.EmptyState(), COMPLEX),
        "at leaf 'w': it is complex; expected real numbers, which have an order",
    ),
    "complex parameters above zero": (
        lambda: fr.keep_params_nonnegative().update(COMPLEX, fr.EmptyState(), COMPLEX),
        "at leaf 'w': it is complex; expected real numbers",
    ),
    "a complex maximum": (lambda: fr.tree_max(COMPLEX), "at leaf 'w': it is complex; expected real numbers"),
    "a complex minimum": (lambda: fr.tree_min(COMPLEX), "at leaf 'w': it is complex; expected real numbers"),
    "a complex range": (lambda: fr.tree_clip(COMPLEX, 0.0), "at leaf 'w': it is complex; expected real numbers"),
    "a factor by name": (lambda: fr.tree_scale("a", COMPLEX), "scalar is 'a'; expected a number"),
    "a condition by name": (lambda: fr.tree_where("a", COMPLEX, COMPLEX), "condition is 'a'; expected a number"),
    "a value by name": (lambda: fr.tree_full_like(COMPLEX, "a"), "fill_value is 'a'; expected a number"),
    "steps by name": (lambda: fr.periodic_update(COMPLEX, COMPLEX, "a", 2), "steps is 'a'; expected a number"),
    "a matrix by name": (lambda: fr.affine_set.project(torch.ones(2), matrix="a"), "matrix is 'a'; expected a number"),
    "no matrix": (lambda: fr.polyhedron.project(torch.ones(2), matrix=None), "matrix is None; expected a number"),
}


@pytest.mark.parametrize("case", RAW)
def test_what_would_fail_inside_torch_is_refused_by_name(case):
    call, said = RAW[case]
    with pytest.raises((TypeError, ValueError), match=said):
        call()


def test_what_a_function_must_not_return_is_said_with_its_name():
    params = draw()

    def forgot(updates, params):
        fr.tree_map(torch.sign, updates)

    def partly(updates, params):
        return {"head": updates["head"]}

    for f, error, message in (
        (forgot, TypeError, "the function forgot of stateless returned None; expected new updates. Lacks it a return"),
        (partly, ValueError, "what the function partly of stateless returned does not match updates: it lacks 'body'"),
        (
            lambda u, p: fr.tree_map(lambda x: x.sum(), u),
            ValueError,
            r"what the function <lambda> of stateless returned 'body.filters' has shape \(\)",
        ),
    ):
        tx = fr.chain(fr.stateless(f), fr.scale(2.0))
        with pytest.raises(error, match=message):
            tx.update(params, tx.init(params), params)
    tx = fr.Transform(fr.init_empty_state, lambda u, s, p: u)
    with pytest.raises(TypeError, match=r"update of Transform\(.*returned a dict; expected a pair, \(updates, state\)"):
        tx.update(params, tx.init(params), params)
    tx = fr.sgd(lambda count: 0.1 if count == 0 else None)
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match=r"the schedule .* returned None; expected a number or a tensor"):
        tx.update(params, state, params)


@pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
def test_state_and_params_in_the_wrong_order_are_said(case):
    tx, params = case.make(), draw()
    with pytest.raises(ValueError, match=r"expected update\(updates, state, params\). Are state and params swapped\?"):
        tx.update(draw(1), params, tx.init(params))


@pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
def test_updates_and_state_in_the_wrong_order_are_said(case):
    tx, params = case.make(), draw()
    with pytest.raises(ValueError, match=r"expected update\(updates, state, params\). Are updates and state swapped\?"):
        tx.update(tx.init(params), draw(1), params)


# None for a gradient


def test_parameters_that_a_loss_does_not_use_are_left_out_by_masks():
    used, unused = {"w": torch.ones(2)}, torch.ones(3)
    params, grads = {**used, "unused": unused}, {"w": tensor([1.0, 2.0]), "unused": None}
    without, unused_alone = {"w": True, "unused": False}, {"w": False, "unused": True}
    for tx in (
        fr.chain(fr.freeze({"w": False, "unused": True}), fr.adamw(0.1)),
        fr.chain(fr.adamw(0.1), fr.chain(fr.freeze({"w": False, "unused": True}))),
        fr.chain(fr.clip_by_global_norm(1.0), fr.masked(fr.scale_by_adam(), without), fr.scale(-0.1)),
        fr.apply_if_finite(fr.chain(fr.masked(fr.adamw(0.1), without), fr.masked(fr.set_to_zero(), unused_alone)), 3),
        fr.partition({True: fr.adamw(0.1), False: fr.set_to_zero()}, without),
        fr.partition({True: fr.adamw(0.1), False: fr.freeze(True)}, without),
        fr.named_chain(("a", fr.adamw(0.1, mask=without))),
        fr.prox_adam(0.1, fr.l1, mask=without),
        fr.ftrl(0.1, fr.l1, mask=without),
        fr.fista(0.1, fr.l1, mask=without),
    ):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        assert updates["w"].all()
        if "ftrl" not in repr(tx):  # Which comes from where the leader is, not from the start.
            assert not updates["unused"].any(), tx
    tx = fr.ensemble(lambda rate: fr.adamw(rate, mask=without), tensor([0.1, 0.2]))
    stack = {"w": torch.ones(2, 2), "unused": torch.ones(2, 3)}
    updates, _ = tx.update({"w": torch.ones(2, 2), "unused": None}, tx.init(stack), stack)
    assert updates["w"].all()
    assert not updates["unused"].any()
    for tx in (
        fr.adamw(0.1),
        fr.partition({True: fr.adamw(0.1), False: fr.sgd(0.1)}, without),
        fr.masked(fr.adamw(0.1), True),
    ):
        with pytest.raises(ValueError, match=r"updates 'unused' is None; .* Freeze the leaf"):
            tx.update(grads, tx.init(params), params)


# Autograd history


def warned(loop):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        loop()
    return [str(w.message) for w in caught if "autograd history" in str(w.message)]


def loop(tx, steps, *, within=torch.enable_grad, write=False, dtype=torch.float32):
    """A training loop as it is written at first, over the parameters of a module themselves."""
    model = nn.Linear(2, 1, dtype=dtype)
    x = torch.ones(4, 2, dtype=dtype)
    params = dict(model.named_parameters())
    state = tx.init(params)
    for _ in range(steps):
        value = functional_call(model, params, (x,)).square().mean()
        grads = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
        with within():
            updates, state = tx.update(grads, state, params)
            if write:
                with torch.no_grad():
                    for w, u in zip(params.values(), updates.values(), strict=True):
                        w.add_(u)
            else:
                params = fr.apply_updates(params, updates)
                if within is torch.no_grad:
                    params = {name: w.requires_grad_() for name, w in params.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: fr.sgd(0.01), lambda: fr.adamw(1e-3), lambda: fr.prox_adam(1e-3, fr.l1)])
def test_a_loop_whose_autograd_history_grows_is_told_so_once(make, dtype):
    (message,) = warned(lambda: loop(make(), 150, dtype=dtype))
    assert "torch.no_grad()" in message


def test_a_state_whose_autograd_history_grows_is_told_so_once():
    tx = fr.chain(fr.add_decayed_weights(0.1), fr.trace(0.9), fr.scale(-0.01))
    assert len(warned(lambda: loop(tx, 150, write=True))) == 1


def test_loops_without_a_history_and_unrolled_differentiation_are_not_warned_of():
    tx = fr.chain(fr.add_decayed_weights(0.1), fr.trace(0.9), fr.scale(-0.01))
    assert not warned(lambda: loop(tx, 150, within=torch.no_grad))

    def trained(decay, steps):
        tx, params = fr.chain(fr.add_decayed_weights(decay), fr.trace(0.9), fr.scale(-0.01)), {"w": torch.ones(2)}
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(grad(lambda p: p["w"].square().sum())(params), state, params)
            params = fr.apply_updates(params, updates)
        return params["w"].sum()

    assert not warned(lambda: grad(trained)(tensor(0.1), 150))
    assert not warned(lambda: [trained(tensor(0.1, requires_grad=True), 30).backward() for _ in range(5)])


# Schedules print and pickle


@pytest.mark.parametrize(
    "text",
    [
        "constant_schedule(0.1)",
        "linear_schedule(1.0, 0.0, 10)",
        "exponential_decay(1.0, 10, 0.5, end_value=0.1)",
        "piecewise_constant_schedule(1.0, {10: 0.5})",
        "warmup_cosine_decay_schedule(0.0, 1.0, 3, 10)",
        "join_schedules([constant_schedule(1.0), linear_schedule(1.0, 0.0, 10)], [5])",
    ],
)
def test_schedules_print_as_they_were_written_and_go_through_pickle(text):
    schedule = eval(text, vars(fr))
    assert repr(schedule) == text
    twin = pickle.loads(pickle.dumps(schedule))
    assert repr(twin) == text
    assert [float(twin(n)) for n in range(12)] == [float(schedule(n)) for n in range(12)]
    assert repr(fr.sgd(schedule)) == f"sgd({text})"


def test_what_was_refused_leaves_everything_as_it_was():
    tx, params = fr.adamw(0.1), draw()
    state = tx.init(params)
    before = flat((params, state)).clone()
    with pytest.raises(ValueError, match=r"updates 'head\.bias' is None"):
        tx.update({**draw(1), "head": draw(1)["head"]._replace(bias=None)}, state, params)
    assert torch.equal(flat((params, state)), before)
