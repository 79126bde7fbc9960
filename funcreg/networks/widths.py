"""What layers say about their widths, made what their parameters are.

Each rule knows a kind of layer: PyTorch's own by their class, others by the attributes and children that make them
what they are, because libraries write the same layer under many names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from funcreg.core.wording import type_of
from funcreg.networks.attention import NarrowAttention, NarrowEncoder

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
#: Normalizations of channels, with statistics or without.
NORMS = (nn.modules.batchnorm._NormBase,)

#: Makes what a layer with new parameters says of its widths what these are; the second is the layer as it was.
Rule: TypeAlias = Callable[[Any, Any], None]


class Given(NamedTuple):
    """What a layer gave, and gives."""

    before: int
    now: int
    parts: int = 1  # In how many groups, each of which gives less; 1 if it lost whole groups, or has none.


class Place(NamedTuple):
    """A layer among the others."""

    name: str
    layer: Any  # With its new parameters.
    before: Any  # As it was.
    came: Sequence[Given]  # Of each layer before it.
    inside_heads: bool = False  # Whether a narrower attention has narrower heads, and not fewer of them.


def follow(place: Place) -> frozenset[str] | None:
    """Make what a layer says of its widths what its parameters are.

    Returns:
        The attributes that are right now, None if these are all that there are.

    Raises:
        ValueError: The parameters are of no layer of this kind.
    """
    kind = type(place.layer)
    for kinds, rule in _RULES:
        if isinstance(place.layer, kinds):
            rule(place)
            base = next(base for base in kind.__mro__ if base.__module__.startswith("torch."))
            return None if kind is base else _known(base)
    if not resized_itself(place):
        return frozenset(_of_attention(place))
    if kind.__module__.startswith("torch.nn.modules."):
        raise ValueError(
            f"{_shapes(place)} has another shape than in the module, and resized knows no way to change a "
            f"{kind.__name__}; its rules are for linear layers, convolutions, normalizations, embeddings, attention, "
            "recurrent layers and PReLU"
        )
    return frozenset([*_by_name(place), *_of_attention(place)])


def resized_itself(place: Place) -> bool:
    """Whether a parameter or buffer of the layer itself has another shape."""
    return bool(changes(place.layer, place.before, recurse=False))


def changes(layer: nn.Module, before: nn.Module, recurse: bool = True) -> list[tuple[str, Tensor, Tensor]]:
    """The parameters and buffers with another shape: their names, what they were and what they are."""
    new = tensors(layer, recurse)
    return [(name, x, new[name]) for name, x in tensors(before, recurse).items() if x.shape != new[name].shape]


def tensors(layer: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by their names, tied ones under each of them."""
    named = layer.named_parameters(recurse=recurse, remove_duplicate=False)
    return {**dict(named), **dict(layer.named_buffers(recurse=recurse, remove_duplicate=False))}


def gives(layer: Any) -> int:
    """The number of channels, features or units that a layer gives, 0 if it is unknown."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    return layer.nf if is_conv1d(layer) else 0


def gave_and_gives(before: Any, layer: Any) -> Given:
    """What a layer gave, and gives once its widths have followed."""
    narrower = isinstance(layer, CONVOLUTIONS) and layer.groups == before.groups and gives(layer) < gives(before)
    return Given(gives(before), gives(layer), layer.groups if narrower else 1)


def _known(kind: type) -> frozenset[str]:
    """The attributes of a class of PyTorch's own."""
    return frozenset([*getattr(kind, "__constants__", ()), "embed_dim", "kdim", "vdim", "num_heads", "head_dim"])


def _shapes(place: Place) -> str:
    """The first parameter of a layer that changed, for an error text."""
    own = changes(place.layer, place.before, recurse=False)[0][0]
    return f"'{place.name}.{own}'" if place.name else f"'{own}'"


def _of(place: Place, wanted: str = "weight") -> Tensor:
    """A parameter of a layer, or an error if it is computed from others."""
    w = place.layer._parameters.get(wanted)
    if w is None:
        raise ValueError(
            f"'{place.name}', {type_of(place.layer)}, has no parameter {wanted} of its own; is it "
            "parametrized or pruned? Call torch.nn.utils.parametrize.remove_parametrizations or prune.remove first."
        )
    return w


