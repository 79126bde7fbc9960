r"""The step and the metric of each torch optimizer, read from its state after a step.

An optimizer moves a parameter from :math:`w` to :math:`w - \eta d / h`, where :math:`d` is a mean of gradients,
:math:`h` its denominators (none for SGD, :math:`\sqrt{\hat v} + \epsilon` for Adam) and :math:`\eta` the learning rate.
A proximal operator after it has to see the same :math:`h`, and :math:`\eta` times the sum of the weights in :math:`d`:
1 for Adam, (1 - dampening) / (1 - momentum) for a buffer. A rule says where these are found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from funcreg.core._typing import Scalar
from funcreg.core.construction import written
from funcreg.core.leafwise import widen
from funcreg.core.ranges import concrete

#: What an optimizer keeps of a parameter, and what is set for its param group.
Entries: TypeAlias = dict[str, Any]


class Rule(NamedTuple):
    """Where the step and the metric of an optimizer are found."""

    scalars: Callable[[Entries, Entries], tuple[Scalar, ...]]
    """From state and group to the step of a proximal operator, and to what `metric` takes."""
    source: Callable[[Tensor, Entries, Entries, Any], Tensor] | None = None
    """From parameter, state, group and note to the tensor that the metric is made of; None for no metric."""
    metric: Callable[..., Tensor] = lambda source: source
    """From that tensor and the other scalars to the metric."""
    counts: bool = False
    """Whether the scalars depend on the number of steps of a parameter."""
    buffers: bool = False
    """Whether a momentum buffer sums up what the metric has divided, so that the step is `gain` times as long."""
    note: Callable[[Tensor, Entries], Any] | None = None
    """From parameter and state to what has to be known from before a step."""


def _steps(state: Entries) -> Scalar:
    """The number of steps: a float, or a tensor where reading it would wait for a device."""
    steps = state["step"]
    if not isinstance(steps, Tensor):
        return steps
    if steps.device.type == "cpu":
        return steps.item()
    return steps if steps.device.type == "mps" else steps.double()  # No float64 there.


def _rate(group: Entries) -> Scalar:
    """The learning rate: a number where it is known, because the product with a strength is rounded in float32."""
    rate = group["lr"]
    if not isinstance(rate, Tensor) or rate.device.type != "cpu":
        return rate
    return rate.double() if rate.requires_grad or concrete(rate) is None else rate.item()


def known_number(rate: Any) -> Any:
    """A number, where it may be read without a wait for a device; else the tensor's identity."""
    if isinstance(rate, Tensor):
        return float(rate) if rate.device.type == "cpu" else id(rate)
    return rate


def buffered(group: Entries, before: Scalar | None) -> Scalar:
    """The sum of the weights of gradients in a momentum buffer after one more step.

    Args:
        group: The param group, whose momentum a scheduler may have changed.
        before: The sum one step before; None for what it is in the long run, which it stays unless momentum changes.
    """
    momentum, dampening = group["momentum"], group.get("dampening", 0.0)
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if isinstance(value, (int, float)) and value >= 1:
            raise ValueError(f"{name} is {value}; expected a number below 1, or the buffer comes to no mean gradient")
    return (1 - dampening) / (1 - momentum) if before is None else momentum * before + 1 - dampening


def gain(group: Entries, weights: Scalar) -> Scalar:
    """By how much a direction exceeds a gradient, with such a sum of weights in the buffer."""
    return 1 + group["momentum"] * weights if group.get("nesterov", False) else weights


def _adam(state: Entries, group: Entries) -> tuple[Scalar, ...]:
    return _rate(group), (1 - group["betas"][1] ** _steps(state)) ** -0.5, group["eps"]


