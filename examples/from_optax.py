"""What becomes of every public name of optax, in the tables of `from_optax.md`.

Names and parameters of optax are those that `tests/reference/optax.json` stores, and ours come from the code. What is
written here is why a name is not in funcreg, and what stands in its place; a name with no place is an error.

    python examples/from_optax.py
    python examples/from_optax.py --write
"""

import argparse
import inspect
import json
import pathlib
import runpy
from typing import Any

import funcreg as fr

HERE = pathlib.Path(__file__).parent
PAGE = HERE / "from_optax.md"
REFERENCE = json.loads((HERE.parent / "tests" / "reference" / "optax.json").read_text())
plain = runpy.run_path(str(HERE.parent / "tests" / "reference" / "twins.py"))["plain"]
_catalogue = runpy.run_path(str(HERE / "catalogue.py"))
section, OTHERS = _catalogue["section"], _catalogue["OTHERS"]

#: Of names that both have: what an optax user should know, beside parameters.
OTHERWISE = {
    "add_noise": "`key` or `seed` is a whole number, a tensor or a generator; other noise, the same on every device",
    "noisy_sgd": "the noise of `add_noise`",
    **dict.fromkeys(("differentially_private_aggregate", "dpsgd"), "the noise of `add_noise`"),
    "apply_updates": "trees or shapes that do not match are an error that names the leaf",
    "adaptive_grad_clip": "`axis=None` is for outputs last, as in optax; `axis=...` for weights of torch",
    "muon": "default dimensions as in optax, inputs first; `MuonDimensionNumbers` says otherwise",
    "inject_hyperparams": "numbers are kept in float64; also what the factory itself takes no schedule for, as `b1`",
    "MultiSteps": "is a transform itself, in chains and `fuse`; the mean has the dtype of the parameters or float32",
    "lookahead": "also takes plain parameters, and then `state.slow` has the slow ones",
    "sam": "with `sync_period=1` it is the optimizer",
    "selective_transform": "nothing around it moves what is frozen",
    "freeze": "nothing before or after it in a chain moves what is frozen, or counts it in a norm",
    "masked": "leaves left out are `ABSENT`; a string, or a mask that matches nothing, is an error",
    "partition": "an error names the leaf whose label has no transform",
    "flatten": "updates keep the dtype of their leaf",
    "scale_by_adam": "moments of 16-bit parameters are float32; so in all that follows Adam",
    "clip_by_global_norm": "norms are summed in float32 at least; a bound of 0 gives 0",
    "sgd": "`learning_rate=None`, with which optax goes uphill, is an error; so in all optimizers",
    "projection_l1_sphere": "an entry at 0 moves if it has to",
    "projection_l2_sphere": "a tree of zeros goes to a point of the sphere, not to NaN",
    **dict.fromkeys(
        ("tree_add", "tree_sub", "tree_mul", "tree_div", "tree_vdot", "tree_where", "tree_add_scale"),
        "operands are called `tree` and `other`",
    ),
    "tree_cast_like": "`other` for `other_tree`",
    "tree_sum": "no `associative_reduction`",
    "tree_get": "`filtering` gets a dotted path; counters, called `steps`, are found as `count` too",
    "tree_get_all_with_path": "paths are dotted strings",
    "tree_set": "a name that is nowhere is an error; `filtering` gets a dotted path",
}