def _bias(place: Place, count: int) -> None:
    """Raise an error unless a layer that gives so many channels has as many biases."""
    bias = place.layer.bias
    if bias is not None and len(bias) != count:
        raise ValueError(
            f"the bias of '{place.name}' has {len(bias)} entries, and its weight gives {count} channels; expected as "
            "many. Does the family that names one of them name the other?"
        )


# PyTorch's own layers


def _linear(place: Place) -> None:
    place.layer.out_features, place.layer.in_features = _of(place).shape
    _bias(place, place.layer.out_features)


def _convolution(place: Place) -> None:
    layer, before = place.layer, place.before
    transposed = isinstance(layer, TRANSPOSED)
    first, second = _of(place).shape[:2]
    layer.groups = groups = _groups(place, first, second) if before.groups > 1 else 1
    counts = (second * groups, first) if transposed else (first, second * groups)
    layer.out_channels, layer.in_channels = counts
    _bias(place, layer.out_channels)


def _groups(place: Place, first: int, second: int) -> int:
    """The number of groups of a convolution with such a weight: fewer of them, or all, each of them narrower."""
    before, bias = place.before, place.layer.bias
    had, each = before.groups, before.weight.shape[0] // before.groups
    found = [first // each] if second == before.weight.shape[1] and first % each == 0 else []
    found += [had] if first % had == 0 and had not in found else []
    if not found:
        raise ValueError(
            f"'{place.name}.weight' has {first} rows, and belongs to a convolution of {had} groups of {each}; expected "
            f"whole groups, or as many rows in each. Along(0, size={each}) makes a group of a penalty of each group"
        )
    if isinstance(place.layer, TRANSPOSED):
        return next((n for n in found if bias is not None and n * second == len(bias)), found[0])
    # Both may fit the shape. What comes in tells them apart, and a wrong number is an error once the layer runs. What
    # gives less in each of as many groups is beside this one: after it, each group would take less here, too.
    width = _after(before.in_channels, [each for each in place.came if each.parts == 1 or each.parts % had])
    return next((n for n in found if n * second == width), found[0])


def _norm(place: Place) -> None:
    widths = {x.shape for x in tensors(place.layer, recurse=False).values() if x.ndim}
    if len(widths) > 1:
        raise ValueError(
            f"resized got another width for some of the parameters and buffers of '{place.name}'. Are its running "
            "statistics missing? Give them to remove_dead with the parameters: with_buffers(module)."
        )
    for (width,) in widths:
        place.layer.num_features = width


def _layer_norm(place: Place) -> None:
    own = list(tensors(place.layer, recurse=False).values())
    if any(x.shape != own[0].shape for x in own):
        raise ValueError(
            f"the weight and the bias of '{place.name}' have {own[0].numel()} and {own[1].numel()} entries; expected "
            "as many. Does the family that names one of them name the other?"
        )
    if own:
        place.layer.normalized_shape = tuple(own[0].shape)


def _group_norm(place: Place) -> None:
    layer, before = place.layer, place.before
    if layer.weight is None or layer.weight.shape == before.weight.shape:
        return
    width, each = len(layer.weight), before.num_channels // before.num_groups
    if before.num_groups > 1 and width % each:
        raise ValueError(
            f"'{place.name}.weight' has {width} entries, and belongs to a GroupNorm of {before.num_groups} groups of "
            f"{each} channels; expected whole groups, because the statistics of a part of one are others"
        )
    layer.num_channels, layer.num_groups = width, width // each if before.num_groups > 1 else 1
    _bias(place, width)


def _embedding(place: Place) -> None:
    layer = place.layer
    layer.num_embeddings, layer.embedding_dim = _of(place).shape
    if layer.padding_idx is not None and layer.padding_idx >= layer.num_embeddings:
        raise ValueError(
            f"'{place.name}' has padding_idx={layer.padding_idx} and {layer.num_embeddings} rows left; expected the "
            "row of padding among them"
        )


def _prelu(place: Place) -> None:
    place.layer.num_parameters = len(_of(place))


def _bilinear(place: Place) -> None:
    layer = place.layer
    layer.out_features, layer.in1_features, layer.in2_features = _of(place).shape
    _bias(place, layer.out_features)


_GATES = {"LSTM": 4, "GRU": 3}


def _recurrent(place: Place) -> None:
    layer = place.layer
    cell = isinstance(layer, nn.RNNCellBase)
    kind = type(layer).__name__.removesuffix("Cell") if cell else layer.mode
    ending = "" if cell else "_l0"
    into, across = _of(place, f"weight_ih{ending}"), _of(place, f"weight_hh{ending}")
    layer.input_size, layer.hidden_size = into.shape[1], across.shape[0] // _GATES.get(kind, 1)
    if not cell and layer.proj_size:
        layer.proj_size = across.shape[1]
        if layer.proj_size >= layer.hidden_size:
            raise ValueError(
                f"'{place.name}', an LSTM, is left {layer.hidden_size} hidden units and {layer.proj_size} projections "
                "of them; torch takes fewer projections than hidden units (proj_size < hidden_size). Let more hidden "
                "units stay, by a smaller strength for their family, or leave them as they are by layers="
            )
    expected = {name: tuple(x.shape) for name, x in _like(layer).items()}
    for name, x in layer.named_parameters(recurse=False):
        if tuple(x.shape) != expected[name]:
            raise ValueError(
                f"'{place.name}.{name}' has shape {tuple(x.shape)}; expected {expected[name]}, because the layers and "
                f"directions of {type_of(layer)} have one width. A hidden unit has a row in each gate, "
                f"Along(0, packed={_GATES.get(kind, 1)}), and what reads it"
            )
    if not cell:
        layer.flatten_parameters()


def _like(layer: Any) -> dict[str, Tensor]:
    """The parameters of a recurrent layer made anew with the widths that it says, without memory."""
    sizes = layer.input_size, layer.hidden_size
    if isinstance(layer, nn.RNNCellBase):
        made = _base(type(layer))(*sizes, bias=layer.bias, device="meta")
    else:
        options: dict[str, Any] = {"proj_size": layer.proj_size} if layer.proj_size else {}
        options |= {"num_layers": layer.num_layers, "bias": layer.bias, "bidirectional": layer.bidirectional}
        made = _base(type(layer))(*sizes, device="meta", **options)
    return dict(made.named_parameters())


def _base(kind: type) -> type:
    return next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn"))


def _multihead(place: Place) -> None:
    layer, before = place.layer, place.before
    packed = layer.in_proj_weight is not None
    maps = layer.in_proj_weight.chunk(3) if packed else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    width, layer.embed_dim = maps[0].shape
    layer.kdim, layer.vdim = maps[1].shape[1], maps[2].shape[1]
    out, size = layer.out_proj, before.head_dim
    biases = [x.shape[-1] for x in (layer.bias_k, layer.bias_v) if x is not None]
    biases += [] if layer.in_proj_bias is None else [len(layer.in_proj_bias) / 3]
    found = [*[len(w) for w in maps], out.weight.shape[1], *biases]
    if any(x != width for x in found) or width % size:
        raise ValueError(
            f"'{place.name}', {type_of(layer)}, has queries, keys, values, an output and biases of widths "
            f"{', '.join(f'{x:g}' for x in found)}; expected whole heads of {size} in all of them. Its "
            f"heads are Along(0, size={size}, packed=3) in in_proj_weight and in_proj_bias, and Along(1, size={size}) "
            "in out_proj.weight"
        )
    layer.num_heads = width // size
    if not width == layer.embed_dim == len(out.weight):
        if type(layer) not in (nn.MultiheadAttention, NarrowAttention):
            word = "fewer" if width < max(layer.embed_dim, len(out.weight)) else "more"
            raise ValueError(
                f"'{place.name}' is {type_of(layer)}, whose {width} features of heads are {word} than its "
                f"{layer.embed_dim} inputs and {len(out.weight)} outputs, which the code of "
                "torch.nn.MultiheadAttention does not take; resized knows how to go on with that class alone, and not "
                "with one of your own"
            )
        # Encoder layers choose their fused path by this name; attention itself goes by in_proj_weight.
        layer._qkv_same_embed_dim = False
        layer.__class__ = NarrowAttention


def _encoder(place: Place) -> None:
    layer = place.layer
    if not any(isinstance(inner, NarrowAttention) for inner in layer.modules()):
        return
    kind = type(layer)
    if kind is nn.TransformerEncoder:
        layer.__class__, layer.nests = NarrowEncoder, layer.use_nested_tensor
    layer.use_nested_tensor = False  # Its test for the fused path sees the first layer alone.


def _transformer(place: Place) -> None:
    attention = next((x for x in place.layer.modules() if isinstance(x, nn.MultiheadAttention)), None)
    place.layer.d_model = place.layer.d_model if attention is None else attention.embed_dim


def _plain(place: Place) -> None:
    """Nothing, for a container of parameters that says nothing about them."""


_RULES: tuple[tuple[tuple[type, ...], Callable[[Place], None]], ...] = (
    ((nn.Linear,), _linear),
    (CONVOLUTIONS, _convolution),
    (NORMS, _norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.PReLU,), _prelu),
    ((nn.Bilinear,), _bilinear),
    ((nn.RNNBase, nn.RNNCellBase), _recurrent),
    ((nn.MultiheadAttention,), _multihead),
    ((nn.TransformerEncoder,), _encoder),
    ((nn.Transformer,), _transformer),
    ((nn.ParameterList, nn.ParameterDict), _plain),
)


