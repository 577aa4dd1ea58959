import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.documents import write_documents
from data_tools.files import sha256_file
from data_tools.index import token_dtype, write_index
from data_tools.shards import (
    FORMAT_VERSION,
    Counts,
    Manifest,
    ShardError,
    ShardPaths,
    TokenizerRecord,
    open_shard,
    verify_shard,
)

EOS = 2


def write_shard(prefix: Path, documents: list[list[int]], vocab_size: int = 600) -> Manifest:
    """A shard of any token ids, with a manifest that describes the files truly."""
    paths = ShardPaths.of(prefix)
    dtype = token_dtype(vocab_size)
    np.array([token for ids in documents for token in ids], dtype).tofile(paths.bin)
    write_index(paths.idx, dtype, np.array([len(ids) for ids in documents]))
    with write_documents(paths.documents) as table:
        for ids in documents:
            table.add(str(ids), len(ids), "Set", 1)
    paths.tokenizer.write_bytes(b"stands for a tokenizer")
    counts = Counts(len(documents), sum(map(len, documents)), 100)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        **dataclasses.asdict(counts),
        sets={"Set": counts},
        empty_documents=0,
        bad={},
        dtype=dtype.name,
        tokenizer=TokenizerRecord("t", sha256_file(paths.tokenizer), vocab_size, EOS),
        bin_sha256=sha256_file(paths.bin),
        idx_sha256=sha256_file(paths.idx),
        documents_sha256=sha256_file(paths.documents),
        sources=[],
    )
    manifest.write(paths.manifest)
    return manifest


def edit_manifest(prefix: Path, **changes: object) -> None:
    path = ShardPaths.of(prefix).manifest
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_the_stored_type_holds_every_id_of_the_vocabulary(tmp_path, vocab_size, dtype):
    documents = [[vocab_size - 1, 300, EOS], [5, EOS]]

    manifest = write_shard(tmp_path / "a.b", documents, vocab_size)

    dataset = open_shard(tmp_path / "a.b")
    assert dataset[0].dtype == dtype
    assert manifest.dtype == np.dtype(dtype).name
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert (tmp_path / "a.b.bin").stat().st_size == 5 * np.dtype(dtype).itemsize
    assert verify_shard(tmp_path / "a.b") == []


def test_a_manifest_survives_writing_and_reading(tmp_path):
    manifest = write_shard(tmp_path / "x", [[5, EOS]])

    assert Manifest.read(tmp_path / "x.manifest.json") == manifest


def test_a_manifest_that_can_not_be_read_is_named_with_its_key(tmp_path):
    path = tmp_path / "x.manifest.json"
    with pytest.raises(ShardError, match=r"x.manifest.json does not exist.*data_tools.tokenize"):
        open_shard(tmp_path / "x")
    write_shard(tmp_path / "x", [[5, EOS]])

    edit_manifest(tmp_path / "x", tokens="many")
    with pytest.raises(ShardError, match=r"x.manifest.json: tokens: .*integer"):
        Manifest.read(path)
    edit_manifest(tmp_path / "x", tokens=2, format_version=99)
    with pytest.raises(ShardError, match=r"format_version 99, this code reads 2"):
        Manifest.read(path)
    path.write_text("{")
    with pytest.raises(ShardError, match=r"x.manifest.json: the file: Invalid JSON"):
        Manifest.read(path)


def test_opening_names_a_missing_cut_or_foreign_file(tmp_path):
    prefix = tmp_path / "x"
    write_shard(prefix, [[5, 6, EOS], [7, EOS]])
    content = (tmp_path / "x.bin").read_bytes()

    (tmp_path / "x.bin").write_bytes(content[:-2])
    with pytest.raises(ShardError, match=r"x.bin has 8 bytes; .*2 documents and 5 tokens take 10"):
        open_shard(prefix)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ShardError, match=r"x.bin is missing"):
        open_shard(prefix)
    (tmp_path / "x.bin").write_bytes(content)
    (tmp_path / "x.idx").write_bytes(b"not an index at all")
    with pytest.raises(ShardError, match=r"x.idx has 19 bytes; .* take 82"):
        open_shard(prefix)


@pytest.mark.parametrize("kind", ["bin", "idx", "documents.npy", "tokenizer.model"])
def test_verify_finds_a_flipped_byte(tmp_path, kind):
    write_shard(tmp_path / "x", [[5, 6, EOS], [7, EOS]])
    path = tmp_path / f"x.{kind}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)

    problems = verify_shard(tmp_path / "x")

    assert problems[0].startswith(f"{path}: sha256 is ")


@pytest.mark.parametrize(
    ("documents", "problem"),
    [
        ([[5, 600, EOS], [7, EOS]], "1 token ids are outside the vocabulary of 600"),
        ([[5, EOS], [7, 8]], "1 documents do not end with EOS (2), the first is 1"),
        ([[5, EOS, 6, EOS], [7, EOS]], "EOS (2) occurs 3 times in 2 documents"),
    ],
)
def test_verify_finds_wrong_tokens_under_right_hashes(tmp_path, documents, problem):
    write_shard(tmp_path / "x", documents)

    assert problem in verify_shard(tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"documents": 3}, "x.idx has 82 bytes; the manifest's 3 documents and 4 tokens take 102"),
        ({"tokens": 5}, "x.bin has 8 bytes; the manifest's 2 documents and 5 tokens take 10"),
        (
            {"dtype": "int32", "tokens": 2},
            "x.idx: an index of 4 tokens of uint16; the manifest says 2 of int32",
        ),
    ],
)
def test_verify_finds_wrong_counts(tmp_path, changes, problem):
    write_shard(tmp_path / "x", [[5, EOS], [7, EOS]])
    edit_manifest(tmp_path / "x", **changes)

    assert verify_shard(tmp_path / "x") == [f"{tmp_path}/{problem}"]


def test_verify_finds_a_document_table_of_other_documents(tmp_path):
    write_shard(tmp_path / "x", [[5, EOS], [7, EOS]])
    write_shard(tmp_path / "y", [[5, 6, EOS], [EOS]])
    (tmp_path / "x.documents.npy").write_bytes((tmp_path / "y.documents.npy").read_bytes())
    edit_manifest(tmp_path / "x", documents_sha256=sha256_file(tmp_path / "x.documents.npy"))

    assert verify_shard(tmp_path / "x") == [f"{tmp_path}/x.documents.npy: other documents or lengths than the index's"]


def test_verify_names_an_index_whose_documents_are_out_of_place(tmp_path):
    write_shard(tmp_path / "x", [[5, EOS], [7, 8, EOS], [9, EOS]])
    path = tmp_path / "x.idx"
    content = bytearray(path.read_bytes())
    content[34 + 3 * 4 + 8 + 5] ^= 0xFF  # the second document's offset
    path.write_bytes(content)

    hash_problem, place_problem = verify_shard(tmp_path / "x")

    assert hash_problem.startswith(f"{path}: sha256 is ")
    assert place_problem == "document 1 of the index is not where the one before it ends"
