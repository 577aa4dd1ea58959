"""Scalar functions for Triton kernels at the speed of the GPU's special-function unit.

Each is one instruction on NVIDIA GPUs (`rcp.approx`, `ex2.approx`: at most 1 and 2 ulp off), where Triton's own
division takes about eight. The interpreter knows no inline assembly and computes the same in plain operations.
"""

import triton
import triton.language as tl

# Triton reads this once, where `triton.jit` meets a function: the kernels are the interpreter's from then on.
INTERPRETED: bool = triton.knobs.runtime.interpret

if INTERPRETED:

    @triton.jit
    def reciprocal(x):
        """1 / x of an fp32 tensor."""
        return 1.0 / x

    @triton.jit
    def power_of_two(x):
        """2^x of an fp32 tensor."""
        return tl.exp2(x)

else:

    @triton.jit
    def reciprocal(x):
        """1 / x of an fp32 tensor; 0 for x beyond 2^126, whose reciprocal is no normal number."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def power_of_two(x):
        """2^x of an fp32 tensor; 0 below 2^-126."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exponential(x):
    """e^x of an fp32 tensor."""
    return power_of_two(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) of an fp32 tensor: e^-x may overflow to infinity, whose reciprocal is the right 0."""
    return reciprocal(1.0 + exponential(-x))
