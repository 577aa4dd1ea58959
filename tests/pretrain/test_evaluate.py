"""The command as a user meets it, on real checkpoints and folders: what it writes, refuses, compares, leaves alone."""

import csv
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data_tools.dataset import open_dataset
from data_tools.shards import open_shard
from data_tools.tokenizer import Tokenizer
from data_tools.train_tokenizer import train_tokenizer
from longhorn_layers.config import AttentionConfig, LonghornConfig, ModelConfig
from longhorn_layers.hf.tokenizer import write_tokenizer
from longhorn_layers.model import LanguageModel
from pretrain import evaluate
from pretrain.checkpoint.imported import write_imported
from pretrain.config import Config, DataConfig
from pretrain.data import token_stream
from pretrain.evaluation.losses import evaluate_contexts
from pretrain.hf.mapping import to_hf_model

TEXT = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"
FILES = ["perplexity.csv", "perplexity.json", "perplexity.png", "positions.csv", "positions.png"]


@dataclass
class Trained:
    """A run with a checkpoint, and its model."""

    run: Path
    model: LanguageModel
    prefix: str
    tokenizer: Path

    def evaluate(self, *sources: Path, contexts: str = "64,256", more: tuple[object, ...] = ()) -> int:
        scored = ("--data", self.prefix, "--contexts", contexts, "--max-tokens", 600)
        return evaluate.main([str(a) for a in (*(sources or (self.run,)), *scored, "--device=cpu", *more)])

    def hf_folder(self, folder: Path) -> Path:
        """The weights as transformers writes them, with a tokenizer."""
        folder.mkdir()
        write_tokenizer(self.tokenizer, folder)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        to_hf_model(self.model, theirs, torch.float32).save_pretrained(folder)
        return folder


def make_run(folder: Path, shard, config: ModelConfig) -> Trained:  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    model = LanguageModel(config).eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.2)
    record = Tokenizer.load(shard.tokenizer).record
    data = DataConfig(train=shard.prefix, seqlen=256)
    named = {name: getattr(record, name) for name in ("name", "sha256", "vocab_size", "eos_id")}
    write_imported(folder, model, Config(run_dir=str(folder), model=config, data=data), named)
    return Trained(folder, model, shard.prefix, shard.tokenizer)


@pytest.fixture
def trained(shard, tmp_path: Path) -> Trained:  # type: ignore[no-untyped-def]
    model = ModelConfig(LonghornConfig(d_state=4), vocab_size=512, d_model=16, n_layer=1)
    return make_run(tmp_path / "run", shard, model)


def result(folder: Path) -> dict:
    return json.loads((folder / "perplexity.json").read_text())


