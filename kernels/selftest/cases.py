"""What is tested: each op on small inputs that reach every part of its kernels.

On a device shapes span several blocks of channels and chunks of time and are a multiple of neither, but for those
named "as in training", whose kernels are compiled for whole blocks. Triton's interpreter takes some 50 ms a program and
token: there they just cross one block or chunk, and what needs long rows is left to a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.selftest import ops

Shape = Mapping[str, int]
Op = Callable[..., dict[str, Tensor]]
# Name, dtype, draw, shape, interpreted.
Kind = tuple[str, torch.dtype, Op, Shape, Shape | None]
BF16, FP32 = torch.bfloat16, torch.float32
# How far a tensor of each dtype may be off, of its largest value. In bf16 twice what rounding a result may cost: sums
# are fp32 in every op, whatever its inputs. (The interpreter cuts bits off where it should round.)
ALLOWED = {FP32: 2e-5, BF16: 2**-7}


@dataclass(frozen=True)
class Case:
    """An op on one kind of input.

    Attributes:
        draw: (generator, dtype, *shape) -> inputs by name, on the CPU.
        run: (backend, **inputs) -> results by name; backend "reference", in float64, says what is right.
        shape: on a device.
        interpreted: under Triton's interpreter; None: not there.
        tolerance: of every tensor, where its own dtype does not say it (ALLOWED).
        differentiable: the gradients of the results by every input are tested too.
    """

    op: str
    name: str
    dtype: torch.dtype
    draw: Op
    run: Op
    shape: Shape
    interpreted: Shape | None
    tolerance: float | None = None
    differentiable: bool = True


def all_cases() -> list[Case]:
    return [*_scan_cases(), *_conv_cases(), *_norm_cases(), *_loss_cases(), *_step_cases()]


def _shape(names: str) -> Callable[..., Shape]:
    return lambda *sizes: dict(zip(names.split(), sizes, strict=True))


def _scan_cases() -> list[Case]:
    size = _shape("batch seqlen d_inner d_state")
    # Chunks of 64 tokens, blocks of 32 channels; a row of 512 tokens or more is cut into segments where there is one.
    training: Kind = "as in training", BF16, ops.draw_scan, size(2, 150, 96, 16), size(1, 67, 32, 16)
    shorter: Kind = (*training[:4], size(1, 6, 32, 16))
    states: Kind = "states", FP32, ops.draw_scan_states, size(2, 131, 45, 11), size(2, 7, 33, 11)
    documents: Kind = "documents", BF16, ops.draw_scan_documents, size(1, 201, 64, 16), size(1, 13, 33, 16)
    segments: Kind = "segments of time", BF16, ops.draw_scan_states, size(1, 1100, 64, 16), None
    large: Kind = "a large state", FP32, ops.draw_scan, size(1, 70, 32, 64), size(1, 6, 32, 64)
    diagonal, exact = (partial(ops.longhorn_scan, update=update) for update in ("diagonal", "exact"))
    scans: list[tuple[str, str, Op, tuple[str, str], tuple[Kind, ...]]] = [
        ("longhorn_scan", "diagonal, ", diagonal, ops.LONGHORN_ROWS, (training, states, documents, segments, large)),
        ("longhorn_scan", "exact, ", exact, ops.LONGHORN_ROWS, (shorter, states, documents)),
        ("selective_scan", "", ops.selective_scan, ops.SELECTIVE_ROWS, (training, states, documents, large)),
    ]
    return [
        Case(op, f"{prefix}{name}", dtype, partial(draw, rows), run, shape, interpreted)
        for op, prefix, run, rows, kinds in scans
        for name, dtype, draw, shape, interpreted in kinds
    ]


def _conv_cases() -> list[Case]:
    size = _shape("batch seqlen d_inner d_conv")
    # At most 128 tokens and 256 channels a program.
    silu, linear = (partial(ops.causal_conv1d, activation=activation) for activation in ("silu", None))
    return [
        Case("causal_conv1d", *case)
        for case in [
            ("as in training", BF16, ops.draw_conv, silu, size(2, 300, 512, 4), size(1, 20, 256, 4)),
            ("states", FP32, ops.draw_conv_states, silu, size(2, 261, 150, 4), size(2, 17, 130, 4)),
            ("documents", BF16, ops.draw_conv_documents, silu, size(1, 301, 300, 4), size(1, 19, 258, 4)),
            ("no activation", FP32, ops.draw_conv, linear, size(1, 131, 45, 3), size(1, 9, 5, 3)),
        ]
    ]


def _norm_cases() -> list[Case]:
    size = _shape("tokens d_model")
    return [
        Case("rms_norm", *case)
        for case in [
            ("as in training", FP32, ops.draw_norm, ops.rms_norm, size(133, 2048), size(19, 256)),
            ("residual", BF16, ops.draw_norm_residual, ops.rms_norm, size(133, 2048), size(19, 256)),
            ("odd width", BF16, ops.draw_norm, ops.rms_norm, size(133, 333), size(19, 45)),
        ]
    ]


def _loss_cases() -> list[Case]:
    size = _shape("tokens d_model padded_vocab")
    # At most 4096 words a program. A bf16 matmul rounds logits beyond 2 to 2^-7, and a probability is off by as much.
    shapes = size(150, 64, 5120), size(9, 16, 4224)
    summed, each = (partial(ops.linear_cross_entropy, reduction=reduction) for reduction in ("sum", "none"))
    return [
        Case("linear_cross_entropy", "sum", FP32, ops.draw_loss, summed, *shapes),
        Case("linear_cross_entropy", "as in training", BF16, ops.draw_loss, summed, *shapes, tolerance=2**-6),
        Case("linear_cross_entropy", "by token", FP32, ops.draw_loss, each, *shapes),
        Case("linear_cross_entropy", "two ranks", FP32, ops.draw_loss, ops.sharded_cross_entropy, *shapes),
    ]


def _step_cases() -> list[Case]:
    scan, conv = _shape("batch d_inner d_state")(5, 333, 16), _shape("batch d_inner d_conv")(5, 333, 4)
    diagonal, exact = (partial(ops.longhorn_step, update=update) for update in ("diagonal", "exact"))
    draw_longhorn, draw_selective = (partial(ops.draw_scan_step, r) for r in (ops.LONGHORN_ROWS, ops.SELECTIVE_ROWS))
    steps: list[tuple[str, str, torch.dtype, Op, Op, Shape, Shape | None]] = [
        ("longhorn_step", "diagonal, one token", BF16, draw_longhorn, diagonal, scan, scan),
        ("longhorn_step", "exact, one token", FP32, draw_longhorn, exact, scan, scan),
        ("selective_step", "one token", BF16, draw_selective, ops.selective_step, scan, scan),
        ("causal_conv1d_step", "one token", BF16, ops.draw_conv_step, ops.causal_conv1d_step, conv, conv),
    ]
    return [Case(*step, differentiable=False) for step in steps]
