"""Mamba-1's step, forward and back, for the walk of `kernels/scan/triton_kernels.py`; README.md derives the maths.

    delta = softplus(x)        a[n, d] = e^(delta[d] * A[n, d])        S = a * S + delta * u * B

`rates` is A * log2(e), so that a decay is one product and one exponential of two.
"""

import triton
import triton.language as tl

from kernels.triton_math import exponential, power_of_two, reciprocal, sigmoid

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """ln(1 + e^x) to fp32's last digits but one: max(x, 0) + 2 artanh(s), s = e / (2 + e) <= 1 / 3 for e = e^-|x|."""
    e = exponential(-tl.abs(x))
    s = e * reciprocal(2.0 + e)
    square = s * s
    series = tl.full(x.shape, 2.0 / 15, tl.float32)
    for i in tl.static_range(6, -1, -1):
        series = tl.fma(series, square, 2.0 / (2 * i + 1))
    return tl.fma(s, series, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def advance(state, u, dt, bias, norm, B, rates, VARIANT: tl.constexpr):
    """The state after a token; delta, its slope, the decay."""
    x = dt + bias
    delta = softplus(x)
    decay = power_of_two(delta[None, :] * rates)
    return tl.fma(decay, state, (delta * u)[None, :] * B[:, None]), (delta, sigmoid(x), decay)


@triton.jit
def retreat(adjoint, before, u, dy, B, C, rates, kept, VARIANT: tl.constexpr):
    """The adjoint of `before`; gradients by B, u and x, and by A; none by norm."""
    delta, slope, decay = kept
    g = tl.fma(dy[None, :], C[:, None], adjoint)
    adjoint = g * decay
    by_input = tl.sum(g * B[:, None], 0)
    by_exponent = adjoint * before  # the derivative by delta * A
    d_delta = tl.fma(tl.sum(by_exponent * rates, 0), LN_2, u * by_input)
    return adjoint, g * (delta * u)[None, :], delta * by_input, d_delta * slope, delta, by_exponent * delta[None, :]
