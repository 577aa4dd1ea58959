"""The whole-model benchmarks: that they run, what they count and refuse. No test looks at a real time."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from kernels.benchmarks.timing import Times
from longhorn_layers.config import ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.benchmarks import checkpoint, decode, llama, profile, step
from pretrain.benchmarks.decode import Decoder, WrongLogits
from pretrain.benchmarks.profile import Breakdown, Kernel
from pretrain.benchmarks.step import Run, TorchStep, largest, random_batch
from pretrain.config import Config
from pretrain.flops import flops_per_token, matmul_flops_per_token, matmul_parameters_per_layer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MODEL = ModelConfig(vocab_size=300, d_model=32, n_layer=2)
TINY = """
model: {vocab_size: 300, d_model: 32, n_layer: 2}
data: {seqlen: 16}
train: {micro_batch_size: 2}
log: {peak_tflops: 0.1}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def tiny_config(precision: str = "autocast", checkpointing: bool = False) -> Config:
    config = Config(model=MODEL)
    train = replace(config.train, micro_batch_size=2, precision=precision, activation_checkpointing=checkpointing)
    return replace(config, train=train, data=replace(config.data, seqlen=16))


# ---- a training step ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["torch", "zero"])
def test_step_command_records_every_precision(engine: str, tiny: str, tmp_path: Path) -> None:
    arguments = [tiny, "train.micro_batch_size=3", "--device=cpu", "--steps=2", f"--output={tmp_path}"]
    command = [sys.executable, "-m", "pretrain.benchmarks.step", *arguments, f"--engine={engine}"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "matmuls take" in child.stdout
    (file,) = tmp_path.glob("step-*.json")
    recorded = json.loads(file.read_text())
    assert (recorded["engine"], recorded["peak_tflops"]) == (engine, 0.1)
    assert [(r["precision"], r["activation_checkpointing"]) for r in recorded["results"]] == [
        *(("autocast", False), ("autocast", True), ("bf16", False), ("bf16", True))
    ]
    for result in recorded["results"]:
        assert result["micro_batch_size"] == 3
        assert len(result["all_ms"]) == 2
        assert result["profile"]["milliseconds"].keys() >= {"matmul", "scan forward", "scan backward", "idle"}
        assert result["mfu"] == pytest.approx(
            result["tokens_per_second"] * recorded["flops_per_token"] / 0.1e12, abs=2e-4
        )


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains(precision: str, checkpointing: bool) -> None:
    config = tiny_config(precision, checkpointing)
    one = TorchStep(replace(config, optim=replace(config.optim, lr=1e-2)), CPU)
    batch = random_batch(config, 2, CPU)
    phases: list[str] = []
    with torch.no_grad(), one.autocast():
        before = one.model(*batch)
    for _ in range(3):
        one(*batch, phases.append)
    assert phases == ["forward", "backward", "optimizer"] * 3
    with torch.no_grad(), one.autocast():
        assert one.model(*batch) < 0.9 * before
    matrices = [p for p in one.model.parameters() if p.dim() >= 2]
    assert all(p.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32) for p in matrices)
    assert len(one.masters) == (len(matrices) if precision == "bf16" else 0)
    for parameter, master in one.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(parameter, master.bfloat16())
        assert not torch.equal(parameter.float(), master)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 21])
