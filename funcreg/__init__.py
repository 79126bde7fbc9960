"""Functional weight regularization for PyTorch: penalties, proximal operators and gradient transforms.

All that is public is here, and pictures in `plot`. Each of these packages imports from those above it alone:

    core           trees, masks, functions over leaves, checks
    regularizers   penalties and constraints
    networks       groups of channels, and smaller networks
    transforms     gradient transforms, schedules, optimizers
    fused          a chain as one compiled step
    torch_optim    penalties on torch's optimizers, and chains as one
    solvers        minima with a certificate, paths of strengths
    training       sweeps
    reports        what a penalty did, what a chain does
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from funcreg.regularizers.lifting import penalty as penalty
from funcreg.regularizers.gradient_alone import (
    hoyer_square as hoyer_square,
    keras_orthogonal as keras_orthogonal,
    orthogonality as orthogonality,
    orthogonality_offdiagonal as orthogonality_offdiagonal,
    srip as srip,
)
from funcreg.transforms.annealing import (
    cubic_ramp_schedule as cubic_ramp_schedule,
    cyclic_schedule as cyclic_schedule,
    relative_schedule as relative_schedule,
)
from funcreg.solvers.certificates import (
    duality_gap as duality_gap,
    kkt_residual as kkt_residual,
    lambda_max as lambda_max,
    null_model as null_model,
    sparsity as sparsity,
)
from funcreg.core.checkpoint import (
    from_state_dict as from_state_dict,
    to_state_dict as to_state_dict,
)
from funcreg.transforms.clipping import (
    ZeroNansState as ZeroNansState,
    adaptive_grad_clip as adaptive_grad_clip,
    centralize as centralize,
    clip as clip,
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
    normalize_by_update_norm as normalize_by_update_norm,
    zero_nans as zero_nans,
)
from funcreg.transforms.chains import (
    chain as chain,
    named_chain as named_chain,
)
from funcreg.transforms.combine import (
    ApplyIfFiniteState as ApplyIfFiniteState,
    MaskedState as MaskedState,
    PartitionState as PartitionState,
    apply_if_finite as apply_if_finite,
    freeze as freeze,
    masked as masked,
    partition as partition,
    set_to_zero as set_to_zero,
)
from funcreg.regularizers.composition import Structure as Structure
from funcreg.regularizers.constraint import (
    Constraint as Constraint,
    constraint as constraint,
)
from funcreg.regularizers.constraints import (
    box as box,
    halfspace as halfspace,
    hyperplane as hyperplane,
    l1_ball as l1_ball,
    l2_ball as l2_ball,
    l2_sphere as l2_sphere,
    linf_ball as linf_ball,
    max_norm as max_norm,
    min_max_norm as min_max_norm,
    nonnegative as nonnegative,
    simplex as simplex,
)
from funcreg.regularizers.counts import (
    group_top_k as group_top_k,
    n_m_sparsity as n_m_sparsity,
    sparse_simplex as sparse_simplex,
    top_k as top_k,
)
from funcreg.transforms.conventions import (
    Elastic as Elastic,
    elastic_from_glmnet as elastic_from_glmnet,
    elastic_from_keras as elastic_from_keras,
    elastic_from_sklearn as elastic_from_sklearn,
    elastic_from_sklearn_logistic as elastic_from_sklearn_logistic,
    elastic_from_sklearn_ridge as elastic_from_sklearn_ridge,
    elastic_from_torch as elastic_from_torch,
)
from funcreg.networks.channel_tables import ChannelGroups as ChannelGroups
from funcreg.networks.channels import channel_groups as channel_groups
from funcreg.networks.coupled import coupled as coupled
from funcreg.transforms.decay import (
    AnchorState as AnchorState,
    add_cautious_weight_decay as add_cautious_weight_decay,
    add_corrected_weight_decay as add_corrected_weight_decay,
    add_independent_weight_decay as add_independent_weight_decay,
    add_l1_weight_decay_to_anchor as add_l1_weight_decay_to_anchor,
    add_l1_weight_decay_to_ema as add_l1_weight_decay_to_ema,
    add_proximal_weight_decay as add_proximal_weight_decay,
    add_weight_decay_to_anchor as add_weight_decay_to_anchor,
    add_weight_decay_to_ema as add_weight_decay_to_ema,
)
from funcreg.networks.deployment import (
    Pruned as Pruned,
    from_prune as from_prune,
    to_prune as to_prune,
    to_sparse as to_sparse,
)
from funcreg.reports.describe import (
    Description as Description,
    describe as describe,
)
from funcreg.transforms.ensemble import (
    Members as Members,
    ensemble as ensemble,
    init_ensemble as init_ensemble,
    replicate as replicate,
    stack as stack,
    stacked as stacked,
    unstack as unstack,
)
from funcreg.transforms.factored import (
    FactoredState as FactoredState,
    adafactor as adafactor,
    scale_by_factored_rms as scale_by_factored_rms,
)
from funcreg.networks.factorizing import factorized as factorized
from funcreg.networks.families import Along as Along
from funcreg.fused.value_and_grad import value_and_grad as value_and_grad
from funcreg.fused.fusing import fuse as fuse
from funcreg.core.grids import log_uniform as log_uniform
from funcreg.regularizers.groups import (
    group_l0 as group_l0,
    group_l_half as group_l_half,
    group_mcp as group_mcp,
    group_scad as group_scad,
)
from funcreg.regularizers.mixed_norms import (
    exclusive_lasso as exclusive_lasso,
    l1_linf as l1_linf,
    linf as linf,
)
from funcreg.transforms.lbfgs import (
    LbfgsState as LbfgsState,
    lbfgs as lbfgs,
    scale_by_lbfgs as scale_by_lbfgs,
)
from funcreg.transforms.linesearch import (
    BacktrackingLinesearchInfo as BacktrackingLinesearchInfo,
    ScaleByBacktrackingLinesearchState as ScaleByBacktrackingLinesearchState,
    ScaleByZoomLinesearchState as ScaleByZoomLinesearchState,
    ZoomLinesearchInfo as ZoomLinesearchInfo,
    scale_by_backtracking_linesearch as scale_by_backtracking_linesearch,
    scale_by_zoom_linesearch as scale_by_zoom_linesearch,
    value_and_grad_from_state as value_and_grad_from_state,
)
from funcreg.solvers.minimize import (
    Solution as Solution,
    minimize as minimize,
)
from funcreg.transforms.mixing import (
    AdemamixState as AdemamixState,
    SimplifiedAdemamixState as SimplifiedAdemamixState,
    ademamix as ademamix,
    adopt as adopt,
    scale_by_ademamix as scale_by_ademamix,
    scale_by_adopt as scale_by_adopt,
    scale_by_simplified_ademamix as scale_by_simplified_ademamix,
    simplified_ademamix as simplified_ademamix,
)
from funcreg.transforms.muon import (
    MuonDimensionNumbers as MuonDimensionNumbers,
    MuonState as MuonState,
    muon as muon,
    scale_by_muon as scale_by_muon,
)
from funcreg.transforms.noise import (
    AddNoiseState as AddNoiseState,
    DifferentiallyPrivateAggregateState as DifferentiallyPrivateAggregateState,
    add_noise as add_noise,
    differentially_private_aggregate as differentially_private_aggregate,
)
from funcreg.torch_optim.optimizer import Optimizer as Optimizer
from funcreg.transforms.optimizers import (
    adagrad as adagrad,
    adam as adam,
    adamw as adamw,
    amsgrad as amsgrad,
    lamb as lamb,
    lion as lion,
    nadamw as nadamw,
    rmsprop as rmsprop,
    sgd as sgd,
)
from funcreg.solvers.path import (
    Path as Path,
    regularization_path as regularization_path,
)
from funcreg.solvers.cross_validation import (
    CrossValidation as CrossValidation,
    cross_validate as cross_validate,
)
from funcreg.transforms.per_example import (
    per_example_global_norm_clip as per_example_global_norm_clip,
    per_example_layer_norm_clip as per_example_layer_norm_clip,
)
from funcreg.transforms.placement import with_weight_decay as with_weight_decay
from funcreg.transforms.plateau import (
    ReduceLROnPlateauState as ReduceLROnPlateauState,
    reduce_on_plateau as reduce_on_plateau,
)
from funcreg.transforms.polyak import (
    polyak_sgd as polyak_sgd,
    scale_by_polyak as scale_by_polyak,
)
from funcreg.regularizers.penalties import (
    elastic as elastic,
    group_lasso as group_lasso,
    half_l2 as half_l2,
    l1 as l1,
    l2 as l2,
    shrink as shrink,
    sparse_group_lasso as sparse_group_lasso,
)
from funcreg.regularizers.penalty import Penalty as Penalty
from funcreg.regularizers.polytopes import (
    affine_set as affine_set,
    box_section as box_section,
    polyhedron as polyhedron,
)
from funcreg.regularizers.transport_plans import (
    birkhoff as birkhoff,
    transport as transport,
)
from funcreg.regularizers.projections import (
    projection_box as projection_box,
    projection_halfspace as projection_halfspace,
    projection_hypercube as projection_hypercube,
    projection_hyperplane as projection_hyperplane,
    projection_l1_ball as projection_l1_ball,
    projection_l1_sphere as projection_l1_sphere,
    projection_l2_ball as projection_l2_ball,
    projection_l2_sphere as projection_l2_sphere,
    projection_linf_ball as projection_linf_ball,
    projection_non_negative as projection_non_negative,
    projection_simplex as projection_simplex,
    projection_vector as projection_vector,
)
from funcreg.transforms.proximal import (
    FistaState as FistaState,
    ProximalState as ProximalState,
    WeighedTraceState as WeighedTraceState,
    fista as fista,
    prox_adam as prox_adam,
    prox_sgd as prox_sgd,
    proximal_step as proximal_step,
)
from funcreg.torch_optim.regularize import regularize as regularize
from funcreg.transforms.regularizing import (
    add_decayed_weights as add_decayed_weights,
    add_penalty as add_penalty,
    keep_params_nonnegative as keep_params_nonnegative,
    project as project,
    proximal as proximal,
    soft_threshold as soft_threshold,
)
from funcreg.transforms.adam_family import (
    AdamState as AdamState,
    AdanState as AdanState,
    AmsgradState as AmsgradState,
    BeliefState as BeliefState,
    scale_by_adam as scale_by_adam,
    scale_by_adamax as scale_by_adamax,
    scale_by_adan as scale_by_adan,
    scale_by_amsgrad as scale_by_amsgrad,
    scale_by_belief as scale_by_belief,
    scale_by_radam as scale_by_radam,
    scale_by_yogi as scale_by_yogi,
)
from funcreg.transforms.scaling import (
    EmaState as EmaState,
    LionState as LionState,
    TraceState as TraceState,
    ema as ema,
    scale as scale,
    scale_by_learning_rate as scale_by_learning_rate,
    scale_by_lion as scale_by_lion,
    scale_by_schedule as scale_by_schedule,
    scale_by_sign as scale_by_sign,
    scale_by_trust_ratio as scale_by_trust_ratio,
    trace as trace,
)
from funcreg.transforms.preconditioners import (
    AdadeltaState as AdadeltaState,
    NovogradState as NovogradState,
    RmsState as RmsState,
    RssState as RssState,
    SM3State as SM3State,
    StddevState as StddevState,
    scale_by_adadelta as scale_by_adadelta,
    scale_by_novograd as scale_by_novograd,
    scale_by_rms as scale_by_rms,
    scale_by_rss as scale_by_rss,
    scale_by_sm3 as scale_by_sm3,
    scale_by_stddev as scale_by_stddev,
)
from funcreg.networks.removal import (
    remove_dead as remove_dead,
    with_buffers as with_buffers,
)
from funcreg.reports.report import (
    Report as Report,
    compare as compare,
    explain as explain,
    penalties as penalties,
    report as report,
)
from funcreg.networks.resizing import resized as resized
from funcreg.transforms.schedules import (
    constant_schedule as constant_schedule,
    cosine_decay_schedule as cosine_decay_schedule,
    exponential_decay as exponential_decay,
    linear_schedule as linear_schedule,
    piecewise_constant_schedule as piecewise_constant_schedule,
    piecewise_interpolate_schedule as piecewise_interpolate_schedule,
    polynomial_schedule as polynomial_schedule,
)
from funcreg.transforms.phases import (
    cosine_onecycle_schedule as cosine_onecycle_schedule,
    join_schedules as join_schedules,
    linear_onecycle_schedule as linear_onecycle_schedule,
    sgdr_schedule as sgdr_schedule,
    warmup_constant_schedule as warmup_constant_schedule,
    warmup_cosine_decay_schedule as warmup_cosine_decay_schedule,
    warmup_exponential_decay_schedule as warmup_exponential_decay_schedule,
)
from funcreg.regularizers.separable import (
    anchored_l1 as anchored_l1,
    anchored_l2 as anchored_l2,
    ewc as ewc,
    huber as huber,
    relaxed_mumford_shah as relaxed_mumford_shah,
)
from funcreg.regularizers.magnitudes import (
    l0 as l0,
    l_half as l_half,
    l_two_thirds as l_two_thirds,
)
from funcreg.regularizers.concave import (
    capped_l1 as capped_l1,
    etp as etp,
    geman as geman,
    l0_envelope as l0_envelope,
    log_sum as log_sum,
    mcp as mcp,
    scad as scad,
)
from funcreg.regularizers.nonnegative_forms import nonnegative_form as nonnegative_form
from funcreg.regularizers.neighbours import (
    fused_lasso as fused_lasso,
    total_variation as total_variation,
)
from funcreg.regularizers.orders import (
    oscar as oscar,
    slope as slope,
)
from funcreg.regularizers.nested_groups import tree_lasso as tree_lasso
from funcreg.regularizers.skip_layers import hierarchical as hierarchical
from funcreg.transforms.stochastic import (
    DualAveragingState as DualAveragingState,
    FtrlState as FtrlState,
    adamprox as adamprox,
    ftrl as ftrl,
    ramda as ramda,
    rmda as rmda,
)
from funcreg.regularizers.spectral import (
    nuclear as nuclear,
    nuclear_ball as nuclear_ball,
    on_singular_values as on_singular_values,
    rank_envelope as rank_envelope,
    schatten as schatten,
    spectral as spectral,
    spectral_ball as spectral_ball,
    spectral_mcp as spectral_mcp,
    stiefel as stiefel,
)
from funcreg.training.sweep import (
    Sweep as Sweep,
    sweep as sweep,
)
from funcreg.transforms.transform import (
    ScheduleState as ScheduleState,
    EmptyState as EmptyState,
    Transform as Transform,
    identity as identity,
    init_empty_state as init_empty_state,
    stateless as stateless,
)
from funcreg.core.leafwise import (
    apply_updates as apply_updates,
    global_norm as global_norm,
)
from funcreg.core.masks import matrices as matrices
from funcreg.core.tree import (
    tree_leaves as tree_leaves,
    tree_map as tree_map,
    tree_paths as tree_paths,
)
from funcreg.transforms.averaging import (
    LookaheadParams as LookaheadParams,
    LookaheadState as LookaheadState,
    SAMState as SAMState,
    ScheduleFreeState as ScheduleFreeState,
    lookahead as lookahead,
    sam as sam,
    schedule_free as schedule_free,
    schedule_free_adamw as schedule_free_adamw,
    schedule_free_eval_params as schedule_free_eval_params,
    schedule_free_sgd as schedule_free_sgd,
)
from funcreg.transforms.hyperparams import (
    InjectHyperparamsState as InjectHyperparamsState,
    inject_hyperparams as inject_hyperparams,
)
from funcreg.regularizers.images import isotropic_total_variation as isotropic_total_variation
from funcreg.transforms.monitoring import (
    MonitorState as MonitorState,
    SnapshotState as SnapshotState,
    measure_with_ema as measure_with_ema,
    monitor as monitor,
    snapshot as snapshot,
)
from funcreg.transforms.wrappers import (
    ApplyEveryState as ApplyEveryState,
    ConditionallyMaskState as ConditionallyMaskState,
    ConditionallyTransformState as ConditionallyTransformState,
    MultiSteps as MultiSteps,
    MultiStepsState as MultiStepsState,
    apply_every as apply_every,
    conditionally_mask as conditionally_mask,
    conditionally_transform as conditionally_transform,
    flatten as flatten,
    multi_transform as multi_transform,
    selective_transform as selective_transform,
    skip_large_updates as skip_large_updates,
    skip_not_finite as skip_not_finite,
    with_extra_args as with_extra_args,
    with_extra_args_support as with_extra_args_support,
)
from funcreg.transforms.directions import (
    OptimisticGradientState as OptimisticGradientState,
    RpropState as RpropState,
    scale_by_optimistic_gradient as scale_by_optimistic_gradient,
    scale_by_param_block_norm as scale_by_param_block_norm,
    scale_by_param_block_rms as scale_by_param_block_rms,
    scale_by_rprop as scale_by_rprop,
)
from funcreg.transforms.adaptive_optimizers import (
    adabelief as adabelief,
    adadelta as adadelta,
    adamax as adamax,
    adamaxw as adamaxw,
    adan as adan,
    nadam as nadam,
    novograd as novograd,
    optimistic_adam as optimistic_adam,
    optimistic_adam_v2 as optimistic_adam_v2,
    radam as radam,
    sm3 as sm3,
    yogi as yogi,
)
from funcreg.transforms.plain_optimizers import (
    dpsgd as dpsgd,
    fromage as fromage,
    lars as lars,
    noisy_sgd as noisy_sgd,
    optimistic_gradient_descent as optimistic_gradient_descent,
    rprop as rprop,
    sign_sgd as sign_sgd,
    signum as signum,
)
from funcreg.transforms.per_leaf import per_leaf as per_leaf
from funcreg.transforms.precision import (
    MasterWeightsState as MasterWeightsState,
    StochasticRoundingState as StochasticRoundingState,
    with_master_weights as with_master_weights,
    with_stochastic_rounding as with_stochastic_rounding,
)
from funcreg.core.spelling import unknown_name as _unknown_name
from funcreg.core.selection import (
    no_bias_norm_embed as no_bias_norm_embed,
    select as select,
)
from funcreg.transforms.trees import (
    incremental_update as incremental_update,
    periodic_update as periodic_update,
    tree_get as tree_get,
    tree_get_all_with_path as tree_get_all_with_path,
    tree_map_params as tree_map_params,
    tree_set as tree_set,
)
from funcreg.transforms.arithmetic import (
    tree_add as tree_add,
    tree_add_scale as tree_add_scale,
    tree_cast as tree_cast,
    tree_cast_like as tree_cast_like,
    tree_clip as tree_clip,
    tree_div as tree_div,
    tree_full_like as tree_full_like,
    tree_max as tree_max,
    tree_min as tree_min,
    tree_mul as tree_mul,
    tree_norm as tree_norm,
    tree_ones_like as tree_ones_like,
    tree_scale as tree_scale,
    tree_size as tree_size,
    tree_sub as tree_sub,
    tree_sum as tree_sum,
    tree_vdot as tree_vdot,
    tree_where as tree_where,
    tree_zeros_like as tree_zeros_like,
)

__version__ = "0.1.0"

if not _TYPE_CHECKING:  # A type checker would take any name for one that is here.

    def __getattr__(name: str) -> object:
        """The error for a name that is not here, which says what it is called instead."""
        raise AttributeError(_unknown_name(name, globals()), name=name)
