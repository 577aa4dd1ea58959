"""The CPU walk in torch, for machines without a compiler: slower than C++, faster than autograd on the loop."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.scan.sequences import CHUNK, Sequences
from kernels.selective_scan.problem import Gradients, Inputs
from kernels.selective_scan.reference import step_size


def forward(x: Inputs, sequences: Sequences, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state, checkpoints); the checkpoints only where `keep`, for a backward."""
    final = x.A.new_zeros(len(sequences), *x.A.shape)
    if x.initial_state is not None:
        final.copy_(x.initial_state)
    checkpoints = x.A.new_empty(sequences.n_chunks, *x.A.shape) if keep else None
    y = torch.empty(x.u.shape, dtype=x.A.dtype)
    for walk in sequences.walks():
        for t0 in range(walk.start, walk.end, CHUNK):
            span = slice(t0, min(t0 + CHUNK, walk.end))
            if checkpoints is not None:
                checkpoints[walk.chunks(t0)] = final[walk.rows]
            chunk = _Chunk.walk(x, span, final[walk.rows])
            y[:, span] = chunk.read_out()
            final[walk.rows] = chunk.states[-1]
    y.addcmul_(x.D, x.u.to(y.dtype))
    if x.z is not None:
        y.mul_(F.silu(x.z.to(y.dtype)))
    return y.to(x.u.dtype), final, checkpoints


def backward(x: Inputs, sequences: Sequences, checkpoints: Tensor, dout: Tensor, dstate: Tensor | None) -> Gradients:
    """README.md's backward: states rebuilt chunk by chunk from the checkpoints."""
    dtype, io = x.A.dtype, x.u.dtype
    y, du, ddelta = (torch.empty(x.u.shape, dtype=dtype) for _ in range(3))
    dB, dC = (torch.empty(x.B.shape, dtype=dtype) for _ in range(2))
    dA = torch.zeros_like(x.A)
    dout = dout.to(dtype)
    dy = dout if x.z is None else dout * F.silu(x.z.to(dtype))
    adjoint = x.A.new_zeros(len(sequences), *x.A.shape)
    if dstate is not None:
        adjoint.copy_(dstate)
    for walk in sequences.walks():
        for t0 in reversed(range(walk.start, walk.end, CHUNK)):
            span = slice(t0, min(t0 + CHUNK, walk.end))
            chunk = _Chunk.walk(x, span, checkpoints[walk.chunks(t0)])
            y[:, span] = chunk.read_out()
            adjoint[walk.rows], dA_chunk, *gradients = chunk.walk_back(dy[:, span], adjoint[walk.rows])
            dA += dA_chunk
            for whole, part in zip((du, ddelta, dB, dC), gradients, strict=True):
                whole[:, span] = part.transpose(0, 1)

    u = x.u.to(dtype)
    ddt = ddelta * torch.sigmoid(x.dt.to(dtype) + x.dt_bias)
    dz = None
    if x.z is not None:
        z = x.z.to(dtype)
        gate = torch.sigmoid(z)
        dz = (dout * (y + x.D * u) * gate * (1 + z * (1 - gate))).to(io)
    return Gradients(
        u=du.addcmul_(x.D, dy).to(io),
        dt=ddt.to(io),
        A=dA,
        B=dB.to(io),
        C=dC.to(io),
        D=(dy * u).sum((0, 1)),
        dt_bias=ddt.sum((0, 1)),
        z=dz,
        initial_state=None if x.initial_state is None else adjoint,
    )


@dataclass(frozen=True)
class _Chunk:
    """A chunk of T steps, time first, so that what does not depend on the step before is one op for all steps.

    u, delta: (T, batch, D); A: (D, N); B, C: (T, batch, N); decays: exp(delta·A), (T, batch, D, N); states:
    (T + 1, batch, D, N), the one before the chunk first.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    decays: Tensor
    states: Tensor

    @classmethod
    def walk(cls, x: Inputs, span: slice, state: Tensor) -> "_Chunk":
        """Walk the span's steps from `state`."""
        u, dt, B, C = (t[:, span].transpose(0, 1).to(x.A.dtype).contiguous() for t in (x.u, x.dt, x.B, x.C))
        delta = step_size(dt + x.dt_bias)
        decays = torch.exp(delta.unsqueeze(3) * x.A)
        states = state.new_empty(len(u) + 1, *state.shape)
        states[0] = state
        torch.mul((delta * u).unsqueeze(3), B.unsqueeze(2), out=states[1:])
        # Views of every step at once: taking them one by one costs as much as the arithmetic.
        for decay, before, after in zip(*(t.unbind(0) for t in (decays, states[:-1], states[1:])), strict=True):
            after.addcmul_(decay, before)
        return cls(u, delta, x.A, B, C, decays, states)

    def read_out(self) -> Tensor:
        """S·C of every step, (batch, T, D)."""
        return torch.matmul(self.states[1:], self.C.unsqueeze(3)).squeeze(3).transpose(0, 1)

    def walk_back(self, dy: Tensor, adjoint: Tensor) -> tuple[Tensor, ...]:
        """From dy (batch, T, D) and the adjoint after the chunk: the adjoint before it, then dA, du, ddelta, dB, dC.

        D's and the gate's parts are left out. README.md: g = G + dy·C.
        """
        dy = dy.transpose(0, 1)
        g = dy.unsqueeze(3) * self.C.unsqueeze(2)
        passed = torch.empty_like(g)  # to the step before: g·exp(delta·A)
        for g_t, decay, passed_t in reversed(list(zip(*(t.unbind(0) for t in (g, self.decays, passed)), strict=True))):
            torch.mul(g_t.add_(adjoint), decay, out=passed_t)
            adjoint = passed_t
        along_B = torch.matmul(g, self.B.unsqueeze(3)).squeeze(3)
        dB = torch.matmul((self.delta * self.u).unsqueeze(2), g).squeeze(2)
        dC = torch.matmul(dy.unsqueeze(2), self.states[1:]).squeeze(2)
        dexponent = passed * self.states[:-1]  # of delta·A
        dA = (dexponent * self.delta.unsqueeze(3)).sum((0, 1))
        ddelta = (dexponent * self.A).sum(3) + self.u * along_B
        return adjoint, dA, self.delta * along_B, ddelta, dB, dC
