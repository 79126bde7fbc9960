"""Families of channels as a table, and why others are kept, with a line for all numbered layers that are alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from funcreg.core._typing import Params
from funcreg.networks.families import Family
from funcreg.networks.removal import count_alive


class ChannelGroups(list[Family]):
    """Families of groups, with what is known of them: a list that prints as a table, and explains itself.

    `channel_groups` makes it of a network. The table says for each family which layers give its channels, how many
    groups there are, and how many parameters go with each of them.

    Args:
        families: The families, dicts from names of leaves to where groups lie in them.
        counts: The number of groups of each family.
        sizes: The number of parameters that a group carries, also those that are not penalized.
        layers: The layers whose outputs they are, for each family.
        kept: Why other dimensions of parameters are kept: their places by the reason.
        round_to: What numbers of channels stay multiples of in `remove_dead`.
        necks: For each family whether outputs are the same at every input once all of its groups are dead.
        notes: What will be seen at the end alone, when the network is made smaller.
        least: How many groups of each family `remove_dead` leaves at least, one where none are given.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 6))
        >>> net = torch.nn.Sequential(*net, torch.nn.ReLU(), torch.nn.Linear(6, 1))
        >>> groups = channel_groups(net, (torch.ones(1, 2),))
        >>> groups
        channels of  groups  parameters each
        2                 6                6
        >>> print(groups.explain())  # doctest: +ELLIPSIS
        6 groups in 1 family:
        ...
        - normalized over channels (native_layer_norm, '1'):
            0.weight, dimension 0 of 4
        ...
    """

    def __init__(
        self,
        families: Iterable[Family] = (),
        counts: Sequence[int] = (),
        sizes: Sequence[int] = (),
        layers: Sequence[tuple[str, ...]] = (),
        kept: dict[str, list[str]] | None = None,
        round_to: int = 1,
        necks: Sequence[bool] = (),
        notes: Sequence[str] = (),
        least: Sequence[int] = (),
    ) -> None:
        super().__init__(families)
        self.counts, self.sizes, self.layers = list(counts), list(sizes), list(layers)
        self.kept = dict(kept or {})
        self.round_to, self.necks, self.notes, self.least = round_to, list(necks), list(notes), list(least)

    def __repr__(self) -> str:
        if len(self.counts) != len(self):
            return super().__repr__()
        rows = _rows([_shortened(layers) for layers in self.layers], self.counts, self.sizes)
        head = ("channels of", "groups", "parameters each")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}" for name, count, size in (head, *rows)
        ]
        return "\n".join(lines)

    def left(self, params: Params) -> list[int]:
        """How many groups of each family are not zero, to be watched while a network is trained.

        Args:
            params: Tree of its parameters, also with buffers.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
            >>> groups = channel_groups(net, (torch.ones(1, 2),))
            >>> with torch.no_grad():
            ...     for w in (net[0].weight[0], net[0].bias[0], net[1].weight[:, 0]):
            ...         w.zero_()
            >>> groups.left(with_buffers(net))
            [3]
        """
        return [alive.left for alive in count_alive(params, self)]

    def explain(self) -> str:
        """Which channels there are, and why the others are kept."""
        families = "1 family" if len(self) == 1 else f"{len(self)} families"
        lines = [f"{sum(self.counts)} groups in {families}:", repr(self)]
        if self.kept:
            lines += ["", "Kept:"]
        for reason, places in alike(self.kept).items():
            lines += [f"- {reason}:", *[f"    {place}" for place in places]]
        if self.notes:
            lines += ["", *dict.fromkeys(_patterns(self.notes).values())]
        return _Text("\n".join(lines))


def _rows(names: Sequence[str], counts: Sequence[int], sizes: Sequence[int]) -> list[tuple[str, str, str]]:
    """The rows of a table of families, one for those of numbered layers that are alike."""
    alike: dict[tuple[str, int, int], list[str]] = {}
    for name, count, size in zip(names, counts, sizes, strict=True):
        alike.setdefault((_NUMBER.sub("*", name), count, size), []).append(name)
    rows: list[tuple[str, str, str]] = []
    for (_, count, size), here in alike.items():
        labels = here if len(here) < _MANY else [f"{_pattern(here)} ({len(here)} families)"]
        rows += [(label, f"{count}", f"{size:,}") for label in labels]
    return rows


def alike(kept: dict[str, list[str]]) -> dict[str, list[str]]:
    """Places by the reason why they are kept, those of numbered layers that are alike in one line."""
    patterns, found = _patterns(kept), {}
    for reason, places in kept.items():
        found.setdefault(patterns[reason], []).extend(places)
    return {reason: list(dict.fromkeys(_patterns(places).values())) for reason, places in found.items()}


#: How many numbered layers that are alike stand in one line.
_MANY = 3
#: The number of a layer in a name.
_NUMBER = re.compile(r"(?<![^.'\s])(\d+)(?=[.',]|$)")


def _patterns(texts: Iterable[str]) -> dict[str, str]:
    """For each text one that stands for all that are like it but for the numbers of layers."""
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(_NUMBER.sub("*", text), []).append(text)
    return {text: text if len(here) < _MANY else _pattern(here) for here in alike.values() for text in here}


def _pattern(texts: Sequence[str]) -> str:
    """Texts about numbered layers as one, with a star for the numbers in which they differ."""
    columns = zip(*[_NUMBER.split(text) for text in texts], strict=True)
    return "".join([column[0] if len(set(column)) == 1 else "*" for column in columns])


def _shortened(names: Sequence[str]) -> str:
    names = [name or "the module itself" for name in names]
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


class _Text(str):
    """Text that shows itself as it reads."""

    __slots__ = ()
    __repr__ = str.__str__