def _nadam(state: Entries, group: Entries) -> tuple[Scalar, ...]:
    # Weights of a direction of gradient and mean, which sum to 1 only in the long run, of 6000 steps by default.
    (beta1, beta2), decay, steps = group["betas"], group["momentum_decay"], _steps(state)
    now, after = (beta1 * (1 - 0.5 * 0.96 ** (n * decay)) for n in (steps, steps + 1))
    product = state["mu_product"].double()
    product = product if isinstance(steps, Tensor) else product.item()
    weights = (1 - now) / (1 - product) + after * (1 - beta1**steps) / (1 - product * after)
    return _rate(group) * weights, (1 - beta2**steps) ** -0.5, group["eps"]


def _radam(state: Entries, group: Entries) -> tuple[Scalar, ...]:
    beta2, steps, lr = group["betas"][1], _steps(state), _rate(group)
    most, correction = 2 / (1 - beta2) - 1, 1 - beta2**steps
    length = most - 2 * steps * (1 - correction) / correction
    share = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
    if isinstance(share, Tensor):
        rectified = length > 5
        rate = torch.where(rectified, (share * correction).clamp(min=0).sqrt(), 1.0)
        return lr * rate, rectified.to(rate.dtype), group["eps"]
    return (lr * (share * correction) ** 0.5, 1.0, group["eps"]) if length > 5 else (lr, 0.0, group["eps"])


def _rmsprop(state: Entries, group: Entries) -> tuple[Scalar, ...]:
    return _rate(group), group["eps"]


def _spread(w: Tensor, state: Entries, group: Entries, note: Any) -> Tensor:
    """The mean square of RMSprop, or the variance if it is centered."""
    if not group["centered"]:
        return state["square_avg"]
    return widen(state["square_avg"]).addcmul(widen(state["grad_avg"]), widen(state["grad_avg"]), value=-1)


def _adagrad(state: Entries, group: Entries) -> tuple[Scalar, ...]:
    return _rate(group) / (1 + (_steps(state) - 1) * group["lr_decay"]), group["eps"]


def _adadelta(w: Tensor, state: Entries, group: Entries, note: Any) -> Tensor:
    return ((widen(state["square_avg"]) + group["eps"]) / (widen(note) + group["eps"])).sqrt()


def _adafactor_rate(state: Entries, group: Entries) -> tuple[Scalar, ...]:
    rate, most = _rate(group), _steps(state) ** -0.5
    if isinstance(rate, Tensor) or isinstance(most, Tensor):
        return (torch.minimum(*[torch.as_tensor(x, dtype=torch.float64) for x in (rate, most)]),)
    return (min(rate, most),)


def _adafactor(w: Tensor, state: Entries, group: Entries, note: Any) -> Tensor:
    least, floor = group["eps"]
    least = torch.finfo(w.dtype).eps if least is None else least
    if w.ndim > 1:
        row, column = widen(state["row_var"]), widen(state["col_var"])
        square = row @ column / row.mean(-2, keepdim=True).clamp(min=least)
    else:
        square = widen(state["variance"])
    root = square.clamp(min=least * least).sqrt()
    if w.grad is None:  # It shares groups with what has moved.
        return root / note.clamp(min=floor)
    clip = ((widen(w.grad) / root).square().mean().sqrt() / group["d"]).clamp(min=1.0)
    return root * (clip / note.clamp(min=floor))


def _size(w: Tensor, state: Entries) -> Tensor:
    """The root of the mean square."""
    return widen(w.detach()).square().mean().sqrt()


def _change(w: Tensor, state: Entries) -> Tensor:
    """The mean square of changes, which Adadelta divides by before it counts the next one in."""
    return state["acc_delta"].clone() if state else torch.zeros_like(w)


_root = lambda square, eps: square.sqrt() + eps
_corrected = lambda square, correction, eps: square.sqrt() * correction + eps  # A division would take as long again.
_rectified = lambda square, rectified, eps: rectified * (square.sqrt() + eps) + (1 - rectified)
_entry = lambda name: lambda w, state, group, note: state[name]
_square = lambda w, state, group, note: state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
_lr = lambda state, group: (_rate(group),)

