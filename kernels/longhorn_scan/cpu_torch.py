"""The CPU walk in torch, for machines without a compiler: slower than C++, faster than autograd on the loop."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.longhorn_scan.problem import CHUNK, Gradients, Inputs, Sequences
from kernels.longhorn_scan.reference import MIN_DT, step_size


def forward(x: Inputs, sequences: Sequences, exact: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state, checkpoints); the checkpoints only where `keep`, for a backward."""
    dtype, (d_inner, d_state) = x.D.dtype, (x.u.shape[2], x.k.shape[2])
    final = x.D.new_zeros(len(sequences), d_inner, d_state)
    if x.initial_state is not None:
        final.copy_(x.initial_state)
    checkpoints = x.D.new_empty(sequences.n_chunks, d_inner, d_state) if keep else None
    y = torch.empty(x.u.shape, dtype=dtype)
    for walk in sequences.walks():
        for t0 in range(walk.start, walk.end, CHUNK):
            span = slice(t0, min(t0 + CHUNK, walk.end))
            if checkpoints is not None:
                checkpoints[walk.chunks(t0)] = final[walk.rows]
            chunk = _Chunk.walk(x, span, final[walk.rows], exact)
            y[:, span] = chunk.read_out().transpose(0, 1)
            final[walk.rows] = chunk.states[-1]
    y.addcmul_(x.D, x.u.to(dtype))
    if x.z is not None:
        y.mul_(F.silu(x.z.to(dtype)))
    return y.to(x.u.dtype), final, checkpoints


def backward(
    x: Inputs,
    sequences: Sequences,
    exact: bool,
    checkpoints: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
) -> Gradients:
    """DESIGN §2's backward: states rebuilt chunk by chunk from the checkpoints."""
    dtype, io = x.D.dtype, x.u.dtype
    y, du, deps = (torch.empty(x.u.shape, dtype=dtype) for _ in range(3))
    dq, dk = (torch.empty(x.k.shape, dtype=dtype) for _ in range(2))
    dout = dout.to(dtype)
    dy = dout if x.z is None else dout * F.silu(x.z.to(dtype))
    adjoint = checkpoints.new_zeros(len(sequences), *checkpoints.shape[1:])
    if dstate is not None:
        adjoint.copy_(dstate)
    for walk in sequences.walks():
        for t0 in reversed(range(walk.start, walk.end, CHUNK)):
            span = slice(t0, min(t0 + CHUNK, walk.end))
            chunk = _Chunk.walk(x, span, checkpoints[walk.chunks(t0)], exact)
            y[:, span] = chunk.read_out().transpose(0, 1)
            dy_chunk = dy[:, span].transpose(0, 1).contiguous()
            adjoint[walk.rows], *gradients = chunk.walk_back(dy_chunk, adjoint[walk.rows])
            for whole, part in zip((du, deps, dq, dk), gradients, strict=True):
                whole[:, span] = part.transpose(0, 1)

    u, k, xdt = x.u.to(dtype), x.k.to(dtype), x.dt.to(dtype) + x.dt_bias
    eps = step_size(xdt, k)
    dk.addcmul_(k, (deps * eps.square()).sum(-1, keepdim=True), value=-2)
    # d eps / d x = eps²·e^-x, in this order: eps² alone underflows.
    ddt = deps * eps * (eps * torch.exp(-xdt.clamp(min=MIN_DT))) * (xdt >= MIN_DT)
    dz = None
    if x.z is not None:
        z = x.z.to(dtype)
        gate = torch.sigmoid(z)
        dz = (dout * (y + x.D * u) * gate * (1 + z * (1 - gate))).to(io)
    return Gradients(
        u=du.addcmul_(x.D, dy).to(io),
        dt=ddt.to(io),
        q=dq.to(io),
        k=dk.to(io),
        D=(dy * u).sum((0, 1)),
        dt_bias=ddt.sum((0, 1)),
        z=dz,
        initial_state=None if x.initial_state is None else adjoint,
    )


