"""Numbers in modules change where outputs need it, and stay where not; other inputs tell what given ones hide."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import drawn
from networks import halve, smaller
from test_resizing import Alone, built
from torch import nn

import funcreg as fr
from funcreg.networks import settling
from funcreg.networks.agreement import Failure, outputs
from funcreg.networks.settling import settle
from funcreg.networks.steadiness import _sizes as sizes
from funcreg.networks.stored import Stored, reading
from funcreg.networks.variations import inputs_like, other_sizes

UNITS = {"a.weight": 0, "a.bias": 0, "b.weight": 1}
HEADS = {"qkv.weight": fr.Along(0, 4, 3), "qkv.bias": fr.Along(0, 4, 3), "o.weight": fr.Along(1, 4)}


class Numbered(nn.Module):
    """Two layers, and a number that is as large as their width."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.number, self.run = nn.Linear(5, 8), nn.Linear(8, 3), 8, run

    def forward(self, x):
        return self.run(self, x, self.number)


class Local(nn.Module):
    """Attention to as many words before each as there are features."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.num_heads, self.near, self.scale = 4, 16, nn.Parameter(torch.tensor(scale))
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = [y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]
        i = torch.arange(x.shape[1], device=x.device)
        mask = (i[:, None] >= i) & (i[:, None] - i < self.near)
        return x + self.scale * self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


NUMBERS = {
    "words that are read": (lambda net, x, n: net.b(net.a(x[:, :n]).relu()).mean(1), (2, 3, 5), (2, 20, 5)),
    "the last words": (lambda net, x, n: net.b(net.a(x)[:, -n:].relu()).mean(1), (2, 4, 5), (2, 20, 5)),
    "a bound": (lambda net, x, n: net.b(net.a(x).relu().clamp(max=n)), (6, 5), (6, 5)),
    "a number of words to take": (
        lambda net, x, n: net.b(net.a(x).relu()).topk(min(n, x.shape[1]), 1)[0].mean(1),
        (2, 3, 5),
        (2, 20, 5),
    ),
}


@pytest.mark.parametrize(("forward", "given", "other"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_number_that_is_no_width_stays_where_the_inputs_given_do_not_tell(forward, given, other, dtype):
    net = built(lambda: Numbered(forward), [UNITS]).to(dtype)
    made = smaller(net, [UNITS], drawn(*given).to(dtype))
    assert (made.number, made.a.out_features) == (8, 4)
    x = 50 * drawn(*other, seed=3).to(dtype)
    torch.testing.assert_close(made(x), net(x))


@pytest.mark.parametrize("words", [1, 3, 10])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_a_count_of_heads_changes_and_how_far_it_looks_stays_whatever_the_inputs_tell(words, scale):
    net, x = built(lambda: Local(scale), [HEADS]), drawn(2, words, 16)
    net.scale.data.fill_(scale)
    made = smaller(net, [HEADS], x)
    assert (made.num_heads, made.near) == (2, 16)
    made.scale.data.fill_(1.0)
    net.scale.data.fill_(1.0)
    torch.testing.assert_close(made(drawn(2, 40, 16)), net(drawn(2, 40, 16)), rtol=1e-10, atol=1e-10)
    groups = fr.channel_groups(net, (x,))
    assert groups.counts == [4]
    assert groups.notes == ["Give resized example_inputs too, to tell what becomes of Local.near, Local.num_heads"]


def test_what_nothing_tells_stays_and_a_warning_names_it():
    run = lambda net, x, n: net.b(net.a(x.clamp(max=1e9)).relu()) if x.shape[0] != 999 else x[:, :n]
    net, x = built(lambda: Numbered(run), [UNITS]), drawn(6, 5)
    groups = fr.channel_groups(net, (x,))
    said = "Outputs do not tell whether Numbered.number changes, on these inputs or on others like them"
    assert groups.notes[1:] == [said]
    with pytest.warns(UserWarning, match=r"leaves number=8 of '', a Numbered, though it could be a width that .* to 4"):
        made = smaller(net, [UNITS], x)
    assert made.number == 8
    by_rule = smaller(net, [UNITS], x, rules={Numbered: lambda layer, before: setattr(layer, "number", 4)})
    assert by_rule.number == 4


def test_what_has_the_name_of_a_width_follows_it_though_nothing_reads_it_here():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.hidden_dim, self.parts = nn.Linear(5, 8), nn.Linear(8, 3), 8, 1

        def forward(self, x):
            if self.parts > 1:
                return sum([self.b(y) for y in self.a(x).split(self.hidden_dim // self.parts)])
            return self.b(self.a(x).relu())

    net, x = built(Chunked, [UNITS]), drawn(6, 5)
    made = smaller(net, [UNITS], x)
    assert (made.hidden_dim, made.parts) == (4, 1)


def test_a_width_whose_name_has_a_head_in_it_is_no_count_of_heads():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head_hidden_size = nn.Linear(5, 8), nn.Linear(8, 3), 8

        def forward(self, x):
            return self.b(self.a(x).relu())

    assert smaller(built(Headed, [UNITS]), [UNITS]).head_hidden_size == 4  # Without inputs on which to try it.


class Config:
    def __init__(self):
        self.words, self.width, self.depth = 8, 8, 8


class Sharing(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.a, self.b = config, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x[:, : self.config.words]).relu())


class Reading(Sharing):
    """One that reads a width, too."""

    def forward(self, x):
        return super().forward(x[:, : self.config.words]) * self.a(x[:, :1]).reshape(-1, 1, self.config.width)[..., :1]


def test_modules_go_on_to_share_a_configuration_that_stays():
    config = Config()
    net = nn.Sequential(*[built(lambda: Sharing(config), [UNITS]), nn.Linear(3, 5), Sharing(config)]).double()
    units = {f"{i}.{name}": dim for i in (0, 2) for name, dim in UNITS.items()}
    halve(net, families := [units])
    made = smaller(net, families, drawn(2, 3, 5))
    assert made[0].config is made[2].config
    assert (made[0].config.words, config.words) == (8, 8)
    torch.testing.assert_close(made(drawn(2, 20, 5)), net(drawn(2, 20, 5)), rtol=1e-10, atol=1e-10)


def test_a_configuration_may_have_both():
    net = built(lambda: Reading(Config()), [UNITS])
    made = smaller(net, [UNITS], drawn(2, 3, 5))
    assert (made.config.words, made.config.width, made.config.depth, net.config.width) == (8, 4, 8, 8)
    torch.testing.assert_close(made(drawn(2, 20, 5)), net(drawn(2, 20, 5)), rtol=1e-10, atol=1e-10)


def test_inputs_like_others_have_no_larger_numbers_and_stay_small():
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    several = list(inputs_like(((tokens,), {"mask": tokens > 2, "scale": 2.0}), [9, 33]))
    assert {(9, 5), (2, 9), (2, 33), (2, 10), (2, 3), (4, 5)} < {tuple(args[0].shape) for args, _ in several}
    for (other,), more in several:
        assert other.shape == more["mask"].shape
        assert (more["scale"], other.dtype, int(other.max()) <= 9) == (2.0, torch.int64, True)
    wide = torch.ones(64, 512)
    assert max([x.numel() for x in inputs_like(wide, [1 << 20])]) <= 4 * wide.numel()


def test_a_number_that_only_a_base_class_reads_is_not_to_blame():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.wide, self.parts = nn.Linear(5, 8), nn.Linear(8, 3), 8, 2

        def forward(self, x):
            return self.b(self.a(x).reshape(-1, self.wide))

    class Plain(Base):
        def forward(self, x):
            return self.b(self.a(x).relu())

    class Around(Base):
        def forward(self, x):
            return super().forward(x)

    class Named(Base):
        def forward(self, x):
            return Base.forward(self, x)

    x = drawn(6, 5)
    assert smaller(built(Plain, [UNITS]), [UNITS]).wide == 8
    for kind in (Base, Around, Named):
        net = built(kind, [UNITS])
        with pytest.raises(ValueError, match="stores wide=8"):
            smaller(net, [UNITS])
        assert smaller(net, [UNITS], x).wide == 4


class Either(nn.Module):
    """Two layers with a number that is their width, or how many words are read."""

    def __init__(self, is_width):
        super().__init__()
        self.a, self.b, self.number, self.is_width = nn.Linear(5, 8), nn.Linear(8, 5), 8, is_width

    def forward(self, x):
        y = self.a(x).relu()
        return (
            x + self.b(y.reshape(*x.shape[:2], self.number))
            if self.is_width
            else x + self.b(y)[:, : self.number].mean(1, True)
        )


@pytest.mark.parametrize("count", [2, 6])
def test_numbers_of_one_name_in_layers_of_one_type_are_told_apart(count):
    layers = lambda: Alone(*[Either(i % 2 == 0) for i in range(count)])
    families = [{f"{i}.{name}": dim for name, dim in UNITS.items()} for i in range(count)]
    net = built(layers, families)
    made = smaller(net, families, drawn(2, 3, 5))
    assert [layer.number == layer.a.out_features for layer in made] == [i % 2 == 0 for i in range(count)]
    assert [layer.number for layer in made][1::2] == [8] * (count // 2)
    torch.testing.assert_close(made(drawn(2, 20, 5)), net(drawn(2, 20, 5)), rtol=1e-10, atol=1e-10)


class Several(nn.Module):
    """A module with more numbers than all combinations of their values could be tried of."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.one, self.two, self.three, self.four, self.five, self.six = [8] * 6

    def forward(self, x):
        y = self.a(x[:, : self.one]).reshape(len(x), -1, self.two)[:, -self.three :]
        y = y.unflatten(-1, (self.four, 1)).flatten(2).relu()
        return self.b(y.clamp(max=self.five))[:, : self.six]