RULES: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: Rule(_lr, buffers=True),
    torch.optim.Adam: Rule(_adam, _square, _corrected, counts=True),
    torch.optim.AdamW: Rule(_adam, _square, _corrected, counts=True),
    torch.optim.NAdam: Rule(_nadam, _entry("exp_avg_sq"), _corrected, counts=True),
    torch.optim.RAdam: Rule(_radam, _entry("exp_avg_sq"), _rectified, counts=True),
    torch.optim.Adamax: Rule(_lr, _entry("exp_inf")),
    torch.optim.RMSprop: Rule(_rmsprop, _spread, _root, buffers=True),
    torch.optim.Adagrad: Rule(_adagrad, _entry("sum"), _root, counts=True),
    torch.optim.Adadelta: Rule(_lr, _adadelta, note=_change),
    torch.optim.Adafactor: Rule(_adafactor_rate, _adafactor, counts=True, note=_size),
}

#: For a constraint, which holds after a step of any size.
OF_ANY_SIZE = Rule(lambda state, group: (0.0,))

#: Why others have no step that a proximal operator could follow.
REFUSED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "its curvature comes from differences of gradients between points, which a proximal operator "
    "after the step would move. For convex problems take minimize or fista, for others another optimizer",
    torch.optim.Rprop: "it follows the signs of gradients alone, and no strength of a penalty stands against a sign",
    torch.optim.ASGD: "its result is a mean over steps, ax, in which no entry stays zero. Take SGD",
    torch.optim.SparseAdam: "it moves, and keeps moments of, only the entries in a sparse gradient; rows that were not "
    "seen yet have no metric, and would become zero in the first step. Take SGD, or Adagrad with "
    "initial_accumulator_value=0.1",
}
if hasattr(torch.optim, "Muon"):
    REFUSED[torch.optim.Muon] = (
        "it follows an orthogonal matrix, in which the sizes of gradients, against which a penalty is weighed, are lost"
    )


