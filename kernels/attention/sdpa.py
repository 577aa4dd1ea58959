"""torch's scaled_dot_product_attention, which picks a kernel that never holds all scores where it can."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`attention`'s contract after its checks. Documents are attended one by one, for no work is lost on masks."""
    if cu_seqlens is None:
        return _causal(q, k, v)
    bounds = pairwise(cu_seqlens.tolist())
    return torch.cat([_causal(*(t[:, start:end] for t in (q, k, v))) for start, end in bounds], 1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seqlen, seqlen_k = q.shape[1], k.shape[1]
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    if seqlen == seqlen_k:
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    else:  # is_causal would align the first query with the first key; a single one sees every key
        mask = None if seqlen == 1 else causal_lower_right(seqlen, seqlen_k)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return out.transpose(1, 2).to(q.dtype)  # autocast may have cast the inputs
