"""Command: train a SentencePiece BPE tokenizer of the LLaMA/Mistral kind.

Special pieces: unk 0, bos 1, eos 2, no padding. Text is taken as it is (no normalisation, no spaces
removed), digits stand alone, and characters outside the vocabulary become their UTF-8 bytes, so
that every text survives the round trip. The text is held in memory: some hundred MB at most.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from data_tools.files import write_durably
from data_tools.readers import BadLine, find_files, read_documents

# SentencePiece silently leaves out "sentences" above its default of 4192 bytes.
MAX_SENTENCE_BYTES = 1 << 20


def train_tokenizer(files: list[Path], vocab_size: int) -> bytes:
    """Train on the documents' lines; returns the model file's content, equal for equal input.

    Raises:
        ValueError: a bad line in the files, or a vocabulary that SentencePiece can't make of this
            text.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(files),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            character_coverage=0.99995,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"--vocab-size {vocab_size} can't be made of this text: {error}") from error
    return model.getvalue()


def _lines(files: list[Path]) -> Iterator[str]:
    for path in files:
        for item in read_documents(path):
            if isinstance(item, BadLine):
                raise ValueError(str(item))
            yield from filter(None, item.text.split("\n"))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.train_tokenizer", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="globs of .jsonl, .jsonl.gz, .jsonl.zst files")
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        help="pieces, the 256 bytes and 3 specials included",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="model file to write")
    arguments = parser.parse_args(argv)
    try:
        files = find_files(arguments.input)
        model = train_tokenizer(files, arguments.vocab_size)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_durably(arguments.output, model)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {arguments.vocab_size} pieces from {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
