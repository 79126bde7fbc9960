"""The rows that optax and funcreg are compared on: each is made with either library, `lib`, in the same words.

`make_optax.py` runs them with optax and stores what comes; `test_optax.py` and `test_schedules.py` run them with
funcreg. A new row is written here; then the numbers are made again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

NAN, INF = float("nan"), float("inf")

SHAPES = {"linear": {"weight": (3, 2), "bias": (3,)}, "heads": (2, 2, 2), "filters": (2, 1, 2, 3)}
MATRICES = {"linear": {"weight": True, "bias": False}, "heads": True, "filters": True}
LABELS = {"linear": {"weight": "fast", "bias": "slow"}, "heads": "slow", "filters": "held"}

STEPS = 12
COUNTS = [-3, -1, *range(41), 100, 10**6]


def tree_map(f: Callable[..., Any], *trees: Any) -> Any:
    """Nested dicts of `f(leaf, ...)`, whatever the leaves are."""
    if not isinstance(trees[0], dict):
        return f(*trees)
    return {key: tree_map(f, *(tree[key] for tree in trees)) for key in trees[0]}


def run(lib: Any, name: str, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """The first update, and the parameters after all steps on a quadratic that grows steeper."""
    tx, params = TRANSFORMS[name](lib), inputs["params"]
    kind = name.split()[0]
    params = BEGINS.get(kind, lambda lib, params: params)(lib, params)
    state, first = tx.init(params), None
    for n in range(STEPS):
        steepness = 1 + 0.1 * n
        grads = tree_map(
            lambda a, w, goal, s=steepness: s * a * (w - goal),
            inputs["curvature"],
            getattr(params, "fast", params),
            inputs["target"],
        )
        grads["linear"]["bias"] = grads["linear"]["bias"] * SPOILT.get(name, {}).get(n, 1.0)
        updates, state = tx.update(grads, state, params)
        params = lib.apply_updates(params, updates)
        first = updates if first is None else first
    return getattr(first, "fast", first), ENDS.get(kind, lambda lib, params, state: params)(lib, params, state)


def _descend(lib: Any, tx: Any) -> Any:
    return lib.chain(tx, lib.scale(-0.1))


def _shrunk(lib: Any) -> Callable[[Any, Any], Any]:
    def f(updates: Any, params: Any) -> Any:
        norm = lib.global_norm(updates)
        return tree_map(lambda u, w: u / (1 + norm) + 0.1 * w, updates, params)

    return f


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    # Scaling
    "scale": lambda lib: lib.scale(-0.3),
    "scale_by_learning_rate": lambda lib: lib.scale_by_learning_rate(0.3),
    "scale_by_learning_rate schedule": lambda lib: lib.scale_by_learning_rate(lib.linear_schedule(0.5, 0.01, 9)),
    "scale_by_learning_rate upwards": lambda lib: lib.chain(
        lib.scale(-1.0), lib.scale_by_learning_rate(0.3, flip_sign=False)
    ),
    "scale_by_schedule": lambda lib: lib.scale_by_schedule(lib.exponential_decay(-0.4, 5, 0.7)),
    "scale_by_adam": lambda lib: _descend(lib, lib.scale_by_adam()),
    "scale_by_adam keywords": lambda lib: _descend(lib, lib.scale_by_adam(b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-2)),
    "scale_by_adam nesterov": lambda lib: _descend(lib, lib.scale_by_adam(0.85, 0.99, 1e-4, nesterov=True)),
    "scale_by_adam float32": lambda lib: _descend(lib, lib.scale_by_adam(mu_dtype=lib.float32)),
    "scale_by_amsgrad": lambda lib: _descend(lib, lib.scale_by_amsgrad()),
    "scale_by_amsgrad keywords": lambda lib: _descend(lib, lib.scale_by_amsgrad(0.8, 0.7, 1e-3, 1e-2)),
    "scale_by_amsgrad mean alone": lambda lib: _descend(lib, lib.scale_by_amsgrad(b2=0.7, bias_correction_nu=False)),
    "scale_by_amsgrad square alone": lambda lib: _descend(lib, lib.scale_by_amsgrad(b2=0.7, bias_correction_mu=False)),
    "scale_by_amsgrad uncorrected": lambda lib: _descend(
        lib, lib.scale_by_amsgrad(b2=0.7, bias_correction_mu=False, bias_correction_nu=False)
    ),
    "scale_by_amsgrad float32": lambda lib: _descend(lib, lib.scale_by_amsgrad(mu_dtype=lib.float32)),
    "scale_by_rms": lambda lib: _descend(lib, lib.scale_by_rms()),
    "scale_by_rms keywords": lambda lib: _descend(lib, lib.scale_by_rms(decay=0.7, eps=1e-2, initial_scale=0.3)),
    "scale_by_rms corrected": lambda lib: _descend(lib, lib.scale_by_rms(eps=1e-2, bias_correction=True)),
    "scale_by_rms eps outside": lambda lib: _descend(lib, lib.scale_by_rms(0.7, 1e-2, eps_in_sqrt=False)),
    "scale_by_rms eps outside, corrected": lambda lib: _descend(
        lib, lib.scale_by_rms(0.7, 1e-2, 0.1, eps_in_sqrt=False, bias_correction=True)
    ),
    "scale_by_stddev": lambda lib: _descend(lib, lib.scale_by_stddev()),
    "scale_by_stddev keywords": lambda lib: _descend(lib, lib.scale_by_stddev(decay=0.7, eps=1e-2, initial_scale=0.3)),
    "scale_by_stddev corrected": lambda lib: _descend(lib, lib.scale_by_stddev(eps=1e-2, bias_correction=True)),
    "scale_by_stddev eps outside": lambda lib: _descend(lib, lib.scale_by_stddev(0.7, 1e-2, eps_in_sqrt=False)),
    "scale_by_stddev eps outside, corrected": lambda lib: _descend(
        lib, lib.scale_by_stddev(0.7, 1e-2, 0.1, eps_in_sqrt=False, bias_correction=True)
    ),
    "scale_by_rss": lambda lib: _descend(lib, lib.scale_by_rss()),
    "scale_by_rss from zero": lambda lib: _descend(lib, lib.scale_by_rss(initial_accumulator_value=0.0, eps=1e-3)),
    "scale_by_sign": lambda lib: _descend(lib, lib.scale_by_sign()),
    "scale_by_lion": lambda lib: _descend(lib, lib.scale_by_lion()),
    "scale_by_lion keywords": lambda lib: _descend(lib, lib.scale_by_lion(b1=0.7, b2=0.8, mode="hard")),
    "scale_by_lion smooth": lambda lib: _descend(lib, lib.scale_by_lion(0.8, 0.9, mode="smooth", smooth_beta=3.0)),
    "scale_by_lion refined": lambda lib: _descend(lib, lib.scale_by_lion(0.5, 0.9, mode="refined")),
    "scale_by_lion float32": lambda lib: _descend(lib, lib.scale_by_lion(mu_dtype=lib.float32, mode="smooth")),
    "scale_by_trust_ratio": lambda lib: _descend(lib, lib.scale_by_trust_ratio()),
    "scale_by_trust_ratio keywords": lambda lib: _descend(
        lib, lib.scale_by_trust_ratio(min_norm=0.5, trust_coefficient=0.7, eps=0.1)
    ),
    "scale_by_trust_ratio of zeros": lambda lib: _descend(
        lib, lib.chain(lib.masked(lib.set_to_zero(), MATRICES), lib.scale_by_trust_ratio(eps=0.1))
    ),
    "trace": lambda lib: _descend(lib, lib.trace(0.9)),
    "trace nesterov": lambda lib: _descend(lib, lib.trace(decay=0.8, nesterov=True)),
    "trace float32": lambda lib: _descend(lib, lib.trace(0.9, accumulator_dtype=lib.float32)),
    "ema": lambda lib: _descend(lib, lib.ema(0.9)),
    "ema biased": lambda lib: _descend(lib, lib.ema(decay=0.8, debias=False)),
    # Clipping
    "ema float32": lambda lib: _descend(lib, lib.ema(0.9, accumulator_dtype=lib.float32)),
    "clip": lambda lib: _descend(lib, lib.clip(0.3)),
    "clip_by_global_norm": lambda lib: _descend(lib, lib.clip_by_global_norm(1.0)),
    "clip_by_global_norm inactive": lambda lib: _descend(lib, lib.clip_by_global_norm(100.0)),
    "clip_by_block_rms": lambda lib: _descend(lib, lib.clip_by_block_rms(0.4)),
    "clip_by_block_rms inactive": lambda lib: _descend(lib, lib.clip_by_block_rms(threshold=50.0)),
    "adaptive_grad_clip": lambda lib: _descend(lib, lib.adaptive_grad_clip(0.3)),
    "adaptive_grad_clip keywords": lambda lib: _descend(lib, lib.adaptive_grad_clip(clipping=0.5, eps=0.2, axis=0)),
    "adaptive_grad_clip last axis": lambda lib: _descend(lib, lib.adaptive_grad_clip(0.3, axis=-1)),
    "adaptive_grad_clip two axes": lambda lib: _descend(
        lib, lib.masked(lib.adaptive_grad_clip(0.3, axis=(0, 1)), MATRICES)
    ),
    "zero_nans": lambda lib: _descend(lib, lib.chain(lib.zero_nans(), lib.trace(0.9))),
    "keep_params_nonnegative": lambda lib: lib.chain(lib.sgd(0.3), lib.keep_params_nonnegative()),
    "centralize": lambda lib: _descend(lib, lib.centralize()),
    # Regularizing
    "add_decayed_weights": lambda lib: _descend(lib, lib.add_decayed_weights(0.2)),
    "add_decayed_weights none": lambda lib: _descend(lib, lib.add_decayed_weights()),
    "add_decayed_weights schedule": lambda lib: _descend(
        lib, lib.add_decayed_weights(lib.polynomial_schedule(0.5, 0.1, 2, 10))
    ),
    "add_decayed_weights mask": lambda lib: _descend(lib, lib.add_decayed_weights(weight_decay=0.2, mask=MATRICES)),
    "add_decayed_weights schedule, mask": lambda lib: _descend(
        lib, lib.add_decayed_weights(lib.cosine_decay_schedule(0.5, 8), mask=lambda params: MATRICES)
    ),
    # Combining
    "identity": lambda lib: _descend(lib, lib.identity()),
    "chain of chains": lambda lib: lib.chain(lib.chain(lib.trace(0.5), lib.clip(0.4)), lib.identity(), lib.scale(-0.2)),
    "named_chain": lambda lib: lib.named_chain(("momentum", lib.trace(0.7)), ("step", lib.scale(-0.1))),
    "masked": lambda lib: _descend(lib, lib.masked(lib.scale_by_adam(), MATRICES)),
    "masked prefix": lambda lib: _descend(
        lib, lib.masked(lib.clip_by_global_norm(0.5), {"linear": True, "heads": False, "filters": True})
    ),
    "masked function": lambda lib: _descend(lib, lib.masked(lib.trace(0.9), lambda params: MATRICES)),
    "partition": lambda lib: lib.partition(
        {"fast": lib.adam(0.2), "slow": lib.sgd(0.1, momentum=0.9), "held": lib.set_to_zero()}, LABELS
    ),
    "partition function": lambda lib: lib.partition(
        {"fast": lib.chain(lib.clip_by_global_norm(0.5), lib.sgd(0.2)), "slow": lib.sgd(0.1)},
        lambda params: {"linear": "fast", "heads": "slow", "filters": "fast"},
    ),
    "set_to_zero": lambda lib: lib.set_to_zero(),
    "freeze": lambda lib: lib.chain(lib.adamw(0.1, weight_decay=0.1), lib.freeze(MATRICES)),
    "stateless": lambda lib: _descend(lib, lib.stateless(_shrunk(lib))),
    "apply_if_finite": lambda lib: lib.apply_if_finite(lib.adam(0.1), 5),
    "apply_if_finite until it gives up": lambda lib: lib.apply_if_finite(
        lib.chain(lib.zero_nans(), lib.clip(1.0), lib.adam(0.1)), max_consecutive_errors=1
    ),
    "apply_if_finite lets a NaN through": lambda lib: lib.apply_if_finite(lib.sgd(0.1, momentum=0.9), 2),
    # Wrapping
    "multi_transform": lambda lib: lib.multi_transform(
        {"fast": lib.adam(0.2), "slow": lib.sgd(0.1), "held": lib.set_to_zero()}, LABELS
    ),
    "selective_transform": lambda lib: lib.selective_transform(lib.adamw(0.1, weight_decay=0.1), freeze_mask=MATRICES),
    "selective_transform of all": lambda lib: lib.selective_transform(
        lib.adam(0.1), freeze_mask={"linear": {"weight": False, "bias": False}, "heads": False, "filters": True}
    ),
    "flatten": lambda lib: lib.flatten(lib.adamw(0.1, weight_decay=0.2)),
    "flatten, clipped by the size of the vector": lambda lib: _descend(lib, lib.flatten(lib.clip_by_block_rms(0.3))),
    "with_extra_args_support": lambda lib: lib.with_extra_args_support(lib.adam(0.1)),
    "inject_hyperparams": lambda lib: lib.inject_hyperparams(lib.adamw)(learning_rate=0.1, weight_decay=0.3),
    "inject_hyperparams schedules": lambda lib: lib.inject_hyperparams(lib.adamw, static_args=("mask",))(
        lib.cosine_decay_schedule(0.2, 9), b1=lib.linear_schedule(0.95, 0.5, 10), b2=0.9, mask=lambda params: MATRICES
    ),
    "inject_hyperparams float32": lambda lib: lib.inject_hyperparams(lib.sgd, "nesterov", lib.float32)(
        0.25, momentum=0.75, nesterov=True
    ),
    "MultiSteps": lambda lib: lib.MultiSteps(
        lib.adamw(0.2), 3, accumulator_dtype=lib.float64
    ).gradient_transformation(),
    "MultiSteps sum": lambda lib: lib.chain(
        lib.clip(0.5),
        lib.MultiSteps(
            lib.sgd(0.05, momentum=0.9), 2, use_grad_mean=False, accumulator_dtype=lib.float64
        ).gradient_transformation(),
    ),
    "MultiSteps float32": lambda lib: lib.MultiSteps(
        lib.sgd(0.1), 4, accumulator_dtype=lib.float32
    ).gradient_transformation(),
    "MultiSteps on a schedule": lambda lib: lib.MultiSteps(
        lib.sgd(lib.linear_schedule(0.3, 0.1, 4)), lambda count: 1 + count % 3, accumulator_dtype=lib.float64
    ).gradient_transformation(),
    "MultiSteps skips what is not finite": lambda lib: lib.MultiSteps(
        lib.adam(0.1), 2, should_skip_update_fn=lib.skip_not_finite, accumulator_dtype=lib.float64
    ).gradient_transformation(),
    "MultiSteps skips what is large": lambda lib: lib.MultiSteps(
        lib.sgd(0.2),
        2,
        should_skip_update_fn=functools.partial(lib.skip_large_updates, max_squared_norm=9.0),
        accumulator_dtype=lib.float64,
    ).gradient_transformation(),
    "apply_every": lambda lib: lib.chain(lib.sgd(0.1, momentum=0.5), lib.apply_every(3)),
    "apply_every of one": lambda lib: lib.chain(lib.sgd(0.1), lib.apply_every()),
    "conditionally_transform": lambda lib: _descend(
        lib, lib.conditionally_transform(lib.trace(0.9), lambda step: step % 3 != 1)
    ),
    "conditionally_transform, asking nothing more": lambda lib: _descend(
        lib, lib.conditionally_transform(lib.ema(0.5), lambda step, **extra: step >= 5, forward_extra_args=True)
    ),
    "conditionally_mask": lambda lib: lib.conditionally_mask(lib.adam(0.2), lambda step: step % 2 == 0),
    "lookahead": lambda lib: lib.lookahead(lib.sgd(0.2, momentum=0.9), 4, 0.5),
    "lookahead reset": lambda lib: lib.lookahead(lib.adam(0.2), sync_period=3, slow_step_size=0.7, reset_state=True),
    "schedule_free": lambda lib: lib.schedule_free(
        lib.sgd(lib.warmup_constant_schedule(0.0, 0.3, 4)),
        lib.warmup_constant_schedule(0.0, 0.3, 4),
        b1=0.8,
        weight_lr_power=1.0,
    ),
    "schedule_free float32": lambda lib: lib.schedule_free(lib.sgd(0.3), 0.3, state_dtype=lib.float32),
    "schedule_free_sgd": lambda lib: lib.schedule_free_sgd(0.3),
    "schedule_free_sgd keywords": lambda lib: lib.schedule_free_sgd(
        0.3, warmup_steps=3, b1=0.95, weight_decay=0.2, weight_lr_power=1.5
    ),
    "schedule_free_adamw": lambda lib: lib.schedule_free_adamw(),
    "schedule_free_adamw keywords": lambda lib: lib.schedule_free_adamw(
        0.1, warmup_steps=5, b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.1, weight_lr_power=3.0
    ),
    "sam": lambda lib: lib.sam(lib.sgd(0.2, momentum=0.5), lib.sgd(0.05)),
    "sam of three": lambda lib: lib.sam(lib.adam(0.2), lib.adam(0.02), sync_period=3),
    "sam without reset": lambda lib: lib.sam(
        lib.sgd(0.2), lib.sgd(0.03, momentum=0.9), sync_period=4, reset_state=False
    ),
    "monitor": lambda lib: lib.chain(
        lib.sgd(0.1),
        lib.monitor(
            {
                "norm": lib.global_norm,
                "mean": lib.measure_with_ema(lib.global_norm, 0.9),
                "raw": lib.measure_with_ema(lib.global_norm, decay=0.5, debias=False),
            }
        ),
    ),
    "snapshot": lambda lib: lib.chain(
        lib.sgd(0.1), lib.snapshot("norm", lib.global_norm), lib.clip_by_global_norm(0.1)
    ),
    # Optimizers
    "sgd": lambda lib: lib.sgd(0.3),
    "sgd momentum": lambda lib: lib.sgd(learning_rate=0.1, momentum=0.9),
    "sgd nesterov": lambda lib: lib.sgd(0.1, momentum=0.8, nesterov=True),
    "sgd nesterov, float32": lambda lib: lib.sgd(0.1, 0.8, True, lib.float32),
    "sgd schedule": lambda lib: lib.sgd(lib.warmup_cosine_decay_schedule(0.01, 0.4, 3, 10, 0.02), momentum=0.5),
    "adam": lambda lib: lib.adam(0.1),
    "adam keywords": lambda lib: lib.adam(learning_rate=0.1, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-3),
    "adam nesterov": lambda lib: lib.adam(lib.constant_schedule(0.1), nesterov=True),
    "adamw": lambda lib: lib.adamw(0.1),
    "adamw keywords": lambda lib: lib.adamw(0.1, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-3, weight_decay=0.3),
    "adamw mask": lambda lib: lib.adamw(0.1, weight_decay=0.3, mask=MATRICES),
    "adamw float32": lambda lib: lib.adamw(0.1, mu_dtype=lib.float32, weight_decay=0.3),
    "adamw nesterov, schedules": lambda lib: lib.adamw(
        lib.warmup_constant_schedule(0.0, 0.1, 5),
        weight_decay=lib.piecewise_constant_schedule(0.5, {3: 0.5, 8: 0.1}),
        mask=lambda params: MATRICES,
        nesterov=True,
    ),
    "nadamw": lambda lib: lib.nadamw(0.1),
    "nadamw keywords": lambda lib: lib.nadamw(0.1, b1=0.8, weight_decay=0.2, mask=MATRICES),
    "amsgrad": lambda lib: lib.amsgrad(0.1),
    "amsgrad keywords": lambda lib: lib.amsgrad(
        0.1, b1=0.8, b2=0.7, eps=1e-3, eps_root=1e-3, bias_correction_mu=False, bias_correction_nu=False
    ),
    "lion": lambda lib: lib.lion(0.05),
    "lion keywords": lambda lib: lib.lion(0.05, b1=0.7, b2=0.8, weight_decay=0.5, mask=MATRICES),
    "rmsprop": lambda lib: lib.rmsprop(0.05),
    "rmsprop keywords": lambda lib: lib.rmsprop(0.05, decay=0.7, eps=1e-2, initial_scale=0.2),
    "rmsprop eps outside": lambda lib: lib.rmsprop(0.05, eps=1e-2, eps_in_sqrt=False),
    "rmsprop centered": lambda lib: lib.rmsprop(0.05, centered=True),
    "rmsprop momentum": lambda lib: lib.rmsprop(0.05, momentum=0.8),
    "rmsprop nesterov, centered, corrected": lambda lib: lib.rmsprop(
        lib.linear_schedule(0.05, 0.01, 10),
        eps=1e-2,
        initial_scale=0.1,
        centered=True,
        momentum=0.8,
        nesterov=True,
        bias_correction=True,
    ),
    "rmsprop corrected": lambda lib: lib.rmsprop(0.05, bias_correction=True),
    "adagrad": lambda lib: lib.adagrad(0.2),
    "adagrad keywords": lambda lib: lib.adagrad(0.2, initial_accumulator_value=0.0, eps=1e-4),
    "lamb": lambda lib: lib.lamb(0.05),
    "lamb keywords": lambda lib: lib.lamb(
        0.05, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-3, weight_decay=0.2, mask=MATRICES
    ),
    "a whole chain": lambda lib: lib.chain(
        lib.clip_by_global_norm(1.0),
        lib.scale_by_adam(b2=0.95),
        lib.add_decayed_weights(0.1, mask=MATRICES),
        lib.scale_by_learning_rate(
            lib.join_schedules([lib.linear_schedule(0.0, 0.2, 4), lib.exponential_decay(0.2, 3, 0.5)], [4])
        ),
    ),
    # Other preconditioners
    "scale_by_adamax": lambda lib: _descend(lib, lib.scale_by_adamax()),
    "scale_by_adamax keywords": lambda lib: _descend(lib, lib.scale_by_adamax(b1=0.8, b2=0.7, eps=1e-2)),
    "scale_by_belief": lambda lib: _descend(lib, lib.scale_by_belief()),
    "scale_by_belief keywords": lambda lib: _descend(lib, lib.scale_by_belief(b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-2)),
    "scale_by_belief nesterov": lambda lib: _descend(lib, lib.scale_by_belief(0.8, 0.95, 1e-2, 1e-3, nesterov=True)),
    "scale_by_yogi": lambda lib: _descend(lib, lib.scale_by_yogi()),
    "scale_by_yogi keywords": lambda lib: _descend(
        lib, lib.scale_by_yogi(b1=0.8, b2=0.9, eps=1e-2, eps_root=1e-2, initial_accumulator_value=0.3)
    ),
    "scale_by_radam": lambda lib: _descend(lib, lib.scale_by_radam()),
    "scale_by_radam keywords": lambda lib: _descend(
        lib, lib.scale_by_radam(b1=0.8, b2=0.95, eps=1e-2, eps_root=1e-2, threshold=4.0)
    ),
    "scale_by_radam nesterov": lambda lib: _descend(lib, lib.scale_by_radam(0.8, 0.99, threshold=8.0, nesterov=True)),
    "scale_by_radam that never divides": lambda lib: _descend(lib, lib.scale_by_radam(b2=0.5)),
    "scale_by_adan": lambda lib: _descend(lib, lib.scale_by_adan()),
    "scale_by_adan keywords": lambda lib: _descend(
        lib, lib.scale_by_adan(b1=0.8, b2=0.6, b3=0.9, eps=1e-2, eps_root=1e-3)
    ),
    "scale_by_adadelta": lambda lib: lib.chain(lib.scale_by_adadelta(), lib.scale(-1.0)),
    "scale_by_adadelta keywords": lambda lib: lib.chain(lib.scale_by_adadelta(rho=0.7, eps=1e-2), lib.scale(-1.0)),
    "scale_by_novograd": lambda lib: _descend(lib, lib.scale_by_novograd()),
    "scale_by_novograd keywords": lambda lib: _descend(
        lib, lib.scale_by_novograd(b1=0.8, b2=0.5, eps=1e-2, eps_root=1e-2, weight_decay=0.1)
    ),
    # A factor that rounds nothing: the updates of optax are in float32 here, and so are steps along them.
    "scale_by_novograd float32": lambda lib: lib.chain(lib.scale_by_novograd(mu_dtype=lib.float32), lib.scale(-0.125)),
    "scale_by_sm3": lambda lib: _descend(lib, lib.scale_by_sm3()),
    "scale_by_sm3 keywords": lambda lib: _descend(lib, lib.scale_by_sm3(b1=0.7, b2=0.9, eps=1e-2)),
    "scale_by_param_block_norm": lambda lib: _descend(lib, lib.scale_by_param_block_norm()),
    "scale_by_param_block_norm keywords": lambda lib: _descend(lib, lib.scale_by_param_block_norm(min_scale=1.5)),
    "scale_by_param_block_rms": lambda lib: _descend(lib, lib.scale_by_param_block_rms()),
    "scale_by_param_block_rms keywords": lambda lib: _descend(lib, lib.scale_by_param_block_rms(min_scale=0.6)),
    "scale_by_optimistic_gradient": lambda lib: _descend(lib, lib.scale_by_optimistic_gradient()),
    "scale_by_optimistic_gradient keywords": lambda lib: _descend(
        lib, lib.scale_by_optimistic_gradient(alpha=0.7, beta=0.4)
    ),
    "scale_by_rprop": lambda lib: lib.chain(lib.scale_by_rprop(0.1), lib.scale(-1.0)),
    "scale_by_rprop keywords": lambda lib: lib.chain(
        lib.scale_by_rprop(learning_rate=0.2, eta_minus=0.3, eta_plus=1.7, min_step_size=0.05, max_step_size=0.4),
        lib.scale(-1.0),
    ),
    # Their optimizers
    "nadam": lambda lib: lib.nadam(0.1),
    "nadam keywords": lambda lib: lib.nadam(0.1, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-3),
    "adamax": lambda lib: lib.adamax(0.1),
    "adamax keywords": lambda lib: lib.adamax(lib.linear_schedule(0.2, 0.05, 9), b1=0.8, b2=0.7, eps=1e-2),
    "adamaxw": lambda lib: lib.adamaxw(0.1),
    "adamaxw keywords": lambda lib: lib.adamaxw(0.1, b1=0.8, b2=0.7, eps=1e-2, weight_decay=0.3, mask=MATRICES),
    "adabelief": lambda lib: lib.adabelief(0.1),
    "adabelief keywords": lambda lib: lib.adabelief(0.1, b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-2, nesterov=True),
    "yogi": lambda lib: lib.yogi(0.1),
    "yogi keywords": lambda lib: lib.yogi(0.1, b1=0.8, b2=0.9, eps=1e-2),
    "radam": lambda lib: lib.radam(0.1),
    "radam keywords": lambda lib: lib.radam(
        0.1, b1=0.8, b2=0.95, eps=1e-2, eps_root=1e-2, threshold=4.0, nesterov=True
    ),
    "novograd": lambda lib: lib.novograd(0.1),
    "novograd keywords": lambda lib: lib.novograd(0.1, b1=0.8, b2=0.5, eps=1e-2, eps_root=1e-2, weight_decay=0.1),
    "adan": lambda lib: lib.adan(0.1),
    "adan keywords": lambda lib: lib.adan(
        0.1, b1=0.8, b2=0.6, b3=0.9, eps=1e-2, eps_root=1e-3, weight_decay=0.2, mask=MATRICES
    ),
    "adadelta": lambda lib: lib.adadelta(1.0),
    "adadelta keywords": lambda lib: lib.adadelta(
        lib.linear_schedule(1.0, 0.2, 9), rho=0.7, eps=1e-2, weight_decay=0.2, weight_decay_mask=MATRICES
    ),
    "sm3": lambda lib: lib.sm3(0.3),
    "sm3 keywords": lambda lib: lib.sm3(0.3, momentum=0.5),
    "optimistic_adam": lambda lib: lib.optimistic_adam(0.1),
    "optimistic_adam keywords": lambda lib: lib.optimistic_adam(
        0.1, 0.05, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-3, mu_dtype=lib.float32, nesterov=False
    ),
    "optimistic_adam_v2": lambda lib: lib.optimistic_adam_v2(0.1),
    "optimistic_adam_v2 keywords": lambda lib: lib.optimistic_adam_v2(
        lib.linear_schedule(0.1, 0.02, 9), alpha=0.7, beta=0.4, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-3, nesterov=False
    ),
    "sign_sgd": lambda lib: lib.sign_sgd(0.1),
    "signum": lambda lib: lib.signum(0.1),
    "signum keywords": lambda lib: lib.signum(lib.linear_schedule(0.1, 0.02, 9), 0.6, lib.float32),
    "rprop": lambda lib: lib.rprop(0.1),
    "rprop keywords": lambda lib: lib.rprop(0.2, eta_minus=0.3, eta_plus=1.7, min_step_size=0.05, max_step_size=0.4),
    "lars": lambda lib: lib.lars(0.1),
    "lars keywords": lambda lib: lib.lars(
        0.1,
        weight_decay=0.2,
        weight_decay_mask=MATRICES,
        trust_coefficient=0.1,
        eps=0.05,
        trust_ratio_mask=lambda params: MATRICES,
        momentum=0.7,
        nesterov=True,
    ),
    "fromage": lambda lib: lib.fromage(0.1),
    "fromage schedule": lambda lib: lib.fromage(lib.linear_schedule(0.3, 0.05, 9), min_norm=0.4),
    "optimistic_gradient_descent": lambda lib: lib.optimistic_gradient_descent(0.1),
    "optimistic_gradient_descent keywords": lambda lib: lib.optimistic_gradient_descent(0.1, alpha=0.7, beta=0.4),
}

#: What parameters a row begins with, by the first word of its name.
BEGINS: dict[str, Callable[[Any, Any], Any]] = {
    "lookahead": lambda lib, params: lib.LookaheadParams.init_synced(params),
}
#: What is compared at the end of a row, from library, parameters and state, by the first word of its name.
ENDS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "lookahead": lambda lib, params, state: params._asdict(),
    **{
        name: lambda lib, params, state: {"at": params, "mean": lib.schedule_free_eval_params(state, params)}
        for name in ("schedule_free", "schedule_free_sgd", "schedule_free_adamw")
    },
    "inject_hyperparams": lambda lib, params, state: {
        "params": params,
        "rate": state.hyperparams["learning_rate"] + 0 * params["linear"]["bias"][0],  # In float64.
    },
    "monitor": lambda lib, params, state: {"params": params, "measured": state[1].measurements},
    "snapshot": lambda lib, params, state: {"params": params, "measured": state[1].measurement},
}

#: Rows in which optax computes in float32, in part.
ROUNDED = {
    "schedule_free float32": "the average of points in float32",
    "schedule_free_sgd keywords": "the warm-up, at a count in int32",
    "schedule_free_adamw keywords": "the warm-up, at a count in int32",
}

#: Factors on the gradient of the bias, by row and step.
SPOILT: dict[str, dict[int, float]] = {
    "zero_nans": {3: NAN, 4: NAN},
    "apply_if_finite": {2: INF, 3: NAN, 4: NAN, 9: -INF},
    "apply_if_finite until it gives up": {2: NAN, 3: INF, 4: NAN, 5: NAN, 9: NAN},
    "apply_if_finite lets a NaN through": {7: NAN, 8: NAN, 9: NAN},
    "MultiSteps skips what is not finite": {0: NAN, 4: INF, 5: -INF, 9: NAN},
    "MultiSteps skips what is large": {2: 100.0, 3: NAN, 8: 50.0},
}

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda lib: lib.constant_schedule(0.3),
    "linear": lambda lib: lib.linear_schedule(1.0, 0.1, 20),
    "linear upwards, late": lambda lib: lib.linear_schedule(0.1, 2.0, transition_steps=9, transition_begin=7),
    "linear in no step": lambda lib: lib.linear_schedule(0.7, 0.1, 0),
    "linear begun before 0": lambda lib: lib.linear_schedule(1.0, 0.0, 10, transition_begin=-4),
    "polynomial square": lambda lib: lib.polynomial_schedule(1.0, 0.1, 2, 20),
    "polynomial root, late": lambda lib: lib.polynomial_schedule(
        0.2, 1.0, power=0.5, transition_steps=15, transition_begin=4
    ),
    "polynomial in no step": lambda lib: lib.polynomial_schedule(0.7, 0.1, 3, 0),
    "exponential": lambda lib: lib.exponential_decay(1.0, 5, 0.7),
    "exponential staircase, late": lambda lib: lib.exponential_decay(1.0, 6, 0.5, transition_begin=3, staircase=True),
    "exponential down to a bound": lambda lib: lib.exponential_decay(1.0, 5, 0.5, end_value=0.1),
    "exponential up to a bound": lambda lib: lib.exponential_decay(0.1, 4, 2.0, 2, end_value=5.0),
    "exponential below its bound": lambda lib: lib.exponential_decay(0.1, 4, 0.5, 5, end_value=0.3),
    "exponential of rate 0": lambda lib: lib.exponential_decay(0.4, 4, 0.0),
    "exponential in no step": lambda lib: lib.exponential_decay(0.4, 0, 0.5, end_value=0.1),
    "exponential begun before 0": lambda lib: lib.exponential_decay(0.4, 4, 0.5, transition_begin=-2),
    "piecewise": lambda lib: lib.piecewise_constant_schedule(1.0, {5: 0.5, 20: 0.1, 30: 4.0}),
    "piecewise out of order": lambda lib: lib.piecewise_constant_schedule(0.3, {20: 0.1, 0: 3.0, 5: 0.0}),
    "piecewise without pieces": lambda lib: lib.piecewise_constant_schedule(0.3),
    "cosine": lambda lib: lib.cosine_decay_schedule(1.0, 20),
    "cosine to a share": lambda lib: lib.cosine_decay_schedule(0.4, decay_steps=33, alpha=0.1),
    "cosine squared": lambda lib: lib.cosine_decay_schedule(2.0, 17, alpha=0.05, exponent=2.0),
    "cosine of one step": lambda lib: lib.cosine_decay_schedule(2.0, 1),
    "warmup_constant": lambda lib: lib.warmup_constant_schedule(0.1, 1.0, 8),
    "warmup_constant at once": lambda lib: lib.warmup_constant_schedule(0.1, 1.0, 0),
    "warmup_cosine": lambda lib: lib.warmup_cosine_decay_schedule(0.0, 1.0, 10, 30),
    "warmup_cosine keywords": lambda lib: lib.warmup_cosine_decay_schedule(
        init_value=0.2, peak_value=0.9, warmup_steps=7, decay_steps=29, end_value=0.05, exponent=1.5
    ),
    "warmup_cosine without warm-up": lambda lib: lib.warmup_cosine_decay_schedule(0.0, 1.0, 0, 25, 0.1),
    "warmup_cosine to a peak of 0": lambda lib: lib.warmup_cosine_decay_schedule(1.0, 0.0, 5, 10, 0.1),
    "join of three": lambda lib: lib.join_schedules(
        [lib.linear_schedule(0.0, 1.0, 5), lib.constant_schedule(0.8), lib.cosine_decay_schedule(0.5, 10, 0.1)], [5, 15]
    ),
    "join of one": lambda lib: lib.join_schedules([lib.exponential_decay(1.0, 5, 0.7)], []),
    "join of joins": lambda lib: lib.join_schedules(
        [lib.warmup_cosine_decay_schedule(0.0, 1.0, 3, 9), lib.polynomial_schedule(0.5, 0.0, 2, 9, 2)], [12]
    ),
}

#: From a library, parameters and a second tree like them to a projection. Where optax takes numbers for the bounds of
#: a single tensor alone, and leaves the sphere where an entry is zero, the rows stay on its side.
PROJECTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "non_negative": lambda lib, w, a: lib.projection_non_negative(w),
    "box": lambda lib, w, a: lib.projection_box(w["heads"], -0.2, 0.7),
    "box of trees": lambda lib, w, a: lib.projection_box(w, a, tree_map(lambda x: x + 0.3, a)),
    "hypercube": lambda lib, w, a: lib.projection_hypercube(w["heads"]),
    "hypercube of a scale": lambda lib, w, a: lib.projection_hypercube(w["heads"], scale=0.4),
    "simplex": lambda lib, w, a: lib.projection_simplex(w),
    "simplex of a scale": lambda lib, w, a: lib.projection_simplex(w, 7.5),
    "l1_sphere": lambda lib, w, a: lib.projection_l1_sphere(w),
    "l1_sphere outwards": lambda lib, w, a: lib.projection_l1_sphere(a, scale=100.0),
    "l1_ball": lambda lib, w, a: lib.projection_l1_ball(w),
    "l1_ball of a scale": lambda lib, w, a: lib.projection_l1_ball(w, 5.0),
    "l1_ball inside": lambda lib, w, a: lib.projection_l1_ball(w, scale=100.0),
    "l2_sphere": lambda lib, w, a: lib.projection_l2_sphere(w),
    "l2_sphere outwards": lambda lib, w, a: lib.projection_l2_sphere(w, scale=100.0),
    "l2_ball": lambda lib, w, a: lib.projection_l2_ball(w),
    "l2_ball inside": lambda lib, w, a: lib.projection_l2_ball(w, scale=100.0),
    "linf_ball": lambda lib, w, a: lib.projection_linf_ball(w),
    "linf_ball of a scale": lambda lib, w, a: lib.projection_linf_ball(w, scale=0.3),
    "vector": lambda lib, w, a: lib.projection_vector(w, a),
    "hyperplane": lambda lib, w, a: lib.projection_hyperplane(w, a, 2.0),
    "hyperplane by name": lambda lib, w, a: lib.projection_hyperplane(x=w, a=a, b=-1.0),
    "halfspace": lambda lib, w, a: lib.projection_halfspace(w, a, -3.0),
    "halfspace inside": lambda lib, w, a: lib.projection_halfspace(x=w, a=a, b=100.0),
}
