"""Pictures show the numbers that they are given, on axes that they return, and touch nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import NamedTuple

import matplotlib as mpl
import pytest
import torch
from torch import Tensor, nn

import funcreg as fr
from funcreg import plot

mpl.use("Agg")
import matplotlib.pyplot as plt  # After the choice of a backend that needs no screen.


class Found(NamedTuple):
    """What a path has, by name: nothing but its fields is looked at."""

    strengths: Tensor
    params: dict[str, Tensor]
    losses: Tensor
    residuals: Tensor
    sparsity: Tensor
    converged: Tensor


def found(count=5):
    strengths = torch.logspace(0, -2, count)
    w = torch.stack([(1 - strengths).clamp(min=0), -(0.5 - strengths).clamp(min=0), 0 * strengths], 1)
    params = {"w": w, "b": torch.ones(count)}
    return Found(strengths, params, strengths, 0 * strengths, (w == 0).double().mean(1), torch.ones(count).bool())


ROWS = [
    {"strength": s, "learning_rate": rate, "loss": rate + abs(s - 0.1), "status": "done", "seed": 0}
    for s in (0.001, 0.01, 0.1, 1.0)
    for rate in (0.3, 0.1)
]
WEIGHTS = {"w": torch.tensor([[1.0, -2.0], [0.0, 0.5]]), "b": torch.tensor([3.0, 0.0])}
PICTURES = {
    "histograms": lambda **k: plot.histograms(WEIGHTS, fr.tree_map(lambda w: w.relu(), WEIGHTS), **k),
    "path": lambda **k: plot.path(found(), **k),
    "sweep": lambda **k: plot.sweep(ROWS, **k),
    "sparsity": lambda **k: plot.sparsity([0.0, 0.25, 0.5], **k),
    "channels": lambda **k: plot.channels({"w": 0}, WEIGHTS, **k),
}
every_picture = pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def first(axes):
    return axes[0] if hasattr(axes, "__len__") else axes


def lines(axes):
    """The lines that have more than one point, as lists of y."""
    return [line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else list(line.get_ydata())
            for line in axes.lines if len(line.get_xdata()) > 1]  # fmt: skip


@every_picture
def test_it_returns_axes_that_can_be_written(draw, tmp_path):
    axes = first(draw())
    axes.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 3000
    assert axes.get_xlabel()
    assert axes.get_ylabel()


@every_picture
def test_it_draws_on_given_axes_and_makes_no_figure(draw):
    figure, axes = plt.subplots()
    assert first(draw(axes=axes)) is axes
    assert plt.get_fignums() == [figure.number]


@every_picture
def test_style_and_backend_stay_and_nothing_is_shown(draw, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("plt.show was called"))
    before, backend = dict(mpl.rcParams), mpl.get_backend()
    draw()
    assert dict(mpl.rcParams) == before
    assert mpl.get_backend() == backend


@every_picture
def test_labels_do_not_overlap(draw):
    axes = first(draw())
    axes.figure.canvas.draw()
    texts = [text for text in axes.texts if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@every_picture
def test_without_matplotlib_it_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'funcreg\[plot\]'"):
        draw()


@pytest.mark.slow
def test_matplotlib_is_imported_by_the_first_picture():
    script = "import sys, funcreg.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# What they show


def test_histograms_count_weights_and_set_zeros_apart():
    axes = PICTURES["histograms"]()
    counts = [sum(bar.get_height() for bar in container) for container in axes.containers[:1]]
    assert counts == [4]  # Of six, two are zero.
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["before: 33 % exactly zero", "after: 50 % exactly zero"]
    assert [line.get_ydata()[0] for line in axes.lines] == [2, 3]  # Their numbers, at 0.


def test_histograms_take_modules_and_masks_and_odd_weights():
    texts = plot.histograms(nn.Linear(2, 2), nn.Linear(2, 2), fr.matrices).get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["before", "after"]
    plot.histograms(torch.zeros(3), torch.zeros(3))
    plot.histograms(torch.tensor([1.0, float("nan"), float("inf")]), torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="bins is 0"):
        plot.histograms(torch.zeros(3), torch.zeros(3), bins=0)


def test_a_path_has_a_line_for_each_weight_that_ever_lives():
    axes = plot.path(found(), names=["bias", "first", "second", "never"])
    assert {text.get_text() for text in axes.texts} == {"bias", "first", "second"}
    drawn = lines(axes)[1:]  # After the line at 0.
    assert len(drawn) == 3
    assert drawn[0] == [1.0] * 5  # What comes in first.
    assert axes.get_xlim()[0] > axes.get_xlim()[1]  # The strongest is on the left.
    (above,) = axes.child_axes
    assert [text.get_text() for text in above.get_xticklabels()] == ["1", "3", "3", "3", "3"]


def test_a_path_is_drawn_from_the_strongest_to_the_weakest_however_it_is_given():
    falling, mixed = found(), torch.tensor([3, 0, 4, 1, 2])
    given = Found(*(fr.tree_map(lambda x: x[mixed], field) for field in falling))
    first, other = plot.path(falling), plot.path(given)
    for a, b in zip(first.get_lines(), other.get_lines(), strict=True):
        assert torch.equal(torch.tensor(a.get_xdata()), torch.tensor(b.get_xdata()))
        assert torch.equal(torch.tensor(a.get_ydata()), torch.tensor(b.get_ydata()))
    heights = [[text.xy for text in axes.texts] for axes in (first, other)]
    assert heights[0] == heights[1]


def test_lines_of_one_point_have_a_marker():
    for axes in (plot.path(found(1)._replace(strengths=torch.tensor([0.5]))), plot.sparsity({"a": [0.5], "b": [0.2]})):
        lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
        assert lines
        assert all(line.get_marker() == "o" for line in lines)
    assert plot.sparsity([0.5, 0.6]).get_lines()[0].get_marker() == "None"


def test_what_is_not_finite_is_counted():
    w = torch.tensor([[1.0, -2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    axes = plot.histograms({"w": w.nan_to_num(0, 0)}, {"w": w})
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["before: 50 % exactly zero", "after: 25 % exactly zero, 2 NaN or inf, not shown"]
    (axes,) = plot.channels({"w": 0}, {"w": w})
    assert axes.get_title(loc="left") == "w: 1 of 4 alive, 2 NaN or inf"
    assert {text.get_text() for text in axes.texts} == {"dead", "NaN or inf"}


def test_a_path_is_of_the_leaves_of_a_mask():
    axes = plot.path(found(), mask={"w": True, "b": False})
    assert {text.get_text() for text in axes.texts} == {"w[0]", "w[1]"}


def test_what_has_not_converged_is_marked():
    converged = torch.tensor([True, False, True, True, False])
    axes = plot.path(found()._replace(converged=converged))
    assert axes.get_legend().get_texts()[0].get_text() == "not converged"
    assert len(axes.lines[-1].get_xdata()) == 2


def test_paths_of_many_weights_of_one_strength_and_with_a_strength_of_zero_are_drawn():
    many = found()._replace(params={"w": torch.randn(5, 300)})
    assert len(plot.path(many).texts) == 0
    plot.path(Found(*(x[:1] if isinstance(x, Tensor) else {k: w[:1] for k, w in x.items()} for x in found())))
    strengths = found().strengths.clone()
    strengths[-1] = 0
    assert len(lines(plot.path(found()._replace(strengths=strengths)))[1]) == 4
    with pytest.raises(ValueError, match="expected 4, one for each weight"):
        plot.path(found(), names=["a"])
    with pytest.raises(ValueError, match="leaf 'w' has shape"):
        plot.path(found()._replace(params={"w": torch.ones(3, 2)}))


def test_the_path_of_the_library_is_drawn():
    made = fr.regularization_path(lambda w: (w - 1).square().sum() / 2, torch.zeros(2).double(), fr.l1, count=4)
    assert len(lines(plot.path(made))) == 3


def test_a_sweep_rings_its_best_row():
    axes = PICTURES["sweep"]()
    assert axes.get_xscale() == "log"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["learning_rate = 0.1", "learning_rate = 0.3", "best: strength = 0.1, loss = 0.1"]
    ring = axes.lines[-1]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([0.1], [0.1])


def test_a_sweep_names_penalties_as_its_table_does():
    rows = [{"penalty": p, "strength": s, "loss": s} for p in (fr.l1, fr.half_l2) for s in (0.1, 0.2)]
    told = [text.get_text() for text in plot.sweep(rows).get_legend().get_texts()]
    assert told[:2] == ["penalty = l1", "penalty = half_l2"]


def test_a_sweep_is_by_score_if_there_is_one_and_as_told():
    rows = [{"width": n, "score": n / 64, "loss": 1.0 * n, "seed": seed} for n in (16, 32) for seed in (0, 1)]
    axes = plot.sweep(type("Result", (), {"rows": rows})())
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("width", "score", "linear")
    assert list(axes.lines[-1].get_xdata()) == [32]
    assert list(plot.sweep(rows, y="loss").lines[-1].get_xdata()) == [16]


@pytest.mark.parametrize("gone", [{"loss": float("nan")}, {"loss": 1e30, "status": "diverged"}])
def test_rows_that_diverged_are_crosses_and_set_no_scale(gone):
    axes = plot.sweep([*ROWS, {**ROWS[0], "strength": 10.0, **gone}])
    assert axes.get_legend().get_texts()[-1].get_text() == "diverged"
    assert list(axes.lines[-1].get_xdata()) == [10.0]
    assert axes.get_ylim()[1] < 2


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "expected what has rows"),
        ([1.0], {}, "expected what has rows"),
        ([{"loss": 1.0}], {}, "differ in no hyperparameter"),
        ([{"flag": True, "loss": 1.0}, {"flag": False, "loss": 2.0}], {}, "differ in no hyperparameter"),
        (ROWS, {"x": "width"}, "x is 'width'"),
        (ROWS, {"y": "score"}, "no 'score'"),
        ([{"a": 1, "loss": float("nan")}, {"a": 2, "loss": float("nan")}], {}, "all rows diverged"),
    ],
)
def test_a_sweep_that_cannot_be_drawn_says_why(rows, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plot.sweep(rows, **options)


def test_what_is_no_path_cannot_be_drawn_as_one():
    with pytest.raises(TypeError, match=r"path is a dict; expected what regularization_path returned"):
        plot.path({"w": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"one entry a strength, as regularization_path returns them"):
        plot.path(found()._replace(params={"w": torch.zeros(3)}))


def test_sparsity_is_drawn_in_per_cent_with_names_at_the_ends():
    axes = plot.sparsity({"a": [0.0, 0.5], "b": [torch.tensor(0.1), torch.tensor(0.2)]}, steps=[0, 10])
    assert lines(axes)[0] == [0.0, 50.0]
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
    rows = plot.sparsity([{"a": 0.0, "b": 0.1}, {"a": 0.5, "b": 0.2}])
    assert lines(rows)[0] == [0.0, 50.0]
    assert lines(plot.sparsity(torch.tensor([0.0, 1.0]))) == [[0.0, 100.0]]
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        plot.sparsity([0.0, 50.0])
    with pytest.raises(ValueError, match="steps 3"):
        plot.sparsity([0.0, 0.5], steps=[1, 2, 3])
    with pytest.raises(ValueError, match="empty"):
        plot.sparsity([])


@pytest.mark.parametrize(("history", "kind", "said"), [
    ([{"a": 0.1}, {"b": 0.2}], ValueError, r"\['b'\] at one time, and \['a'\] at the first"),
    (torch.rand(10, 2), TypeError, r"a tensor of shape \(2,\); expected numbers, one a time"),
    (["x"], TypeError, "entry 'x'; expected numbers"),
])  # fmt: skip
def test_histories_that_cannot_be_drawn_say_why(history, kind, said):
    with pytest.raises(kind, match=said):
        plot.sparsity(history)


def test_channels_are_counted_by_family():
    net = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 6), nn.ReLU(), nn.Linear(6, 2))
    params = {name: w.detach().clone() for name, w in net.named_parameters()}
    for name in ("0.weight", "0.bias"):
        params[name][:20] = 0
    for name in ("2.weight", "2.bias"):
        params[name][5] = 0
    params["4.weight"][:, 5] = 0
    axes = plot.channels(fr.channel_groups(net), params)
    assert [each.get_title(loc="left") for each in axes] == ["0.weight: 10 of 30 alive", "2.weight: 5 of 6 alive"]
    assert [text.get_text() for text in axes[0].texts] == ["dead"]
    assert len(plot.channels(fr.channel_groups(net), net)) == 2
    with pytest.raises(ValueError, match="expected 2, one for each family"):
        plot.channels(fr.channel_groups(net), params, axes=axes[:1])
