"""The oracle: softmax attention with all scores at once."""

import torch
from torch import Tensor

from kernels.scan.cpu import computed_dtype


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`attention`'s contract without the checks, in fp32 (fp64 for fp64 q)."""
    dtype = computed_dtype(q)
    with torch.autocast(q.device.type, enabled=False):  # it would round the matmuls
        queries, keys, values = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
        scores = queries @ keys.mT * q.shape[3] ** -0.5
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        if cu_seqlens is not None:
            document = torch.bucketize(torch.arange(q.shape[1], device=q.device), cu_seqlens, right=True)
            seen &= document.unsqueeze(1) == document
        out = scores.masked_fill(~seen, -torch.inf).softmax(3) @ values
    return out.transpose(1, 2).to(q.dtype)
