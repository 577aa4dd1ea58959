"""The Hugging Face export: the same numbers, the same text, and no folder that isn't the model."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from data_tools.tokenizer import Tokenizer
from data_tools.train_tokenizer import train_tokenizer
from longhorn_layers.config import LonghornConfig, MixerConfig, ModelConfig
from longhorn_layers.hf import configuration_longhorn, modeling_longhorn
from longhorn_layers.hf.modeling_longhorn import LonghornForCausalLM
from longhorn_layers.model import LanguageModel
from pretrain import convert, evaluate
from pretrain import generate as generate_module
from pretrain.checkpoint import LoadedModel
from pretrain.config import Config, DataConfig
from pretrain.convert import ConversionError, Export, export_to_hf
from pretrain.generate import Sampling, generate

CORPUS = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"
VOCAB_SIZE = 500  # padded to 512
TEXT = "Fellow-Citizens of the  Senate:\n\tIn 1790, naïve 東京 </s> "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.tokenizer.model"
    path.write_bytes(train_tokenizer([CORPUS], vocab_size=VOCAB_SIZE))
    return path


@pytest.fixture(autouse=True)
def _restore_auto_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration_longhorn.LonghornConfig, "_auto_class", None)
    monkeypatch.setattr(modeling_longhorn.LonghornForCausalLM, "_auto_class", None)


def make_loaded(tokenizer: Path, update: str = "diagonal", tied: bool = True) -> LoadedModel:
    torch.manual_seed(2)
    mixer = LonghornConfig(d_state=5, d_conv=3, update=update)
    model = LanguageModel(ModelConfig(mixer, VOCAB_SIZE, d_model=24, n_layer=2, norm_eps=1e-4, tie_embeddings=tied))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("dt_bias", ".D", "norm.weight")):
                weight.add_(torch.randn_like(weight) / 2)
            elif name.endswith(("_proj.weight", "dt_head.weight", "head.weight")):
                weight.mul_(3)
            elif name.endswith("embedding.weight"):
                weight.mul_(10)
    found = Tokenizer.load(tokenizer)
    return LoadedModel(
        model=model.eval(),
        config=Config(model=model.config, data=DataConfig(str(tokenizer.parent / "train"))),
        step=30,
        consumed_tokens=123_456,
        tokenizer={
            "name": found.name,
            "sha256": found.sha256,
            "vocab_size": VOCAB_SIZE,
            "eos_id": found.eos_id,
        },
        path=Path("run/checkpoints/step_00000030"),
    )


@pytest.fixture(scope="module", params=[("diagonal", True), ("exact", False)], ids=str)
def exported(
    request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, Export]:
    loaded = make_loaded(tokenizer, *request.param)
    folder = tmp_path_factory.mktemp("exports") / "deep" / "longhorn"
    return loaded, export_to_hf(loaded, tokenizer, folder)


@torch.inference_mode()
def test_logits_and_ids_are_the_same(exported: tuple[LoadedModel, Export], tokenizer: Path) -> None:
    loaded, export = exported
    assert export.difference <= 1e-5
    ids = Tokenizer.load(tokenizer).encode(TEXT)
    theirs = PreTrainedTokenizerFast.from_pretrained(export.path)
    assert theirs(TEXT)["input_ids"] == ids
    model = LonghornForCausalLM.from_pretrained(export.path, dtype=torch.float32)
    logits = model(torch.tensor([ids])).logits
    expected = loaded.model(torch.tensor([ids]))[..., :VOCAB_SIZE]
    assert logits.shape == expected.shape  # without the padding of the vocabulary
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert export.parameters == model.num_parameters()
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        theirs.eos_token_id,
        theirs.pad_token_id,
    )


def test_transformers_generates_the_same_text(exported: tuple[LoadedModel, Export], tokenizer: Path) -> None:
    loaded, export = exported
    ids, eos_id = Tokenizer.load(tokenizer).encode("We the people"), loaded.tokenizer["eos_id"]
    expected = generate(loaded.model, ids, 40, eos_id, Sampling(temperature=0))
    model = LonghornForCausalLM.from_pretrained(export.path)
    found = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert [token for token in found[len(ids) :] if token != eos_id] == expected
    assert len(set(expected)) > 3


def test_what_the_folder_holds(exported: tuple[LoadedModel, Export]) -> None:
    loaded, export = exported
    files = {path.name for path in export.path.iterdir()}
    assert files >= {
        "README.md",
        "config.json",
        "configuration_longhorn.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_longhorn.py",
        "tokenizer.json",
    }
    assert not {path.name for path in export.path.parent.iterdir()} - {"longhorn"}
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in export.path.iterdir()} == {0o666 & ~umask}
    weights = load_file(export.path / "model.safetensors")
    assert ("lm_head.weight" in weights) is not loaded.config.model.tie_embeddings
    assert weights["model.embedding.weight"].shape == (VOCAB_SIZE, 24)
    card = (export.path / "README.md").read_text()
    assert f"{export.parameters:,}" in card and "123,456 tokens\n(30 steps)" in card
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in card
    assert loaded.tokenizer["sha256"] in card


def test_bfloat16_keeps_what_needs_fp32(tokenizer: Path, tmp_path: Path) -> None:
    loaded = make_loaded(tokenizer)
    before = loaded.model.blocks[0].mixer.in_proj.weight.clone()
    export = export_to_hf(loaded, tokenizer, tmp_path / "out", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert kept == {n for n in weights if n.endswith(("norm.weight", "mixer.D", "mixer.dt_bias"))}
    rounded = weights["model.blocks.0.mixer.in_proj.weight"]
    assert torch.equal(rounded, before.bfloat16()) and export.difference <= 1e-5
    assert LonghornForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


# ---- refusals ----


def test_a_wrong_weight_is_refused(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = convert.hf_weights

    def wrong(model: LanguageModel) -> dict[str, torch.Tensor]:
        weights = right(model)
        weights["model.blocks.1.mixer.D"] = weights["model.blocks.1.mixer.D"] * 1.01
        return weights

    monkeypatch.setattr(convert, "hf_weights", wrong)
    with pytest.raises(ConversionError, match=r"logits differ by \d.\de-0[123] of the largest"):
        export_to_hf(make_loaded(tokenizer), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_and_other_ids_are_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, spm = make_loaded(tokenizer), Tokenizer.load(tokenizer)
    (tmp_path / "modeling_longhorn.py").write_text(TEXT)
    ids = torch.tensor(spm.encode(TEXT))
    logits = loaded.model(ids[None])[0, :, :VOCAB_SIZE].detach()

    def check(ids: torch.Tensor, logits: torch.Tensor) -> float:
        monkeypatch.setattr(convert, "_load_elsewhere", lambda *_: {"ids": ids, "logits": logits})
        return convert.check_folder(tmp_path, loaded.model, spm)

    assert check(ids, logits) <= 1e-6
    with pytest.raises(ConversionError, match="other ids than SentencePiece"):
        check(ids + 1, logits)
    with pytest.raises(ConversionError, match="logits differ by nan"):
        check(ids, torch.where(logits == logits.max(), torch.nan, logits))
    with pytest.raises(ConversionError, match=r"logits are \(.*, 499\), not \(.*, 500\)"):
        check(ids, logits[:, 1:])


def test_a_folder_that_does_not_load_is_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "LOAD", "raise SystemExit('no such architecture')")
    with pytest.raises(ConversionError, match="does not load:\nno such architecture"):
        export_to_hf(make_loaded(tokenizer), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_mixer_without_code_for_transformers_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    loaded = make_loaded(tokenizer)
    loaded.model.config.mixer = MixerConfig("mamba")
    with pytest.raises(ConversionError, match="'mamba' has no code for transformers"):
        export_to_hf(loaded, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- the command ----


def test_the_command_and_what_is_in_its_way(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(convert, "load_model", lambda *_: make_loaded(tokenizer))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    assert convert.main(["to-hf", "run", str(out)]) == 1
    assert capsys.readouterr().err == f"error: {out} exists; --overwrite replaces an earlier export\n"
    assert convert.main(["to-hf", "run", str(out), "--overwrite"]) == 1
    assert "no earlier export" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]

    (out / "config.json").write_text("{}")  # now it looks like one
    assert convert.main(["to-hf", "run", str(out), "--overwrite"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out}: ") and "float32" in shown.out
    assert shown.err == ""
    assert not (out / "precious").exists() and (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CONFIG = """
