"""Random numbers of members: each is a function of the member's key, the step, the call that draws it, and its place.

`vmap` draws the numbers of all its members at once, so that those of one depend on who else is there. While a `Draws`
is entered, what torch draws comes from the key instead, for all functions in the table at the end: a member draws the
same numbers alone and among others, in eager and in compiled code. All else, also inside of a `vmap` of the user's and
by a generator of the user's, is drawn by torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, get_overridable_functions

from funcreg.core.ranges import concrete
from funcreg.core.rounding import mixed, shifted, signed, words
from funcreg.core.undocumented import count_maps, is_batched, is_compiling

#: What tells one call of a step from the next.
_CALL = signed(0xD1B54A32D192ED03)
#: What alpha dropout puts where it drops: the value that SELU tends to, far to the left.
_SATURATED = -1.7580993408473766


class Draws(TorchFunctionMode):
    """A context in which torch draws the numbers of one member at one step.

    Args:
        key: Key of the member, a 0-dim tensor of int64.
        step: Number of the step, a 0-dim tensor of an integer. A context for the same step draws the same numbers.
    """

    def __init__(self, key: Tensor, step: Tensor) -> None:
        super().__init__()
        self._key, self._step, self.calls, self._skipped = mixed(key), step, 0, 0
        self._maps = 0
        self.functions: set[Callable[..., Any]] = set()  # That have drawn,
        self._inside: set[Callable[..., Any]] = set()  # and those by which torch drew, inside of another `vmap`.
        self.by_generators = False  # Whether torch drew by a generator of the user's.

    def __enter__(self) -> Draws:
        self._maps = 0 if is_compiling() else count_maps()
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {name: x for name, x in (kwargs or {}).items() if name != "generator" or x is not None}
        if func in _FRESH:
            return self._own(func(*args, **kwargs))
        drawing, calls = _DRAWING.get(func), self.calls
        if drawing is not None and not is_compiling() and count_maps() > self._maps:
            self._inside.add(func)  # Of members of its own, each of which draws others.
            return func(*args, **kwargs)
        if drawing is None:
            # The method is the one that compilers cannot read inside of such a context.
            func = torch.unflatten if getattr(func, "__name__", "") == "unflatten" else func
            found = func(*args, **kwargs)
        else:
            found = drawing(self, func)(*args, **kwargs)
        if self.calls > calls:
            self.functions.add(func)
        self.by_generators |= self.calls == calls and isinstance(kwargs.get("generator"), torch.Generator)
        return found

    def _own(self, made: Tensor) -> Tensor:
        """Memory that was made without numbers, as the member's own: what it draws may be written there."""
        if is_compiling() or count_maps() > self._maps or not is_batched(self._key) or made.layout != torch.strided:
            return made
        return torch.where(self._key == 0, made, made)

    def not_compiled(self) -> list[str]:
        """Names of functions that have drawn, and that compilers call without asking this context, or when not to."""
        asked = {func for functions in get_overridable_functions().values() for func in functions}
        return [func.__name__ for func in (*self.functions, *self._inside) if func not in asked or func in self._inside]

    def skip(self) -> None:
        """Leave out the numbers of a call."""
        self._skipped += 1

    def words(self, shape: Sequence[int], device: Any, extra: int = 0) -> Tensor:
        """A word of 64 bits for each entry, others at each call."""
        self.calls += 1
        key = mixed(self._key + signed((_CALL * (self.calls + self._skipped) + extra) % 2**64))
        (found,) = words(key, self._step, torch.empty(shape, device=device))
        return found

    def uniform(self, shape: Sequence[int], device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers from 0 to below 1."""
        digits = round(-math.log2(torch.finfo(dtype).eps)) + 1  # As many as it has: no number is rounded to 1.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (shifted(self.words(shape, device), 64 - digits).to(wide) * 2.0**-digits).to(dtype)

    def inside(self, shape: Sequence[int], device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers above 0 and below 1, in float64 or float32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        half = torch.finfo(wide).eps / 4  # Of the distance between two uniform numbers, away from 0 and 1.
        return (self.uniform(shape, device, wide) + half).clamp(max=1 - 2 * half)

    def normal(self, shape: Sequence[int], device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers."""
        return (math.sqrt(2) * torch.erfinv(2 * self.inside(shape, device, dtype) - 1)).to(dtype)

    def exponential(self, shape: Sequence[int], device: Any, dtype: torch.dtype) -> Tensor:
        """Exponential numbers of mean 1, none of which is 0."""
        return -torch.log1p(-self.inside(shape, device, dtype)).to(dtype)


# What is drawn instead: each of these makes, of a function of torch, one with its arguments


def _dropout(shape_of: Callable[[Tensor], Sequence[int]], alpha: bool = False) -> Callable[..., Any]:
    """A kind of dropout, which drops one entry of a shape as a whole."""

    def drawing(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
        def call(input: Tensor, p: float | Tensor = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            strange = input.layout is not torch.strided or not input.is_floating_point() or _is_no_share(p)
            if not training and isinstance(p, Tensor) and not strange:
                return func(input, 0.0, training, inplace)  # Which torch reads, and has no use for.
            if not training or strange or _is_none(draws, p):  # Some of it is an error of torch's.
                return func(input, p, training, inplace)
            shape = [*shape_of(input), *[1] * (input.ndim - len(shape_of(input)))]
            # Of all words, which are signed, the least are dropped.
            kept = draws.words(shape, input.device) >= _threshold(p, input.device)
            p, inverse = _share(p, input)
            if alpha:
                scale = (inverse / (1 + p * _SATURATED**2)) ** 0.5
                found = scale * torch.where(kept, input, _SATURATED) - scale * p * _SATURATED
            else:
                found = torch.where(kept, input * inverse, 0.0 * inverse)
            found = found.to(input.dtype)
            return input.copy_(found) if inplace else found

        return call

    return drawing


def _share(p: float | Tensor, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """A share as numbers of a tensor are multiplied by it, and one over what is left."""
    if not isinstance(p, Tensor):
        return p, 1 / (1 - p) if p < 1 else 0.0
    rest, dtype = 1 - p, torch.promote_types(like.dtype, torch.float32)
    p, rest = p.to(like.device, dtype), rest.to(like.device, dtype)
    inverse = torch.where(rest > 0, 1 / torch.where(rest > 0, rest, 1.0), 0.0)
    return p, torch.where((p < 0) | (rest < 0), math.nan, inverse)  # What is no share is not hidden.


def _is_no_share(p: Any) -> bool:
    """Whether a number is known not to lie from 0 to 1."""
    known = concrete(p) if isinstance(p, Tensor) else p
    return (isinstance(p, Tensor) and p.ndim > 0) or (known is not None and not 0 <= known <= 1)


def _is_none(draws: Draws, p: float | Tensor) -> bool:
    """Whether a share is the number 0. Then it is as if numbers were drawn, and what comes after is what it is else."""
    none = not isinstance(p, Tensor) and p == 0
    if none:
        draws.skip()
    return none


def _threshold(p: float | Tensor, device: Any) -> int | Tensor:
    """The word below which a share of all words lies."""
    if not isinstance(p, Tensor):
        return min(round(p * 2**64) - 2**63, 2**63 - 1)
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    most = 2.0**63 * (1 - torch.finfo(wide).eps / 2)  # The last number before words end.
    found = (p.detach().to(device, wide) - 0.5) * 2.0**64
    return torch.where(p.to(device) >= 1, 2**63 - 1, found.clamp(max=most).to(torch.int64))


def _attention(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float | Tensor = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
        strange = attn_mask is not None and (is_causal or not (is_bool or attn_mask.is_floating_point()))
        if strange or _is_no_share(dropout_p) or _is_none(draws, dropout_p):
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask, is_bool = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril(), True
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf) if is_bool else logits + attn_mask
        masked = (logits == -math.inf).all(-1, keepdim=True)  # What sees nothing gets zeros.
        weights = torch.where(masked, 0.0, logits.softmax(-1)).to(value.dtype)
        return _dropped(draws, weights, dropout_p) @ value

    return call


def _heads(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    """Attention of `nn.MultiheadAttention`: torch computes its weights, of which some are dropped here."""
    names = (
        *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k"),
        *("bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias"),
    )

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        p, rest = given["dropout_p"], len(args) > len(names)
        longer = given["bias_v"] is not None or given["add_zero_attn"] or given.get("static_v") is not None
        if not given.get("training", True) or rest or longer or _is_no_share(p) or _is_none(draws, p):
            return func(*args, **kwargs)
        shown, mean = given.get("need_weights", True), given.get("average_attn_weights", True)
        _, weights = func(**{**given, "dropout_p": 0.0, "need_weights": True, "average_attn_weights": False})
        if not shown:  # What sees nothing gets zeros then, as torch computes it, else NaN.
            weights = torch.where(weights.isnan().all(-1, keepdim=True), 0.0, weights)
        weights = _dropped(draws, weights, p)  # ([batch,] heads, targets, sources)
        width = given["embed_dim_to_check"]
        own = given["v_proj_weight"] if given.get("use_separate_proj_weight") else given["in_proj_weight"][-width:]
        bias = given["in_proj_bias"]
        values = F.linear(given["value"], own, None if bias is None else bias[-width:])  # (sources, [batch,] width)
        values = values.unflatten(-1, (given["num_heads"], -1)).movedim(0, -2)  # ([batch,] heads, sources, ...)
        outputs = (weights @ values).movedim(-2, 0).flatten(-2)
        outputs = F.linear(outputs, given["out_proj_weight"], given["out_proj_bias"])
        return outputs, (weights.mean(-3) if mean else weights) if shown else None

    return call


def _dropped(draws: Draws, x: Tensor, p: float | Tensor) -> Tensor:
    return _dropout(lambda x: x.shape)(draws, F.dropout)(x, p)


def _made(kind: str, empty: Callable[..., Tensor]) -> Callable[..., Any]:
    """`rand`, `randn` and their like: torch makes the tensor, of the dtype, device and shape that were asked for."""

    def drawing(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Tensor:
            made = empty(*args, **options) if not options.keys() & {"generator", "out", "requires_grad"} else None
            if made is None or not made.is_floating_point():
                return func(*args, **options)
            return getattr(draws, kind)(made.shape, made.device, made.dtype)

        return call

    return drawing


def _integers(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    """`randint(low, high, size)`, of any generator by the seed that it began with."""

    def call(*args: Any, generator: Any = None, dtype: torch.dtype = torch.int64, **options: Any) -> Tensor:
        args = (*args, *[options.pop(name) for name in ("low", "high", "size") if name in options])
        if len(args) not in (2, 3) or not all([isinstance(x, int) for x in args[:-1]]) or options.keys() - {"device"}:
            return func(*args, generator=generator, dtype=dtype, **options)
        low, high = (0, args[0]) if len(args) == 2 else args[:2]
        if high <= low:  # An error of torch's.
            return func(*args, generator=generator, dtype=dtype, **options)
        extra = 0 if generator is None else signed(generator.initial_seed())
        return _between(draws, low, high, args[-1], options.get("device"), extra).to(dtype)

    return call


def _between(draws: Draws, low: int, high: int, shape: Sequence[int], device: Any, extra: int = 0) -> Tensor:
    """Whole numbers from one to below another."""
    bits = draws.words(shape, device, extra)
    return bits if high - low >= 2**63 else low + shifted(bits, 1) % (high - low)


def _integers_like(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    def call(input: Tensor, *args: Any, **options: Any) -> Tensor:
        if len(args) not in (1, 2) or not all([isinstance(x, int) for x in args]) or options or args[-1] <= 0:
            return func(input, *args, **options)
        low, high = (0, args[0]) if len(args) == 1 else args
        return _between(draws, low, high, input.shape, input.device).to(input.dtype)

    return call


def _order(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    def call(n: int, *args: Any, **options: Any) -> Tensor:
        if args or options.keys() - {"device"}:
            return func(n, *args, **options)
        return draws.words((n,), options.get("device")).argsort()

    return call


def _normal(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    """`normal(mean, std)`, one of which is a tensor, or `normal(mean, std, size)`."""

    def call(mean: Any, std: Any = 1.0, *args: Any, **options: Any) -> Tensor:
        tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
        if args or options or not tensors or not all([x.is_floating_point() for x in tensors]):
            if len(args) != 1 or tensors or options.keys() - {"dtype", "device"}:
                return func(mean, std, *args, **options)
            made = torch.empty(*args, **options)
            return mean + std * draws.normal(made.shape, made.device, made.dtype)
        dtype = tensors[0].dtype
        shape = torch.broadcast_shapes(*[x.shape for x in tensors])
        return (mean + std * draws.normal(shape, tensors[0].device, dtype)).detach().to(dtype)

    return call


def _flips(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    """`bernoulli(p)`, a tensor of probabilities, or `bernoulli(like, p)`."""

    def call(input: Tensor, p: float | None = None, **options: Any) -> Tensor:
        if options or not input.is_floating_point():
            return func(input, p, **options) if p is not None else func(input, **options)
        share = input.detach() if p is None else p
        return (draws.uniform(input.shape, input.device, input.dtype) < share).to(input.dtype)

    return call


def _chosen(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    """`multinomial` without replacement, or of one: the greatest quotients of weights and exponential numbers."""

    def call(input: Tensor, num_samples: int, replacement: bool = False, **options: Any) -> Tensor:
        if options or (replacement and num_samples != 1):
            return func(input, num_samples, replacement, **options)
        weights = input.detach() / draws.exponential(input.shape, input.device, input.dtype)
        return weights.topk(num_samples).indices

    return call


def _rrelu(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
    ) -> Tensor:
        if not input.is_floating_point():
            return func(input, lower, upper, training, inplace)
        share = draws.uniform(input.shape, input.device, input.dtype) if training else 0.5
        slopes = lower + (upper - lower) * share  # Of torch there is no map of either.
        found = torch.where(input > 0, input, input * slopes)
        return input.copy_(found) if inplace else found

    return call


def _gumbel(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    def call(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
        noise = -draws.exponential(logits.shape, logits.device, logits.dtype).log()
        soft = ((logits + noise) / tau).softmax(dim)
        if not hard:
            return soft
        ones = torch.zeros_like(logits).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
        return ones - soft.detach() + soft

    return call


def _filled(kind: str, of: Callable[..., Tensor]) -> Callable[..., Any]:
    """What fills a tensor in place with a function of numbers of some kind, and of what it was given."""

    def drawing(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **options: Any) -> Tensor:
            if "generator" in options or x.is_complex():
                return func(x, *args, **options)
            dtype = x.dtype if x.is_floating_point() else torch.float32
            if "from" in options:  # A word of Python's.
                options["start"] = options.pop("from")
            return _written(x, of(getattr(draws, kind)(x.shape, x.device, dtype), *args, **options), func.__name__)

        return call

    return drawing


def _initialized(method: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function of `nn.init` that does what a method of tensors does, but goes by a name of its own."""

    def drawing(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
            if "generator" in options:
                return func(tensor, *args, **options)
            with torch.no_grad():
                return _DRAWING[method](draws, method)(tensor, *args, *options.values())

        return call

    return drawing


def _log1p(x: float | Tensor) -> float | Tensor:
    return x.log1p() if isinstance(x, Tensor) else math.log1p(x)


def _kaiming(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.init.kaiming_uniform_`, which torch draws where this context does not see it."""

    def call(
        tensor: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: Any = "leaky_relu", **options: Any
    ) -> Tensor:
        if options or tensor.ndim < 2 or not tensor.numel() or mode not in ("fan_in", "fan_out"):
            return func(tensor, a, mode, nonlinearity, **options)  # Some of it is an error of torch's.
        fan = tensor[:, 0].numel() if mode == "fan_out" else tensor[0].numel()
        bound = math.sqrt(3 / fan) * nn.init.calculate_gain(nonlinearity, a)
        with torch.no_grad():
            return _DRAWING[Tensor.uniform_](draws, Tensor.uniform_)(tensor, -bound, bound)

    return call


def _integers_filled(draws: Draws, func: Callable[..., Any]) -> Callable[..., Any]:
    """`random_(high)` and `random_(low, high)`; without them, all numbers of a dtype, it is torch's."""

    def call(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if len(args) not in (1, 2) or not all([isinstance(each, int) for each in args]) or options:
            return func(x, *args, **options)
        low, high = (0, args[0]) if len(args) == 1 else args
        if high <= low:  # An error of torch's.
            return func(x, *args)
        return _written(x, _between(draws, low, high, x.shape, x.device), func.__name__)

    return call


def _written(x: Tensor, found: Tensor, name: str) -> Tensor:
    """A tensor, with a member's numbers written into it."""
    try:
        return x.copy_(found)
    except RuntimeError as error:  # Of vmap, or of grad where it comes from outside.
        raise RuntimeError(f"{name} writes random numbers of each member into one tensor for all of them") from error


_every = _dropout(lambda x: x.shape)
_DRAWING: dict[Any, Callable[[Draws, Callable[..., Any]], Callable[..., Any]]] = {
    F.dropout: _every,
    F.dropout1d: _dropout(lambda x: x.shape[:-1]),
    F.dropout2d: _dropout(lambda x: x.shape[:2]),
    F.dropout3d: _dropout(lambda x: x.shape[:-3]),
    F.alpha_dropout: _dropout(lambda x: x.shape, alpha=True),
    F.feature_alpha_dropout: _dropout(lambda x: x.shape[:2], alpha=True),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _heads,
    torch.rand: _made("uniform", torch.empty),
    torch.rand_like: _made("uniform", torch.empty_like),
    torch.randn: _made("normal", torch.empty),
    torch.randn_like: _made("normal", torch.empty_like),
    torch.randint: _integers,
    torch.randint_like: _integers_like,
    torch.randperm: _order,
    torch.normal: _normal,
    torch.bernoulli: _flips,
    Tensor.bernoulli: _flips,
    torch.multinomial: _chosen,
    Tensor.multinomial: _chosen,
    F.rrelu: _rrelu,
    F.gumbel_softmax: _gumbel,
    Tensor.normal_: _filled("normal", lambda z, mean=0.0, std=1.0: mean + std * z),
    Tensor.log_normal_: _filled("normal", lambda z, mean=1.0, std=2.0: (mean + std * z).exp()),
    Tensor.uniform_: _filled("uniform", lambda u, start=0.0, to=1.0: start + (to - start) * u),
    Tensor.bernoulli_: _filled("uniform", lambda u, p=0.5: u < p),
    Tensor.exponential_: _filled("exponential", lambda e, lambd=1.0: e / lambd),
    Tensor.geometric_: _filled("exponential", lambda e, p: (e / -_log1p(-p)).ceil()),
    Tensor.cauchy_: _filled("inside", lambda u, median=0.0, sigma=1.0: median + sigma * torch.tan(math.pi * (u - 0.5))),
    Tensor.random_: _integers_filled,
    nn.init.normal_: _initialized(Tensor.normal_),
    nn.init.uniform_: _initialized(Tensor.uniform_),
    nn.init.kaiming_uniform_: _kaiming,
}
#: What makes memory without numbers.
_FRESH = {torch.empty, torch.empty_like, Tensor.new_empty, Tensor.new}
