"""Linear equations, of several systems at once."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows up to which several matrices at once have an LU factorization. With more than 150, several threads and MKL that
#: of torch 2.9 to 2.13 is wrong (pytorch issue 142815).
_LU = 128


def solved(matrices: Tensor, b: Tensor) -> Tensor:
    """The vectors that square matrices take to others; not finite where a matrix is singular, without an error."""
    if matrices.shape[-1] <= _LU:
        return torch.linalg.solve_ex(matrices, b.unsqueeze(-1))[0].squeeze(-1)
    q, upper = torch.linalg.qr(matrices)
    return torch.linalg.solve_triangular(upper, q.mT @ b.unsqueeze(-1), upper=True).squeeze(-1)