@dataclass(frozen=True)
class _Chunk:
    """A chunk of T steps, time first, so that what does not depend on the step before is one op for all steps.

    u, eps: (T, B, D); q, k: (T, B, N); gains: eps·k, (T, B, D, N); states: (T + 1, B, D, N), the one before the chunk
    first; residuals: (T, B, D, N), or (T, B, D, 1) for the exact update.
    """

    u: Tensor
    eps: Tensor
    q: Tensor
    k: Tensor
    gains: Tensor
    states: Tensor
    residuals: Tensor
    exact: bool

    @classmethod
    def walk(cls, x: Inputs, span: slice, state: Tensor, exact: bool) -> "_Chunk":
        """Walk the span's steps from `state`."""
        streams = (t[:, span].transpose(0, 1).to(x.D.dtype).contiguous() for t in (x.u, x.dt, x.q, x.k))
        u, dt, q, k = streams
        eps = step_size(dt + x.dt_bias, k)
        states = state.new_empty(len(u) + 1, *state.shape)
        residuals = state.new_empty(len(u), *state.shape[:2], 1 if exact else state.shape[2])
        states[0] = state
        gains = eps.unsqueeze(3) * k.unsqueeze(2)
        # Views of every step at once: taking them one by one costs as much as the arithmetic.
        views = (t.unbind(0) for t in (u.unsqueeze(3), k.unsqueeze(2), gains, residuals, states[:-1], states[1:]))
        for u_t, k_t, gain, residual, before, after in zip(*views, strict=True):
            if exact:
                torch.baddbmm(u_t, before, k_t.mT, alpha=-1, out=residual)
            else:
                torch.addcmul(u_t, before, k_t, value=-1, out=residual)
            torch.addcmul(before, gain, residual, out=after)
        return cls(u, eps, q, k, gains, states, residuals, exact)

    def read_out(self) -> Tensor:
        """S·q of every step, (T, B, D)."""
        return torch.matmul(self.states[1:], self.q.unsqueeze(3)).squeeze(3)

    def walk_back(self, dy: Tensor, adjoint: Tensor) -> tuple[Tensor, ...]:
        """From dy (T, B, D) and the adjoint after the chunk: the adjoint before it, then du, deps, dq, dk.

        D's, the gate's and Σk²'s parts are left out. DESIGN §2: g = G + dy·q, and gk is g·k, summed over n for the
        exact update.
        """
        g = torch.empty_like(self.states[1:])
        gk = torch.empty_like(self.residuals)
        eps = self.eps.unsqueeze(3)
        views = (t.unbind(0) for t in (dy.unsqueeze(3), self.q.unsqueeze(2), self.k.unsqueeze(2), self.gains, g, gk))
        for dy_t, q_t, k_t, gain, g_t, gk_t in reversed(list(zip(*views, strict=True))):
            torch.addcmul(adjoint, dy_t, q_t, out=g_t)
            if self.exact:
                torch.bmm(g_t, k_t.mT, out=gk_t)
            else:
                torch.mul(g_t, k_t, out=gk_t)
            adjoint = torch.addcmul(g_t, gain, gk_t, value=-1)

        before, k_col = self.states[:-1], self.k.unsqueeze(3)
        dq = torch.matmul(dy.unsqueeze(2), self.states[1:]).squeeze(2)
        if self.exact:
            deps = (gk * self.residuals).squeeze(3)
            dk = torch.matmul((eps * self.residuals).mT, g) - torch.matmul((eps * gk).mT, before)
            return adjoint, (eps * gk).squeeze(3), deps, dq, dk.squeeze(2)
        du = self.eps * torch.matmul(g, k_col).squeeze(3)
        gr = g.mul_(self.residuals)
        deps = torch.matmul(gr, k_col).squeeze(3)
        dk = torch.matmul(eps.mT, gr.addcmul_(gk, before, value=-1))
        return adjoint, du, deps, dq, dk.squeeze(2)
