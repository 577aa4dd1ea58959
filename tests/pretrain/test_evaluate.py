"""Perplexity at several contexts: the definition on real text, and what the command writes."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer

from data_tools.dataset import open_dataset
from data_tools.shards import Manifest, ShardPaths, open_shard
from data_tools.tokenizer import Tokenizer
from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain import evaluate
from pretrain.checkpoint import CheckpointError, LoadedModel
from pretrain.config import Config, DataConfig
from pretrain.data import token_stream
from pretrain.evaluate import (
    ContextResult,
    EvaluationError,
    count_text_bytes,
    document_sets,
    evaluate_contexts,
)

CORPUS = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"
VOCAB_SIZE = 512


@pytest.fixture(scope="module")
def prefix(shard) -> str:
    """Twelve real documents of very different lengths."""
    return shard.prefix


@pytest.fixture(scope="module")
def stream(prefix: str) -> np.ndarray:
    return token_stream(open_dataset(prefix))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Random weights, scaled so that what is far back changes the loss."""
    torch.manual_seed(0)
    config = ModelConfig(LonghornConfig(d_state=4), vocab_size=VOCAB_SIZE, d_model=16, n_layer=2)
    model = LanguageModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("_proj.weight", "dt_head.weight")):
                weight.mul_(3)
            elif name.endswith("embedding.weight"):
                weight.mul_(10)
            elif name.endswith("dt_bias"):
                weight.sub_(3)  # forget slowly
    return model.eval()


