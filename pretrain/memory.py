"""An estimate of the bytes that training takes on each GPU, by part.

Bytes per parameter and ZeRO's partitions follow pretrain/parallel/zero.py and DeepSpeed 0.19's
stages; activations are what autograd saves in longhorn_layers on a GPU, with the kernels that
training there uses (Triton's scans, flash-linear-attention's GLA, a fused attention): elsewhere
they save somewhat other tensors. The parts are added although they don't all peak together, so the
sum is an upper estimate; fragmentation is not in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels.cross_entropy.chunked import CHUNK_TOKENS
from longhorn_layers.config import ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.config import Config
from pretrain.flops import matmul_parameters_per_layer
from pretrain.optim import is_matrix

GIB = 2**30
RUNTIME_BYTES = 3 * GIB  # CUDA context, NCCL's and cuBLAS's buffers: assumed, not measured
# Of the Triton scan: tokens between the states it keeps, channels of a program, its backward's scratch at most.
SCAN_CHUNK, SCAN_CHANNELS, SCAN_SCRATCH = 64, 32, 160 * 2**20
GLA_CHUNK = 64  # tokens that flash-linear-attention takes at once
# DeepSpeed's defaults, in elements: reduction buffer (allocated in full), and ZeRO-3's gathered.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
FP32, BF16 = 4, 2
MASTER_AND_MOMENTS = 3 * FP32
OPTIMIZER_STATE = "optimizer state (fp32 master, two moments)"
WHOLE = ("norm.weight", "decay_down.weight")  # ends of the names of what every tensor-parallel rank holds


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of the plain model; a tensor-parallel rank has some whole, a share of the rest."""

    matrices: int
    cut_vectors: int  # dt_bias, D, the convolution's bias, …, and A_log: fp32 in any precision
    whole: int  # norms, and GLA's narrow decay_down

    @classmethod
    def of(cls, model: ModelConfig) -> "ParameterCounts":
        with torch.device("meta"):
            parameters = dict(LanguageModel(model).named_parameters())
        whole = sum(p.numel() for name, p in parameters.items() if name.endswith(WHOLE))
        cut = {name: p for name, p in parameters.items() if not name.endswith(WHOLE)}
        matrices = sum(p.numel() for name, p in cut.items() if is_matrix(name, p))
        return cls(matrices, sum(p.numel() for p in cut.values()) - matrices, whole)

    @property
    def total(self) -> int:
        return self.matrices + self.cut_vectors + self.whole

    def per_rank(self, tensor: int) -> "ParameterCounts":
        return ParameterCounts(self.matrices // tensor, self.cut_vectors // tensor, self.whole)

    def stored_bytes(self, precision: str) -> int:
        """fp32, except the cut matrices of precision "bf16"."""
        matrix = BF16 if precision == "bf16" else FP32
        return matrix * self.matrices + FP32 * (self.cut_vectors + self.whole)


def estimate_memory(config: Config, counts: ParameterCounts, data_parallel: int) -> dict[str, int]:
    """Bytes on each GPU by part, the largest rank's; `counts` are those of `config.model`.

    Raises ValueError for a mixer whose activations are not counted here.
    """
    own = counts.per_rank(config.parallel.tensor)
    sharing = data_parallel if config.parallel.zero_stage == 3 else 1
    return {
        "parameters": own.stored_bytes(config.train.precision) // sharing,
        "gradients": _gradient_bytes(config, own, data_parallel),
        OPTIMIZER_STATE: MASTER_AND_MOMENTS * own.total // data_parallel,
        "bf16 copies of weights (autocast)": _autocast_copies(config),
        "activations": activation_bytes(config),
        "logits and loss": head_bytes(config),
        "temporary buffers": _temporary_bytes(config, own, data_parallel),
        "CUDA, NCCL (assumed)": RUNTIME_BYTES,
    }


def activation_bytes(config: Config) -> int:
    """What blocks keep for the backward; checkpointed, their inputs and one block recomputed."""
    model, tokens = config.model, config.train.micro_batch_size * config.data.seqlen
    block = block_activation_bytes(model, config.train.precision, config.parallel.tensor)
    final_norm = FP32 * (model.d_model + 1)
    if config.train.activation_checkpointing:
        # The residual stream, and what the block before adds to it.
        inputs = (FP32 + _width(config.train.precision)) * model.d_model
        return int(tokens * (model.n_layer * inputs + block + final_norm))
    return int(tokens * (model.n_layer * block + final_norm))


def block_activation_bytes(model: ModelConfig, precision: str, tensor: int) -> float:
    """Bytes per token that autograd saves in one block on one tensor-parallel rank.

    Raises ValueError for a mixer whose activations are not counted here.
    """
    width = _width(precision)
    norm = FP32 * (model.d_model + 1) + width * model.d_model  # residual, 1/rms and the linears' input
    saved = mixer_bytes(model, precision)
    whole, cut = norm + saved.whole, saved.cut
    if model.d_ff:
        whole += norm
        cut += width * 4 * model.d_ff  # gate, silu of it, up, their product
    return whole + cut / tensor


@dataclass(frozen=True)
class MixerBytes:
    """Of one layer's mixer, per token: kept for the backward (`whole`: on every tensor-parallel rank, `cut`: shared
    out over them), and taken for a moment by the backward (`passing`, shared out; `scratch`: whatever the tokens)."""

    whole: float
    cut: float
    passing: float
    scratch: int = 0


def _scan_mixer(mixer: Any, d_model: int, width: int, norms: int) -> MixerBytes:
    """`norms`: numbers beside a token's two rows that the scan reads, and whose gradient it sums over channels."""
    d_inner, rows = mixer.expand * d_model, 2 * mixer.d_state
    # dt_low and the rows; the rows as the scan reads them.
    whole = width * (mixer.resolved_dt_rank(d_model) + rows) + FP32 * (rows + norms)
    # Per channel: x and z, u, dt, y; the states that the scan keeps.
    cut = d_inner * (width * 5 + FP32 * mixer.d_state / SCAN_CHUNK)
    # Parts of the rows' gradients from each block of channels.
    return MixerBytes(whole, cut, FP32 * (rows + norms) * d_inner / SCAN_CHANNELS, SCAN_SCRATCH)


def _longhorn(mixer: Any, d_model: int, width: int) -> MixerBytes:
    return _scan_mixer(mixer, d_model, width, norms=1)  # 1 + Σk²


def _mamba(mixer: Any, d_model: int, width: int) -> MixerBytes:
    """Without A, which a layer keeps twice whatever the tokens: 25 MB in all at 1.3B."""
    return _scan_mixer(mixer, d_model, width, norms=0)


def _gla(mixer: Any, d_model: int, width: int) -> MixerBytes:
    keys, values = mixer.expand_k * d_model, mixer.expand_v * d_model
    # q, k; the decay's logits and its sums over a chunk.
    cut = keys * (width * 2 + FP32 * 2)
    # v, g, silu of it, y, its norm, what out_proj reads; 1/rms of each head, its scores in a chunk.
    cut += values * width * 6 + FP32 * mixer.n_head * (1 + GLA_CHUNK)
    # The states between chunks, and their gradients; two copies of q's and k's.
    passing = FP32 * (2 * keys * values / mixer.n_head / GLA_CHUNK + 4 * keys)
    return MixerBytes(width * mixer.gate_rank, cut, passing)


def _attention(mixer: Any, d_model: int, width: int) -> MixerBytes:
    """Cosines and sines are of a row's tokens, here counted for each row."""
    # q, k, v, y; the logarithm of each head's sum. The backward sums q's gradient in fp32.
    cut = width * 4 * d_model + FP32 * d_model / mixer.head_dim
    return MixerBytes(FP32 * 2 * mixer.head_dim, cut, FP32 * d_model)


MIXER_BYTES: dict[str, Callable[[Any, int, int], MixerBytes]] = {
    "longhorn": _longhorn,
    "mamba": _mamba,
    "gla": _gla,
    "attention": _attention,
}


def mixer_bytes(model: ModelConfig, precision: str) -> MixerBytes:
    """Raises ValueError for a mixer whose activations are not counted here."""
    name = model.mixer.name
    if name not in MIXER_BYTES:
        raise ValueError(
            f"model.mixer.name: the activations of {name!r} are not counted; those of {sorted(MIXER_BYTES)} are"
        )
    return MIXER_BYTES[name](model.mixer, model.d_model, _width(precision))


def _width(precision: str) -> int:
    """Bytes of a number that linears read and write."""
    return FP32 if precision == "fp32" else BF16


def head_bytes(config: Config) -> int:
    """A chunk's logits, which become their gradient in place, and the head's gradients, on one tensor-parallel rank."""
    model, tokens = config.model, config.train.micro_batch_size * config.data.seqlen
    rows = model.padded_vocab_size // config.parallel.tensor
    width = _width(config.train.precision)
    logits = min(tokens, CHUNK_TOKENS) * rows * width
    # The fp32 sum over chunks, and that scaled by the backward; in bf16 also the copy for matmuls, or the gradient's.
    weight = rows * model.d_model * (2 * FP32 + (0 if width == FP32 else BF16))
    hidden = tokens * model.d_model * 2 * FP32
    return logits + weight + hidden


def _gradient_bytes(config: Config, own: ParameterCounts, data_parallel: int) -> int:
    """fp32 sums over micro-batches; ZeRO-1 also has all of a micro-batch's bf16 gradients."""
    if config.parallel.zero_stage >= 2:
        return FP32 * own.total // data_parallel
    return FP32 * own.total + (BF16 * own.matrices if config.train.precision == "bf16" else 0)


def _autocast_copies(config: Config) -> int:
    """autocast caches each linear's bf16 weight for the forward; the backward holds it too."""
    if config.train.precision != "autocast":
        return 0
    linears = config.model.n_layer * matmul_parameters_per_layer(config.model)
    return BF16 * linears // config.parallel.tensor


def _temporary_bytes(config: Config, own: ParameterCounts, data_parallel: int) -> int:
    """DeepSpeed's reduction buffers and flat gradient, a block's gradients, ZeRO-3's gathered."""
    precision, tokens = config.train.precision, config.train.micro_batch_size * config.data.seqlen
    dtypes = 2 if precision == "bf16" else 1  # of the parameters; each has a bucket
    buckets = dtypes * FP32 * REDUCE_BUCKET
    flat_gradient = FP32 * own.total // data_parallel  # this rank's, for the optimizer
    # A gradient for each of a block's activations; they come and go block by block.
    block = int(tokens * block_activation_bytes(config.model, precision, config.parallel.tensor))
    live = min(1.0, MAX_LIVE_PARAMETERS / own.total) if config.parallel.zero_stage == 3 else 0.0
    mixer = mixer_bytes(config.model, precision)
    passing = int(tokens * mixer.passing / config.parallel.tensor) + mixer.scratch
    return buckets + flat_gradient + block + passing + int(live * own.stored_bytes(precision))
