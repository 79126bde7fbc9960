"""What optax has too: the same names, keywords, defaults and numbers, against stored reference numbers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference.twins import PROJECTIONS, ROUNDED, TRANSFORMS, plain, run, tree_map

import funcreg as fr

REFERENCE = json.loads((Path(__file__).parent / "reference" / "optax.json").read_text())

LIB = SimpleNamespace(**vars(fr), float32=torch.float32, float64=torch.float64)

# Parameters of optax that funcreg has under another name or not at all.
DIFFERENT = {
    ("chain", "args"): "called transforms, as what they are",
    ("named_chain", "args"): "called transforms, as what they are",
    ("global_norm", "updates"): "called tree, because it measures parameters too",
    ("scale_by_backtracking_linesearch", "verbose"): "what it prints is in the state",
    ("scale_by_zoom_linesearch", "verbose"): "what it prints is in the state",
    ("sam", "batch_axis_name"): "an axis of jax's pmap, which torch has not",
}
# What funcreg takes beyond optax.
MORE = {
    ("chain", "transforms"): "optax's args",
    ("named_chain", "transforms"): "optax's args",
    ("global_norm", "tree"): "optax's updates",
    ("scale_by_sm3", "keep_metric"): "keeps what a proximal step needs",
    **{
        (name, "nu_dtype"): "a second moment of sixteen bits, rounded so that it keeps moving"
        for name in (
            *("scale_by_adam", "scale_by_amsgrad", "scale_by_rms", "scale_by_stddev"),
            *("adam", "adamw", "amsgrad", "rmsprop", "lamb", "nadam", "nadamw"),
        )
    },
    ("lamb", "mu_dtype"): "beside nu_dtype",
    ("clip_by_global_norm", "eps"): "gives the numbers of torch.nn.utils.clip_grad_norm_",
}
# Defaults of optax that funcreg has not.
OTHERWISE = {
    ("MultiSteps", "accumulator_dtype"): "float32 for all would round gradients of float64",
}
# Names of both that no row uses.
OTHER = {
    **dict.fromkeys(
        (
            *(
                "AddNoiseState",
                "ApplyIfFiniteState",
                "DifferentiallyPrivateAggregateState",
                "EmaState",
                "EmptyState",
                "MaskedState",
            ),
            *("PartitionState", "TraceState", "ZeroNansState"),
            *("FactoredState", "MuonState", "ReduceLROnPlateauState"),
            *("ScaleByBacktrackingLinesearchState", "ScaleByZoomLinesearchState", "ZoomLinesearchInfo"),
            *("ConditionallyMaskState", "ConditionallyTransformState", "InjectHyperparamsState", "LookaheadState"),
            *("MonitorState", "MultiStepsState", "SAMState", "ScheduleFreeState", "SnapshotState"),
        ),
        "a state, not a transform",
    ),
    "init_empty_state": "what a transform is made of",
    "LookaheadParams": "a pair of parameters, with which the rows of lookahead begin",
    **dict.fromkeys(("incremental_update", "periodic_update", "tree_map_params"), "beside optax in test_trees"),
    "add_noise": "the noise is another; its law is that of test_noise",
    "value_and_grad_from_state": "what it makes are a value and a gradient; its law is that of test_linesearch",
    "noisy_sgd": "the noise is another; its law is that of test_preconditioners",
    "differentially_private_aggregate": "takes gradients of examples; its law is that of test_noise",
    "dpsgd": "takes gradients of examples; its law is that of test_noise",
}


def tensors(tree):
    return tree_map(lambda leaf: torch.tensor(leaf, dtype=torch.float64), tree)


def parameters(name):
    return [
        [p.name, p.kind.name, "required" if p.default is p.empty else plain(p.default)]
        for p in inspect.signature(getattr(fr, name)).parameters.values()
    ]


def test_every_row_has_reference_numbers():
    assert set(TRANSFORMS) == set(REFERENCE["transforms"])
    assert set(PROJECTIONS) == set(REFERENCE["projections"])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_twelve_steps_lead_where_optax_goes(name):
    expected = REFERENCE["transforms"][name]
    first, last = run(LIB, name, {key: tensors(tree) for key, tree in REFERENCE["inputs"].items()})
    near = 1e-6 if name in ROUNDED else 1e-12
    close = {"rtol": near, "atol": near, "equal_nan": True}
    tree_map(lambda a, b: torch.testing.assert_close(a, b, **close), first, tensors(expected["first"]))
    tree_map(lambda a, b: torch.testing.assert_close(a, b, **close), last, tensors(expected["last"]))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_of_whole_trees_are_those_of_optax(name):
    params, other = (tensors(REFERENCE["inputs"][key]) for key in ("params", "target"))
    found, expected = PROJECTIONS[name](LIB, params, other), tensors(REFERENCE["projections"][name])
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), found, expected)


def test_every_name_that_optax_has_too_is_in_a_row():
    shared = {name for name in REFERENCE["names"].split() if callable(getattr(fr, name, None))}
    assert shared == {*REFERENCE["signatures"], *OTHER}


@pytest.mark.parametrize("name", REFERENCE["signatures"])
def test_parameters_have_the_names_the_order_and_the_defaults_of_optax(name):
    ours = [p for p in parameters(name) if (name, p[0]) not in MORE]
    theirs = [p for p in REFERENCE["signatures"][name] if (name, p[0]) not in DIFFERENT]
    for own, other in zip(ours, theirs, strict=True):
        assert own[:2] == other[:2]
        assert (own == other) != ((name, own[0]) in OTHERWISE)


def test_every_difference_from_optax_is_still_one():
    optaxs = {(name, p[0]) for name, known in REFERENCE["signatures"].items() for p in known}
    ours = {(name, p[0]) for name in REFERENCE["signatures"] for p in parameters(name)}
    assert optaxs - ours == set(DIFFERENT)
    assert ours - optaxs == set(MORE)
