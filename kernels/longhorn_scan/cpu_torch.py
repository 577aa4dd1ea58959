"""The CPU walk in torch, for machines without a compiler: slower than C++, faster than autograd on the loop."""

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
            states = _walk_chunk(_streams(x, span), final[walk.rows].clone(), exact, y[:, span])
            final[walk.rows] = states[-1]
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
            streams = _streams(x, span)
            states = _walk_chunk(streams, checkpoints[walk.chunks(t0)], exact, y[:, span])
            buffers = [t[:, span] for t in (dy, du, deps, dq, dk)]
            adjoint[walk.rows] = _backward_chunk(streams, states, adjoint[walk.rows].clone(), exact, *buffers)

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


def _streams(x: Inputs, span: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(u, eps, q, k) of a span of time, in the state's dtype."""
    u, dt, q, k = (t[:, span].to(x.D.dtype) for t in (x.u, x.dt, x.q, x.k))
    return u, step_size(dt + x.dt_bias, k), q, k


def _walk_chunk(streams: tuple[Tensor, Tensor, Tensor, Tensor], state: Tensor, exact: bool, y: Tensor) -> list[Tensor]:
    """Fill y (before D and the gate) and return the chunk's states, the one before it first."""
    states = [state]
    for t, (u, eps, q, k) in enumerate(zip(*(s.unbind(1) for s in streams), strict=True)):
        before, k_row = states[-1], k.unsqueeze(1)
        if exact:
            residual = (u - torch.bmm(before, k_row.mT).squeeze(2)).unsqueeze(2)
        else:
            residual = torch.addcmul(u.unsqueeze(2), before, k_row, value=-1)
        states.append(torch.addcmul(before, eps.unsqueeze(2) * k_row, residual))
        y[:, t] = torch.bmm(states[-1], q.unsqueeze(2)).squeeze(2)
    return states


def _backward_chunk(
    streams: tuple[Tensor, Tensor, Tensor, Tensor],
    states: list[Tensor],
    adjoint: Tensor,
    exact: bool,
    dy: Tensor,
    du: Tensor,
    deps: Tensor,
    dq: Tensor,
    dk: Tensor,
) -> Tensor:
    """Fill du, deps, dq, dk (without D's, the gate's and Σk²'s part) and return the adjoint before the chunk."""
    steps = list(zip(*(s.unbind(1) for s in streams), strict=True))
    for t in reversed(range(len(steps))):
        (u, eps, q, k), before, dy_t = steps[t], states[t], dy[:, t]
        k_row, k_col = k.unsqueeze(1), k.unsqueeze(2)
        g = torch.addcmul(adjoint, dy_t.unsqueeze(2), q.unsqueeze(1))
        dq[:, t] = torch.bmm(dy_t.unsqueeze(1), states[t + 1]).squeeze(1)
        if exact:
            residual = u - torch.bmm(before, k_col).squeeze(2)
            gk = torch.bmm(g, k_col).squeeze(2)
            deps[:, t], du[:, t] = gk * residual, eps * gk
            dk_t = torch.bmm((eps * residual).unsqueeze(1), g)
            dk_t = dk_t.baddbmm_((eps * gk).unsqueeze(1), before, alpha=-1)
            adjoint = torch.addcmul(g, (eps * gk).unsqueeze(2), k_row, value=-1)
        else:
            gr = g * torch.addcmul(u.unsqueeze(2), before, k_row, value=-1)
            gk = g * k_row
            deps[:, t], du[:, t] = torch.bmm(gr, k_col).squeeze(2), eps * gk.sum(2)
            dk_t = torch.bmm(eps.unsqueeze(1), gr.addcmul_(gk, before, value=-1))
            adjoint = torch.addcmul(g, eps.unsqueeze(2) * k_row, gk, value=-1)
        dk[:, t] = dk_t.squeeze(1)
    return adjoint
