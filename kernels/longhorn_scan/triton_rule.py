"""Longhorn's step, forward and back, for the walk of `kernels/scan/triton_kernels.py`; README.md derives the maths.

With x = dt + dt_bias held >= -80 and <k, S> standing for k[n] * S[n, d] (diagonal update) or its sum over n (exact):

    eps[d] = 1 / (1 + e^-x[d] + sum_n k[n]^2)          r = u - <k, S>          S += eps * k * r

and back, with the adjoint G of the state that a token leaves, g = G + dy * q, h = eps * g:

    <h> = <k, h>       G = g - k * <h>       du = sum_n <h>, exact: <h>       deps * eps = sum_n <h> * r, exact: <h> * r
    dk = sum_d h * r - <h> * S_before        dx = (deps * eps) * (eps * e^-x)
"""

import triton
import triton.language as tl

from kernels.triton_math import power_of_two, reciprocal

DIAGONAL, EXACT = 0, 1  # the rule's variants
LOG2_E = tl.constexpr(1.4426950408889634)
MAX_EXPONENT = tl.constexpr(80 * 1.4426950408889634)  # log2 e^-x where the clamp holds x


@triton.jit
def step_size(dt, bias, norm):
    """eps, and e^-x as the gradient sees it: 0 below the clamp. norm: 1 + sum_n k^2."""
    exponent = tl.fma(dt, -LOG2_E, bias * -LOG2_E)
    e = power_of_two(tl.minimum(exponent, MAX_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
    return reciprocal(norm + e), tl.where(exponent > MAX_EXPONENT, 0.0, e)


@triton.jit
def _residual(state, u, k, EXACT: tl.constexpr):
    """u - <k, S>: a tile, or [1, LANES] if exact."""
    if EXACT:
        r = (u - tl.sum(state * k[:, None], 0))[None, :]
    else:
        r = u[None, :] - k[:, None] * state
    return r


@triton.jit
def advance(state, u, dt, bias, norm, k, rates, EXACT: tl.constexpr):
    """The state after a token; eps and its slope, eps * e^-x."""
    eps, e = step_size(dt, bias, norm)
    return tl.fma(eps[None, :] * k[:, None], _residual(state, u, k, EXACT), state), (eps, eps * e)


@triton.jit
def retreat(adjoint, before, u, dy, k, q, rates, kept, EXACT: tl.constexpr):
    """The adjoint of `before`; gradients by k (but through norm), u, x and -norm; none by rates."""
    eps, slope = kept
    g = tl.fma(dy[None, :], q[:, None], adjoint)
    residual = _residual(before, u, k, EXACT)
    if EXACT:
        h = eps * tl.sum(g * k[:, None], 0)
        r = tl.sum(residual, 0)  # of its one row
        d_eps = h * r
        dk = (eps * r)[None, :] * g - h[None, :] * before
        du = h
        adjoint = g - k[:, None] * h[None, :]
    else:
        scaled = eps[None, :] * g
        dk = scaled * (2.0 * residual - u[None, :])  # h * r - <h> * S_before, where k * S_before = u - r
        h = scaled * k[:, None]
        d_eps = tl.sum(h * residual, 0)
        du = tl.sum(h, 0)
        adjoint = g - k[:, None] * h
    # d_eps is deps * eps, never eps * eps: that would underflow.
    return adjoint, dk, du, d_eps * slope, d_eps * eps, adjoint
