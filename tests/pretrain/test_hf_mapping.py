"""Every mixer in transformers' classes and back: the same logits, the same bits, and nothing that isn't the model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MambaForCausalLM, PreTrainedModel
from transformers import MambaConfig as HFMambaConfig

from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.config import Config, config_to_dict
from pretrain.hf import ConversionError
from pretrain.hf.folder import is_hf_folder, load_any, load_hf_folder
from pretrain.hf.mapping import to_hf_model

CPU = torch.device("cpu")
VOCAB_SIZE = 100  # padded to 128
SHAPE: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 16, "n_layer": 2, "norm_eps": 1e-4}
MODELS = {
    "longhorn": ModelConfig(LonghornConfig(d_state=5, d_conv=3), **SHAPE),
    "exact": ModelConfig(LonghornConfig(update="exact", d_state=32, dt_rank=3), tie_embeddings=False, **SHAPE),
    "longhorn-mlp": ModelConfig(LonghornConfig(d_state=5, expand=3), d_ff=24, **SHAPE),
    "mamba": ModelConfig(MambaConfig(d_state=6, d_conv=3, expand=3, dt_rank=2), **SHAPE),
    "mamba-untied": ModelConfig(MambaConfig(), tie_embeddings=False, **SHAPE),
    "gla": ModelConfig(GLAConfig(n_head=2, gate_rank=3, gate_normalizer=8.0), d_ff=24, **SHAPE),
    "llama": ModelConfig(AttentionConfig(head_dim=8, rope_theta=500.0), d_ff=24, **SHAPE),
    "llama-untied": ModelConfig(AttentionConfig(head_dim=4), d_ff=24, tie_embeddings=False, **SHAPE),
}


def make_model(name: str) -> LanguageModel:
    """Weights far enough from their start that each of them moves the logits."""
    torch.manual_seed(2)
    model = LanguageModel(MODELS[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) / 5)
    return model.eval()


def ids(seqlen: int = 70) -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, seqlen), generator=torch.Generator().manual_seed(1))


def save(exported: PreTrainedModel, folder: Path, **options: Any) -> Path:
    exported.save_pretrained(folder, **options)
    return folder


@torch.inference_mode()
def relative_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_transformers_computes_the_same_logits(name: str) -> None:
    model = make_model(name)
    found = to_hf_model(model, None, torch.float32)(ids()).logits
    assert relative_difference(found, model(ids())[..., :VOCAB_SIZE]) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_every_bit_comes_back_also_from_a_folder_of_parts(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    exported = to_hf_model(model, None, torch.float32)
    save(exported, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and is_hf_folder(tmp_path)
    loaded = load_any(tmp_path, CPU)
    assert (loaded.model.config, loaded.config.model) == (model.config, model.config)
    assert (loaded.step, loaded.consumed_tokens, loaded.tokenizer, loaded.path) == (0, 0, {}, tmp_path)
    found = dict(loaded.model.named_parameters())
    assert found.keys() == dict(model.named_parameters()).keys()
    for key, weight in model.named_parameters():
        expected = weight.clone()
        if key in ("embedding.weight", "head.weight"):
            expected[VOCAB_SIZE:] = 0  # the padding, which exports drop
        assert torch.equal(found[key], expected), key
    assert torch.equal(loaded.model(ids()), model(ids()))


@pytest.mark.parametrize(
    "theirs",
    [
        MambaForCausalLM(HFMambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, state_size=4, num_hidden_layers=2)),
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=16,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                rope_parameters={"rope_type": "default", "rope_theta": 300.0},
                rms_norm_eps=1e-3,
            )
        ),
    ],
    ids=["mamba", "llama"],
)
@torch.inference_mode()
def test_transformers_own_models_load(theirs: PreTrainedModel, tmp_path: Path) -> None:
    """Initialised and written by transformers, so that no mapping of ours made them."""
    for weight in theirs.parameters():
        weight.add_(torch.randn_like(weight) / 10)
    save(theirs.eval(), tmp_path)
    loaded = load_hf_folder(tmp_path, CPU)
    assert relative_difference(loaded.model(ids())[..., :VOCAB_SIZE], theirs(ids()).logits) <= 1e-5
    assert loaded.model(ids())[..., VOCAB_SIZE:].max() == -torch.inf


def test_16_bit_folders_keep_what_needs_fp32(tmp_path: Path) -> None:
    model = make_model("mamba")
    save(to_hf_model(model, None, torch.bfloat16), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert kept == {n for n in weights if n.endswith(("norm.weight", "norm_f.weight", ".A_log", ".D", "dt_proj.bias"))}
    found = load_hf_folder(tmp_path, CPU).model.blocks[0].mixer
    assert torch.equal(found.in_proj.weight, model.blocks[0].mixer.in_proj.weight.bfloat16().float())
    assert torch.equal(found.A_log, model.blocks[0].mixer.A_log)


# ---- what is not the model is refused ----


@pytest.mark.parametrize(
    ("name", "d_ff", "message"),
    [("mamba", 24, "mamba has no SwiGLU"), ("llama", 0, "llama has one in each layer")],
)
def test_a_model_that_transformers_has_no_class_for(name: str, d_ff: int, message: str) -> None:
    with pytest.raises(ConversionError, match=f"model.d_ff={d_ff}: .*{message}"):
        to_hf_model(LanguageModel(replace(MODELS[name], d_ff=d_ff)), None, torch.float32)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("mamba", "use_bias", True, "use_bias is True; ours can only be False"),
        ("mamba", "hidden_act", "gelu", "hidden_act is 'gelu'; ours can only be 'silu'"),
        ("llama", "num_key_value_heads", 1, "num_key_value_heads is 1; ours can only be 2"),
        ("llama", "head_dim", 4, "2 heads of 4 do not make hidden_size=16"),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "plain rotary"),
        ("llama", "model_type", "mistral", "model_type is 'mistral'; known are longhorn, mamba, "),
        ("llama", "vocab_size", "many", "config.json: .*vocab_size"),
        ("mamba", "num_hidden_layers", 3, r"10 missing: backbone.layers.2.mixer.A_log, .*, …"),
        ("mamba", "num_hidden_layers", 1, r"10 unexpected: backbone.layers.1.mixer.A_log, .*, …"),
        ("mamba", "state_size", 7, r"mixer.A_log is \[48, 6\], by the config it must be \[48, 7\]"),
        ("mamba", "conv_kernel", 5, r"conv1d.weight is \[48, 1, 3\], by the config it must be \[48, 1, 5\]"),
        ("mamba", "vocab_size", 99, r"embeddings.weight is \[100, 16\], by the config it must be \[99, 16\]"),
    ],
)
def test_another_config_is_refused(name: str, field: str, value: object, message: str, tmp_path: Path) -> None:
    path = save(to_hf_model(make_model(name), None, torch.float32), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ConversionError, match=message):
        load_hf_folder(tmp_path, CPU)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("backbone.norm_f.weight", lambda w: w * torch.nan, "norm_f.weight holds numbers that are not finite"),
        ("backbone.norm_f.weight", lambda w: w.double(), r"norm_f.weight is torch.float64, must be float32, "),
        ("lm_head.weight", lambda w: torch.ones(VOCAB_SIZE, 16), "lm_head.weight should be backbone.embeddings.weight"),
    ],
)
def test_another_weight_is_refused(key: str, change: Any, message: str, tmp_path: Path) -> None:
    path = save(to_hf_model(make_model("mamba"), None, torch.float32), tmp_path) / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {key: change(weights.get(key))}, path)
    with pytest.raises(ConversionError, match=message):
        load_hf_folder(tmp_path, CPU)


def test_a_tied_head_may_be_written_twice(tmp_path: Path) -> None:
    path = save(to_hf_model(make_model("mamba"), None, torch.float32), tmp_path) / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["backbone.embeddings.weight"].clone()}, path)
    assert load_hf_folder(tmp_path, CPU).model.head.weight.shape == (128, 16)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    save(to_hf_model(make_model("mamba"), None, torch.float32), tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    part = max(tmp_path.glob("model-*"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(ConversionError, match=part.name):
        load_hf_folder(tmp_path, CPU)
    part.unlink()
    with pytest.raises(ConversionError, match=part.name):
        load_hf_folder(tmp_path, CPU)
    index.write_text(index.read_text().replace(part.name, f"../{part.name}"))
    with pytest.raises(ConversionError, match="is not a file of this folder"):
        load_hf_folder(tmp_path, CPU)
    index.write_text("[]")
    with pytest.raises(ConversionError, match="not an index of weights"):
        load_hf_folder(tmp_path, CPU)


def test_a_pickle_is_read_as_tensors_alone(tmp_path: Path) -> None:
    save(to_hf_model(make_model("mamba"), None, torch.float32), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert is_hf_folder(tmp_path) and load_hf_folder(tmp_path, CPU).model.config == MODELS["mamba"]
    torch.save(weights | {"code": Path.unlink}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: can't be read as tensors alone"):
        load_hf_folder(tmp_path, CPU)
    torch.save([1], tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="something else than tensors by name"):
        load_hf_folder(tmp_path, CPU)


def test_training_json_gives_the_run_or_is_refused(tmp_path: Path) -> None:
    save(to_hf_model(make_model("longhorn"), None, torch.float32), tmp_path)
    run = config_to_dict(Config(run_dir="runs/x", model=MODELS["longhorn"]))
    training = {"config": run, "step": 7, "consumed_tokens": 99, "tokenizer": {"sha256": "abc"}}
    path = tmp_path / "training.json"
    path.write_text(json.dumps(training))
    loaded = load_hf_folder(tmp_path, CPU)
    assert (loaded.step, loaded.consumed_tokens, loaded.tokenizer) == (7, 99, {"sha256": "abc"})
    assert loaded.config == Config(run_dir="runs/x", model=MODELS["longhorn"])
    run["model"]["mixer"]["update"] = "exact"
    path.write_text(json.dumps(training))
    with pytest.raises(ConversionError, match="training.json and config.json describe different models"):
        load_hf_folder(tmp_path, CPU)
    path.write_text("{}")
    with pytest.raises(ConversionError, match="training.json: .*consumed_tokens"):
        load_hf_folder(tmp_path, CPU)
