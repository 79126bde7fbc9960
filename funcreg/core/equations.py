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


def solved_upwards(matrices: Tensor, b: Tensor) -> Tensor:
    """The same for matrices that are symmetric; not finite where one is not positive definite."""
    factors, where = torch.linalg.cholesky_ex(matrices)
    found = torch.cholesky_solve(b.unsqueeze(-1), factors).squeeze(-1)
    return torch.where((where == 0).unsqueeze(-1), found, torch.nan)
