"""Attention with fewer heads than its embedding has room for, and encoders of it.

`torch.nn.MultiheadAttention` takes heads to be as wide as the embedding together, so that none can be taken out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcreg.core.undocumented import is_compiling, is_transformed


class NarrowAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` of heads that are narrower than the embedding together.

    Its parameters have the same names, its arguments and results are the same, and `head_dim` is what it was, so that
    scores are scaled as before. PyTorch's fused inference path of encoder layers does not take it; they compute layer
    by layer then.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is True and attn_mask is None; expected the causal mask besides the hint")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._projected(query, key, value)
        mask = self._mask(q, k, key.shape[1], key_padding_mask, attn_mask)
        share = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), share)
            seen = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            seen = F.scaled_dot_product_attention(q, k, v, mask, share)
        out = self.out_proj(seen.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each of shape (batch, heads, positions, features of a head)."""
        if self.in_proj_weight is None:
            maps = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            maps = self.in_proj_weight.chunk(3)
        shifts = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), maps, shifts, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _mask(self, q: Tensor, k: Tensor, keys: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """What is added to the scores; the keys that attention itself adds are seen by all."""
        total = None if mask is None else _added(mask, q.dtype)
        if total is not None and total.dim() == 3:
            total = total.unflatten(0, (-1, q.shape[1]))
        if padding is not None:
            here = _added(padding, q.dtype)[:, None, None, :]
            total = here if total is None else total + here
        return None if total is None else F.pad(total, (0, k.shape[2] - keys))


class NarrowEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` of layers whose attention is narrow, which cannot compute with nested tensors.

    Where the plain one would, in evaluation and without gradients, padded positions are zero behind its layers. So they
    are here.
    """

    nests: bool

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        made = super().forward(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or not self._would_nest(src, mask):
            return made
        padded = _added(src_key_padding_mask, src.dtype) != 0
        if not bool((padded[:, :-1] <= padded[:, 1:]).all()):  # Not all that is padded comes last.
            return made
        zero = made.new_zeros(made.shape[-1])
        return torch.where(padded[..., None], zero if self.norm is None else self.norm(zero), made)

    def _would_nest(self, src: Tensor, mask: Tensor | None) -> bool:
        """Whether the plain encoder would compute with a nested tensor, if there are padded positions."""
        tensors = (src, *self.layers[0].parameters())
        learns = torch.is_grad_enabled() and any([x.requires_grad for x in tensors])
        computes = is_compiling() or is_transformed() or torch.is_autocast_enabled() or learns
        plain = self.nests and not self.layers[0].training and torch.backends.mha.get_fastpath_enabled()
        return plain and not computes and mask is None and src.dim() == 3


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to scores; True in a mask of bools leaves a key out."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
