"""What AdamW is given: parameter groups, and a learning rate that depends on the tokens consumed alone."""

import math

import torch
from torch import nn

from pretrain.config import Config, OptimConfig


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter multiplies activations: such decay, and may be held in bf16.

    Mamba's A_log has two dimensions, but holds the logarithms of rates, one per channel and state: its authors, too,
    keep it in fp32 and free of decay.
    """
    return parameter.dim() >= 2 and not name.endswith("A_log")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms, D and A_log do not."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if is_matrix(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not is_matrix(name, p)], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW, fused on GPUs (one kernel per ZeRO partition)."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=torch.cuda.is_available(),
    )


def cast_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Store matrices in `dtype`; D, dt_bias, A_log, norms and other vectors stay fp32, as does the state's maths."""
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter):
            parameter.data = parameter.data.to(dtype)


def learning_rate(config: Config, consumed_tokens: int) -> float:
    """Linear warm-up over the first tokens, then a cosine from lr to min_lr at total_tokens.

    For the step that starts with `consumed_tokens` behind it, the rate at that step's end: the first step of a
    warm-up moves, and the last reaches min_lr.
    """
    optim, total = config.optim, config.total_steps * config.tokens_per_step
    tokens = min(consumed_tokens + config.tokens_per_step, total)
    warmup = optim.warmup_fraction * total
    if tokens < warmup:
        return optim.lr * tokens / warmup
    progress = (tokens - warmup) / (total - warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