def losses(report: dict) -> list[float]:
    return [row["loss"] for found in report["sets"] for row in found["contexts"]]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_its_report(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained.evaluate(contexts="256,64", more=("--chunk", 100)) == 0
    output = trained.run / "evaluation" / "step_00000000"
    assert sorted(path.name for path in output.iterdir()) == FILES
    report = result(output)
    assert report["data"]["digest"] == open_dataset(trained.prefix).digest
    assert [report[key] for key in ("step", "consumed_tokens", "training_context")] == [0, 0, 256]
    assert (report["dtype"], report["torch"], report["contexts"]) == ("float32", torch.__version__, [64, 256])
    everything, long = report["sets"]
    assert (everything["name"], long["name"]) == ("all", "≥ 256 tokens")
    expected = evaluate_contexts(trained.model, token_stream(open_dataset(trained.prefix))[:513], [64, 256])
    for row, found in zip(everything["contexts"], expected, strict=True):
        assert (row["context"], row["tokens"]) == (found.context, 512)
        assert row["loss"] == pytest.approx(found.loss, rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(found.nats / math.log(2) / everything["text_bytes"], rel=1e-6)
        assert row["ratio"] == pytest.approx(found.perplexity / expected[0].perplexity, rel=1e-6)
    rows = table(output / "perplexity.csv")
    assert [(row["documents"], row["context"]) for row in rows] == [
        (name, context) for name in ("all", "≥ 256 tokens") for context in ("64", "256")
    ]
    assert float(rows[1]["perplexity"]) == everything["contexts"][1]["perplexity"]
    assert (output / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert f"{everything['contexts'][0]['perplexity']:.4f}" in shown.out
    assert "ratio to 64" in shown.out and str(output / "perplexity.png") in shown.out
    assert "evaluating" not in shown.out and "tokens/s" in shown.err
    for found in (everything, long):
        assert [position["last"] for position in found["positions"]][-3:] == [128, 192, 256]
        short = [position for position in found["positions"] if position["last"] <= 64]
        assert sum(position["targets"] for position in short) == 512  # of all windows of 64
        total = sum(position["loss"] * position["targets"] for position in short)
        assert total / 512 == pytest.approx(found["contexts"][0]["loss"], rel=1e-9)
    positions = table(output / "positions.csv")
    assert len(positions) == 2 * 16 and float(positions[0]["loss"]) == everything["positions"][0]["loss"]
    assert (output / "positions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(LonghornConfig(d_state=4), vocab_size=512, d_model=16, n_layer=2),
        ModelConfig(AttentionConfig(head_dim=8), vocab_size=512, d_model=16, n_layer=1, d_ff=32, tie_embeddings=False),
    ],
    ids=["longhorn", "llama"],
)
def test_a_folder_for_transformers_gives_the_checkpoints_numbers(shard, tmp_path: Path, config: ModelConfig) -> None:  # type: ignore[no-untyped-def]
    trained = make_run(tmp_path / "run", shard, config)
    folder = trained.hf_folder(tmp_path / "exported")
    assert trained.evaluate(trained.run, folder, more=("--output", tmp_path / "joint")) == 0
    theirs, ours = result(folder / "evaluation"), result(trained.run / "evaluation" / "step_00000000")
    assert losses(theirs) == pytest.approx(losses(ours), abs=1e-6)
    assert theirs["training_context"] is None  # it has no training.json to say so
    models = json.loads((tmp_path / "joint" / "comparison.json").read_text())["models"]
    assert [model["label"] for model in models] == ["run", "exported"]
    assert theirs["tokenizer"] == ours["tokenizer"]


def test_several_models_are_compared(
    trained: Trained, shard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    other = make_run(tmp_path / "other" / "run", shard, trained.model.config)
    joint = tmp_path / "joint"
    assert trained.evaluate(trained.run, other.run, more=("--output", joint, "--paper")) == 0
    names = ["comparison.csv", "comparison.json", "comparison.png", "comparison_positions.png"]
    assert sorted(path.name for path in joint.iterdir()) == names
    rows = table(joint / "comparison.csv")
    models = list(dict.fromkeys(row["model"] for row in rows))
    assert models[:2] == [str(run / "checkpoints" / "step_00000000") for run in (trained.run, other.run)]
    llama = [row for row in rows if row["model"].startswith("LLaMA")]
    assert [(row["context"], row["perplexity"]) for row in llama] == [("2048", "7.86")]  # "above 10" is no number
    mamba = {row["context"]: float(row["perplexity"]) for row in rows if row["model"].startswith("Mamba")}
    assert mamba == {"2048": 8.43, "4096": 8.46, "8192": 8.43, "16384": 8.46, "32768": 8.42}
    # The results alone make the same comparison.
    results = [run / "evaluation" / "step_00000000" / "perplexity.json" for run in (trained.run, other.run)]
    capsys.readouterr()
    assert evaluate.main([*map(str, results), "--output", str(tmp_path / "again"), "--paper"]) == 0
    again = tmp_path / "again"
    assert (again / "comparison.csv").read_bytes() == (joint / "comparison.csv").read_bytes()
    assert "note:" not in capsys.readouterr().out
    changed = result(results[0].parent)
    changed["data"]["digest"], changed["tokenizer"]["sha256"] = "other", "other"
    results[0].write_text(json.dumps(changed))
    assert evaluate.main([*map(str, results), "--output", str(again)]) == 0
    shown = capsys.readouterr().out
    assert "note: the models were scored on different data" in shown and "compare bits per byte" in shown


def test_what_was_measured_before_is_not_measured_again(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    output = trained.run / "evaluation" / "step_00000000"
    assert trained.evaluate() == 0
    first = result(output)
    known = first | {"sets": [found | {"documents": 5} for found in first["sets"]]}  # to know it by
    (output / "perplexity.json").write_text(json.dumps(known))
    capsys.readouterr()
    assert trained.evaluate() == 0
    assert "measured before" in capsys.readouterr().out and result(output)["sets"][0]["documents"] == 5
    shutil.rmtree(trained.run / "checkpoints")
    with torch.no_grad():
        trained.model.embedding.weight.mul_(2)
    config = Config(model=trained.model.config, data=DataConfig(seqlen=256))
    write_imported(trained.run, trained.model, config, first["tokenizer"])
    assert trained.evaluate() == 0  # other weights in the same place
    assert "measured before" not in capsys.readouterr().out
    assert losses(result(output)) != pytest.approx(losses(first), rel=1e-3)


def test_output_folder_and_no_long_documents(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = open_shard(trained.prefix)  # kept: it unmaps its lengths when it goes
    context, output = int(shard.sequence_lengths.max()) + 1, tmp_path / "elsewhere"
    more = ("--max-tokens", context, "--output", output)
    assert trained.evaluate(contexts=str(context), more=more) == 0
    assert len(result(output)["sets"]) == 1
    assert f"none fills a context of {context:,} tokens" in capsys.readouterr().out
    assert not (trained.run / "evaluation").exists()


@pytest.mark.parametrize("named", [True, False])  # the same tokenizer's ids: test_a_folder_for_transformers_…
def test_another_tokenizer_is_refused(
    trained: Trained, tmp_path: Path, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its SentencePiece file where the folder has one, else by the ids that it gives."""
    folder, other = trained.hf_folder(tmp_path / "exported"), tmp_path / "other.model"
    other.write_bytes(train_tokenizer([TEXT], 400))
    write_tokenizer(other, folder)
    if named:
        shutil.copy(other, folder / "tokenizer.model")
    assert trained.evaluate(folder, more=("--output", tmp_path / "refused")) == 1
    message = capsys.readouterr().err
    assert "shard: " in message and ("the tokenizer has sha256" if named else "gives other ids than") in message
    assert not (tmp_path / "refused").exists()


def test_faults_end_with_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained.evaluate(tmp_path) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
    assert trained.evaluate(contexts="1048576") == 1
    assert "shard: " in (message := capsys.readouterr().err) and "1,048,576" in message
    assert evaluate.main([str(trained.run), "--data", str(tmp_path / "nothing"), "--contexts", "256"]) == 1
    assert "nothing.manifest.json does not exist" in capsys.readouterr().err
    no_result = tmp_path / "config.json"
    no_result.write_text("{}")
    assert evaluate.main([str(no_result), "--output", str(tmp_path)]) == 1
    assert f"{no_result} is no perplexity.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x", "--contexts", "256,x"], "'256,x': write tokens like 2048,4096,8192"),
        (["--data", "x"], "--data and --contexts belong together"),
        ([], "nothing to do"),
        (["other", "--data", "x", "--contexts", "8"], "give --output"),
        (["other", "--tasks", "piqa", "--output", "x"], "leave it out"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["run", *arguments])
    assert message in capsys.readouterr().err
