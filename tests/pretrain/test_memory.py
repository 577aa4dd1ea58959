"""The memory estimate's arithmetic against hand-computed numbers and what autograd really saves."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.gla.layout import LONGEST_CHUNK as CPU_GLA_CHUNK
from kernels.longhorn_scan.problem import CHUNK as CPU_SCAN_CHUNK
from kernels.scan import triton_scan, triton_walk
from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, MixerConfig, ModelConfig
from longhorn_layers.model import LanguageModel, count_parameters
from pretrain.config import Config, DataConfig, ParallelConfig, TrainConfig, load_config
from pretrain.flops import matmul_parameters_per_layer
from pretrain.memory import (
    GLA_CHUNK,
    SCAN_CHANNELS,
    SCAN_CHUNK,
    SCAN_SCRATCH,
    ParameterCounts,
    activation_bytes,
    block_activation_bytes,
    estimate_memory,
    mixer_bytes,
)

PRESETS = ("125m", "350m", "1p3b")
PARAMETERS = 1_331_595_264
COUNTS = ParameterCounts(matrices=1_330_905_088, cut_vectors=48 * 3 * 4096, whole=49 * 2048)
SMALL = ModelConfig(vocab_size=256, d_model=64, n_layer=4)  # d_inner 128, dt_rank 4, N 16
MODELS = {
    "longhorn": SMALL,
    "exact-32": replace(SMALL, mixer=LonghornConfig(update="exact", d_state=32)),
    "mamba": replace(SMALL, mixer=MambaConfig()),
    "gla": replace(SMALL, mixer=GLAConfig(), d_ff=96),  # 4 heads of 8 keys and 16 values
    "llama": replace(SMALL, mixer=AttentionConfig(head_dim=16), d_ff=160),
}
BATCH, SEQLEN = 2, 128
TOKENS = BATCH * SEQLEN


def small_config(model: ModelConfig = SMALL, **train: object) -> Config:
    """2 × 128 tokens a micro-batch."""
    return Config(
        model=model,
        data=DataConfig(seqlen=SEQLEN),
        train=TrainConfig(**{"global_batch_size": 8, "micro_batch_size": BATCH, **train}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("size", PRESETS)
def test_parameter_formula_counts_the_model(size: str) -> None:
    model = load_config(f"launch/configs/{size}.yaml").model
    n, d, d_inner = model.n_layer, model.d_model, 2 * model.d_model
    rank, states, vocabulary = math.ceil(d / 16), 16, 32000
    layer = 3 * d * d_inner + d_inner * (rank + 2 * states) + rank * d_inner + 7 * d_inner + d
    assert n * layer + vocabulary * d + d == count_parameters(model)


def test_counts_of_the_1p3b_model() -> None:
    counts = ParameterCounts.of(ModelConfig(d_model=2048, n_layer=48))
    assert counts == COUNTS
    assert counts.total == PARAMETERS
    assert counts.per_rank(2) == ParameterCounts(665_452_544, 294_912, 100_352)


@pytest.mark.parametrize(
    ("name", "cut_vectors", "whole"),
    [
        ("mamba", 4 * 128 * (3 + 16), 5 * 64),  # A_log with dt_bias, D and the convolution's bias
        ("gla", 4 * 32, 9 * 64 + 4 * (16 + 64 * 16)),  # decay_bias; norms, those of heads, decay_down
        ("llama", 0, 9 * 64),
    ],
)
def test_what_tensor_ranks_hold_whole_and_in_fp32(name: str, cut_vectors: int, whole: int) -> None:
    counts = ParameterCounts.of(MODELS[name])
    assert (counts.cut_vectors, counts.whole) == (cut_vectors, whole)
    assert counts.total == count_parameters(MODELS[name])


@pytest.mark.parametrize(
    ("precision", "stage", "tensor", "parameters", "gradients", "optimizer"),
    [
        # 1000 in matrices, 100 in vectors that are cut, 10 in norms; 4 data-parallel ranks
        ("autocast", 1, 1, 4440, 4440, 12 * 1110 // 4),
        ("autocast", 2, 1, 4440, 1110, 12 * 1110 // 4),
        ("autocast", 3, 1, 1110, 1110, 12 * 1110 // 4),
        ("fp32", 1, 1, 4440, 4440, 12 * 1110 // 4),
        ("bf16", 1, 1, 2440, 4440 + 2000, 12 * 1110 // 4),
        ("bf16", 3, 1, 610, 1110, 12 * 1110 // 4),
        ("autocast", 1, 2, 2240, 2240, 12 * 560 // 4),
        ("bf16", 2, 2, 1240, 560, 12 * 560 // 4),
    ],
)
def test_zero_arithmetic(
    precision: str, stage: int, tensor: int, parameters: int, gradients: int, optimizer: int
) -> None:
    config = small_config(precision=precision)
    config.parallel = ParallelConfig(tensor=tensor, zero_stage=stage)
    parts = estimate_memory(config, ParameterCounts(1000, 100, 10), data_parallel=4)
    assert parts["parameters"] == parameters
    assert parts["gradients"] == gradients
    assert parts["optimizer state (fp32 master, two moments)"] == optimizer
    copies = parts["bf16 copies of weights (autocast)"]
    assert copies == (2 * 4 * 128 * (3 * 64 + 36 + 4) // tensor if precision == "autocast" else 0)


def test_zero3_holds_what_it_gathers() -> None:
    stages = {}
    for stage in (2, 3):
        config = small_config(precision="fp32")
        config.parallel.zero_stage = stage
        stages[stage] = estimate_memory(config, ParameterCounts(1000, 100, 10), 4)
    assert stages[3]["temporary buffers"] - stages[2]["temporary buffers"] == 4440


def test_scan_keeps_states_as_often_as_its_kernel() -> None:
    assert SCAN_CHUNK == triton_walk.CHUNK
    assert SCAN_CHANNELS == triton_walk.LANES.value
    assert SCAN_SCRATCH == triton_scan.SCRATCH_BYTES


def saved_bytes(config: ModelConfig, precision: str, tokens: Tensor) -> int:
    """Storage that autograd holds after a forward, parameters apart."""
    model = LanguageModel(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in held.values())


def scan_on_a_cpu(states: int, norms: int, constants: int = 0) -> float:
    """States are kept more often, the rows as they come."""
    return 4 * (128 * states * (1 / CPU_SCAN_CHUNK - 1 / SCAN_CHUNK) - (2 * states + norms) + constants / TOKENS)


# Bytes per token that a CPU's kernels save more than the estimated ones of a GPU, by the bytes of a linear's number.
ON_A_CPU: dict[str, Callable[[int], float]] = {
    "longhorn": lambda width: scan_on_a_cpu(states=16, norms=1),
    "exact-32": lambda width: scan_on_a_cpu(states=32, norms=1),
    "mamba": lambda width: scan_on_a_cpu(states=16, norms=0, constants=2 * 128 * 16),  # A and its exponential
    # The chunked form's states, q, k and v in fp32, no scores; the logarithm's buffer.
    "gla": lambda width: 4 * (4 * 8 * 16 / CPU_GLA_CHUNK - 4 * GLA_CHUNK + 32) + (4 - width) * (32 + 32 + 64),
    "llama": lambda width: -4 * 2 * 16 / 2,  # cosines and sines, counted for both rows
}


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_autograd_saves(name: str, precision: str) -> None:
    """One layer's worth: what a third layer adds to two."""
    config, tokens = MODELS[name], torch.randint(0, 256, (BATCH, SEQLEN))
    expected = block_activation_bytes(config, precision, tensor=1) + ON_A_CPU[name](4 if precision == "fp32" else 2)
    if precision == "autocast":  # copies of weights, planned as a part of their own
        expected += 2 * matmul_parameters_per_layer(config) / TOKENS
    two, three = (saved_bytes(replace(config, n_layer=n), precision, tokens) for n in (2, 3))
    assert (three - two) / TOKENS == pytest.approx(expected, rel=0.01)


