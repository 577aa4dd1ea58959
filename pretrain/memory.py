"""An estimate of the bytes that training takes on each GPU, by part.

Bytes per parameter and ZeRO's partitions follow pretrain/parallel/zero.py and DeepSpeed 0.19's
stages; activations are what autograd saves in longhorn_layers. The parts are added although they
don't all peak together, so the sum is an upper estimate; fragmentation is not in it.
"""

from dataclasses import dataclass

import torch

from kernels.cross_entropy.chunked import CHUNK_TOKENS
from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.config import Config
from pretrain.flops import matmul_parameters_per_layer

GIB = 2**30
RUNTIME_BYTES = 3 * GIB  # CUDA context, NCCL's and cuBLAS's buffers: assumed, not measured
# Of the Triton scan: tokens between the states it keeps, channels of a program, its backward's scratch at most.
SCAN_CHUNK, SCAN_CHANNELS, SCAN_SCRATCH = 64, 32, 160 * 2**20
# DeepSpeed's defaults, in elements: reduction buffer (allocated in full), and ZeRO-3's gathered.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
FP32, BF16 = 4, 2
MASTER_AND_MOMENTS = 3 * FP32
OPTIMIZER_STATE = "optimizer state (fp32 master, two moments)"


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of the plain model; a tensor-parallel rank has norms whole, a share of the rest."""

    matrices: int
    cut_vectors: int  # dt_bias, D, the convolution's bias
    norms: int

    @classmethod
    def of(cls, model: ModelConfig) -> "ParameterCounts":
        with torch.device("meta"):
            parameters = dict(LanguageModel(model).named_parameters())
        norms = sum(p.numel() for name, p in parameters.items() if name.endswith("norm.weight"))
        matrices = sum(p.numel() for p in parameters.values() if p.dim() >= 2)
        return cls(matrices, sum(p.numel() for p in parameters.values()) - matrices - norms, norms)

    @property
    def total(self) -> int:
        return self.matrices + self.cut_vectors + self.norms

    def per_rank(self, tensor: int) -> "ParameterCounts":
        return ParameterCounts(self.matrices // tensor, self.cut_vectors // tensor, self.norms)

    def stored_bytes(self, precision: str) -> int:
        """fp32, except the matrices of precision "bf16"."""
        matrix = BF16 if precision == "bf16" else FP32
        return matrix * self.matrices + FP32 * (self.cut_vectors + self.norms)


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
        width = FP32 if config.train.precision == "fp32" else BF16
        inputs = (FP32 + width) * model.d_model  # the residual stream, and what the block before adds to it
        return int(tokens * (model.n_layer * inputs + block + final_norm))
    return int(tokens * (model.n_layer * block + final_norm))


def block_activation_bytes(model: ModelConfig, precision: str, tensor: int) -> float:
    """Bytes per token that autograd saves in one block on one tensor-parallel rank.

    Raises ValueError for a mixer whose activations are not counted here.
    """
    mixer = _longhorn(model)
    width = FP32 if precision == "fp32" else BF16
    # Residual, 1/rms and in_proj's input; dt_low, k, q: all whole on every rank.
    whole = FP32 * (model.d_model + 1) + width * model.d_model
    whole += width * (mixer.resolved_dt_rank(model.d_model) + 2 * mixer.d_state)
    whole += FP32 * (2 * mixer.d_state + 1)  # k and q as the scan reads them, 1 + Σk²
    # Per channel: x and z, u, dt, y; the states that the scan keeps.
    channel = width * 5 + FP32 * mixer.d_state / SCAN_CHUNK
    return whole + channel * mixer.expand * model.d_model / tensor


def head_bytes(config: Config) -> int:
    """A chunk's logits, which become their gradient in place, and the head's gradients, on one tensor-parallel rank."""
    model, tokens = config.model, config.train.micro_batch_size * config.data.seqlen
    rows = model.padded_vocab_size // config.parallel.tensor
    width = FP32 if config.train.precision == "fp32" else BF16
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
    scan = int(tokens * _scan_bytes(config.model, config.parallel.tensor)) + SCAN_SCRATCH
    return buckets + flat_gradient + block + scan + int(live * own.stored_bytes(precision))


def _scan_bytes(model: ModelConfig, tensor: int) -> float:
    """Per token, of the scan's backward: parts of the gradients by k, q and Σk² from each block of channels."""
    mixer = _longhorn(model)
    return FP32 * (2 * mixer.d_state + 1) * mixer.expand * model.d_model / tensor / SCAN_CHANNELS


def _longhorn(model: ModelConfig) -> LonghornConfig:
    if not isinstance(model.mixer, LonghornConfig):
        raise ValueError(f"model.mixer.name: the activations of {model.mixer.name!r} are not counted; longhorn's are")
    return model.mixer