def test_many_numbers_at_once():
    net = built(Several, [UNITS])
    made = smaller(net, [UNITS], drawn(2, 3, 5))
    assert (made.one, made.two, made.three, made.four, made.five, made.six) == (8, 4, 8, 4, 8, 8)
    torch.testing.assert_close(made(50 * drawn(2, 20, 5)), net(50 * drawn(2, 20, 5)), rtol=1e-10, atol=1e-10)


def test_a_count_that_is_right_with_either_value_is_no_matter():
    class Broadcasting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.groups = nn.Linear(5, 8), nn.Linear(8, 3), 2

        def forward(self, x):
            return self.b(self.a(x).relu()) + x[:, None, :3].expand(-1, self.groups, -1).mean(1)

    net = built(Broadcasting, [UNITS])
    assert smaller(net, [UNITS], drawn(6, 5)).groups == 2


def test_inputs_of_other_sizes_are_larger_where_an_index_out_of_range_is_an_error():
    shapes = lambda inputs: {tuple(args[0].shape) for args, _ in other_sizes(inputs)}
    tokens, wide = torch.ones(1, 6, dtype=torch.int64), torch.ones(64, 512)
    assert shapes((tokens,)) == {(2, 6), (1, 12), (1, 3)}
    assert shapes((wide,)) == {(32, 512), (64, 256)}
    elsewhere = tokens.to("meta")  # It may end the process there.
    assert shapes((elsewhere,)) == {(2, 6), (1, 3)}
    assert {tuple(change(elsewhere).shape) for some in sizes([elsewhere]) for change in some} == {(2, 6), (1, 3)}