#: Names that funcreg has not, and what to write instead, or why there is nothing.
INSTEAD: list[tuple[str, str]] = [
    # What a program is made of
    (
        "GradientTransformation GradientTransformationExtraArgs",
        "`fr.Transform`; it has `init` and `update` and is no pair",
    ),
    (
        "Params Updates OptState MaskOrFn ScalarOrSchedule Schedule TransformInitFn TransformUpdateFn "
        "TransformUpdateExtraArgsFn ConditionFn ShouldSkipUpdateFunction AccumulationType",
        "names for annotations; trees of tensors, numbers and functions are what they are",
    ),
    ("MaskedNode", "`ABSENT` of `funcreg.core.tree`, where a mask leaves a leaf out"),
    ("NamedTupleKey", "paths are dotted strings"),
    ("stateless_with_tree_map", "`fr.stateless(lambda updates, params: fr.tree_map(f, updates, params))`"),
    (
        "inject_stateful_hyperparams WrappedSchedule",
        "`fr.inject_hyperparams(fr.adam)`; schedules, also a `StatefulSchedule`, are functions of the number of steps",
    ),
    ("normalize", "`fr.normalize_by_update_norm(eps=0.0)`"),
    (
        "split_real_and_imaginary",
        "complex leaves are taken as they are, by magnitude; `torch.view_as_real` for their parts",
    ),
    # Optimizers
    (
        "cocob dadapt_adamw dog dowg mechanize momo momo_adam prodigy scale_by_cocob scale_by_distance_over_gradients",
        "steps of no given size are out of scope; `fr.polyak_sgd()` and `fr.lbfgs()` find theirs from the value",
    ),
    ("acprop scale_by_acprop madgrad scale_by_madgrad", "not here; `fr.scale_by_belief()` is near the first"),
    ("galore scale_by_galore GaLoreDimensionNumbers", "not here; `fr.adafactor(1e-3)` and `fr.sm3(1e-3)` save memory"),
    ("sophia hutchinson_estimator_diag_hessian", "not here; a curvature goes in as a metric of `fr.proximal_step`"),
    (
        "microbatch micro_grad micro_vmap Accumulator reshape_batch_axis",
        "`fr.MultiSteps(fr.adam(1e-3), 4)`, or `chunk_size` of `torch.func.vmap`",
    ),
    ("nnls", "`fr.minimize(loss, params, fr.nonnegative)`"),
    # States
    ("ScaleByAdamState", "`fr.AdamState`"),
    ("ScaleByAmsgradState", "`fr.AmsgradState`"),
    ("ScaleByLionState", "`fr.LionState`"),
    ("ScaleByRmsState", "`fr.RmsState`"),
    ("ScaleByRStdDevState", "`fr.StddevState`"),
    ("ScaleByRssState", "`fr.RssState`"),
    ("ScaleByAdaDeltaState", "`fr.AdadeltaState`"),
    ("ScaleByAdanState", "`fr.AdanState`"),
    ("ScaleByAdemamixState", "`fr.AdemamixState`"),
    ("ScaleBySimplifiedAdEMAMixState", "`fr.SimplifiedAdemamixState`"),
    ("ScaleByBeliefState", "`fr.BeliefState`"),
    ("ScaleByNovogradState", "`fr.NovogradState`"),
    ("ScaleByRpropState", "`fr.RpropState`"),
    ("ScaleBySM3State", "`fr.SM3State`"),
    ("ScaleByLBFGSState", "`fr.LbfgsState`"),
    ("ScaleByScheduleState", "`fr.ScheduleState`"),
    ("ApplyEvery", "`fr.ApplyEveryState`"),
    ("MultiTransformState", "`fr.PartitionState`"),
    ("InjectStatefulHyperparamsState", "`fr.InjectHyperparamsState`"),
    (
        "AdaptiveGradClipState AddDecayedWeightsState ClipByGlobalNormState ClipState NonNegativeParamsState "
        "NormalizeState ScaleByTrustRatioState ScaleState",
        "`fr.EmptyState`, or a `fr.ScheduleState` where a schedule was given",
    ),
    (
        "COCOBState DAdaptAdamWState DoGState DoWGState GaLoreState "
        "HutchinsonState MadgradState MechanicState MomoAdamState MomoState ProdigyState SophiaState "
        "SplitRealAndImaginaryState",
        "states of what is not here",
    ),
    # Numbers and trees
    ("safe_increment safe_int32_increment", "`steps + 1`: counters are int32 tensors"),
    (
        "safe_norm safe_root_mean_squares unitwise_norm",
        "`fr.global_norm(params)`, `fr.tree_norm(params)`: the gradient at zero is 0",
    ),
    ("unitwise_clip", "`fr.adaptive_grad_clip(0.01, axis=...)`"),
    (
        "bias_correction update_moment update_moment_per_elem_norm update_infinity_moment tree_bias_correction "
        "tree_update_moment tree_update_moment_per_elem_norm tree_update_infinity_moment",
        "what a moment is made of; `fr.ema(0.9)` is the transform",
    ),
    ("tree_allclose", "`torch.testing.assert_close` takes trees"),
    ("tree_conj tree_real", "`fr.tree_map(torch.conj, params)`, `fr.tree_map(lambda w: w.real, params)`"),
    ("tree_batch_shape", "`fr.replicate(params, 3)`"),
    ("tree_dtype", "of each leaf: `fr.tree_map(lambda w: w.dtype, params)`"),
    ("tree_random_like", "`fr.tree_map(torch.randn_like, params)`"),
    ("tree_split_key_like tree_unwrap_random_key_data", "keys of jax; torch has generators"),
    ("power_iteration", "`torch.linalg.eigvalsh`, `torch.lobpcg`; `fr.spectral(params)` for a norm"),
    ("matrix_inverse_pth_root", "`torch.linalg.eigh`"),
    ("multi_normal", "`torch.distributions.MultivariateNormal`"),
    ("scale_gradient", "`s * w + ((1 - s) * w).detach()`"),
    (
        "hvp hessian_diag fisher_diag",
        "`torch.func.jvp` of `grad`, `torch.func.hessian`, `vmap(grad)`; `fr.ewc` takes the last",
    ),
    ("Gumbel Normal make_perturbed_fun hungarian_algorithm base_hungarian_algorithm", "out of scope"),
    # Losses
    ("l2_loss", "half the square: `0.5 * (x - y) ** 2`; it is no penalty"),
    ("squared_error", '`F.mse_loss(x, y, reduction="none")`'),
    ("huber_loss log_cosh", '`F.huber_loss(x, y, reduction="none")`; the penalty is `fr.huber(params, 1.0)`'),
    ("cosine_similarity cosine_distance", "`F.cosine_similarity`"),
    (
        "softmax_cross_entropy softmax_cross_entropy_with_integer_labels safe_softmax_cross_entropy smooth_labels "
        "poly_loss_cross_entropy",
        "`F.cross_entropy`",
    ),
    ("sigmoid_binary_cross_entropy sigmoid_focal_loss", "`F.binary_cross_entropy_with_logits`"),
    ("kl_divergence convex_kl_divergence generalized_kl_divergence kl_divergence_with_log_targets", "`F.kl_div`"),
    ("ctc_loss ctc_loss_with_forward_probs", "`F.ctc_loss`"),
    ("triplet_margin_loss", "`F.triplet_margin_loss`"),
    ("hinge_loss multiclass_hinge_loss", "`F.relu(1 - x * y)`, `F.multi_margin_loss`"),
    (
        "ntxent binary_dice_loss dice_loss multiclass_generalized_dice_loss make_fenchel_young_loss "
        "multiclass_perceptron_loss perceptron_loss multiclass_sparsemax_loss sparsemax_loss ranking_softmax_loss",
        "losses of outputs, out of scope",
    ),
]


