"""What the Triton scans share: one warp walks time for 32 channels, their states in its registers.

Legend: B batch, L tokens per row, D channels (d_inner), N state size per channel (d_state), padded to BLOCK_N.
A *sequence* is a row of the batch, or a document of a packed row. A *walk* is a sequence, or one of its segments where
time is cut too. A program takes one walk for LANES channels: grid (blocks of channels, segments, sequences). Its state
is a tile [BLOCK_N, LANES] with a channel in each lane, so that sums over N stay within a thread. A thread has registers
for about 16 states: a tile of more has more warps, which share out N.

Three habits keep the loop free of shared memory and barriers (compiled without a GPU and read as SASS):
- Rows of keys are addressed from scalars, `keys + t * width + n`: Triton then loads them in the layout they are used
  in. With a pointer tensor carried through the loop each row goes through shared memory, six barriers a token.
- Tiles that are stored and read again lie as [BLOCK_N, LANES], with no alignment promised: four floats side by side
  would be given to one thread, and the whole walk would follow that layout.
- Sums over channels fold the warp onto itself (`lane_sums`): 16 shuffles for 16 sums, where a reduction for each
  takes 80.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.triton_launch import COMPILE_OPTIONS

LANES = tl.constexpr(32)
# A state kept every 64 tokens takes N / 16 bytes per token and channel: for N = 16 half of u in bf16.
CHUNK = 64
# An H100 has 528 warp schedulers: so many warps give each of them two. Fixed, not read off the device: how time is
# cut decides the last bits of the result.
ENOUGH_WARPS = 1024
# A thread may take all of them. Without this word ptxas saves registers for more warps than there are, by reading each
# row of keys just before its use: in a model of the machine code, four tokens forward then take 6100 cycles, not 1300.
MAX_REGISTERS = 255
MIN_SEGMENT = 256  # tokens; shorter ones spend more on joining than they gain
MAX_SEQUENCES = 65535  # the third dimension of a CUDA grid
MAX_STATE = 64  # d_state: of 4 warps


@dataclass(frozen=True)
class Walks:
    """How a problem is cut into programs, and where each keeps its states."""

    batch: int
    seqlen: int
    d_inner: int
    d_state: int
    sequences: int
    segments: int = 1  # of each sequence
    segment: int = 0  # tokens in one; the last may have fewer

    @classmethod
    def of(cls, u: Tensor, d_state: int, cu_seqlens: Tensor | None, cut_time: bool = False) -> "Walks":
        """`cut_time`: the update allows segments of time; they are used where there are too few warps without.

        Raises ValueError for more sequences than a grid holds, or a state too large for a program's registers.
        """
        batch, seqlen, d_inner = u.shape
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        if sequences > MAX_SEQUENCES:
            raise ValueError(f"backend 'triton' takes at most {MAX_SEQUENCES} rows or documents, not {sequences}")
        if d_state > MAX_STATE:
            raise ValueError(f"backend 'triton' takes a d_state of at most {MAX_STATE}, not {d_state}")
        present = sequences * triton.cdiv(d_inner, LANES.value) * warps(triton.next_power_of_2(d_state))
        segments = min(ENOUGH_WARPS // max(present, 1), seqlen // MIN_SEGMENT)
        if not cut_time or cu_seqlens is not None or segments < 2:
            return cls(batch, seqlen, d_inner, d_state, sequences, segment=max(seqlen, 1))
        segment = triton.cdiv(triton.cdiv(seqlen, segments), CHUNK) * CHUNK
        return cls(batch, seqlen, d_inner, d_state, sequences, triton.cdiv(seqlen, segment), segment)

    @property
    def count(self) -> int:
        return self.sequences * self.segments

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.d_inner, LANES.value)

    @property
    def tokens(self) -> int:
        return self.batch * self.seqlen

    @property
    def block_n(self) -> int:
        return triton.next_power_of_2(self.d_state)

    @property
    def slots(self) -> int:
        """Number of kept states: walk w, starting at token f, owns those from f // CHUNK + w on.

        A walk of l tokens needs ceil(l / CHUNK) <= (f + l) // CHUNK - f // CHUNK + 1 of them, so no two overlap, and
        their places need neither a prefix sum nor a copy to the host.
        """
        return self.tokens // CHUNK + self.count

    @property
    def tile_bytes(self) -> int:
        return 4 * self.block_n * LANES.value

    def options(self) -> dict[str, Any]:
        """What every kernel that walks is compiled for."""
        return {
            "BLOCK_N": self.block_n,
            "CHUNK": CHUNK,
            "EVEN": self.d_inner % LANES.value == 0,
            "num_warps": warps(self.block_n),
            "num_stages": 1,
            "maxnreg": MAX_REGISTERS,
            **COMPILE_OPTIONS,
        }


def warps(block_n: int) -> int:
    """Of a program: one for 16 states of a channel."""
    return max(1, block_n // 16)


def to_tiles(state: Tensor | None, walks: Walks) -> Tensor | None:
    """States (rows, D, N) as kernels keep them: fp32 (rows, blocks, BLOCK_N, LANES), padded with zeros."""
    if state is None:
        return None
    lanes = walks.blocks * LANES.value
    padded = functional.pad(state.float(), (0, walks.block_n - walks.d_state, 0, lanes - walks.d_inner))
    return padded.reshape(len(state), walks.blocks, LANES.value, walks.block_n).mT.contiguous()


def from_tiles(tiles: Tensor, walks: Walks) -> Tensor:
    """The inverse of `to_tiles`."""
    states = tiles.mT.reshape(len(tiles), walks.blocks * LANES.value, walks.block_n)
    return states[:, : walks.d_inner, : walks.d_state].contiguous()


def empty_tiles(walks: Walks, places: int, device: torch.device) -> Tensor:
    """Tiles to be written: fp32 (places, blocks, BLOCK_N, LANES)."""
    return torch.empty(places, walks.blocks, walks.block_n, LANES.value, dtype=torch.float32, device=device)


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """Row and step strides of a (B, L, channels) tensor; channels lie side by side."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