class _Three(nn.Module):
    """Two layers, and the widths of three parts that are taken from what is between them."""

    def __init__(self, *parts):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.one, self.two, self.three = parts

    def forward(self, x):
        return self.b(torch.cat([y.relu() for y in self.a(x).split([self.one, self.two, self.three], -1)], -1))


def _stored(*parts):
    wide = (8, 4, 4)
    return _Three(*parts), [
        Stored("", name, wide[i], (wide[i] // 2, 1)) for i, name in enumerate(("one", "two", "three"))
    ]


def test_no_choice_of_numbers_is_tried_twice_and_one_that_was_right_comes_first():
    seen = []

    def problem(net, right):
        seen.append((net.one, net.two, net.three))
        return None if seen[-1] == right else Failure("", "_Three", "of another size")

    net, unknown = _stored(8, 4, 4)
    assert settle(net, unknown, lambda: problem(net, None)) is not None
    assert len(seen) == len(set(seen)) == 27
    settled = {}
    for _ in range(2):
        seen.clear()
        net, unknown = _stored(8, 4, 4)
        assert settle(net, unknown, lambda net=net: problem(net, (8, 2, 1)), settled) is None
        assert (net.one, net.two, net.three) == (8, 2, 1)
    assert seen == [(8, 2, 1)]


def test_other_runs_are_left_out_where_one_choice_of_numbers_is_left(monkeypatch):
    """As for attention in many blocks, whose numbers are looked at by their kinds."""
    net = nn.Sequential(*[_Three(8, 4, 4) for _ in range(3)])
    unknown = [
        Stored(f"{i}", name, n, (n // 2, 1)) for i in range(3) for name, n in (("one", 8), ("two", 4), ("three", 4))
    ]
    right = {"one": 4, "two": 2, "three": 1}
    wrong = lambda here: None if all(each.now(here) == right[each.attribute] for each in unknown) else "of another size"
    for each in unknown:
        each.assign(net, right[each.attribute])
    monkeypatch.setattr(settling, "_COMBINED", 1)

    def runs():
        raise AssertionError("one choice is left")
        yield

    assert settling.decide(net, unknown, lambda: wrong(net), runs()) == []


def test_numbers_that_were_not_read_before_it_failed_are_not_tried():
    net = nn.ModuleDict({name: nn.Sequential(*[_Three(8, 4, 4) for _ in range(2)]) for name in ("first", "second")})
    several = [(f"{part}.{i}", name, n) for part in net for i in range(2) for name, n in (("one", 8), ("two", 4))]
    unknown, seen = [Stored(path, name, n, (n // 2, 1)) for path, name, n in several], []

    def failure():
        first = net.get_submodule("first")
        seen.append([(each.one, each.two) for each in first])
        return Failure("first.0", "_Three", "of another size")

    assert settle(net, unknown, failure) is not None
    assert len(seen) == len({f"{each}" for each in seen})  # Not again for other numbers of the second part alone.


class _Packed(nn.Module):
    """Attention that stores five numbers, of which it reads two before the others."""

    def __init__(self):
        super().__init__()
        self.count, self.width, self.wide, self.all, self.rest = 4, 4, 4, 16, 16
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        parts = self.qkv(x).split([self.all, self.all, self.rest], -1)
        q, k = [y.unflatten(-1, (self.count, self.width)).transpose(1, 2) for y in parts[:2]]
        v = parts[2].unflatten(-1, (self.count, self.wide)).transpose(1, 2)
        return x + self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("width", "most"), [(23, 9), (24, 27)])
def test_numbers_have_other_values_only_where_they_were_read(width, most):
    net, runs = _Packed(), []
    net.qkv, net.o = nn.Linear(16, width), nn.Linear(8, 16)
    numbers = [("count", 4), ("width", 4), ("wide", 4), ("all", 16), ("rest", 16)]
    unknown = [Stored("", name, n, (n // 4, n // 2)) for name, n in numbers]

    def problem():
        runs.append(width)
        found = outputs(net, (torch.ones(2, 3, 16),), {})
        return found if isinstance(found, Failure) else None

    before = dict(vars(_Packed))
    wrong = settle(net, unknown, problem)
    assert vars(_Packed) == before
    assert len(runs) <= most
    if width == 24:
        assert wrong is None
        assert (net.count * net.width, net.count * net.wide, net.all, net.rest) == (8, 8, 8, 8)
    else:
        assert "split_with_sizes" in wrong.error


class _Labelled(nn.Module):
    """A layer that has its width as a label, inside one whose code reads a number of this name."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.wide = nn.Linear(5, 8), nn.Linear(8, 5), 8

    def forward(self, x):
        return self.b(self.a(x).relu())


class _Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.layer = 5, _Labelled()

    def forward(self, x):
        return x[..., : self.wide] + self.layer(x)


def test_a_number_that_is_a_label_is_no_matter():
    families = [{f"layer.{name}": dim for name, dim in UNITS.items()}]
    net, x = built(_Around, families), drawn(6, 5)
    assert smaller(net, families, x).layer.wide == 8
    assert not [note for note in fr.channel_groups(net, (x,)).notes if "do not tell" in note]


class _Plain:
    words = 3


def test_numbers_that_are_read_are_seen_in_copies_and_configurations_too():
    net = nn.ModuleList([Either(True), Either(False), Sharing(Config())])
    plain, built_in = Numbered(None), Numbered(None)
    plain.config, built_in.config = _Plain(), types.SimpleNamespace(words=8)
    net.extend([plain, built_in, Either(True)])
    unknown = [Stored(path, "number", 8, (4,)) for path in ("0", "1")]
    unknown += [Stored("2", f"config.{name}", 8, (4,)) for name in ("words", "width")]
    unknown += [Stored("3", "config.words", 3, (2,)), Stored("4", "config.words", 8, (4,))]
    cannot_be_seen = {4, 5}  # Of the class itself, and of one that is built in.
    reads = {
        (0,): lambda: net[0](drawn(2, 3, 5).float()),
        (1,): lambda: net[1](drawn(2, 3, 5).float()),
        (0, 1): lambda: copy.deepcopy(net[0])(drawn(2, 3, 5).float()),  # Which of them it is a copy of is unknown.
        (2,): lambda: net[2](drawn(2, 3, 5).float()),
        (): lambda: net[5](drawn(2, 3, 5).float()),  # Of the same class, and none of those.
        frozenset(): lambda: setattr(net[0], "number", 8),
    }
    for read, run in reads.items():
        with reading(net, unknown) as found:
            run()
        assert found.keys() == {*read, *cannot_be_seen}
    assert (net[0].number, net[1].number, "number" in vars(Either), "words" in vars(Config)) == (8, 8, False, False)


IDLE = {
    "a comparison": lambda net, x: net.b(net.a(x).relu() if net.number > 1 else net.a(x)),
    "whether it is there": lambda net, x: net.b(net.a(x).relu() if net.number else net.a(x)),
    "the end of a slice": lambda net, x: net.b(net.a(x)[..., : net.number].relu()),
    "the end of the second slice": lambda net, x: net.b(net.a(x)[:, : net.number].relu()),
}
IN_USE = {
    "in another branch": lambda net, x: net.b(net.a(x).relu()) if len(x) < 999 else x[:, : net.number],
    "in another branch, and read": lambda net, x: (lambda n: net.b(net.a(x)) if len(x) < 999 else x[:, :n])(net.number),
    "a comparison that tells": lambda net, x: net.b(net.a(x).relu() * max(1.0, float(net.number > 6))),
    "computed with": lambda net, x: net.b(net.a(x).relu() + 0 * (net.number // 2)),
    "the end of a slice of what is longer": lambda net, x: net.b(net.a(x).relu()) + 0 * x[:, : net.number].sum(),
}


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.number = nn.Linear(5, 8), nn.Linear(8, 3), 8


@pytest.mark.parametrize("name", [*IDLE, *IN_USE])
def test_what_is_no_width_is_warned_of_only_if_it_is_in_use(name):
    kind = type("Kind", (_Two,), {"forward": IDLE.get(name) or IN_USE[name]})
    net, x = built(kind, [UNITS]), drawn(6, 5)
    notes = [note for note in fr.channel_groups(net, (x,)).notes if "do not tell whether Kind.number" in note]
    assert len(notes) == (name in IN_USE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = smaller(net, [UNITS], x)
    assert len(caught) == (name in IN_USE)
    assert (made.number, type(made.number)) == (8, int)
