"""A SentencePiece tokenizer with the ids and the hash that shards and checkpoints depend on."""

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sentencepiece import SentencePieceProcessor

MISTRAL = "mistral"


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the ids of a shard."""

    name: str
    sha256: str
    vocab_size: int
    eos_id: int


class TokenizerError(ValueError):
    """The tokenizer file can't be used; the message names it."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded SentencePiece model; ``sha256`` is the hash of its file, ``serialized``."""

    name: str
    sha256: str
    serialized: bytes = field(repr=False)
    processor: SentencePieceProcessor = field(repr=False, compare=False)

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Load a SentencePiece file, or by the name ``mistral`` that of ``mistral_common``.

        Raises:
            TokenizerError: no such file, not a SentencePiece model, or a model without an
                end-of-document (EOS) piece.
        """
        path = resolve_tokenizer(source)
        try:
            serialized = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: can't read the tokenizer: {error.strerror}") from error
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(serialized)
        except RuntimeError as error:
            raise TokenizerError(f"{path}: not a SentencePiece model") from error
        if processor.eos_id() < 0:
            raise TokenizerError(f"{path}: has no EOS piece, which must end every document; train it with an eos_id")
        name = MISTRAL if str(source) == MISTRAL else path.name
        return cls(name, hashlib.sha256(serialized).hexdigest(), serialized, processor)

    @property
    def record(self) -> TokenizerRecord:
        """What shards keep of it."""
        return TokenizerRecord(self.name, self.sha256, self.vocab_size, self.eos_id)

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are 0 … vocab_size − 1."""
        return self.processor.vocab_size()

    @property
    def eos_id(self) -> int:
        """Id of the piece that ends a document."""
        return self.processor.eos_id()

    @property
    def bos_id(self) -> int | None:
        """Id of the piece that may start a document, None where the model has none."""
        bos_id = self.processor.bos_id()
        return bos_id if bos_id >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS; text that spells ``</s>`` gets ordinary pieces."""
        return self.processor.encode(text)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, as :meth:`encode` gives them."""
        return self.processor.encode(texts, num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control pieces (BOS, EOS) give nothing."""
        return self.processor.decode(ids)


def resolve_tokenizer(source: str | Path) -> Path:
    """Path that a ``--tokenizer`` value means; TokenizerError if ``mistral`` isn't installed."""
    if str(source) != MISTRAL:
        return Path(source)
    # Located, not imported: the package pulls in dozens of modules for one file's sake.
    package = importlib.util.find_spec("mistral_common")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder, "data", "tokenizer.model.v1")
        if path.is_file():
            return path
    raise TokenizerError(
        "tokenizer 'mistral': no installed mistral_common with data/tokenizer.model.v1; "
        "run `pip install mistral-common`, or give the path of a SentencePiece model"
    )
