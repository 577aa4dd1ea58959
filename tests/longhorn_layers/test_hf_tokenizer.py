"""The exported tokenizer gives SentencePiece's ids, and refuses models for which it could not."""

import importlib.util
import json
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

from longhorn_layers.hf import tokenizer as tokenizer_module
from longhorn_layers.hf.configuration_longhorn import LonghornConfig
from longhorn_layers.hf.tokenizer import write_tokenizer

CORPUS = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"
SYMBOLS = ["<sep>", "<sep><sep>", "▁▁▁▁", "\n\n", "(c)", "["]
TEXTS = [
    "",
    " ",
    "a",
    "  two leading spaces, runs    of      them, and at the end   ",
    "\n\nlines\n and\r\n\ttabs\t\tand \u00a0 \u3000 other spaces\u200b",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷, accents naïve e\u0301, 東京 Москва العربية हिन्दी 𝔘𝔫𝔦",
    "1776 3.14159 $1,000,000 0x1F",
    "<s> </s> <unk> <pad> <0x41> ▁ literal ▁▁",
    "def f(x):\n    if x:\n        return {'a': [1, 2]}\n",
    "control \x00\x01\x7f\ufeff and \U0010ffff",
    "aaaaaaaaaaaaaaaa ababababab",
]
SYMBOL_TEXTS = [
    "<sep>",
    "<sep> <sep>",
    "<sep><sep><sep>first[second(c)third",
    "the<sep>people [ of ]   the      union\n\n\n(c)",
    "    indented by four",
]


def documents() -> list[str]:
    return [json.loads(line)["text"] for line in CORPUS.read_text().splitlines()]


def train(folder: Path, **options: object) -> Path:
    """A small model; by default of the kind that the exporter supports."""
    defaults = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents()[:3] for line in text.splitlines()[:40]),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        num_threads=1,
        **defaults | options,
    )
    return folder / "tokenizer.model"


def assert_same_ids(spm_path: Path, folder: Path, texts: list[str]) -> None:
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = SentencePieceProcessor(model_file=str(spm_path))
    for text in texts:
        ids = theirs.encode(text)
        assert ours(text)["input_ids"] == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids) == text.replace("▁", " "), repr(text)
    assert len(ours) == theirs.vocab_size()


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_ids_and_text_equal_sentencepiece(tmp_path: Path, dummy_prefix: bool) -> None:
    spm_path = train(tmp_path, add_dummy_prefix=dummy_prefix)
    write_tokenizer(spm_path, tmp_path / "out" / "deep")
    assert_same_ids(spm_path, tmp_path / "out" / "deep", TEXTS + documents())


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_user_defined_symbols_are_cut_out_first(tmp_path: Path, dummy_prefix: bool) -> None:
    spm_path = train(tmp_path, add_dummy_prefix=dummy_prefix, user_defined_symbols=SYMBOLS)
    write_tokenizer(spm_path, tmp_path)
    assert_same_ids(spm_path, tmp_path, SYMBOL_TEXTS + TEXTS + documents())
    symbol = SentencePieceProcessor(model_file=str(spm_path)).piece_to_id("<sep><sep>")
    assert symbol in AutoTokenizer.from_pretrained(tmp_path)("a<sep><sep>b")["input_ids"]


def test_mistrals_model(tmp_path: Path) -> None:
    package = importlib.util.find_spec("mistral_common")
    if package is None:
        pytest.skip("mistral_common is not installed")
    spm_path = Path(package.origin).parent / "data" / "tokenizer.model.v1"
    write_tokenizer(spm_path, tmp_path)
    assert_same_ids(spm_path, tmp_path, TEXTS + documents())


def test_special_tokens(tmp_path: Path) -> None:
    write_tokenizer(train(tmp_path), tmp_path / "out")
    LonghornConfig().save_pretrained(tmp_path / "out")  # as in an export: no code is asked for it
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (ours.unk_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 2, 2)  # <s> is never trained
    assert ours.pad_token_id == 0
    assert ours.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    plain = ours("the union")["input_ids"]
    assert not {0, 1, 2} & set(plain)
    assert ours("the union", add_special_tokens=False)["input_ids"] == plain
    assert ours("a </s> b <s>")["input_ids"][-1] != 1
    assert 2 not in ours("a </s> b <s>")["input_ids"]
    assert ours.decode([*plain, 2], skip_special_tokens=True) == "the union"
    assert ours.decode([*plain, 2]) == "the union</s>"
    assert ours.decode([1, *plain], skip_special_tokens=True) == "the union"
    batch = ours(["the", "the union of states"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1
    assert batch["input_ids"][0][0] == 0


def test_own_padding_piece_is_used(tmp_path: Path) -> None:
    write_tokenizer(train(tmp_path, pad_id=3, bos_id=-1, unk_id=1, eos_id=0), tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (0, 1, 3)
    assert ours.bos_token_id == 0  # what ends a text stands before the next


def test_saving_again_keeps_the_ids(tmp_path: Path) -> None:
    spm_path = train(tmp_path, user_defined_symbols=SYMBOLS)
    write_tokenizer(spm_path, tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_same_ids(spm_path, tmp_path / "second", SYMBOL_TEXTS + TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "model_type is UNIGRAM, must be BPE"),
        ({"byte_fallback": False}, "byte_fallback is off, must be on"),
        (
            {"normalization_rule_name": "nmt_nfkc"},
            "normalization_rule_name is nmt_nfkc, must be id",
        ),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is on, must be off"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is on, must be off"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    spm_path = train(tmp_path, **options)
    with pytest.raises(ValueError, match=message) as error:
        write_tokenizer(spm_path, tmp_path / "out")
    assert str(spm_path) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    spm_path = train(tmp_path)
    model = ModelProto.FromString(spm_path.read_bytes())
    model.normalizer_spec.escape_whitespaces = False
    model.pieces[400].type = ModelProto.SentencePiece.UNUSED
    spm_path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="escape_whitespaces is off.*; it has pieces marked unused"):
        write_tokenizer(spm_path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\xff not a protobuf", b"{}"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="some.model"):
        write_tokenizer(path, tmp_path / "out")


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spm_path = train(tmp_path)
    write_tokenizer(spm_path, tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tokenizer(train(tmp_path, vocab_size=500), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