run_dir: {folder}/run
model: {{vocab_size: 512, d_model: 32, n_layer: 2, mixer: {{name: longhorn, d_state: 4}}}}
data: {{train: {prefix}, valid: {prefix}, seqlen: 64}}
train: {{total_tokens: 1024, global_batch_size: 4, micro_batch_size: 2, precision: fp32}}
eval: {{interval: 0}}
log: {{wandb: disabled}}
"""


def test_the_commands_on_a_trained_checkpoint(shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer's own checkpoint: evaluated, sampled from, exported; all see the same model."""
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG.format(folder=tmp_path, prefix=shard.prefix))
    command = [sys.executable, "-m", "pretrain.train", str(config)]
    trained = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert trained.returncode == 0, trained.stderr

    contexts = ["--contexts", "64,256", "--max-tokens", "1024", "--device", "cpu"]
    assert evaluate.main([str(run), "--data", shard.prefix, *contexts]) == 0
    report = json.loads((run / "evaluation" / "step_00000004" / "perplexity.json").read_text())
    assert (report["step"], report["consumed_tokens"]) == (4, 1024)
    # An untrained model of 512 tokens has about 512.
    assert 300 < report["sets"][0]["contexts"][0]["perplexity"] < 530

    assert convert.main(["to-hf", str(run), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    greedy = ["--temperature", "0", "--tokens", "20", "--device", "cpu"]
    assert generate_module.main([str(run), "--prompt", "The Union", *greedy]) == 0
    text = capsys.readouterr().out
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    inputs = theirs("The Union", return_tensors="pt")
    model = LonghornForCausalLM.from_pretrained(tmp_path / "out")
    found = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    assert text == theirs.decode(found, skip_special_tokens=True) + "\n"