def test_largest_that_fits(limit: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    assert largest(fits) == limit
    assert len(tried) == len(set(tried)) <= 10


def test_a_step_that_is_out_of_memory_or_retries_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = 0

    def run(input_ids: torch.Tensor, targets: torch.Tensor, lap: object) -> None:
        nonlocal retries
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        retries += len(input_ids) > 3

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": retries})
    config = tiny_config()
    assert [step.fits(run, config, CPU, n) for n in (1, 3, 4, 5)] == [True, True, False, False]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bounds(checkpointing: bool) -> None:
    config = tiny_config(checkpointing=checkpointing)
    tokens, peak = 2 * 16, 1e-3  # TFLOP/s: 1e6 operations a millisecond
    done = matmul_flops_per_token(MODEL)
    if checkpointing:
        done += 2 * MODEL.n_layer * matmul_parameters_per_layer(MODEL)
    ideal, needed = tokens * done / 1e6, tokens * flops_per_token(MODEL, 16) / 1e6
    breakdown = Breakdown.of([Kernel("gemm", (), 2e3 * ideal)], 1, 5 * ideal)  # half the peak, 2 of 5 parts
    run = Run(config, Times({"all": [5 * ideal]}), None, breakdown, peak)
    assert run.bounds() == pytest.approx(
        {
            "matmul_share_of_step": 0.4,
            "matmul_utilisation": 0.5,
            "mfu_with_matmuls_at_peak": needed / (4 * ideal),
            "mfu_with_matmuls_alone": needed / (2 * ideal),
        }
    )
    assert run.mfu == pytest.approx(needed / (5 * ideal))
    unknown = replace(run, peak=None)
    assert (unknown.mfu, unknown.bounds()) == (None, None)


@pytest.mark.parametrize(
    ("name", "within", "group"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", ("aten::mm", "_SummedLoss"), "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", (), "matmul"),
        ("forward_kernel", ("_TritonScan", "_TritonConvBackward"), "scan forward"),
        ("reduce_kernel", ("aten::sum", "_TritonScanBackward", "autograd::engine"), "scan backward"),
        ("backward_kernel", ("_TritonConvBackward",), "convolution"),
        ("forward_kernel", ("_RMSNorm",), "norm"),
        ("statistics_kernel", ("_SummedLoss",), "cross-entropy"),
        ("multi_tensor_apply_kernel", ("aten::_fused_adamw_", "Optimizer.step#AdamW.step"), "optimizer and clipping"),
        ("multi_tensor_apply_kernel", ("aten::_foreach_mul_",), "optimizer and clipping"),
        ("vectorized_elementwise_kernel<bfloat16_copy_kernel_cuda>", ("aten::copy_", "aten::to"), "copies and casts"),
        ("vectorized_elementwise_kernel<CUDAFunctor_add>", ("aten::add",), "elementwise"),
        ("Memset (Device)", (), "fill"),
        ("indexing_backward_kernel", ("aten::embedding_dense_backward",), "embedding"),
        ("mystery", ("aten::mystery",), "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_are_for(name: str, within: tuple[str, ...], group: str) -> None:
    assert Kernel(name, within, 1.0).group == group


def test_breakdown_is_of_one_step_and_knows_idle_time() -> None:
    kernels = [Kernel("gemm", (), 4e3), Kernel("gemm", (), 2e3), Kernel("fill", (), 8e3)]
    breakdown = Breakdown.of(kernels, 2, 10.0)
    assert list(breakdown.milliseconds.items()) == [("fill", 4.0), ("matmul", 3.0), ("idle", 3.0)]
    assert breakdown.largest_kernels["matmul"] == {"gemm": 3.0}


def test_kernels_are_traced_to_their_operations_and_none_is_lost() -> None:
    def event(name: str, kernels: list, parent: object = None, device: DeviceType = DeviceType.CPU, us: float = 0.0):
        return SimpleNamespace(
            name=name,
            kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels],
            cpu_parent=parent,
            device_type=device,
            is_user_annotation=name == "Optimizer.step",
            time_range=SimpleNamespace(elapsed_us=lambda: us),
        )

    outer = event("Optimizer.step", [("Optimizer.step", 50.0)])
    events = [outer, event("aten::mul", [("elementwise", 5.0)], outer)]
    events += [event("elementwise", [], device=DeviceType.CUDA, us=5.0)]
    events += [event("stray", [], device=DeviceType.CUDA, us=2.0)]
    events += [event("Optimizer.step", [], device=DeviceType.CUDA, us=50.0)]
    assert list(profile._launched(events)) == [
        Kernel("elementwise", ("aten::mul", "Optimizer.step"), 5.0),
        Kernel(profile.UNTRACED, (), 2.0),
    ]


# ---- decoding ----------------------------------------------------------------------------------------------
def test_decode_command_records_every_batch_and_position(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--batches", "1", "3", "--positions", "1", "9", "--window", "4", "--output", str(tmp_path)]
    assert decode.main([tiny, "data.seqlen=8", "--device", "cpu", *arguments]) == 0
    assert "token 9" in capsys.readouterr().out
    (file,) = tmp_path.glob("decode-*.json")
    recorded = json.loads(file.read_text())
    assert [r["batch"] for r in recorded["results"]] == [1, 3]
    for result in recorded["results"]:
        assert result["tokens_per_second_at"].keys() == {"1", "9"}
        assert result["max_relative_error"] <= decode.TOLERANCE


def test_windows_must_not_overlap(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        decode.main([tiny, "--device", "cpu", "--positions", "1", "4", "--window", "4"])
    assert "--window 4 tokens of one would run into the next" in capsys.readouterr().err


def test_decoding_that_forgets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decode.build_model(Config(model=MODEL), CPU)
    decoder = Decoder(model, 2)
    assert decoder.check() <= decode.TOLERANCE
    forward = decoder._forward
    monkeypatch.setattr(decoder, "_forward", lambda ids, state=None: forward(ids, state and model.new_state(2)))
    with pytest.raises(WrongLogits, match="logits after 16 tokens are off"):
        decoder.check()


def test_decoder_generates_what_the_model_does() -> None:
    model = decode.build_model(Config(model=MODEL), CPU).float()
    decoder = Decoder(model, 2)
    texts = decoder.ids.clone()
    for _ in range(5):
        decoder.step()
        texts = torch.cat([texts, decoder.ids], 1)
    assert texts[:, 0].tolist() == [0, 1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(texts[:, 1:], model(texts[:, :-1]).argmax(-1))


def test_bytes_of_a_token_are_the_weights_and_the_state_twice() -> None:
    model = decode.build_model(Config(model=MODEL), CPU)
    speed = decode.measure(model, 3, [1, 5], 2)
    matrices = sum(2 * p.numel() for p in model.parameters() if p.dim() >= 2)
    vectors = sum(4 * p.numel() for p in model.parameters() if p.dim() < 2)
    state = MODEL.n_layer * 3 * 64 * (16 + 3) * 4
    assert speed.bytes_per_token == matrices + vectors + 2 * state
    assert speed.to_dict(1e6)["ms_per_token_at_copy_rate"] == round(speed.bytes_per_token / 1e3, 4)
    assert isinstance(model, LanguageModel)


@pytest.mark.parametrize("context", [16, 33])
def test_llama_comparison_trains_both_on_random_ids(tmp_path: Path, context: int) -> None:
    """Without a shard; of a width and depth that a Llama of equal size exists for."""
    config = tmp_path / "small.yaml"
    config.write_text("model: {vocab_size: 2000, d_model: 64, n_layer: 2}\noptim: {min_lr: 3.0e-4}\n")
    arguments = [str(config), "--contexts", str(context), "--tokens-per-step", "64", "--steps", "1"]
    assert llama.main([*arguments, "--output", str(tmp_path)]) == 0
    [record] = tmp_path.glob("training-*.json")
    result = json.loads(record.read_text())["results"][0]
    models = result["models"]
    assert result["batch"] == max(1, 64 // context)
    ours, peer = (models[name]["parameters"] for name in (llama.OURS, llama.PEER))
    assert abs(ours / peer - 1) <= llama.PARAMETER_TOLERANCE
    for model in models.values():
        before, after = model["loss_before_and_after_trial"]
        assert after < before


# ---- checkpoints -------------------------------------------------------------------------------------------
def test_checkpoint_command_measures_one_model_and_estimates_another(tiny: str, tmp_path: Path) -> None:
    larger = tmp_path / "larger.yaml"
    larger.write_text("model: {vocab_size: 300, d_model: 64, n_layer: 4}\n")
    code = checkpoint.main([tiny, f"--for={larger}", "--repeats=2", f"--disk={tmp_path}", f"--output={tmp_path}"])
    assert code == 0
    (file,) = tmp_path.glob("checkpoint-*.json")
    found = json.loads(file.read_text())["results"]
    measured, estimated = found["measured"], found["estimated"]
    assert 12 * measured["parameters"] < measured["bytes"] < 14 * measured["parameters"] + 20_000
    ratio = estimated["parameters"] / measured["parameters"]
    assert ratio > 4
    assert estimated["seconds"]["write"] == pytest.approx(ratio * measured["seconds"]["write"])
    assert not list(tmp_path.glob("checkpoint-benchmark-*"))