# ---- inside kernels ------------------------------------------------------------------------------------------------
@triton.jit
def walk_span(cu_seqlens, sequence, part, L, segment):
    """Batch row of a sequence, and the first and one-past-last token of its part there; int32, as tokens are few.

    A grid of (blocks, parts, sequences), not a division by the number of parts, lets the compiler see that all of a
    warp agrees on them: addresses are then made once a warp, beside the lanes' arithmetic.
    """
    if cu_seqlens is not None:
        row = sequence * 0
        start = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    else:
        row = sequence
        start = part * segment
        end = tl.minimum(start + segment, L)
    return row, start, end


@triton.jit
def at(base, t, step):
    """`base + t * step` where that may be beyond 2^31: a row's place, from its token."""
    return base + tl.cast(t, tl.int64) * step


@triton.jit
def load_row(pointers, in_d, EVEN: tl.constexpr):
    """A number for each channel, 0 beyond the last; EVEN: there is no beyond."""
    if EVEN:
        row = tl.load(pointers)
    else:
        row = tl.load(pointers, mask=in_d, other=0.0)
    return row


@triton.jit
def store_row(pointers, row, in_d, EVEN: tl.constexpr):
    """`load_row`'s counterpart, in the pointers' dtype."""
    row = row.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers, row)
    else:
        tl.store(pointers, row, mask=in_d)


@triton.jit
def tile_of(tiles, place, lane, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_N, LANES] to this program's block in a place of (places, blocks, BLOCK_N, LANES)."""
    tiles += (place * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_N * LANES)
    return tiles + tl.arange(0, BLOCK_N)[:, None] * LANES + lane[None, :]


@triton.jit
def _halves(x, ROWS: tl.constexpr):
    """[ROWS, LANES] -> its first and its last ROWS / 2 rows."""
    return tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2, x.shape[1]]), [1, 2, 0]))


@triton.jit
def _from_partner(x, lane, BIT: tl.constexpr):
    """x with each lane holding what the lane that differs in BIT held."""
    return tl.gather(x, tl.broadcast_to((lane ^ BIT)[None, :], x.shape), 1)


@triton.jit
def _fold(x, lane, ROWS: tl.constexpr, WARPS: tl.constexpr, BIT: tl.constexpr):
    """Add pairs of lanes that differ in BIT: one of them keeps the first half of the rows, the other the last."""
    if ROWS > WARPS:
        first, last = _halves(x, ROWS)
        keeps_last = ((lane & BIT) != 0)[None, :]
        sent = _from_partner(tl.where(keeps_last, first, last), lane, BIT)
        folded = tl.where(keeps_last, last, first) + sent
    else:
        folded = x + _from_partner(x, lane, BIT)
    return folded


