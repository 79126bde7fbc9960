"""Modules that wrap another, as compiled and data parallel ones do, and the names that they give to parameters."""

from __future__ import annotations

from torch import nn

from funcreg.core.undocumented import read_once

#: What wrappers call the module inside them: torch.compile, fully sharded data parallel, activation checkpointing,
#: Fabric, which has a name for it without its other wrappers, too.
_WRAPPERS = (
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_original_module"),
)


def without_wrappers(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of parameters and buffers as they are without wrappers."""
    rows = [[part for part in name.split(".") if part not in _WRAPPERS] for name in names]
    own = [row for row in rows if row != ["n_averaged"]]  # What an average of models counts with.
    while own and all(row[0] == "module" and len(row) > 1 for row in own):  # Data parallel, or an average of models.
        for row in own:
            del row[0]
    return tuple(".".join(row) for row in rows)


@read_once
def plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of parameters as they are without wrappers and parametrizations."""
    rows = [name.split(".") for name in without_wrappers(names)]
    for row in rows:
        if len(row) > 2 and row[-3] == "parametrizations" and row[-1].startswith("original"):
            row[-3:] = [row[-2]]
    return tuple(".".join(row) for row in rows)


@read_once
def matched(names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Each name as it is known, or else the one that is known with other wrappers; itself where there is none."""
    if set(names) <= set(known):
        return names
    plain = without_wrappers(known)
    by_plain = {name: known[i] for i, name in enumerate(plain) if plain.count(name) == 1}
    rows = zip(names, without_wrappers(names), strict=True)
    return tuple([name if name in known else by_plain.get(short, name) for name, short in rows])


def inner_module(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, data parallel, activation checkpointing or Fabric, else the module itself."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return inner_module(module.module)
    children = dict(module.named_children())
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_original_module", "_forward_module"):
        if name in children:
            return inner_module(children[name])
    return module
