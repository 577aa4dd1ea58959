"""The plan's command: what it prints, by hand-computed numbers, and its refusals."""

from pathlib import Path

import pytest

from pretrain.config import ConfigError, load_config
from pretrain.memory import GIB, ParameterCounts
from pretrain.plan import Plan, PlanOptions, check_memory, main, remedies, split_overrides

PRESET = "launch/configs/1p3b.yaml"
CLUSTER = ["nodes=4", "gpus_per_node=8"]
PARAMETERS = 1_331_595_264
COUNTS = ParameterCounts(matrices=1_330_905_088, cut_vectors=48 * 3 * 4096, whole=49 * 2048)


def table(text: str) -> dict[str, str]:
    """Printed rows by their first column."""
    rows = (line.strip().split("  ") for line in text.splitlines())
    return {row[0]: row[-1].strip() for row in rows if len(row) > 1}


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


@pytest.mark.parametrize(
    ("preset", "mixing", "gflops"),
    [
        # n_layer × d_inner × 16 states × 22 and 21; × n_head × keys × values × 14; × d_model × 2049 / 2 × 12
        ("1p3b", "scan", 48 * 4096 * 16 * 22 / 1e9),
        ("mamba-1p3b", "scan", 48 * 4096 * 16 * 21 / 1e9),
        ("gla-350m", "recurrence", 24 * 4 * 128 * 256 * 14 / 1e9),
        ("llama-1p3b", "attention, causal", 24 * 2048 * 2049 / 2 * 12 / 1e9),
    ],
)
def test_flops_between_tokens_are_named_for_the_mixer(capsys, preset, mixing, gflops):
    assert main([f"launch/configs/{preset}.yaml", "gpus_per_node=8", "nodes=4"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows[f"{mixing}, forward and backward"] == f"{gflops:.3f} GFLOPs"


@pytest.mark.parametrize("preset", sorted(p.name for p in Path("launch/configs").glob("*-*.yaml")))
def test_every_baseline_can_be_planned(capsys, preset):
    assert main([f"launch/configs/{preset}", "gpus_per_node=8"]) == 0
    assert "GPU hours" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("preset", "dimensions"),
    [
        ("mamba-125m", {"d_inner = model.mixer.expand × model.d_model": 1536}),
        ("gla-125m", {"model.mixer.n_head": 4, "model.d_ff": 2240}),
        ("llama-125m", {"heads = model.d_model / model.mixer.head_dim": 12, "model.d_ff": 2240}),
    ],
)
def test_what_tensor_ranks_cut_of_each_mixer(capsys, preset, dimensions):
    error = refusal(capsys, "gpus_per_node=7", "parallel.tensor=7", config=f"launch/configs/{preset}.yaml")
    for name, size in dimensions.items():
        assert (f"does not divide {name} = {size};" in error) == (size % 7 > 0)


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
