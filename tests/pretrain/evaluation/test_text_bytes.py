"""How much text tokens are: against the manifest and the texts themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from data_tools.shards import Manifest, ShardPaths
from data_tools.tokenizer import Tokenizer
from pretrain.evaluation import text_bytes
from pretrain.evaluation.text_bytes import count_text_bytes

CORPUS = Path(__file__).parents[2] / "data" / "sotu_small.jsonl"


def test_all_documents_have_the_manifests_bytes(shard, stream: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.load(ShardPaths.of(shard.prefix).tokenizer)
    from_the_start = np.concatenate([[tokenizer.eos_id], stream])  # the first token counted too
    manifest = Manifest.read(ShardPaths.of(shard.prefix).manifest)
    assert count_text_bytes(from_the_start, tokenizer) == manifest.text_bytes


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_bytes_of_odd_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dummy_prefix: bool) -> None:
    monkeypatch.setattr(text_bytes, "COUNTED_TOKENS", 7)  # bounds inside the texts
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