def test_checkpointing_keeps_residuals_and_one_block() -> None:
    config = small_config()
    block = block_activation_bytes(config.model, "autocast", 1)
    without = activation_bytes(config)
    config.train.activation_checkpointing = True
    assert without == 256 * (4 * block + 4 * 65)
    assert activation_bytes(config) == 256 * (4 * (4 + 2) * 64 + block + 4 * 65)


REPLICATED = {
    "longhorn": 4 * 65 + 2 * 64 + 2 * 36 + 4 * 33,  # residual and its norm, x_proj's output, the scan's rows
    "mamba": 4 * 65 + 2 * 64 + 2 * 36 + 4 * 32,
    "gla": 2 * (4 * 65 + 2 * 64) + 2 * 16,  # two norms, decay_down's output
    "llama": 2 * (4 * 65 + 2 * 64) + 4 * 2 * 16,  # two norms, cosines and sines
}


@pytest.mark.parametrize("name", REPLICATED)
def test_activations_follow_micro_batch_and_tensor_ranks(name: str) -> None:
    one, two = (small_config(MODELS[name], micro_batch_size=n) for n in (1, 2))
    assert activation_bytes(two) == 2 * activation_bytes(one)
    whole, half = (block_activation_bytes(MODELS[name], "autocast", n) for n in (1, 2))
    assert whole - REPLICATED[name] == 2 * (half - REPLICATED[name])


@pytest.mark.parametrize(
    ("name", "passing", "scratch"),
    [
        ("longhorn", 4 * 33 * 128 / 32, 160 * 2**20),
        ("mamba", 4 * 32 * 128 / 32, 160 * 2**20),
        ("gla", 4 * (2 * 4 * 8 * 16 / 64 + 4 * 32), 0),
        ("llama", 4 * 64, 0),
    ],
)
def test_what_a_mixers_backward_takes_for_a_moment(name: str, passing: float, scratch: int) -> None:
    config = small_config(MODELS[name], precision="fp32")
    config.parallel.tensor = 2
    taken = mixer_bytes(config.model, "fp32")
    assert (taken.passing, taken.scratch) == (passing, scratch)
    block = int(TOKENS * block_activation_bytes(config.model, "fp32", 2))
    buckets, flat_gradient = 4 * 500_000_000, 4 * (500 + 50 + 10) // 4
    temporary = estimate_memory(config, ParameterCounts(1000, 100, 10), 4)["temporary buffers"]
    assert temporary == buckets + flat_gradient + block + int(TOKENS * passing / 2) + scratch


def test_an_uncounted_mixer_is_an_error() -> None:
    model = ModelConfig(mixer=MixerConfig(name="other"))
    with pytest.raises(ValueError, match=r"model\.mixer\.name.*'other'"):
        block_activation_bytes(model, "fp32", tensor=1)
