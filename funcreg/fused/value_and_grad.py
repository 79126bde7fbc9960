"""A penalty's value and gradient in one pass over packed leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcreg.core import undocumented
from funcreg.core._typing import Hyper, Mask, Params
from funcreg.core.checks import check_params
from funcreg.core.construction import remembered
from funcreg.core.leafwise import without_autocast
from funcreg.core.tree import restored, structure, tree_leaves
from funcreg.fused.plan import Plan
from funcreg.fused.planned import Columns, Planned
from funcreg.fused.recording import Record, lack_numbers
from funcreg.fused.shards import is_spread
from funcreg.regularizers.penalty import Penalty
from funcreg.transforms.factory_checks import check_selection, nonnegative
from funcreg.transforms.regularizing import check_gradient, check_penalty
from funcreg.transforms.transform import is_scheduled


@remembered
def value_and_grad(
    penalty: Penalty,
    *hyper: Hyper,
    strength: Hyper = 1.0,
    mask: Mask | None = None,
    backend: str | Callable[..., Any] = "inductor",
    **options: Any,
) -> Callable[[Params], tuple[Tensor, Params]]:
    r"""Compile a penalty's value and gradient into one pass, :math:`w \mapsto (\lambda g(w), \lambda \nabla g(w))`.

    For a training loop that differentiates its loss without the penalty, and adds the penalty's own gradient. Leaves
    are packed as in `fuse`, so that it costs a pass over the parameters, whatever their number.

    Args:
        penalty: A penalty :math:`g` such as `l1`.
        hyper: Its hyperparameters: numbers, tensors or trees. Tensors are read at every call.
        strength: :math:`\lambda`: number of at least 0, tensor, or a tree of them like the parameters.
        mask: Leaves on which the penalty acts; the gradient of the others is 0.
        backend: Backend of `torch.compile`.
        options: Static options of the penalty, such as `dim`.

    Raises:
        TypeError: `penalty` is not a penalty, takes other hyperparameters, or has no gradient, as `l0`; or a
            hyperparameter is a schedule.

    Example:
        >>> f = value_and_grad(l1, strength=0.5, backend="eager")
        >>> f({"weight": torch.tensor([3.0, -1.0])})
        (tensor(2.), {'weight': tensor([ 0.5000, -0.5000])})
    """
    check_penalty(penalty, hyper, options)
    check_gradient(penalty)
    check_selection(mask)
    nonnegative(strength=strength)
    if is_scheduled(strength, *hyper):
        raise TypeError(
            "value_and_grad got a function as the strength or a hyperparameter; expected numbers, tensors or trees of "
            "them. It counts no steps, so that a schedule has no place: give a tensor, which is read at every call."
        )

    def plain(params: Params) -> tuple[Tensor, Params]:
        value = penalty.weighted_value(params, strength, *hyper, mask=mask, **options)
        return value, penalty.weighted_grad(params, strength, *hyper, mask=mask, **options)

    return _ValueAndGrad(plain, backend)


class _ValueAndGrad(Planned):
    """A function from parameters to a scalar and a tree like them, in few kernels."""

    def __init__(self, plain: Callable[[Params], tuple[Tensor, Params]], backend: str | Callable[..., Any]) -> None:
        super().__init__(backend)
        self._plain = plain

    def __call__(self, params: Params) -> tuple[Tensor, Params]:
        if undocumented.is_traced() or undocumented.is_transformed(lambda: tree_leaves(params)) or is_spread(params):
            return self._plain(params)
        return self._pass(params)

    @without_autocast
    @torch.no_grad()
    def _pass(self, params: Params) -> tuple[Tensor, Params]:
        checked = self._last
        call = None if checked is None else checked.call((params,))
        if checked is None or call is None:
            check_params(params)
            leaves, spec = structure(params)
            plan = None if lack_numbers(leaves) else self._plan((params,), (leaves,), (spec,))
            if plan is None:
                return self._plain(params)
            checked, call = self._check(plan, (params,), (leaves,), (spec,))
        *slopes, value = checked.plan.run(call)
        return value, restored(checked.specs[0], slopes)

    def _results(self, params: Params) -> list[Any]:
        value, slopes = self._plain(params)
        return [*tree_leaves(slopes), value]

    def _plan_of(self, found: Record, columns: Columns) -> Plan:
        return Plan(found, len(columns[0]), 0, [*found.inputs, None], False, self._compiler, keeps=True)
