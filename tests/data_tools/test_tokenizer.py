import hashlib
import importlib
import io
import sys

import pytest
from sentencepiece import SentencePieceTrainer

from data_tools.tokenizer import Tokenizer, TokenizerError
from data_tools.train_tokenizer import main, train_tokenizer

HARD_TEXTS = [
    "",
    "  two leading and trailing spaces  ",
    "tabs\tand\n\nnewlines\r\n",
    "digits 1234567890",
    "snowman ☃, Ægir, 漢字, 🦙 and a NUL \x00",
    "</s><s><unk>",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_corpus_survives_the_round_trip_and_batches_agree(tokenizer, records):
    texts = [record["text"] for record in records]
    ids = [tokenizer.encode(text) for text in texts]

    assert [tokenizer.decode(document) for document in ids] == texts
    assert tokenizer.encode_batch(texts, threads=2) == ids
    assert max(map(max, ids)) < tokenizer.vocab_size == 600
    assert not any({tokenizer.bos_id, tokenizer.eos_id} & set(document) for document in ids)


def test_characters_outside_the_vocabulary_become_their_bytes(tokenizer):
    pieces = [tokenizer.processor.IdToPiece(i) for i in tokenizer.encode("☃")]

    assert pieces[-3:] == ["<0xE2>", "<0x98>", "<0x83>"]


def test_special_pieces_and_digits(tokenizer):
    assert (tokenizer.processor.unk_id(), tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.processor.pad_id() == -1
    pieces = [tokenizer.processor.IdToPiece(i) for i in tokenizer.encode("1790")]
    assert pieces[-4:] == ["1", "7", "9", "0"]


def test_load_hashes_the_file(tokenizer, tokenizer_file):
    assert tokenizer.name == tokenizer_file.name
    assert tokenizer.sha256 == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()


def test_load_names_a_file_that_is_no_tokenizer(tmp_path, corpus):
    with pytest.raises(TokenizerError, match=r"sotu_small.jsonl: not a SentencePiece model"):
        Tokenizer.load(corpus)
    with pytest.raises(TokenizerError, match=r"none.model: can't read the tokenizer: No such file"):
        Tokenizer.load(tmp_path / "none.model")


def test_load_refuses_a_model_without_eos(tmp_path, records):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(records[0]["text"].split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=100,
        eos_id=-1,
        minloglevel=2,
    )
    path = tmp_path / "endless.model"
    path.write_bytes(model.getvalue())

    with pytest.raises(TokenizerError, match=r"endless.model: has no EOS piece"):
        Tokenizer.load(path)


def test_mistral_is_found_in_its_package_without_importing_it(tmp_path, monkeypatch, tokenizer_file):
    data = tmp_path / "mistral_common" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (data / "tokenizer.model.v1").write_bytes(tokenizer_file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    tokenizer = Tokenizer.load("mistral")

    assert (tokenizer.name, tokenizer.vocab_size) == ("mistral", 600)
    assert "mistral_common" not in sys.modules


def test_mistral_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(TokenizerError, match="pip install mistral-common"):
        Tokenizer.load("mistral")


def test_training_is_deterministic(corpus, tokenizer):
    assert train_tokenizer([corpus], vocab_size=600) == tokenizer.serialized


def test_train_command_writes_a_model_or_names_the_fault(tmp_path, corpus, capsys):
    output = tmp_path / "new" / "tok.model"

    def run(source: object, size: int) -> int:
        arguments = ["--input", str(source), "--vocab-size", str(size), "--output", str(output)]
        return main(arguments)

    assert run(corpus, 400) == 0
    assert Tokenizer.load(output).vocab_size == 400
    output.unlink()

    assert run(corpus, 100) == 1
    assert "--vocab-size 100 can't be made of this text" in capsys.readouterr().err
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": 5}\n')
    assert run(broken, 400) == 1
    assert f"{broken}:2: `text` is int" in capsys.readouterr().err
    assert not output.exists()
