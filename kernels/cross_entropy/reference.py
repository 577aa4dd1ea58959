"""Cross-entropy of given logits, in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(
    logits: Tensor, targets: Tensor, *, vocab_size: int | None = None, ignore_index: int = -100
) -> Tensor:
    """-log softmax(logits)[target] per token, in fp32 (fp64 for fp64 logits).

    Args:
        logits: (..., padded_vocab), any floating dtype.
        targets: logits.shape[:-1], int64 below vocab_size, or ignore_index: loss and gradient zero.
        vocab_size: columns from here on are padding and count as -inf; None: all are real.

    Raises:
        ValueError: for shapes, a vocab_size or (on the CPU) targets that don't fit.
    """
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    check_vocab_size(vocab_size, logits.shape[-1])
    check_targets(targets, logits.shape[:-1], vocab_size, ignore_index)
    real = logits[..., :vocab_size].reshape(-1, vocab_size)
    real = real.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(real, targets.reshape(-1), ignore_index=ignore_index, reduction="none")
    return losses.view(targets.shape)


def check_vocab_size(vocab_size: int, padded_vocab: int) -> None:
    """Raise ValueError unless vocab_size is in 1…padded_vocab."""
    if not 0 < vocab_size <= padded_vocab:
        raise ValueError(f"vocab_size must be in 1…{padded_vocab} (padded_vocab), not {vocab_size}")


def check_targets(targets: Tensor, shape: torch.Size, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError unless targets are int64 of `shape` in [0, vocab_size) or ignore_index.

    Values are looked at on the CPU only: elsewhere that would wait for the device.
    """
    if targets.shape != shape or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape {tuple(shape)}, not {targets.dtype} of {tuple(targets.shape)}"
        )
    if targets.device.type == "cpu":
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
        if len(wrong):
            raise ValueError(
                f"target {wrong[0].item()} is neither in 0…{vocab_size - 1} (vocab_size - 1) "
                f"nor ignore_index = {ignore_index}"
            )