@torch.inference_mode()
def direct_nats(model: LanguageModel, tokens: np.ndarray, context: int) -> list[float]:
    """The definition: each window alone through the whole model, a softmax over the vocabulary."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    losses = []
    for start in range(0, len(ids) - 1, context):
        logits = model(ids[None, start : start + context])[0, :, :VOCAB_SIZE].double()
        targets = ids[start + 1 : start + context + 1]
        losses += (-logits.log_softmax(-1).gather(1, targets[:, None])).flatten().tolist()
    return losses


def test_equals_the_definition_on_real_text(model: LanguageModel, stream: np.ndarray) -> None:
    tokens = stream[:2100]
    results = evaluate_contexts(model, tokens, [1024, 64, 256], chunk=96, batch_tokens=500)
    assert [result.context for result in results] == [64, 256, 1024]
    for result in results:
        expected = direct_nats(model, tokens[:2049], result.context)
        assert result.tokens == len(expected) == 2048
        assert result.loss == pytest.approx(np.mean(expected), rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert len({round(result.nats, 1) for result in results}) == 3  # the context does matter


@pytest.mark.parametrize("chunk", [1, 37, 511, 513])
def test_chunks_do_not_change_the_loss(model: LanguageModel, stream: np.ndarray, chunk: int) -> None:
    tokens = stream[:1025]
    (whole,) = evaluate_contexts(model, tokens, [512], chunk=512)
    (chunked,) = evaluate_contexts(model, tokens, [512], chunk=chunk)
    assert chunked.nats == pytest.approx(whole.nats, rel=1e-6)


def test_batches_do_not_change_the_loss(model: LanguageModel, stream: np.ndarray) -> None:
    tokens = stream[: 7 * 128 + 1]  # the last batch is smaller
    (alone,) = evaluate_contexts(model, tokens, [128], batch_tokens=1)
    (batched,) = evaluate_contexts(model, tokens, [128], batch_tokens=3 * 128)
    assert batched.nats == pytest.approx(alone.nats, rel=1e-6)


def test_the_state_is_reset_at_each_window(model: LanguageModel, stream: np.ndarray) -> None:
    tokens = stream[:1025]
    (both,) = evaluate_contexts(model, tokens, [512])
    halves = [evaluate_contexts(model, tokens[i : i + 513], [512])[0].nats for i in (0, 512)]
    assert both.nats == pytest.approx(sum(halves), rel=1e-6)
    (carried,) = evaluate_contexts(model, tokens, [1024])
    assert abs(carried.nats - both.nats) > 1e-2


def test_the_same_targets_at_every_context(stream: np.ndarray) -> None:
    """With a model that knows only the target itself, any difference of targets would show."""

    class TargetsOnly(torch.nn.Module):
        embedding = torch.nn.Embedding(1, 1)

        def new_state(self, batch_size: int) -> None:
            return None

        def forward(self, ids, targets, state, reduction):
            return targets.double() ** 2 + 1e-3 * ids

    results = evaluate_contexts(TargetsOnly(), stream[:3000], [16, 128, 512], chunk=50)
    scored = stream[:2561].astype(np.float64)
    expected = (scored[1:] ** 2).sum() + 1e-3 * scored[:-1].sum()
    assert [result.nats for result in results] == pytest.approx([expected] * 3, rel=1e-12)
    assert [result.tokens for result in results] == [2560] * 3


def test_progress_hears_every_token(model: LanguageModel, stream: np.ndarray) -> None:
    heard = []
    evaluate_contexts(model, stream[:1025], [256, 512], chunk=200, on_tokens=heard.append)
    assert sum(heard) == 2 * 1024


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([512, 1024], "1,000 tokens are too few for a context of 1,024 tokens"),
        ([1000], "1,000 tokens are too few for a context of 1,000 tokens and the target"),
        ([96, 256], "context 96 does not divide the largest, 256"),
        ([0, 256], "context 0"),
    ],
)
def test_contexts_that_cannot_be_scored(
    model: LanguageModel, stream: np.ndarray, contexts: list[int], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate_contexts(model, stream[:1000], contexts)


def test_perplexity_of_a_broken_model_is_not_an_error() -> None:
    assert ContextResult(1, 1, 1e4).perplexity == math.inf
    assert math.isnan(ContextResult(1, 1, math.nan).perplexity)


# ---- bytes ----


def test_all_documents_have_the_manifests_bytes(prefix: str, stream: np.ndarray) -> None:
    tokenizer = Tokenizer.load(ShardPaths.of(prefix).tokenizer)
    from_the_start = np.concatenate([[tokenizer.eos_id], stream])  # the first token counted too
    manifest = Manifest.read(ShardPaths.of(prefix).manifest)
    assert count_text_bytes(from_the_start, tokenizer) == manifest.text_bytes


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_bytes_of_odd_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dummy_prefix: bool) -> None:
    monkeypatch.setattr(evaluate, "COUNTED_TOKENS", 7)  # bounds inside the texts
    lines = (json.loads(line)["text"][:3000] for line in CORPUS.read_text().splitlines())
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    tokenizer = Tokenizer.load(tmp_path / "m.model")
    texts = ["the union", "  two  spaces ", "naïve 東京 🙂", "<sep>the<sep> end", "\n\ttab", "é"]
    ids = [tokenizer.eos_id]
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_id]
    assert count_text_bytes(np.array(ids), tokenizer) == sum(len(t.encode()) for t in texts)
    assert count_text_bytes(np.array(ids[:1]), tokenizer) == 0


def test_bits_per_byte() -> None:
    assert ContextResult(8, 100, 100 * math.log(2)).bits_per_byte(400) == pytest.approx(0.25)
    assert math.isnan(ContextResult(8, 1, 1.0).bits_per_byte(0))


# ---- document sets ----


def longest_document(prefix: str) -> int:
    shard = open_shard(prefix)  # kept: it unmaps its lengths when it goes
    return int(shard.sequence_lengths.max())


def test_long_documents_are_whole_and_in_order(prefix: str, stream: np.ndarray) -> None:
    shard = open_shard(prefix)
    context = int(np.median(shard.sequence_lengths)) // 64 * 64
    everything, long = document_sets(prefix, [64, context], None)
    chosen = [i for i, length in enumerate(shard.sequence_lengths) if length >= context]
    assert 0 < len(chosen) == long.documents < everything.documents == len(shard)
    joined = np.concatenate([shard[i] for i in chosen])
    assert len(long.stream) == (len(joined) - 1) // context * context + 1
    assert np.array_equal(long.stream, joined[: len(long.stream)])
    assert np.array_equal(everything.stream, stream[: len(everything.stream)])
    assert 0 <= len(stream) - len(everything.stream) < context


def test_a_long_document_without_a_last_target_is_none(prefix: str) -> None:
    longest = longest_document(prefix)
    assert len(document_sets(prefix, [longest], None)) == 1
    assert len(document_sets(prefix, [longest - 1], None)) == 2


def test_max_tokens_bounds_each_set(prefix: str) -> None:
    assert [len(s.stream) for s in document_sets(prefix, [256], 1000)] == [769, 769]
    with pytest.raises(EvaluationError, match=r"shard: 201 tokens are too few for .* 256 tokens"):
        document_sets(prefix, [256], 200)


# ---- the command ----


@pytest.fixture
def loaded(model: LanguageModel, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    record = Manifest.read(ShardPaths.of(prefix).manifest).tokenizer
    found = LoadedModel(
        model=model,
        config=Config(model=model.config, data=DataConfig(train=prefix, seqlen=256)),
        step=30,
        consumed_tokens=123_456,
        tokenizer={"name": record.name, "sha256": record.sha256},
        path=tmp_path / "run" / "checkpoints" / "step_00000030",
    )
    monkeypatch.setattr(evaluate, "load_model", lambda checkpoint, device: found)
    return found


def run(prefix: str, contexts: str, *more: str) -> int:
    return evaluate.main(["run", "--data", prefix, "--contexts", contexts, "--device=cpu", *more])


def test_the_command_writes_its_report(
    loaded: LoadedModel, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prefix, "256,64", "--max-tokens", "600", "--chunk", "100") == 0
    output = tmp_path / "run" / "evaluation" / "step_00000030"
    assert sorted(path.name for path in output.iterdir()) == [
        "perplexity.csv",
        "perplexity.json",
        "perplexity.png",
    ]
    report = json.loads((output / "perplexity.json").read_text())
    assert report["data"]["digest"] == open_dataset(prefix).digest
    assert (report["step"], report["consumed_tokens"], report["training_context"]) == (
        30,
        123_456,
        256,
    )
    assert (report["dtype"], report["torch"]) == ("float32", torch.__version__)
    everything, long = report["sets"]
    assert (everything["name"], long["name"]) == ("all", "≥ 256 tokens")
    expected = evaluate_contexts(loaded.model, token_stream(open_dataset(prefix))[:513], [64, 256])
    for row, result in zip(everything["contexts"], expected, strict=True):
        assert (row["context"], row["tokens"]) == (result.context, 512)
        assert row["loss"] == pytest.approx(result.loss, rel=1e-6)
        bits = result.nats / math.log(2) / everything["text_bytes"]
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        ratio = result.perplexity / expected[0].perplexity
        assert row["ratio"] == pytest.approx(ratio, rel=1e-6)
    with (output / "perplexity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["documents"], row["context"]) for row in rows] == [
        ("all", "64"),
        ("all", "256"),
        ("≥ 256 tokens", "64"),
        ("≥ 256 tokens", "256"),
    ]
    assert float(rows[1]["perplexity"]) == everything["contexts"][1]["perplexity"]
    assert (output / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert f"{everything['contexts'][0]['perplexity']:.4f}" in shown.out
    assert "ratio to 64" in shown.out and str(output / "perplexity.png") in shown.out
    assert "evaluating" not in shown.out and "tokens/s" in shown.err


def test_output_folder_and_no_long_documents(
    loaded: LoadedModel, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = longest_document(prefix) + 1
    output = tmp_path / "elsewhere"
    assert run(prefix, str(context), "--max-tokens", str(context), "--output", str(output)) == 0
    assert len(json.loads((output / "perplexity.json").read_text())["sets"]) == 1
    assert f"none fills a context of {context:,} tokens" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(
    loaded: LoadedModel, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded.tokenizer["sha256"] = "0" * 64
    assert run(prefix, "256") == 1
    message = capsys.readouterr().err
    assert "shard: the tokenizer has sha256" in message and "0" * 64 in message
    assert not (tmp_path / "run").exists()


def test_faults_end_with_one_line(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(checkpoint: Path, device: torch.device) -> LoadedModel:
        raise CheckpointError(f"{checkpoint}: neither a run nor a checkpoint")

    monkeypatch.setattr(evaluate, "load_model", load)
    assert run(prefix, "256") == 1
    assert capsys.readouterr().err == "error: run: neither a run nor a checkpoint\n"
    assert run(prefix, "1048576") == 1
    assert "shard: " in (message := capsys.readouterr().err) and "1,048,576" in message
    assert run(str(tmp_path / "nothing"), "256") == 1
    assert "nothing.manifest.json does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(prefix, "256,x")
    assert "'256,x': write tokens like 2048,4096,8192" in capsys.readouterr().err
