import random
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from data_tools.encoder import LONGEST_HELD, Encoder
from data_tools.tokenizer import Tokenizer

SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\0", "▁", "▁▁", "\ufeff", "\u00a0", "\u200b"]
SPELLED = ["</s>", "<s>", "<unk>", "<0x0A>"]
LETTERS = ["e\u0301", "é", "漢", "字。", "🙂", "👨\u200d👩\u200d👧", "ﷺ", "ß", "а", "ا", "한", "\U0010ffff", "\ud7ff"]
WORDS = ["the", "The ", "of", "United States", "e", "1", "1776", ".", ", ", "'s", "--", "("]
ALPHABET = [*SPACES, *SPELLED, *LETTERS, *WORDS]


def ids(encoder: Encoder, content: bytes) -> list[int]:
    return np.frombuffer(content, encoder.dtype).tolist()


def train(path: Path, corpus: Path, **options: object) -> Tokenizer:
    defaults = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "max_sentence_length": 1 << 20,
        "character_coverage": 1.0,
    }
    SentencePieceTrainer.train(input=str(corpus), model_prefix=str(path / "m"), **defaults | options)
    return Tokenizer.load(path / "m.model")


def random_texts(count: int) -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(30))) for _ in range(count)]


@pytest.fixture(scope="module")
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer)


def test_the_ids_are_sentencepieces_on_real_text(encoder, tokenizer, records):
    assert encoder.exact_cuts
    for record in records:
        assert ids(encoder, encoder.encode(record["text"])) == tokenizer.encode(record["text"])


def test_the_ids_are_sentencepieces_on_what_could_confuse_a_cut(encoder, tokenizer):
    for text in ["", " ", "\n", " a", "a ", "\0", "▁a", *random_texts(5000)]:
        assert ids(encoder, encoder.encode(text)) == tokenizer.encode(text), repr(text)


def test_a_text_that_spells_a_control_piece_does_not_end_the_document(encoder, tokenizer):
    found = ids(encoder, encoder.encode("before </s> after<s>"))

    assert tokenizer.eos_id not in found and tokenizer.bos_id not in found
    assert tokenizer.decode(found) == "before </s> after<s>"


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_long_text_is_encoded_in_slices(encoder, tokenizer, records, monkeypatch, size):
    monkeypatch.setattr("data_tools.encoder.SLICE", size)
    # No unit of this text is longer than the largest slices; where one is, it is cut in the same places each time.
    for text in [records[0]["text"][:5000], "word " * 500, "\n" * 2500, "  a" * 900]:
        slices = list(encoder.slices(text))
        assert b"".join(slices) == encoder.encode(text)
        if size >= 64:
            assert ids(encoder, encoder.encode(text)) == tokenizer.encode(text)
            assert max(map(len, slices)) <= 2 * size * encoder.dtype.itemsize


def test_a_text_without_any_place_to_cut_is_cut_all_the_same(encoder, tokenizer, monkeypatch):
    monkeypatch.setattr("data_tools.encoder.SLICE", 100)
    text = "abcdefghij" * 100

    assert tokenizer.decode(ids(encoder, encoder.encode(text))) == text


def test_the_words_held_are_bounded(encoder, tokenizer, monkeypatch):
    monkeypatch.setattr("data_tools.encoder.WORDS_HELD", 50)
    encoder = Encoder(tokenizer)
    text = " ".join(str(number) for number in range(1000)) + " " + "x" * (LONGEST_HELD + 1)

    assert ids(encoder, encoder.encode(text)) == tokenizer.encode(text)
    assert 0 < len(encoder._known) <= 50
    assert max(map(len, encoder._known)) <= LONGEST_HELD


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "byte_fallback": False, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
        {"model_type": "bpe", "byte_fallback": True, "split_by_whitespace": False},
    ],
    ids=str,
)
def test_other_kinds_of_models_are_encoded_as_they_are(tmp_path, corpus, options):
    common = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    tokenizer = train(tmp_path, corpus, **common | options)
    encoder = Encoder(tokenizer)

    assert not encoder.exact_cuts
    for text in random_texts(300):
        assert ids(encoder, encoder.encode(text)) == tokenizer.encode(text)


def test_more_pieces_than_16_bits_hold_are_stored_in_32(tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", 65_500)
    encoder = Encoder(tokenizer)

    assert (encoder.dtype, len(encoder.eos)) == (np.int32, 4)
    assert ids(encoder, encoder.encode("The State of the Union")) == tokenizer.encode("The State of the Union")
