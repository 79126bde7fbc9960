"""Names that are not here, as other libraries and articles call things, and what they are called instead."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping

#: What to write for names without capitals and underscores.
_ELSEWHERE = {
    **dict.fromkeys(
        ["lasso", "l1loss", "l1norm", "l1reg", "l1regularization", "l1regularizer", "weightedl1", "l1decay"], "l1"
    ),
    **dict.fromkeys(["l2loss", "l2reg", "l2regularization", "l2regularizer", "l2norm"], "l2, or half_l2 with one half"),
    **dict.fromkeys(["ridge", "tikhonov"], "half_l2, or l2 without one half"),
    **dict.fromkeys(["elasticnet", "l1l2", "l1plusl2", "enet"], "elastic"),
    **dict.fromkeys(["l05", "lhalf"], "l_half"),
    **dict.fromkeys(["l23", "ltwothirds"], "l_two_thirds"),
    **dict.fromkeys(["log", "logsumpenalty"], "log_sum"),
    **dict.fromkeys(["mcpenalty", "minimaxconcavepenalty"], "mcp"),
    **dict.fromkeys(["hoyer", "hoyersq", "deephoyer"], "hoyer_square"),
    **dict.fromkeys(["l2sp", "l2anchor", "anchor"], "anchored_l2"),
    **dict.fromkeys(["nuclearnorm", "tracenorm"], "nuclear"),
    **dict.fromkeys(["spectralnorm"], "spectral, the penalty, or spectral_ball, the constraint"),
    **dict.fromkeys(["tv", "smoothness"], "total_variation, or isotropic_total_variation of images"),
    **dict.fromkeys(["maxnormconstraint", "unitmaxnorm"], "max_norm"),
    **dict.fromkeys(["nonneg", "positive"], "nonnegative"),
    **dict.fromkeys(["unitnorm", "normalizecolumns", "oblique"], "l2_sphere, with radius 1 and dim= of each vector"),
    **dict.fromkeys(["clamp", "weightclip", "weightclipping", "clipweights"], "box"),
    **dict.fromkeys(["indicatorbox"], "box"),
    **dict.fromkeys(["positiveconstraint"], "nonnegative"),
    **dict.fromkeys(["euclideanball"], "l2_ball"),
    **dict.fromkeys(["lassonet"], "hierarchical"),
    **dict.fromkeys(["groupsparsity", "groupsparse", "grouplassopenalty", "groupl1", "l21", "l21norm"], "group_lasso"),
    **dict.fromkeys(["weightedgroupl2"], "group_lasso with weights=, or tree_lasso for groups of features"),
    **dict.fromkeys(["l21plusl1"], "sparse_group_lasso"),
    **dict.fromkeys(["blockmcpenalty", "blockmcp"], "group_mcp"),
    **dict.fromkeys(["l12", "l12norm"], "exclusive_lasso, or group_lasso for the sum of norms"),
    **dict.fromkeys(["orthogonalregularization", "softorthogonality"], "orthogonality, or stiefel, the constraint"),
    **dict.fromkeys(["orthogonalregularizer"], "keras_orthogonal, or orthogonality, which normalizes nothing"),
    **dict.fromkeys(["softupdate", "polyakupdate", "targetupdate", "emaupdate"], "incremental_update"),
    **dict.fromkeys(["weightdecay"], "half_l2, the penalty, or add_decayed_weights, the transform"),
    **dict.fromkeys(
        ["softthresholding", "softshrink", "proxl1", "proximall1"], "l1.prox, or soft_threshold in a chain"
    ),
    **dict.fromkeys(["hardthreshold", "hardthresholding"], "l0.prox, or top_k, which keeps a number of entries"),
    **dict.fromkeys(["prox", "proximaloperator"], "l1.prox(params, step), and that of each penalty"),
    **dict.fromkeys(["proxlasso"], "l1.prox"),
    **dict.fromkeys(["proxridge"], "half_l2.prox"),
    **dict.fromkeys(["proxelasticnet"], "elastic.prox"),
    **dict.fromkeys(["proxgrouplasso"], "group_lasso.prox"),
    **dict.fromkeys(["proxnonnegativelasso"], "nonnegative_form(l1).prox"),
    **dict.fromkeys(["proxnonnegativeridge"], "nonnegative_form(half_l2).prox"),
    **dict.fromkeys(["proxadamw", "proximaladam", "proximaladamw"], "prox_adam, with weight_decay= for AdamW's"),
    **dict.fromkeys(["proximalsgd", "proximalgradient", "ista", "pgd"], "prox_sgd, or fista"),
    **dict.fromkeys(["clipgradnorm", "clipgradientnorm"], "clip_by_global_norm"),
    **dict.fromkeys(["clipgradvalue"], "clip"),
    **dict.fromkeys(["gradientaccumulation", "accumulate"], "MultiSteps"),
    **dict.fromkeys(
        ["nobias", "excludebias", "nonbias", "weightsonly", "onlyweights"], "matrices, or no_bias_norm_embed"
    ),
    **dict.fromkeys(["regularizer", "addregularization", "regularization", "penalize"], "regularize"),
    **dict.fromkeys(["lassopath", "enetpath", "regularisationpath"], "regularization_path"),
    **dict.fromkeys(["lassocv", "elasticnetcv", "cv", "kfold", "crossval"], "cross_validate, or sweep(folds=...)"),
    **dict.fromkeys(["gridsearch", "gridsearchcv", "randomsearch", "tune"], "sweep"),
    **dict.fromkeys(
        ["prune", "pruning"], "remove_dead and resized for channels, to_sparse or to_prune for single weights"
    ),
    **dict.fromkeys(["l1unstructured", "magnitudepruning"], "top_k, which keeps the k largest entries of each leaf"),
    **dict.fromkeys(["lnstructured"], "group_top_k, which keeps the k largest rows of each leaf"),
    **dict.fromkeys(["semistructured"], "n_m_sparsity"),
    **dict.fromkeys(["statedict", "save"], "to_state_dict"),
    **dict.fromkeys(["loadstatedict", "load"], "from_state_dict"),
    **dict.fromkeys(["earlystopping"], "sweep(patience=...)"),
    **dict.fromkeys(["contrib"], "muon, or another name of optax.contrib, at the top level"),
    **dict.fromkeys(["treeutils"], "tree_norm, or another name of optax.tree_utils, at the top level"),
    **dict.fromkeys(["frobenius", "frobeniusnorm"], "group_lasso with dim=None, or l2 for its square"),
    **dict.fromkeys(["summary"], "report, or describe for a chain"),
}


def unknown_name(name: str, here: Mapping[str, object]) -> str:
    """What an error says of a name that the package does not have.

    Example:
        >>> unknown_name("ElasticNet", {"elastic": 1.0})
        "module 'funcreg' has no attribute 'ElasticNet'. Is it elastic?"
    """
    said, plain = f"module 'funcreg' has no attribute {name!r}", _plain(name)
    if name.startswith("_"):
        return said
    if plain.startswith("plot"):
        return f"{said}. Pictures are a module of their own: from funcreg import plot."
    own = {_plain(each): each for each, x in here.items() if not (each.startswith("_") or inspect.ismodule(x))}
    # A digit more, or another one, is another norm: l21 is no l2.
    near = difflib.get_close_matches(plain, [each for each in own if _digits(each) == _digits(plain)], 1, 0.8)
    meant = _ELSEWHERE.get(plain) or own.get(plain) or (own[near[0]] if near else None)
    return said if meant is None else f"{said}. Is it {meant}?"


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _digits(name: str) -> list[str]:
    return [each for each in name if each.isdigit()]