#: Why nothing follows RMSprop with both centered=True and momentum.
RUNS_AWAY = (
    "RMSprop with centered=True divides by the spread of gradients, which vanishes where a penalty balances them, and "
    "its momentum keeps what was divided by it before: it runs away. Leave one of the two out"
)
#: Where an optimizer keeps what tells a copy of it that penalties are missing.
NOTE_COPY = "_funcreg_note_copy"


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, where a library has wrapped it in one that has no hooks of its own."""
    while not isinstance(vars(optimizer).get("state"), dict) and isinstance(
        getattr(optimizer, "optimizer", None), Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


def inner_optimizers(optimizer: Optimizer) -> list[str]:
    """The attributes of a wrapper, such as SAM, in which it holds the optimizers that move its parameters.

    A class whose step is torch's own takes its steps itself, whatever else it holds.
    """
    if steps_as_torch(type(optimizer)):
        return []
    params = lambda each: {id(w) for group in each.param_groups for w in group["params"]}
    return [name for name, each in held_optimizers(optimizer) if params(each) & params(optimizer)]


def held_optimizers(holder: Any) -> list[tuple[str, Optimizer]]:
    """The optimizers that a wrapper holds, and in which attributes."""
    found = []
    for name, held in vars(holder).items() if hasattr(holder, "__dict__") else ():
        several = isinstance(held, (list, tuple, dict))
        places = held.items() if isinstance(held, dict) else enumerate(held if several else [held])
        for place, each in places:
            if isinstance(each, Optimizer) and each is not holder:
                found.append((f"{name}[{place!r}]" if several else name, each))
    return found


def steps_as_torch(kind: type[Optimizer]) -> bool:
    """Whether the step of a class of optimizers is that of one of torch: whoever else may call steps in steps."""
    known = next((base for base in kind.__mro__ if base in RULES or base in REFUSED), None)
    return known is not None and inspect.unwrap(kind.step) is inspect.unwrap(known.step)


def rule_of(optimizer: Optimizer, metric: Callable[[Entries, Entries], Any] | None, projects: bool) -> Rule:
    """The rule for an optimizer, with the metric that a user gave, or an error that says why there is none.

    Args:
        optimizer: The optimizer.
        metric: From the state of a parameter and its group to the metric there.
        projects: Whether it is for a constraint, which holds after a step of any size.
    """
    kind = type(optimizer)
    known = next((base for base in kind.__mro__ if base in RULES or base in REFUSED), None)
    if known is torch.optim.LBFGS:
        raise ValueError(f"{kind.__name__} cannot be regularized: {REFUSED[known]}.")
    if metric is not None:
        _check_metric(metric)
        _check_rate(optimizer)
        return Rule(_lr, lambda w, state, group, note: _filled(w, metric(state, group)))
    if known is not None and not steps_as_torch(kind):
        reason = f"its step is not that of {known.__name__}, so that its metric is not known"
    elif known is None:
        reason = "its metric is not known"
    elif known is torch.optim.RMSprop and any([g["centered"] and g["momentum"] for g in optimizer.param_groups]):
        reason = RUNS_AWAY
    elif known in RULES:
        return RULES[known]
    else:
        reason = REFUSED[known]
    if projects:
        return OF_ANY_SIZE
    if kind.__module__.startswith("funcreg."):
        raise ValueError(
            "this optimizer has a chain of its own, into which the penalty belongs: prox_adam(lr, l1, strength=...) in "
            "place of adam(lr), or proximal(...) at its end. A constraint may be added to it."
        )
    names = ", ".join([base.__name__ for base in RULES])
    said = kind.__name__ if kind.__module__.startswith("torch.optim.") else f"{kind.__module__}.{kind.__name__}"
    raise ValueError(
        f"{said} is not one of the optimizers that a penalty can follow: {reason}. These are {names} of torch. Give "
        "metric=, a function of the state of a parameter and of its param group: by what the optimizer divides lr "
        "times a mean gradient (1.0 for plain descent). A constraint, such as max_norm, needs none."
    )


def _check_metric(metric: Any) -> None:
    """Raise a TypeError for what cannot be called with the state of a parameter and its param group."""
    expected = "expected a function of the state of a parameter and of its param group"
    if not callable(metric):
        always = f", as lambda state, group: {metric!r}" if isinstance(metric, (int, float)) else ""
        raise TypeError(f"metric is {metric!r}; {expected}{always}")
    try:
        inspect.signature(metric).bind({}, {})
    except TypeError as error:
        raise TypeError(f"metric cannot be called with two arguments: {error}; {expected}") from error
    except ValueError:  # Of some functions that are not written in Python nothing is known.
        return


def _check_rate(optimizer: Optimizer) -> None:
    """Raise an error for param groups that do not say by what a metric divides."""
    for i, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            held = ", ".join([name for name in group if name != "params"]) or "nothing"
            raise ValueError(
                f"param group {i} of {type(optimizer).__name__} has no 'lr', but {held}. A penalty is weighed by lr / "
                "metric: set group['lr'] = 1.0 in each group, and let metric return 1 / the size of a step."
            )


def _filled(w: Tensor, metric: Any) -> Tensor:
    """A metric that a user's function returned, as a tensor like the parameter."""
    expected = (
        f"expected a number of at least 0, or a tensor of them that broadcasts to {tuple(w.shape)}, the shape of a "
        "parameter"
    )
    if isinstance(metric, bool) or not isinstance(metric, (int, float, Tensor)):
        raise TypeError(f"metric returned {metric!r}; {expected}")
    known = concrete(metric)  # Numbers, and tensors that no device is waited for.
    if known is not None and not bool((torch.as_tensor(known) >= 0).all()):
        raise ValueError(f"metric returned {written(metric)}, which has negative numbers or NaN; {expected}")
    try:
        return torch.as_tensor(metric, dtype=widen(w).dtype, device=w.device).expand_as(w)
    except RuntimeError as error:
        raise ValueError(
            f"metric returned a tensor of shape {tuple(torch.as_tensor(metric).shape)}; {expected}"
        ) from error