def optaxs() -> list[str]:
    """All public names of optax, of its contrib and of the modules beside."""
    return sorted({*REFERENCE["names"].split(), *" ".join(REFERENCE["beside"].values()).split()})


def absent() -> list[str]:
    return [name for names, _ in INSTEAD for name in names.split()]


def shared() -> list[str]:
    return [name for name in optaxs() if hasattr(fr, name)]


def parameters(name: str) -> dict[str, Any]:
    found = inspect.signature(getattr(fr, name)).parameters.values()
    return {p.name: "required" if p.default is p.empty else plain(p.default) for p in found}


def differences(name: str) -> list[str]:
    """What is other about the parameters of a name that both have, as the code says it."""
    if name in REFERENCE["fields"] and hasattr(getattr(fr, name), "_fields"):
        return fields(name, name)
    if name not in REFERENCE["signatures"]:
        return []
    ours, theirs = parameters(name), {p[0]: p[2] for p in REFERENCE["signatures"][name]}
    defaults = [f"`{p}={ours[p]}` by default" for p in ours if p in theirs and ours[p] != theirs[p]]
    return [*beside(list(ours), list(theirs)), *defaults]


def fields(own: str, name: str) -> list[str]:
    """What is other about the fields of a state of optax, but for its counter, which is called `steps` here."""
    ours = list(getattr(fr, own)._fields)
    counter = "steps" if "steps" in ours else "count"
    return beside(ours, [counter if f == "count" else f for f in REFERENCE["fields"][name].split()])


def beside(ours: list[str], theirs: list[str]) -> list[str]:
    left, more = [p for p in theirs if p not in ours], [p for p in ours if p not in theirs]
    if len(left) == len(more) == 1:
        return [f"`{more[0]}` for `{left[0]}`"]
    return [f"no `{p}`" for p in left] + [f"also `{p}`" for p in more]


def words(name: str) -> str:
    return "; ".join([*differences(name), *([OTHERWISE[name]] if name in OTHERWISE else [])])


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([f"| {' | '.join(header)} |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def ticks(names: list[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def same() -> str:
    found: dict[str, list[str]] = {}
    for name in shared():
        if not words(name):
            kind = OTHERS if name.endswith(("State", "Info")) else section(getattr(fr, name))
            found.setdefault(kind, []).append(name)
    return table(["kind", "the same"], [[kind, ticks(names)] for kind, names in sorted(found.items())])


def other() -> str:
    rows: dict[str, list[str]] = {}
    for name in shared():
        if words(name):
            rows.setdefault(words(name), []).append(name)
    return table(["name", "what is other"], [[ticks(names), said] for said, names in rows.items()])


def instead(names: str, said: str) -> str:
    """What stands in the place of some names; of a state also what is other about its fields."""
    own = said.strip("`").removeprefix("fr.")
    known = names in REFERENCE["fields"] and hasattr(getattr(fr, own, None), "_fields")
    return "; ".join([said, *(fields(own, names) if known else [])])


def without() -> str:
    return table(["optax", "here"], [[ticks(names.split()), instead(names, said)] for names, said in INSTEAD])


TABLES = {"same": same, "other": other, "without": without}


def filled(text: str) -> str:
    """The page with the tables that the code gives."""
    lost = sorted({*optaxs()} - {*shared()} - {*absent()})
    if lost:
        raise SystemExit(f"{', '.join(lost)} of optax: neither in funcreg nor in INSTEAD")
    for name, make in TABLES.items():
        head, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not mark or not end:
            raise SystemExit(f"from_optax.md has no lines <!-- {name} --> and <!-- end -->")
        text = f"{head}{mark}\n{make()}\n\n{end}{tail}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="what becomes of the names of optax")
    parser.add_argument("--write", action="store_true", help="write the tables between their marks in from_optax.md")
    text = filled(PAGE.read_text())
    if parser.parse_args().write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
