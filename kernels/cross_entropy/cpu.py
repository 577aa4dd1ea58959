"""The softmax part of a chunk in torch's operations: for a CPU, and for fp64 anywhere.

The contract of both functions is that of kernels.cross_entropy.chunked.Softmax.
"""

import torch
from torch import Tensor


def statistics(logits: Tensor, words: int, targets: Tensor) -> Tensor:
    """Maximum, Σ exp(logit − maximum), the target's logit."""
    sums = torch.promote_types(logits.dtype, torch.float32)
    if words == 0:
        nothing = logits.new_zeros((3, len(logits)), dtype=sums)
        nothing[0] = -torch.inf
        return nothing
    real = logits[:, :words].to(sums)
    maximum = real.amax(1)
    shift = maximum.masked_fill(maximum == -torch.inf, 0)  # else -inf - -inf, where a rank has no finite logit
    total = (real - shift.unsqueeze(1)).exp_().sum(1)
    index, here = _index(targets, words)
    return torch.stack((maximum, total, real.gather(1, index).squeeze(1).masked_fill(~here, 0)))


def gradient(logits: Tensor, words: int, targets: Tensor, statistics: Tensor, scale: Tensor) -> Tensor:
    """scale·(softmax − onehot), for fp32 and fp64 in logits' memory."""
    real, (maximum, total, _) = logits[:, :words], statistics
    if words == 0:
        return real
    softmax = real.to(statistics.dtype).sub_(maximum.unsqueeze(1)).exp_()
    dlogits = softmax.mul_((scale / total).unsqueeze(1))
    index, here = _index(targets, words)
    dlogits.scatter_add_(1, index, (-scale).masked_fill(~here, 0).unsqueeze(1))
    skipped = scale == 0
    # A pass over all logits that a CPU can skip by looking; a GPU would have to wait for the answer.
    if not skipped.is_cpu or skipped.any():
        dlogits.masked_fill_(skipped.unsqueeze(1), 0)
    return dlogits.to(logits.dtype)


def _index(targets: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """(tokens, 1) columns to look at, and whether they are the targets'."""
    here = (targets >= 0) & (targets < words)
    return targets.masked_fill(~here, 0).unsqueeze(1), here
