"""Finished parts into one shard, copied piece by piece: no length or token is held in memory."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.corpus import Corpus, Piece
from data_tools.documents import MOST_SETS, open_documents, write_header
from data_tools.files import CHUNK_BYTES, new_file, sha256_file
from data_tools.index import write_index
from data_tools.shards import ROWS, ShardError, ShardPaths


def merge_parts(corpus: Corpus, paths: ShardPaths, on_bytes: Callable[[int], None]) -> dict[str, str]:
    """Join a corpus's pieces, in order, as `.bin`, `.idx` and document table; returns each one's sha256.

    Args:
        on_bytes: hears how many more bytes of tokens have been copied.

    Raises:
        ShardError: a piece's tokens and table do not agree.
    """
    hashes = {"bin_sha256": _join_tokens(corpus, paths.bin, on_bytes)}
    _join_tables(corpus, paths.documents)
    write_index(paths.idx, corpus.dtype, open_documents(paths.documents)["tokens"])
    return hashes | {"idx_sha256": sha256_file(paths.idx), "documents_sha256": sha256_file(paths.documents)}


def _join_tokens(corpus: Corpus, path: Path, on_bytes: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with new_file(path) as temporary, open(temporary, "wb") as joined:
        for piece in corpus.pieces:
            with open(piece.bin, "rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    joined.write(chunk)
                    on_bytes(len(chunk))
    return digest.hexdigest()


def _join_tables(corpus: Corpus, path: Path) -> None:
    names = sorted({name for piece in corpus.pieces for name in piece.set_names})
    if len(names) > MOST_SETS:
        raise ShardError(f"{len(names)} set names, and a shard holds {MOST_SETS}; is redpajama_set_name one of sets?")
    numbers = {name: number for number, name in enumerate(names)}
    with new_file(path) as temporary, open(temporary, "wb") as joined:
        write_header(joined, sum(piece.document_count for piece in corpus.pieces))
        for piece in corpus.pieces:
            table, places = _table(piece), np.array([numbers[name] for name in piece.set_names], np.uint16)
            for first in range(0, len(table), ROWS):
                rows = np.array(table[first : first + ROWS])
                rows["set"] = places[rows["set"]]
                joined.write(rows.tobytes())


def _table(piece: Piece) -> np.ndarray:
    table = open_documents(piece.documents)
    found = (len(table), int(table["tokens"].sum(dtype=np.int64)))
    if found != (piece.document_count, piece.tokens):
        raise ShardError(
            f"{piece.documents}: {found[0]} documents of {found[1]} tokens, where there should be "
            f"{piece.document_count} of {piece.tokens}; delete it and run data_tools.tokenize again"
        )
    return table