# Layers of others


def is_conv1d(layer: Any) -> bool:
    """Whether a layer is a linear one whose weight is transposed, as GPT-2 has it."""
    return {"nf", "nx"} <= vars(layer).keys() and "weight" in layer._parameters


#: What the dimensions of a weight are called, by how many there are.
_DIMENSIONS: dict[int, Sequence[tuple[str, ...]]] = {
    1: [("num_features",), ("normalized_shape",), ("hidden_size",), ("num_channels",)],
    2: [("out_features", "in_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")],
}


def _by_name(place: Place) -> Iterable[str]:
    """Attributes that have the names PyTorch gives to the dimensions of a weight, if they were these."""
    layer, before = place.layer, place.before
    w, old = tensors(layer, recurse=False).get("weight"), tensors(before, recurse=False).get("weight")
    if w is None or old is None:
        return
    for names in _DIMENSIONS.get(old.ndim, ()):
        if tuple(_number(getattr(before, name, None)) for name in names) == tuple(old.shape):
            for name, width in zip(names, w.shape, strict=True):
                setattr(layer, name, (width,) if isinstance(getattr(before, name), tuple) else width)
                yield name


def _number(x: Any) -> Any:
    return x[0] if isinstance(x, tuple) and len(x) == 1 else x


SIZES = ("head_dim", "attention_head_size", "head_size", "dim_per_head", "key_value_proj_dim")
_QUERIES = ("q_proj", "query", "q_lin", "query_proj", "q_attn", "q", "wq", "to_q")
_KEYS = ("k_proj", "key", "k_lin", "key_proj", "k", "wk", "to_k")
_VALUES = ("v_proj", "value", "v_lin", "value_proj", "v", "wv", "to_v")
_PACKED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "in_proj", "Wqkv", "to_qkv")
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "proj", "out_lin", "wo", "to_out", "out", "o")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
HEAD_COUNTS = (*_HEADS, *_KEY_HEADS)
_REPEATS = ("num_key_value_groups", "n_rep")
_TOGETHER = ("all_head_size", "split_size", "inner_dim")