@triton.jit
def lane_sums(x, lane, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """Sums of x's rows [BLOCK_N, LANES] over lanes, as [WARPS, LANES]: entry (r, l) is row (l // share) * WARPS + r.

    share = LANES * WARPS / BLOCK_N lanes hold the same sum. Rows are halved until the warps have one each.
    """
    for stage in tl.static_range(5):
        x = _fold(x, lane, BLOCK_N >> stage, WARPS, 16 >> stage)
    return x


@triton.jit
def store_lane_sums(pointers, x, lane, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """Write `lane_sums` of x to the BLOCK_N places from `pointers` on."""
    share: tl.constexpr = 32 * WARPS // BLOCK_N
    row = (lane // share)[None, :] * WARPS + tl.arange(0, WARPS)[:, None]
    sums = lane_sums(x, lane, BLOCK_N, WARPS)
    tl.store(pointers + row, sums, mask=(lane % share == 0)[None, :])


# ---- around the walk ------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["tokens", "L"])
def _pack_kernel(
    first, second, packed, norms, first_row, first_step, second_row, second_step, tokens, L,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    row, t = token // L, token % L
    mask = (token < tokens)[:, None] & (n < N)[None, :]
    a = tl.load(first + (row * first_row + t * first_step)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(second + (row * second_row + t * second_step)[:, None] + n[None, :], mask=mask, other=0.0)
    place = packed + token[:, None] * (2 * BLOCK_N) + n[None, :]
    inside = (token < tokens)[:, None]
    tl.store(place, a, mask=inside)
    tl.store(place + BLOCK_N, b.to(tl.float32), mask=inside)
    if norms is not None:
        tl.store(norms + token, 1.0 + tl.sum(a * a, 1), mask=token < tokens)


def pack_rows(first: Tensor, second: Tensor, walks: Walks, with_norms: bool) -> tuple[Tensor, Tensor | None]:
    """(B, L, N) twice -> fp32 rows [tokens, 2, BLOCK_N], padded with zeros, and 1 + Σ first² of each token.

    Every program of a row reads them: converted once, not once for every 32 channels.
    """
    packed = torch.empty(walks.tokens, 2, walks.block_n, dtype=torch.float32, device=first.device)
    norms = torch.empty(walks.tokens, dtype=torch.float32, device=first.device) if with_norms else None
    if walks.tokens:
        block = max(1, 1024 // walks.block_n)
        with torch.cuda.device_of(first):
            _pack_kernel[(triton.cdiv(walks.tokens, block),)](
                first, second, packed, norms, *strides(first), *strides(second), walks.tokens, walks.seqlen,
                N=walks.d_state, BLOCK_N=walks.block_n, BLOCK=block, **COMPILE_OPTIONS,
            )  # fmt: skip
    return packed, norms


@triton.jit(do_not_specialize=["blocks", "tokens"])
def _unpack_kernel(
    partials, squares, packed, d_first, d_second, blocks, tokens,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    inside = (token < tokens)[:, None]
    place = token[:, None] * (2 * BLOCK_N) + n[None, :]
    a = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    b = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    partials += place
    for _ in range(blocks):
        a += tl.load(partials, mask=inside, other=0.0)
        b += tl.load(partials + BLOCK_N, mask=inside, other=0.0)
        partials += tokens.to(tl.int64) * (2 * BLOCK_N)
        if squares is not None:
            square += tl.load(squares + token, mask=token < tokens, other=0.0)
            squares += tokens
    if squares is not None:
        a -= 2.0 * square[:, None] * tl.load(packed + place, mask=inside, other=0.0)
    mask = inside & (n < N)[None, :]
    result = token[:, None] * N + n[None, :]
    tl.store(d_first + result, a.to(d_first.dtype.element_ty), mask=mask)
    tl.store(d_second + result, b.to(d_second.dtype.element_ty), mask=mask)


def unpack_gradients(
    partials: Tensor, walks: Walks, dtypes: tuple[torch.dtype, torch.dtype], squares: Tensor | None, packed: Tensor
) -> list[Tensor]:
    """Sum the blocks' parts of `pack_rows`' gradients in a fixed order: two of (B, L, N), in `dtypes`.

    partials: [blocks, tokens, 2, BLOCK_N]. squares: [blocks, tokens], the derivative by Σ first² (negated), or None.
    """
    shape = (walks.batch, walks.seqlen, walks.d_state)
    d_first, d_second = (torch.empty(shape, dtype=dtype, device=partials.device) for dtype in dtypes)
    if walks.tokens:
        block = max(1, 512 // walks.block_n)
        with torch.cuda.device_of(partials):
            _unpack_kernel[(triton.cdiv(walks.tokens, block),)](
                partials, squares, packed, d_first, d_second, walks.blocks, walks.tokens,
                N=walks.d_state, BLOCK_N=walks.block_n, BLOCK=block, **COMPILE_OPTIONS,
            )  # fmt: skip
    return [d_first, d_second]
