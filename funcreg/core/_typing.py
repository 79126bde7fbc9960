"""The words in which signatures are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

#: A tree of tensors: nested dicts, lists, tuples, named tuples, or one tensor.
Params: TypeAlias = Any
#: A tree like the parameters: a gradient on its way to become a step.
Updates: TypeAlias = Any
#: A tree of tensors that only the transform that made it looks into.
State: TypeAlias = Any
#: A number or a tensor without dimensions.
Scalar: TypeAlias = float | Tensor
#: From the number of steps taken, a 0-dim integer tensor or an int, to a value.
Schedule: TypeAlias = Callable[[Any], Scalar]
#: A number, a tensor, or a tree of them like the parameters or a prefix of them.
Hyper: TypeAlias = Any
#: A tree of bools like the parameters, a prefix of one, or a function that makes it from parameters. True means apply.
Mask: TypeAlias = Any