class Heads(NamedTuple):
    """The widths of attention."""

    size: int
    queries: int  # How many there are.
    keys: int


def heads(layer: Any, size: int = 0) -> Heads | None:
    """The heads of a module of attention; None if it is none that is known, no heads if they are not whole."""
    size = next((vars(layer)[name] for name in SIZES if isinstance(vars(layer).get(name), int)), size)
    q, k, v = _projected(layer)
    if not (size and q and k and v):
        return None
    whole = q % size == 0 and k % size == 0 and v == k and q % k == 0
    return Heads(size, q // size, k // size) if whole else Heads(size, 0, 0)


def _projected(layer: Any) -> tuple[int, int, int]:
    """The widths of queries, keys and values of all heads, 0 where they are not known."""
    children = layer._modules
    q, k, v, packed = (
        next((gives(children[name]) for name in names if children.get(name) is not None), 0)
        for names in (_QUERIES, _KEYS, _VALUES, _PACKED)
    )
    if packed and not (k or v):
        rest = packed - (0 if q else _width_together(layer) or packed // 3)  # Queries may be packed, too.
        q = q or packed - rest
        k = v = rest // 2 if rest % 2 == 0 else 0
    return q, k, v


def _width_together(layer: Any) -> int:
    """The width of all heads together, which the layer after attention takes; 0 if it is not known."""
    out: Any = next((layer._modules[name] for name in _OUTPUTS if layer._modules.get(name) is not None), None)
    if isinstance(out, nn.Linear):
        return out.in_features
    return out.nx if out is not None and is_conv1d(out) else 0


def heads_before(layer: Any) -> Heads | None:
    """The heads of a module of attention that says how wide each is.

    Of one that says only how many there are, a smaller width may be of fewer heads, or of narrower ones. Where more
    queries than keys and values are packed into one layer, it has to say how many heads of keys there are.
    """
    found = heads(layer)
    counts = [vars(layer)[name] for name in _HEADS if isinstance(vars(layer).get(name), int)]
    if found is None or not all(n == found.queries for n in counts):
        return None
    if packs_unequally(layer, found) and found.keys != 1 and found.keys not in _said(layer, _KEY_HEADS):
        return None
    return found


def packs_unequally(layer: Any, found: Heads | None) -> bool:
    """Whether queries, keys and values are one layer, with more heads of queries than of the others."""
    return found is not None and _packs(layer) and found.queries != found.keys


def _packs(layer: Any) -> bool:
    return any(layer._modules.get(name) is not None for name in _PACKED)


def _said(layer: Any, names: Sequence[str]) -> list[Any]:
    """What a module and its configuration say under some names."""
    return [getattr(each, name, None) for each in (layer, vars(layer).get("config")) for name in names]


def head_count(layer: Any, before: Any, name: str, value: Any) -> int | None:
    """What a count of heads in the configuration of a module of attention is now, None if it is none."""
    had = heads_before(before)
    has = None if had is None else heads(layer, had.size)
    if had is None or has is None or not (had.queries and has.queries):
        return None
    kinds = ((_HEADS, had.queries, has.queries), (_KEY_HEADS, had.keys, has.keys))
    return next((new for names, old, new in kinds if name in names and value == old), None)


def _of_attention(place: Place) -> Iterable[str]:
    """Counts of heads and their width together, in modules of attention with projections of their own."""
    layer, before = place.layer, place.before
    had = heads_before(before)
    if had is None or not had.queries:
        return
    has = _narrower(place, had) if place.inside_heads else heads(layer, had.size)
    shared = has is not None and has.keys == had.keys == 1  # All queries have one head of keys, and may be any number.
    uneven = has is not None and _packs(layer) and not shared and has.queries * had.keys != had.queries * has.keys
    if has is None or not has.queries or uneven:
        raise ValueError(
            f"the projections of '{place.name}', {type_of(layer)}, do not hold whole heads of {had.size} "
            "features, as many of keys as of values, and as many of queries for each of these; they had "
            f"{had.queries} heads of queries and {had.keys} of keys. Does the family of its heads name all of its "
            f"projections, with size={had.size}? Features of all heads go with inside_heads=True"
        )
    for names, old, new in (
        (SIZES, had.size, has.size),
        (_HEADS, had.queries, has.queries),
        (_KEY_HEADS, had.keys, has.keys),
        (_REPEATS, had.queries // had.keys, has.queries // has.keys),
        (_TOGETHER, had.queries * had.size, has.queries * has.size),
    ):
        for name in names:
            if vars(before).get(name) == old:
                setattr(layer, name, new)
                yield name


def _narrower(place: Place, had: Heads) -> Heads:
    """As many heads as before, of as many features as there are queries and keys for."""
    q, k, v = _projected(place.layer)
    size, rest = divmod(q, had.queries)
    if rest or k != size * had.keys or v % had.keys:
        raise ValueError(
            f"the projections of '{place.name}', {type_of(place.layer)}, are of widths {q}, {k} and {v}; with "
            f"inside_heads=True expected {had.queries} heads of queries and {had.keys} of keys, as before, and as many "
            "features in each of them. Were whole heads taken out?"
        )
    return had._replace(size=size)


def check_heads(module: nn.Module, smaller: nn.Module, inside_heads: bool, known: tuple[type[nn.Module], ...]) -> None:
    """Raise a ValueError for the first attention whose features went where heads are told to go, or the other way.

    A width may be of fewer heads as well as of narrower ones; entries of weights tell, while one network is made of
    the other. What is known by rules is left out.
    """
    for (name, before), layer in zip(module.named_modules(), smaller.modules(), strict=True):
        had = None if isinstance(before, known) else heads_before(before)
        whole = None if had is None else _went_whole(before, layer, had.size)
        if whole is inside_heads:
            raise ValueError(
                f"{'whole heads' if whole else 'features of all heads'} were taken out of '{name}', "
                f"{type_of(layer)}, and resized got inside_heads={inside_heads}; expected the opposite, as "
                "channel_groups was told, or a rule for this type if the rows of a head do not follow each other"
            )


def _went_whole(before: Any, layer: Any, size: int) -> bool | None:
    """Whether whole heads are gone from the queries of attention; None where nothing is, or it cannot be told."""
    old, new = _first_column(before), _first_column(layer)
    if old is None or new is None or len(old) == len(new) or (old.device, old.dtype) != (new.device, new.dtype):
        return None
    stays = torch.isin(old, new)
    if int(stays.sum()) != len(new) or len(old) % size:
        return None
    heads = stays.reshape(-1, size)
    return bool((heads.any(1) == heads.all(1)).all())


def _first_column(layer: Any) -> Tensor | None:
    """What makes queries of the first input, for each feature of each head."""
    child: Any = next(
        (layer._modules[name] for name in (*_QUERIES, *_PACKED) if layer._modules.get(name) is not None), None
    )
    if isinstance(child, nn.Linear):
        return child.weight.detach()[:, 0]
    return child.weight.detach()[0] if child is not None and is_conv1d(child) else None


def follow_bare(layer: Any, came: Sequence[Given]) -> None:
    """Let a normalization without parameters follow the last layer before it that was as wide.

    It computes the same whatever it says, or raises once it runs; not so a `GroupNorm`.
    """
    if isinstance(layer, NORMS):
        layer.num_features = _after(layer.num_features, came)
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) == 1:
        layer.normalized_shape = (_after(layer.normalized_shape[0], came),)


def _after(width: int, came: Sequence[Given]) -> int:
    return next((each.now for each in reversed(came) if each.before == width), width)


def follow_configs(module: nn.Module, smaller: nn.Module) -> None:
    """Write widths into the configurations that modules share, where all of these agree.

    Counts of heads only where the configuration says their width, too, which would be computed from them else.
    """
    found: dict[tuple[int, str], tuple[Any, set[int]]] = {}
    for before, layer in zip(module.modules(), smaller.modules(), strict=True):
        config = vars(layer).get("config")
        if config is None:
            continue
        had = heads_before(before)
        has = heads(layer, had.size) if had is not None and getattr(config, "head_dim", None) == had.size else None
        news: list[tuple[Sequence[str], Any, Any]] = []
        if had is not None and has is not None and has.queries:
            news += [(_HEADS, had.queries, has.queries), (_KEY_HEADS, had.keys, has.keys)]
            news += [(SIZES, had.size, has.size)] if has.size != had.size else []
        hidden = "intermediate_size"
        news.append(((hidden,), vars(before).get(hidden), vars(layer).get(hidden)))
        for names, old, new in news:
            for name in names:
                if new and getattr(config, name, None) == old:
                    found.setdefault((id(config), name), (config, set()))[1].add(new)
    for (_, name), (config, widths) in found.items():
        if len(widths) == 1:
            setattr(config, name, widths.pop())
