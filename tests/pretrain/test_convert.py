"""Exports for transformers and the way back: the same numbers, the same text, and no folder that isn't the model."""

import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data_tools.tokenizer import Tokenizer
from data_tools.train_tokenizer import train_tokenizer
from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, ModelConfig
from longhorn_layers.hf import configuration_gla, configuration_longhorn, modeling_gla, modeling_longhorn
from longhorn_layers.model import LanguageModel
from pretrain import convert, evaluate
from pretrain import generate as generate_module
from pretrain.checkpoint import LoadedModel, load_model
from pretrain.config import Config, DataConfig
from pretrain.generate import Sampling, generate
from pretrain.hf import ConversionError, check, user
from pretrain.hf.export import Export, export_to_hf
from pretrain.hf.folder import load_any
from pretrain.hf.importing import import_model
from pretrain.hf.layouts import Layout

CORPUS = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"
CPU = torch.device("cpu")
VOCAB_SIZE = 500  # padded to 512
TEXT = "Fellow-Citizens of the  Senate:\n\tIn 1790, naïve 東京 </s> "
SHAPE: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 24, "n_layer": 2, "norm_eps": 1e-4}
MODELS = {
    "longhorn": ModelConfig(LonghornConfig(d_state=5, d_conv=3), **SHAPE),
    "exact": ModelConfig(LonghornConfig(d_state=32, update="exact"), tie_embeddings=False, **SHAPE),
    "mamba": ModelConfig(MambaConfig(d_state=5, d_conv=3), **SHAPE),
    "gla": ModelConfig(GLAConfig(n_head=2), d_ff=32, **SHAPE),
    "llama": ModelConfig(AttentionConfig(head_dim=8), d_ff=32, tie_embeddings=False, **SHAPE),
}
COMMON_CODE = {"recurrent_lm.py", "recurrence.py"}
SHIPPED = {
    "longhorn": COMMON_CODE | {"configuration_longhorn.py", "modeling_longhorn.py"},
    "exact": COMMON_CODE | {"configuration_longhorn.py", "modeling_longhorn.py"},
    "gla": COMMON_CODE | {"configuration_gla.py", "modeling_gla.py"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.tokenizer.model"
    path.write_bytes(train_tokenizer([CORPUS], vocab_size=VOCAB_SIZE))
    return path


@pytest.fixture(autouse=True)
def _restore_auto_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    for shipped in (
        configuration_longhorn.LonghornConfig,
        modeling_longhorn.LonghornForCausalLM,
        configuration_gla.GLAConfig,
        modeling_gla.GLAForCausalLM,
    ):
        monkeypatch.setattr(shipped, "_auto_class", None)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check's user without the seconds that a process of its own takes; what it loads is the same."""

    def load(folder: Path, code: bool) -> dict[str, Tensor]:
        result = folder.parent / "result.safetensors"
        lengths = ",".join(map(str, check.LENGTHS))
        user.main(str(folder), "code" if code else "no-code", str(check.TEXT), lengths, str(check.STEPS), str(result))
        found = load_file(result)
        result.unlink()
        return found

    monkeypatch.setattr(check, "_load_elsewhere", load)


def make_loaded(tokenizer: Path, run_dir: Path, name: str = "longhorn") -> LoadedModel:
    """A checkpoint of a model whose weights are far from their start, as of step 30."""
    torch.manual_seed(2)
    model = LanguageModel(MODELS[name])
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("dt_bias", "decay_bias", ".D", "A_log", "norm.weight")):
                weight.add_(torch.randn_like(weight) / 2)
            elif key.endswith(("_proj.weight", "dt_head.weight", "head.weight", "decay_up.weight")):
                weight.mul_(3)
            elif key.endswith("embedding.weight"):
                weight.mul_(10)
    config = Config(model=model.config, data=DataConfig(str(tokenizer.parent / "train"), seqlen=96))
    begun = LoadedModel(model, config, 0, 0, {}, Path("made/here"))
    loaded = load_model(import_model(begun, tokenizer, run_dir), CPU)
    (run_dir / "imported.json").unlink()  # as if it had been trained here from the start
    return replace(loaded, step=30, consumed_tokens=123_456)


@pytest.fixture(
    scope="module",
    params=["longhorn", "mamba", "gla", *(pytest.param(name, marks=pytest.mark.slow) for name in ("exact", "llama"))],
)
def exported(
    request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, LoadedModel, Export]:
    """By the real check, in a process of its own."""
    folder = tmp_path_factory.mktemp("exports")
    loaded = make_loaded(tokenizer, folder / "run", request.param)
    return request.param, loaded, export_to_hf(loaded, tokenizer, folder / "deep" / "model")


@torch.inference_mode()
def test_logits_and_ids_are_the_same(exported: tuple[str, LoadedModel, Export], tokenizer: Path) -> None:
    name, loaded, export = exported
    assert 0 < export.differences.largest <= 5e-5
    ids = Tokenizer.load(tokenizer).encode(TEXT)
    theirs = PreTrainedTokenizerFast.from_pretrained(export.path)
    assert theirs(TEXT)["input_ids"] == ids
    model = AutoModelForCausalLM.from_pretrained(export.path, trust_remote_code=name in SHIPPED, dtype=torch.float32)
    logits = model(torch.tensor([ids])).logits
    expected = loaded.model(torch.tensor([ids]))[..., :VOCAB_SIZE]
    assert logits.shape == expected.shape  # without the padding of the vocabulary
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert export.parameters == model.num_parameters()
    assert (model.config.eos_token_id, model.config.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_transformers_generates_the_same_text(exported: tuple[str, LoadedModel, Export], tokenizer: Path) -> None:
    name, loaded, export = exported
    ids, eos_id = Tokenizer.load(tokenizer).encode("We the people"), loaded.tokenizer["eos_id"]
    expected = generate(loaded.model, ids, 40, eos_id, Sampling(temperature=0))
    model = AutoModelForCausalLM.from_pretrained(export.path, trust_remote_code=name in SHIPPED)
    found = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert [token for token in found[len(ids) :] if token != eos_id] == expected
    assert len(set(expected)) > 3


def test_what_the_folder_holds(exported: tuple[str, LoadedModel, Export], tokenizer: Path) -> None:
    name, loaded, export = exported
    files = {path.name for path in export.path.iterdir()}
    always = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files >= always | {"training.json", "tokenizer.model"} | SHIPPED.get(name, set())
    assert {file for file in files if file.endswith(".py")} == SHIPPED.get(name, set())
    assert [path.name for path in export.path.parent.iterdir()] == ["model"]
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in export.path.iterdir()} == {0o666 & ~umask}
    weights = load_file(export.path / "model.safetensors")
    assert ("lm_head.weight" in weights) is not loaded.config.model.tie_embeddings
    [embedding] = [weight for key, weight in weights.items() if "embed" in key]
    assert embedding.shape == (VOCAB_SIZE, 24)
    assert (export.path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_what_the_card_and_training_json_say(exported: tuple[str, LoadedModel, Export]) -> None:
    name, loaded, export = exported
    card = (export.path / "README.md").read_text()
    assert f"{export.parameters:,} parameters" in card
    assert "123,456 tokens (30 steps) at a context of\n96 tokens" in card
    assert ("from_pretrained(folder, trust_remote_code=True)" in card) is (name in SHIPPED)
    assert loaded.tokenizer["sha256"] in card and "Not measured when this was written." in card
    assert f"    name: {loaded.config.model.mixer.name}\n" in card  # of the config
    training = json.loads((export.path / "training.json").read_text())
    assert (training["step"], training["consumed_tokens"], training["tokenizer"]) == (30, 123_456, loaded.tokenizer)
    assert training["config"]["model"]["mixer"]["name"] == loaded.config.model.mixer.name
    assert {"torch", "transformers"} <= training["versions"].keys()


def test_the_folder_comes_back_bit_by_bit(exported: tuple[str, LoadedModel, Export]) -> None:
    _, loaded, export = exported
    found = load_any(export.path, CPU)
    assert found.config == loaded.config and found.tokenizer == loaded.tokenizer
    assert (found.step, found.consumed_tokens) == (30, 123_456)
    weights = dict(found.model.named_parameters())
    for key, weight in loaded.model.named_parameters():
        rows = VOCAB_SIZE if key in ("embedding.weight", "head.weight") else None
        assert torch.equal(weights[key][:rows], weight[:rows]), key


def test_bfloat16_keeps_what_needs_fp32(tokenizer: Path, tmp_path: Path, in_this_process: None) -> None:
    loaded = make_loaded(tokenizer, tmp_path / "run")
    before = loaded.model.blocks[0].mixer.in_proj.weight.clone()
    export = export_to_hf(loaded, tokenizer, tmp_path / "out", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert kept == {n for n in weights if n.endswith(("norm.weight", "mixer.D", "mixer.dt_bias"))}
    rounded = weights["model.blocks.0.mixer.in_proj.weight"]
    assert torch.equal(rounded, before.bfloat16()) and export.differences.largest <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.dtype == torch.bfloat16


# ---- refusals ----


@pytest.mark.parametrize("name", ["longhorn", "mamba"])
def test_a_wrong_weight_is_refused(
    name: str, tokenizer: Path, tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Layout.write

    def wrong(layout: Layout, model: LanguageModel) -> dict[str, Tensor]:
        weights = write(layout, model)
        key = next(key for key in weights if key.endswith("1.mixer.D"))
        return weights | {key: weights[key] * 1.01}

    monkeypatch.setattr(Layout, "write", wrong)
    with pytest.raises(ConversionError, match=r"logits \(alone, 1 tokens\) differ by \d.\de-0[123] of the largest"):
        export_to_hf(make_loaded(tokenizer, tmp_path / "run", name), tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_every_way_of_computing_logits_is_compared(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, spm = make_loaded(tokenizer, tmp_path / "run"), Tokenizer.load(tokenizer)
    ids = torch.tensor(spm.encode(check.TEXT.read_text()))
    rows = [ids[:length] for length in check.LENGTHS]

    @torch.inference_mode()
    def logits(row: Tensor) -> Tensor:
        return loaded.model(row[None])[0, :, :VOCAB_SIZE]

    padded = torch.full((len(rows), check.LENGTHS[-1], VOCAB_SIZE), torch.nan)
    for place, row in zip(padded, rows, strict=True):
        place[-len(row) :] = logits(row)
    generated = torch.arange(len(rows) * check.STEPS).reshape(len(rows), -1)
    steps = [logits(torch.cat([r, g[:-1]]))[-check.STEPS :] for r, g in zip(rows, generated, strict=True)]
    right = {f"alone.{i}": logits(row) for i, row in enumerate(rows)}
    right |= {"ids": ids, "padded": padded, "generated": generated, "steps": torch.stack(steps)}

    def found(key: str, change: Callable[[Tensor], Tensor]) -> check.Differences:
        result = {name: tensor.clone() for name, tensor in right.items()}
        result[key] = change(result[key])
        monkeypatch.setattr(check, "_load_elsewhere", lambda *_: result)
        return check.check_folder(tmp_path, loaded.model, spm, code=True)

    def moved(place: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.index_put(tuple(map(torch.tensor, place)), torch.tensor(9.0))

    assert found("ids", lambda ids: ids).largest <= 1e-6
    with pytest.raises(ConversionError, match="other ids than SentencePiece"):
        found("ids", lambda ids: ids + 1)
    with pytest.raises(ConversionError, match=r"logits \(alone, 128 tokens\) differ by nan"):
        found("alone.2", lambda logits: logits.where(logits != logits.max(), torch.nan))
    with pytest.raises(ConversionError, match=r"logits are \(384, 499\), not \(384, 500\)"):
        found("alone.3", lambda logits: logits[:, 1:])
    with pytest.raises(ConversionError, match=r"\(padded, 7 tokens\)"):
        found("padded", moved((1, -7, 0)))
    with pytest.raises(ConversionError, match=r"\(decoded, 384 tokens\)"):
        found("steps", moved((3, check.STEPS - 1, 0)))


def test_a_folder_that_does_not_load_is_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "user.py"
    broken.write_text("raise SystemExit('no such architecture')")
    monkeypatch.setattr(check, "USER", broken)
    with pytest.raises(ConversionError, match="does not load:\nno such architecture"):
        export_to_hf(make_loaded(tokenizer, tmp_path / "run"), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the commands ----


def test_the_command_and_what_is_in_its_way(
    tokenizer: Path, tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    make_loaded(tokenizer, run)
    out.mkdir()
    (out / "precious").write_text("mine")
    assert convert.main(["to-hf", str(run), str(out)]) == 1
    assert capsys.readouterr().err == f"error: {out} exists; --overwrite replaces an earlier export\n"
    assert convert.main(["to-hf", str(run), str(out), "--overwrite"]) == 1
    assert "no earlier export" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]

    (out / "config.json").write_text("{}")  # somebody's model, but no export of ours
    assert convert.main(["to-hf", str(run), str(out), "--overwrite"]) == 1
    assert "it has no training.json" in capsys.readouterr().err
    (out / "training.json").write_text("{}")
    (tmp_path / ".replaced_out").mkdir()  # as a killed conversion leaves it
    (tmp_path / ".replaced_out" / "old").touch()
    assert convert.main(["to-hf", str(run), str(out), "--overwrite"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out}: ") and "float32" in shown.out
    assert not (out / "precious").exists() and (out / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


PERPLEXITY = {
    "data": {"prefix": "data/valid", "digest": "d1"},
    **dict.fromkeys(("checkpoint", "step", "consumed_tokens", "training_context", "tokenizer")),
    "sets": [
        {
            "name": "all",
            "documents": 3,
            "text_bytes": 4096 * math.log(8.5) / math.log(2) / 0.9,
            "contexts": [{"context": 2048, "loss": math.log(8.5), "tokens": 4096}],
        }
    ],
}
DOWNSTREAM = {
    "tasks": {"piqa": {"metrics": {"acc": {"value": 0.61, "stderr": 0.01}, "f1": {"value": 0.5, "stderr": None}}}},
    "average": {"accuracy": 0.61},
}


def test_the_card_shows_what_was_measured_and_where_the_run_began(
    tokenizer: Path, tmp_path: Path, in_this_process: None
) -> None:
    run = tmp_path / "run"
    loaded = make_loaded(tokenizer, run)
    (run / "imported.json").write_text('{"source": "theirs/1p3b", "step": 5, "consumed_tokens": 1000}')
    measured = run / "evaluation" / "step_00000000"
    measured.mkdir(parents=True)
    (measured / "perplexity.json").write_text(json.dumps(PERPLEXITY))
    (measured / "downstream.json").write_text(json.dumps(DOWNSTREAM))
    card = (export_to_hf(loaded, tokenizer, tmp_path / "out").path / "README.md").read_text()
    assert "\n| all | 2,048 | 8.500 | 0.9000 | 4,096 |\n" in card and "`data/valid` (digest `d1`)" in card
    assert "\n| piqa | acc | 0.6100 | 0.0100 |\n| piqa | f1 | 0.5000 |  |\n| average | accuracy | 0.6100 |  |\n" in card
    assert "began from the weights of `theirs/1p3b`, which had been trained on 1,000 tokens" in card


def test_from_hf_and_what_is_wrong_with_it(
    tokenizer: Path, tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run, config = tmp_path / "out", tmp_path / "new", tmp_path / "config.yaml"
    loaded = make_loaded(tokenizer, tmp_path / "run", "mamba")
    export_to_hf(loaded, tokenizer, out)
    config.write_text("model: {mixer: {name: mamba, d_state: 5, d_conv: 3, dt_rank: 2}, vocab_size: 500, d_model: 24}")
    command = ["from-hf", str(out), str(run), "--config", str(config)]

    assert convert.main([*command, "model.n_layer=2", "model.d_model=32"]) == 1  # where dt_rank=2 is the rule's, too
    text = (
        "is another model: model.d_model is 32 in the config, 24 there; model.norm_eps is 1e-05 in the config, 0.0001"
    )
    assert text in capsys.readouterr().err
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer([CORPUS], vocab_size=VOCAB_SIZE - 1))
    right = [*command, "model.n_layer=2", "model.norm_eps=1e-4", "optim.lr=0.5", "optim.min_lr=0.1"]
    assert convert.main([*right, "--tokenizer", str(other)]) == 1
    assert f"{other}: its sha256 is " in capsys.readouterr().err
    assert not run.exists()

    assert convert.main(right) == 0
    shown = capsys.readouterr().out
    assert f"{run / 'checkpoints' / 'step_00000000'}: " in shown and "12 rows of vocabulary padding are zero" in shown
    assert f"pretrain.train {config} model.n_layer=2" in shown and shown.endswith(f"run_dir={run}\n")
    found = load_model(run, CPU)
    assert (found.config.optim.lr, found.config.run_dir, found.tokenizer) == (0.5, str(run), loaded.tokenizer)
    assert json.loads((run / "imported.json").read_text())["consumed_tokens"] == 123_456
    assert generate_module.main([str(run), "--prompt", "We", "--tokens", "1", "--device", "cpu"]) == 0
    assert convert.main(right) == 1
    assert "has checkpoints already" in capsys.readouterr().err


def test_from_official_needs_a_tokenizer_that_fits(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.hf.official import LAYOUT

    source, run = tmp_path / "theirs", tmp_path / "run"
    source.mkdir()
    model = LanguageModel(ModelConfig(LonghornConfig(), vocab_size=512, d_model=16, n_layer=1))
    torch.save(LAYOUT.write(model), source / "pytorch_model.bin")
    fields = {"d_model": 16, "n_layer": 1, "vocab_size": 512, "ssm_cfg": {"d_state": 16}}
    (source / "config.json").write_text(json.dumps(fields))
    assert convert.main(["from-official", str(source), str(run)]) == 1
    assert "the model's tokenizer isn't there; name a copy with --tokenizer" in capsys.readouterr().err
    larger = tmp_path / "larger.model"
    larger.write_bytes(train_tokenizer([CORPUS], vocab_size=600))
    assert convert.main(["from-official", str(source), str(run), "--tokenizer", str(larger)]) == 1
    assert "has 600 pieces, but" in capsys.readouterr().err
    assert convert.main(["from-official", str(source), str(run), "--tokenizer", str(tokenizer)]) == 0
    found = load_model(run, CPU)
    assert found.tokenizer["sha256"] == Tokenizer.load(tokenizer).sha256
    assert torch.equal(found.model.blocks[0].mixer.in_proj.weight, model.blocks[0].mixer.in_proj.weight)


CONFIG = """
run_dir: {folder}/run
model: {{vocab_size: 512, d_model: 32, n_layer: 2, mixer: {{name: longhorn, d_state: 4}}}}
data: {{train: {prefix}, valid: {prefix}, seqlen: 64}}
train: {{total_tokens: 1024, global_batch_size: 4, micro_batch_size: 2, precision: fp32}}
eval: {{interval: 0}}
log: {{wandb: disabled}}
"""


def test_the_commands_on_a_trained_checkpoint(shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer's own checkpoint: evaluated, exported, sampled from, trained on; all see the same model."""
    config, run, out = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "out"
    config.write_text(CONFIG.format(folder=tmp_path, prefix=shard.prefix))
    train(config)
    contexts = ["--contexts", "64,256", "--max-tokens", "1024", "--device", "cpu"]
    assert evaluate.main([str(run), "--data", shard.prefix, *contexts]) == 0
    report = json.loads((run / "evaluation" / "step_00000004" / "perplexity.json").read_text())
    assert (report["step"], report["consumed_tokens"]) == (4, 1024)
    # An untrained model of 512 tokens has about 512.
    assert 300 < report["sets"][0]["contexts"][0]["perplexity"] < 530

    assert convert.main(["to-hf", str(run), str(out)]) == 0
    assert f"| all | 256 | {report['sets'][0]['contexts'][1]['perplexity']:.3f} |" in (out / "README.md").read_text()
    texts = []
    for source in (run, out):
        capsys.readouterr()
        greedy = ["--temperature", "0", "--tokens", "20", "--device", "cpu"]
        assert generate_module.main([str(source), "--prompt", "The Union", *greedy]) == 0
        texts.append(capsys.readouterr().out)
    theirs = PreTrainedTokenizerFast.from_pretrained(out)
    inputs = theirs("The Union", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    assert texts == [theirs.decode(found, skip_special_tokens=True) + "\n"] * 2

    again, back = tmp_path / "again", tmp_path / "back"
    assert convert.main(["from-hf", str(out), str(again), "--config", str(config)]) == 0
    assert convert.main(["to-hf", str(again), str(back)]) == 0
    ours, theirs_back = (load_file(folder / "model.safetensors") for folder in (out, back))
    assert ours.keys() == theirs_back.keys() and all(torch.equal(ours[key], theirs_back[key]) for key in ours)
    assert "resumed from" in train(config, f"run_dir={again}", "train.total_tokens=512")
    assert load_model(again, CPU).step == 2


def train(config: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "pretrain.train", str(config), *overrides]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
