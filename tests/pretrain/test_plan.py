"""The plan's arithmetic against hand-computed numbers and what torch really does; its refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import longhorn_layers.longhorn
from kernels.longhorn_scan.problem import CHUNK as CPU_SCAN_CHUNK
from kernels.scan import triton_scan, triton_walk
from longhorn_layers.config import LonghornConfig, MixerConfig, ModelConfig
from longhorn_layers.model import LanguageModel, count_parameters
from longhorn_layers.registry import SIZES
from pretrain.config import (
    Config,
    ConfigError,
    DataConfig,
    ParallelConfig,
    TrainConfig,
    load_config,
)
from pretrain.flops import (
    flops_per_token,
    matmul_flops_per_token,
    recomputed_flops_per_token,
    scan_flops_per_token,
)
from pretrain.memory import (
    GIB,
    SCAN_CHANNELS,
    SCAN_CHUNK,
    SCAN_SCRATCH,
    ParameterCounts,
    activation_bytes,
    block_activation_bytes,
    estimate_memory,
)
from pretrain.plan import Plan, PlanOptions, check_memory, main, remedies, split_overrides

PRESET = "launch/configs/1p3b.yaml"
CLUSTER = ["nodes=4", "gpus_per_node=8"]
PARAMETERS = 1_331_595_264
COUNTS = ParameterCounts(matrices=1_330_905_088, cut_vectors=48 * 3 * 4096, norms=49 * 2048)


def small_config(**train) -> Config:
    """4 layers of d_model 64 (d_inner 128, dt_rank 4, N 16), 2 × 128 tokens a micro-batch."""
    return Config(
        model=ModelConfig(vocab_size=256, d_model=64, n_layer=4),
        data=DataConfig(seqlen=128),
        train=TrainConfig(**{"global_batch_size": 8, "micro_batch_size": 2, **train}),
    )


def table(text: str) -> dict[str, str]:
    """Printed rows by their first column."""
    rows = (line.strip().split("  ") for line in text.splitlines())
    return {row[0]: row[-1].strip() for row in rows if len(row) > 1}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_formula_counts_the_model(size):
    model = SIZES[size]
    n, d, d_inner = model.n_layer, model.d_model, 2 * model.d_model
    rank, states, vocabulary = math.ceil(d / 16), 16, 32000
    layer = 3 * d * d_inner + d_inner * (rank + 2 * states) + rank * d_inner + 7 * d_inner + d
    assert n * layer + vocabulary * d + d == count_parameters(model)


def test_counts_of_the_1p3b_model():
    counts = ParameterCounts.of(SIZES["1p3b"])
    assert counts == COUNTS
    assert counts.total == PARAMETERS
    half = counts.per_rank(2)
    assert half == ParameterCounts(665_452_544, 294_912, 100_352)


# FLOPs


def test_flops_of_the_1p3b_model():
    model = SIZES["1p3b"]
    weights = 48 * (3 * 2048 * 4096 + 4096 * 160 + 128 * 4096) + 32000 * 2048
    assert matmul_flops_per_token(model) == 6 * weights
    assert scan_flops_per_token(model) == 48 * 4096 * 16 * 22
    assert flops_per_token(model) == 8_049_917_952
    untied = replace(model, tie_embeddings=False)
    assert flops_per_token(untied) == flops_per_token(model)


def test_exact_update_has_a_cheaper_backward():
    model = ModelConfig(mixer=LonghornConfig(update="exact"), d_model=32, n_layer=2)
    assert scan_flops_per_token(model) == 2 * 64 * 16 * 19


def test_recomputation_is_apart_and_has_no_head():
    model = ModelConfig(vocab_size=256, d_model=64, n_layer=3)
    states, weights = 3 * 128 * 16, 3 * 128 * (3 * 64 + 36 + 4)
    assert recomputed_flops_per_token(model, activation_checkpointing=False) == 14 * states
    assert recomputed_flops_per_token(model, True) == 14 * states + 2 * weights + 7 * states


def test_matmul_flops_are_those_torch_counts(monkeypatch):
    def elementwise_scan(u, dt, q, k, *, z, **_):
        return u * dt * z * (q.sum(-1, keepdim=True) + k.sum(-1, keepdim=True))

    monkeypatch.setattr(longhorn_layers.longhorn, "longhorn_scan", elementwise_scan)
    config = ModelConfig(vocab_size=256, d_model=64, n_layer=2)
    tokens = torch.randint(0, 256, (2, 24))
    model = LanguageModel(config)
    # autocast: the counter doesn't know the in-place matmul that sums the head's gradient in fp32.
    autocast = torch.autocast("cpu", torch.bfloat16)
    with FlopCounterMode(display=False) as counter, autocast:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == matmul_flops_per_token(config) * tokens.numel()


def test_uncounted_mixer_is_an_error():
    model = ModelConfig(mixer=MixerConfig(name="mamba"))
    with pytest.raises(ValueError, match=r"model\.mixer\.name.*'mamba'"):
        flops_per_token(model)
    with pytest.raises(ValueError, match=r"model\.mixer\.name.*'mamba'"):
        block_activation_bytes(model, "fp32", tensor=1)


# Memory


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
def test_zero_arithmetic(precision, stage, tensor, parameters, gradients, optimizer):
    config = small_config(precision=precision)
    config.parallel = ParallelConfig(tensor=tensor, zero_stage=stage)
    parts = estimate_memory(config, ParameterCounts(1000, 100, 10), data_parallel=4)
    assert parts["parameters"] == parameters
    assert parts["gradients"] == gradients
    assert parts["optimizer state (fp32 master, two moments)"] == optimizer
    copies = parts["bf16 copies of weights (autocast)"]
    assert copies == (2 * 4 * 128 * (3 * 64 + 36 + 4) // tensor if precision == "autocast" else 0)


def test_zero3_holds_what_it_gathers():
    stages = {}
    for stage in (2, 3):
        config = small_config(precision="fp32")
        config.parallel.zero_stage = stage
        stages[stage] = estimate_memory(config, ParameterCounts(1000, 100, 10), 4)
    assert stages[3]["temporary buffers"] - stages[2]["temporary buffers"] == 4440


def test_scan_keeps_states_as_often_as_its_kernel():
    assert SCAN_CHUNK == triton_walk.CHUNK
    assert SCAN_CHANNELS == triton_walk.LANES.value
    assert SCAN_SCRATCH == triton_scan.SCRATCH_BYTES


def saved_bytes(config: ModelConfig, precision: str, tokens: torch.Tensor) -> int:
    """Storage that autograd holds after a forward, parameters apart."""
    model = LanguageModel(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_activations_are_those_autograd_saves(precision):
    """One layer's worth: what a third layer adds to two.

    The CPU's scan keeps states more often, and q and k as they come.
    """
    config, tokens = ModelConfig(vocab_size=256, d_model=64), torch.randint(0, 256, (2, 128))
    expected = block_activation_bytes(config, precision, tensor=1)
    expected += 128 * 16 * 4 * (1 / CPU_SCAN_CHUNK - 1 / SCAN_CHUNK) - 4 * (2 * 16 + 1)
    if precision == "autocast":  # copies of weights, planned as a part of their own
        expected += 2 * 128 * (3 * 64 + 36 + 4) / tokens.numel()
    two, three = (saved_bytes(replace(config, n_layer=n), precision, tokens) for n in (2, 3))
    assert (three - two) / tokens.numel() == pytest.approx(expected, rel=0.01)


def test_checkpointing_keeps_residuals_and_one_block():
    config = small_config()
    block = block_activation_bytes(config.model, "autocast", 1)
    without = activation_bytes(config)
    config.train.activation_checkpointing = True
    assert without == 256 * (4 * block + 4 * 65)
    assert activation_bytes(config) == 256 * (4 * (4 + 2) * 64 + block + 4 * 65)


def test_activations_follow_micro_batch_and_tensor_ranks():
    one, two = small_config(micro_batch_size=1), small_config(micro_batch_size=2)
    assert activation_bytes(two) == 2 * activation_bytes(one)
    model = one.model
    whole, half = (block_activation_bytes(model, "autocast", n) for n in (1, 2))
    replicated = 4 * 65 + 2 * 64 + 2 * 36 + 4 * 33  # residual and its norm, x_proj's output, the scan's rows
    assert whole - replicated == 2 * (half - replicated)


# The command


def test_the_1p3b_plan(capsys):
    assert main([PRESET, *CLUSTER]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["parameters"] == "4.96 GiB"  # the memory table's: printed after the run's
    assert rows["optimizer steps"] == "47,684"
    assert rows["tokens per step"] == "2,097,152"
    assert rows["gradient accumulation"] == "4"
    assert rows["optimizer state (fp32 master, two moments)"] == "0.47 GiB"
    assert rows["model total (what MFU counts)"] == "8.050 GFLOPs"
    # 100,000,595,968 tokens × 8.05 GFLOPs / (32 × 989 TFLOP/s × 0.4) = 63,590 s
    assert rows["hours"] == "17.7"
    assert rows["one checkpoint (12 bytes/parameter)"] == "16.0 GB"
    assert rows["checkpoint.keep_last=3"] == "47.9 GB"
    assert rows["training tokens, one pass (2 bytes each)"] == "200.0 GB"
    assert rows["total"] == "263.9 GB"


def test_parts_of_memory_are_labelled_estimates_and_add_up(capsys):
    assert main([PRESET, *CLUSTER]) == 0
    out = capsys.readouterr().out
    assert f"{PARAMETERS:,} (1.33B)" in out
    memory = table(out[out.index("Memory per GPU") : out.index("FLOPs per token")])
    *parts, total = (float(value.split(" GiB")[0]) for value in memory.values())
    assert total == pytest.approx(sum(parts), abs=0.05)
    assert out.count("(estimate)") == 3
    assert "\x1b" not in out and "─" not in out  # plain where it is no terminal


def test_options_change_the_time(capsys):
    assert main([PRESET, *CLUSTER, "mfu=0.2", "peak_tflops=494.5"]) == 0
    assert table(capsys.readouterr().out)["hours"] == "70.7"  # four times 17.66


def refusal(capsys, *overrides: str, config: str = PRESET) -> str:
    assert main([config, *overrides]) == 2
    return capsys.readouterr().err


def test_batch_that_does_not_divide_names_the_nearest_that_do(capsys):
    error = refusal(capsys, "nodes=3", "gpus_per_node=8")
    assert "train.global_batch_size=1024" in error
    assert "960 or 1152" in error


def test_tensor_ranks_must_divide_gpus_channels_and_vocabulary(capsys):
    error = refusal(capsys, "gpus_per_node=8", "parallel.tensor=3")
    gpus, vocabulary, channels = error.strip().split("\n")
    assert "nodes=1 × gpus_per_node=8 = 8" in gpus
    assert "padded vocabulary = 32000" in vocabulary
    assert "d_inner" in channels and "4096" in channels
    assert all("nearest that divide everything: 2 or 4" in line for line in (gpus, vocabulary, channels))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpus_per_node=3", "parallel.tensor=3", "train.micro_batch_size=1"], "d_inner"),
        # d_inner = 2 × 24 divides by 3, the padded vocabulary 32000 does not
        (["gpus_per_node=3", "parallel.tensor=3", "model.d_model=24"], "padded vocabulary = 32000"),
        (["gpus_per_node=4", "parallel.tensor=8"], "gpus_per_node=4 = 4"),
    ],
)
def test_each_dimension_is_checked(capsys, overrides, message):
    assert message in refusal(capsys, *overrides)


def test_yaml_whose_parallelism_and_micro_batch_do_not_fit(capsys, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("model: {d_model: 64}\nparallel: {tensor: 5}\ntrain: {global_batch_size: 8}\n")
    assert "parallel.tensor=5" in refusal(capsys, "gpus_per_node=5", config=str(path))
    path.write_text("model: {d_model: 64}\ntrain: {global_batch_size: 8, micro_batch_size: 3}\n")
    error = refusal(capsys, "gpus_per_node=1", config=str(path))
    assert "train.micro_batch_size" in error and "6 or 9" in error


def test_memory_beyond_the_gpu_says_what_fits(capsys):
    assert main([PRESET, *CLUSTER, "train.micro_batch_size=16"]) == 2
    captured = capsys.readouterr()
    assert "total" in captured.out  # the parts are shown, then refused
    assert "gpu_memory_gib=80" in captured.err
    assert "train.activation_checkpointing=true" in captured.err
    assert "train.micro_batch_size=8" in captured.err  # 16 was too many; not a needlessly small 1
    assert "parallel.tensor=2" in captured.err


def test_remedies_fit_and_are_the_fewest_changes():
    config = load_config(PRESET)
    plan = Plan(config, PlanOptions(nodes=4, gpus_per_node=8, gpu_memory_gib=16.0), COUNTS)
    found = remedies(plan)
    assert found and "no setting" not in " ".join(found)
    for remedy in found:
        overrides, size = remedy.removesuffix(" GiB)").split(" (")
        again = Plan(load_config(PRESET, overrides.split()), plan.options, COUNTS)
        assert again.fits()
        assert sum(again.memory().values()) / GIB == pytest.approx(float(size), abs=0.01)
    assert len({len(remedy.split()) for remedy in found}) == 1


def test_nothing_fits_in_too_small_a_gpu():
    plan = Plan(load_config(PRESET), PlanOptions(gpus_per_node=8, gpu_memory_gib=4.0), COUNTS)
    with pytest.raises(ConfigError, match="no setting fits"):
        check_memory(plan)


def test_keys_are_split_between_plan_and_config():
    options, rest = split_overrides(["nodes=2", "train.seed=7", "run_dir=r", "mfu=0.5", "log.peak_tflops=1"])
    assert (options.nodes, options.gpus, options.mfu, options.peak_tflops) == (2, 2, 0.5, 989.0)
    assert rest == ["train.seed=7", "run_dir=r", "log.peak_tflops=1"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("node=4", "did you mean 'nodes'"),
        ("gpu_per_node=4", "did you mean 'gpus_per_node'"),
        ("zero_stag=2", "did you mean 'parallel.zero_stage'"),
        ("plan.mfu=0.3", "did you mean 'mfu'"),
        ("qqq=1", "the plan's own keys: gpu_memory_gib"),
        ("train.micro_batch=4", "did you mean 'train.micro_batch_size'"),
        ("nodes=four", "nodes: Value 'four'"),
        ("nodes=0", "nodes must be above 0"),
        ("gpu_memory_gib=nan", "gpu_memory_gib must be above 0"),
        ("mfu=40", "mfu is a share"),
        ("nodes", "key=value"),
    ],
)
def test_bad_keys_and_values(capsys, override, message):
    assert message in refusal(capsys, override)


def test_missing_config_names_the_presets(capsys):
    error = refusal(capsys, config="launch/configs/1p4b.yaml")
    assert "1p4b.yaml: no such config file" in error and "1p3b.yaml" in error
