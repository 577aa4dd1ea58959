"""The cases of each kind of device."""

import torch

from kernels.benchmarks import heads, scans, small_ops
from kernels.benchmarks.case import Case


def cases_for(device: torch.device) -> dict[str, Case]:
    """Every case that runs on this device, by name."""
    return cuda_cases() if device.type == "cuda" else cpu_cases()


def cpu_cases() -> dict[str, Case]:
    """Small enough for one core; fp32 first."""
    conv_shape = {"batch": 4, "seqlen": 512, "d_inner": 512, "d_conv": 4}
    loss_shape = {"tokens": 2048, "d_model": 256, "vocab_size": 32000}
    return {
        "longhorn_scan": scans.longhorn_cpu(),
        "longhorn_scan_threads": scans.longhorn_threads(),
        "selective_scan": scans.selective_cpu(),
        "causal_conv1d": small_ops.conv(conv_shape, torch.float32),
        "rms_norm": small_ops.norm({"tokens": 2048, "d_model": 768}, torch.float32, with_residual=False),
        "cross_entropy": small_ops.loss(loss_shape, torch.float32),
        "attention": heads.softmax_attention("cpu"),
        "gla": heads.gated_linear_attention("cpu"),
    }


def cuda_cases() -> dict[str, Case]:
    """The shapes of one 1.3B layer, and its head, in a micro-batch of 8 × 2048 tokens; bf16."""
    conv_shape = {"batch": 8, "seqlen": 2048, "d_inner": 4096, "d_conv": 4}
    loss_shape = {"tokens": 16384, "d_model": 2048, "vocab_size": 32000}
    return {
        "longhorn_scan": scans.longhorn_cuda(),
        "longhorn_scan_long": scans.longhorn_long(),
        "longhorn_step": scans.longhorn_decode(),
        "selective_scan": scans.selective_cuda(),
        "causal_conv1d": small_ops.conv(conv_shape, torch.bfloat16),
        "rms_norm": small_ops.norm({"tokens": 16384, "d_model": 2048}, torch.bfloat16, with_residual=True),
        "cross_entropy": small_ops.loss(loss_shape, torch.bfloat16),
        "attention": heads.softmax_attention("cuda"),
        "gla": heads.gated_linear_attention("cuda"),
    }
